"""eval.Predictor as other programs use it: several models, many threads, mistakes."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny_models import make_model

import checkpoint
from config import UserError, config
from dataset import shapes
from eval import NonFiniteError, Predictor


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("run"), "fpn")


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other))


def test_threads_share_a_predictor(run):
    predictor = Predictor(run)
    images = [shapes.draw_image(np.random.default_rng(seed), 150 + 10 * seed)[0] for seed in range(4)]
    alone = [predictor([image])[0] for image in images]
    assert not same(alone[0], alone[1])
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda number: predictor([images[number % 4]])[0], range(40)))
    assert all(same(found, alone[number % 4]) for number, found in enumerate(together))


def test_models_of_different_settings_in_one_process(run, tmp_path):
    before = config.to_dict()
    one, few = Predictor(run), Predictor(run, settings=["TEST.RESULTS_PER_IM=3", "PREPROC.TEST_SHORT_EDGE_SIZE=64"])
    boxes_only = Predictor(make_model(tmp_path, "boxes"))
    assert config.to_dict() == before
    image = shapes.draw_image(np.random.default_rng(5), 200)[0]
    assert [len(each([image])[0].labels) for each in (one, few, boxes_only)] == [12, 3, 12]
    assert (one.geometry.short_edge, few.geometry.short_edge) == (90, 64)
    assert one([image])[0].masks.shape == (12, 200, 200) and boxes_only([image])[0].masks is None
    assert one.class_names == ("disc", "box", "häuschen")
    assert one([]) == []


def test_mistakes(run, tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        Predictor(tmp_path / "none")
    with pytest.raises(UserError, match="unknown key TEST.RESULT_PER_IM"):
        Predictor(run, settings=["TEST.RESULT_PER_IM=3"])
    with pytest.raises(UserError, match="CLASS_NAMES is not set"):
        Predictor(run, settings=["DATA.CLASS_NAMES=[]"])
    for image in (np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3), np.float32), np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(ValueError, match="images must be uint8"):
            Predictor(run)([image])


@pytest.mark.parametrize(
    ("model", "variable", "fed_by", "settings"),
    [
        ("fpn", "fpn/posthoc_3x3_p2/W", "fpn/lateral_1x1_c2/b", ["TEST.PRECISION=float16"]),
        ("fpn", "rpn/box/W", "rpn/conv0/b", ["TEST.TTA_FLIP=True"]),
        ("fpn", "fastrcnn/outputs/box/W", "fastrcnn/fc7/b", []),
        ("fpn", "maskrcnn/conv/W", "maskrcnn/deconv/b", []),
        ("boxes", "rpn/class/W", "rpn/conv0/b", ["TEST.PRECISION=bfloat16"]),
        ("cascade", "cascade_rcnn_stage1/outputs/box/W", "cascade_rcnn_stage1/head/fc7/b", []),
        ("cascade", "cascade_rcnn_stage3/outputs/class/W", "cascade_rcnn_stage3/head/fc7/b", []),
        ("c4", "rpn/box/W", "rpn/conv0/b", ["TEST.PRECISION=float16"]),
        ("c4", "maskrcnn/conv/W", "maskrcnn/deconv/b", []),
    ],
)
def test_overflow_is_told(model, variable, fed_by, settings, tmp_path):
    """Not taken for an image without objects, or objects without masks."""
    values = checkpoint.read(checkpoint.resolve(make_model(tmp_path, model)))
    values[fed_by] += 100  # what the large weights are multiplied by
    largest = 6e4 if "TEST.PRECISION=float16" in settings else 3e38
    large = np.random.default_rng(0).choice(np.float32([-largest, largest]), values[variable].shape)
    np.savez(tmp_path / "finite.npz", **values)
    np.savez(tmp_path / "large.npz", **values | {variable: large})
    image = shapes.draw_image(np.random.default_rng(5), 96)[0]
    Predictor(tmp_path / "finite.npz", settings=settings)([image])
    with pytest.raises(NonFiniteError, match="image 1 of 1: .* not finite: .*diverged"):
        Predictor(tmp_path / "large.npz", settings=settings)([image])


def test_settings_return_after_an_error():
    before = config.to_dict()
    with pytest.raises(RuntimeError), config.temporary():
        config.MODE_FPN = not before["MODE_FPN"]
        config.freeze()
        raise RuntimeError
    assert config.to_dict() == before


class Mallinfo2(ctypes.Structure):
    """What glibc says of its memory; `hblks` counts the pieces that it mapped singly, and will return to the system."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", *"abcdef")]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="of glibc 2.33 and later")
def test_freed_memory_is_kept(run):
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    Predictor(run)
    mapped = mallinfo2().hblks
    large = np.ones(2**25)
    assert large.nbytes == 2**28
    assert mallinfo2().hblks <= mapped
