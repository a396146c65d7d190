"""Feature Pyramid Network, arXiv:1612.03144. Maps are NHWC, in the compute dtype."""

import tensorflow as tf
from tensorpack.compat import tfv1

from . import device
from .layers import BATCH_NORMS, FAN_IN, conv2d, conv2d_norm, group_norm, shape_list


def fpn(features, *, channels, norm):
    """Builds the top-down pathway with lateral connections, and a coarser level on top for the proposals.

    Args:
        features: [c2, c3, c4, c5], each [N, H / stride, W / stride, C] of strides 4 to 32; H and W multiples of 32
        channels: of every output level. norm: "None", "GN", "FreezeBN" or "SyncBN".
    Returns:
        [p2, p3, p4, p5, p6], each [N, H / stride, W / stride, channels] of strides 4 to 64
    """

    options = dict(channels=channels, norm=norm)
    with tfv1.variable_scope("fpn"):
        levels = range(2, 2 + len(features))
        merged = []
        for level, c in reversed(list(zip(levels, features))):
            is_one_op = bool(merged) and norm != "GN" and device.is_gpu()
            shortcut = dict(shortcut=_upsampled(merged[0])) if is_one_op else {}
            x = _convolve(f"lateral_1x1_c{level}", f"gn_c{level}", c, 1, **options, **shortcut)
            merged.insert(0, _add_upsampled(x, merged[0]) if merged and not is_one_op else x)
        outputs = [
            _convolve(f"posthoc_3x3_p{level}", f"gn_p{level}", x, 3, is_large=level == 2, **options)
            for level, x in zip(levels, merged)
        ]
    return outputs + [outputs[-1][:, ::2, ::2]]


@tf.custom_gradient
def _upsampled(x):
    """Repeats each pixel of [N, H, W, C] in a window of two by two: [N, 2 H, 2 W, C]."""

    def gradient(dy):
        return 4.0 * tf.nn.avg_pool2d(dy, 2, 2, "VALID")

    _, height, width, _ = shape_list(x)
    return tfv1.image.resize_nearest_neighbor(x, [2 * height, 2 * width]), gradient


@tf.custom_gradient
def _add_upsampled(fine, coarse):
    """Returns `fine` [N, 2 H, 2 W, C] + `coarse` [N, H, W, C] upsampled by two, without storing the upsampled map."""

    def gradient(dy):
        return dy, 4.0 * tf.nn.avg_pool2d(dy, 2, 2, "VALID")  # the sum of each window, faster than reduce_sum

    n, height, width, channels = shape_list(coarse)
    windows = tf.reshape(fine, [n, height, 2, width, 2, channels])
    summed = windows + coarse[:, :, None, :, None, :]
    return tf.reshape(summed, [n, 2 * height, 2 * width, channels]), gradient


def _convolve(name, norm_name, x, kernel_size, *, channels, norm, **options):
    """Applies a convolution and the norm: [N, H, W, C] -> [N, H, W, channels].

    Args:
        name, norm_name: variable scopes; a batch norm has its own below `name`, and the convolution then no bias.
        options: of `conv2d` and `conv2d_norm`
    """
    if norm in BATCH_NORMS:
        return conv2d_norm(name, x, channels, kernel_size, norm=norm, initializer=FAN_IN, **options)
    x = conv2d(name, x, channels, kernel_size, initializer=FAN_IN, **options)
    return group_norm(norm_name, x) if norm == "GN" else x
