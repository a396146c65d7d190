"""COCO's metrics: compares results, a list of dicts in COCO's results format, with a ground truth file.

    (box, mask) = evaluate("instances_val2017.json", results, kinds=("bbox", "segm"))
    box.metrics()["mAP(bbox)/IoU=0.5:0.95"]

The definition is at https://cocodataset.org/#detection-eval; the numbers equal those of pycocotools, but are computed
for all images at once (docs/speed.md has the times). Results may come from one process, from several processes whose
lists were joined in any order, or from a file.

Names: `true` are the objects of the ground truth, `found` the detections.
Shapes: D detections, G true objects; K classes of the ground truth, by ascending category id; T IoU thresholds; S
ranges of sizes; R recalls; P pairs of a detection and a true object.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from tensorpack.utils import logger

from common.registry import Registry
from common.rle import compress_rle, encode_rle, rle_areas, segmentation_to_mask
from config import UserError

KINDS = {"bbox": "box", "segm": "mask"}
# Metric name: IoU threshold (None: the mean over 0.5, 0.55 ... 0.95), range of object sizes, short name.
METRICS = {
    "IoU=0.5:0.95": (None, "all", "AP"),
    "IoU=0.5": (0.5, "all", "AP50"),
    "IoU=0.75": (0.75, "all", "AP75"),
    "small": (None, "small", "AP small"),
    "medium": (None, "medium", "AP medium"),
    "large": (None, "large", "AP large"),
}
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
# Areas in square pixels, both ends included.
SIZES = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
MAX_DETECTIONS = 100  # of a class in an image, best first
RLES_AT_ONCE = 300  # decoded in one call; they fit into a processor's cache


class EvaluationError(UserError):
    """Results or ground truth that cannot be used; the message names the file, image or category."""


class NonFiniteError(EvaluationError):
    """The network returned NaN or infinity: the weights have diverged."""

    exit_code = 3


class Truth(NamedTuple):
    """The part of a COCO ground truth that the metrics use."""

    file: str | Path
    images: dict[int, tuple[int, int]]  # {id: (height, width)}
    class_names: dict[int, str]  # {category id: name}, by ascending id
    annotations: list[dict[str, Any]]  # as in the file; `iscrowd` and `area` are added if missing


class Objects(NamedTuple):
    """True objects, in the order of the file; or detections, by class, image and falling score."""

    image: np.ndarray  # int64, index among the sorted image ids
    label: np.ndarray  # int64, index among the sorted category ids
    area: np.ndarray  # float64, square pixels
    shape: np.ndarray | list[dict[str, Any]]  # float64 [n, 4] (x, y, width, height), or compressed RLEs
    is_crowd: np.ndarray  # bool
    scores: np.ndarray  # float64, 0 for true objects


class Evaluation(NamedTuple):
    """The agreement of detections with a ground truth, by box or by mask."""

    kind: str  # "bbox" or "segm"
    class_names: tuple[str, ...]  # K names
    num_images: int
    true: Objects  # the ground truth
    found: Objects  # the detections
    match: np.ndarray  # int32 [S, D, T], the true object that a detection is matched with, or -1
    is_ignored: np.ndarray  # bool [S, D, T], detections that count neither as right nor as wrong
    is_counted: np.ndarray  # bool [S, G], true objects that should be found
    precision: np.ndarray  # float64 [T, R, K, S], best at a recall or above; 0 if not reached, NaN without true objects
    scores: np.ndarray  # float64 [T, R, K, S], the score at which `precision` is reached

    def average_precision(self, name: str, label: int | None = None) -> float:
        """Returns the AP in [0, 1] of a name in METRICS.

        It is that of the class `label` (from 0) or, if None, the mean over the classes with true objects; NaN without
        any.
        """
        threshold, size, _ = METRICS[name]
        precision = self.precision[..., list(SIZES).index(size)]
        precision = precision[:, :, slice(None) if label is None else [label]]
        if threshold is not None:
            precision = precision[np.isclose(IOU_THRESHOLDS, threshold)]
        occurs = ~np.isnan(precision)
        return float(precision[occurs].mean()) if occurs.any() else math.nan

    def metrics(self) -> dict[str, float]:
        """Returns {"mAP(KIND)/NAME": AP in [0, 1] or NaN} for each name in METRICS."""
        return {f"mAP({self.kind})/{name}": self.average_precision(name) for name in METRICS}


OTHER_METRICS = Registry("TEST.METRICS")


def register_metric(name: str, function: Callable[[Evaluation], float]) -> Callable[[Evaluation], float]:
    """Registers a metric under a name for TEST.METRICS; it is reported as NAME(bbox) and, for masks, NAME(segm).

    Args:
        function: Evaluation -> float, NaN if it is undefined.
    Returns:
        the function
    Raises:
        ConfigError: the name is registered already.
    """
    return OTHER_METRICS.register(name, function)


def other_metrics(evaluations: Sequence[Evaluation], names: Sequence[str]) -> dict[str, float]:
    """Returns the registered metrics of these names: {"NAME(KIND)": float}."""
    functions = dict(zip(names, OTHER_METRICS.find_all(names)))
    return {f"{name}({each.kind})": float(f(each)) for name, f in functions.items() for each in evaluations}


class OperatingPoint(NamedTuple):
    """The effect of keeping only detections with at least a certain score; all in [0, 1], at an IoU of 0.5."""

    score: float  # lowest score kept
    precision: float
    recall: float
    f1: float


def evaluate(
    truth: str | Path | Truth,
    results: list[dict[str, Any]],
    *,
    image_ids: Iterable[int] | None = None,
    kinds: Sequence[str] = tuple(KINDS),
) -> list[Evaluation]:
    """Compares results with a ground truth; returns an Evaluation for each of `kinds`.

    The size of a detection is the area of its box for "bbox", of its mask for "segm".

    Args:
        truth: path of a COCO json, or the Truth of `load_truth`.
        results: list of dicts, see `evaluation.results.coco_results`.
        image_ids: limits the evaluation to some images of the file. kinds: "bbox", "segm" or both.
    Raises:
        EvaluationError: results of an image or category that the ground truth lacks, not finite, or not in COCO's
            format; or an unusable ground truth.
    """
    truth = truth if isinstance(truth, Truth) else load_truth(truth)
    image_ids = set(truth.images) if image_ids is None else set(image_ids)
    _check_ids(results, truth)
    results = [result for result in results if result["image_id"] in image_ids]
    truth = truth._replace(annotations=[each for each in truth.annotations if each["image_id"] in image_ids])
    if not results:
        logger.warning(f"no detections in {len(image_ids)} images: AP is 0 for every class that has ground truth")
    return [_evaluate_kind(kind, truth, results, sorted(image_ids)) for kind in kinds]


def _evaluate_kind(kind, truth, results, image_ids):
    true, found = _true_objects(kind, truth, image_ids), _found_objects(kind, truth, results, image_ids)
    ranges = np.array(list(SIZES.values()))[:, :, None]
    is_counted = (true.area >= ranges[:, 0]) & (true.area <= ranges[:, 1]) & ~true.is_crowd
    fits = (found.area >= ranges[:, 0]) & (found.area <= ranges[:, 1])
    groups = [objects.label * len(image_ids) + objects.image for objects in (found, true)]
    pairs = _overlapping(kind, found, true, groups=groups)
    match = np.stack([_match(pairs, groups[0], each, true.is_crowd) for each in is_counted])
    is_ignored = np.empty(match.shape, bool)
    for size, (matched, ignored) in enumerate(zip(match, is_ignored, strict=True)):
        ignored[:] = ~fits[size][:, None]
        hit = matched >= 0
        ignored[hit] = ~is_counted[size][matched[hit]]
    precision, scores = _accumulate(found, true, match >= 0, is_ignored, is_counted, len(truth.class_names))
    names = tuple(truth.class_names.values())
    return Evaluation(kind, names, len(image_ids), true, found, match, is_ignored, is_counted, precision, scores)


# ---------------------------------------------------------------- ground truth and results


def load_truth(annotation_file: str | Path) -> Truth:
    """Reads the Truth from a COCO json.

    Raises:
        EvaluationError: the file is unreadable, or not a COCO ground truth.
    """
    content = _read_json(annotation_file, "the ground truth")
    keys = ("images", "annotations", "categories")
    missing = [key for key in keys if key not in content] if isinstance(content, dict) else keys
    if missing:
        raise EvaluationError(f"{annotation_file} is no COCO ground truth: it has no {', '.join(missing)}")
    images = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    annotations = [{"iscrowd": 0, **each} for each in content["annotations"]]
    for annotation in annotations:
        if annotation.get("area") is None:
            rle = _true_mask(annotation, images)
            annotation["area"] = float(mask_util.area(rle) if rle else annotation["bbox"][2] * annotation["bbox"][3])
    names = {each["id"]: each.get("name", str(each["id"])) for each in content["categories"]}
    return Truth(annotation_file, images, dict(sorted(names.items())), annotations)


def load_results(path: str | Path) -> list[dict[str, Any]]:
    """Reads the results from a COCO results json: a list of dicts.

    Raises:
        EvaluationError: the file is unreadable, or not in COCO's results format.
    """
    results = _read_json(path, "the results")
    needed = {"image_id", "category_id", "score"}
    if not isinstance(results, list):
        raise EvaluationError(f"{path} holds no COCO results: expected a list")
    for number, result in enumerate(results, start=1):
        if not isinstance(result, dict) or not needed <= result.keys():
            raise EvaluationError(f"{path}: result {number} is no dict with {', '.join(sorted(needed))}")
    return results


def _read_json(path, role):
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read {role} {path}: {error}") from error


def _check_ids(results, truth):
    for key, word, known in (("category_id", "categories", truth.class_names), ("image_id", "images", truth.images)):
        unknown = {result[key] for result in results} - set(known)
        if unknown:
            ids = sorted(unknown)
            listed = ", ".join(map(str, ids[:10])) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")
            raise EvaluationError(f"results have {word} {listed}, which are not in {truth.file}")


def _true_objects(kind, truth, image_ids):
    annotations = truth.annotations
    if kind == "bbox":
        shape = np.array([each["bbox"] for each in annotations], np.float64).reshape(-1, 4)
    else:
        masks = [_true_mask(each, truth.images) for each in annotations]
        shape = [mask for mask in masks if mask]
        annotations = [annotation for annotation, mask in zip(annotations, masks, strict=True) if mask]
        if len(annotations) < len(masks):
            left_out = len(masks) - len(annotations)
            logger.warning(f"{left_out} ground truth objects have no mask: mask AP leaves them out")
    area = np.array([each["area"] for each in annotations], np.float64)
    is_crowd = np.array([each["iscrowd"] for each in annotations], bool)
    index = _indices(annotations, truth, image_ids)
    return Objects(*index, area, shape, is_crowd, np.zeros(len(annotations)))


def _found_objects(kind, truth, results, image_ids):
    """Returns the Objects of results; equal scores stay in the order of the results, as in pycocotools."""
    key = "bbox" if kind == "bbox" else "segmentation"
    results = [result for result in results if key in result]
    image, label = _indices(results, truth, image_ids)
    scores = np.array([result["score"] for result in results], np.float64)
    order = np.lexsort((-scores, image, label))
    order = order[_rank(label[order] * len(image_ids) + image[order]) < MAX_DETECTIONS]
    results = [results[index] for index in order]
    image, label, scores = image[order], label[order], scores[order]
    if kind == "bbox":
        shape = np.array([result["bbox"] for result in results], np.float64).reshape(-1, 4)
        area = shape[:, 2] * shape[:, 3]
    else:
        shape = [_found_mask(result, truth.images) for result in results]
        area = _mask_areas(shape, results)
    is_finite = np.isfinite(scores) & np.isfinite(area)
    if kind == "bbox":
        is_finite &= np.isfinite(shape).all(axis=1)
    if not is_finite.all():
        image_id = results[int(np.argmin(is_finite))]["image_id"]
        raise NonFiniteError(f"results of image {image_id} have a number that is not finite")
    return Objects(image, label, area, shape, np.zeros(len(results), bool), scores)


def _indices(dicts, truth, image_ids):
    """Returns the indices of the images and of the classes of annotations or results, int64 each."""
    images = {image_id: index for index, image_id in enumerate(image_ids)}
    labels = {category_id: index for index, category_id in enumerate(truth.class_names)}
    return (
        np.array([images[each["image_id"]] for each in dicts], np.int64),
        np.array([labels[each["category_id"]] for each in dicts], np.int64),
    )


def _rank(groups):
    """Counts for each of the sorted numbers the equal ones before it."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups)


