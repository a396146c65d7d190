"""Inference on images, results files and COCO metrics: hand-worked boxes and masks, and pycocotools used directly."""

import contextlib
import copy
import io
import json
import math
from typing import NamedTuple

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import tensorflow.compat.v1 as tf
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tensorpack import ModelDesc, SimpleTrainer, TrainConfig, launch_train_with_config
from tensorpack.callbacks import MonitorBase
from tensorpack.dataflow import DataFromList
from tensorpack.utils import logger

import boxes
import data
import eval as evaluation
from config import Config
from dataset import CocoDataset, get_dataset
from eval import EvaluationError, ImageDetections, NonFiniteError, ResultsFile


class Found(NamedTuple):
    """What a network returns: see the top of eval.py."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    image_index: np.ndarray
    masks: np.ndarray | None = None


def found(*rows, masks=None):
    """From rows of (box, score, label, image)."""
    box, score, label, image = zip(*rows) if rows else ((), (), (), ())
    return Found(
        np.array(box, np.float32).reshape(-1, 4),
        np.array(score, np.float32),
        np.array(label, np.int64),
        np.array(image, np.int32),
        masks,
    )


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


# ---------------------------------------------------------------- metrics


def square(x, y, size):
    return [[x, y, x + size, y, x + size, y + size, x, y + size]]


def true_object(number, *, image_id=1, category_id=1, box=(10, 10, 20, 20), **changes):
    x, y, width, height = box
    polygon = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    default = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": list(box), "iscrowd": 0}
    return {**default, "area": width * height, "segmentation": polygon, **changes}


def write_truth(folder, annotations, *, images=(1, 2), categories=(1, 2)):
    path = folder / "truth.json"
    content = {
        "images": [{"id": number, "height": 200, "width": 200, "file_name": f"{number}.jpg"} for number in images],
        "categories": [{"id": number, "name": f"c{number}"} for number in categories],
        "annotations": annotations,
    }
    path.write_text(json.dumps(content))
    return path


def result_for(annotation, score=0.5, height=200, width=200):
    """The annotation as a detection."""
    rle = mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], height, width))
    return {
        **{key: annotation[key] for key in ("image_id", "category_id", "bbox")},
        "score": score,
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }


def random_truth(rng, *, num_images=12, num_categories=3):
    """Boxes of all sizes, some of them crowds, and images without any."""
    annotations = []
    for image_id in range(1, num_images + 1):
        for _ in range(rng.integers(0, 9) if image_id % 5 else 0):
            width, height = np.round(2 ** rng.uniform(2, 7.5, 2), 1).tolist()
            box = (round(rng.uniform(0, 200 - width), 1), round(rng.uniform(0, 200 - height), 1), width, height)
            category = int(rng.integers(1, num_categories + 1))
            one = true_object(len(annotations) + 1, image_id=image_id, category_id=category, box=box)
            if rng.random() < 0.15:
                mask = mask_util.decode(mask_util.merge(mask_util.frPyObjects(one["segmentation"], 200, 200)))
                one |= {"iscrowd": 1, "segmentation": {"size": [200, 200], "counts": runs(mask)}}
            annotations.append(one)
    return annotations


def runs(mask):
    """COCO's uncompressed run lengths of a mask: column by column, the first of zeros."""
    values = mask.ravel(order="F").astype(int)
    changes = np.flatnonzero(np.diff(values)) + 1
    lengths = np.diff([0, *changes, len(values)]).tolist()
    return [0, *lengths] if values[0] else lengths


