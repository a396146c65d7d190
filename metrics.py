"""COCO's metrics: how well results, a list of dicts in COCO's results format, agree with a ground truth file.

    (box, mask) = evaluate("instances_val2017.json", results, kinds=("bbox", "segm"))
    box.metrics()["mAP(bbox)/IoU=0.5:0.95"]

The definition is at https://cocodataset.org/#detection-eval, the numbers are pycocotools', computed for all images at
once (NOTES.md says how much faster). Results may come from one process, from several whose lists were joined in any
order, or from a file.

Shape shorthand: D found objects ("detections"), G true ones; K classes of the ground truth, by ascending category id;
T IoU thresholds; S ranges of sizes; R recalls.
"""

import json
import math
from typing import NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from tensorpack.utils import logger

import boxes
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
MAX_DETECTIONS = 100  # of a class in an image; the best count
RLES_AT_ONCE = 300  # what fits into a processor's cache


class EvaluationError(UserError):
    """Results or ground truth that cannot be used: one line that names the file, image or category."""


class NonFiniteError(EvaluationError):
    """The network returned NaN or infinity: the weights have diverged."""

    exit_code = 3


class Truth(NamedTuple):
    """What the metrics need of a COCO ground truth.

    file: its path. images: {id: (height, width)}. class_names: {category id: name}, by ascending id. annotations: list
    of dicts as in the file, with `iscrowd` and `area` where the file lacks them.
    """

    file: object
    images: dict
    class_names: dict
    annotations: list


class Objects(NamedTuple):
    """True or found objects. Rows of true ones are as in the file; rows of found ones by class, image and score.

    image, label: int64, index among the sorted image ids and category ids. area: float64, in square pixels. shape:
    float64 [n, 4] (x, y, width, height) or a list of compressed RLEs. is_crowd: bool. scores: float64, 0 of true ones.
    """

    image: np.ndarray
    label: np.ndarray
    area: np.ndarray
    shape: np.ndarray | list
    is_crowd: np.ndarray
    scores: np.ndarray


class Evaluation(NamedTuple):
    """How found objects agree with true ones, by box or by mask.

    kind: "bbox" or "segm". class_names: K names. num_images. true, found: Objects.
    match: int32 [S, D, T], the true object that a found one was matched with, or -1. is_ignored: bool [S, D, T], of
    found ones that count neither as right nor as wrong. is_counted: bool [S, G], of true ones that are to be found.
    precision, scores: float64 [T, R, K, S]: the best precision at a recall or a higher one, 0 where that is not
    reached, and the score at which it is; NaN for classes without true objects.
    """

    kind: str
    class_names: tuple
    num_images: int
    true: Objects
    found: Objects
    match: np.ndarray
    is_ignored: np.ndarray
    is_counted: np.ndarray
    precision: np.ndarray
    scores: np.ndarray

    def average_precision(self, name, label=None):
        """AP in [0, 1] by a name in METRICS: of one class, or the mean over the classes that occur. NaN: none does."""
        threshold, size, _ = METRICS[name]
        precision = self.precision[..., list(SIZES).index(size)]
        precision = precision[:, :, slice(None) if label is None else [label]]
        if threshold is not None:
            precision = precision[np.isclose(IOU_THRESHOLDS, threshold)]
        occurs = ~np.isnan(precision)
        return float(precision[occurs].mean()) if occurs.any() else math.nan

    def metrics(self):
        """{"mAP(KIND)/NAME": value} for each name in METRICS."""
        return {f"mAP({self.kind})/{name}": self.average_precision(name) for name in METRICS}


class OperatingPoint(NamedTuple):
    """What one gets by keeping only what was found with at least this score; all in [0, 1], at an IoU of 0.5."""

    score: float
    precision: float
    recall: float
    f1: float


def evaluate(truth, results, *, image_ids=None, kinds=tuple(KINDS)):
    """Compares results with a ground truth; returns an Evaluation for each of `kinds` ("bbox", "segm").

    `truth` is the path of a COCO json, or what `load_truth` makes of it. A found object's size is its box's area for
    "bbox", its mask's for "segm". `image_ids` limits all to some of the file's images.

    Raises:
        EvaluationError: results of an image or category that the ground truth does not have, not finite, or not in
            COCO's format; or a ground truth that cannot be used.
    """
    truth = truth if isinstance(truth, Truth) else load_truth(truth)
    image_ids = set(truth.images) if image_ids is None else set(image_ids)
    _check_ids(results, truth)
    results = [result for result in results if result["image_id"] in image_ids]
    truth = truth._replace(annotations=[each for each in truth.annotations if each["image_id"] in image_ids])
    if not results:
        logger.warning(f"nothing was found in {len(image_ids)} images: where there is ground truth, AP is 0")
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


