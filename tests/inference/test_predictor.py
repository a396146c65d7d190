"""Trained models applied to images: hand-worked boxes and masks; several models, many threads, mistakes."""

import ctypes
import functools
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from helpers import found
from rectangles import make_settings
from tensorpack.compat import tfv1
from tiny_models import make_model

from common import checkpoint, weights
from config import Config, ConfigError, UserError, config
from data import inference_geometry
from dataset import shapes
from evaluation.metrics import NonFiniteError
from inference import Predictor
from inference.graph import Inference, session_config
from inference.predictor import predict_images, with_augmentation

# ---------------------------------------------------------------- images


@pytest.fixture
def geometry():
    return inference_geometry(make_settings())


def test_boxes_come_back_by_a_factor_for_x_and_one_for_y(geometry):
    # 67 x 100 becomes 50 x 75: short edge 50, long edge 100 * 50 / 67 = 74.6. Factors 75 / 100 and 50 / 67.
    def predict(image, image_shape):
        assert image.shape == (1, 64, 96, 3) and image.dtype == np.uint8
        assert image_shape.tolist() == [[50, 75]]
        assert (image[0, :50, :75] == 7).all() and (image[0, 50:] == 0).all() and (image[0, :, 75:] == 0).all()
        return found(([15, 10, 75, 50], 0.9, 3, 0), ([-4, -4, 80, 60], 0.8, 1, 0))

    (one,) = predict_images(predict, [np.full((67, 100, 3), 7, np.uint8)], geometry=geometry)
    np.testing.assert_allclose(one.boxes_xyxy, [[20, 13.4, 100, 67], [0, 0, 100, 67]], rtol=1e-5)
    assert one.boxes_xyxy.dtype == np.float32
    assert one.scores.tolist() == pytest.approx([0.9, 0.8])
    assert one.labels.tolist() == [3, 1]
    assert one.masks is None


def test_images_of_a_batch_are_told_apart_and_sorted(geometry):
    def predict(image, image_shape):
        assert image.shape == (3, 128, 128, 3)  # the largest of each: 100 x 50, 50 x 100 and 50 x 50
        assert image_shape.tolist() == [[100, 50], [50, 100], [50, 50]]
        return found(([0, 0, 9, 9], 0.2, 1, 2), ([0, 0, 8, 8], 0.5, 2, 0), ([0, 0, 10, 10], 0.7, 3, 2))

    images = [np.zeros(shape, np.uint8) for shape in ((200, 100, 3), (50, 100, 3), (25, 25, 3))]
    first, second, third = predict_images(predict, images, geometry=geometry)
    assert first.boxes_xyxy.tolist() == [[0, 0, 16, 16]] and first.labels.tolist() == [2]
    assert second.boxes_xyxy.shape == (0, 4)
    assert third.boxes_xyxy.tolist() == [[0, 0, 5, 5], [0, 0, 4.5, 4.5]] and third.labels.tolist() == [3, 1]


def test_masks_are_pasted_at_the_original_size(geometry):
    # A mask cell is a pixel of the original image, which is enlarged twice: pixel centres meet cell centres.
    mask = np.array([[[0.9, 0.2], [0.49, 0.6]]], np.float32)

    def predict(image, image_shape):
        assert image_shape.tolist() == [[50, 80]]
        return found(([6, 4, 10, 8], 0.9, 1, 0), masks=mask)

    (one,) = predict_images(predict, [np.zeros((25, 40, 3), np.uint8)], geometry=geometry)
    assert one.masks.shape == (1, 25, 40) and one.masks.dtype == bool
    assert np.argwhere(one.masks[0]).tolist() == [[2, 3], [3, 4]]


def test_no_images_and_no_detections(geometry):
    assert predict_images(lambda *_: pytest.fail("called"), [], geometry=geometry) == []
    empty = found(masks=np.zeros((0, 28, 28), np.float32))
    (one,) = predict_images(lambda *_: empty, [np.zeros((25, 40, 3), np.uint8)], geometry=geometry)
    assert one.boxes_xyxy.shape == (0, 4) and one.masks.shape == (0, 25, 40)


@pytest.mark.parametrize("row", [([0, 0, np.nan, 5], 0.5, 1, 1), ([0, 0, 5, 5], np.inf, 1, 1)])
def test_diverged_network_is_refused(geometry, row):
    images = [np.zeros((25, 40, 3), np.uint8)] * 2
    with pytest.raises(NonFiniteError, match="image 2 of 2.*not finite") as error:
        predict_images(lambda *_: found(row), images, geometry=geometry)
    assert error.value.exit_code == 3