def random_results(rng, annotations, *, num_images=12, num_categories=3):
    """Shifted ground truth, repeated and with wrong classes, and false detections; scores with ties."""
    results = []
    candidates = [each for each in annotations if not each["iscrowd"]] * 2
    candidates += random_truth(rng, num_images=num_images, num_categories=num_categories)
    for each in candidates:
        x, y, width, height = np.add(each["bbox"], rng.normal(0, 2, 4)).clip(1, 190).round(2).tolist()
        category = each["category_id"] if rng.random() < 0.9 else 1
        one = true_object(0, image_id=each["image_id"], category_id=category, box=(x, y, width, height))
        mask = np.zeros((200, 200), np.uint8)
        # The mask is smaller than the box: sizes by box and by mask differ.
        mask[int(y) : int(y + 0.8 * height) + 1, int(x) : int(x + width) + 1] = 1
        results.append({**result_for(one, score=round(rng.random(), 1)), "segmentation": boxes.encode_rle(mask)})
    return results


def plain_pycocotools(results, path, kind, image_ids=None):
    """The first six numbers of pycocotools' summary, used as its demo does; for masks without boxes in the results."""
    results = copy.deepcopy(results)
    if kind == "segm":
        for result in results:
            del result["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        truth.dataset["info"] = {}
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        if image_ids:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.where(evaluation.stats[:6] < 0, math.nan, evaluation.stats[:6])


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_pycocotools_on_random_results(tmp_path, seed):
    rng = np.random.default_rng(seed)
    annotations = random_truth(rng)
    path = write_truth(tmp_path, annotations, images=range(1, 13), categories=(1, 2, 3))
    results = random_results(rng, annotations)
    image_ids = list(range(1, 9)) if seed == 3 else None
    metrics = evaluation.coco_metrics(results, path, image_ids=image_ids)
    for kind in ("bbox", "segm"):
        expected = plain_pycocotools(results, path, kind, image_ids)
        assert 0.05 < expected[0] < 0.95
        ours = [metrics[f"mAP({kind})/{name}"] for name in evaluation.METRICS]
        np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_metric_names(tmp_path):
    truth = [true_object(1)]
    metrics = evaluation.coco_metrics([result_for(truth[0])], write_truth(tmp_path, truth))
    names = ("IoU=0.5:0.95", "IoU=0.5", "IoU=0.75", "small", "medium", "large")
    assert list(metrics) == [f"mAP({kind})/{name}" for kind in ("bbox", "segm") for name in names]
    only = evaluation.coco_metrics([result_for(truth[0])], write_truth(tmp_path, truth), kinds=("bbox",))
    assert list(only) == list(metrics)[:6]


def test_box_of_a_result_does_not_decide_the_size_of_its_mask(tmp_path):
    """A thin diagonal has a large box and a small mask: where large masks are scored, a false one is ignored."""
    truth = [true_object(1, box=(50, 50, 110, 110))]
    diagonal = {**result_for(truth[0], score=0.9), "segmentation": boxes.encode_rle(np.eye(200))}
    path = write_truth(tmp_path, truth)
    with_box = evaluation.coco_metrics([result_for(truth[0]), diagonal], path, kinds=("segm",))
    assert with_box["mAP(segm)/large"] == pytest.approx(1)
    assert with_box["mAP(segm)/IoU=0.5:0.95"] == pytest.approx(0.5)  # of all sizes, it is the first of two
    results = [result_for(truth[0]), diagonal]
    for result in results:
        del result["bbox"]
    np.testing.assert_equal(evaluation.coco_metrics(results, path, kinds=("segm",)), with_box)


@pytest.mark.parametrize("first", [0, 1, 50])
def test_annotation_ids_do_not_matter(tmp_path, first):
    truth = [true_object(first, box=(10, 10, 50, 50)), true_object(first + 1, box=(100, 100, 50, 50))]
    metrics = evaluation.coco_metrics([result_for(each) for each in truth], write_truth(tmp_path, truth))
    assert metrics["mAP(bbox)/IoU=0.5:0.95"] == metrics["mAP(segm)/IoU=0.5:0.95"] == pytest.approx(1)


@pytest.mark.parametrize("missing", ["area", "iscrowd"])
def test_ground_truth_may_lack_area_and_iscrowd(tmp_path, missing):
    truth = [true_object(1, box=(10, 10, 30, 30)), true_object(2, box=(100, 100, 80, 80))]
    expected = evaluation.coco_metrics([result_for(truth[0])], write_truth(tmp_path, truth))
    for each in truth:
        del each[missing]
    metrics = evaluation.coco_metrics([result_for(truth[0])], write_truth(tmp_path, truth))
    np.testing.assert_equal(metrics, expected)
    assert metrics["mAP(bbox)/small"] == pytest.approx(1) and metrics["mAP(bbox)/medium"] == 0


def test_missing_area_is_the_mask_s(tmp_path):
    triangle = [[10, 10, 50, 10, 10, 50]]  # 800 pixels: small, in a box of 1600: medium
    truth = [true_object(1, box=(10, 10, 40, 40), segmentation=triangle, area=None)]
    metrics = evaluation.coco_metrics([], write_truth(tmp_path, truth))
    assert metrics["mAP(bbox)/small"] == 0 and math.isnan(metrics["mAP(bbox)/medium"])


def test_nothing_found_is_zero_with_a_warning(tmp_path, warnings):
    metrics = evaluation.coco_metrics([], write_truth(tmp_path, [true_object(1)]))
    assert metrics["mAP(bbox)/IoU=0.5:0.95"] == metrics["mAP(segm)/small"] == 0
    assert math.isnan(metrics["mAP(bbox)/large"])  # no ground truth of this size
    assert any("nothing was found in 2 images" in line for line in warnings)


@pytest.mark.parametrize("annotations", [[], [true_object(1, iscrowd=1)]])
def test_no_ground_truth_is_nan_with_a_reason(tmp_path, warnings, annotations):
    results = [result_for(true_object(1))]
    metrics = evaluation.coco_metrics(results, write_truth(tmp_path, annotations))
    assert len(metrics) == 12 and all(map(math.isnan, metrics.values()))
    assert any("no ground truth for box AP" in line for line in warnings)


def test_objects_without_a_usable_mask_are_left_out_of_mask_ap(tmp_path, warnings):
    truth = [true_object(1), true_object(2, box=(60, 60, 20, 20), segmentation=[[60, 60, 80, 80]])]
    truth.append(true_object(3, box=(90, 90, 20, 20), segmentation=[]))
    metrics = evaluation.coco_metrics([result_for(truth[0])], write_truth(tmp_path, truth))
    assert metrics["mAP(segm)/IoU=0.5"] == pytest.approx(1)
    assert metrics["mAP(bbox)/IoU=0.5"] == pytest.approx(34 / 101)  # one of three: recalls 0 to 0.33
    assert any("2 ground truth objects have no mask" in line for line in warnings)


def test_polygon_far_outside_does_not_crash(tmp_path):
    truth = [true_object(1, segmentation=square(0, 0, 1e9))]
    whole = result_for(true_object(1, box=(0, 0, 200, 200)))
    metrics = evaluation.coco_metrics([whole], write_truth(tmp_path, truth))
    assert metrics["mAP(segm)/IoU=0.5:0.95"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category_id": 99}, "categories 99.*truth.json"),
        ({"image_id": 99}, "images 99.*truth.json"),
        ({"score": math.nan}, "image 1 .*not finite"),
        ({"bbox": [0, 0, math.inf, 1]}, "image 1 .*not finite"),
    ],
)
def test_results_that_do_not_fit_are_refused(tmp_path, changes, message):
    truth = [true_object(1)]
    with pytest.raises(EvaluationError, match=message):
        evaluation.coco_metrics([result_for(truth[0]) | changes], write_truth(tmp_path, truth))


