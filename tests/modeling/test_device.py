"""The form of the graph for GPUs: it computes what the form for CPUs does, of ops that exist on both."""

import graphs
import numpy as np
import pytest
import tensorflow as tf
from graphs import small_inference_graph, small_training_graph, training_batch

from config import ConfigError
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


def test_a_rank_opens_its_own_gpu_alone(monkeypatch):
    opened, gpus = [], []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus if kind == "GPU" else ["CPU"])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *arguments: opened.append(arguments))
    device.use_gpu(1)
    assert not opened  # without GPUs, all ranks use the CPU
    gpus += ["first", "second"]
    device.use_gpu(1)
    assert opened == [("second", "GPU")]
    with pytest.raises(ConfigError, match="process 3 .* there are 2"):
        device.use_gpu(2)


@pytest.mark.parametrize("model", MODELS)
def test_training_computes_the_same_losses_and_gradients(model):
    batch = training_batch(OBJECTS, multiple=1 if model == "C4" else 32)
    of_cpu, of_gpu = (small_training_graph(*MODELS[model], gpu=gpu) for gpu in (False, FOR_GPU))
    expected, found = (graph.run((graph.losses, graph.gradients), batch) for graph in (of_cpu, of_gpu))
    assert found[0].keys() == expected[0].keys() and found[1].keys() == expected[1].keys()
    for name, value in expected[0].items():
        np.testing.assert_allclose(found[0][name], value, rtol=2e-4, atol=1e-5, err_msg=name)
    # Behind a GroupNorm some inputs of ReLUs are so close to 0 that rounding decides on their gradients.
    tolerance = 0.02 if model == "GroupNorm" else 1e-4
    for name, value in expected[1].items():
        assert np.linalg.norm(found[1][name] - value) <= tolerance * np.linalg.norm(value), name


@pytest.mark.parametrize("model", [*MODELS, "Soft-NMS"])
def test_inference_finds_the_same(model):
    overrides = MODELS.get(model, ("TEST.SOFT_NMS=linear",))
    batch = training_batch(OBJECTS, multiple=1 if model == "C4" else 32)
    of_cpu, of_gpu = (small_inference_graph(*overrides, gpu=gpu) for gpu in (False, FOR_GPU))
    expected, found = (graph.predict(batch["image"], batch["image_shape"]) for graph in (of_cpu, of_gpu))
    assert len(expected.scores) > 20
    assert len(found.scores) == len(expected.scores)
    kinds, expected_kinds = (np.stack([x.image_index, x.labels], axis=1) for x in (found, expected))
    differs = np.any(expected_kinds[:, None] != kinds, axis=2)
    distance = np.abs(expected.boxes[:, None] - found.boxes).max(axis=2) + 1e6 * differs
    match = distance.argmin(axis=1)  # scores that differ by rounding alone may have changed places
    assert sorted(match) == list(range(len(match))) and distance[range(len(match)), match].max() < 0.01
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.scores[match], expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.masks[match], expected.masks, atol=1e-3)


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
