"""Variables and layers: convolution, fully connected, normalisation. The only file that creates model variables.

Every layer takes its variable scope first: `conv2d("conv0", x, 64, 7)`. Variable names are those of the published
checkpoints (`W`, `b`, `gamma`, `beta`, `mean/EMA`, `variance/EMA`). Variables are float32; a layer computes in the
dtype of its input `x`, so the dtype of the image determines the precision of the network.

Shapes: N images, R RoIs, H height, W width, C channels. Tensors are NHWC.
"""

import contextlib

import tensorflow as tf
from tensorpack.models import layer_register

from .sync_bn import joined_moments

tfv1 = tf.compat.v1

BAND = 8  # rows of a band in `_gradient_in_bands`; the height of p2 is a multiple of it
NORM_EPSILON = 1e-5
EMA_DECAY = 0.9  # of SyncBN's statistics
NORM_SCOPES = {"FreezeBN": "bn", "SyncBN": "bn", "GN": "gn"}

HE_FAN_OUT = tfv1.variance_scaling_initializer(2.0, mode="fan_out", distribution="untruncated_normal")
FAN_IN = tfv1.variance_scaling_initializer(1.0, mode="fan_in", distribution="untruncated_normal")


@contextlib.contextmanager
def collect_variables(collection):
    """Adds the global variables that the block or decorated function creates to a collection of the graph."""
    before = {variable.ref() for variable in tfv1.global_variables()}
    yield
    for variable in tfv1.global_variables():
        if variable.ref() not in before:
            tfv1.add_to_collection(collection, variable)


def normal_initializer(stddev):
    """Returns an initializer that draws from a normal distribution of mean 0."""
    return tfv1.random_normal_initializer(stddev=stddev)


def shape_list(x):
    """Returns the shape of `x` as a list: Python integers for static dimensions, scalar int32 tensors for others."""
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape.as_list())]


def explicit_padding(before, after):
    """Returns the padding of a convolution or pooling: `before` pixels at top and left, `after` at bottom and right."""
    return [[0, 0], [before, after], [before, after], [0, 0]]


@tf.custom_gradient
def add(x, y):
    """Adds two tensors of the same shape.

    TensorFlow fuses a convolution with the sum only if no other op reads its output; the gradient of `+` reads its
    shape.
    """
    return x + y, lambda gradient: (gradient, gradient)


def _convolve(x, kernel, bias, *, stride, padding, activation):
    """Applies convolution, bias and activation as the three ops that TensorFlow fuses into one kernel."""
    if not isinstance(padding, str):  # oneDNN has no gradient for explicit padding; Eigen's takes ten times as long
        x, padding = tf.pad(x, padding), "VALID"
    convolution = tf.nn.conv2d if kernel.shape[2] == x.shape[-1] else _grouped_conv2d
    y = convolution(x, tf.cast(kernel, x.dtype), strides=stride, padding=padding)
    if bias is not None:
        y = tf.nn.bias_add(y, tf.cast(bias, x.dtype))
    return activation(y) if activation else y


