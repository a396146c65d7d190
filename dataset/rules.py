"""The rules for annotations in COCO's format: faults that make a file unusable, exclude objects, or are only noted.

CocoDataset applies them before a training starts and `tools/doctor.py` reports them: this is the only implementation.
Each function takes the json's entries, appends a Finding for each fault, and returns the usable part.
"""

import collections
import os
from typing import NamedTuple

import numpy as np

from common import boxes as np_boxes
from common.rle import MIN_POLYGON_POINTS, compress_rle
from dataset.record import Segmentation

REFUSED, DROPPED, NOTED = "refused", "left out of training", "noted"

# Every rule: the consequence of breaking it, and a description of the fault.
RULES = {
    "format": (REFUSED, "not in COCO's format"),
    "duplicate": (REFUSED, "id or file_name that occurs twice"),
    "image_id": (REFUSED, "image_id that no image has"),
    "category_id": (REFUSED, "category_id that no category has"),
    "bbox": (REFUSED, "bbox that is not 4 finite numbers"),
    "segmentation": (REFUSED, "segmentation that cannot be read"),
    "outside file": (REFUSED, "file_name outside the image directory"),
    "missing file": (REFUSED, "image file missing"),
    "no segmentation": (REFUSED, "object without segmentation (MODE_MASK=False trains without)"),
    "unreadable": (DROPPED, "image that cannot be read"),
    "size": (DROPPED, "image of another size than annotated"),
    "reversed box": (DROPPED, "width or height below 0"),
    "zero box": (DROPPED, "width or height 0"),
    "outside box": (DROPPED, "box outside the image"),
    "tiny": (DROPPED, "area <= 1"),
    "no polygon": (DROPPED, "no usable polygon"),
    "ignore": (NOTED, "marked as ignore, not trained on"),
    "clipped box": (NOTED, "box that reaches outside the image, clipped"),
    "bad polygon": (NOTED, "polygon of fewer than 3 points or an odd count, left out"),
    "far polygon": (NOTED, "polygon far outside the image, cut off"),
    "vanishing": (NOTED, "object that vanishes at the training size"),
    "unused class": (NOTED, "category without an object"),
    "same name": (NOTED, "category name that occurs twice"),
}
# This rule does not apply to a training without masks.
NO_MASK = "no polygon"
# Larger numbers are no coordinates, and do not fit into float32.
_LARGEST = 1e30
# Pixels that a box may extend beyond its image before that is noted.
_BOX_MARGIN = 1


class Finding(NamedTuple):
    """An entry that breaks a rule."""

    rule: str  # key of RULES
    text: str  # one line that names entry and file
    file_name: str | None = None  # of the image
    annotation_id: int | None = None

    @property
    def level(self) -> str:
        """REFUSED, DROPPED or NOTED."""
        return RULES[self.rule][0]


# -------------------------------------------------------------------------------------------------------------- entries


def check_categories(entries, findings):
    """Returns the names of categories by id."""
    names = {}
    for index, entry in enumerate(entries):
        if not _has_id(entry) or type(entry.get("name")) is not str:
            text = f"categories[{index}] must have a whole number id and a name: {shorten(entry)}"
            findings.append(Finding("format", text))
        elif entry["id"] in names:
            findings.append(Finding("duplicate", f"category id {entry['id']} occurs twice"))
        elif entry["name"] in names.values():
            findings.append(Finding("same name", f"category id {entry['id']} repeats the name {entry['name']!r}"))
        if _has_id(entry):
            names[entry["id"]] = entry.get("name")
    return names


def check_images(entries, findings):
    """Returns image entries by id; None for a faulty one, so that its annotations are not reported as well."""
    images, file_names = {}, set()
    for index, entry in enumerate(entries):
        problem = _image_problem(entry)
        if problem:
            findings.append(Finding("format", f"images[{index}] {problem}"))
            if _has_id(entry):
                images[entry["id"]] = None
            continue
        name = entry["file_name"]
        if entry["id"] in images:
            findings.append(Finding("duplicate", f"image id {entry['id']} occurs twice", name))
        if name in file_names:
            findings.append(Finding("duplicate", f"file_name {name} occurs twice", name))
        images[entry["id"]] = entry
        file_names.add(name)
    return images


def _has_id(entry):
    return isinstance(entry, dict) and type(entry.get("id")) is int


