"""Parameters as layers use them: computed in each run, kept in variables, and computed for all layers at once."""

import numpy as np
import pytest
import tensorflow as tf
from golden.synthetic import synthetic_image
from graphs import small_inference_graph, small_training_graph
from helpers import run_traced
from tensorpack.compat import tfv1

from modeling import device, parameters
from modeling.layers import collect_variables, conv2d_norm, fully_connected
from modeling.parameters import Norm, Parameters


def create(rng, scope, *, has_norm):
    """The values of a layer's variables, and a function that creates them."""
    values = {"W": rng.normal(size=(1, 1, 3, 2)), "b": rng.normal(size=2)}
    values |= {name: rng.uniform(0.5, 2, 2) for name in ("gamma", "beta", "mean", "variance")}

    def make():
        made = {name: tfv1.get_variable(name, initializer=np.float32(value)) for name, value in values.items()}
        norm = Norm(*(made[name] for name in ("gamma", "beta", "mean", "variance")), 0.1) if has_norm else None
        return Parameters(made["W"], None if has_norm else made["b"], norm)

    def prepare(**options):
        with tfv1.variable_scope(scope, reuse=tfv1.AUTO_REUSE):
            return parameters.prepare(make, **options)

    return values, prepare


def folded(values, *, has_norm):
    """arXiv:1502.03167, algorithm 1's last line, with y = kernel: the kernel and the bias."""
    if not has_norm:
        return values["W"], values["b"]
    scale = values["gamma"] / np.sqrt(values["variance"] + 0.1)
    return values["W"] * scale, values["beta"] - values["mean"] * scale


@pytest.mark.parametrize("form", ["in each run", "stored", "packed"])
def test_norms_are_folded_and_dtypes_are_as_wanted(form):
    rng = np.random.default_rng(0)
    layers = [create(rng, f"layer{i}", has_norm=i != 1) for i in range(3)]
    with tf.Graph().as_default(), tfv1.Session() as session, device.building_for(gpu=form == "packed"):

        def build():
            dtypes = tf.bfloat16, tf.bfloat16, tf.float32
            return [prepare(dtype=d, bias_dtype=tf.float32) for (_, prepare), d in zip(layers, dtypes)]

        updates = []
        if form == "stored":
            with parameters.stored() as updates:
                prepared = build()
        else:
            prepared = parameters.packed(build) if form == "packed" else build()
        session.run(tfv1.global_variables_initializer())
        session.run(updates)
        assert [kernel.dtype for kernel, _ in prepared] == [tf.bfloat16, tf.bfloat16, tf.float32]
        assert {bias.dtype for _, bias in prepared} == {tf.float32}
        found = session.run(prepared)
    for i, ((values, _), (kernel, bias)) in enumerate(zip(layers, found)):
        expected_kernel, expected_bias = folded(values, has_norm=i != 1)
        np.testing.assert_allclose(kernel.astype(np.float32), expected_kernel, rtol=2**-8)
        np.testing.assert_allclose(bias, expected_bias, rtol=1e-5)


def test_stored_parameters_are_those_of_the_last_update():
    values, prepare = create(np.random.default_rng(1), "layer", has_norm=True)
    with tf.Graph().as_default(), tfv1.Session() as session:
        with parameters.stored() as updates:
            kernel, bias = prepare(dtype=tf.float32)
            assert prepare(dtype=tf.float32)[0] is kernel  # a layer that is used twice has them once
        assert len(updates) == 2
        session.run(tfv1.global_variables_initializer())
        session.run(updates)
        before = session.run([kernel, bias])
        (gamma,) = [v for v in tfv1.global_variables() if v.op.name == "layer/gamma"]
        gamma.load(2 * values["gamma"], session)
        for one, other in zip(session.run([kernel, bias]), before):
            np.testing.assert_array_equal(one, other)
        session.run(updates)
        np.testing.assert_allclose(session.run(kernel), 2 * before[0], rtol=1e-6)
        assert {v.op.name for v in tfv1.global_variables()} == {f"layer/{name}" for name in values}  # for checkpoints


def test_what_needs_no_preparation_is_not_stored():
    _, prepare = create(np.random.default_rng(2), "layer", has_norm=False)
    with tf.Graph().as_default(), parameters.stored() as updates:
        prepare(dtype=tf.float32)
        assert not updates and not tfv1.get_collection(parameters.STORED)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_computes_nothing_of_weights(precision):
    """No op of an inference depends on variables alone."""
    graph = small_inference_graph(f"TEST.PRECISION={precision}", gpu=True)
    batch = dict(zip(("image", "image_shape"), (synthetic_image(64, 64, 2, 0)[0][None], [[64, 64]])))
    fetches = [x for x in graph.inference.detections if x is not None]
    nodes, _ = run_traced(graph.session, fetches, graph.feed(batch))
    known = {name for name, node in nodes.items() if node.op in ("VarHandleOp", "ReadVariableOp", "Const")}
    computed = set()
    for name, node in nodes.items():
        inputs = {x.partition(":")[0] for x in node.input if not x.startswith("^")}
        reads = any(nodes[x].op == "ReadVariableOp" for x in inputs & nodes.keys())
        if reads and inputs <= known and node.op not in ("Identity", "Reshape"):
            computed.add(name)
    assert not computed


