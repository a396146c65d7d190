"""Test-time augmentation: what is seen in each view comes back to its place in the image, and is merged."""

import cv2
import numpy as np
import pytest
from helpers import found

from common import boxes as np_boxes
from inference import tta


def bright_rectangle(image, image_shape, *, min_side=0):
    """A network that finds the bright rectangle of each image, unless it is too small for it; its mask is the left
    half. The score says which side of the image is brighter, so that an image and its mirror image have others."""
    rows, masks = [], []
    for index, (pixels, (height, width)) in enumerate(zip(image, image_shape)):
        x, y, w, h = cv2.boundingRect((pixels[:height, :width, 0] > 127).astype(np.uint8))
        if min(w, h) > min_side:
            rows.append(((x, y, x + w, y + h), 0.5 + 0.4 * (x + w / 2) / width, 1, index))
            masks.append(np.repeat([[1.0] * 7 + [0.0] * 7], 14, axis=0))
    return found(*rows, masks=np.array(masks, np.float32).reshape(-1, 14, 14))


def draw(*boxes_xyxy, height=64, width=96):
    """A batch with one rectangle in each image, and its sizes: the first is smaller than the batch."""
    batch = np.zeros((len(boxes_xyxy), height, width, 3), np.uint8)
    for image, (x1, y1, x2, y2) in zip(batch, boxes_xyxy):
        image[y1:y2, x1:x2] = 255
    shapes = np.array([[height - 10, width - 20]] + [[height, width]] * (len(boxes_xyxy) - 1), np.int32)
    return batch, shapes


OPTIONS = dict(multiple=32, iou_threshold=0.5, max_per_image=10)


def test_mirrored_view_comes_back_mirrored():
    seen = []

    def network(image, image_shape):
        seen.append((image, image_shape))
        return bright_rectangle(image, image_shape)

    truth = [(8, 4, 40, 50), (50, 10, 90, 30)]
    batch, shapes = draw(*truth)
    both = tta.augmented(network, scales=(1.0,), flip=True, **OPTIONS)(batch, shapes)
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[1][0][0, :54, :76], batch[0, :54, :76][:, ::-1])
    np.testing.assert_allclose(both.boxes, truth, atol=1e-5)
    np.testing.assert_array_equal(both.image_index, [0, 1])
    # The better of the two views; the mean of the mask of one half and of the mirrored one, the other half.
    alone, mirrored = (bright_rectangle(*view).scores for view in seen)
    np.testing.assert_array_equal(both.scores, np.maximum(alone, mirrored))
    share = alone / (alone + mirrored)
    np.testing.assert_allclose(both.masks[:, :, :7], np.broadcast_to(share[:, None, None], (2, 14, 7)), atol=1e-6)
    np.testing.assert_allclose(both.masks[:, :, 7:], np.broadcast_to(1 - share[:, None, None], (2, 14, 7)), atol=1e-6)


def test_result_of_a_mirrored_image_is_the_mirrored_result():
    predict = tta.augmented(bright_rectangle, scales=(1.0,), flip=True, **OPTIONS)
    batch, shapes = draw((8, 4, 40, 50))
    mirrored = np.zeros_like(batch)
    mirrored[0, :54, :76] = batch[0, :54, :76][:, ::-1]
    one, other = predict(batch, shapes), predict(mirrored, shapes)
    np.testing.assert_allclose(other.boxes, np_boxes.flip_horizontal(one.boxes, 76), atol=1e-5)
    np.testing.assert_allclose(other.scores, one.scores, atol=1e-7)
    np.testing.assert_allclose(other.masks, one.masks[:, :, ::-1], atol=1e-6)


