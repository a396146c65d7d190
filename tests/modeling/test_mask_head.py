"""The mask branch against slow definitions in NumPy and cases worked by hand."""

import numpy as np
import pytest
import tensorflow as tf
from graphs import pack
from helpers import convolve, evaluate, group_norm, random_boxes, relu, stored_norm, variables

from modeling import mask_head

# ----------------------------------------------------------------------------------------------------------------- head


def upsampled(x, values):
    """Transposed 2x2 convolution of stride 2: each input pixel makes its own 2x2 outputs."""
    n, height, width, _ = x.shape
    kernel = values["maskrcnn/deconv/W"]  # [2, 2, outputs, inputs]
    y = np.einsum("nyxc,ijdc->nyixjd", x, kernel).reshape(n, 2 * height, 2 * width, -1)
    return relu(y + values["maskrcnn/deconv/b"])


@pytest.mark.parametrize(
    "num_convs, norm, norm_first",
    [(0, "None", False), (2, "None", True), (2, "GN", False), (2, "GN", True), (2, "FreezeBN", False)],
)
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_head_equals_the_definition(num_convs, norm, norm_first, dtype):
    """Convolution, ReLU, then the normalisation, or that before the ReLU; then twice the size, the mask of a class."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 4, 4, 6)).astype(np.float32)
    labels = np.int64([2, 5, 1])

    def build(x):
        x = tf.cast(x, dtype)
        options = dict(num_convs=num_convs, channels=6, num_classes=5, norm=norm, norm_first=norm_first)
        return mask_head.mask_head(x, labels, **options), variables()

    logits, values = evaluate(build, features, random_variables=rng)
    assert (logits.shape, logits.dtype) == ((3, 8, 8), np.float32)
    x = features
    for i in range(num_convs):
        x = convolve(x, values[f"maskrcnn/fcn{i}/W"], bias=values.get(f"maskrcnn/fcn{i}/b", 0.0), before=1, after=1)
        x = stored_norm(x, values, f"maskrcnn/fcn{i}/bn") if norm == "FreezeBN" else x
        x = x if norm == "GN" and norm_first else relu(x)
        if norm == "GN":
            x = group_norm(x, values[f"maskrcnn/gn{i}/gamma"], values[f"maskrcnn/gn{i}/beta"], groups=3)
        x = relu(x) if norm_first else x
    of_all = convolve(upsampled(x, values), values["maskrcnn/conv/W"], bias=values["maskrcnn/conv/b"])
    expected = np.stack([masks[..., label - 1] for masks, label in zip(of_all, labels)])
    np.testing.assert_allclose(logits, expected, atol=(1e-4 if dtype == tf.float32 else 0.03) * np.abs(expected).max())


# -------------------------------------------------------------------------------------------------------------- targets


def mask_targets(masks, image_shape, image_index, gt_index, boxes, resolution):
    return evaluate(
        lambda *arrays: mask_head.mask_targets(*arrays, resolution=resolution),
        pack(masks),
        np.int32(image_shape),
        np.int32(image_index),
        np.int64(gt_index),
        np.float32(boxes).reshape(-1, 4),
    )


def bilinear(mask, x, y):
    """The mask at a point: pixel centres lie at + 0.5; 0 beyond the outermost ones."""
    height, width = mask.shape
    x, y = x - 0.5, y - 0.5
    if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
        return 0
    left, top = int(x), int(y)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    upper = mask[top, left] * (1 - x + left) + mask[top, right] * (x - left)
    lower = mask[bottom, left] * (1 - x + left) + mask[bottom, right] * (x - left)
    return upper * (1 - y + top) + lower * (y - top)


def slow_target(mask, box, resolution):
    x1, y1, x2, y2 = np.float64(box)
    centers = (np.arange(resolution) + 0.5) / resolution
    return [[bilinear(mask, x1 + (x2 - x1) * i, y1 + (y2 - y1) * j) for i in centers] for j in centers]


@pytest.mark.parametrize("width", [24, 21, 17, 5, 1])
def test_targets_equal_the_definition(width):
    """Widths on both sides of the bytes' borders; RoIs inside, partly and wholly outside, and as large as the image."""
    rng = np.random.default_rng(2)
    masks = rng.integers(0, 2, (2, 3, 13, width), dtype=np.uint8)
    fixed = [[0, 0, width, 13], [-4, -3, width + 5, 20], [width, 0, width + 3, 13], [0.3, 5, 0.4, 5.2], [0, 0, 1, 1]]
    boxes = np.float32([*fixed, *random_boxes(rng, 12, low=-3, high=width, size=6)])
    image_index, gt_index = rng.integers(0, 2, len(boxes)), rng.integers(0, 3, len(boxes))
    targets = mask_targets(masks, [[13, width]] * 2, image_index, gt_index, boxes, 7)
    assert targets.shape == (len(boxes), 7, 7)
    for target, image, gt, box in zip(targets, image_index, gt_index, boxes):
        np.testing.assert_allclose(target, slow_target(masks[image, gt], box, 7), atol=1e-4)