def _true_mask(annotation, images):
    """Returns a ground truth annotation's mask as COCO's compressed RLE, or None; `images` is {id: (height, width)}."""
    try:
        return _to_rle(annotation.get("segmentation"), *images[annotation["image_id"]])
    except ValueError as error:
        raise EvaluationError(f"ground truth of image {annotation['image_id']}: {error}") from error


def _found_mask(result, images):
    """Returns a result's mask as COCO's compressed RLE, whose counts only `_mask_areas` checks."""
    segmentation, (height, width) = result["segmentation"], images[result["image_id"]]
    is_text = isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), str)
    if is_text and segmentation.get("size") == [height, width]:
        return segmentation
    try:
        rle = _to_rle(segmentation, height, width)
    except ValueError as error:
        raise EvaluationError(f"results of image {result['image_id']}: {error}") from error
    return rle or encode_rle(np.zeros((height, width)))


def _to_rle(segmentation, height, width):
    """Converts a json segmentation to COCO's compressed RLE; returns None if it is missing or has no area."""
    if isinstance(segmentation, dict):
        return compress_rle(segmentation, height, width)
    # Fewer than three points have no area, and pycocotools would interpret two as a box.
    polygons = [polygon for polygon in segmentation or () if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not polygons:
        return None
    reach = 2 * max(height, width)
    if all(-reach < value < reach for polygon in polygons for value in polygon):
        return mask_util.merge(mask_util.frPyObjects(polygons, height, width))
    # pycocotools crashes on huge coordinates; segmentation_to_mask clips them, but is slower.
    points = [np.array(polygon, np.float64).reshape(-1, 2) for polygon in polygons]
    return encode_rle(segmentation_to_mask(points, height, width))


def _mask_areas(rles, results):
    """Returns areas in pixels, float64 [D]; raises EvaluationError if the runs of an RLE do not add up to its image."""
    areas = [np.zeros(0, np.int64)]
    for start in range(0, len(rles), RLES_AT_ONCE):
        block = rles[start : start + RLES_AT_ONCE]
        try:
            areas.append(rle_areas(block))
        except ValueError as error:
            images = sorted({result["image_id"] for result in results[start : start + RLES_AT_ONCE]})
            raise EvaluationError(f"results of image {images[0]} (or of up to {images[-1]}): {error}") from error
    return np.concatenate(areas).astype(np.float64)


# ---------------------------------------------------------------- matching


def _overlapping(kind, found, true, *, groups):
    """Returns pairs of a detection and a true object of the same group whose IoU reaches the lowest threshold.

    Args:
        groups: int64 [D] and [G], the group of each detection, ascending, and of each true object.
    Returns:
        (found index, true index, IoU), each [P], by found index, then by true index. For crowds the IoU is the
            intersection over the detection's area.
    """
    true_order = np.argsort(groups[1], kind="stable")
    starts, stops = (np.searchsorted(groups[1][true_order], groups[0], side) for side in ("left", "right"))
    counts = stops - starts
    found_index = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    true_index = true_order[np.arange(len(found_index)) + np.repeat(starts - first, counts)]
    if kind == "bbox":
        overlap = _box_overlap(found.shape[found_index], true.shape[true_index], true.is_crowd[true_index])
    else:
        overlap = _mask_overlap(found, true, groups[0], true_order, starts, stops)
    near = overlap >= IOU_THRESHOLDS[0]
    return found_index[near], true_index[near], overlap[near]


def _box_overlap(found, true, is_crowd):
    """Returns the IoU of pairs of boxes (x, y, width, height), float64 [P], in pycocotools' order of operations."""
    corner = np.maximum(found[:, :2], true[:, :2])
    sides = np.minimum(found[:, :2] + found[:, 2:], true[:, :2] + true[:, 2:]) - corner
    common = np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0)
    found_area = found[:, 2] * found[:, 3]
    union = np.where(is_crowd, found_area, found_area + true[:, 2] * true[:, 3] - common)
    return np.divide(common, union, out=np.zeros_like(common), where=common > 0)