def test_scales_see_what_one_of_them_misses():
    """The batch has the size of the largest scale; the small rectangle is found there alone, the large one twice."""
    truth = [(8, 4, 20, 16), (10, 10, 70, 50)]
    batch, shapes = draw(*truth)
    sizes = []

    def network(image, image_shape):
        sizes.append(image_shape.tolist())
        return bright_rectangle(image, image_shape, min_side=10)

    merged = tta.augmented(network, scales=(1.0, 2.0), flip=False, **OPTIONS)(batch, shapes)
    assert sizes == [[[27, 38], [32, 48]], [[54, 76], [64, 96]]]
    np.testing.assert_allclose(merged.boxes, truth, atol=1)
    assert merged.image_index.tolist() == [0, 1]


def test_merging():
    first = found(((0, 0, 10, 10), 0.6, 1, 0), ((50, 50, 60, 60), 0.5, 2, 0), ((0, 0, 10, 10), 0.9, 1, 1))
    second = found(((0, 0, 12, 10), 0.3, 1, 0), ((50, 50, 60, 60), 0.4, 1, 0), ((5, 0, 15, 10), 0.2, 1, 0))
    merged = tta.merge([first, second], 2, iou_threshold=0.5, max_per_image=3)
    rows = list(zip(merged.boxes.tolist(), merged.scores, merged.labels, merged.image_index))
    assert [(round(float(score), 3), label, image) for _, score, label, image in rows] == [
        (0.6, 1, 0),
        (0.5, 2, 0),
        (0.4, 1, 0),  # another class does not take it in; of four in this image the worst is left out
        (0.9, 1, 1),
    ]
    np.testing.assert_allclose(merged.boxes[0], [0, 0, (10 * 0.6 + 12 * 0.3) / 0.9, 10], rtol=1e-6)
    np.testing.assert_allclose(merged.boxes[1:], [[50, 50, 60, 60]] * 2 + [[0, 0, 10, 10]], rtol=1e-6)
    assert merged.masks is None


def test_masks_are_averaged_where_they_lie_in_the_image():
    """A mask of the left half of a box twice as wide is the whole of a box at its left half."""
    wide = np.repeat([[1.0] * 14 + [0.0] * 14], 28, axis=0).astype(np.float32)
    moved = tta._moved(wide, np.float32([0, 0, 40, 20]), np.float32([0, 0, 20, 20]))
    assert (moved[1:-1, 1:26] == 1).all() and (moved > 0.7).mean() > 0.95  # the border blends with what is outside
    np.testing.assert_array_equal(tta._moved(wide, np.float32([3, 4, 40, 20]), np.float32([3, 4, 40, 20])), wide)
    outside = tta._moved(np.ones((28, 28), np.float32), np.float32([0, 0, 10, 10]), np.float32([0, 0, 20, 10]))
    assert (outside[:, 1:13] == 1).all() and (outside[:, 15:] == 0).all()


def test_masks_of_merged_boxes_are_moved_to_the_mean_box():
    """Two boxes of one object, 8 pixels apart, with full masks: the mean box, 4 pixels from both, is full but there."""
    masks = np.ones((2, 16, 16), np.float32)
    rows = ((0, 0, 32, 32), 0.5, 1, 0), ((8, 0, 40, 32), 0.5, 1, 0)
    merged = tta.merge([found(*rows, masks=masks)], 1, iou_threshold=0.5, max_per_image=5)
    np.testing.assert_allclose(merged.boxes, [[4, 0, 36, 32]], atol=1e-4)
    middle = merged.masks[0, 8]
    assert (middle[3:13] > 0.99).all() and middle[0] < 0.6 and middle[-1] < 0.6


def test_the_smallest_view_has_a_pixel():
    sizes = []

    def network(image, image_shape):
        sizes.append(image_shape.tolist())
        return found()

    tta.augmented(network, scales=(0.01, 1.0), flip=False, **OPTIONS)(
        np.zeros((1, 32, 64, 3), np.uint8), np.array([[20, 60]])
    )
    assert sizes == [[[1, 1]], [[20, 60]]]