def _grouped_conv2d(x, kernel, *, strides, padding):
    """Convolves in groups of channels (ResNeXt), with a gradient on CPUs as well, where TensorFlow has none.

    On CPUs the gradient is that of the ordinary convolution with a block-diagonal kernel: more arithmetic than
    necessary.

    Args:
        x: [N, H, W, C]. kernel: [K, K, I, channels], for C / I groups.
    """
    if tf.config.list_physical_devices("GPU"):
        return tf.nn.conv2d(x, kernel, strides, padding)

    @tf.custom_gradient
    def convolve(x, kernel):
        def gradient(dy):
            dense = tf.nn.conv2d(x, _block_diagonal(kernel, x.shape[-1] // kernel.shape[2]), strides, padding)
            return tf.gradients(dense, [x, kernel], dy)

        return tf.nn.conv2d(x, kernel, strides, padding), gradient

    return convolve(x, kernel)


def _block_diagonal(kernel, groups):
    """Converts the kernel of grouped convolution to an ordinary one: [K, K, I, D] -> [K, K, groups * I, D]."""
    height, width, inputs, channels = kernel.shape
    of_group = tf.reshape(kernel, [height, width, 1, inputs, groups, channels // groups])
    blocks = of_group * tf.eye(groups, dtype=kernel.dtype)[:, None, :, None]
    return tf.reshape(blocks, [height, width, groups * inputs, channels])


@tf.RegisterGradient("Conv2DOfLargeMap")
def _gradient_in_bands(op, dy):
    """Computes Conv2D's gradient for a 3x3 kernel, stride 1, "SAME" padding and a multiple of BAND rows.

    It sums the kernel's gradient over bands of rows: in bfloat16, oneDNN takes 1.5 times as long for a map of 200x304
    as for its bands, copies included.
    """
    x, kernel = op.inputs
    strides = [1, 1, 1, 1]
    dx = tf.raw_ops.Conv2DBackpropInput(
        input_sizes=tf.shape(x), filter=kernel, out_backprop=dy, strides=strides, padding="SAME"
    )
    _, height, width, channels = shape_list(x)
    rows = tf.range(0, height, BAND)[:, None] + tf.range(BAND + 2)  # each band with one more row above and below
    bands = tf.gather(tf.pad(x, explicit_padding(1, 1)), rows, axis=1)
    dkernel = tf.raw_ops.Conv2DBackpropFilter(
        input=tf.reshape(bands, [-1, BAND + 2, width + 2, channels]),
        filter_sizes=kernel.shape,
        out_backprop=tf.reshape(dy, [-1, BAND, width, kernel.shape[3]]),
        strides=strides,
        padding="VALID",
    )
    return dx, dkernel


@layer_register(use_scope=True)
def conv2d(x, channels, kernel_size, *, initializer, padding="SAME", activation=None, is_large=False):
    """Applies a convolution of stride 1 with bias.

    Args:
        x: [N, H, W, C]. channels: of the output. initializer: of the kernel `W`; the bias `b` starts at 0.
        padding: "SAME" or "VALID"
        is_large: the map has many rows, a multiple of BAND; allowed with 3x3 kernels and "SAME" padding
    Returns:
        [N, H, W, channels], dtype of `x`; smaller than `x` with "VALID" padding
    """
    kernel = tfv1.get_variable("W", [kernel_size, kernel_size, x.shape[-1], channels], initializer=initializer)
    bias = tfv1.get_variable("b", [channels], initializer=tf.zeros_initializer())
    in_bands = is_large and x.dtype == tf.bfloat16 and not tf.config.list_physical_devices("GPU")
    with tfv1.get_default_graph().gradient_override_map({"Conv2D": "Conv2DOfLargeMap"} if in_bands else {}):
        return _convolve(x, kernel, bias, stride=1, padding=padding, activation=activation)


@layer_register(use_scope=True)
def conv2d_norm(
    x,
    channels,
    kernel_size,
    *,
    norm,
    epsilon=NORM_EPSILON,
    groups=1,
    stride=1,
    padding="SAME",
    activation=None,
    gamma=1.0,
    freeze=(),
):
    """Applies a convolution without bias and a norm: the layer of backbones.

    Frozen batch norm is folded into the kernel and a bias, in training as well: convolution, bias and activation remain
    one fused kernel, and there is no gradient of a batch norm to compute; gamma and beta receive the same gradient.

    Args:
        x: [N, H, W, C]. norm: "FreezeBN", "SyncBN", "GN" or "None". epsilon: added to a variance.
        groups: of channels, convolved separately. gamma: initial value of the norm's scale.
        freeze: a set of "W" (the kernel) and "affine" (gamma and beta): these get no gradient. With "W", SyncBN also
            keeps its statistics.
    Returns:
        [N, H', W', channels], dtype of `x`
    """
    shape = [kernel_size, kernel_size, x.shape[-1] // groups, channels]
    kernel = tfv1.get_variable("W", shape, initializer=HE_FAN_OUT, trainable="W" not in freeze)
    bias = None
    if norm == "FreezeBN" or (norm == "SyncBN" and "W" in freeze):
        with tfv1.variable_scope("bn"):
            scale, bias = _frozen_batch_norm(channels, epsilon=epsilon, gamma=gamma, trainable="affine" not in freeze)
        kernel = kernel * scale
        norm = "None"
    if norm == "None":
        return _convolve(x, kernel, bias, stride=stride, padding=padding, activation=activation)
    y = _convolve(x, kernel, None, stride=stride, padding=padding, activation=None)
    y = NORMS[norm](NORM_SCOPES[norm], y, epsilon=epsilon, gamma=gamma, trainable="affine" not in freeze)
    return activation(y) if activation else y


def _affine(channels, *, gamma, trainable):
    """Returns the variables gamma and beta, float32 [channels]."""
    scale = tfv1.get_variable("gamma", [channels], initializer=tf.constant_initializer(gamma), trainable=trainable)
    shift = tfv1.get_variable("beta", [channels], initializer=tf.zeros_initializer(), trainable=trainable)
    return scale, shift


def _batch_statistics(channels):
    """Returns the variables of a batch norm's stored mean and variance, float32 [channels]."""
    mean = tfv1.get_variable("mean/EMA", [channels], initializer=tf.zeros_initializer(), trainable=False)
    variance = tfv1.get_variable("variance/EMA", [channels], initializer=tf.ones_initializer(), trainable=False)
    return mean, variance


def _frozen_batch_norm(channels, *, epsilon, gamma, trainable):
    """Returns a batch norm with stored statistics as (scale, bias), float32 [channels]: y = x * scale + bias."""
    gamma, beta = _affine(channels, gamma=gamma, trainable=trainable)
    mean, variance = _batch_statistics(channels)
    scale = gamma * tf.math.rsqrt(variance + epsilon)
    return scale, beta - mean * scale


@layer_register(use_scope=True)
def group_norm(x, *, epsilon=NORM_EPSILON, gamma=1.0, trainable=True):
    """Applies Group Normalization (arXiv:1803.08494, eq. 1 and 7) with 32 groups of adjacent channels.

    Layers of fewer than 64 channels, which no published model has, get groups of two channels.

    Args:
        x: [N, H, W, C]. Statistics are computed over H, W and the channels of a group, in float32.
    Returns:
        [N, H, W, C], dtype of `x`
    """
    channels = x.shape[-1]
    groups = min(32, channels // 2)
    gamma, beta = _affine(channels, gamma=gamma, trainable=trainable)
    n, height, width, _ = shape_list(x)
    grouped = tf.reshape(tf.cast(x, tf.float32), [n, height * width, groups, channels // groups])
    mean, variance = tf.nn.moments(grouped, [1, 3], keepdims=True)
    per_channel = [n, 1, groups, channels // groups]
    scale = tf.reshape(gamma, [1, 1, groups, -1]) * tf.math.rsqrt(variance + epsilon)
    shift = tf.reshape(beta, [1, 1, groups, -1]) - mean * scale
    scale, shift = (tf.reshape(tf.broadcast_to(v, per_channel), [n, 1, 1, channels]) for v in (scale, shift))
    return x * tf.cast(scale, x.dtype) + tf.cast(shift, x.dtype)


@layer_register(use_scope=True)
def batch_norm(x, *, epsilon=NORM_EPSILON, gamma=1.0, trainable=True):
    """Applies batch normalisation with the statistics of this step (training only) and averages them for inference.

    The statistics cover the batches of all replicas together, whatever their sizes. The biased variance is used both
    for the output and for the moving average, as in the reference.

    Args:
        x: [N, H, W, C]
    Returns:
        [N, H, W, C], dtype of `x`
    """
    channels = x.shape[-1]
    gamma, beta = _affine(channels, gamma=gamma, trainable=trainable)
    averages = _batch_statistics(channels)
    moments = joined_moments(*tf.nn.moments(tf.cast(x, tf.float32), [0, 1, 2]), tf.size(x) / channels, averages[0])
    for average, moment in zip(averages, moments):
        update = tfv1.assign_sub(average, (1 - EMA_DECAY) * (average - moment))
        tfv1.add_to_collection(tfv1.GraphKeys.UPDATE_OPS, update)
    mean, variance = moments
    scale = gamma * tf.math.rsqrt(variance + epsilon)
    return x * tf.cast(scale, x.dtype) + tf.cast(beta - mean * scale, x.dtype)


def conv2d_of_head(name, norm_name, x, channels, *, norm, norm_first=False):
    """Applies a 3x3 convolution with ReLU of a box or mask head: [R, H, W, C] -> [R, H, W, channels].

    Args:
        name, norm_name: variable scopes. norm: "None" or "GN".
        norm_first: put the norm before the ReLU; the published models have it after
    """
    relu_last = norm == "GN" and norm_first
    x = conv2d(name, x, channels, 3, initializer=HE_FAN_OUT, activation=None if relu_last else tf.nn.relu)
    if norm == "GN":
        x = group_norm(norm_name, x)
    return tf.nn.relu(x) if relu_last else x


NORMS = {"GN": group_norm, "SyncBN": batch_norm}


@layer_register(use_scope=True)
def fully_connected(x, channels, *, initializer=FAN_IN, activation=None):
    """Computes x @ W + b. A feature map is flattened as channel, row, column, the order of the published weights.

    Args:
        x: [R, C], or [R, H, W, C] with static H, W, C
    Returns:
        [R, channels], dtype of `x`
    """
    inputs = x.shape[1:].num_elements()
    kernel = tfv1.get_variable("W", [inputs, channels], initializer=initializer)
    bias = tfv1.get_variable("b", [channels], initializer=tf.zeros_initializer())
    if x.shape.rank == 4:  # permuting the weights costs as much as permuting the RoIs, but nothing in an export
        _, height, width, depth = x.shape
        kernel = tf.reshape(kernel, [depth, height, width, channels])
        kernel = tf.reshape(tf.transpose(kernel, [1, 2, 0, 3]), [inputs, channels])
        x = tf.reshape(x, [-1, inputs])
    y = tf.nn.bias_add(tf.matmul(x, tf.cast(kernel, x.dtype)), tf.cast(bias, x.dtype))
    return activation(y) if activation else y


@layer_register(use_scope=True)
def deconv2x2(x, channels, *, initializer, activation=None):
    """Applies a transposed convolution with a 2x2 kernel and stride 2: each input pixel gives a window of 2x2 outputs.

    The windows do not overlap, so the layer is one matrix product. `join_windows` arranges them to a map; per-pixel
    operations may come before it.

    Args:
        x: [R, H, W, C]
    Returns:
        the window of each input pixel: [R, H, W, 2, 2, channels], dtype of `x`
    """
    r, height, width, depth = shape_list(x)
    kernel = tfv1.get_variable("W", [2, 2, channels, depth], initializer=initializer)
    bias = tfv1.get_variable("b", [channels], initializer=tf.zeros_initializer())
    kernel = tf.reshape(tf.transpose(kernel, [3, 0, 1, 2]), [1, 1, depth, 4 * channels])
    y = _convolve(x, kernel, tf.tile(bias, [4]), stride=1, padding="SAME", activation=activation)
    return tf.reshape(y, [r, height, width, 2, 2, channels])


def join_windows(windows):
    """Arranges windows [R, H, W, 2, 2] to maps [R, 2 H, 2 W]."""
    r, height, width, *_ = shape_list(windows)
    return tf.reshape(tf.transpose(windows, [0, 1, 3, 2, 4]), [r, 2 * height, 2 * width])


@layer_register(use_scope=True)
def channel_of_conv1x1(x, index, channels, *, initializer):
    """Computes one output channel per item of a 1x1 convolution with bias, without computing the others.

    Args:
        x: [R, ..., C]. index: integer [R] in 0..channels - 1. channels: number of outputs of the convolution.
    Returns:
        float32 [R, ...]
    """
    depth = x.shape[-1]
    kernel = tfv1.get_variable("W", [1, 1, depth, channels], initializer=initializer)
    bias = tfv1.get_variable("b", [channels], initializer=tf.zeros_initializer())
    shape = shape_list(x)[:-1]
    x = tf.reshape(x, [shape[0], -1, depth])
    # Gathered in float32, in which gradients accumulate, and not along axis 0 of the variables: a gradient would be
    # sparse, and a sparse gradient does not update the momentum of the other channels.
    own_kernel, own_bias = (tf.gather(tf.reshape(v, [-1, channels]), index, axis=1) for v in (kernel, bias))
    own_kernel = tf.cast(tf.transpose(own_kernel), x.dtype)[:, None]
    y = tf.matmul(own_kernel, x, transpose_b=True)[:, 0]
    return tf.reshape(tf.cast(y, tf.float32) + tf.transpose(own_bias), shape)
