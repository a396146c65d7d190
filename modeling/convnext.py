"""ConvNeXt (arXiv:2201.03545) as a backbone: tiny, small and base differ in WIDTH and RESNET_NUM_BLOCKS.

    tiny   BACKBONE.WIDTH=96  BACKBONE.RESNET_NUM_BLOCKS=[3,3,9,3]
    small  BACKBONE.WIDTH=96  BACKBONE.RESNET_NUM_BLOCKS=[3,3,27,3]
    base   BACKBONE.WIDTH=128 BACKBONE.RESNET_NUM_BLOCKS=[3,3,27,3]

All norms are LayerNorm; BACKBONE.NORM has no effect. The stochastic depth of the published trainings is left out.
Shapes: N images, H and W of the padded image, C channels. Maps are NHWC, in the compute dtype.
"""

import tensorflow as tf
from tensorpack.compat import tfv1
from tensorpack.models import layer_register

from . import backbone
from .parameters import Parameters, prepare

EPSILON = 1e-6  # of LayerNorm
FIRST_SCALE = 1e-6  # of the residual branches
TRUNCATED = tfv1.truncated_normal_initializer(stddev=0.02)


@layer_register(use_scope=True)
def layer_norm(x, *, trainable=True):
    """Applies Layer Normalization (arXiv:1607.06450) over the channels of each pixel, in float32.

    Args:
        x: [N, H, W, C]
    Returns:
        [N, H, W, C], dtype of `x`
    """
    channels = x.shape[-1]
    gamma = tfv1.get_variable("gamma", [channels], initializer=tf.ones_initializer(), trainable=trainable)
    beta = tfv1.get_variable("beta", [channels], initializer=tf.zeros_initializer(), trainable=trainable)
    wide = tf.cast(x, tf.float32)
    centered = wide - tf.reduce_mean(wide, axis=-1, keepdims=True)
    variance = tf.reduce_mean(tf.square(centered), axis=-1, keepdims=True)
    return tf.cast(centered * tf.math.rsqrt(variance + EPSILON) * gamma + beta, x.dtype)


def _parameters(shape, channels, dtype, trainable):
    """Returns a layer's kernel W and bias b in a dtype."""

    def create():
        kernel = tfv1.get_variable("W", shape, initializer=TRUNCATED, trainable=trainable)
        bias = tfv1.get_variable("b", [channels], initializer=tf.zeros_initializer(), trainable=trainable)
        return Parameters(kernel, bias)

    return prepare(create, dtype)


@layer_register(use_scope=True)
def convolution(x, channels, size, *, trainable=True):
    """Applies a convolution whose windows of `size` pixels do not overlap, with bias.

    Args:
        x: [N, H, W, C]
    Returns:
        [N, floor(H / size), floor(W / size), channels], dtype of `x`
    """
    kernel, bias = _parameters([size, size, x.shape[-1], channels], channels, x.dtype, trainable)
    return tf.nn.bias_add(tf.nn.conv2d(x, kernel, size, "VALID"), bias)


@layer_register(use_scope=True)
def depthwise_convolution(x, *, trainable=True):
    """Applies a 7x7 convolution to each channel of [N, H, W, C] by itself, with bias.

    TensorFlow's op for it: a sum of 49 shifted maps takes 25 times as long on a CPU.
    """
    channels = x.shape[-1]
    kernel, bias = _parameters([7, 7, channels, 1], channels, x.dtype, trainable)
    return tf.nn.bias_add(tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], "SAME"), bias)


def block(x, *, trainable):
    """Adds to `x` a depthwise convolution, a norm and two layers at each pixel, scaled: [N, H, W, C] (its fig. 4)."""
    channels = x.shape[-1]
    y = layer_norm("ln", depthwise_convolution("depthwise", x, trainable=trainable), trainable=trainable)
    y = tf.nn.gelu(convolution("widen", y, 4 * channels, 1, trainable=trainable))
    y = convolution("narrow", y, channels, 1, trainable=trainable)
    first = tf.constant_initializer(FIRST_SCALE)
    scale = tfv1.get_variable("scale", [channels], initializer=first, trainable=trainable)
    return x + y * tf.cast(scale, y.dtype)


def stages(image, *, num_blocks, width, freeze_at):
    """Returns the outputs of the stem with the first stage, and of the others, before any further norm.

    Args:
        image: [N, H, W, 3], normalised. num_blocks: of each stage. width: channels of the first stage.
        freeze_at: 0 trains all parts, 1 freezes the stem, 2 also the first stage, and so on
    Returns:
        list of [N, floor(H / stride), floor(W / stride), C], strides 4, 8, 16, 32
    """
    trainable = freeze_at < 1
    x = layer_norm("ln0", convolution("conv0", image, width, 4, trainable=trainable), trainable=trainable)
    outputs = []
    for index, blocks in enumerate(num_blocks):
        trainable = freeze_at < index + 2
        with tfv1.variable_scope(f"group{index}"):
            if index > 0:
                x = layer_norm("ln", x, trainable=trainable)
                x = convolution("downsample", x, width * 2**index, 2, trainable=trainable)
            for i in range(blocks):
                with tfv1.variable_scope(f"block{i}"):
                    x = block(x, trainable=trainable)
        outputs.append(x)
    return outputs


def convnext(image, *, num_blocks, width, freeze_at, **unused):
    """The backbone: `stages`, and a norm of each output, which detectors add and which is always trained."""
    del unused
    outputs = stages(image, num_blocks=num_blocks, width=width, freeze_at=freeze_at)
    return [layer_norm(f"norm_c{level}", x) for level, x in enumerate(outputs, 2)]


backbone.register("convnext", convnext)
