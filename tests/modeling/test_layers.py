"""Layers against NumPy and TensorFlow's plain ops; names, dtypes and trainability of their variables."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import convolve, evaluate, group_norm, relu, variables

from modeling import layers

tfv1 = tf.compat.v1

MAP = np.random.default_rng(0).normal(size=(2, 6, 5, 4)).astype(np.float32)


def conv2d_norm(x, *, freeze=(), norm="FreezeBN", **options):
    return layers.conv2d_norm("conv", x, 6, 3, norm=norm, freeze=freeze, **options)


def trainable():
    return {variable.op.name for variable in tfv1.trainable_variables()}


# ---------------------------------------------------------------------------------------------------------- convolution


def test_convolution_has_a_bias_and_keeps_the_size():
    def build(x):
        return layers.conv2d("conv", x, 6, 3, initializer=layers.FAN_IN, activation=tf.nn.relu), variables()

    y, values = evaluate(build, MAP, random_variables=np.random.default_rng(1))
    expected = relu(convolve(MAP, values["conv/W"], bias=values["conv/b"], before=1, after=1))
    assert y.shape == (2, 6, 5, 6) and np.count_nonzero(expected == 0) > 10
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride, before, after", [(1, 1, 1), (2, 1, 0), (2, 0, 1)])
def test_folded_batch_norm_equals_convolution_and_batch_norm(stride, before, after):
    """Values, and the gradients of W, gamma and beta."""
    padding = layers.explicit_padding(before, after)

    def build(x):
        folded = conv2d_norm(x, stride=stride, padding=padding, activation=tf.nn.relu)
        v = variables()
        y = tf.nn.conv2d(tf.pad(x, padding), v["conv/W"], stride, "VALID")
        mean, variance, gamma, beta = (v[f"conv/bn/{name}"] for name in ("mean/EMA", "variance/EMA", "gamma", "beta"))
        plain = tf.nn.relu((y - mean) / tf.sqrt(variance + 1e-5) * gamma + beta)
        wanted = [v["conv/W"], gamma, beta]
        return [(y, tf.gradients(tf.reduce_sum(y * y), wanted)) for y in (folded, plain)]

    (y, gradients), (expected, expected_gradients) = evaluate(build, MAP, random_variables=np.random.default_rng(2))
    assert np.count_nonzero(expected) > 20
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "norm, freeze, expected",
    [
        ("FreezeBN", set(), {"W", "bn/gamma", "bn/beta"}),
        ("FreezeBN", {"affine"}, {"W"}),
        ("FreezeBN", {"W", "affine"}, set()),
        ("SyncBN", set(), {"W", "bn/gamma", "bn/beta"}),
        ("SyncBN", {"affine"}, {"W"}),
        ("SyncBN", {"W", "affine"}, set()),
        ("GN", set(), {"W", "gn/gamma", "gn/beta"}),
        ("GN", {"affine"}, {"W"}),
        ("GN", {"W", "affine"}, set()),
        ("None", set(), {"W"}),
        ("None", {"W", "affine"}, set()),
    ],
)
def test_names_of_variables_and_which_of_them_are_trained(norm, freeze, expected):
    batch_norm = {"W", "bn/gamma", "bn/beta", "bn/mean/EMA", "bn/variance/EMA"}
    names = {"None": {"W"}, "GN": {"W", "gn/gamma", "gn/beta"}}.get(norm, batch_norm)
    with tf.Graph().as_default():
        conv2d_norm(tf.constant(MAP), norm=norm, freeze=freeze)
        assert set(variables()) == {f"conv/{name}" for name in names}
        assert trainable() == {f"conv/{name}" for name in expected}


def test_names_of_the_variables_of_other_layers():
    def build(x):
        layers.conv2d("conv", x, 2, 3, initializer=layers.FAN_IN)
        layers.group_norm("gn", x)
        layers.batch_norm("bn", x)
        layers.fully_connected("fc", x, 2)
        layers.deconv2x2("deconv", x, 2, initializer=layers.FAN_IN)
        layers.channel_of_conv1x1("channel", x, tf.zeros([2], tf.int32), 3, initializer=layers.FAN_IN)
        return variables()

    with tf.Graph().as_default():
        shapes = {name: tuple(variable.shape) for name, variable in build(tf.constant(MAP)).items()}
        batch_norm = {f"bn/{name}": (4,) for name in ("gamma", "beta", "mean/EMA", "variance/EMA")}
        assert shapes == {
            **batch_norm,
            "conv/W": (3, 3, 4, 2),
            "conv/b": (2,),
            "gn/gamma": (4,),
            "gn/beta": (4,),
            "fc/W": (120, 2),
            "fc/b": (2,),
            "deconv/W": (2, 2, 2, 4),
            "deconv/b": (2,),
            "channel/W": (1, 1, 4, 3),
            "channel/b": (3,),
        }
        assert trainable() == set(shapes) - {"bn/mean/EMA", "bn/variance/EMA"}


@pytest.mark.parametrize("norm, scope", [("FreezeBN", "bn"), ("SyncBN", "bn"), ("GN", "gn")])
def test_initial_values_of_a_norm(norm, scope):
    def build(x):
        conv2d_norm(x, norm=norm, gamma=0.5)
        return variables()

    values = evaluate(build, MAP)
    expected = {"gamma": 0.5, "beta": 0, **({} if norm == "GN" else {"mean/EMA": 0, "variance/EMA": 1})}
    for name, value in expected.items():
        np.testing.assert_array_equal(values[f"conv/{scope}/{name}"], np.full(6, value))


def test_spread_of_initial_kernels():
    """He et al. 2015: the variance is 2 / outputs; fan-in of scale 1: 1 / inputs. Not truncated."""

    def build():
        shape = [3, 3, 64, 256]
        return layers.HE_FAN_OUT(shape), layers.FAN_IN(shape), layers.normal_initializer(0.01)(shape)

    for kernel, deviation in zip(evaluate(build), [(2 / (9 * 256)) ** 0.5, (9 * 64) ** -0.5, 0.01]):
        np.testing.assert_allclose(kernel.std(), deviation, rtol=0.02)
        assert np.abs(kernel).max() > 3 * deviation


# -------------------------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("channels, groups", [(128, 32), (64, 32), (6, 3)])
def test_group_norm_has_groups_of_adjacent_channels(channels, groups):
    rng = np.random.default_rng(3)
    x = rng.normal(rng.normal(size=channels), rng.uniform(0.1, 3, channels), (2, 5, 3, channels)).astype(np.float32)
    y, values = evaluate(lambda x: (layers.group_norm("gn", x), variables()), x, random_variables=rng)
    expected = group_norm(x, values["gn/gamma"], values["gn/beta"], groups=groups)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_group_norm_comes_between_convolution_and_activation():
    def build(x):
        return conv2d_norm(x, norm="GN", activation=tf.nn.relu), variables()

    y, values = evaluate(build, MAP, random_variables=np.random.default_rng(4))
    x = convolve(MAP, values["conv/W"], before=1, after=1)
    expected = relu(group_norm(x, values["conv/gn/gamma"], values["conv/gn/beta"], groups=3))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_uses_the_batch_and_its_biased_variance():
    x = 3 * MAP + np.arange(4)
    y, values = evaluate(
        lambda x: (layers.batch_norm("bn", x), variables()), x, random_variables=np.random.default_rng(5)
    )
    mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    expected = (x - mean) / np.sqrt(variance + 1e-5) * values["bn/gamma"] + values["bn/beta"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_covers_the_valid_items():
    """Outputs, averages, and the gradient, against the norm of a batch of the valid items alone."""
    rng = np.random.default_rng(7)
    x, weights = (rng.normal(size=(5, 3, 2, 4)).astype(np.float32) for _ in range(2))
    is_valid = np.array([True, False, True, False, True])

    def build(x, weights, is_valid=None):
        y = layers.batch_norm("bn", x, is_valid=is_valid)
        updates = tfv1.get_collection(tfv1.GraphKeys.UPDATE_OPS)
        used = y if is_valid is None else tf.boolean_mask(y * weights, is_valid)
        loss = tf.reduce_sum(used * weights if is_valid is None else used)
        return y, tf.gradients(loss, [x, *tfv1.trainable_variables()]), updates

    y, (dx, *affine), updates = evaluate(build, x, weights, is_valid, random_variables=np.random.default_rng(5))
    alone = evaluate(build, x[is_valid], weights[is_valid], random_variables=np.random.default_rng(5))
    np.testing.assert_allclose(y[is_valid], alone[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx[is_valid], alone[1][0], rtol=1e-4, atol=1e-5)
    assert not dx[~is_valid].any()
    for found, expected in zip([*affine, *updates], [*alone[1][1:], *alone[2]]):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_of_nothing_keeps_its_statistics():
    def build(x):
        y = layers.batch_norm("bn", x, is_valid=tf.zeros([2], tf.bool))
        before = {name: variable + 0.0 for name, variable in variables().items()}
        with tf.control_dependencies(before.values()):
            gradients = tf.gradients(y, [x, *tfv1.trainable_variables()])
        updates = tfv1.get_collection(tfv1.GraphKeys.UPDATE_OPS)
        return y, gradients, before, updates

    y, gradients, before, updates = evaluate(build, MAP[:2], random_variables=np.random.default_rng(5))
    assert all(np.isfinite(x).all() for x in (y, *gradients))
    for name, updated in zip(("bn/mean/EMA", "bn/variance/EMA"), updates):
        np.testing.assert_array_equal(updated, before[name])


def test_batch_norm_averages_the_statistics():
    """The moving averages start with 0 and 1, and take a tenth of each batch's mean and biased variance."""
    batches = [MAP, 2 * MAP + 1]
    mean, variance = np.zeros(4), np.ones(4)
    with tf.Graph().as_default(), tfv1.Session() as session:
        x = tfv1.placeholder(tf.float32, MAP.shape)
        layers.batch_norm("bn", x)
        updates = tfv1.get_collection(tfv1.GraphKeys.UPDATE_OPS)
        session.run(tfv1.global_variables_initializer())
        for batch in batches:
            session.run(updates, {x: batch})
            mean = 0.9 * mean + 0.1 * batch.mean(axis=(0, 1, 2))
            variance = 0.9 * variance + 0.1 * batch.var(axis=(0, 1, 2))
        values = session.run(variables())
    np.testing.assert_allclose(values["bn/mean/EMA"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values["bn/variance/EMA"], variance, rtol=1e-5)


def test_batch_norm_of_a_frozen_layer_uses_and_keeps_the_stored_statistics():
    def build(x):
        y = conv2d_norm(x, norm="SyncBN", freeze={"W", "affine"})
        assert not tfv1.get_collection(tfv1.GraphKeys.UPDATE_OPS)
        return y, variables()

    y, values = evaluate(build, MAP, random_variables=np.random.default_rng(6))
    mean, variance, gamma, beta = (values[f"conv/bn/{name}"] for name in ("mean/EMA", "variance/EMA", "gamma", "beta"))
    expected = (convolve(MAP, values["conv/W"], before=1, after=1) - mean) / np.sqrt(variance + 1e-5) * gamma + beta
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_of_a_trained_layer_updates_the_statistics_also_with_frozen_affine():
    with tf.Graph().as_default():
        conv2d_norm(tf.constant(MAP), norm="SyncBN", freeze={"affine"})
        assert len(tfv1.get_collection(tfv1.GraphKeys.UPDATE_OPS)) == 2


# ------------------------------------------------------------------------------------------------------ fully connected


@pytest.mark.parametrize("rois", [3, 0])
def test_fully_connected_flattens_as_channel_row_column(rois):
    x = np.random.default_rng(7).normal(size=(rois, 2, 3, 5)).astype(np.float32)

    def build(x):
        x.set_shape([None, 2, 3, 5])
        return layers.fully_connected("fc", x, 7, activation=tf.nn.relu), variables()

    y, values = evaluate(build, x, random_variables=np.random.default_rng(8))
    flat = [[roi[row, column, c] for c in range(5) for row in range(2) for column in range(3)] for roi in x]
    expected = relu(np.reshape(flat, (rois, 30)) @ values["fc/W"] + values["fc/b"])
    assert y.shape == (rois, 7)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_the_mean_of_pixels_and_its_gradient():
    rng = np.random.default_rng(12)
    x, weights = rng.normal(size=(3, 2, 5, 4)).astype(np.float32), rng.normal(size=(3, 4)).astype(np.float32)

    def build(x, weights):
        y = layers.mean_of_pixels(tf.ensure_shape(x, [None, 2, 5, 4]))
        return y, tf.gradients(y * weights, x)[0]

    y, dx = evaluate(build, x, weights)
    np.testing.assert_allclose(y, x.mean(axis=(1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, np.broadcast_to(weights[:, None, None] / 10, x.shape), rtol=1e-5)


def test_statistics_count_values_not_items():
    """Of two items that are valid, 3 x 2 pixels each."""
    x = np.random.default_rng(13).normal(size=(4, 3, 2, 5)).astype(np.float32)
    is_valid = np.array([True, False, False, True])
    for mask, used in ((None, x), (is_valid, x[is_valid])):
        mean, variance, count = evaluate(lambda x, mask=mask: layers._moments(x, mask), x)
        assert count == used[..., 0].size
        np.testing.assert_allclose(mean, used.mean(axis=(0, 1, 2)), atol=1e-6)
        np.testing.assert_allclose(variance, used.var(axis=(0, 1, 2)), rtol=1e-5)


def test_fully_connected_of_vectors():
    x = np.random.default_rng(9).normal(size=(3, 4)).astype(np.float32)
    y, values = evaluate(
        lambda x: (layers.fully_connected("fc", x, 7), variables()), x, random_variables=np.random.default_rng(10)
    )
    assert np.any(y < 0)
    np.testing.assert_allclose(y, x @ values["fc/W"] + values["fc/b"], rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_large_map_is_that_of_any_map():
    """In bfloat16, of values that it holds exactly; bands of 8 rows, of which the outer ones have a neighbour less."""
    rng = np.random.default_rng(14)
    x, dy, kernel = (
        rng.integers(-2, 3, shape).astype(np.float32) for shape in ((2, 24, 5, 4), (2, 24, 5, 3), (3, 3, 4, 3))
    )

    def build(x, dy):
        low = tf.cast(x, tf.bfloat16)
        y = layers.conv2d("conv", low, 3, 3, initializer=tf.constant_initializer(kernel), is_large=True)
        assert y.op.inputs[0].op.get_attr("_gradient_op_type") == b"Conv2DOfLargeMap"
        variable = variables()["conv/W"]
        plain = tf.nn.conv2d(x, variable, 1, "SAME")
        return tf.gradients(y, [x, variable], tf.cast(dy, tf.bfloat16)), tf.gradients(plain, [x, variable], dy)

    for gradient, expected in zip(*evaluate(build, x, dy)):
        np.testing.assert_allclose(gradient, expected, rtol=2**-8)


# ----------------------------------------------------------------------------------------------- transposed convolution


def test_deconv2x2_equals_conv2d_transpose():
    """Values, and the gradients of the input, W and b."""

    def build(x):
        y = layers.deconv2x2("deconv", x, 3, initializer=layers.HE_FAN_OUT, activation=tf.nn.relu)
        v = variables()
        shape = [tf.shape(x)[0], 12, 10, 3]
        plain = tf.nn.relu(tf.nn.conv2d_transpose(x, v["deconv/W"], shape, 2) + v["deconv/b"])
        y = tf.stack([layers.join_windows(y[..., i]) for i in range(3)], axis=-1)
        return [(y, tf.gradients(tf.reduce_sum(y * y), [x, v["deconv/W"], v["deconv/b"]])) for y in (y, plain)]

    (y, gradients), (expected, expected_gradients) = evaluate(build, MAP, random_variables=np.random.default_rng(11))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_channel_of_conv1x1_equals_the_convolution():
    """Values, and the gradients of the input, W and b; a channel twice, and one not at all."""
    index = np.array([2, 0, 2, 3])

    def build(x):
        y = layers.channel_of_conv1x1("conv", x, index, 4, initializer=layers.FAN_IN)
        v = variables()
        plain = tf.gather(tf.nn.conv2d(x, v["conv/W"], 1, "SAME") + v["conv/b"], index, axis=3, batch_dims=1)
        wanted = [x, v["conv/W"], v["conv/b"]]
        of = [tf.gradients(tf.reduce_sum(y * y), wanted) for y in (y, plain)]
        return [(y, [tf.convert_to_tensor(g) for g in gradients]) for y, gradients in zip((y, plain), of)]

    four = np.concatenate([MAP, -MAP[::-1]])
    (y, gradients), (expected, expected_gradients) = evaluate(build, four, random_variables=np.random.default_rng(13))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ precision


def all_layers(x):
    return {
        "conv": layers.conv2d("conv", x, 6, 3, initializer=layers.FAN_IN, activation=tf.nn.relu),
        "FreezeBN": layers.conv2d_norm("frozen", x, 6, 3, norm="FreezeBN"),
        "SyncBN": layers.conv2d_norm("sync", x, 6, 3, norm="SyncBN"),
        "GN": layers.conv2d_norm("group", x, 6, 3, norm="GN"),
        "None": layers.conv2d_norm("plain", x, 6, 3, norm="None"),
        "fc": layers.fully_connected("fc", tf.ensure_shape(x, [None, 6, 5, 4]), 3),
        "deconv": layers.deconv2x2("deconv", x, 3, initializer=layers.FAN_IN),
    }


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16])
def test_layers_compute_in_the_dtype_of_their_input_with_float32_variables(dtype):
    def build(x):
        low = all_layers(tf.cast(x, dtype))
        assert all(variable.dtype.base_dtype == tf.float32 for variable in tfv1.global_variables())
        assert all(y.dtype == dtype for y in low.values())
        with tfv1.variable_scope(tfv1.get_variable_scope(), reuse=True):
            return {name: tf.cast(y, tf.float32) for name, y in low.items()}, all_layers(x)

    low, exact = evaluate(build, MAP, random_variables=np.random.default_rng(12))
    for name, y in exact.items():
        np.testing.assert_allclose(low[name], y, atol=0.03 * np.abs(y).max(), err_msg=name)


def test_shape_list_has_integers_where_sizes_are_known():
    def build(x):
        n, height, width, channels = layers.shape_list(x)
        assert channels == 4 and not isinstance(height, int)
        return n, height, width

    assert evaluate(build, MAP) == (2, 6, 5)


@pytest.mark.parametrize("dtype", [tf.float32, tf.float16, tf.bfloat16])
def test_the_gradient_of_relu_of_any_dtype(dtype):
    rng, largest = np.random.default_rng(4), 100 if dtype == tf.float16 else 1e30
    y, dy = (rng.normal(size=2000) * rng.choice([1e-6, 1, largest], 2000) for _ in range(2))
    y[::3] = 0
    y, dy = (tf.cast(x, dtype).numpy() for x in (np.maximum(y, 0), dy))
    found = evaluate(lambda dy, y: layers._relu_gradient(dy, y), dy, y)
    np.testing.assert_array_equal(found.astype(float), np.where(y > 0, dy.astype(float), 0))