def test_packing_leaves_the_graph_s_collections_as_they_would_be():
    """Variables by their names, in the collections of their blocks; the updates of SyncBN's statistics once."""
    overrides = "BACKBONE.NORM=SyncBN", "BACKBONE.FREEZE_AT=0"
    collections = []
    for gpu in (False, True):
        graph = small_training_graph(*overrides, gpu=gpu).graph
        names = {}
        for key in graph.get_all_collection_keys():
            items = [x for x in graph.get_collection(key) if hasattr(x, "name")]
            is_variable = [x.name.endswith(":0") and isinstance(x, tf.Variable) for x in items]
            names[str(key)] = sorted(x.name for x in items) if all(is_variable) else len(items)
        collections.append(names)
    of_cpu, of_gpu = collections
    assert of_cpu["backbone_variables"] and of_cpu["update_ops"]
    assert of_gpu == of_cpu


@pytest.mark.parametrize("gpu", [False, True])
def test_what_is_packed_is_mapped_tensor_by_tensor(gpu):
    one, two = [np.float32([[1, 2], [3, 4]]), np.float32([5])], [np.float32([[1, 0], [0, 1]]), np.float32([2])]
    with tf.Graph().as_default(), tfv1.Session() as session, device.building_for(gpu=gpu):
        lists = ([tf.constant(x) for x in of] for of in (one, two))
        mapped = session.run(parameters.map_packed(lambda a, b: a - 3 * b, *lists))
    assert [x.tolist() for x in mapped] == [[[-2, 2], [3, 1]], [-1]]


@pytest.mark.parametrize("gpu", [False, True])
def test_packed_layers_have_the_gradients_of_single_ones(gpu):
    """Of two layers with a norm and one without, against central differences of the NumPy form."""
    rng = np.random.default_rng(3)
    x, noise = rng.normal(size=(2, 3, 3, 2)).astype(np.float32), rng.normal(size=(2, 2)).astype(np.float32)

    def build():
        with tfv1.variable_scope("net", reuse=tfv1.AUTO_REUSE):
            y = conv2d_norm("conv0", tf.constant(x), 2, 1, norm="FreezeBN", activation=None)
            y = conv2d_norm("conv1", y, 2, 1, norm="FreezeBN", activation=None)
            return fully_connected("fc", tf.reduce_mean(y, axis=[1, 2]), 2)

    with tf.Graph().as_default(), tfv1.Session() as session, device.building_for(gpu=gpu):
        with collect_variables("made"):
            loss = tf.reduce_sum(parameters.packed(build) * noise)
        variables = {v.op.name: v for v in tfv1.get_collection("made")}
        gradients = dict(zip(variables, tf.gradients(loss, list(variables.values()))))
        session.run(tfv1.global_variables_initializer())
        values = {name: rng.uniform(0.5, 1.5, v.shape).astype(np.float32) for name, v in variables.items()}
        for name, v in variables.items():
            v.load(values[name], session)
        found = session.run({name: tf.convert_to_tensor(g) for name, g in gradients.items() if g is not None})
        found_loss = session.run(loss)

    def of(values):
        y = x.astype(np.float64)
        for layer in ("net/conv0", "net/conv1"):
            norm = [values[f"{layer}/bn/{name}"] for name in ("gamma", "beta", "mean/EMA", "variance/EMA")]
            y = (y @ values[f"{layer}/W"][0, 0] - norm[2]) / np.sqrt(norm[3] + 1e-5) * norm[0] + norm[1]
        return np.sum((y.mean(axis=(1, 2)) @ values["net/fc/W"] + values["net/fc/b"]) * noise)

    values = {name: value.astype(np.float64) for name, value in values.items()}
    assert found_loss == pytest.approx(of(values), rel=1e-4)
    trained = {f"net/{layer}/{name}" for layer in ("conv0", "conv1") for name in ("W", "bn/gamma", "bn/beta")}
    assert trained | {"net/fc/W", "net/fc/b"} <= found.keys()
    for name in trained | {"net/fc/W", "net/fc/b"}:
        for place in np.ndindex(values[name].shape):
            step = np.zeros(values[name].shape)
            step[place] = 1e-4
            slope = (of(values | {name: values[name] + step}) - of(values | {name: values[name] - step})) / 2e-4
            assert found[name][place] == pytest.approx(slope, rel=1e-3, abs=1e-4), (name, place)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_frozen_layer_has_no_gradient(gpu):
    """Its kernel and norm are packed with those of others: a step must not compute a gradient to throw it away."""

    def build():
        with tfv1.variable_scope("net", reuse=tfv1.AUTO_REUSE):
            y = conv2d_norm("conv0", tf.ones([1, 4, 4, 2]), 2, 3, norm="FreezeBN", freeze={"W", "affine"})
            y = conv2d_norm("conv1", y, 2, 3, norm="FreezeBN", freeze={"affine"})
            return conv2d_norm("conv2", y, 2, 3, norm="FreezeBN")

    with tf.Graph().as_default() as graph, device.building_for(gpu=gpu):
        loss = tf.reduce_sum(parameters.packed(build))
        gradients = tf.gradients(loss, tfv1.trainable_variables())
        names = [tf.convert_to_tensor(x).op.name for x in gradients]
        run = tfv1.graph_util.extract_sub_graph(graph.as_graph_def(), names)
    assert len(names) == 2 + 2
    types = [node.op for node in run.node]
    assert types.count("Conv2DBackpropFilter") == 2 and types.count("Conv2DBackpropInput") == 1
