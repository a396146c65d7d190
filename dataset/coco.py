"""Data sets in COCO's json format: read once, checked, and kept as compact records.

Class names and category ids come from the file itself. What makes a file unusable is refused with all its problems in
one message; what single objects lack only leaves them out of training (see `_FAULTS`), counted in the log.
"""

import collections
import contextlib
import dataclasses
import gc
import json
import logging
import os
import time

import numpy as np

import boxes as box_tools
from dataset.record import Dataset, DatasetError, Record

logger = logging.getLogger(__name__)

# Why an object is not trained on, by its code; 0 is a good one. The order is that of the checks.
_FAULTS = ("", "marked as ignore", "area <= 1", "box empty inside the image", "no usable polygon")
_NO_MASK = _FAULTS.index("no usable polygon")

# A polygon or box beyond this is not a coordinate, and would not fit in float32.
_LARGEST = 1e30
# How many problems, or files, a message names.
_NAMED = 10


class CocoDataset(Dataset):
    """Images in a directory and their annotations in one json file."""

    def __init__(self, name, annotation_file, image_dir, *, max_images=None, hint=""):
        """Read and check everything but the images' content.

        Args:
            annotation_file: path of the json.
            image_dir: directory that `file_name` is relative to.
            max_images: use only so many images, those with the lowest ids.
            hint: what to tell users whose files are missing.

        Raises:
            DatasetError: a file is missing or cannot be used.
        """
        started = time.perf_counter()
        self.name = name
        self.annotation_file = str(annotation_file)
        self._image_dir = str(image_dir)
        _check_paths(name, self.annotation_file, self._image_dir, hint)
        with _gc_paused():
            self._load(_read_json(self.annotation_file), max_images)
        logger.info(
            f"{name}: {len(self._records)} images with {sum(len(r.labels) for r in self._records)} objects of "
            f"{len(self.class_names)} classes, read in {time.perf_counter() - started:.1f} s"
        )

    def records(self, *, training, filter_empty=True, masks=True):
        """See Dataset.records."""
        if not training:
            return list(self._records)
        if masks and self._without_segmentation:
            raise DatasetError(
                f"{self.annotation_file}: {_count(len(self._without_segmentation), 'annotation')} without segmentation "
                f"(the first: id {self._without_segmentation[0]}): add it, or train without masks (MODE_MASK=False)"
            )
        records, dropped = [], collections.Counter()
        for index, record in enumerate(self._records):
            faults = self._faults.get(index)
            if faults is not None:
                bad = (faults > 0) & (masks | (faults != _NO_MASK))
                dropped.update(faults[bad].tolist())
                record = _select(record, ~bad)
            records.append(record)
        kept = [record for record in records if not filter_empty or not record.is_crowd.all()]
        self._report(kept, dropped)
        return kept

    def _report(self, records, dropped):
        """Say what training leaves out; refuse when nothing is left."""
        for fault, count in sorted(dropped.items()):
            logger.info(f"{self.name}: {_count(count, 'object')} left out of training: {_FAULTS[fault]}")
        if len(records) < len(self._records):
            logger.info(f"{self.name}: {len(self._records) - len(records)} images without objects left out of training")
        if not records:
            raise DatasetError(f"{self.annotation_file}: no image with an object is left to train on")

    def _load(self, content, max_images):
        """Make the records of the json's content, which is emptied on the way to need less memory."""
        problems = []
        categories = _categories(content["categories"], problems)
        images = _images(content["images"], problems)
        by_image = _annotations_by_image(content["annotations"], images, categories, problems)
        content.clear()
        self.category_ids = tuple(sorted(categories))
        self.class_names = tuple(categories[category_id] for category_id in self.category_ids)
        self.image_ids = tuple(sorted(image_id for image_id, image in images.items() if image)[:max_images])
        problems += _file_problems([images[i]["file_name"] for i in self.image_ids], self._image_dir)
        self._labels = {category_id: label for label, category_id in enumerate(self.category_ids, start=1)}
        self._records, self._faults, self._without_segmentation = [], {}, []
        for image_id in self.image_ids:
            self._add_record(images[image_id], by_image.pop(image_id, ()), problems)
        _raise_problems(self.annotation_file, problems)

    def _add_record(self, image, annotations, problems):
        """Append one image's record; note the objects that training has to leave out."""
        height, width = image["height"], image["width"]
        boxes_xywh = np.array([annotation["bbox"] for annotation in annotations], np.float64)
        boxes_xyxy = box_tools.clip(box_tools.xywh_to_xyxy(boxes_xywh), height, width).astype(np.float32)
        segmentations = tuple(_segmentation(annotation, height, width, problems) for annotation in annotations)
        faults = np.array(list(map(_fault, annotations, boxes_xyxy.tolist(), segmentations)), np.uint8)
        if faults.any():
            self._faults[len(self._records)] = faults
        self._without_segmentation += [
            a["id"] for a in annotations if a.get("segmentation") is None and not a.get("iscrowd")
        ]
        self._records.append(
            Record(
                image_id=image["id"],
                path=os.path.join(self._image_dir, image["file_name"]),
                height=height,
                width=width,
                boxes_xyxy=boxes_xyxy,
                labels=np.array([self._labels[a["category_id"]] for a in annotations], np.int64),
                is_crowd=np.array([bool(a.get("iscrowd")) for a in annotations], bool),
                segmentations=segmentations,
            )
        )


