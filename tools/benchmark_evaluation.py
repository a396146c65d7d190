"""Measures the speed of the end of an evaluation: from masks to results, and from results to COCO's metrics.

    python -m tools.benchmark_evaluation                           5,000 images of 100 detections, as many as COCO's val
    python -m tools.benchmark_evaluation --vs pycocotools          also times pycocotools, and compares the metrics

Images, objects and detections are synthetic: 480 x 640 pixels, 80 classes, boxes of the sizes of COCO's objects.
"""

import argparse
import contextlib
import copy
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from common import boxes as np_boxes
from common.rle import paste_rle, rle_areas
from evaluation import metrics

HEIGHT, WIDTH, CLASSES, OBJECTS, DETECTIONS, CELLS = 480, 640, 80, 7, 100, 28
# The square roots of the areas of COCO's objects are about log-normal: a quarter below 24 pixels, a quarter above 104.
MEDIAN_SIDE, SPREAD = 50, 1.08


def random_boxes(rng, count):
    """Boxes float32 [count, 4] of COCO's sizes, anywhere in the image."""
    sides = MEDIAN_SIDE * np.exp(rng.normal(0, SPREAD, (count, 1)) + rng.normal(0, 0.35, (count, 2)))
    sides = np.minimum(sides, (WIDTH, HEIGHT))
    corners = rng.uniform(0, 1, (count, 2)) * ((WIDTH, HEIGHT) - sides)
    return np.concatenate([corners, corners + sides], axis=1).astype(np.float32)


def random_masks(rng, count):
    """Masks like those of a network, float32 [count, CELLS, CELLS] in [0, 1]: blobs with an uneven rim."""
    rows, columns = (np.mgrid[:CELLS, :CELLS] - (CELLS - 1) / 2) / (CELLS / 2)
    noise = [cv2.GaussianBlur(rng.normal(size=(CELLS, CELLS)), (0, 0), 4) for _ in range(count)]
    logits = 8 * (0.9 - np.hypot(rows, columns)) + 2 * np.array(noise) / np.std(noise)
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def random_data(num_images):
    """A ground truth, a dict in COCO's format, and results, a list; half of these are slightly displaced objects."""
    rng = np.random.default_rng(0)
    truth = {"info": {}, "images": [], "annotations": [], "categories": []}
    truth["categories"] = [{"id": n, "name": f"class {n}"} for n in range(1, CLASSES + 1)]
    results = []
    for image_id in range(1, num_images + 1):
        truth["images"].append({"id": image_id, "height": HEIGHT, "width": WIDTH})
        true, labels = random_boxes(rng, OBJECTS), rng.integers(1, CLASSES + 1, OBJECTS)
        picks = rng.integers(0, OBJECTS, DETECTIONS // 2)
        sides = np.tile(true[picks, 2:] - true[picks, :2], 2)
        moved, others = true[picks] + rng.normal(0, 0.06, sides.shape) * sides, DETECTIONS - len(picks)
        found = np.concatenate([moved, random_boxes(rng, others)])
        found_labels = np.concatenate([labels[picks], rng.integers(1, CLASSES + 1, others)])
        for result in _results(rng, image_id, true, labels):
            area = float(rle_areas([result["segmentation"]])[0])
            truth["annotations"].append({**result, "id": len(truth["annotations"]) + 1, "area": area, "iscrowd": 0})
        results += _results(rng, image_id, np_boxes.clip(found, HEIGHT, WIDTH).astype(np.float32), found_labels)
    return truth, results


def _results(rng, image_id, boxes_xyxy, labels):
    """Results of an image in COCO's format, with random masks and scores."""
    rles = paste_rle(random_masks(rng, len(labels)), boxes_xyxy, HEIGHT, WIDTH)
    rows = zip(
        np_boxes.xyxy_to_xywh(boxes_xyxy).tolist(), labels.tolist(), rng.random(len(labels)).round(3).tolist(), rles
    )
    keys = ("bbox", "category_id", "score", "segmentation")
    return [{"image_id": image_id, **dict(zip(keys, row))} for row in rows]


def time_masks(repeats):
    """Yields rows of a table: milliseconds to paste and encode the masks of one image, median, minimum, maximum."""
    rng = np.random.default_rng(1)
    masks = random_masks(rng, DETECTIONS)
    whole = np.tile(np.float32([[0, 0, WIDTH, HEIGHT]]), (DETECTIONS, 1))
    for name, boxes_xyxy in (("boxes of COCO's sizes", random_boxes(rng, DETECTIONS)), ("whole images", whole)):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            paste_rle(masks, boxes_xyxy, HEIGHT, WIDTH)
            times.append(1e3 * (time.perf_counter() - start))
        yield name, f"{statistics.median(times):.1f}", f"{min(times):.1f}", f"{max(times):.1f}"


def time_metrics(truth, results, kind, *, with_pycocotools):
    """Times the metrics of results in memory.

    Returns:
        a row of a table (kind, seconds; also pycocotools' seconds, the ratio, the difference), and the largest
        difference of a precision, 0 without pycocotools
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.json"
        path.write_text(json.dumps(truth))
        known = metrics.load_truth(path)
        start = time.perf_counter()
        (evaluation,) = metrics.evaluate(known, results, kinds=(kind,))
        ours = time.perf_counter() - start
    row = (metrics.KINDS[kind], f"{ours:.1f}")
    if not with_pycocotools:
        return row, 0
    truth, results = copy.deepcopy(truth), copy.deepcopy(results)  # pycocotools changes them
    start = time.perf_counter()
    precision = run_pycocotools(truth, results, kind)
    theirs = time.perf_counter() - start
    difference = float(np.nanmax(np.abs(evaluation.precision - np.where(precision < 0, np.nan, precision))))
    return (*row, f"{theirs:.1f}", f"{theirs / ours:.1f}x", f"{difference:.0e}"), difference


def run_pycocotools(truth, results, kind):
    """The precisions of pycocotools, float64 [T, R, K, S], -1 where undefined."""
    if kind == "segm":  # it would take the area of a box in the result for that of the mask
        for result in results:
            del result["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][..., -1]


def main(arguments=None):
    """Runs the command; returns the exit code, 1 if pycocotools disagrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=30, help="of the masks of one image (default: %(default)s)")
    parser.add_argument("--vs", choices=["pycocotools"], help="also time pycocotools")
    arguments = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    print(f"{DETECTIONS} masks of an image of {HEIGHT} x {WIDTH}, pasted and encoded, on one core")
    print(tabulate(time_masks(arguments.repeats), ["", "median ms", "least", "most"], disable_numparse=True))
    print(f"\nmetrics of {arguments.images} images of {DETECTIONS} detections and {OBJECTS} objects", flush=True)
    truth, results = random_data(arguments.images)
    options = {"with_pycocotools": arguments.vs == "pycocotools"}
    rows, differences = zip(*(time_metrics(truth, results, kind, **options) for kind in metrics.KINDS))
    print(tabulate(rows, ["", "seconds", "pycocotools", "ratio", "difference"][: len(rows[0])], disable_numparse=True))
    return int(max(differences) > 1e-6)


if __name__ == "__main__":
    sys.exit(main())