def load_truth(annotation_file):
    """Returns the Truth in a COCO json.

    Raises:
        EvaluationError: unreadable, or no COCO ground truth.
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


def load_results(path):
    """Returns the results in a COCO results json, a list of dicts.

    Raises:
        EvaluationError: unreadable, or not in COCO's results format.
    """
    results = _read_json(path, "the results")
    needed = {"image_id", "category_id", "score"}
    if not isinstance(results, list):
        raise EvaluationError(f"{path} holds no COCO results: they are a list")
    for number, result in enumerate(results, start=1):
        if not isinstance(result, dict) or not needed <= result.keys():
            raise EvaluationError(f"{path}: result {number} is no dict with {', '.join(sorted(needed))}")
    return results


def _read_json(path, what):
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read {what} {path}: {error}") from error


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
    """Objects by class, image and falling score; equal scores in the order of the results, as pycocotools has it."""
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
    """The image's and the class's index of annotations or results, int64 each."""
    images = {image_id: index for index, image_id in enumerate(image_ids)}
    labels = {category_id: index for index, category_id in enumerate(truth.class_names)}
    return (
        np.array([images[each["image_id"]] for each in dicts], np.int64),
        np.array([labels[each["category_id"]] for each in dicts], np.int64),
    )


def _rank(groups):
    """For each of some sorted numbers, how many equal ones stand before it."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups)


def _true_mask(annotation, images):
    """Returns a ground truth annotation's mask as COCO's compressed RLE, or None; `images` is {id: (height, width)}."""
    try:
        return _to_rle(annotation.get("segmentation"), *images[annotation["image_id"]])
    except ValueError as error:
        raise EvaluationError(f"ground truth of image {annotation['image_id']}: {error}") from error


def _found_mask(result, images):
    """Returns a result's mask as COCO's compressed RLE; its counts are only checked by `_mask_areas`."""
    segmentation, (height, width) = result["segmentation"], images[result["image_id"]]
    is_text = isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), str)
    if is_text and segmentation.get("size") == [height, width]:
        return segmentation
    try:
        rle = _to_rle(segmentation, height, width)
    except ValueError as error:
        raise EvaluationError(f"results of image {result['image_id']}: {error}") from error
    return rle or boxes.encode_rle(np.zeros((height, width)))


def _to_rle(segmentation, height, width):
    """Returns COCO's compressed RLE of a json segmentation; None where there is none, or none with an area."""
    if isinstance(segmentation, dict):
        return boxes.compress_rle(segmentation, height, width)
    # Fewer than three points: no area, and pycocotools would take two for a box.
    polygons = [polygon for polygon in segmentation or () if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not polygons:
        return None
    reach = 2 * max(height, width)
    if all(-reach < value < reach for polygon in polygons for value in polygon):
        return mask_util.merge(mask_util.frPyObjects(polygons, height, width))
    # pycocotools crashes on huge coordinates: the slow way cuts them off.
    points = [np.array(polygon, np.float64).reshape(-1, 2) for polygon in polygons]
    return boxes.encode_rle(boxes.segmentation_to_mask(points, height, width))


def _mask_areas(rles, results):
    """float64 [D]. Raises EvaluationError where the runs of an RLE do not add up to its image."""
    areas = [np.zeros(0, np.int64)]
    for start in range(0, len(rles), RLES_AT_ONCE):
        block = rles[start : start + RLES_AT_ONCE]
        try:
            areas.append(boxes.rle_areas(block))
        except ValueError as error:
            images = sorted({result["image_id"] for result in results[start : start + RLES_AT_ONCE]})
            raise EvaluationError(f"results of image {images[0]} (or of up to {images[-1]}): {error}") from error
    return np.concatenate(areas).astype(np.float64)


# ---------------------------------------------------------------- who is who


def _overlapping(kind, found, true, *, groups):
    """Pairs of a found and a true object in the same group whose IoU reaches the lowest threshold.

    Args:
        groups: int64 [D] and [G], the group of each found and each true object; the found ones' ascending.
    Returns:
        (found index, true index, IoU), arrays of one length, by found index, then by true index. For crowds the IoU is
        the intersection over the found object's area.
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
    """IoU of pairs of boxes (x, y, width, height), float64 [P]; in pycocotools' order of operations."""
    corner = np.maximum(found[:, :2], true[:, :2])
    sides = np.minimum(found[:, :2] + found[:, 2:], true[:, :2] + true[:, 2:]) - corner
    common = np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0)
    found_area = found[:, 2] * found[:, 3]
    union = np.where(is_crowd, found_area, found_area + true[:, 2] * true[:, 3] - common)
    return np.divide(common, union, out=np.zeros_like(common), where=common > 0)


