"""COCO's metrics: hand-worked boxes and masks, and pycocotools used directly."""

import contextlib
import copy
import io
import json
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tensorpack.utils import logger

from common.rle import encode_rle, segmentation_to_mask
from dataset import get_dataset
from evaluation import metrics
from evaluation.results import coco_results
from inference.predictor import ImageDetections


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(logger, "warning", lines.append)
    return lines


# ---------------------------------------------------------------- metrics


def coco_metrics(results, annotation_file, **options):
    """The metrics of all kinds: {"mAP(KIND)/NAME": value}."""
    evaluations = metrics.evaluate(annotation_file, results, **options)
    return {name: value for each in evaluations for name, value in each.metrics().items()}


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
    candidates = annotations * 2
    candidates += random_truth(rng, num_images=num_images, num_categories=num_categories)
    for each in candidates:
        x, y, width, height = np.add(each["bbox"], rng.normal(0, 2, 4)).clip(1, 190).round(2).tolist()
        category = each["category_id"] if rng.random() < 0.9 else 1
        one = true_object(0, image_id=each["image_id"], category_id=category, box=(x, y, width, height))
        mask = np.zeros((200, 200), np.uint8)
        # The mask is smaller than the box: sizes by box and by mask differ.
        mask[int(y) : int(y + 0.8 * height) + 1, int(x) : int(x + width) + 1] = 1
        results.append({**result_for(one, score=round(rng.random(), 1)), "segmentation": encode_rle(mask)})
    return results


def plain_pycocotools(results, path, kind, image_ids=None):
    """pycocotools' own COCOeval, used as its demo does, but for annotation ids, of which it takes 0 for "not matched";
    for masks without boxes in the results, where it would take a box's area for the mask's."""
    results = copy.deepcopy(results)
    if kind == "segm":
        for result in results:
            del result["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        truth.dataset["info"] = {}
        for annotation in truth.dataset["annotations"]:
            annotation["id"] += 1
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        if image_ids:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(6))
def test_all_precisions_equal_pycocotools_on_random_results(tmp_path, seed):
    """Crowds, ties, images without objects or results; of every threshold, class and size."""
    rng = np.random.default_rng(seed)
    annotations = random_truth(rng)
    for number, annotation in enumerate(annotations):
        annotation["id"] = number  # from 0
    path = write_truth(tmp_path, annotations, images=range(1, 13), categories=(1, 2, 3))
    results = random_results(rng, annotations)
    if seed == 4:  # more than count, in one image and of one class
        results += [{**result, "image_id": 1, "category_id": 1} for result in results + results]
    rng.shuffle(results)
    image_ids = list(range(1, 9)) if seed == 3 else None
    for each in metrics.evaluate(path, results, image_ids=image_ids):
        reference = plain_pycocotools(results, path, each.kind, image_ids)
        for ours, theirs in ((each.precision, "precision"), (each.scores, "scores")):
            expected = reference.eval[theirs][..., -1]
            np.testing.assert_allclose(ours, np.where(expected < 0, math.nan, expected), rtol=0, atol=1e-12)
        assert 0.05 < reference.stats[0] < 0.95
        expected = np.where(reference.stats[:6] < 0, math.nan, reference.stats[:6])
        np.testing.assert_allclose(list(each.metrics().values()), expected, rtol=0, atol=1e-12)
        of_class_2 = reference.eval["precision"][:, :, 1, 0, -1].mean()
        assert each.average_precision("IoU=0.5:0.95", label=1) == pytest.approx(of_class_2)


def test_of_equal_overlaps_the_last_object_is_taken(tmp_path):
    """The first detection lies in the middle of two objects; the second one fits the first object only."""
    truth = [true_object(1, box=(10, 10, 20, 20)), true_object(2, box=(20, 10, 20, 20))]
    found = [true_object(0, box=(15, 10, 20, 20)), truth[0]]
    results = [result_for(each, score) for each, score in zip(found, (0.9, 0.8))]
    path = write_truth(tmp_path, truth)
    values = coco_metrics(results, path)
    assert values["mAP(bbox)/IoU=0.5"] == values["mAP(segm)/IoU=0.5"] == pytest.approx(1)
    assert plain_pycocotools(results, path, "bbox").stats[1] == pytest.approx(1)


