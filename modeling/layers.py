"""Variables and layers: convolution, fully connected, normalisation. The only file that creates model variables.

Every layer takes its variable scope first: `conv2d("conv0", x, 64, 7)`. Variable names are those of the published
checkpoints (`W`, `b`, `gamma`, `beta`, `mean/EMA`, `variance/EMA`). Variables are float32; a layer computes in the
dtype of its input `x`, so the dtype of the image determines the precision of the network. `parameters.prepare` converts
the variables of convolutions and matrix products: see there.

Shapes: N images, R RoIs, H height, W width, C channels. Tensors are NHWC.
"""

import contextlib

import tensorflow as tf
from tensorpack.models import layer_register

from . import device
from .parameters import Norm, Parameters, prepare
from .sync_bn import joined_moments

tfv1 = tf.compat.v1

BAND = 8  # rows of a band in `_gradient_in_bands`; the height of p2 is a multiple of it
NORM_EPSILON = 1e-5
EMA_DECAY = 0.9  # of SyncBN's statistics
NORM_SCOPES = {"FreezeBN": "bn", "SyncBN": "bn", "GN": "gn"}
BATCH_NORMS = ("FreezeBN", "SyncBN")

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


@tf.custom_gradient
def mean_of_pixels(x):
    """Averages [R, H, W, C] with static H and W over all pixels: [R, C]. `tf.reduce_mean`'s gradient asks the host."""
    _, height, width, _ = x.shape

    def gradient(dy):
        return tf.tile(dy[:, None, None] / (height * width), [1, height, width, 1])

    return tf.reduce_mean(x, axis=[1, 2]), gradient


def _convolve(x, create, channels, *, stride, padding, activation, shortcut=None, is_large=False):
    """Applies convolution, bias, the sum with `shortcut` and activation: ops that TensorFlow fuses into one kernel.

    Args:
        create: function that creates the layer's variables and returns Parameters. channels: of the output.
        is_large: see `conv2d`.
    """
    is_one_kernel = _is_one_kernel(x.dtype, channels, activation=activation, has_shortcut=shortcut is not None)
    kernel, bias = prepare(create, x.dtype, bias_dtype=tf.float32 if is_one_kernel else x.dtype)
    if not isinstance(padding, str):  # oneDNN has no gradient for explicit padding; Eigen's takes ten times as long
        x, padding = tf.pad(x, padding), "VALID"
    convolution = tf.nn.conv2d if kernel.shape[2] == x.shape[-1] else _grouped_conv2d
    in_bands = is_large and x.dtype == tf.bfloat16 and not device.is_gpu()
    with tfv1.get_default_graph().gradient_override_map({"Conv2D": "Conv2DOfLargeMap"} if in_bands else {}):
        y = convolution(x, kernel, strides=stride, padding=padding)
    if is_one_kernel and bias is not None:
        return _finish_on_gpu(y, bias, shortcut, has_relu=activation is not None)
    return _finish(y, bias, activation=activation, shortcut=shortcut)


def _is_one_kernel(dtype, channels, *, activation, has_shortcut):
    """Whether `_finish_on_gpu` adds a layer's bias and shortcut, not `_finish`."""
    is_fusible = activation in (None, tf.nn.relu) and channels % 4 == 0
    is_fused_later = not has_shortcut and activation is not None and dtype != tf.bfloat16  # by TensorFlow and cuDNN
    return device.runs_on_gpu() and is_fusible and not is_fused_later and not tf.executing_eagerly()


def _finish(x, bias, *, activation, shortcut=None):
    """Adds `bias` ([C], dtype of `x`) and `shortcut` (like `x`), and applies `activation`; each may be None."""
    if bias is not None:
        x = _add_bias(x, bias)
    if shortcut is not None:
        x = add(x, shortcut)
    return activation(x) if activation else x


def _finish_on_gpu(x, bias, shortcut, *, has_relu):
    """Computes `_finish` by the one kernel of TensorFlow that adds, in one pass, both to maps of any dtype.

    It is that of inference with batch norm. TensorFlow itself composes it of others, as its name's underscore tells,
    but not in bfloat16.
    """

    @tf.custom_gradient
    def finish(x, bias, *shortcut):
        y = _fused_finish(x, bias, shortcut, has_relu=has_relu)
        y.set_shape(x.shape)

        def gradient(dy):
            if has_relu:
                dy = _relu_gradient(dy, y)
            return dy, tf.cast(_sum_of_rows(dy), tf.float32), *[dy] * len(shortcut)

        return y, gradient

    return finish(x, bias, *([] if shortcut is None else [shortcut]))


def _relu_gradient(dy, y):
    """The gradient of y = relu(x): `dy` where y is above 0, else 0.

    TensorFlow's kernel for float16 takes half as long as that for bfloat16, and gives the same for the bits of either:
    the order of numbers and zero are the same, and a product with 1 changes nothing, up to values of 2^121.
    """
    as_dtype = tf.float16 if y.dtype == tf.bfloat16 else y.dtype
    dx = tf.raw_ops.ReluGrad(gradients=tf.bitcast(dy, as_dtype), features=tf.bitcast(y, as_dtype))
    return tf.bitcast(dx, y.dtype)