@pytest.mark.parametrize("masks", [None, np.zeros((0, 14, 14), np.float32)])
def test_nothing_found(masks):
    nothing = tta.merge([found(masks=masks)] * 2, 1, iou_threshold=0.5, max_per_image=5)
    assert nothing.boxes.shape == (0, 4) and len(nothing.labels) == 0
    assert masks is None or nothing.masks.shape == (0, 14, 14)


@pytest.mark.parametrize("bad_view", [0, 1, 3])
def test_an_overflow_in_any_view_is_kept(bad_view):
    """A score of NaN, by which the caller refuses the image, is lost in no merging with the other views."""
    batch, shapes = draw((8, 4, 40, 50))
    views = []

    def network(image, image_shape):
        views.append(len(views))
        detections = bright_rectangle(image, image_shape)
        return detections._replace(scores=detections.scores * np.nan) if views[-1] == bad_view else detections

    merged = tta.augmented(network, scales=(0.5, 1.0), flip=True, **OPTIONS)(batch, shapes)
    assert np.isnan(merged.scores).any()


def test_an_empty_box_is_merged_with_nothing():
    """It overlaps nothing, not even itself."""
    boxes = [((5, 5, 5, 9), 0.9, 1, 0), ((5, 5, 5, 9), 0.8, 1, 0), ((0, 0, 9, 9), 0.7, 1, 0)]
    merged = tta.merge([found(*boxes)], 1, iou_threshold=0.5, max_per_image=10)
    np.testing.assert_allclose(merged.boxes, [box for box, *_ in boxes])
    np.testing.assert_allclose(merged.scores, [0.9, 0.8, 0.7])


def test_overlap_at_the_threshold_does_not_merge():
    """IoU 0.5 exactly; NMS suppresses strictly above it, too."""
    rows = [((0, 0, 8, 8), 0.9, 1, 0), ((0, 0, 8, 4), 0.8, 1, 0)]
    assert len(tta.merge([found(*rows)], 1, iou_threshold=0.5, max_per_image=10).boxes) == 2
    assert len(tta.merge([found(*rows)], 1, iou_threshold=0.49, max_per_image=10).boxes) == 1


def test_moved_masks_are_sampled_at_the_centres_of_cells():
    """Bilinear between the centres of the old cells, which count 0 outside: cell by cell in float64."""
    rng, side = np.random.default_rng(0), 7
    mask = rng.random((side, side)).astype(np.float32)
    old, new = np.float64([10, 20, 31, 34]), np.float64([7, 22, 25, 40])
    expected = np.zeros((side, side))
    for row, column in np.ndindex(side, side):
        x, y = (new[:2] + (np.array([column, row]) + 0.5) * (new[2:] - new[:2]) / side).tolist()
        u, v = (np.array([x, y]) - old[:2]) / (old[2:] - old[:2]) * side - 0.5
        for i in (int(np.floor(v)), int(np.floor(v)) + 1):
            for j in (int(np.floor(u)), int(np.floor(u)) + 1):
                if 0 <= i < side and 0 <= j < side:
                    expected[row, column] += (1 - abs(v - i)) * (1 - abs(u - j)) * mask[i, j]
    moved = tta._moved(mask, np.float32(old), np.float32(new))
    np.testing.assert_allclose(moved, expected, atol=0.05)  # OpenCV rounds positions to 1/32 of a cell


def test_mirrored_boxes_and_masks_of_images_of_different_widths_come_back():
    """Each image's own width counts, not the batch's."""
    views = found(((10, 0, 20, 8), 0.9, 1, 0), ((10, 0, 20, 8), 0.8, 1, 1), masks=np.arange(8.0).reshape(2, 2, 2))
    shapes = np.array([[50, 60], [50, 100]])
    back = tta._in_original(views, shapes, shapes * [2, 4], mirrored=True)
    np.testing.assert_allclose(back.boxes, [[160, 0, 200, 16], [320, 0, 360, 16]])
    np.testing.assert_array_equal(back.masks, [[[1, 0], [3, 2]], [[5, 4], [7, 6]]])
