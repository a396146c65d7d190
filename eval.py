"""Inference on images and data sets, results in COCO's format, and COCO's metrics.

Shape shorthand: N images of a batch; R detections; H, W height and width of an image; M side of a predicted mask.

The network is a callable `predict(image, image_shape)`, as `load_predictor` makes it: from a batch uint8 [N, H, W, 3]
and int32 [N, 2] (height and width of the part that is image) to modeling.box_head.Detections of NumPy arrays: `boxes`
float32 [R, 4] (x1 y1 x2 y2 in pixels of the batch), `scores` [R], `labels` [R] (1..C), `image_index` [R], and `masks`
float32 [R, M, M] (probabilities inside the box) or None.
"""

import contextlib
import io
import itertools
import json
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from tensorpack.callbacks import Callback
from tensorpack.compat import tfv1 as tf
from tensorpack.utils import logger
from tensorpack.utils.utils import get_tqdm

import boxes
import checkpoint
import data
from config import UserError, config
from modeling import rcnn

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
POST_THREADS = 4
# Finished batches may wait for their post-processing, but not so many that they fill the memory.
MAX_WAITING_IMAGES = 32
# Results keep a thousandth of a pixel; a coarser score would make ties that the network did not make.
BOX_DECIMALS, SCORE_DECIMALS = 3, 6


class EvaluationError(UserError):
    """Results or ground truth that cannot be used: one line that names the file, image or category."""


class NonFiniteError(EvaluationError):
    """The network returned NaN or infinity: the weights have diverged."""

    exit_code = 3


class ImageDetections(NamedTuple):
    """What was found in one image, best first.

    boxes_xyxy: float32 [R, 4], pixels of the original image, clipped to it. scores: float32 [R]. labels: int [R], 1..C.
    masks: bool [R, H, W] at the original size, or None for a model without masks.
    """

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None

    def select(self, keep):
        """The detections that `keep`, bool [R] or indices, picks."""
        masks = None if self.masks is None else self.masks[keep]
        return ImageDetections(self.boxes_xyxy[keep], self.scores[keep], self.labels[keep], masks)


# ---------------------------------------------------------------- images


class Predictor:
    """A trained model, applied to images; made for use in other programs.

        predictor = Predictor("train_log/run")
        for image, found in zip(images, predictor(images)):
            for box, score, label in zip(found.boxes_xyxy, found.scores, found.labels):
                print(predictor.class_names[label - 1], score, box)

    Threads may call one Predictor at the same time: a call is one run of the graph, and nothing else is shared. Models
    of different settings can live in one process, as settings are read when the Predictor is made, not when it is used.

    Attributes:
        class_names: tuple of str, C long. geometry: data.Geometry, the size at which the network sees images.
        network: the callable `predict(image, image_shape)` at the top of this file.
    """

    def __init__(self, checkpoint_path, *, settings=()):
        """
        Args:
            checkpoint_path: a run's folder, a TensorFlow checkpoint or a .npz. The settings are those of the
                config.json beside it.
            settings: texts "KEY=VALUE" that change them, as after --config.

        Raises:
            CheckpointError, ConfigError: what `predict.py` would say.
        """
        path = checkpoint.resolve(checkpoint_path)
        with config.temporary():
            checkpoint.load_config(path, config)
            config.update(settings)
            if not config.DATA.CLASS_NAMES:
                raise UserError(f"DATA.CLASS_NAMES is not set: no {checkpoint.CONFIG_FILE} beside {path} names classes")
            config.DATA.NUM_CATEGORY = len(config.DATA.CLASS_NAMES) - 1
            config.check()
            self._build(path)

    @classmethod
    def configured(cls, checkpoint_path):
        """A Predictor with the settings of the global config as they are, classes included."""
        predictor = cls.__new__(cls)
        predictor._build(checkpoint.resolve(checkpoint_path))
        return predictor

    def _build(self, path):
        self.class_names = tuple(config.DATA.CLASS_NAMES[1:])
        self.geometry = data.inference_geometry()
        self.network = load_predictor(path)

    def __call__(self, images):
        """Returns the ImageDetections of each image, in order: see `predict_images`.

        The images are uint8 [H, W, 3] BGR, as cv2.imread gives them, of any sizes; together they are one batch.
        """
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f"images must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
        return predict_images(self.network, images, geometry=self.geometry)