def _mask_overlap(found, true, groups, true_order, starts, stops):
    """IoU of all pairs of masks of a group, float64 [P]: one call of pycocotools for each group."""
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
    """COCO's greedy matching: each found object, best score first, gets the free true object that it overlaps most.

    Those that are to be found come before those that are not (crowds, other sizes); of equal overlaps the last one
    wins. Crowds stay free. The objects of all groups that are first in their group are matched at once, then all that
    are second, and so on.

    Args:
        pairs: from `_overlapping`. groups: int64 [D], of the found objects. is_counted, is_crowd: bool [G].
    Returns:
        int32 [D, T]: index of the true object, or -1.
    """
    found, true, overlap = pairs
    match = np.full((len(groups), len(IOU_THRESHOLDS)), -1, np.int32)
    if not len(found):
        return match
    order = np.lexsort((overlap, is_counted[true], found))  # within a found object, the best comes last
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
    """The `precision` and `scores` of an Evaluation, float64 [T, R, K, S] each."""
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
            # pycocotools' smallest float in the denominator, for equal numbers.
            best = np.maximum.accumulate((right / (right + wrong + np.spacing(1)))[:, ::-1], axis=1)[:, ::-1]
            for threshold, recall in enumerate(right / num_true):
                place = np.searchsorted(recall, RECALLS)
                reached = place[place < len(rows)]
                precision[threshold, :, label, size] = scores[threshold, :, label, size] = 0
                precision[threshold, : len(reached), label, size] = best[threshold, reached]
                scores[threshold, : len(reached), label, size] = found.scores[rows[reached]]
    return precision, scores


# ---------------------------------------------------------------- at one score


def best_operating_point(evaluation, label=None):
    """The OperatingPoint of highest F1, of one class or of all together; None where there is nothing to find or found.

    It is of the objects themselves, not of COCO's interpolated curves.
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


def confusion_matrix(evaluation, score):
    """What was found with at least this score against what is there, int64 [K + 1, K + 1].

    Rows are true classes, the last one is nothing; columns are found classes, the last one is nothing (missed). At an
    IoU of 0.5. The diagonal holds the right ones as COCO counts them; of what is left over, the best score first, each
    is put to the object of another class that it overlaps most. Ignored ones (crowds) are left out.
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
    everything = np.ones(len(missed.label), bool)
    match = _match(pairs, rest.image, everything, ~everything)[:, 0]
    np.add.at(matrix, (np.where(match < 0, num_classes, np.append(missed.label, 0)[match]), rest.label), 1)
    everything[match[match >= 0]] = False
    np.add.at(matrix, (missed.label[everything], num_classes), 1)
    return matrix


class _Matches(NamedTuple):
    """What an Evaluation says of objects of all sizes at an IoU of 0.5; arrays [D], is_counted [G]."""

    match: np.ndarray
    is_right: np.ndarray
    is_ignored: np.ndarray
    is_counted: np.ndarray


def _matches_at_half(evaluation):
    match, is_ignored = evaluation.match[0, :, 0], evaluation.is_ignored[0, :, 0]
    return _Matches(match, (match >= 0) & ~is_ignored, is_ignored, evaluation.is_counted[0])


def _take(objects, rows):
    """The Objects of these rows, int64."""
    return Objects(*([field[row] for row in rows] if isinstance(field, list) else field[rows] for field in objects))
