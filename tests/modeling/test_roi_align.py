"""RoIAlign on maps and pyramids against slow definitions in NumPy and cases worked by hand."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import evaluate, random_boxes

from modeling import device, roi_align


def sample_weights(low, high, size, resolution):
    """The linear map [2 * resolution, size] from one axis of a map to its samples between `low` and `high`."""
    weights = np.zeros((2 * resolution, size))
    cell = (np.float64(high) - low) / (2 * resolution)
    for i in range(2 * resolution):
        position = low + (i + 0.5) * cell - 0.5 + 1  # among the pixel centres of the extended axis
        if not 0 <= position <= size + 1:
            continue
        left = int(np.floor(position))
        for extended, share in ((left, 1 - (position - left)), (left + 1, position - left)):
            original = min(max(extended - 1, 0), size - 1)  # what the border repeats
            weights[i, original] += share if extended <= size + 1 else 0
    return weights


def slow_weights(boxes, height, width, resolution):
    """The linear map of RoIAlign from a map [H, W] to each RoI: [R, resolution, resolution, H, W]."""
    maps = []
    for x1, y1, x2, y2 in boxes:
        rows, columns = sample_weights(y1, y2, height, resolution), sample_weights(x1, x2, width, resolution)
        rows, columns = (w.reshape(resolution, 2, -1).mean(axis=1) for w in (rows, columns))
        maps.append(np.einsum("iy,jx->ijyx", rows, columns))
    return np.reshape(maps, (len(boxes), resolution, resolution, height, width))


ROIS = {
    "inside": [2.3, 1.7, 7.9, 4.2],
    "whole image": [0, 0, 11, 7],
    "on the top left border": [0, 0, 3, 2.5],
    "on the bottom right border": [8.2, 5.1, 11, 7],
    "thinner than a pixel": [4.4, 1, 4.6, 6],
    "a tenth of a pixel": [5.95, 2.95, 6.05, 3.05],
    "beyond the border": [-3, -2, 14, 9],
    "outside": [20, 20, 25, 25],
    "empty": [4, 4, 4, 4],
}


@pytest.mark.parametrize("resolution", [1, 2, 7])
@pytest.mark.parametrize("many_channels", [1024, 2], ids=["at once", "lean"])
def test_roi_align_and_its_gradient_equal_the_definition(many_channels, resolution, monkeypatch):
    monkeypatch.setattr(roi_align, "MANY_CHANNELS", many_channels)
    rng = np.random.default_rng(7)
    features = rng.normal(size=(3, 7, 11, 2)).astype(np.float32)
    boxes = np.float32([*ROIS.values(), *random_boxes(rng, 10, low=-1, high=8, size=3)])
    image_index = rng.integers(0, 3, len(boxes)).astype(np.int32)
    upstream = rng.normal(size=(len(boxes), resolution, resolution, 2)).astype(np.float32)

    def build(features, boxes, image_index, upstream):
        crops = roi_align.roi_align(roi_align.extend_border(features), boxes, image_index, resolution=resolution)
        assert tf.gradients(crops, boxes) == [None]
        return crops, tf.gradients(crops, features, upstream)[0]

    crops, gradient = evaluate(build, features, boxes, image_index, upstream)
    weights = slow_weights(boxes, 7, 11, resolution)
    expected = np.einsum("rijyx,ryxc->rijc", weights, features[image_index])
    np.testing.assert_allclose(crops, expected, rtol=1e-4, atol=1e-4)
    expected_gradient = np.zeros(features.shape)
    np.add.at(expected_gradient, image_index, np.einsum("rijyx,rijc->ryxc", weights, upstream))
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_roi_align_without_the_half_pixel_equals_torchvision_s_definition():
    """Sample by sample: pixel centres at + 0; samples up to a pixel beyond the map take its border, others are 0; no
    RoI is narrower than a cell."""
    rng = np.random.default_rng(8)
    features = rng.normal(size=(1, 7, 11, 2)).astype(np.float32)
    boxes = np.float32([*ROIS.values(), *random_boxes(rng, 10, low=-1, high=8, size=3)])

    def value(y, x):
        if not (-1 <= y <= 7 and -1 <= x <= 11):
            return np.zeros(2)
        y, x = min(max(y, 0), 6), min(max(x, 0), 10)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, 6), min(left + 1, 10)
        upper, lower = (
            features[0, i, left] * (left + 1 - x) + features[0, i, right] * (x - left) for i in (top, bottom)
        )
        return upper * (top + 1 - y) + lower * (y - top)

    def cell(box, i, j):
        x1, y1, x2, y2 = np.float64(box)
        width, height = max(x2 - x1, 1.0) / 3, max(y2 - y1, 1.0) / 3
        places = [(y1 + (i + a) * height, x1 + (j + b) * width) for a in (0.25, 0.75) for b in (0.25, 0.75)]
        return np.mean([value(*place) for place in places], axis=0)

    crops = evaluate(
        lambda features, boxes: roi_align.roi_align(
            roi_align.extend_border(features), boxes, tf.zeros(len(ROIS) + 10, tf.int32), resolution=3, half_pixel=False
        ),
        features,
        boxes,
    )
    expected = [[[cell(box, i, j) for j in range(3)] for i in range(3)] for box in boxes]
    np.testing.assert_allclose(crops, expected, atol=1e-4)


def adaptive_roi_align(features, boxes, image_index, upstream=None):
    def build(features, boxes, image_index):
        extended = roi_align.extend_border(features)
        crops = roi_align.roi_align(extended, boxes, image_index, resolution=2, adaptive=True)
        return crops, tf.gradients(crops, features, upstream)[0]

    return evaluate(build, features, np.float32(boxes), np.int32(image_index))


def test_adaptive_roi_align_takes_a_sample_per_pixel():
    """Detectron2's `sampling_ratio=0`: of cells of 3.4 x 1.2 pixels, 4 x 2 samples; of empty ones, one."""
    rng = np.random.default_rng(9)
    features = rng.normal(size=(2, 9, 14, 3)).astype(np.float32)
    boxes = np.float32([*ROIS.values(), *random_boxes(rng, 30, low=-1, high=8, size=4)])
    image_index = rng.integers(0, 2, len(boxes))
    upstream = rng.normal(size=(len(boxes), 2, 2, 3)).astype(np.float32)
    crops, gradient = adaptive_roi_align(features, boxes, image_index, upstream)
    counts = set()
    for box, image, crop in zip(boxes, image_index, crops):
        across, down = (max(int(np.ceil((box[i + 2] - box[i]) / np.float32(2))), 1) for i in (0, 1))
        counts.add((across, down))
        rows = sample_weights(box[1], box[3], 9, down).reshape(2, down, 9).mean(axis=1)
        columns = sample_weights(box[0], box[2], 14, across).reshape(2, across, 14).mean(axis=1)
        np.testing.assert_allclose(crop, np.einsum("iy,jx,yxc->ijc", rows, columns, features[image]), atol=1e-4)
    assert len(counts) > 8
    other = rng.normal(size=features.shape).astype(np.float32)
    of_other, _ = adaptive_roi_align(other, boxes, image_index, upstream)
    np.testing.assert_allclose(np.sum(gradient * other), np.sum(of_other * upstream), rtol=1e-3)  # it is linear