def _image_problem(entry):
    if not _has_id(entry):
        return f"must have a whole number id: {shorten(entry)}"
    name = entry.get("file_name")
    if type(name) is not str or not name or "\0" in name:
        return f"(id {entry['id']}) has no file_name"
    height, width = entry.get("height"), entry.get("width")
    # Run-length encodings count a mask's pixels in 32 bits.
    if type(height) is not int or type(width) is not int or min(height, width) < 1 or height * width >= 2**32:
        return f"(id {entry['id']}) has no usable height and width: {shorten(height)}, {shorten(width)}"
    return None


def check_annotations(entries, images, categories, findings):
    """Returns the usable annotations of each image, {image id: list}, in the file's order."""
    by_image, ids = collections.defaultdict(list), set()
    for index, entry in enumerate(entries):
        rule, problem = _annotation_problem(entry, images, categories) or (None, None)
        annotation_id = entry.get("id") if isinstance(entry, dict) else None
        if rule:
            name = f"[{index}]" if annotation_id is None else f"id {shorten(annotation_id)}"
            file_name = _file_name(entry, images)
            findings.append(_of_annotation(rule, f"annotation {name} {problem}", file_name, annotation_id))
            continue
        if annotation_id in ids:
            text = f"annotation id {annotation_id} occurs twice"
            findings.append(_of_annotation("duplicate", text, _file_name(entry, images), annotation_id))
        ids.add(annotation_id)
        if images[entry["image_id"]]:
            by_image[entry["image_id"]].append(entry)
    return by_image


def _of_annotation(rule, text, file_name, annotation_id):
    return Finding(rule, f"{text} (in {file_name})" if file_name else text, file_name, annotation_id)


def _file_name(annotation, images):
    image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
    image = images.get(image_id) if type(image_id) is int else None
    return image["file_name"] if image else None


def _annotation_problem(entry, images, categories):
    """Returns (rule, problem) of an annotation, or None."""
    if not _has_id(entry):
        return "format", f"must have a whole number id: {shorten(entry)}"
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if type(image_id) is not int or image_id not in images:
        return "image_id", f"has an unknown image_id: {shorten(image_id)}"
    if type(category_id) is not int or category_id not in categories:
        return "category_id", f"has an unknown category_id: {shorten(category_id)}"
    bbox = entry.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        return "bbox", f"must have a bbox of 4 finite numbers: {shorten(bbox)}"
    if entry.get("area") is not None and not _is_number(entry["area"]):
        return "format", f"has an area that is not a number: {shorten(entry['area'])}"
    if entry.get("iscrowd") not in (None, 0, 1):
        return "format", f"has an iscrowd that is neither 0 nor 1: {shorten(entry['iscrowd'])}"
    return None


def _is_number(value):
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST


# -------------------------------------------------------------------------------------------------------------- objects


class Objects(NamedTuple):
    """The G annotated objects of an image."""

    boxes_xyxy: np.ndarray  # float32 [G, 4], clipped to the image
    segmentations: tuple[Segmentation, ...]  # of length G
    faults: tuple[str, ...]  # of length G: the rule by which training leaves the object out, or ""


def check_objects(image, annotations, findings):
    """Returns the Objects of an image entry and its usable annotations."""
    height, width, file_name = image["height"], image["width"], image["file_name"]
    raw_xyxy = np_boxes.xywh_to_xyxy(np.array([annotation["bbox"] for annotation in annotations], np.float64))
    boxes_xyxy = np_boxes.clip(raw_xyxy, height, width).astype(np.float32)
    reaches_out = np.any(np.abs(raw_xyxy - boxes_xyxy) > _BOX_MARGIN, axis=1).tolist()
    segmentations, faults = [], []
    for annotation, box, is_clipped in zip(annotations, boxes_xyxy.tolist(), reaches_out):
        segmentation, broken_rules = _segmentation(annotation, height, width)
        fault = object_fault(annotation, box, segmentation)
        if fault == NO_MASK and (broken_rules or lacks_segmentation(annotation)):
            pass  # reported already, or by CocoDataset for the whole data set
        elif fault:
            broken_rules.append((fault, f": {RULES[fault][1]}, bbox {shorten(annotation['bbox'])}"))
        elif is_clipped:
            text = f": bbox {shorten(annotation['bbox'])} reaches outside {width} x {height} pixels"
            broken_rules.append(("clipped box", text))
        for rule, text in broken_rules:
            text = f"annotation id {annotation['id']}{text}"
            findings.append(_of_annotation(rule, text, file_name, annotation["id"]))
        segmentations.append(segmentation)
        faults.append(fault)
    return Objects(boxes_xyxy, tuple(segmentations), tuple(faults))