def load_predictor(checkpoint_path):
    """Returns the callable `predict` (see top) of the configured model with the checkpoint's weights.

    `checkpoint_path` is what `checkpoint.resolve` returns. The session lives as long as the callable.

    Raises:
        CheckpointError: the checkpoint is unreadable or of another model.
    """
    with tf.Graph().as_default() as graph:
        inference = rcnn.Inference()
        session = tf.Session(config=rcnn.session_config())
        _, report = checkpoint.load(checkpoint_path, session, check=checkpoint.check_complete)
        predict = inference.bind(session)
    graph.finalize()
    logger.info("\n".join(report))
    return predict


def predict_images(predict, images, *, geometry=None):
    """Returns the ImageDetections of each image, in order.

    The images are uint8 [H, W, 3] BGR of any sizes. They go through the network as one batch, resized as `geometry`
    (a data.Geometry) says, or else the configuration.
    Boxes come back by one factor for x and one for y: they differ, because the new edges are whole pixels.

    Raises:
        NonFiniteError: the network returned NaN or infinity.
    """
    if not images:
        return []
    batch, input_shapes = (geometry or data.inference_geometry()).batch(images)
    found = predict(batch, input_shapes)
    detections = []
    for index, image in enumerate(images):
        height, width = image.shape[:2]
        name = f"image {index + 1} of {len(images)}"
        one = _of_image(found, index, input_shape=input_shapes[index], height=height, width=width, name=name)
        detections.append(_with_pasted_masks(one, height, width))
    return detections


def _of_image(found, index, *, input_shape, height, width, name):
    """Returns one image's ImageDetections, boxes in original pixels, but masks as predicted: float32 [R, M, M]."""
    rows = np.flatnonzero(np.asarray(found.image_index) == index)
    rows = rows[np.argsort(-found.scores[rows], kind="stable")]
    boxes_xyxy, scores = found.boxes[rows], found.scores[rows]
    if not (np.isfinite(boxes_xyxy).all() and np.isfinite(scores).all()):
        raise NonFiniteError(
            f"{name}: the network returned boxes or scores that are not finite; its weights have diverged"
        )
    boxes_xyxy = boxes.clip(boxes.scale(boxes_xyxy, width / input_shape[1], height / input_shape[0]), height, width)
    masks = None if found.masks is None else found.masks[rows]
    return ImageDetections(boxes_xyxy, scores, found.labels[rows], masks)


def _pasted(detections, height, width):
    """Pastes predicted masks [R, M, M] into the image one by one: all at once, a large photo's would take gigabytes."""
    for mask, box in zip(detections.masks, detections.boxes_xyxy, strict=True):
        yield boxes.paste_mask(mask, box, height, width)


def _with_pasted_masks(detections, height, width):
    if detections.masks is None:
        return detections
    masks = np.zeros((len(detections.scores), height, width), bool)
    for slot, mask in zip(masks, _pasted(detections, height, width), strict=True):
        slot[:] = mask
    return detections._replace(masks=masks)


# ---------------------------------------------------------------- results


def coco_results(image_id, detections, category_ids):
    """Returns one image's detections as a list of dicts in COCO's results format.

    Keys: image_id, category_id, bbox [x, y, width, height] in pixels, score; segmentation (RLE) if there are masks.
    `category_ids[label - 1]` is the category of a label, as in Dataset.category_ids.

    Raises:
        EvaluationError: a label without a category; the model was trained on other classes.
    """
    for label in detections.labels:
        if not 1 <= label <= len(category_ids):
            classes = f"the data set has {len(category_ids)} classes"
            raise EvaluationError(f"image {image_id}: the model found class {label}, but {classes}")
    boxes_xywh = boxes.xyxy_to_xywh(np.asarray(detections.boxes_xyxy, np.float64))
    masks = itertools.repeat(None) if detections.masks is None else detections.masks
    results = []
    for box, score, label, mask in zip(boxes_xywh, detections.scores, detections.labels, masks):
        result = {
            "image_id": image_id,
            "category_id": int(category_ids[label - 1]),
            "bbox": [round(float(value), BOX_DECIMALS) for value in box],
            "score": round(float(score), SCORE_DECIMALS),
        }
        if mask is not None:
            result["segmentation"] = boxes.encode_rle(mask)
        results.append(result)
    return results


