#!/usr/bin/env -S sh -c 'TF_CPP_MIN_LOG_LEVEL=2 exec "$(dirname "$(readlink -f "$0")")/setup/python" "$0" "$@"'
"""Evaluates data sets, and files of results.

    ./eval.py RESULTS.json ANNOTATIONS.json           COCO's metrics of a results file

`network` is a function of a batch: see inference/graph.py.
"""

import argparse
import contextlib
import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tensorpack.utils import logger
from tensorpack.utils.utils import get_tqdm

import data
from common.files import make_folder
from common.plugins import add_option, load_plugins
from common.ranks import Ranks
from common.rle import paste_rle
from common.workers import map_ahead
from config import VERSION, Config, UserError
from dataset import Dataset
from evaluation import metrics, report
from evaluation.results import coco_results, results_file
from inference.predictor import ImageDetections, Predictor, of_image

POST_THREADS = 4
BATCHES_AHEAD = 2  # batches that the network may finish before their results are consumed; bounds the memory
ONE_PROCESS = Ranks()
__all__ = ["ImageDetections", "Predictor", "evaluate_dataset", "evaluate_file"]  # the first two for old scripts


def evaluate_dataset(
    settings: Config,
    network: Callable,
    dataset: Dataset,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    ranks: Ranks = ONE_PROCESS,
    num_parallel: int = 1,
    before_batch: Callable[[], None] | None = None,
    **report_options,
) -> dict[str, float] | None:
    """Runs the network over a data set, logs its metrics as tables, and returns them as {name: value}.

    Boxes are evaluated, and masks if the model has them (MODE_MASK). Of several ranks each predicts its share of the
    batches; rank 0 gathers all results, writes the file and returns the metrics, the others return None.

    Args:
        output: path of the results json. num_parallel: number of threads that call `network`.
        before_batch: called before each batch, equally often on all ranks; may raise to end the evaluation.
        report_options: those of `evaluate_results`.
    Raises:
        FileError: `output` exists, without `overwrite`, or cannot be written. A single process raises it before it
            computes anything, several ranks after they have exchanged their results.
        ConfigError: TEST.METRICS names no metric. EvaluationError: see `metrics.evaluate`.
        DataError: too many images cannot be used.
    """
    metrics.OTHER_METRICS.find_all(settings.TEST.METRICS)  # an unknown name is an error now, not after the work
    records = dataset.records(training=False)
    batches = data.evaluation_data(settings, records, shard_index=ranks.rank, num_shards=ranks.size)
    results, stopwatch, is_alone = [], Stopwatch(), ranks.size == 1
    file = results_file(output if ranks.rank == 0 else None, overwrite=overwrite)
    with (
        file if is_alone else contextlib.nullcontext(lambda image_results: None) as write,
        get_tqdm(total=len(records), unit="image", disable=ranks.rank > 0) as progress,
    ):
        in_step = _in_step(batches, before_batch)
        options = {"num_parallel": num_parallel, "stopwatch": stopwatch}
        for image_results in results_of(network, in_step, dataset.category_ids, **options):
            write(image_results)
            results.extend(image_results)
            progress.update(ranks.size)
    if not is_alone:
        parts = ranks.gather(results, chief_only=True)
        if ranks.rank > 0:
            return None
        results = _in_order(parts, batches.image_ids())
        with file as write:  # after the exchange: if this fails, no other rank waits for it
            write(results)
    with stopwatch.measure("metrics"):
        values = evaluate_results(settings, results, dataset, **report_options)
    logger.info(f"{dataset.name}: {stopwatch.describe(len(records))}")
    return values


def evaluate_results(
    settings: Config,
    results: list[dict],
    dataset: Dataset,
    *,
    per_class: bool = False,
    report_folder: str | Path | None = None,
) -> dict[str, float]:
    """Compares all results of a data set with its ground truth; logs the metrics and returns them as {name: value}.

    Args:
        results: dicts in COCO's results format, in any order.
        per_class: also logs a table of the classes. report_folder: a new folder for the files of `report.write`.
    Raises:
        EvaluationError: see `metrics.evaluate`. FileError: `report_folder` cannot be written.
    """
    kinds = tuple(metrics.KINDS) if settings.MODE_MASK else ("bbox",)
    evaluations = metrics.evaluate(dataset.annotation_file, results, image_ids=dataset.image_ids, kinds=kinds)
    title = f"{dataset.name} ({len(dataset.image_ids)} images)"
    options = dict(others=settings.TEST.METRICS, per_class=per_class, report_folder=report_folder)
    return _reported(evaluations, title, **options)


def evaluate_file(
    path: str | Path,
    annotation_file: str | Path,
    *,
    others: Sequence[str] = (),
    per_class: bool = False,
    report_folder: str | Path | None = None,
) -> dict[str, float]:
    """Evaluates a results json on all images of the annotations: its boxes, masks, or both, as far as it has them.

    Args:
        others: names of registered metrics to compute beside COCO's. per_class, report_folder: see `evaluate_results`.
    Returns:
        metrics, {name: value}
    Raises:
        EvaluationError: see `metrics.load_results` and `metrics.evaluate`. FileError: see `evaluate_results`.
    """
    results = metrics.load_results(path)
    shapes = {"bbox": "bbox", "segm": "segmentation"}
    kinds = [kind for kind, key in shapes.items() if not results or any(key in result for result in results)]
    if not kinds:
        raise metrics.EvaluationError(f"{path}: the results have neither bbox nor segmentation")
    evaluations = metrics.evaluate(annotation_file, results, kinds=kinds)
    num_images, num_covered = evaluations[0].num_images, len({result["image_id"] for result in results})
    if num_covered < num_images:
        logger.warning(f"results in {num_covered} of {num_images} images: the objects in the others count as missed")
    options = dict(others=others, per_class=per_class, report_folder=report_folder)
    return _reported(evaluations, f"{path} ({num_images} images)", **options)