# ---------------------------------------------------------------------------------------------------------------- files


def _check_paths(name, annotation_file, image_dir, hint):
    for path, exists, what in (
        (annotation_file, os.path.isfile, "annotation file"),
        (image_dir, os.path.isdir, "image directory"),
    ):
        if not exists(path):
            raise DatasetError(f"{name}: no {what} {path}{'. ' if hint else ''}{hint}")


def _read_json(path):
    """The content of a COCO json: a dict with the lists `images`, `annotations` and `categories`."""
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(), parse_constant=_refuse_constant)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise DatasetError(f"{path}: not usable JSON: nested too deeply") from None
    except ValueError as error:
        raise DatasetError(f"{path}: not valid JSON (damaged, or cut off?): {_short(str(error), 200)}") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: not in COCO format: the top level is a {type(content).__name__}, not an object")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DatasetError(f'{path}: not in COCO format: {"no list" if key in content else "no key"} "{key}"')
    for key in ("images", "categories"):
        if not content[key]:
            raise DatasetError(f'{path}: the list "{key}" is empty')
    return content


def _refuse_constant(constant):
    raise ValueError(f"{constant} is not a JSON number")


@contextlib.contextmanager
def _gc_paused():
    """Python's cycle collector would look again and again at millions of new objects, none of which is in a cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _file_problems(file_names, image_dir):
    """Names that leave the image directory, and missing files. One listing per directory, no system call per file."""
    outside, missing, listed = [], [], {}
    for name in file_names:
        if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
            outside.append(name)
            continue
        directory, base = os.path.split(name)
        if directory not in listed:
            listed[directory] = _list_files(os.path.join(image_dir, directory), image_dir)
        if base not in listed[directory]:
            missing.append(name)
        elif not listed[directory][base]:
            outside.append(name)
    problems = []
    if outside:
        problems.append(f"{_count(len(outside), 'file_name')} outside the image directory: {_named(outside)}")
    if missing:
        problems.append(f"{len(missing)} of {len(file_names)} images missing in {image_dir}: {_named(missing)}")
    return problems


def _list_files(directory, root):
    """The names of a directory's files, each with whether it really lies below `root`; links may lead out of it."""
    root = os.path.realpath(root)
    inside = _is_inside(directory, root)
    try:
        with os.scandir(directory) as entries:
            return {
                entry.name: _is_inside(entry.path, root) if entry.is_symlink() else inside
                for entry in entries
                if not entry.is_dir()
            }
    except (OSError, ValueError):
        return {}


def _is_inside(path, root):
    return os.path.commonpath([os.path.realpath(path), root]) == root


# -------------------------------------------------------------------------------------------------------------- entries


def _categories(entries, problems):
    """Names by category id."""
    names = {}
    for index, entry in enumerate(entries):
        if not _has_id(entry) or type(entry.get("name")) is not str:
            problems.append(f"categories[{index}] must have a whole number id and a name: {_short(entry)}")
        elif entry["id"] in names:
            problems.append(f"category id {entry['id']} occurs twice")
        if _has_id(entry):
            names[entry["id"]] = entry.get("name")
    return names


def _images(entries, problems):
    """Image entries by image id; None for a broken one, so that its annotations are not called wrong as well."""
    images, file_names = {}, set()
    for index, entry in enumerate(entries):
        problem = _image_problem(entry)
        if problem:
            problems.append(f"images[{index}] {problem}")
            if _has_id(entry):
                images[entry["id"]] = None
            continue
        if entry["id"] in images:
            problems.append(f"image id {entry['id']} occurs twice")
        if entry["file_name"] in file_names:
            problems.append(f"file_name {entry['file_name']} occurs twice")
        images[entry["id"]] = entry
        file_names.add(entry["file_name"])
    return images


def _has_id(entry):
    return isinstance(entry, dict) and type(entry.get("id")) is int