def test_targets_end_where_the_image_ends():
    """Whatever the bits of the padding are, only the image's own part counts."""
    rng = np.random.default_rng(3)
    masks, shapes = np.ones((2, 1, 16, 24), np.uint8), [[16, 24], [9, 13]]
    boxes = random_boxes(rng, 10, high=20, size=8)
    image_index = np.arange(10) % 2
    targets = mask_targets(masks, shapes, image_index, np.zeros(10), boxes, 4)
    for target, image, box in zip(targets, image_index, boxes):
        height, width = shapes[image]
        np.testing.assert_allclose(target, slow_target(masks[image, 0, :height, :width], box, 4), atol=1e-4)


def test_targets_by_hand():
    """A mask of columns 0 1 1 0 of which the RoI takes columns 0.5 to 2.5, in two cells: samples at 1 and at 2."""
    masks = np.uint8([[[[0, 1, 1, 0]] * 4]])
    np.testing.assert_allclose(
        mask_targets(masks, [[4, 4]], [0], [0], [0.5, 1, 2.5, 3], 2), [[[0.5, 1], [0.5, 1]]], atol=1e-6
    )


@pytest.mark.parametrize("objects", [2, 0])
def test_no_rois_have_no_targets(objects):
    masks = np.zeros((1, objects, 8, 8), np.uint8)
    assert mask_targets(masks, [[8, 8]], [], [], [], 7).shape == (0, 7, 7)


# ----------------------------------------------------------------------------------------------------- loss and metrics


def mask_loss(logits, targets, image_index, is_real, *, num_images):
    """The loss and its gradient by the logits."""

    def build(logits, *arrays):
        loss = mask_head.mask_loss(logits, *arrays, num_images=num_images)
        return loss, tf.gradients(loss, logits)[0]

    return evaluate(build, np.float32(logits), np.float32(targets), np.int32(image_index), np.array(is_real, bool))


def test_loss_is_the_mean_over_rois_and_pixels_and_then_over_images():
    """Of four images the second one has no foreground, and the last one only what is not real."""
    rng = np.random.default_rng(4)
    logits, targets = rng.normal(0, 3, (7, 5, 5)), rng.random((7, 5, 5))
    image_index, is_real = np.array([0, 0, 2, 2, 2, 2, 3]), np.array([1, 1, 1, 1, 0, 1, 0], bool)
    loss, gradient = mask_loss(logits, targets, image_index, is_real, num_images=4)
    probability = 1 / (1 + np.exp(-logits))
    pixels = -targets * np.log(probability) - (1 - targets) * np.log(1 - probability)
    of_images = [pixels[is_real & (image_index == n)].mean() for n in (0, 2)]
    np.testing.assert_allclose(loss, sum(of_images) / 4, rtol=1e-5)
    np.testing.assert_array_equal(gradient.any(axis=(1, 2)), is_real)
    share = np.array([2, 2, 3, 3, 3, 3, 1])[:, None, None] * 25 * 4
    np.testing.assert_allclose(gradient, (probability - targets) / share * is_real[:, None, None], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rois", [0, 2])
def test_loss_without_foreground_is_zero(rois):
    loss, gradient = mask_loss(np.ones((rois, 4, 4)), np.ones((rois, 4, 4)), [0] * rois, [False] * rois, num_images=3)
    assert loss == 0 and not gradient.any()


def test_metrics_by_hand():
    """Predicted 2 pixels, actual 3, common 1, of 8."""
    logits, targets = [[[0.1, 2], [-1, -1]], [[-1, -1], [-1, 0]]], [[[1, 0.5], [0.6, 0]], [[0, 0], [0, 0.9]]]
    metrics = evaluate(mask_head.mask_metrics, np.float32(logits), np.float32(targets))
    assert metrics == pytest.approx({"accuracy": 5 / 8, "iou": 1 / 4})