def _mask_overlap(found, true, groups, true_order, starts, stops):
    """Returns the IoU of all pairs of masks of a group, float64 [P], in one call of pycocotools per group."""
    overlaps = [np.zeros(0)]
    has_pairs = np.flatnonzero(stops > starts)
    edges = np.flatnonzero(np.diff(groups[has_pairs])) + 1
    for rows in np.split(has_pairs, edges) if len(has_pairs) else ():
        columns = true_order[starts[rows[0]] : stops[rows[0]]]
        found_masks = found.shape[rows[0] : rows[-1] + 1]
        true_masks = [true.shape[column] for column in columns]
        overlaps.append(mask_util.iou(found_masks, true_masks, true.is_crowd[columns]).ravel())
    return np.concatenate(overlaps)


def _match(pairs, groups, is_counted, is_crowd):
    """Applies COCO's greedy matching: each detection, best score first, gets the free true object with the highest IoU.

    Objects that count come before those that do not (crowds, other sizes); of equal IoUs the last one wins. Crowds stay
    free. One pass matches the first detection of every group at once, the next pass the second ones, and so on.

    Args:
        pairs: from `_overlapping`. groups: int64 [D], of the detections. is_counted, is_crowd: bool [G].
    Returns:
        int32 [D, T]: index of the true object, or -1.
    """
    found, true, overlap = pairs
    match = np.full((len(groups), len(IOU_THRESHOLDS)), -1, np.int32)
    if not len(found):
        return match
    order = np.lexsort((overlap, is_counted[true], found))  # within a detection, the best comes last
    found, true, overlap = found[order], true[order], overlap[order]
    is_first = np.diff(found, prepend=-1) > 0
    turn = _rank(groups[found[is_first]])[np.cumsum(is_first) - 1]
    is_taken = np.zeros((len(is_counted), len(IOU_THRESHOLDS)), bool)
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)
    by_turn = np.argsort(turn, kind="stable")
    for pairs in np.split(by_turn, np.flatnonzero(np.diff(turn[by_turn])) + 1):
        rows, candidates = found[pairs], true[pairs]
        is_free = ~is_taken[candidates] | is_crowd[candidates, None]
        place = np.where(is_free & (overlap[pairs, None] >= thresholds), np.arange(len(pairs))[:, None], -1)
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        best = np.maximum.reduceat(place, starts)
        match[rows[starts]] = np.where(best >= 0, candidates[best], -1)
        is_taken[candidates[best[best >= 0]], np.nonzero(best >= 0)[1]] = True
    return match