# ---------------------------------------------------------------- the class


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Makes models of random weights by name, each once."""
    return functools.cache(lambda name: make_model(tmp_path_factory.mktemp(name), name))


@pytest.fixture(scope="module")
def run(models):
    return models("fpn")


def same(one, other):
    """Whether two ImageDetections are equal."""
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
    config.MODE_MASK = config.MODE_MASK  # still not frozen
    image = shapes.draw_image(np.random.default_rng(5), 200)[0]
    assert [len(each([image])[0].labels) for each in (one, few, boxes_only)] == [12, 3, 12]
    assert (one.geometry.short_edge, few.geometry.short_edge) == (90, 64)
    assert one([image])[0].masks.shape == (12, 200, 200) and boxes_only([image])[0].masks is None
    assert one.class_names == ("disc", "box", "häuschen")
    assert one([]) == []


OTHER_SETTINGS = [
    "TEST.RESULTS_PER_IM=5",
    "PREPROC.TEST_SHORT_EDGE_SIZE=64",
    "TEST.PRECISION=bfloat16",
    "MODE_MASK=True",
]


@pytest.mark.slow
def test_models_of_different_settings_at_the_same_time(run, tmp_path):
    """Made by threads at the same time and called in turn by threads, each finds what it finds alone."""
    (tmp_path / "c4").mkdir()
    kinds = [(run, ()), (run, OTHER_SETTINGS), (run, ["TEST.TTA_FLIP=True"]), (make_model(tmp_path / "c4", "c4"), ())]
    images = [shapes.draw_image(np.random.default_rng(seed), 150 + 10 * seed)[0] for seed in range(3)]
    alone = []
    for path, settings in kinds:
        predictor = Predictor(path, settings=settings)
        alone.append([predictor([image])[0] for image in images])
    assert not any(same(alone[0][0], other[0]) for other in alone[1:])
    with ThreadPoolExecutor(8) as pool:
        predictors = list(pool.map(lambda kind: Predictor(kind[0], settings=kind[1]), kinds))
        calls = [(kind, number) for _ in range(4) for number in range(3) for kind in range(4)]
        together = list(pool.map(lambda call: predictors[call[0]]([images[call[1]]])[0], calls))
    for detections, (kind, number) in zip(together, calls):
        assert same(detections, alone[kind][number]), (kind, number)


def test_settings_as_a_value(run):
    settings = Config()
    settings.load(run / "config.json")
    settings.update(["TEST.RESULTS_PER_IM=3"])
    image = shapes.draw_image(np.random.default_rng(5), 200)[0]
    by_value, by_text = Predictor(run, settings=settings), Predictor(run, settings=["TEST.RESULTS_PER_IM=3"])
    assert same(by_value([image])[0], by_text([image])[0])
    assert by_text.settings.to_dict() == settings.to_dict()
    with pytest.raises(ConfigError, match="frozen"):
        by_text.settings.MODE_MASK = False


def test_ids_of_the_classes_are_those_of_the_data_where_known(run):
    assert Predictor(run, settings=["DATA.CATEGORY_IDS=[7,3,40]"]).category_ids == (7, 3, 40)
    assert Predictor(run, settings=["DATA.CATEGORY_IDS=[]"]).category_ids == (1, 2, 3)


def test_mistakes(run, tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        Predictor(tmp_path / "none")
    with pytest.raises(UserError, match="unknown key TEST.RESULT_PER_IM"):
        Predictor(run, settings=["TEST.RESULT_PER_IM=3"])
    with pytest.raises(UserError, match="CLASS_NAMES is not set"):
        Predictor(run, settings=["DATA.CLASS_NAMES=[]"])
    values = weights.read(checkpoint.resolve(run))
    del values["rpn/class/b"]
    with open(tmp_path / "partial.npz", "wb") as file:
        np.savez(file, **values)
    shutil.copy(run / "config.json", tmp_path)
    with pytest.raises(UserError, match="0 other shapes, 1 absent, first rpn/class/b"):
        Predictor(tmp_path / "partial.npz")
    predictor = Predictor(run)
    for image in (np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3), np.float32), np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(ValueError, match="images must be uint8"):
            predictor([image])


@pytest.mark.parametrize(
    ("model", "variable", "fed_by", "settings"),
    [
        ("fpn", "fpn/posthoc_3x3_p2/W", "fpn/lateral_1x1_c2/b", ["TEST.PRECISION=float16"]),
        ("fpn", "rpn/box/W", "rpn/conv0/b", ["TEST.TTA_FLIP=True"]),
        ("fpn", "fastrcnn/outputs/box/W", "fastrcnn/fc7/b", []),
        ("fpn", "fastrcnn/outputs/class/W", "fastrcnn/fc7/b", []),
        ("fpn", "maskrcnn/conv/W", "maskrcnn/deconv/b", []),
        ("boxes", "rpn/class/W", "rpn/conv0/b", ["TEST.PRECISION=bfloat16"]),
        ("cascade", "cascade_rcnn_stage1/outputs/box/W", "cascade_rcnn_stage1/head/fc7/b", []),
        ("cascade", "cascade_rcnn_stage3/outputs/class/W", "cascade_rcnn_stage3/head/fc7/b", []),
        ("c4", "rpn/box/W", "rpn/conv0/b", ["TEST.PRECISION=float16"]),
        ("c4", "maskrcnn/conv/W", "maskrcnn/deconv/b", []),
    ],
)
def test_overflow_is_told(models, model, variable, fed_by, settings):
    """Not taken for an image without objects, or objects without masks."""
    path = checkpoint.resolve(models(model))
    settings = checkpoint.settings_of(path, overrides=settings)
    image = shapes.draw_image(np.random.default_rng(5), 96)[0]
    with tf.Graph().as_default(), tfv1.Session(config=session_config()) as session:
        inference = Inference(settings)
        weights.load(path, session, check=weights.check_complete)
        by_name = weights.model_variables()
        value = session.run(by_name[fed_by]) + 100  # what the large weights are multiplied by
        weights.assign(session, {by_name[fed_by]: value})
        network = with_augmentation(settings, inference.bind(session))
        predict_images(network, [image], geometry=inference_geometry(settings))
        largest = 6e4 if settings.TEST.PRECISION == "float16" else 3e38
        large = np.random.default_rng(0).choice(np.float32([-largest, largest]), by_name[variable].shape)
        weights.assign(session, {by_name[variable]: large})
        inference.update(session)
        with pytest.raises(NonFiniteError, match="image 1 of 1: .* not finite: .*diverged"):
            predict_images(network, [image], geometry=inference_geometry(settings))


IS_MAPPED = 2  # glibc's flag, in the size before a block: mapped singly, and returned to the system when it is freed


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="of glibc")
def test_freed_memory_is_kept(run):
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    Predictor(run)
    block = libc.malloc(2**28)
    size = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value
    libc.free(block)
    assert size & ~7 >= 2**28
    assert not size & IS_MAPPED