def _image_problem(entry):
    if not _has_id(entry):
        return f"must have a whole number id: {_short(entry)}"
    if type(entry.get("file_name")) is not str:
        return f"(id {entry['id']}) has no file_name"
    height, width = entry.get("height"), entry.get("width")
    # Run-length encodings count a mask's pixels in 32 bits.
    if type(height) is not int or type(width) is not int or min(height, width) < 1 or height * width >= 2**32:
        return f"(id {entry['id']}) has no usable height and width: {_short(height)}, {_short(width)}"
    return None


def _annotations_by_image(entries, images, categories, problems):
    """The valid annotations of each image, in the file's order."""
    by_image, seen = collections.defaultdict(list), set()
    for index, entry in enumerate(entries):
        problem = _annotation_problem(entry, images, categories)
        if problem:
            annotation_id = entry.get("id") if isinstance(entry, dict) else None
            problems.append(f"annotation {f'[{index}]' if annotation_id is None else f'id {annotation_id}'} {problem}")
            continue
        if entry["id"] in seen:
            problems.append(f"annotation id {entry['id']} occurs twice")
        seen.add(entry["id"])
        if images[entry["image_id"]]:
            by_image[entry["image_id"]].append(entry)
    return by_image


def _annotation_problem(entry, images, categories):
    if not _has_id(entry):
        return f"must have a whole number id: {_short(entry)}"
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if type(image_id) is not int or image_id not in images:
        return f"has an unknown image_id: {_short(image_id)}"
    if type(category_id) is not int or category_id not in categories:
        return f"has an unknown category_id: {_short(category_id)}"
    bbox = entry.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        return f"must have a bbox of 4 finite numbers: {_short(bbox)}"
    if entry.get("area") is not None and not _is_number(entry["area"]):
        return f"has an area that is not a number: {_short(entry['area'])}"
    if entry.get("iscrowd") not in (None, 0, 1):
        return f"has an iscrowd that is neither 0 nor 1: {_short(entry['iscrowd'])}"
    return None


def _is_number(value):
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST


def _segmentation(annotation, height, width, problems):
    """The segmentation as in Record; a broken one adds a problem."""
    segmentation = annotation.get("segmentation")
    try:
        if segmentation is None:
            return None
        if isinstance(segmentation, dict):
            return box_tools.compress_rle(segmentation, height, width)
        polygons = map(_polygon, _list_of_polygons(segmentation))
        return [polygon for polygon in polygons if polygon is not None] or None
    except ValueError as error:
        problems.append(f"annotation id {annotation['id']} has a broken segmentation: {error}")
        return None


def _list_of_polygons(segmentation):
    if isinstance(segmentation, list):
        return segmentation
    raise ValueError("it is neither polygons nor RLE")


def _polygon(numbers):
    """A polygon `[x1, y1, x2, y2, ...]` as float32 [P, 2]; None if that is no polygon."""
    try:
        polygon = np.asarray(numbers)
    except ValueError:  # Lists of different lengths within.
        polygon = np.empty((1, 1))
    if polygon.ndim != 1 or (polygon.size and polygon.dtype.kind not in "iuf"):
        raise ValueError("a polygon is not a list of numbers")
    if polygon.size < 2 * box_tools.MIN_POLYGON_POINTS or polygon.size % 2:
        return None
    if not -_LARGEST < polygon.min() <= polygon.max() < _LARGEST:
        raise ValueError("a polygon's coordinate is not finite")
    return polygon.astype(np.float32).reshape(-1, 2)


def _fault(annotation, box, segmentation):
    """Why training leaves this object out, as an index into `_FAULTS`."""
    x1, y1, x2, y2 = box
    area = annotation.get("area")
    if annotation.get("ignore") == 1:
        return 1
    if (area if area is not None else (x2 - x1) * (y2 - y1)) <= 1:
        return 2
    if not (x2 > x1 and y2 > y1):
        return 3
    return 0 if segmentation or annotation.get("iscrowd") else _NO_MASK


def _select(record, keep):
    return dataclasses.replace(
        record,
        boxes_xyxy=record.boxes_xyxy[keep],
        labels=record.labels[keep],
        is_crowd=record.is_crowd[keep],
        segmentations=tuple(s for s, k in zip(record.segmentations, keep) if k),
    )


# ------------------------------------------------------------------------------------------------------------- messages


def _raise_problems(path, problems):
    if len(problems) == 1:
        raise DatasetError(f"{path}: {problems[0]}")
    if problems:
        raise DatasetError(f"{path}: {len(problems)} problems: {_named(problems, separator='; ')}")


def _named(items, *, separator=", "):
    more = len(items) - _NAMED
    return separator.join(items[:_NAMED]) + (f"{separator}and {more} more" if more > 0 else "")


def _count(number, noun):
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _short(value, limit=60):
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