def _accumulate(found, true, is_match, is_ignored, is_counted, num_classes):
    """Returns the `precision` and `scores` of an Evaluation, float64 [T, R, K, S] each."""
    shape = (len(IOU_THRESHOLDS), len(RECALLS), num_classes, len(SIZES))
    precision, scores = np.full(shape, np.nan), np.full(shape, np.nan)
    edges = np.searchsorted(found.label, np.arange(num_classes + 1))
    for label, (start, stop) in enumerate(zip(edges, edges[1:])):
        rows = start + np.argsort(-found.scores[start:stop], kind="stable")
        for size, counted in enumerate(is_counted):
            num_true = np.count_nonzero(counted & (true.label == label))
            if not num_true:
                continue
            hits = [(is_match[size, rows] ^ flip) & ~is_ignored[size, rows] for flip in (False, True)]
            right, wrong = (np.cumsum(each.T, axis=1, dtype=np.float64) for each in hits)
            # The smallest float in the denominator gives the same numbers as pycocotools.
            best = np.maximum.accumulate((right / (right + wrong + np.spacing(1)))[:, ::-1], axis=1)[:, ::-1]
            for threshold, recall in enumerate(right / num_true):
                place = np.searchsorted(recall, RECALLS)
                reached = place[place < len(rows)]
                precision[threshold, :, label, size] = scores[threshold, :, label, size] = 0
                precision[threshold, : len(reached), label, size] = best[threshold, reached]
                scores[threshold, : len(reached), label, size] = found.scores[rows[reached]]
    return precision, scores