def test_adaptive_roi_align_of_no_rois():
    crops, gradient = adaptive_roi_align(np.ones((1, 4, 4, 3), np.float32), np.zeros((0, 4)), np.zeros(0))
    assert crops.shape == (0, 2, 2, 3)
    assert not gradient.any()


def test_roi_align_of_a_ramp_is_the_ramp_at_the_centres_of_the_cells():
    rows, columns = np.mgrid[:8, :9] + 0.5
    ramp = np.float32(3 * columns + 10 * rows)[None, :, :, None]
    crop = evaluate(
        lambda features, boxes: roi_align.roi_align(roi_align.extend_border(features), boxes, [0], resolution=2),
        ramp,
        [[1, 2, 5, 3.0]],
    )
    np.testing.assert_allclose(
        crop[0, :, :, 0], [[3 * 2 + 10 * 2.25, 3 * 4 + 10 * 2.25], [3 * 2 + 10 * 2.75, 3 * 4 + 10 * 2.75]], rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_maps_are_extended_by_what_is_next_to_the_border(dtype):
    features = np.arange(12, dtype=np.float32).reshape(1, 3, 4, 1)
    extended = evaluate(lambda x: tf.cast(roi_align.extend_border(tf.cast(x, dtype)), tf.float32), features)
    np.testing.assert_array_equal(
        extended[0, :, :, 0],
        [[0, 0, 1, 2, 3, 3], [0, 0, 1, 2, 3, 3], [4, 4, 5, 6, 7, 7], [8, 8, 9, 10, 11, 11], [8, 8, 9, 10, 11, 11]],
    )


# --------------------------------------------------------------------------------------------------------------- levels


def roi_levels(boxes, num_levels=4):
    return evaluate(lambda boxes: roi_align.roi_level(boxes, num_levels=num_levels), np.float32(boxes)).tolist()


def test_roi_level_by_hand():
    """2 to 5 for sides below 112, from 112, from 224 and from 448 pixels; levels count from 0 here."""
    sides = [0, 1, 50, 111.9, 112, 223.9, 224, 447, 448, 449, 2000]
    assert roi_levels([[7, 9, 7 + side, 9 + side] for side in sides]) == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3]


def test_roi_level_depends_on_the_area():
    assert roi_levels([[0, 0, 896, 56], [0, 0, 56, 896], [0, 0, 56, 890], [0, 0, 9000, 1]]) == [2, 2, 1, 0]


def test_roi_level_has_an_epsilon_inside_the_logarithm():
    """0.5 - 0.67e-6 plus 1e-6 is above a half; with the epsilon outside the logarithm it would stay below."""
    assert roi_levels([[0, 0, 111.99985, 111.99985], [0, 0, 111.9995, 111.9995]]) == [1, 0]