def _fused_finish(x, bias, shortcut, *, has_relu):
    """The op of `_finish_on_gpu`. `shortcut`: a tuple of none or one."""
    ones, zeros = tf.ones([x.shape[-1]]), tf.zeros([x.shape[-1]])
    attributes = {
        "T": tfv1.AttrValue(type=x.dtype.as_datatype_enum),
        "U": tfv1.AttrValue(type=tf.float32.as_datatype_enum),
        "epsilon": tfv1.AttrValue(f=0.0),
        "num_side_inputs": tfv1.AttrValue(i=len(shortcut)),
        "activation_mode": tfv1.AttrValue(s=b"Relu" if has_relu else b"Identity"),
        "is_training": tfv1.AttrValue(b=False),
    }
    operation = tfv1.get_default_graph().create_op(
        "_FusedBatchNormEx",
        [x, ones, bias, zeros, ones, *shortcut],
        [x.dtype, *[tf.float32] * 5],
        attrs=attributes,
        name="finish",
    )
    return operation.outputs[0]


def _sum_of_rows(x):
    """Sums [..., C] over all but the last axis, in float32, as a matrix product: [C], dtype of `x`."""
    rows = tf.reshape(x, [-1, x.shape[-1]])
    return tf.reshape(tf.matmul(tf.ones([1, tf.shape(rows)[0]], x.dtype), rows), [x.shape[-1]])


@tf.RegisterGradient("BiasAddOnGPU")
def _bias_gradient(op, dy):
    """TensorFlow's own kernel for GPUs adds in 16 bits, atomically, and takes ten times as long."""
    del op
    return dy, _sum_of_rows(dy)


def _add_bias(x, bias):
    """Adds `bias` [C] to `x` [..., C]."""
    with tfv1.get_default_graph().gradient_override_map({"BiasAdd": "BiasAddOnGPU"} if device.is_gpu() else {}):
        return tf.nn.bias_add(x, bias)


def _grouped_conv2d(x, kernel, *, strides, padding):
    """Convolves in groups of channels (ResNeXt), with a gradient on CPUs as well, where TensorFlow has none.

    On CPUs the gradient is that of the ordinary convolution with a block-diagonal kernel: more arithmetic than
    necessary.

    Args:
        x: [N, H, W, C]. kernel: [K, K, I, channels], for C / I groups.
    """
    if device.is_gpu():
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
def conv2d(x, channels, kernel_size, *, initializer, padding="SAME", activation=None, is_large=False, shortcut=None):
    """Applies a convolution of stride 1 with bias, the sum with `shortcut` and an activation.

    Args:
        x: [N, H, W, C]. channels: of the output. initializer: of the kernel `W`; the bias `b` starts at 0.
        padding: "SAME" or "VALID"
        is_large: the map has many rows, a multiple of BAND; allowed with 3x3 kernels and "SAME" padding
        shortcut: of the result's shape, or None
    Returns:
        [N, H, W, channels], dtype of `x`; smaller than `x` with "VALID" padding
    """
    shape = [kernel_size, kernel_size, x.shape[-1], channels]
    return _convolve(
        x,
        lambda: _weights_and_bias(shape, channels, initializer),
        channels,
        stride=1,
        padding=padding,
        activation=activation,
        shortcut=shortcut,
        is_large=is_large,
    )


def _weights_and_bias(shape, channels, initializer):
    """Returns the variables W and b as Parameters."""
    kernel = tfv1.get_variable("W", shape, initializer=initializer)
    return Parameters(kernel, tfv1.get_variable("b", [channels], initializer=tf.zeros_initializer()))


