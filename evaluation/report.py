"""Reports evaluations: tables in the log, pictures and numbers in a folder.

metrics.py computes an Evaluation from the boxes or from the masks of results.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate
from tensorpack.utils import logger

from common.files import Whole, make_folder, write_whole, writing
from evaluation import charts, metrics

CLASS_HEADERS = ("class", "objects", *(short for _, _, short in metrics.METRICS.values()))
CLASS_HEADERS += ("score", "precision", "recall", "F1")


def log(evaluations: Sequence[metrics.Evaluation], title: str, *, per_class: bool = False) -> None:
    """Writes a table of each Evaluation to the log, with the reason for every AP that is 0 or undefined (n/a).

    `per_class` adds tables of the classes, with each class's own best score.
    """
    for each in evaluations:
        _log_table(each, title)
        if per_class:
            _log_classes(each, title)


def write(
    evaluations: Sequence[metrics.Evaluation], folder: str | Path, *, others: dict[str, float] | None = None
) -> None:
    """Writes the report of a data set's Evaluations, of boxes and perhaps of masks, to a new folder.

    metrics.json: {"mAP(KIND)/NAME": value or null, "classes(KIND)": [{column of the table of classes: value}]}.
    For each kind, box or mask: KIND-curves.png, precision over recall; KIND-curves-of-classes.png; KIND-confusion.png,
    at the score of the highest F1.

    Args:
        others: {name: value} of further metrics, added to metrics.json.
    Raises:
        FileError: the folder is not empty, or cannot be written.
    """
    make_folder(folder)
    folder = Path(folder)
    numbers = dict(others or {})
    for each in evaluations:
        numbers |= each.metrics()
        numbers[f"classes({each.kind})"] = [dict(zip(CLASS_HEADERS, row)) for row in class_rows(each)]
        for name, picture in _pictures(each).items():
            path = folder / f"{metrics.KINDS[each.kind]}-{name}.png"
            with Whole(path) as file, writing(path):
                picture.save(file.part)
    write_whole(folder / "metrics.json", json.dumps(_without_nan(numbers), indent=1, allow_nan=False))
    logger.info(f"report: {folder}")


def _without_nan(value):
    """Replaces NaN by None, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _log_table(evaluation, title):
    """Writes the AP table of one Evaluation to the log, followed by reasons and the highest F1."""
    cells = [_cell(evaluation.average_precision(name)) for name in metrics.METRICS]
    headers = [short for _, _, short in metrics.METRICS.values()]
    table = tabulate([cells], headers, tablefmt="simple_outline", stralign="right", disable_numparse=True)
    notes = [f"{', '.join(names)}: {reason}" for reason, names in _reasons(evaluation).items()]
    if (point := metrics.best_operating_point(evaluation)) and point.f1 > 0:
        notes.append(f"highest F1: {_describe(point)}")
    logger.info("\n".join([f"{metrics.KINDS[evaluation.kind]} AP on {title}", table, *notes]))


def _log_classes(evaluation, title):
    """Writes the table of one Evaluation's classes to the log."""
    table = tabulate(
        [[*map(_cell, row)] for row in class_rows(evaluation)],
        CLASS_HEADERS,
        tablefmt="simple_outline",
        colalign=("left", *["right"] * (len(CLASS_HEADERS) - 1)),
        disable_numparse=True,
    )
    word = metrics.KINDS[evaluation.kind]
    logger.info(f"{word} AP of classes on {title}; precision and recall at an IoU of 0.5\n{table}")


def class_rows(evaluation: metrics.Evaluation) -> Iterator[tuple]:
    """Yields for each class the values of CLASS_HEADERS: name, number of objects, APs, its best score or NaN."""
    for label, name in enumerate(evaluation.class_names):
        counted = np.count_nonzero(evaluation.is_counted[0] & (evaluation.true.label == label))
        point = metrics.best_operating_point(evaluation, label) or (math.nan,) * 4
        yield name, counted, *(evaluation.average_precision(metric, label) for metric in metrics.METRICS), *point


