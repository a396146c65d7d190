#!/usr/bin/env -S sh -c 'TF_CPP_MIN_LOG_LEVEL=2 exec "$(dirname "$(readlink -f "$0")")/setup/python" "$0" "$@"'
"""Inference on images and data sets, and results in COCO's format.

    ./eval.py RESULTS.json ANNOTATIONS.json           COCO's metrics of results that are there already

Shape shorthand: N images of a batch; R detections; H, W height and width of an image; M side of a predicted mask.

The network is a callable `predict(image, image_shape)`, as `load_predictor` makes it: from a batch uint8 [N, H, W, 3]
and int32 [N, 2] (height and width of the part that is image) to modeling.box_head.Detections of NumPy arrays: `boxes`
float32 [R, 4] (x1 y1 x2 y2 in pixels of the batch), `scores` [R], `labels` [R] (1..C), `image_index` [R], and `masks`
float32 [R, M, M] (probabilities inside the box) or None.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tensorpack.callbacks import Callback
from tensorpack.compat import tfv1 as tf
from tensorpack.utils import logger
from tensorpack.utils.utils import get_tqdm

import boxes
import checkpoint
import data
import metrics
import report
import sessions
import tta
from checkpoint import unused_path
from config import UserError, config, uses_augmentation
from metrics import EvaluationError, NonFiniteError
from ranks import Ranks

POST_THREADS = 4
BATCHES_AHEAD = 2  # what the network may have done before its results are asked for; bounds the memory
ONE_PROCESS = Ranks()
# Results keep a thousandth of a pixel; a coarser score would make ties that the network did not make.
BOX_DECIMALS, SCORE_DECIMALS = 3, 6


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
    The process keeps the memory that it frees: see `load_predictor`.

    Attributes:
        class_names: tuple of str, C long.
        category_ids: tuple of int, those of the training data, or 1..C where they are not known.
        geometry: data.Geometry, the size at which the network sees images.
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
            checkpoint.load_config(path, config, overrides=settings)
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
        self.category_ids = config.DATA.CATEGORY_IDS or tuple(range(1, len(self.class_names) + 1))
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

    `checkpoint_path` is what `checkpoint.resolve` returns. The session lives as long as the callable. From now on the
    process keeps the memory that it frees.

    Raises:
        CheckpointError: the checkpoint is unreadable or of another model.
    """
    sessions.keep_freed_memory()
    with tf.Graph().as_default():
        inference = sessions.Inference()
        session = tf.Session(config=sessions.session_config())
        _, lines = checkpoint.load(checkpoint_path, session, check=checkpoint.check_complete)
    logger.info("\n".join(lines))
    return with_augmentation(inference.bind(session))


def with_augmentation(predict):
    """`predict`, or what the settings of test-time augmentation make of it: see tta.py."""
    if not uses_augmentation(config):
        return predict
    _, multiple = data.network_geometry()
    return tta.augmented(
        predict,
        scales=config.TEST.TTA_SCALES,
        flip=config.TEST.TTA_FLIP,
        multiple=multiple,
        iou_threshold=config.TEST.FRCNN_NMS_THRESH,
        max_per_image=config.TEST.RESULTS_PER_IM,
    )


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
    check_finite(name, boxes_xyxy, scores)
    boxes_xyxy = boxes.clip(boxes.scale(boxes_xyxy, width / input_shape[1], height / input_shape[0]), height, width)
    masks = None if found.masks is None else found.masks[rows]
    return ImageDetections(boxes_xyxy, scores, found.labels[rows], masks)


