"""Inference on images, data sets and results files: hand-worked boxes and masks."""

import json
import math
import re
import threading
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import tensorflow.compat.v1 as tf
from helpers import found
from tensorpack import ModelDesc, SimpleTrainer, TrainConfig, launch_train_with_config
from tensorpack.callbacks import MonitorBase
from tensorpack.dataflow import DataFromList
from tensorpack.utils import logger

import data
import eval as evaluation
from config import Config
from dataset import CocoDataset
from eval import EvaluationError, ImageDetections, NonFiniteError, ResultsFile
from ranks import Ranks


@pytest.fixture
def config(monkeypatch):
    """Defaults with FPN's padding, that eval and data read in place of the global configuration."""
    config = Config()
    config.update(["MODE_FPN=True", "PREPROC.TEST_SHORT_EDGE_SIZE=50", "PREPROC.MAX_SIZE=200", "DATA.NUM_WORKERS=0"])
    monkeypatch.setattr(evaluation, "config", config)
    monkeypatch.setattr(data, "config", config)
    return config


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(logger, "warning", lines.append)
    return lines


# ---------------------------------------------------------------- images


def test_boxes_come_back_by_a_factor_for_x_and_one_for_y(config):
    # 67 x 100 becomes 50 x 75: short edge 50, long edge 100 * 50 / 67 = 74.6. Factors 75 / 100 and 50 / 67.
    def predict(image, image_shape):
        assert image.shape == (1, 64, 96, 3) and image.dtype == np.uint8
        assert image_shape.tolist() == [[50, 75]]
        assert (image[0, :50, :75] == 7).all() and (image[0, 50:] == 0).all() and (image[0, :, 75:] == 0).all()
        return found(([15, 10, 75, 50], 0.9, 3, 0), ([-4, -4, 80, 60], 0.8, 1, 0))

    (one,) = evaluation.predict_images(predict, [np.full((67, 100, 3), 7, np.uint8)])
    np.testing.assert_allclose(one.boxes_xyxy, [[20, 13.4, 100, 67], [0, 0, 100, 67]], rtol=1e-5)
    assert one.boxes_xyxy.dtype == np.float32
    assert one.scores.tolist() == pytest.approx([0.9, 0.8])
    assert one.labels.tolist() == [3, 1]
    assert one.masks is None


def test_images_of_a_batch_are_told_apart_and_sorted(config):
    def predict(image, image_shape):
        assert image.shape == (3, 128, 128, 3)  # the largest of each: 100 x 50, 50 x 100 and 50 x 50
        assert image_shape.tolist() == [[100, 50], [50, 100], [50, 50]]
        return found(([0, 0, 9, 9], 0.2, 1, 2), ([0, 0, 8, 8], 0.5, 2, 0), ([0, 0, 10, 10], 0.7, 3, 2))

    images = [np.zeros(shape, np.uint8) for shape in ((200, 100, 3), (50, 100, 3), (25, 25, 3))]
    first, second, third = evaluation.predict_images(predict, images)
    assert first.boxes_xyxy.tolist() == [[0, 0, 16, 16]] and first.labels.tolist() == [2]
    assert second.boxes_xyxy.shape == (0, 4)
    assert third.boxes_xyxy.tolist() == [[0, 0, 5, 5], [0, 0, 4.5, 4.5]] and third.labels.tolist() == [3, 1]


def test_masks_are_pasted_at_the_original_size(config):
    # A mask cell is a pixel of the original image, which is enlarged twice: pixel centres meet cell centres.
    mask = np.array([[[0.9, 0.2], [0.49, 0.6]]], np.float32)

    def predict(image, image_shape):
        assert image_shape.tolist() == [[50, 80]]
        return found(([6, 4, 10, 8], 0.9, 1, 0), masks=mask)

    (one,) = evaluation.predict_images(predict, [np.zeros((25, 40, 3), np.uint8)])
    assert one.masks.shape == (1, 25, 40) and one.masks.dtype == bool
    assert np.argwhere(one.masks[0]).tolist() == [[2, 3], [3, 4]]


def test_no_images_and_no_detections(config):
    assert evaluation.predict_images(lambda *_: pytest.fail("called"), []) == []
    empty = found(masks=np.zeros((0, 28, 28), np.float32))
    (one,) = evaluation.predict_images(lambda *_: empty, [np.zeros((25, 40, 3), np.uint8)])
    assert one.boxes_xyxy.shape == (0, 4) and one.masks.shape == (0, 25, 40)


@pytest.mark.parametrize("row", [([0, 0, np.nan, 5], 0.5, 1, 1), ([0, 0, 5, 5], np.inf, 1, 1)])
def test_diverged_network_is_refused(config, row):
    images = [np.zeros((25, 40, 3), np.uint8)] * 2
    with pytest.raises(NonFiniteError, match="image 2 of 2.*not finite") as error:
        evaluation.predict_images(lambda *_: found(row), images)
    assert error.value.exit_code == 3