def _cell(value):
    if not isinstance(value, float):
        return value
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def _describe(point):
    return (
        f"{point.f1:.3f} at scores of {point.score:.3f} and above, precision {point.precision:.3f}, "
        f"recall {point.recall:.3f} (IoU 0.5, all classes together)"
    )


def _reasons(evaluation):
    """Returns the reasons for APs that are 0 or undefined: {reason: list of the metrics' short names}."""
    reasons = {}
    for name, (_, _, short) in metrics.METRICS.items():
        if not evaluation.average_precision(name) > 0:
            reasons.setdefault(_reason(evaluation, name), []).append(short)
    return reasons


def _reason(evaluation, name):
    threshold, size, _ = metrics.METRICS[name]
    index = list(metrics.SIZES).index(size)
    true_labels = evaluation.true.label[evaluation.is_counted[index]]
    objects = f"{'' if size == 'all' else size + ' '}objects" + (" with a mask" if evaluation.kind == "segm" else "")
    if not len(true_labels):
        return f"n/a, the ground truth has no {objects}"
    if not len(evaluation.found.label):
        return "0, there are no detections"
    if not np.isin(evaluation.found.label, true_labels).any():
        return f"0, no detection has a class with {objects}"
    overlap = threshold or metrics.IOU_THRESHOLDS[0]
    return f"0, no detection reaches an IoU of {overlap} with {objects} of its class"


# ---------------------------------------------------------------- pictures


def _pictures(evaluation):
    """Draws {name: PIL image} of one Evaluation."""
    word = metrics.KINDS[evaluation.kind]
    pictures = {"curves": _draw_curves(evaluation, word)}
    labels = [
        label for label in range(len(evaluation.class_names)) if evaluation.average_precision("IoU=0.5", label) >= 0
    ]
    if labels:
        pictures["curves-of-classes"] = _draw_classes(evaluation, word, labels)
    if point := metrics.best_operating_point(evaluation):
        matrix = metrics.confusion_matrix(evaluation, point.score)
        title = f"true classes (rows), found classes (columns), {word} IoU 0.5, scores from {point.score:.3f}"
        pictures["confusion"] = charts.draw_matrix(
            matrix, [*evaluation.class_names, "(nothing)"], [*evaluation.class_names, "(missed)"], title=title
        )
    return pictures


def _draw_curves(evaluation, word):
    """Draws precision over recall, the mean over classes, with a curve per IoU threshold."""
    precision = evaluation.precision[..., 0]
    occurs = ~np.isnan(precision[0, 0])
    curves = []
    for threshold, of_threshold in zip(metrics.IOU_THRESHOLDS, precision[:, :, occurs]):
        values = of_threshold.mean(axis=1) if occurs.any() else np.zeros(len(metrics.RECALLS))
        label = f"IoU {threshold:.2f}  AP {_cell(float(values.mean()))}"
        curves.append(charts.Curve(metrics.RECALLS, values, charts.shade(2 * threshold - 1), label))
    title = f"{word} precision over recall, mean of {np.count_nonzero(occurs)} classes"
    return charts.draw_curves(curves, title=title, x_label="recall", y_label="precision")


def _draw_classes(evaluation, word, labels):
    """Draws a small chart for each class that occurs, at two IoU thresholds."""
    places = {place: int(np.argmin(abs(metrics.IOU_THRESHOLDS - place))) for place in (0.5, 0.75)}
    panels = []
    for label in labels:
        curves = [
            charts.Curve(metrics.RECALLS, evaluation.precision[index, :, label, 0], charts.shade(2 * place - 1))
            for place, index in places.items()
        ]
        value = _cell(evaluation.average_precision("IoU=0.5:0.95", label))
        panels.append(charts.draw_curves(curves, title=f"{evaluation.class_names[label]} {value}", is_small=True))
    title = f"{word} precision over recall at an IoU of 0.5 (dark) and 0.75 (light); AP behind each name"
    return charts.arrange(panels, title=title)