def object_fault(annotation, box_xyxy, segmentation):
    """Returns the rule (a key of RULES) by which training leaves an object out, or "".

    Args:
        annotation: usable entry of the json. box_xyxy: its box, clipped to the image. segmentation: as in Record.
    """
    (x1, y1, x2, y2), (width, height) = box_xyxy, annotation["bbox"][2:]
    area = annotation.get("area")
    if annotation.get("ignore") == 1:
        return "ignore"
    if width < 0 or height < 0:
        return "reversed box"
    if width == 0 or height == 0:
        return "zero box"
    if x2 <= x1 or y2 <= y1:
        return "outside box"
    if min((x2 - x1) * (y2 - y1), np_boxes.MIN_BOX_AREA + 1 if area is None else area) <= np_boxes.MIN_BOX_AREA:
        return "tiny"
    return "" if segmentation or annotation.get("iscrowd") else NO_MASK


def lacks_segmentation(annotation):
    """Returns whether an annotation has no mask at all, as in a data set of boxes; crowd regions need none."""
    return annotation.get("segmentation") is None and not annotation.get("iscrowd")


def _segmentation(annotation, height, width):
    """Returns (segmentation as in Record, list of (broken rule, text))."""
    segmentation = annotation.get("segmentation")
    if segmentation is None:
        return None, []
    try:
        if isinstance(segmentation, dict):
            return compress_rle(segmentation, height, width), []
        if not isinstance(segmentation, list):
            raise ValueError("it is neither polygons nor RLE")
        polygons = [_polygon(numbers) for numbers in segmentation]
    except ValueError as error:
        return None, [("segmentation", f" has a broken segmentation: {error}")]
    usable = [polygon for polygon in polygons if polygon is not None]
    broken_rules = []
    if usable and len(usable) < len(polygons):
        broken_rules.append(("bad polygon", f" has {len(polygons) - len(usable)} of {len(polygons)} polygons unusable"))
    reach = 2 * max(height, width)
    if any(np.abs(polygon).max() > reach for polygon in usable):
        broken_rules.append(("far polygon", f" has a polygon far outside the {width} x {height} image"))
    return usable or None, broken_rules


def _polygon(numbers):
    """Converts a polygon `[x1, y1, x2, y2, ...]` to float32 [P, 2]; returns None if it has too few or odd numbers.

    Raises:
        ValueError: it is not a list of finite numbers.
    """
    try:
        polygon = np.asarray(numbers)
    except ValueError:  # nested lists of different lengths
        polygon = np.empty((1, 1))
    if polygon.ndim != 1 or (polygon.size and polygon.dtype.kind not in "iuf"):
        raise ValueError("a polygon is not a list of numbers")
    if polygon.size and not -_LARGEST < polygon.min() <= polygon.max() < _LARGEST:
        raise ValueError("a polygon's coordinate is not finite")
    if polygon.size < 2 * MIN_POLYGON_POINTS or polygon.size % 2:
        return None
    return polygon.astype(np.float32).reshape(-1, 2)


# ---------------------------------------------------------------------------------------------------------------- files


def check_files(file_names, image_dir, findings):
    """Appends Findings for names outside the image directory and for missing files; lists each directory once."""
    listed = {}
    for name in file_names:
        if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
            findings.append(_outside(name))
            continue
        directory, base = os.path.split(name)
        if directory not in listed:
            listed[directory] = _list_files(os.path.join(image_dir, directory), image_dir)
        if base not in listed[directory]:
            findings.append(Finding("missing file", f"image {name} is missing in {image_dir}", name))
        elif not listed[directory][base]:
            findings.append(_outside(name))


def _outside(name):
    return Finding("outside file", f"file_name {name} is outside the image directory", name)


def _list_files(directory, root):
    """Returns {file name: whether it lies below `root`} of a directory; symbolic links may lead outside."""
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


# ------------------------------------------------------------------------------------------------------------- messages


def name_some(items, *, limit=10, separator=", "):
    """Joins the first `limit` of the texts and the number of the others."""
    more = len(items) - limit
    return separator.join(items[:limit]) + (f"{separator}and {more} more" if more > 0 else "")


def count(number, noun):
    """Returns the number and the noun, in the plural unless it is 1: "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shorten(value, limit=60):
    """Formats a value on one line of at most `limit` characters."""
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