@pytest.mark.parametrize("side", [31, 32, 33, 95, 96, 97])
def test_sizes_at_the_limits_count_as_pycocotools_counts_them(tmp_path, side):
    """Objects and detections of exactly 32 x 32 belong to small and to medium, of 96 x 96 to medium and to large."""
    truth = [true_object(1, box=(10, 10, side, side)), true_object(2, image_id=2, box=(10, 10, 64, 64))]
    false = true_object(0, box=(100, 100, side, side))
    path, results = write_truth(tmp_path, truth), [result_for(truth[0]), result_for(false, 0.9)]
    for each in metrics.evaluate(path, results):
        expected = plain_pycocotools(results, path, each.kind).stats[:6]
        np.testing.assert_allclose(
            list(each.metrics().values()), np.where(expected < 0, math.nan, expected), atol=1e-12
        )
        found = {name for name in ("small", "medium", "large") if each.average_precision(name) > 0}
        limits = {"small": side <= 32, "medium": 32 <= side <= 96, "large": side >= 96}
        assert found == {name for name, holds in limits.items() if holds}


def test_metric_names(tmp_path):
    truth = [true_object(1)]
    values = coco_metrics([result_for(truth[0])], write_truth(tmp_path, truth))
    names = ("IoU=0.5:0.95", "IoU=0.5", "IoU=0.75", "small", "medium", "large")
    assert list(values) == [f"mAP({kind})/{name}" for kind in ("bbox", "segm") for name in names]
    only = coco_metrics([result_for(truth[0])], write_truth(tmp_path, truth), kinds=("bbox",))
    assert list(only) == list(values)[:6]


def test_box_of_a_result_does_not_decide_the_size_of_its_mask(tmp_path):
    """A thin diagonal has a large box and a small mask: where large masks are scored, a false one is ignored."""
    truth = [true_object(1, box=(50, 50, 110, 110))]
    diagonal = {**result_for(truth[0], score=0.9), "segmentation": encode_rle(np.eye(200))}
    path = write_truth(tmp_path, truth)
    with_box = coco_metrics([result_for(truth[0]), diagonal], path, kinds=("segm",))
    assert with_box["mAP(segm)/large"] == pytest.approx(1)
    assert with_box["mAP(segm)/IoU=0.5:0.95"] == pytest.approx(0.5)  # of all sizes, it is the first of two
    results = [result_for(truth[0]), diagonal]
    for result in results:
        del result["bbox"]
    np.testing.assert_equal(coco_metrics(results, path, kinds=("segm",)), with_box)


@pytest.mark.parametrize("first", [0, 1, 50])
def test_annotation_ids_do_not_matter(tmp_path, first):
    truth = [true_object(first, box=(10, 10, 50, 50)), true_object(first + 1, box=(100, 100, 50, 50))]
    values = coco_metrics([result_for(each) for each in truth], write_truth(tmp_path, truth))
    assert values["mAP(bbox)/IoU=0.5:0.95"] == values["mAP(segm)/IoU=0.5:0.95"] == pytest.approx(1)


@pytest.mark.parametrize("missing", ["area", "iscrowd"])
def test_ground_truth_may_lack_area_and_iscrowd(tmp_path, missing):
    truth = [true_object(1, box=(10, 10, 30, 30)), true_object(2, box=(100, 100, 80, 80))]
    expected = coco_metrics([result_for(truth[0])], write_truth(tmp_path, truth))
    for each in truth:
        del each[missing]
    values = coco_metrics([result_for(truth[0])], write_truth(tmp_path, truth))
    np.testing.assert_equal(values, expected)
    assert values["mAP(bbox)/small"] == pytest.approx(1) and values["mAP(bbox)/medium"] == 0


def test_missing_area_is_the_mask_s(tmp_path):
    triangle = [[10, 10, 50, 10, 10, 50]]  # 800 pixels: small, in a box of 1600: medium
    truth = [true_object(1, box=(10, 10, 40, 40), segmentation=triangle, area=None)]
    values = coco_metrics([], write_truth(tmp_path, truth))
    assert values["mAP(bbox)/small"] == 0 and math.isnan(values["mAP(bbox)/medium"])


def test_nothing_found_is_zero_with_a_warning(tmp_path, warnings):
    values = coco_metrics([], write_truth(tmp_path, [true_object(1)]))
    assert values["mAP(bbox)/IoU=0.5:0.95"] == values["mAP(segm)/small"] == 0
    assert math.isnan(values["mAP(bbox)/large"])  # no ground truth of this size
    assert any("no detections in 2 images" in line for line in warnings)


@pytest.mark.parametrize("annotations", [[], [true_object(1, iscrowd=1)]])
def test_no_ground_truth_is_nan(tmp_path, annotations):
    results = [result_for(true_object(1))]
    values = coco_metrics(results, write_truth(tmp_path, annotations))
    assert len(values) == 12 and all(map(math.isnan, values.values()))


