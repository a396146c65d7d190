"""Data sets in COCO's json format: read once, checked by `dataset/rules.py`, and kept as compact records.

Class names and category ids come from the file itself. A file with unusable entries is rejected with all its problems
in one message. Objects that cannot be trained on are counted and left out of training; too many of them end it.
"""

import atexit
import collections
import contextlib
import dataclasses
import functools
import gc
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm

import dataset.rules as rules
from dataset.record import Dataset, DatasetError, Record, TooManyDropped

logger = logging.getLogger(__name__)

_NEXT_LINE = "\n  "
BAR_AFTER = 3  # seconds of work after which a progress bar is shown


class CocoDataset(Dataset):
    """Images in a directory and their annotations in one json file.

    A subclass that overrides `read_content` reads another format: see docs/custom_data.md.
    """

    def __init__(
        self,
        name: str,
        source_file: str | Path,
        image_dir: str | Path,
        *,
        max_images: int | None = None,
        hint: str = "",
    ):
        """Reads and checks everything except the content of the images.

        Args:
            name: see Dataset. source_file: path of the annotations: the json.
            image_dir: directory that `file_name` is relative to.
            max_images: use only this number of images, those with the lowest ids.
            hint: added to the message if a file is missing.

        Raises:
            DatasetError: a file is missing or cannot be used.
        """
        started = time.perf_counter()
        self.name = name
        self.source_file = str(Path(source_file).expanduser())
        self.image_dir = str(Path(image_dir).expanduser())
        _check_paths(name, self.source_file, self.image_dir, hint)
        with gc_paused():
            self._load(self.read_content(), max_images)
        logger.info(
            f"{name}: {len(self._records)} images with {self._num_objects()} objects of "
            f"{len(self.class_names)} classes, read in {time.perf_counter() - started:.1f} s"
        )

    def read_content(self) -> dict[str, Any]:
        """Returns the annotations in COCO's format: a dict with the lists `images`, `annotations` and `categories`.

        Raises:
            DatasetError: the file cannot be read in this format.
        """
        return read_json(self.source_file)

    @functools.cached_property
    def annotation_file(self) -> str:
        """See Dataset. For another source format, a temporary copy in COCO's, removed when the program ends."""
        if type(self).read_content is CocoDataset.read_content:
            return self.source_file
        directory = tempfile.mkdtemp(prefix="annotations-")
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        path = os.path.join(directory, f"{self.name}.json")
        with open(path, "w") as file:
            json.dump(self.read_content(), file)
        return path

    def records(
        self, *, training: bool, filter_empty: bool = True, masks: bool = True, max_dropped: float = 1.0
    ) -> list[Record]:
        """See Dataset.records."""
        if not training:
            return list(self._records)
        if masks and self._without_segmentation:
            raise DatasetError(
                f"{self.source_file}: {rules.count(len(self._without_segmentation), 'annotation')} without "
                f"segmentation (the first: id {self._without_segmentation[0]}): add it, or train without masks "
                "(MODE_MASK=False)"
            )
        self._report_dropped(masks, max_dropped)
        records = []
        for index, record in enumerate(self._records):
            if faults := self._faults.get(index):
                record = _select(record, [not _is_dropped(fault, masks) for fault in faults])
            records.append(record)
        kept = [record for record in records if not filter_empty or not record.is_crowd.all()]
        if len(kept) < len(records):
            logger.info(f"{self.name}: {len(records) - len(kept)} images without objects left out of training")
        if not kept:
            raise DatasetError(f"{self.source_file}: no image with an object is left to train on")
        return kept

    def _load(self, content, max_images):
        findings = []
        annotations = read_annotations(
            content, self.image_dir, findings, max_images=max_images, progress=_bar_of_long_work(self.name)
        )
        self._records, self._faults = annotations.records, annotations.faults
        self._without_segmentation = annotations.without_segmentation
        self.category_ids = tuple(annotations.categories)
        self.class_names = tuple(annotations.categories.values())
        self.image_ids = tuple(record.image_id for record in self._records)
        self._refuse(findings)
        self._dropped = [finding for finding in findings if finding.level == rules.DROPPED]

    def _refuse(self, findings):
        """Raises DatasetError with a line per problem that makes the file unusable; missing images are one problem."""
        of_rule = collections.defaultdict(list)
        for finding in findings:
            of_rule[finding.rule if "file" in finding.rule else "entry"].append(finding)
        problems = [finding.text for finding in of_rule["entry"] if finding.level == rules.REFUSED]
        for rule, relation in (("outside file", "outside"), ("missing file", "missing in")):
            names = [finding.file_name for finding in of_rule[rule]]
            if names:
                listed = rules.name_some(names)
                problems.append(
                    f"{len(names)} of {rules.count(len(self.image_ids), 'image')} {relation} {self.image_dir}: {listed}"
                )
        if len(problems) == 1:
            raise DatasetError(f"{self.source_file}: {problems[0]}")
        if problems:
            listed = rules.name_some(problems, separator=_NEXT_LINE)
            raise DatasetError(
                f"{self.source_file}: {len(problems)} problems (python -m tools.doctor lists all):\n  {listed}"
            )

    def _report_dropped(self, masks, max_dropped):
        """Logs the objects that training leaves out; raises TooManyDropped if they exceed a share of all objects."""
        dropped = [finding for finding in self._dropped if _is_dropped(finding.rule, masks)]
        if not dropped:
            return
        reasons = collections.Counter(rules.RULES[finding.rule][1] for finding in dropped)
        summary = (
            f"{rules.count(len(dropped), 'object')} of {self._num_objects()} left out of training "
            f"({', '.join(f'{reason}: {number}' for reason, number in reasons.most_common())}):\n  "
            f"{rules.name_some([finding.text for finding in dropped], separator=_NEXT_LINE)}"
        )
        if len(dropped) > max_dropped * self._num_objects():
            raise TooManyDropped(
                f"{self.source_file}: {summary}\nThat is more than {max_dropped:.2%}: repair the file (python -m "
                "tools.doctor --fix), or raise DATA.MAX_DROPPED"
            )
        logger.warning(f"{self.name}: {summary}")

    def _num_objects(self):
        return sum(len(record.labels) for record in self._records)


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a COCO json: a dict with the lists `images`, `annotations` and `categories`, whose entries are not checked.

    Raises:
        DatasetError: the file is unreadable, or not in this format.
    """
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read())
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise DatasetError(f"{path}: not usable JSON: nested too deeply") from None
    except ValueError as error:
        raise DatasetError(f"{path}: not valid JSON (damaged, or cut off?): {rules.shorten(str(error), 200)}") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: not in COCO format: the top level is a {type(content).__name__}, not an object")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DatasetError(f'{path}: not in COCO format: {"no list" if key in content else "no key"} "{key}"')
    for key in ("images", "categories"):
        if not content[key]:
            raise DatasetError(f'{path}: the list "{key}" is empty')
    return content


class Annotations(NamedTuple):
    """The usable content of a json."""

    categories: dict[int, str]  # names by category id, in ascending order
    records: list[Record]  # of the images, in ascending order of their ids
    file_names: dict[int, str]  # by image id, as in the json
    faults: dict[int, tuple[str, ...]]  # rules.Objects.faults by index of the record, if there are any
    without_segmentation: list[int]  # annotation ids


def read_annotations(
    content: dict[str, Any],
    image_dir: str | Path,
    findings: list[rules.Finding],
    *,
    max_images: int | None = None,
    progress: Callable[[list[int]], Iterable[int]] = iter,
) -> Annotations:
    """Returns the Annotations of a json's content, which it empties to need less memory.

    Args:
        content: from `read_json`. image_dir: directory that `file_name` is relative to.
        findings: list that receives a rules.Finding for each problem.
        max_images: see CocoDataset. progress: called with the list of image ids, returns it as an iterable.
    """
    categories = dict(sorted(rules.check_categories(content["categories"], findings).items()))
    images = rules.check_images(content["images"], findings)
    by_image = rules.check_annotations(content["annotations"], images, categories, findings)
    content.clear()
    image_ids = sorted(image_id for image_id, image in images.items() if image)[:max_images]
    labels = {category_id: label for label, category_id in enumerate(categories, start=1)}
    file_names = {image_id: images[image_id]["file_name"] for image_id in image_ids}
    rules.check_files(file_names.values(), image_dir, findings)
    annotations = Annotations(categories, records=[], file_names=file_names, faults={}, without_segmentation=[])
    for image_id in progress(image_ids):
        image, entries = images[image_id], by_image.pop(image_id, ())
        objects = rules.check_objects(image, entries, findings)
        if any(objects.faults):
            annotations.faults[len(annotations.records)] = objects.faults
        annotations.without_segmentation.extend(entry["id"] for entry in entries if rules.lacks_segmentation(entry))
        annotations.records.append(_record(image, entries, objects, image_dir, labels))
    return annotations


def _record(image, entries, objects, image_dir, labels):
    return Record(
        image_id=image["id"],
        path=os.path.join(image_dir, image["file_name"]),
        height=image["height"],
        width=image["width"],
        boxes_xyxy=objects.boxes_xyxy,
        labels=np.array([labels[entry["category_id"]] for entry in entries], np.int64),
        is_crowd=np.array([bool(entry.get("iscrowd")) for entry in entries], bool),
        segmentations=objects.segmentations,
    )


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pauses Python's cycle collector in the block.

    It would repeatedly search millions of new objects, none of which is in a cycle.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_paths(name, source_file, image_dir, hint):
    for path, exists, kind in (
        (source_file, os.path.isfile, "annotation file"),
        (image_dir, os.path.isdir, "image directory"),
    ):
        if not exists(path):
            raise DatasetError(f"{name}: no {kind} {path}{'. ' if hint else ''}{hint}")


def _bar_of_long_work(name):
    """Returns a function that shows a progress bar around image ids, if that takes longer than BAR_AFTER."""
    return lambda image_ids: tqdm.tqdm(image_ids, desc=name, unit="image", delay=BAR_AFTER, mininterval=0.5)


def _is_dropped(fault, masks):
    return bool(fault) and (masks or fault != rules.NO_MASK)


def _select(record, keep):
    return dataclasses.replace(
        record,
        boxes_xyxy=record.boxes_xyxy[keep],
        labels=record.labels[keep],
        is_crowd=record.is_crowd[keep],
        segmentations=tuple(s for s, k in zip(record.segmentations, keep) if k),
    )
