"""The form of the graph for GPUs: it computes what the form for CPUs does, of ops that exist on both."""

import graphs
import numpy as np
import pytest
import tensorflow as tf
from graphs import small_inference_graph, small_training_graph, training_batch

from inference import graph
from modeling import device

MODELS = {
    "FPN": (),
    "C4": ("MODE_FPN=False", "RPN.ANCHOR_SIZES=[16,32,64]"),
    "Cascade": ("FPN.CASCADE=True",),
    "GroupNorm": ("BACKBONE.NORM=GN", "FPN.NORM=GN", "FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_gn_head"),
    "torchvision": ("CONVENTIONS=torchvision",),
    "Detectron2": ("CONVENTIONS=detectron2",),
}
FOR_GPU = None if tf.config.list_physical_devices("GPU") else True  # with the ops that only GPUs have, if there is one
OBJECTS = [(128, 160, 3, 5), (96, 120, 1, 6)]  # height, width, number of objects, seed


@pytest.fixture(scope="module", autouse=True)
def free():
    yield
    graphs.free_graphs()


def test_a_graph_is_for_the_device_of_the_machine_unless_a_block_says_otherwise():
    has_gpu = bool(tf.config.list_physical_devices("GPU"))
    assert device.is_gpu() == device.runs_on_gpu() == has_gpu
    with device.building_for(gpu=True):
        assert device.is_gpu() and not device.runs_on_gpu()
        with device.building_for(gpu=False):
            assert not device.is_gpu() and not device.runs_on_gpu()
        assert device.is_gpu()
    assert device.is_gpu() == has_gpu


@pytest.mark.parametrize("model", MODELS)
def test_training_computes_the_same_losses_and_gradients(model):
    batch = training_batch(OBJECTS, multiple=1 if model == "C4" else 32)
    of_cpu, of_gpu = (small_training_graph(*MODELS[model], gpu=gpu) for gpu in (False, FOR_GPU))
    expected, found = (graph.run((graph.losses, graph.gradients), batch) for graph in (of_cpu, of_gpu))
    assert found[0].keys() == expected[0].keys() and found[1].keys() == expected[1].keys()
    for name, value in expected[0].items():
        np.testing.assert_allclose(found[0][name], value, rtol=2e-4, atol=1e-5, err_msg=name)
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=0.01, atol=2e-3 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("model", [*MODELS, "Soft-NMS"])
def test_inference_finds_the_same(model):
    overrides = MODELS.get(model, ("TEST.SOFT_NMS=linear",))
    batch = training_batch(OBJECTS, multiple=1 if model == "C4" else 32)
    of_cpu, of_gpu = (small_inference_graph(*overrides, gpu=gpu) for gpu in (False, FOR_GPU))
    expected, found = (graph.predict(batch["image"], batch["image_shape"]) for graph in (of_cpu, of_gpu))
    assert len(expected.scores) > 20
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.image_index, expected.image_index)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.01)
    np.testing.assert_allclose(found.masks, expected.masks, atol=1e-3)


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="a GPU computes in bfloat16")
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu avx2 avx512f avx512_vnni", True),
        ("flags : fpu avx512f avx512_bf16 avx512_vnni", False),
        ("flags : fpu amx_bf16 amx_tile", False),
        ("Features : fp asimd bf16 i8mm", False),
        ("Features : fp asimd svebf16x", True),
    ],
)
def test_processors_without_bfloat16_are_told(flags, expected, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    assert device.emulates_bfloat16(tmp_path / "cpuinfo") is expected
    assert device.emulates_bfloat16(tmp_path / "none") is False


@pytest.mark.parametrize(
    ("precision", "is_slow", "count"), [("bfloat16", True, 1), ("bfloat16", False, 0), ("float32", True, 0)]
)
def test_a_slow_precision_is_warned_of(precision, is_slow, count, monkeypatch):
    warnings = []
    monkeypatch.setattr(device, "emulates_bfloat16", lambda: is_slow)
    monkeypatch.setattr(graph.logger, "warning", warnings.append)
    graph.warn_of_precision(precision)
    assert len(warnings) == count