def test_unusable_ground_truth_is_named(tmp_path):
    for content, message in (("{", "cannot read.*a.json"), ("{}", "a.json is no COCO ground truth: it has no images")):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(EvaluationError, match=message):
            evaluation.coco_metrics([], tmp_path / "a.json")
    rle = {"size": [3, 3], "counts": [9]}
    with pytest.raises(EvaluationError, match="image 1: RLE size"):
        evaluation.coco_metrics([], write_truth(tmp_path, [true_object(1, segmentation=rle)]))


def test_metrics_print_nothing(tmp_path, capfd):
    evaluation.coco_metrics([result_for(true_object(1))], write_truth(tmp_path, [true_object(1)]))
    assert capfd.readouterr().out == ""


def test_tables(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(logger, "info", lines.append)
    truth = [true_object(1), true_object(2, box=(100, 100, 50, 50))]
    metrics = evaluation.coco_metrics([result_for(truth[0])], write_truth(tmp_path, truth))
    evaluation.log_metrics(metrics, "tiny")
    assert [line.split("\n")[0] for line in lines] == ["box AP on tiny", "mask AP on tiny"]
    cells = [cell.strip() for cell in lines[0].split("\n")[4].strip("│").split("│")]
    assert cells == ["0.505", "0.505", "0.505", "1.000", "0.000", "n/a"]  # precision 1 up to recall 0.5: 51 of 101
    assert "n/a: the ground truth has no objects" in lines[0]
    lines.clear()
    evaluation.log_metrics({name: 0.5 for name in metrics if "bbox" in name}, "tiny")
    assert len(lines) == 1 and "n/a" not in lines[0]


# ---------------------------------------------------------------- data sets


SIZES = ((67, 100), (100, 67), (45, 45), (120, 90), (67, 100))


@pytest.fixture
def dataset(tmp_path):
    """Five images with two rectangles each, of whole pixels."""
    annotations = []
    for image_id, (height, width) in enumerate(SIZES, start=1):
        cv2.imwrite(str(tmp_path / f"{image_id}.png"), np.full((height, width, 3), image_id, np.uint8))
        for x, y, side in ((2, 3, 24), (20, 22, 21)):
            one = true_object(0, image_id=image_id, category_id=30 if side == 24 else 40, box=(x, y, side, side))
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


def test_ground_truth_of_coco_tiny_as_detections_scores_1(coco_tiny):
    dataset = get_dataset("coco_val2017", coco_tiny)
    results = []
    for record in dataset.records(training=False):
        objects = np.flatnonzero(~record.is_crowd)
        segmentations = [record.segmentations[index] for index in objects]
        masks = [boxes.segmentation_to_mask(each, record.height, record.width) for each in segmentations]
        scores = np.full(len(objects), 0.5, np.float32)
        one = ImageDetections(record.boxes_xyxy[objects], scores, record.labels[objects], masks)
        results += evaluation.coco_results(record.image_id, one, dataset.category_ids)
    metrics = evaluation.coco_metrics(results, dataset.annotation_file, image_ids=dataset.image_ids)
    assert len(metrics) == 12
    assert all(value == pytest.approx(1) for value in metrics.values())
    # And against pycocotools where results are not perfect.
    rng = np.random.default_rng(0)
    for result in results:
        result["bbox"] = np.add(result["bbox"], rng.normal(0, 4, 4)).clip(1).round(1).tolist()
        result["score"] = round(rng.random(), 2)
    metrics = evaluation.coco_metrics(results, dataset.annotation_file)
    for kind in ("bbox", "segm"):
        expected = plain_pycocotools(results, dataset.annotation_file, kind)
        np.testing.assert_allclose(
            [metrics[f"mAP({kind})/{name}"] for name in evaluation.METRICS], expected, atol=1e-12
        )


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
    callback = evaluation.EvalCallback(lambda: Inference(dataset), [dataset], period_epochs=period, output_dir=folder)
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
    # There are no medium or large objects: nothing is reported of them.
    assert len(recorder.scalars) == 8 * len(steps) and not any(math.isnan(value) for _, _, value in recorder.scalars)