# ---------------------------------------------------------------- results


def image_detections(box=(1, 2, 4, 6), label=2, masks=None):
    return ImageDetections(np.float32([box]), np.float32([0.75]), np.array([label]), masks)


def test_coco_results():
    mask = np.zeros((1, 8, 9), bool)
    mask[0, 2:6, 1:4] = True
    (result,) = evaluation.coco_results(77, image_detections(masks=mask), (10, 20, 30))
    rle = result.pop("segmentation")
    assert result == {"image_id": 77, "category_id": 20, "bbox": [1, 2, 3, 4], "score": 0.75}
    assert (mask_util.decode(rle) == mask[0]).all()
    (result,) = evaluation.coco_results(77, image_detections(), (10, 20, 30))
    assert "segmentation" not in result
    json.dumps(result)  # plain numbers, no NumPy
    box = (0.1234567, 0, 1.1234567, 1)
    assert evaluation.coco_results(77, image_detections(box), (10, 20))[0]["bbox"] == [0.123, 0, 1, 1]


@pytest.mark.parametrize("label", [0, 4])
def test_classes_that_the_data_set_does_not_have_are_refused(label):
    with pytest.raises(EvaluationError, match=f"image 77: .*class {label}.*3 classes"):
        evaluation.coco_results(77, image_detections(label=label), (10, 20, 30))


