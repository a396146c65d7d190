"""ResNet bottleneck backbones (arXiv:1512.03385), padded so that features are aligned with pixels.

Shapes: N images, H and W of the padded image, C channels. Maps are NHWC, in the compute dtype.
"""

import tensorflow as tf
from tensorpack.compat import tfv1

from .layers import conv2d_norm, explicit_padding


def resnet_stem(image, *, width, norm, freeze, tf_pad_mode):
    """7x7 convolution and max-pool: stride 4.

    Args:
        image: [N, H, W, 3], normalised
        width: channels. freeze: as in `conv2d_norm`.
        tf_pad_mode: put the larger share of the padding at the bottom and right, as TensorFlow does
    Returns:
        [N, floor(H / 4), floor(W / 4), width]
    """
    before, after = (2, 3) if tf_pad_mode else (3, 2)
    padding = explicit_padding(before, after)
    x = conv2d_norm(
        "conv0", image, width, 7, norm=norm, stride=2, padding=padding, activation=tf.nn.relu, freeze=freeze
    )
    x = tf.pad(x, _pad_for_3x3_stride_2(tf_pad_mode))  # zeros do: nothing is below them after the ReLU
    return tf.nn.max_pool2d(x, 3, 2, "VALID")


def resnet_stage(x, index, *, num_blocks, width, norm, freeze, tf_pad_mode, stride_1x1):
    """Stage `index` (0..3, variables `group0`..`group3`): bottleneck blocks, the first of stride 2 except in stage 0.

    Args:
        x: [N, H, W, C]. width: inner channels of the stage; the output has four times as many.
        stride_1x1: put the stride on the first 1x1 convolution of a block rather than on the 3x3
    Returns:
        [N, H', W', 4 * width], H' = H or floor(H / 2)
    """
    with tfv1.variable_scope(f"group{index}"):
        for block in range(num_blocks):
            stride = 2 if index > 0 and block == 0 else 1
            with tfv1.variable_scope(f"block{block}"):
                x = _bottleneck(
                    x, width, stride, norm=norm, freeze=freeze, tf_pad_mode=tf_pad_mode, stride_1x1=stride_1x1
                )
    return x


def _bottleneck(x, width, stride, *, norm, freeze, tf_pad_mode, stride_1x1):
    """1x1, 3x3, 1x1 convolutions beside a shortcut."""
    options = dict(norm=norm, freeze=freeze)
    shortcut = x
    if x.shape[-1] != 4 * width:
        shortcut = conv2d_norm("convshortcut", _every_second(x, stride), 4 * width, 1, **options)
    stride_3x3, padding = stride, "SAME"
    if stride == 2 and stride_1x1:
        x, stride_3x3 = _every_second(x, stride), 1
    elif stride == 2:
        padding = _pad_for_3x3_stride_2(tf_pad_mode)
    y = conv2d_norm("conv1", x, width, 1, activation=tf.nn.relu, **options)
    y = conv2d_norm("conv2", y, width, 3, stride=stride_3x3, padding=padding, activation=tf.nn.relu, **options)
    y = conv2d_norm("conv3", y, 4 * width, 1, gamma=0.0, **options)
    return tf.nn.relu(y + shortcut)


def _pad_for_3x3_stride_2(tf_pad_mode):
    return explicit_padding(0, 1) if tf_pad_mode else explicit_padding(1, 0)


def _every_second(x, stride):
    """Input of a strided 1x1 convolution, [N, floor(H / 2), floor(W / 2), C]: an odd last row or column is lost."""
    return x if stride == 1 else x[:, :-1:2, :-1:2]


def resnet(image, *, num_blocks, width, norm, freeze_at, freeze_affine, tf_pad_mode, stride_1x1):
    """The stem and one stage per entry of `num_blocks`.

    Args:
        image: [N, H, W, 3], normalised. width: channels of the stem (64 in ResNet-50).
        freeze_at: 0 trains everything, 1 freezes the stem, 2 the first stage too, and so on
        freeze_affine: gives no gradient to any norm's gamma and beta
    Returns:
        list of [N, floor(H / stride), floor(W / stride), C], strides 4, 8, 16, 32
    """
    x = resnet_stem(image, width=width, norm=norm, freeze=frozen(0, freeze_at, freeze_affine), tf_pad_mode=tf_pad_mode)
    outputs = []
    for index, blocks in enumerate(num_blocks):
        x = resnet_stage(
            x,
            index,
            num_blocks=blocks,
            width=width * 2**index,
            norm=norm,
            freeze=frozen(index + 1, freeze_at, freeze_affine),
            tf_pad_mode=tf_pad_mode,
            stride_1x1=stride_1x1,
        )
        outputs.append(x)
    return outputs


def frozen(part, freeze_at, freeze_affine):
    """Which variables of the stem (part 0) or of stage part - 1 are frozen: see `conv2d_norm`."""
    if part < freeze_at:
        return {"W", "affine"}
    return {"affine"} if freeze_affine else set()