def unused_path(path):
    """Returns the path, or the first of NAME-1.EXT, NAME-2.EXT, ... that does not exist."""
    path = Path(path)
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())


class ResultsFile:
    """Writes a COCO results json as the results come; the file has its name only when it is complete.

    Until then it is a hidden file beside it, which a failure removes. A path of None writes nothing.

    Raises:
        EvaluationError: the file exists, without `overwrite`; or it cannot be written.
    """

    def __init__(self, path, *, overwrite=False):
        self._path = None if path is None else Path(path)
        self._overwrite = overwrite
        self._is_empty = True

    def __enter__(self):
        if self._path is None:
            return self
        if self._path.exists() and not self._overwrite:
            raise EvaluationError(f"{self._path} exists already: name another file, or move it away")
        self._part = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._part, "w")
        except OSError as error:
            raise EvaluationError(f"cannot write {self._path}: {error.strerror}") from error
        self._file.write("[")
        return self

    def write(self, results):
        """Appends a list of results (dicts)."""
        if self._path is None:
            return
        for result in results:
            self._file.write("\n" if self._is_empty else ",\n")
            self._file.write(json.dumps(result, allow_nan=False))
            self._is_empty = False

    def __exit__(self, exception_type, exception, traceback):
        if self._path is None:
            return
        try:
            if exception_type is None:
                self._finish()
        finally:
            self._file.close()
            self._part.unlink(missing_ok=True)

    def _finish(self):
        self._file.write("\n]\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if not self._overwrite:  # somebody may have written one while this evaluation was running
            self._path = unused_path(self._path)
        os.replace(self._part, self._path)
        logger.info(f"results: {self._path}")


# ---------------------------------------------------------------- data sets


def evaluate_dataset(predict, dataset, *, output=None, overwrite=False):
    """Runs the network over a data set and returns the metrics of `coco_metrics`, which also go to the log as tables.

    Boxes are evaluated, and masks if the model has them (MODE_MASK). `output` is the path of the results json, or None.

    Raises:
        EvaluationError: `output` exists, without `overwrite`: before anything is computed. Others: see `coco_metrics`.
        ImageError: an image cannot be used.
    """
    records = dataset.records(training=False)
    results = []
    with ResultsFile(output, overwrite=overwrite) as file, get_tqdm(total=len(records), unit="image") as progress:
        for image_results in _results_by_image(predict, data.evaluation_data(records), dataset.category_ids):
            file.write(image_results)
            results.extend(image_results)
            progress.update()
    kinds = tuple(KINDS) if config.MODE_MASK else ("bbox",)
    metrics = coco_metrics(
        results, dataset.annotation_file, image_ids=[record.image_id for record in records], kinds=kinds
    )
    log_metrics(metrics, f"{dataset.name} ({len(records)} images)")
    return metrics


def _results_by_image(predict, batches, category_ids):
    """Yields each image's results in the order of the batches. Threads paste and encode beside the network."""
    pool, waiting = ThreadPoolExecutor(POST_THREADS), deque()
    try:
        for records, batch in batches:
            found = predict(batch["image"], batch["image_shape"])
            for index, record in enumerate(records):
                input_shape = batch["image_shape"][index]
                waiting.append(pool.submit(_record_results, found, index, input_shape, record, category_ids))
            while len(waiting) > MAX_WAITING_IMAGES or (waiting and waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _record_results(found, index, input_shape, record, category_ids):
    size = {"height": record.height, "width": record.width}
    detections = _of_image(found, index, input_shape=input_shape, **size, name=f"image {record.image_id}")
    if detections.masks is not None:
        detections = detections._replace(masks=_pasted(detections, **size))
    return coco_results(record.image_id, detections, category_ids)


# ---------------------------------------------------------------- metrics


def coco_metrics(results, annotation_file, *, image_ids=None, kinds=tuple(KINDS)):
    """COCO's average precision of results (a list of dicts as from `coco_results`).

    Returns {"mAP(KIND)/METRIC": value} for each kind (bbox, segm) and each of METRICS; their definition is at
    https://cocodataset.org/#detection-eval. Values lie in [0, 1]. NaN means that there is no ground truth to find;
    where there is but nothing was found, it is 0, with a warning. A found object's size is its box's area for bbox, its
    mask's for segm. `image_ids` limits all to some of the file's images.

    Raises:
        EvaluationError: results of an image or category that the ground truth does not have, or not finite; or a
            ground truth that cannot be used.
    """
    truth = _load_truth(annotation_file)
    image_ids = set(truth["images"]) if image_ids is None else set(image_ids)
    _check_results(results, truth, annotation_file)
    results = [result for result in results if result["image_id"] in image_ids]
    truth["annotations"] = [each for each in truth["annotations"] if each["image_id"] in image_ids]
    if not results:
        logger.warning(f"nothing was found in {len(image_ids)} images: where there is ground truth, AP is 0")
    metrics = {}
    for kind in kinds:
        values = _average_precision(kind, truth, results, image_ids)
        metrics |= {f"mAP({kind})/{name}": value for name, value in values.items()}
    return metrics


def log_metrics(metrics, title):
    """Writes one table for each kind in `metrics` to the log, and says what n/a means where it occurs."""
    for kind, word in KINDS.items():
        values = [metrics.get(f"mAP({kind})/{name}") for name in METRICS]
        if None in values:
            continue
        cells = ["n/a" if math.isnan(value) else f"{value:.3f}" for value in values]
        headers = [short for _, _, short in METRICS.values()]
        table = tabulate([cells], headers, tablefmt="simple_outline", stralign="right", disable_numparse=True)
        note = "\nn/a: the ground truth has no objects of this kind and size" if "n/a" in cells else ""
        logger.info(f"{word} AP on {title}\n{table}{note}")


def _load_truth(annotation_file):
    """Returns what the metrics need of a COCO json: images {id: (height, width)}, category ids, and annotations.

    Annotations get ids from 1 on (pycocotools takes 0 for "not matched"), and what some files lack: iscrowd and area.
    """
    try:
        with open(annotation_file) as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read the ground truth {annotation_file}: {error}") from error
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        raise EvaluationError(f"{annotation_file} is no COCO ground truth: it has no {', '.join(missing)}")
    images = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    annotations = [{"iscrowd": 0, **each, "id": number} for number, each in enumerate(content["annotations"], start=1)]
    for annotation in annotations:
        if annotation.get("area") is None:
            rle = _true_mask(annotation, images)
            annotation["area"] = float(mask_util.area(rle) if rle else annotation["bbox"][2] * annotation["bbox"][3])
    return {"images": images, "categories": {each["id"] for each in content["categories"]}, "annotations": annotations}


def _true_mask(annotation, images):
    """Returns a ground truth annotation's mask as COCO's compressed RLE, or None; `images` is {id: (height, width)}."""
    try:
        return _to_rle(annotation.get("segmentation"), *images[annotation["image_id"]])
    except ValueError as error:
        raise EvaluationError(f"ground truth of image {annotation['image_id']}: {error}") from error


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


def _check_results(results, truth, annotation_file):
    unknown = {result["category_id"] for result in results} - truth["categories"]
    if unknown:
        raise EvaluationError(f"results have categories {_listed(unknown)}, which are not in {annotation_file}")
    unknown = {result["image_id"] for result in results} - set(truth["images"])
    if unknown:
        raise EvaluationError(f"results have images {_listed(unknown)}, which are not in {annotation_file}")
    for result in results:
        if not all(map(math.isfinite, (result["score"], *result.get("bbox", ())))):
            raise NonFiniteError(f"results of image {result['image_id']} have a number that is not finite")


def _listed(ids):
    ids = sorted(ids)
    return ", ".join(map(str, ids[:10])) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")


def _average_precision(kind, truth, results, image_ids):
    """Returns {name in METRICS: value} of one kind."""
    annotations = _true_objects(kind, truth)
    if all(annotation["iscrowd"] for annotation in annotations):
        logger.warning(f"no ground truth for {KINDS[kind]} AP in {len(image_ids)} images: it is undefined (NaN)")
        return dict.fromkeys(METRICS, math.nan)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(truth, annotations), _index(truth, _found_objects(kind, results)), kind)
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    return {name: _mean_precision(evaluation, threshold, size) for name, (threshold, size, _) in METRICS.items()}


def _mean_precision(evaluation, threshold, size):
    """Mean over thresholds, recalls and the classes that occur; NaN where none does (pycocotools marks them -1)."""
    params = evaluation.params
    precision = evaluation.eval["precision"][:, :, :, params.areaRngLbl.index(size), -1]
    if threshold is not None:
        precision = precision[np.isclose(params.iouThrs, threshold)]
    precision = precision[precision > -1]
    return float(precision.mean()) if precision.size else math.nan


def _true_objects(kind, truth):
    """Returns copies of the ground truth's annotations, which pycocotools will change, with masks as RLE."""
    if kind == "bbox":
        return [dict(annotation) for annotation in truth["annotations"]]
    annotations = [{**each, "segmentation": _true_mask(each, truth["images"])} for each in truth["annotations"]]
    with_masks = [annotation for annotation in annotations if annotation["segmentation"]]
    if len(with_masks) < len(annotations):
        logger.warning(
            f"{len(annotations) - len(with_masks)} ground truth objects have no mask: mask AP leaves them out"
        )
    return with_masks


def _found_objects(kind, results):
    """Returns the results as pycocotools wants them. For masks without "bbox": with it, the area would be the box's."""
    if kind == "bbox":
        areas = (result["bbox"][2] * result["bbox"][3] for result in results)
    else:
        results = [result for result in results if "segmentation" in result]
        areas = (float(mask_util.area(result["segmentation"])) for result in results)
    shape = "bbox" if kind == "bbox" else "segmentation"
    return [
        {key: result[key] for key in ("image_id", "category_id", "score", shape)}
        | {"id": number, "area": area, "iscrowd": 0}
        for number, (result, area) in enumerate(zip(results, areas, strict=True), start=1)
    ]


def _index(truth, annotations):
    """Returns pycocotools' object for annotations (true or found ones) on the images and categories of `truth`."""
    coco = COCO()
    images = [{"id": id_, "height": height, "width": width} for id_, (height, width) in truth["images"].items()]
    categories = [{"id": id_} for id_ in sorted(truth["categories"])]
    coco.dataset = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
    coco.createIndex()
    return coco


# ---------------------------------------------------------------- during training


class EvalCallback(Callback):
    """Evaluates every `period_epochs` epochs and after the last one.

    Metrics go to the trainer's monitors as NAME-METRIC (NAME: the data set), results to OUTPUT_DIR/NAME-STEP.json.
    """

    def __init__(self, build_inference, datasets, *, period_epochs, output_dir):
        """
        Args:
            build_inference: called while the graph is built; returns an object whose `bind(session)` is a `predict`
                (see top) with the variables of the training: modeling.rcnn.Inference.
            datasets: list of Datasets.
            period_epochs: 0 means only after the last epoch.
            output_dir: folder for the results.
        """
        self._build_inference = build_inference
        self._datasets = datasets
        self._period = period_epochs
        self._output_dir = Path(output_dir)

    def _setup_graph(self):
        self._inference = self._build_inference()

    def _before_train(self):
        self._predict = self._inference.bind(self.trainer.sess)

    def _trigger_epoch(self):
        is_last = self.epoch_num == self.trainer.max_epoch
        if is_last or (self._period > 0 and self.epoch_num % self._period == 0):
            for dataset in self._datasets:
                self._evaluate(dataset)

    def _evaluate(self, dataset):
        # A run that was resumed from before this step has been here already: its results stay.
        output = unused_path(self._output_dir / f"{dataset.name}-{self.global_step}.json")
        for name, value in evaluate_dataset(self._predict, dataset, output=output).items():
            if not math.isnan(value):  # not a number of any monitor's format; the log has said why
                self.trainer.monitors.put_scalar(f"{dataset.name}-{name}", value)