def test_objects_without_a_usable_mask_are_left_out_of_mask_ap(tmp_path, warnings):
    truth = [true_object(1), true_object(2, box=(60, 60, 20, 20), segmentation=[[60, 60, 80, 80]])]
    truth.append(true_object(3, box=(90, 90, 20, 20), segmentation=[]))
    values = coco_metrics([result_for(truth[0])], write_truth(tmp_path, truth))
    assert values["mAP(segm)/IoU=0.5"] == pytest.approx(1)
    assert values["mAP(bbox)/IoU=0.5"] == pytest.approx(34 / 101)  # one of three: recalls 0 to 0.33
    assert any("2 ground truth objects have no mask" in line for line in warnings)


def test_polygon_far_outside_does_not_crash(tmp_path):
    truth = [true_object(1, segmentation=square(0, 0, 1e9))]
    whole = result_for(true_object(1, box=(0, 0, 200, 200)))
    values = coco_metrics([whole], write_truth(tmp_path, truth))
    assert values["mAP(segm)/IoU=0.5:0.95"] == pytest.approx(1)


BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category_id": 99}, "categories 99.*truth.json"),
        ({"image_id": 99}, "images 99.*truth.json"),
        ({"score": math.nan}, "image 1 .*not finite"),
        *[({"bbox": [*[5.0] * i, bad, *[5.0] * (3 - i)]}, "image 1 .*not finite") for i in range(4) for bad in BAD],
    ],
)
def test_results_that_do_not_fit_are_refused(tmp_path, changes, message):
    truth = [true_object(1)]
    with pytest.raises(metrics.EvaluationError, match=message):
        coco_metrics([result_for(truth[0]) | changes], write_truth(tmp_path, truth))


def test_unusable_ground_truth_is_named(tmp_path):
    for content, message in (("{", "cannot read.*a.json"), ("{}", "a.json is no COCO ground truth: it has no images")):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(metrics.EvaluationError, match=message):
            coco_metrics([], tmp_path / "a.json")
    rle = {"size": [3, 3], "counts": [9]}
    with pytest.raises(metrics.EvaluationError, match="image 1: RLE size"):
        coco_metrics([], write_truth(tmp_path, [true_object(1, segmentation=rle)]))


def test_metrics_print_nothing(tmp_path, capfd):
    coco_metrics([result_for(true_object(1))], write_truth(tmp_path, [true_object(1)]))
    assert capfd.readouterr().out == ""


