"""Backbones: ResNet (arXiv:1512.03385) and ResNeXt (arXiv:1611.05431), padded so that features align with pixels.

A backbone is a function from an image to the maps c2 to c5. `register` adds one under a name for BACKBONE.NAME;
docs/extending.md shows a backbone in a file of its own.

Shapes: N images, H and W of the padded image, R RoIs, C channels. Maps are NHWC, in the compute dtype.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import tensorflow as tf
from tensorpack.compat import tfv1

from common.registry import Registry

from .layers import conv2d_norm, explicit_padding, shape_list


def resnet_stem(image, *, width, tf_pad_mode, **options):
    """Applies a 7x7 convolution and max-pooling, together of stride 4.

    Args:
        image: [N, H, W, 3], normalised
        width: channels of the output
        tf_pad_mode: put the larger share of the padding at the bottom and right, as TensorFlow does; else top and left
        options: `norm`, `epsilon` and `freeze` of `conv2d_norm`
    Returns:
        [N, floor(H / 4), floor(W / 4), width]
    """
    before, after = (2, 3) if tf_pad_mode else (3, 2)
    padding = explicit_padding(before, after)
    x = conv2d_norm("conv0", image, width, 7, stride=2, padding=padding, activation=tf.nn.relu, **options)
    x = tf.pad(x, _pad_for_3x3_stride_2(tf_pad_mode))  # zeros are neutral: no value is negative after the ReLU
    return tf.nn.max_pool2d(x, 3, 2, "VALID")


def bottleneck(x, width, stride, *, tf_pad_mode, stride_1x1, groups=1, group_width=64, **options):
    """Applies 1x1, 3x3 and 1x1 convolutions beside a shortcut: [N, H, W, C] -> [N, H', W', 4 * width].

    Args:
        width: of the stage. At a `width` of 64 the 3x3 convolution has `groups` groups of `group_width` channels, at
            other widths proportionally more.
        stride: 1 or 2; H' = floor(H / stride)
        stride_1x1: put the stride on the first 1x1 convolution rather than on the 3x3
    """
    inner = groups * max(1, group_width * width // 64)
    stride_of_1x1, stride_of_3x3 = (stride, 1) if stride_1x1 else (1, stride)
    padding = _pad_for_3x3_stride_2(tf_pad_mode) if stride_of_3x3 == 2 else "SAME"
    shortcut = _shortcut(x, 4 * width, stride, **options)
    y = _conv1x1("conv1", x, inner, stride_of_1x1, activation=tf.nn.relu, **options)
    y = conv2d_norm(
        "conv2", y, inner, 3, groups=groups, stride=stride_of_3x3, padding=padding, activation=tf.nn.relu, **options
    )
    return conv2d_norm("conv3", y, 4 * width, 1, gamma=0.0, shortcut=shortcut, activation=tf.nn.relu, **options)


def basic_block(x, width, stride, *, tf_pad_mode, stride_1x1, **options):
    """Applies two 3x3 convolutions beside a shortcut: [N, H, W, C] -> [N, H', W', width]."""
    del stride_1x1
    padding = _pad_for_3x3_stride_2(tf_pad_mode) if stride == 2 else "SAME"
    shortcut = _shortcut(x, width, stride, **options)
    y = conv2d_norm("conv1", x, width, 3, stride=stride, padding=padding, activation=tf.nn.relu, **options)
    return conv2d_norm("conv2", y, width, 3, gamma=0.0, shortcut=shortcut, activation=tf.nn.relu, **options)


def _shortcut(x, channels, stride, **options):
    """Returns `x` or, if the number of channels changes, a 1x1 convolution of it."""
    if x.shape[-1] == channels:
        return x
    return _conv1x1("convshortcut", x, channels, stride, **options)


def _conv1x1(name, x, channels, stride, **options):
    """Applies a 1x1 convolution: [N, H, W, C] -> [N, floor(H / stride), floor(W / stride), channels]."""
    if stride == 2:  # drops the last pixel of odd sides
        _, height, width, _ = shape_list(x)
        x = x[:, : height // 2 * 2, : width // 2 * 2]  # no copy in the forward pass if both are even
    return conv2d_norm(name, x, channels, 1, stride=stride, **options)


def _pad_for_3x3_stride_2(tf_pad_mode):
    return explicit_padding(0, 1) if tf_pad_mode else explicit_padding(1, 0)


def resnet_stage(x, index, *, num_blocks, width, block=bottleneck, **options):
    """Applies stage `index` (0..3, variables `group0`..`group3`): blocks, the first of stride 2 except in stage 0.

    Args:
        x: [N, H, W, C]. width: of the stage. block: `bottleneck` or `basic_block`.
        options: of the block (`tf_pad_mode`, `stride_1x1`) and of `conv2d_norm` (`norm`, `epsilon`, `freeze`)
    Returns:
        [N, H', W', C'], H' = H or floor(H / 2), C' the output channels of the block
    """
    with tfv1.variable_scope(f"group{index}"):
        for i in range(num_blocks):
            with tfv1.variable_scope(f"block{i}"):
                x = block(x, width, 2 if index > 0 and i == 0 else 1, **options)
    return x


def resnet(image, *, num_blocks, width, freeze_at, freeze_affine, tf_pad_mode, stride_1x1, block=bottleneck, **options):
    """Applies the stem and one stage per entry of `num_blocks`.

    Args:
        image: [N, H, W, 3], normalised. width: channels of the stem (64 in the published models).
        freeze_at: 0 trains all parts, 1 freezes the stem, 2 also the first stage, and so on
        freeze_affine: freezes gamma and beta of all norms
        tf_pad_mode, stride_1x1: see `resnet_stem` and `bottleneck`
        options: `norm` and `epsilon` of `conv2d_norm`
    Returns:
        list of [N, floor(H / stride), floor(W / stride), C], strides 4, 8, 16, 32
    """
    freeze = frozen(0, freeze_at, freeze_affine)
    x = resnet_stem(image, width=width, freeze=freeze, tf_pad_mode=tf_pad_mode, **options)
    outputs = []
    for index, blocks in enumerate(num_blocks):
        x = resnet_stage(
            x,
            index,
            num_blocks=blocks,
            width=width * 2**index,
            block=block,
            freeze=frozen(index + 1, freeze_at, freeze_affine),
            tf_pad_mode=tf_pad_mode,
            stride_1x1=stride_1x1,
            **options,
        )
        outputs.append(x)
    return outputs


def frozen(part, freeze_at, freeze_affine):
    """Returns the `freeze` argument of `conv2d_norm`, a set, for the stem (part 0) or for stage part - 1."""
    if part < freeze_at:
        return {"W", "affine"}
    return {"affine"} if freeze_affine else set()


def resnet_last_stage(x, *, num_blocks, width, freeze_at, freeze_affine, block=bottleneck, **options):
    """Applies the last stage, which C4 runs on RoIs: [R, 14, 14, C] -> [R, 7, 7, C']. Arguments: see `resnet`."""
    freeze = frozen(4, freeze_at, freeze_affine)
    return resnet_stage(x, 3, num_blocks=num_blocks[3], width=width * 8, block=block, freeze=freeze, **options)


class Backbone(NamedTuple):
    """A registered backbone; both functions receive the keywords of `resnet` and may ignore some."""

    build: Callable  # (image [N, H, W, 3], normalised, in the compute dtype) -> [c2, c3, c4, c5]
    last_stage: Callable | None  # ([R, 14, 14, C]) -> [R, 7, 7, D], run on RoIs by C4, where `build` returns c2 to c4


BACKBONES = Registry("BACKBONE.NAME")


def register(name: str, build: Callable, *, last_stage: Callable | None = None) -> Backbone:
    """Registers a backbone under a name for BACKBONE.NAME; without `last_stage` it supports MODE_FPN=True only.

    Args:
        build, last_stage: see Backbone
    Raises:
        ConfigError: the name is registered already.
    """
    return BACKBONES.register(name, Backbone(build, last_stage))


for _name, _block in (
    ("resnet", bottleneck),  # ResNet-50, 101, 152
    ("resnet_basic", basic_block),  # ResNet-18, 34
    ("resnext_32x4d", partial(bottleneck, groups=32, group_width=4)),  # ResNeXt-50
    ("resnext_32x8d", partial(bottleneck, groups=32, group_width=8)),  # ResNeXt-101
    ("resnext_64x4d", partial(bottleneck, groups=64, group_width=4)),
):
    register(_name, partial(resnet, block=_block), last_stage=partial(resnet_last_stage, block=_block))