def check_finite(name, *arrays):
    """Raises NonFiniteError if an array of what the network returned has NaN or infinity. `name`: of the image."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise NonFiniteError(
            f"{name}: the network's numbers are not finite: its weights have diverged, or overflow (in float16)"
        )


def _with_pasted_masks(detections, height, width):
    if detections.masks is None:
        return detections
    return detections._replace(masks=boxes.paste_masks(detections.masks, detections.boxes_xyxy, height, width))


# ---------------------------------------------------------------- results


def coco_results(image_id, detections, category_ids, *, rles=None):
    """Returns one image's detections as a list of dicts in COCO's results format.

    Keys: image_id, category_id, bbox [x, y, width, height] in pixels, score; segmentation (RLE) if there are masks.
    `category_ids[label - 1]` is the category of a label, as in Dataset.category_ids. `rles`: the masks encoded, by who
    has no use for them as pixels; otherwise they are encoded here.

    Raises:
        EvaluationError: a label without a category; the model was trained on other classes.
    """
    for label in detections.labels:
        if not 1 <= label <= len(category_ids):
            classes = f"the data set has {len(category_ids)} classes"
            raise EvaluationError(f"image {image_id}: the model found class {label}, but {classes}")
    boxes_xywh = boxes.xyxy_to_xywh(np.asarray(detections.boxes_xyxy, np.float64))
    if rles is None:
        rles = itertools.repeat(None) if detections.masks is None else map(boxes.encode_rle, detections.masks)
    results = []
    for box, score, label, rle in zip(boxes_xywh, detections.scores, detections.labels, rles):
        result = {
            "image_id": image_id,
            "category_id": int(category_ids[label - 1]),
            "bbox": [round(float(value), BOX_DECIMALS) for value in box],
            "score": round(float(score), SCORE_DECIMALS),
        }
        if rle is not None:
            result["segmentation"] = rle
        results.append(result)
    return results


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


def evaluate_dataset(
    predict,
    dataset,
    *,
    output=None,
    overwrite=False,
    ranks=ONE_PROCESS,
    num_parallel=1,
    before_batch=None,
    **report_options,
):
    """Runs the network over a data set and returns its metrics, {name: value}, which also go to the log as tables.

    Boxes are evaluated, and masks if the model has them (MODE_MASK). `output` is the path of the results json, or None.
    Of several `ranks` each predicts its share of the batches; rank 0 gets all results, writes the file and returns the
    metrics, the others return None. `num_parallel` threads call `predict`; `before_batch` is called before each batch,
    equally often on all ranks. `report_options` are those of `evaluate_results`.

    Raises:
        EvaluationError: `output` exists, without `overwrite`, or can't be written: one process says so before anything
            is computed, several once they have exchanged their results. Others: see `metrics.evaluate`.
        ImageError: an image cannot be used.
    """
    records = dataset.records(training=False)
    batches = data.evaluation_data(records, shard_index=ranks.rank, num_shards=ranks.size)
    results, stopwatch, is_alone = [], Stopwatch(), ranks.size == 1
    file = ResultsFile(output if ranks.rank == 0 else None, overwrite=overwrite)
    with (
        file if is_alone else contextlib.nullcontext(),
        get_tqdm(total=len(records), unit="image", disable=ranks.rank > 0) as progress,
    ):
        in_step = _in_step(batches, before_batch)
        options = {"num_parallel": num_parallel, "stopwatch": stopwatch}
        for image_results in results_of(predict, in_step, dataset.category_ids, **options):
            if is_alone:
                file.write(image_results)
            results.extend(image_results)
            progress.update(ranks.size)
    if not is_alone:
        parts = ranks.gather(results, chief_only=True)
        if ranks.rank > 0:
            return None
        results = _in_order(parts, batches.image_ids())
        with file:  # not before: where it can't be written, no rank must be waiting for this one
            file.write(results)
    with stopwatch.measure("metrics"):
        values = evaluate_results(results, dataset, **report_options)
    logger.info(f"{dataset.name}: {stopwatch.describe(len(records))}")
    return values


def evaluate_results(results, dataset, *, per_class=False, report_folder=None):
    """Compares all results of a data set with its ground truth: metrics, {name: value}, and tables in the log.

    Args:
        results: list of dicts in COCO's results format, joined in any order. per_class: tables of classes, too.
        report_folder: a new folder for what `report.write` makes, or None.
    """
    kinds = tuple(metrics.KINDS) if config.MODE_MASK else ("bbox",)
    evaluations = metrics.evaluate(dataset.annotation_file, results, image_ids=dataset.image_ids, kinds=kinds)
    title = f"{dataset.name} ({len(dataset.image_ids)} images)"
    return _told(evaluations, title, per_class=per_class, report_folder=report_folder)


def evaluate_file(path, annotation_file, *, per_class=False, report_folder=None):
    """`evaluate_results` of a results json, by box or mask or both, whatever it has, on all images of the annotations.

    Raises:
        EvaluationError: see `metrics.load_results` and `metrics.evaluate`.
    """
    results = metrics.load_results(path)
    shapes = {"bbox": "bbox", "segm": "segmentation"}
    kinds = [kind for kind, key in shapes.items() if not results or any(key in result for result in results)]
    if not kinds:
        raise EvaluationError(f"{path}: the results have neither bbox nor segmentation")
    evaluations = metrics.evaluate(annotation_file, results, kinds=kinds)
    num_images, num_seen = evaluations[0].num_images, len({result["image_id"] for result in results})
    if num_seen < num_images:
        logger.warning(f"results in {num_seen} of {num_images} images: what is in the others counts as missed")
    return _told(evaluations, f"{path} ({num_images} images)", per_class=per_class, report_folder=report_folder)


def _told(evaluations, title, *, per_class, report_folder):
    """Writes log and report of Evaluations; returns their metrics."""
    report.log(evaluations, title, per_class=per_class)
    if report_folder:
        report.write(evaluations, report_folder)
    return {name: value for each in evaluations for name, value in each.metrics().items()}


def _in_step(batches, before_batch):
    """Yields the batches, and calls a function before each; for a shard that has one less than others once more."""
    rounds = batches.num_rounds() if before_batch else 0
    for batch in batches:
        if before_batch:
            before_batch()
            rounds -= 1
        yield batch
    for _ in range(rounds):
        before_batch()


def _in_order(parts, image_ids):
    """Joins lists of results, of images that are in one list each, in the order of the images."""
    place = {image_id: number for number, image_id in enumerate(image_ids)}
    return sorted(itertools.chain.from_iterable(parts), key=lambda result: place[result["image_id"]])


def results_of(predict, batches, category_ids, *, num_parallel=1, stopwatch=None):
    """Runs the network over batches, as of data.evaluation_data; yields each image's list of results, in their order.

    Three things go on at once: images of coming batches are loaded, `num_parallel` threads run the network, and more
    threads turn what it found into results.
    """
    stopwatch = stopwatch or Stopwatch()
    with ThreadPoolExecutor(POST_THREADS) as pool:

        def run(item):
            batch_records, batch = item
            with stopwatch.measure("network", num_parallel):
                found = predict(batch["image"], batch["image_shape"])
            return [
                pool.submit(_record_results, stopwatch, found, index, batch["image_shape"][index], record, category_ids)
                for index, record in enumerate(batch_records)
            ]

        num_ahead = BATCHES_AHEAD + num_parallel - 1
        ahead = data.map_ahead(run, batches, num_threads=num_parallel, num_ahead=num_ahead)
        with contextlib.closing(ahead):
            for futures in ahead:
                for future in futures:
                    yield future.result()


def _record_results(stopwatch, found, index, input_shape, record, category_ids):
    size = {"height": record.height, "width": record.width}
    with stopwatch.measure("results"):
        detections = _of_image(found, index, input_shape=input_shape, **size, name=f"image {record.image_id}")
        rles = None if detections.masks is None else boxes.paste_rle(detections.masks, detections.boxes_xyxy, **size)
        return coco_results(record.image_id, detections, category_ids, rles=rles)


class Stopwatch:
    """Adds up how long the parts of an evaluation take, from now on. Threads may measure at the same time."""

    def __init__(self):
        self._start = time.perf_counter()
        self._seconds = Counter()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def measure(self, part, num_parallel=1):
        """Adds what the `with` block takes to a part: network, metrics, or results (beside the network).

        Of a block that runs `num_parallel` times at once, each counts for its share.
        """
        start = time.perf_counter()
        yield
        with self._lock:
            self._seconds[part] += (time.perf_counter() - start) / num_parallel

    def describe(self, num_images):
        """The shares of the time that has passed, in words."""
        total = time.perf_counter() - self._start
        network, scoring = self._seconds["network"], self._seconds["metrics"]
        rest = total - network - scoring
        shares = {"network": network, "waiting for images and results": rest, "metrics": scoring}
        listed = ", ".join(f"{name} {max(0, seconds) / total:.1%}" for name, seconds in shares.items())
        beside = f"{self._seconds['results']:.1f} s of masks and results beside the network"
        return f"{num_images} images in {total:.1f} s: {listed}; {beside}"


# ---------------------------------------------------------------- during training


class EvalCallback(Callback):
    """Evaluates every `period_epochs` epochs and after the last one, on all ranks together.

    Metrics go to the trainer's monitors as NAME-METRIC (NAME: the data set), results to OUTPUT_DIR/NAME-STEP.json.
    """

    _chief_only = False

    def __init__(
        self,
        build_inference,
        datasets,
        *,
        period_epochs,
        output_dir,
        ranks,
        num_parallel,
        before_batch,
        offer,
        draw=None,
    ):
        """
        Args:
            build_inference: called while the graph is built; returns an object whose `bind(session)` is a `predict`
                (see top) with the variables of the training: sessions.Inference.
            datasets: list of Datasets.
            period_epochs: 0 means only after the last epoch.
            output_dir: folder for the results.
            ranks: Ranks, which share the work. num_parallel: how many threads may call `predict` at once.
            before_batch: called before each batch; may raise, to end the training.
            offer: called with the name and the value of the first data set's AP, of masks if the model has them.
            draw: None, or a function (predict, dataset) that yields (name, picture uint8 [H, W, 3] RGB) to show.
        """
        self._build_inference = build_inference
        self._datasets = datasets
        self._period = period_epochs
        self._output_dir = Path(output_dir)
        self._offer, self._draw = offer, draw
        self._options = {"ranks": ranks, "num_parallel": num_parallel, "before_batch": before_batch}

    def _setup_graph(self):
        self._inference = self._build_inference()

    def _before_train(self):
        self._predict = with_augmentation(self._inference.bind(self.trainer.sess))

    def _trigger_epoch(self):
        is_last = self.epoch_num == self.trainer.max_epoch
        if is_last or (self._period > 0 and self.epoch_num % self._period == 0):
            values = [self._evaluate(dataset) for dataset in self._datasets]
            if values and values[0] is not None:
                name = f"mAP({'segm' if config.MODE_MASK else 'bbox'})/IoU=0.5:0.95"
                self._offer(f"{self._datasets[0].name}-{name}", values[0][name])

    def _evaluate(self, dataset):
        # A run that was resumed from before this step has been here already: its results stay.
        output = unused_path(self._output_dir / f"{dataset.name}-{self.global_step}.json")
        try:
            values = evaluate_dataset(self._predict, dataset, output=output, **self._options)
        except (OSError, EvaluationError) as error:  # a full disk, say: the training goes on
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            logger.warning(f"{dataset.name} could not be evaluated, its results can't be written: {cause.strerror}")
            return None
        for name, value in (values or {}).items():
            if not math.isnan(value):  # not a number of any monitor's format; the log has said why
                self.trainer.monitors.put_scalar(f"{dataset.name}-{name}", value)
        if self._draw and self._options["ranks"].rank == 0:
            for name, picture in self._draw(self._predict, dataset):
                self.trainer.monitors.put_image(name, picture)
        return values


# ---------------------------------------------------------------- results that are there already


def main(arguments=None):
    parser = argparse.ArgumentParser(description="COCO's metrics of results.")
    parser.add_argument("results", metavar="RESULTS.json", help="in COCO's results format, with bbox or segmentation")
    parser.add_argument("annotations", metavar="ANNOTATIONS.json", help="the ground truth: COCO's instances_*.json")
    parser.add_argument("--per-class", action="store_true", help="a table of classes, too")
    parser.add_argument("--report", type=Path, metavar="DIR", help="new folder for pictures and numbers")
    arguments = parser.parse_args(arguments)
    if arguments.report:
        report.make_folder(arguments.report)
    options = dict(per_class=arguments.per_class, report_folder=arguments.report)
    evaluate_file(arguments.results, arguments.annotations, **options)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
