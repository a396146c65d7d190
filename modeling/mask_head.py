"""The mask head of Mask R-CNN (arXiv:1703.06870).

Shapes: N images, G ground truths, F foreground RoIs or detections of all images, C classes, M mask resolution, D
channels, H and W of the padded image.
"""

import tensorflow as tf
from tensorpack.compat import tfv1

from common.registry import Registry

from .layers import (
    HE_FAN_OUT,
    channel_of_conv1x1,
    conv2d_of_head,
    deconv2x2,
    join_windows,
    normal_initializer,
    shape_list,
)

HEADS = Registry("FPN.MRCNN_HEAD_FUNC")  # values: the norm of the head's convolutions
HEADS.register("maskrcnn_up4conv_head", "None")
HEADS.register("maskrcnn_up4conv_gn_head", "GN")
HEADS.register("maskrcnn_up4conv_bn_head", "BN")  # that of FPN.NORM, or SyncBN


def mask_head(features, labels, *, num_convs, channels, num_classes, **options):
    """Applies convolutions and upsampling by two, and predicts the mask of each RoI's own class.

    Args:
        features: [F, M / 2, M / 2, D]. labels: int64 [F] in 1..C. num_convs: 4 in FPN, 0 in C4.
        channels: of the convolutions. num_classes: C, without background.
        options: of the convolutions (`norm`, `norm_first`, `is_valid`), see `conv2d_of_head`
    Returns:
        logits float32 [F, M, M]
    """
    x = features
    with tfv1.variable_scope("maskrcnn", reuse=tfv1.AUTO_REUSE):
        for i in range(num_convs):
            x = conv2d_of_head(f"fcn{i}", f"gn{i}", x, channels, **options)
        x = deconv2x2("deconv", x, channels, initializer=HE_FAN_OUT, activation=tf.nn.relu)
        return join_windows(
            channel_of_conv1x1("conv", x, labels - 1, num_classes, initializer=normal_initializer(0.001))
        )


def mask_targets(packed_masks, image_shape, image_index, gt_index, boxes, *, resolution):
    """Samples the ground truth masks bilinearly, once at the centre of each cell of an RoI; 0 outside the image.

    Reads the four neighbouring bits of each sample from the packed masks, without unpacking whole masks.

    Args:
        packed_masks: uint8 [N, G, H, B], most significant bit first, B a multiple of 4. image_shape: int32 [N, 2].
        image_index: int32 [F], gt_index: int64 [F], image and ground truth of each RoI
        boxes: float32 [F, 4] in pixels of the image
        resolution: M
    Returns:
        float32 [F, M, M] in [0, 1]
    """
    x1, y1, x2, y2 = tf.split(boxes, 4, axis=1)
    height, width = tf.split(tf.gather(tf.cast(image_shape, tf.float32), image_index), 2, axis=1)
    rows, row_shares = _linear_samples(y1, y2, height, resolution)
    columns, column_shares = _linear_samples(x1, x2, width, resolution)
    mask_index = tf.stack([tf.cast(image_index, tf.int64), gt_index], axis=1)
    words = _as_words(packed_masks)
    total = 0.0
    for row, row_share in zip(rows, row_shares):
        for column, column_share in zip(columns, column_shares):
            bits = _read_bits(words, mask_index, row, column)
            total += bits * row_share[:, :, None] * column_share[:, None, :]
    return total


def _linear_samples(low, high, size, resolution):
    """Locates samples on one axis, at the centres of `resolution` cells between `low` and `high`, each [F, 1].

    Returns:
        (left, right): int64 [F, M] neighbouring pixels; and their float32 [F, M] weights, 0 for samples beyond the
            outer pixel centres of an axis of `size` pixels, float32 [F, 1]
    """
    cell = (tf.range(resolution, dtype=tf.float32) + 0.5) / resolution
    position = low + (high - low) * cell - 0.5  # pixel centres lie at + 0.5
    last = size - 1.0
    is_inside = tf.cast((position >= 0) & (position <= last), tf.float32)
    left = tf.floor(tf.clip_by_value(position, 0.0, last))
    right = tf.minimum(left + 1, last)
    share = position - left
    return (tf.cast(left, tf.int64), tf.cast(right, tf.int64)), ((1 - share) * is_inside, share * is_inside)


def _as_words(packed_masks):
    """Views packed masks as words, which a GPU gathers, unlike bytes: uint8 [N, G, H, B] -> int32 [N, G, H, B / 4]."""
    n, count, height, octets = shape_list(packed_masks)
    return tf.bitcast(tf.reshape(packed_masks, [n, count, height, octets // 4, 4]), tf.int32)


def _read_bits(words, mask_index, row, column):
    """Reads pixels of packed masks as float32 [F, M, M].

    Args:
        words: int32 [N, G, H, W / 32] of `_as_words`. mask_index: int64 [F, 2], image and ground truth.
        row, column: int64 [F, M]
    """
    f, resolution = shape_list(row)
    shape = [f, resolution, resolution]
    place = [mask_index[:, 0, None, None], mask_index[:, 1, None, None], row[:, :, None], column[:, None, :] // 32]
    found = tf.gather_nd(words, tf.stack([tf.broadcast_to(i, shape) for i in place], axis=-1))
    # The bytes of a word lie in memory from the lowest to the highest, the pixels of a byte from its highest bit.
    shift = tf.cast((column // 8 % 4 * 8 + (7 - column % 8))[:, None, :], tf.int32)
    return tf.cast(tf.bitwise.bitwise_and(tf.bitwise.right_shift(found, shift), 1), tf.float32)


def mask_loss(logits, targets, image_index, is_real, *, num_images):
    """Computes the cross-entropy with the masks of the ground truth's class (Mask R-CNN, sec. 3).

    Args:
        logits: float32 [F, M, M], of the RoI's class. targets: float32 [F, M, M]. image_index: int32 [F].
        is_real: bool [F]; other entries contribute nothing
    Returns:
        float32 scalar: the mean over an image's RoIs and pixels (0 if it has no RoIs), then over images
    """
    losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=logits)
    is_real = tf.cast(is_real, tf.float32)
    count = tf.gather(tf.math.unsorted_segment_sum(is_real, image_index, num_images), image_index)
    pixels = tf.cast(tf.size(losses[:1]) * num_images, tf.float32)
    weights = tf.math.divide_no_nan(is_real, count * pixels)
    return tf.reduce_sum(losses * weights[:, None, None])


def mask_metrics(logits, targets):
    """Returns how well the masks agree with their targets: a dict of scalars, for summaries only."""
    predicted, actual = logits > 0, targets > 0.5
    right = tf.reduce_sum(tf.cast(tf.equal(predicted, actual), tf.float32))
    overlap = tf.reduce_sum(tf.cast(predicted & actual, tf.float32))
    union = tf.reduce_sum(tf.cast(predicted | actual, tf.float32))
    pixels = tf.cast(tf.size(logits), tf.float32)
    return {
        "accuracy": tf.math.divide_no_nan(right, pixels),
        "iou": tf.math.divide_no_nan(overlap, union),
    }