def _reported(evaluations, title, *, others, per_class, report_folder):
    """Logs Evaluations and writes their report; returns their metrics, {name: value}."""
    report.log(evaluations, title, per_class=per_class)
    other_values = metrics.other_metrics(evaluations, others)
    for name, value in other_values.items():
        logger.info(f"{name} on {title}: {value:.3f}")
    if report_folder:
        report.write(evaluations, report_folder, others=other_values)
    return {name: value for each in evaluations for name, value in each.metrics().items()} | other_values


def _in_step(batches, before_batch):
    """Yields the batches and calls `before_batch` before each; a shard with one batch fewer calls it once more."""
    rounds = batches.num_rounds() if before_batch else 0
    for batch in batches:
        if before_batch:
            before_batch()
            rounds -= 1
        yield batch
    for _ in range(rounds):
        before_batch()


def _in_order(parts, image_ids):
    """Joins the ranks' lists of results in the order of the images; all results of one image are in the same list."""
    place = {image_id: number for number, image_id in enumerate(image_ids)}
    return sorted(itertools.chain.from_iterable(parts), key=lambda result: place[result["image_id"]])


def results_of(
    network: Callable,
    batches: Iterable,
    category_ids: Sequence[int],
    *,
    num_parallel: int = 1,
    stopwatch: "Stopwatch | None" = None,
) -> Iterator[list[dict]]:
    """Runs the network over the batches of data.evaluation_data; yields each image's results, in the order of images.

    Three steps overlap: loading the images of the next batches, the network in `num_parallel` threads, and the
    conversion of detections to COCO's results in POST_THREADS threads.

    Args:
        category_ids: of the labels 1..C.
    Raises:
        NonFiniteError: the network returned NaN or infinity. DataError: too many images cannot be used.
    """
    stopwatch = stopwatch or Stopwatch()
    with ThreadPoolExecutor(POST_THREADS) as pool:

        def run(item):
            batch_records, batch = item
            with stopwatch.measure("network", num_parallel):
                found = network(batch["image"], batch["image_shape"])
            return [
                pool.submit(_record_results, stopwatch, found, index, batch["image_shape"][index], record, category_ids)
                for index, record in enumerate(batch_records)
            ]

        num_ahead = BATCHES_AHEAD + num_parallel - 1
        ahead = map_ahead(run, batches, num_threads=num_parallel, num_ahead=num_ahead)
        with contextlib.closing(ahead):
            for futures in ahead:
                for future in futures:
                    yield future.result()


def _record_results(stopwatch, found, index, image_shape, record, category_ids):
    """The results of one image of a batch: see `coco_results`."""
    size = {"height": record.height, "width": record.width}
    with stopwatch.measure("results"):
        name = f"image {record.image_id}"
        detections, masks = of_image(found, index, image_shape=image_shape, **size, name=name)
        rles = None if masks is None else paste_rle(masks, detections.boxes_xyxy, **size)
        return coco_results(record.image_id, detections, category_ids, rles=rles)


class Stopwatch:
    """Sums the time that each part of an evaluation takes. Several threads may measure at once."""

    def __init__(self):
        self._start = time.perf_counter()
        self._seconds = Counter()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def measure(self, part, num_parallel=1):
        """Adds the time of the `with` block to a part: network, metrics, or results (computed beside the network).

        If `num_parallel` such blocks run at once, each adds 1 / num_parallel of its time.
        """
        start = time.perf_counter()
        yield
        with self._lock:
            self._seconds[part] += (time.perf_counter() - start) / num_parallel

    def describe(self, num_images):
        """A line with each part's share of the time since the stopwatch was made."""
        total = time.perf_counter() - self._start
        network, scoring = self._seconds["network"], self._seconds["metrics"]
        rest = total - network - scoring
        shares = {"network": network, "waiting for images and results": rest, "metrics": scoring}
        listed = ", ".join(f"{name} {max(0, seconds) / total:.1%}" for name, seconds in shares.items())
        beside = f"{self._seconds['results']:.1f} s of masks and results beside the network"
        return f"{num_images} images in {total:.1f} s: {listed}; {beside}"


# ---------------------------------------------------------------- files of results


def main(arguments=None):
    """Runs the command `./eval.py RESULTS.json ANNOTATIONS.json`."""
    parser = argparse.ArgumentParser(description="COCO's metrics of results.")
    parser.add_argument("results", metavar="RESULTS.json", help="in COCO's results format, with bbox or segmentation")
    parser.add_argument("annotations", metavar="ANNOTATIONS.json", help="the ground truth: COCO's instances_*.json")
    parser.add_argument("--per-class", action="store_true", help="also print a table of the classes")
    parser.add_argument("--report", type=Path, metavar="DIR", help="new folder for pictures and numbers")
    parser.add_argument("--metrics", nargs="+", default=[], metavar="NAME", help="also compute metrics of plugins")
    add_option(parser)
    parser.add_argument("--version", action="version", version=VERSION)
    arguments = parser.parse_args(arguments)
    load_plugins(arguments.plugins)
    metrics.OTHER_METRICS.find_all(arguments.metrics)
    if arguments.report:
        make_folder(arguments.report)
    options = dict(others=arguments.metrics, per_class=arguments.per_class, report_folder=arguments.report)
    evaluate_file(arguments.results, arguments.annotations, **options)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