# ---------------------------------------------------------------- at one score


def best_operating_point(evaluation: Evaluation, label: int | None = None) -> OperatingPoint | None:
    """Returns the OperatingPoint of highest F1, of the class `label` (from 0) or of all classes together.

    It is computed from the objects themselves, not from COCO's interpolated curves. None if there are no detections or
    no true objects.
    """
    found, at = evaluation.found, _matches_at_half(evaluation)
    of_class = slice(None) if label is None else found.label == label
    scores, is_right = found.scores[of_class][~at.is_ignored[of_class]], at.is_right[of_class][~at.is_ignored[of_class]]
    num_true = np.count_nonzero(at.is_counted if label is None else at.is_counted & (evaluation.true.label == label))
    if not num_true or not len(scores):
        return None
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], np.cumsum(is_right[order])
    kept = np.arange(1, len(scores) + 1)
    f1 = 2 * right / (kept + num_true)
    f1[:-1][scores[1:] == scores[:-1]] = -1  # equal scores are kept together
    best = int(np.argmax(f1))
    values = (scores[best], right[best] / kept[best], right[best] / num_true, f1[best])
    return OperatingPoint(*map(float, values))


def confusion_matrix(evaluation: Evaluation, score: float) -> np.ndarray:
    """Counts detections with at least this score against true objects, at an IoU of 0.5: int64 [K + 1, K + 1].

    Rows are true classes, the last row is "nothing"; columns are found classes, the last column is "nothing" (missed).
    The diagonal holds the correct detections by COCO's matching. The other detections, best score first, are matched
    with the objects of other classes that they overlap most. Ignored detections (on crowds) are left out.
    """
    found, true, at = evaluation.found, evaluation.true, _matches_at_half(evaluation)
    is_kept = (found.scores >= score) & ~at.is_ignored
    right = is_kept & at.is_right
    is_found = np.zeros(len(true.label), bool)
    is_found[at.match[right]] = True
    num_classes = len(evaluation.class_names)
    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    np.add.at(matrix, (found.label[right], found.label[right]), 1)
    rest, missed = np.flatnonzero(is_kept & ~right), np.flatnonzero(at.is_counted & ~is_found)
    rest = rest[np.lexsort((-found.scores[rest], found.image[rest]))]
    rest, missed = _take(found, rest), _take(true, missed)
    pairs = _overlapping(evaluation.kind, rest, missed, groups=(rest.image, missed.image))
    is_missed = np.ones(len(missed.label), bool)
    match = _match(pairs, rest.image, is_missed, ~is_missed)[:, 0]
    np.add.at(matrix, (np.where(match < 0, num_classes, np.append(missed.label, 0)[match]), rest.label), 1)
    is_missed[match[match >= 0]] = False
    np.add.at(matrix, (missed.label[is_missed], num_classes), 1)
    return matrix


class _Matches(NamedTuple):
    """The matches of an Evaluation for objects of all sizes at an IoU of 0.5."""

    match: np.ndarray  # int32 [D]
    is_right: np.ndarray  # bool [D]
    is_ignored: np.ndarray  # bool [D]
    is_counted: np.ndarray  # bool [G]


def _matches_at_half(evaluation):
    match, is_ignored = evaluation.match[0, :, 0], evaluation.is_ignored[0, :, 0]
    return _Matches(match, (match >= 0) & ~is_ignored, is_ignored, evaluation.is_counted[0])


def _take(objects, rows):
    """Selects rows, int64, of Objects."""
    return Objects(*([field[row] for row in rows] if isinstance(field, list) else field[rows] for field in objects))