RESULT = {"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}


def test_results_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "out.json"
    with ResultsFile(path) as file:
        file.write([RESULT, RESULT])
        file.write([])
        file.write([RESULT])
        assert not path.exists()
    assert json.loads(path.read_text()) == [RESULT] * 3
    assert list(path.parent.iterdir()) == [path]


def test_results_file_without_results_is_json(tmp_path):
    with ResultsFile(tmp_path / "out.json"):
        pass
    assert json.loads((tmp_path / "out.json").read_text()) == []


def test_failed_evaluation_leaves_no_results_file(tmp_path):
    with pytest.raises(ZeroDivisionError), ResultsFile(tmp_path / "out.json") as file:
        file.write([RESULT])
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_results_file_is_not_overwritten_unasked(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("mine")
    with pytest.raises(EvaluationError, match="out.json exists already"), ResultsFile(path):
        pass
    assert path.read_text() == "mine"
    with ResultsFile(path, overwrite=True) as file:
        file.write([RESULT])
    assert json.loads(path.read_text()) == [RESULT]


def test_results_file_of_another_evaluation_meanwhile_stays(tmp_path):
    path = tmp_path / "out.json"
    with ResultsFile(path) as file:
        file.write([RESULT])
        path.write_text("theirs")
    assert path.read_text() == "theirs"
    assert json.loads((tmp_path / "out-1.json").read_text()) == [RESULT]


def test_results_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="cannot write .*out.json"), ResultsFile(tmp_path / "file" / "out.json"):
        pass


# ---------------------------------------------------------------- data sets


SIZES = ((67, 100), (100, 67), (45, 45), (120, 90), (67, 100))


@pytest.fixture
def dataset(tmp_path):
    """Five images with two rectangles each, of whole pixels."""
    annotations = []
    for image_id, (height, width) in enumerate(SIZES, start=1):
        cv2.imwrite(str(tmp_path / f"{image_id}.png"), np.full((height, width, 3), image_id, np.uint8))
        for x, y, side in ((2, 3, 24), (20, 22, 21)):
            polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
            one = {"image_id": image_id, "category_id": 30 if side == 24 else 40, "bbox": [x, y, side, side]}
            one |= {"segmentation": [polygon], "area": side * side, "iscrowd": 0}
            annotations.append({**one, "id": len(annotations) + 1})
    images = [
        {"id": number, "height": height, "width": width, "file_name": f"{number}.png"}
        for number, (height, width) in enumerate(SIZES, start=1)
    ]
    categories = [{"id": 30, "name": "big"}, {"id": 40, "name": "small"}]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return CocoDataset("rectangles", tmp_path / "truth.json", tmp_path)


def perfect(dataset):
    """A network that knows the data set: the image's number is the value of its pixels."""
    records = {record.image_id: record for record in dataset.records(training=False)}

    def predict(image, image_shape):
        rows = []
        for index, (height, width) in enumerate(image_shape.tolist()):
            record = records[int(image[index, 0, 0, 0])]
            factors = np.array([width / record.width, height / record.height] * 2)
            for label, box in zip(record.labels, record.boxes_xyxy):
                rows.insert(0, (box * factors, 0.5 + label / 10, label, index))
        return found(*rows, masks=np.ones((len(rows), 28, 28), np.float32))

    return predict


@pytest.mark.parametrize("batch_size", [1, 2])
def test_perfect_network_scores_1(config, dataset, tmp_path, batch_size):
    config.TEST.BATCH_SIZE_PER_GPU = batch_size
    metrics = evaluation.evaluate_dataset(perfect(dataset), dataset, output=tmp_path / "out.json")
    assert metrics["mAP(bbox)/IoU=0.5:0.95"] == pytest.approx(1)
    assert metrics["mAP(segm)/IoU=0.5:0.95"] == pytest.approx(1)
    results = json.loads((tmp_path / "out.json").read_text())
    assert len(results) == 10
    by_image = {(result["image_id"], result["category_id"]): result["bbox"] for result in results}
    for image_id in range(1, 6):
        np.testing.assert_allclose(by_image[image_id, 30], [2, 3, 24, 24], atol=2e-3)
        np.testing.assert_allclose(by_image[image_id, 40], [20, 22, 21, 21], atol=2e-3)


class OneOfTwo(Ranks):
    """A rank of two that are run one after the other, rank 1 first: what it tells waits in `told`."""

    size = 2

    def __init__(self, rank, told):
        self.rank, self._told = rank, told

    def gather(self, value, *, chief_only=False):
        assert chief_only
        self._told.append(value)
        return None if self.rank > 0 else self._told[::-1]


def test_ranks_share_the_work_and_find_the_same(config, dataset, tmp_path):
    alone = evaluation.evaluate_dataset(perfect(dataset), dataset, output=tmp_path / "alone.json")
    told, images, calls = [], [], []

    def predict(image, image_shape):
        images.extend(image[:, 0, 0, 0].tolist())
        return perfect(dataset)(image, image_shape)

    for rank in (1, 0):
        metrics = evaluation.evaluate_dataset(
            predict,
            dataset,
            output=tmp_path / "shared.json",
            ranks=OneOfTwo(rank, told),
            num_parallel=3,
            before_batch=lambda: calls.append(rank),  # noqa: B023 (called at once)
        )
        assert metrics == (alone if rank == 0 else None)
    assert (tmp_path / "shared.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert sorted(images) == [record.image_id for record in dataset.records(training=False)]
    assert calls.count(0) == calls.count(1) > 0


def test_a_rank_that_cannot_write_leaves_no_other_waiting(config, dataset, tmp_path):
    (tmp_path / "file").touch()
    told = [[]]  # of rank 1
    with pytest.raises(EvaluationError, match="cannot write"):
        evaluation.evaluate_dataset(
            perfect(dataset), dataset, output=tmp_path / "file" / "out.json", ranks=OneOfTwo(0, told)
        )
    assert len(told) == 2


def test_loading_network_and_results_go_on_at_the_same_time(config, dataset, monkeypatch):
    """Each waits for what the others do ahead of it or behind it: one after the other, they would wait for ever."""
    config.update(["DATA.NUM_WORKERS=1"])
    loaded, seen = [threading.Event() for _ in range(6)], [threading.Event() for _ in range(6)]
    order, load_image, encode = [], data.load_image, evaluation.coco_results

    def load(path):
        order.append(int(Path(path).stem))
        loaded[len(order)].set()
        return load_image(path)

    def predict(image, image_shape):
        number = order.index(int(image[0, 0, 0, 0])) + 1
        seen[number].set()
        assert loaded[min(number + 1, 5)].wait(20), "the next image is not loaded beside the network"
        return perfect(dataset)(image, image_shape)

    def slow_results(image_id, *arguments, **options):
        assert seen[min(order.index(image_id) + 2, 5)].wait(20), "the next image is not seen beside the results"
        return encode(image_id, *arguments, **options)

    monkeypatch.setattr(data, "load_image", load)
    monkeypatch.setattr(evaluation, "coco_results", slow_results)
    assert evaluation.evaluate_dataset(predict, dataset)["mAP(segm)/IoU=0.5:0.95"] == pytest.approx(1)


def test_evaluation_does_not_run_far_ahead(config, dataset):
    """Who takes the first image's results only has made the network see three: results are not piled up in memory."""
    seen, third = [], threading.Event()

    def predict(image, image_shape):
        seen.append(int(image[0, 0, 0, 0]))
        if len(seen) == 3:
            third.set()
        return perfect(dataset)(image, image_shape)

    batches = data.evaluation_data(dataset.records(training=False))
    results = evaluation.results_of(predict, batches, dataset.category_ids)
    next(results)
    assert third.wait(20)
    results.close()  # waits for what runs; what waits is not started
    assert len(seen) == 3


def test_shares_of_the_time(config, dataset, monkeypatch):
    lines = []
    monkeypatch.setattr(logger, "info", lines.append)
    evaluation.evaluate_dataset(perfect(dataset), dataset)
    number = r"(\d+\.\d)"
    pattern = f"network {number}%, waiting for images and results {number}%, metrics {number}%; {number} s of masks"
    assert "rectangles: 5 images in " in lines[-1]
    assert sum(map(float, re.search(pattern, lines[-1]).groups()[:3])) == pytest.approx(100, abs=0.2)


def test_evaluation_without_masks_or_file(config, dataset, tmp_path):
    config.MODE_MASK = False
    before = set(tmp_path.iterdir())
    without_masks = perfect(dataset)
    metrics = evaluation.evaluate_dataset(lambda *batch: without_masks(*batch)._replace(masks=None), dataset)
    assert len(metrics) == 6 and metrics["mAP(bbox)/IoU=0.5"] == pytest.approx(1)
    assert set(tmp_path.iterdir()) == before


def test_existing_results_are_refused_before_the_network_runs(config, dataset, tmp_path):
    (tmp_path / "out.json").write_text("mine")
    with pytest.raises(EvaluationError, match="exists already"):
        evaluation.evaluate_dataset(lambda *_: pytest.fail("ran"), dataset, output=tmp_path / "out.json")


def test_failing_network_ends_the_evaluation_without_a_file(config, dataset, tmp_path):
    calls = []

    def predict(image, image_shape):
        calls.append(1)
        return found(([0, 0, math.nan, 5], 0.5, 1, 0)) if len(calls) > 1 else perfect(dataset)(image, image_shape)

    with pytest.raises(NonFiniteError, match=r"image \d: .*diverged"):
        evaluation.evaluate_dataset(predict, dataset, output=tmp_path / "out.json")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


# ---------------------------------------------------------------- during training


class OneVariable(ModelDesc):
    """The least that a trainer takes."""

    def inputs(self):
        return [tf.TensorSpec([1], tf.float32, "x")]

    def build_graph(self, x):
        return tf.reduce_sum(tf.get_variable("w/W", [1]) * x)

    def optimizer(self):
        return tf.train.GradientDescentOptimizer(0.1)


class Inference:
    """Stands in for the graph of the model: `bind` gives a perfect network."""

    def __init__(self, dataset):
        assert tf.get_default_graph().get_collection(tf.GraphKeys.GLOBAL_VARIABLES)  # made beside the training's
        self._dataset = dataset

    def bind(self, session):
        (variable,) = session.graph.get_collection(tf.GraphKeys.TRAINABLE_VARIABLES)
        assert session.run(variable).shape == (1,)
        return perfect(self._dataset)


class Recorder(MonitorBase):
    """Keeps what the callback reports."""

    def __init__(self):
        self.scalars = []

    def process_scalar(self, name, value):
        self.scalars.append((self.global_step, name, value))


@pytest.mark.parametrize(("period", "steps"), [(2, [8, 16, 20]), (0, [20]), (5, [20])])
def test_callback(config, dataset, tmp_path, period, steps):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "rectangles-8.json").write_text("of the run before")
    batches, offers = [], []
    callback = evaluation.EvalCallback(
        lambda: Inference(dataset),
        [dataset],
        period_epochs=period,
        output_dir=folder,
        ranks=Ranks(),
        num_parallel=2,
        before_batch=lambda: batches.append(1),
        offer=lambda *offer: offers.append(offer),
    )
    recorder = Recorder()
    settings = TrainConfig(
        model=OneVariable(),
        dataflow=DataFromList([[np.ones(1, np.float32)]] * 100),
        callbacks=[callback],
        extra_callbacks=[],
        monitors=[recorder],
        steps_per_epoch=4,
        max_epoch=5,
    )
    with tf.Graph().as_default():
        launch_train_with_config(settings, SimpleTrainer())
    written = {"rectangles-8-1.json" if step == 8 and period == 2 else f"rectangles-{step}.json" for step in steps}
    assert {path.name for path in folder.iterdir()} == {"rectangles-8.json", *written}
    assert (folder / "rectangles-8.json").read_text() == "of the run before"
    ap = [(step, value) for step, name, value in recorder.scalars if name == "rectangles-mAP(segm)/IoU=0.5:0.95"]
    assert ap == [(step, pytest.approx(1)) for step in steps]
    assert offers == [("rectangles-mAP(segm)/IoU=0.5:0.95", pytest.approx(1))] * len(steps)
    assert len(batches) >= len(steps)
    # There are no medium or large objects: nothing is reported of them.
    assert len(recorder.scalars) == 8 * len(steps) and not any(math.isnan(value) for _, _, value in recorder.scalars)