def four_objects(tmp_path):
    """Of the classes 1, 1, 2 and 2 in image 1, and a crowd; the path of the ground truth and the objects."""
    truth = [true_object(n, box=(40 * n, 10, 30, 30), category_id=1 + n // 2) for n in range(4)]
    crowd = true_object(9, box=(0, 100, 150, 90), iscrowd=1, segmentation={"size": [200, 200], "counts": [0, 40000]})
    return write_truth(tmp_path, [*truth, crowd], categories=(1, 2, 3)), truth


def test_operating_point_by_hand(tmp_path):
    """Three right ones of four objects, two wrong ones, two in a crowd, which do not count; equal scores go together.

    Scores from 0.9: 1 of 1 right, F1 2 / (1 + 4). From 0.8: 2 of 3, 4 / 7. From 0.6: 3 of 4, 6 / 8. From 0.5: 3 of 5.
    """
    path, (a, b, c, d) = four_objects(tmp_path)
    far, crowd = true_object(0, image_id=2, box=(0, 0, 9, 9)), true_object(0, box=(5, 110, 60, 60))
    results = [result_for(each, score) for each, score in ((a, 0.9), (b, 0.8), (far, 0.8), (c, 0.6), (far, 0.5))]
    results += [result_for(crowd, 0.95), result_for(crowd, 0.94)]
    for each in metrics.evaluate(path, results):
        assert metrics.best_operating_point(each) == pytest.approx((0.6, 3 / 4, 3 / 4, 6 / 8))
        # Class 1: 1 of 1 right of 2, F1 2 / 3; then 2 of 3, F1 4 / 5.
        assert metrics.best_operating_point(each, label=0) == pytest.approx((0.8, 2 / 3, 1, 4 / 5))
        assert metrics.best_operating_point(each, label=1) == pytest.approx((0.6, 1, 1 / 2, 2 / 3))
        assert metrics.best_operating_point(each, label=2) is None
    (nothing,) = metrics.evaluate(path, [], kinds=("bbox",))
    assert metrics.best_operating_point(nothing) is None


def test_confusion_matrix_by_hand(tmp_path):
    """One of two objects of class 1 is found, the other is taken for class 3; one of two of class 2 is found."""
    path, (a, b, c, d) = four_objects(tmp_path)
    far, crowd = true_object(0, image_id=2, box=(0, 0, 9, 9)), true_object(0, box=(5, 110, 60, 60))
    results = [result_for(each, 0.7) for each in (a, c, far, crowd, {**b, "category_id": 3}, {**a, "category_id": 2})]
    results.append(result_for(d, 0.3))
    expected = [
        [1, 0, 1, 0],
        [0, 1, 0, 1],
        [0, 0, 0, 0],
        [1, 1, 0, 0],  # where nothing is: far away, and on an object that has been found already
    ]
    for each in metrics.evaluate(path, results):
        assert metrics.confusion_matrix(each, 0.5).tolist() == expected
        assert metrics.confusion_matrix(each, 0.3)[1].tolist() == [0, 2, 0, 0]
        assert metrics.confusion_matrix(each, 0.99)[:3, 3].tolist() == [2, 2, 0]


def test_confusion_matrix_adds_up_on_random_results(tmp_path):
    rng = np.random.default_rng(30)
    annotations = random_truth(rng)
    path = write_truth(tmp_path, annotations, images=range(1, 13), categories=(1, 2, 3))
    results = random_results(rng, annotations)
    for result in results[::3]:
        result["category_id"] = 1 + result["category_id"] % 3
    for each in metrics.evaluate(path, results):
        point = metrics.best_operating_point(each)
        matrix = metrics.confusion_matrix(each, point.score)
        right, kept, objects = np.trace(matrix), matrix[:, :-1].sum(), matrix[:-1].sum()
        assert (right / kept, right / objects) == pytest.approx((point.precision, point.recall))
        assert objects == sum(not annotation["iscrowd"] for annotation in annotations)
        assert np.count_nonzero(matrix[:3, :3]) > 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot read the results .*r.json"),
        ("{}", "r.json holds no COCO results: expected a list"),
        ('[{"image_id": 1, "category_id": 1}]', "r.json: result 1 is no dict with category_id, image_id, score"),
    ],
)
def test_results_files_that_are_none(tmp_path, content, message):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(metrics.EvaluationError, match=message):
        metrics.load_results(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [200, 200], "counts": "o1"}, "image 1 .*add up"),  # 63 pixels: pycocotools would never return
        ({"size": [200, 200], "counts": "P"}, "image 1 .*cut off"),
        ({"size": [100, 200], "counts": "P"}, r"image 1: RLE size \[100, 200\]"),
        ({"size": [200, 200], "counts": [3, 5]}, "image 1: RLE counts add up to 8"),
    ],
)
def test_broken_masks_of_results_are_refused(tmp_path, segmentation, message):
    truth = [true_object(1)]
    with pytest.raises(metrics.EvaluationError, match=message):
        coco_metrics([{**result_for(truth[0]), "segmentation": segmentation}], write_truth(tmp_path, truth))


def test_masks_of_results_may_be_polygons_or_run_lengths(tmp_path):
    truth = [true_object(1), true_object(2, box=(60, 60, 20, 20))]
    results = [result_for(each) for each in truth]
    results[0]["segmentation"] = truth[0]["segmentation"]
    results[1]["segmentation"] = {"size": [200, 200], "counts": runs(mask_util.decode(results[1]["segmentation"]))}
    assert coco_metrics(results, write_truth(tmp_path, truth))["mAP(segm)/IoU=0.5:0.95"] == pytest.approx(1)


def test_ground_truth_of_coco_tiny_as_detections_scores_1(coco_tiny):
    dataset = get_dataset("coco_val2017", coco_tiny)
    results = []
    for record in dataset.records(training=False):
        objects = np.flatnonzero(~record.is_crowd)
        segmentations = [record.segmentations[index] for index in objects]
        masks = [segmentation_to_mask(each, record.height, record.width) for each in segmentations]
        scores = np.full(len(objects), 0.5, np.float32)
        one = ImageDetections(record.boxes_xyxy[objects], scores, record.labels[objects], masks)
        results += coco_results(record.image_id, one, dataset.category_ids)
    values = coco_metrics(results, dataset.annotation_file, image_ids=dataset.image_ids)
    assert len(values) == 12
    assert all(value == pytest.approx(1) for value in values.values())
    # And against pycocotools where results are not perfect.
    rng = np.random.default_rng(0)
    for result in results:
        result["bbox"] = np.add(result["bbox"], rng.normal(0, 4, 4)).clip(1).round(1).tolist()
        result["score"] = round(rng.random(), 2)
    values = coco_metrics(results, dataset.annotation_file)
    for kind in ("bbox", "segm"):
        expected = plain_pycocotools(results, dataset.annotation_file, kind).stats[:6]
        np.testing.assert_allclose([values[f"mAP({kind})/{name}"] for name in metrics.METRICS], expected, atol=1e-12)