@layer_register(use_scope=True)
def conv2d_norm(
    x,
    channels,
    kernel_size,
    *,
    norm,
    initializer=HE_FAN_OUT,
    epsilon=NORM_EPSILON,
    groups=1,
    stride=1,
    padding="SAME",
    activation=None,
    gamma=1.0,
    freeze=(),
    shortcut=None,
    is_large=False,
    is_valid=None,
):
    """Applies a convolution without bias, a norm, the sum with `shortcut` and an activation: the layer of backbones.

    Frozen batch norm is folded into the kernel and a bias, in training as well: convolution, bias and activation remain
    one fused kernel, and there is no gradient of a batch norm to compute; gamma and beta receive the same gradient.

    Args:
        x: [N, H, W, C]. norm: "FreezeBN", "SyncBN", "GN" or "None". epsilon: added to a variance.
        groups: of channels, convolved separately. gamma: initial value of the norm's scale.
        freeze: a set of "W" (the kernel) and "affine" (gamma and beta): these get no gradient. With "W", SyncBN also
            keeps its statistics.
        shortcut: [N, H', W', channels] or None. is_large: see `conv2d`. is_valid: see `batch_norm`.
    Returns:
        [N, H', W', channels], dtype of `x`
    """
    shape = [kernel_size, kernel_size, x.shape[-1] // groups, channels]
    is_folded = norm == "FreezeBN" or (norm == "SyncBN" and "W" in freeze)

    def create():
        kernel = tfv1.get_variable("W", shape, initializer=initializer, trainable="W" not in freeze)
        if not is_folded:
            return Parameters(kernel, None)
        with tfv1.variable_scope("bn"):
            affine = _affine(channels, gamma=gamma, trainable="affine" not in freeze)
            return Parameters(kernel, None, Norm(*affine, *_batch_statistics(channels), epsilon))

    options = dict(stride=stride, padding=padding, is_large=is_large)
    if is_folded or norm == "None":
        return _convolve(x, create, channels, activation=activation, shortcut=shortcut, **options)
    y = _convolve(x, create, channels, activation=None, **options)
    valid = {"is_valid": is_valid} if norm == "SyncBN" else {}
    y = NORMS[norm](NORM_SCOPES[norm], y, epsilon=epsilon, gamma=gamma, trainable="affine" not in freeze, **valid)
    return _finish(y, None, activation=activation, shortcut=shortcut)


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
def batch_norm(x, *, epsilon=NORM_EPSILON, gamma=1.0, trainable=True, is_valid=None):
    """Applies batch normalisation with the statistics of this step (training only) and averages them for inference.

    The statistics cover the batches of all replicas together, whatever their sizes: each value counts once. Without any
    value the averages keep theirs. The biased variance is used both for the output and for the moving average, as in
    the reference.

    Args:
        x: [N, H, W, C]. is_valid: bool [N], the items that the statistics cover; None: all
    Returns:
        [N, H, W, C], dtype of `x`
    """
    channels = x.shape[-1]
    gamma, beta = _affine(channels, gamma=gamma, trainable=trainable)
    averages = _batch_statistics(channels)
    mean, variance, count = joined_moments(*_moments(tf.cast(x, tf.float32), is_valid), averages[0])
    share = (1 - EMA_DECAY) * tf.minimum(count, 1.0)
    for average, moment in zip(averages, (mean, variance)):
        update = tfv1.assign_sub(average, share * (average - moment))
        tfv1.add_to_collection(tfv1.GraphKeys.UPDATE_OPS, update)
    scale = gamma * tf.math.rsqrt(variance + epsilon)
    return x * tf.cast(scale, x.dtype) + tf.cast(beta - mean * scale, x.dtype)


def _moments(x, is_valid):
    """Returns mean and variance of each channel, float32 [C], and their number of values, float32, possibly 0.

    Args:
        x: float32 [N, H, W, C]. is_valid: see `batch_norm`.
    """
    pixels = tf.cast(tf.shape(x)[1] * tf.shape(x)[2], tf.float32)
    if is_valid is None:
        return *tf.nn.moments(x, [0, 1, 2]), pixels * tf.cast(tf.shape(x)[0], tf.float32)
    weights = tf.cast(is_valid, tf.float32)[:, None, None, None]
    count = tf.reduce_sum(weights)
    weights = weights / tf.maximum(count, 1.0)

    def average(y):  # the gradient of a sum that keeps its dimensions needs no shape from the host
        of_item = tf.reduce_mean(y, [1, 2], keepdims=True)
        return tf.reduce_sum(weights * of_item, 0, keepdims=True)

    mean = average(x)
    variance = average(tf.math.squared_difference(x, mean))
    return tf.reshape(mean, [-1]), tf.reshape(variance, [-1]), pixels * count


def conv2d_of_head(name, norm_name, x, channels, *, norm, norm_first=False, is_valid=None):
    """Applies a 3x3 convolution with ReLU of a box or mask head: [R, H, W, C] -> [R, H, W, channels].

    Args:
        name, norm_name: variable scopes; a batch norm has its own below `name`, and the convolution then no bias.
        norm: "None", "GN", "FreezeBN" or "SyncBN". is_valid: see `batch_norm`.
        norm_first: put GroupNorm before the ReLU; the published models have it after. Batch norm always comes before.
    """
    if norm in BATCH_NORMS:
        return conv2d_norm(name, x, channels, 3, norm=norm, activation=tf.nn.relu, is_valid=is_valid)
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

    def create():
        made = _weights_and_bias([inputs, channels], channels, initializer)
        if x.shape.rank == 2:
            return made
        _, height, width, depth = x.shape  # permuting the weights costs as much as permuting the RoIs, in training
        kernel = tf.reshape(made.kernel, [depth, height, width, channels])
        return made._replace(kernel=tf.reshape(tf.transpose(kernel, [1, 2, 0, 3]), [inputs, channels]))

    kernel, bias = prepare(create, x.dtype)
    y = _add_bias(tf.matmul(tf.reshape(x, [-1, inputs]), kernel), bias)
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

    def create():
        made = _weights_and_bias([2, 2, channels, depth], channels, initializer)
        kernel = tf.reshape(tf.transpose(made.kernel, [3, 0, 1, 2]), [1, 1, depth, 4 * channels])
        return Parameters(kernel, tf.tile(made.bias, [4]))

    y = _convolve(x, create, 4 * channels, stride=1, padding="SAME", activation=activation)
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