def test_roi_level_stays_within_the_pyramid():
    assert roi_levels([[0, 0, side, side] for side in (10, 300, 1000, 5000.0)], num_levels=2) == [0, 1, 1, 1]
    assert roi_levels([[0, 0, side, side] for side in (10, 300, 1000, 5000.0)], num_levels=5) == [0, 2, 4, 4]


STRIDES = [4, 8, 16, 32]


@pytest.fixture(params=[False, True], ids=["for a CPU", "for a GPU"])
def form(request):
    """Builds the graphs of a test in both forms."""
    with device.building_for(gpu=request.param):
        yield request.param


def multilevel_roi_align(pyramid, boxes, image_index, strides=STRIDES, half_pixel=True, adaptive=False):
    """The crops and the gradients of their sum of squares by the pyramid."""

    def build(boxes, image_index, *pyramid):
        maps = roi_align.Pyramid(list(pyramid), strides, half_pixel=half_pixel, adaptive=adaptive)
        crops = maps.align(boxes, image_index, resolution=2)
        assert tf.gradients(crops, boxes) == [None]
        return crops, tf.gradients(tf.reduce_sum(crops * crops), pyramid)

    return evaluate(build, np.float32(boxes), np.int32(image_index), *pyramid)


def pyramid_of(rng, strides):
    return [rng.normal(size=(2, 512 // stride, 640 // stride, 3)).astype(np.float32) for stride in strides]


def test_multilevel_roi_align_takes_each_roi_from_its_level_and_keeps_the_order(form):
    rng = np.random.default_rng(8)
    pyramid = pyramid_of(rng, STRIDES)
    sides = np.array([500, 30, 230, 120, 60, 490, 111, 300, 150])
    levels = [3, 0, 2, 1, 0, 3, 0, 2, 1]
    corners = np.stack([np.linspace(0, 130, 9), np.linspace(10, 0, 9)], axis=1)
    boxes = np.concatenate([corners, corners + sides[:, None]], axis=1).astype(np.float32)
    image_index = np.arange(9) % 2
    crops, gradients = multilevel_roi_align(pyramid, boxes, image_index)
    expected_gradients = [np.zeros(x.shape) for x in pyramid]
    for box, level, image, crop in zip(boxes, levels, image_index, crops):
        weights = slow_weights([box / STRIDES[level]], *pyramid[level].shape[1:3], 2)[0]
        expected = np.einsum("ijyx,yxc->ijc", weights, pyramid[level][image])
        np.testing.assert_allclose(crop, expected, rtol=1e-3, atol=1e-4)
        expected_gradients[level][image] += np.einsum("ijyx,ijc->yxc", weights, 2 * expected)
    for gradient, expected in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4)


def test_multilevel_roi_align_of_one_level_takes_every_roi_from_it(form):
    rng = np.random.default_rng(9)
    pyramid = pyramid_of(rng, [16])
    boxes = np.float32([[10, 20, 40, 60], [0, 0, 600, 500]])
    crops, _ = multilevel_roi_align(pyramid, boxes, [1, 0], strides=[16])
    weights = slow_weights(boxes / 16, 32, 40, 2)
    np.testing.assert_allclose(crops, np.einsum("rijyx,ryxc->rijc", weights, pyramid[0][[1, 0]]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strides", [STRIDES, [16]])
def test_multilevel_roi_align_of_no_rois(strides, form):
    pyramid = pyramid_of(np.random.default_rng(10), strides)
    crops, gradients = multilevel_roi_align(pyramid, np.zeros((0, 4)), [], strides=strides)
    assert crops.shape == (0, 2, 2, 3)
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("options", [{}, {"half_pixel": False}, {"adaptive": True}])
@pytest.mark.parametrize("height, width", [(512, 640), (64, 96), (32, 32)])
def test_both_forms_agree_at_the_borders_of_maps(height, width, options):
    """RoIs of all levels on the edges of their maps, which lie side by side in the atlas; also thin ones."""
    rng = np.random.default_rng(13)
    pyramid = [rng.normal(size=(2, height // s, width // s, 3)).astype(np.float32) for s in STRIDES]
    edges = [[0, 0, width, height], [width - 3, 0, width, height], [0, height - 2, width, height]]
    edges += [[width - 0.5, height - 0.5, width, height], [0, 0, 1, 1], [0, 0, 0, 0], [width / 2, 0, width, height / 2]]
    boxes = np.float32([*edges, *(random_boxes(rng, 60, high=1, size=1) * [width, height, width, height]).clip(0)])
    boxes = np.minimum(boxes, np.float32([width, height, width, height]))
    found = []
    for gpu in (False, True):
        with device.building_for(gpu=gpu):
            found.append(multilevel_roi_align(pyramid, boxes, np.arange(len(boxes)) % 2, **options))
    (crops, gradients), (crops_of_atlas, gradients_of_atlas) = found
    np.testing.assert_allclose(crops_of_atlas, crops, atol=2e-4)
    for one, other in zip(gradients_of_atlas, gradients):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)
