"""Converts detections to COCO's results format, and writes the file of results."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorpack.utils import logger

from common import boxes as np_boxes
from common.files import Whole, writing
from common.rle import encode_rle
from evaluation import metrics

# Boxes are rounded to a thousandth of a pixel. Scores need more decimals: rounding must not create ties.
BOX_DECIMALS, SCORE_DECIMALS = 3, 6


def coco_results(
    image_id: int, detections: Any, category_ids: Sequence[int], *, rles: Iterable[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Converts one image's detections to a list of dicts in COCO's results format.

    Keys: image_id, category_id, bbox [x, y, width, height] in pixels, score; segmentation (RLE) if there are masks.

    Args:
        detections: inference.ImageDetections.
        category_ids: the id of label k at index k - 1, as in Dataset.category_ids.
        rles: the masks as compressed RLEs, if available; by default `detections.masks` are encoded.
    Raises:
        EvaluationError: a label has no category, because the model was trained on other classes.
    """
    for label in detections.labels:
        if not 1 <= label <= len(category_ids):
            classes = f"the data set has {len(category_ids)} classes"
            raise metrics.EvaluationError(f"image {image_id}: the model found class {label}, but {classes}")
    boxes_xywh = np_boxes.xyxy_to_xywh(np.asarray(detections.boxes_xyxy, np.float64))
    if rles is None:
        rles = itertools.repeat(None) if detections.masks is None else map(encode_rle, detections.masks)
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


@contextlib.contextmanager
def results_file(path: str | Path | None, *, overwrite: bool = False) -> Iterator[Callable[[list[dict]], None]]:
    """Opens a new COCO results json; yields a function that appends results. The file appears when it is complete.

        with results_file("results.json") as write:
            write(coco_results(...))

    With path None, nothing is written.

    Raises (at the start or end of the block, and from the function):
        FileError: the file exists, without `overwrite`, or cannot be written.
    """
    if path is None:
        yield lambda results: None
        return
    with Whole(path, overwrite=overwrite, numbered=not overwrite) as whole:
        with writing(path):
            file = open(whole.part, "w")  # noqa: SIM115 (closed below, with its errors named)
        separator = "["

        def write(results):
            nonlocal separator
            with writing(path):
                for result in results:
                    file.write(f"{separator}\n{json.dumps(result, allow_nan=False)}")
                    separator = ","

        try:
            yield write
            with writing(path):
                file.write("[\n]\n" if separator == "[" else "\n]\n")
                file.close()
        finally:
            with contextlib.suppress(OSError):  # of a full disk, which is named already
                file.close()
    logger.info(f"results: {whole.path}")
