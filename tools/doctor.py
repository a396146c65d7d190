"""Examines a data set in COCO's format: reports what training would reject, drop or never see, and why.

    python -m tools.doctor annotations.json images/                       decodes every image; --no-decode: headers only
    python -m tools.doctor train.json images/ --other val.json            also compares the classes of two files
    python -m tools.doctor annotations.json images/ --fix clean.json      writes a copy without the faults
    python -m tools.doctor annotations.json images/ --show pages/         writes thumbnails with their annotations

The rules are those of training (dataset/rules.py, dataset/images.py). Exit code: 0 clean, 4 errors, 2 wrong arguments.
"""

import argparse
import collections
import html
import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from common import boxes as np_boxes
from common import viz
from common.errors import ImageError
from common.files import check_unused, write_whole
from common.rle import MIN_POLYGON_POINTS, segmentation_to_mask
from config import UserError, config, largest_edge
from dataset import DatasetError, class_difference, rules
from dataset.coco import Annotations, gc_paused, read_annotations, read_json
from dataset.images import image_size, load_image, load_record_image, resized_shape, size_problem

NAMED = 10  # findings of one rule that the report lists; --json lists all
THUMBNAILS, THUMBNAIL_EDGE = 60, 640  # pictures of --show, and their long edge in pixels
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
# An anchor with a lower IoU becomes foreground only as the best one of its object.
FEW_ANCHORS_IOU = 0.5
MANY_WITH_FEW_ANCHORS = 0.2  # share of objects above which the report suggests other anchors; COCO has 0.12


class Examined(NamedTuple):
    """The content of a data set, and the findings about it."""

    content: dict  # of the json
    annotations: Annotations  # without the entries that cannot be used
    findings: list[rules.Finding]
    statistics: dict  # see `statistics_of`

    def errors(self) -> list[rules.Finding]:
        """The findings because of which training rejects the data set or drops an entry."""
        return [finding for finding in self.findings if is_error(finding)]


def is_error(finding):
    """Whether a Finding is more than a note in the configured mode."""
    return finding.level != rules.NOTED and (config.MODE_MASK or finding.rule != rules.NO_MASK)


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", metavar="ANNOTATIONS.json")
    parser.add_argument("images", metavar="IMAGE_DIR")
    parser.add_argument("--other", metavar="VAL.json", help="compare the classes with those of another file")
    parser.add_argument("--no-decode", action="store_true", help="only read the images' headers: fast")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--fix", type=Path, metavar="OUT.json", help="write a cleaned copy; the file must not exist")
    parser.add_argument("--show", type=Path, metavar="DIR", help="write DIR/index.html with thumbnails")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the training")
    return parser.parse_args(arguments)


def main(arguments):
    """Runs the command; returns the exit code."""
    config.update(arguments.config)
    config.check()
    check_paths(arguments)
    with gc_paused():
        examined = examine(arguments.annotations, arguments.images, decode=not arguments.no_decode)
        difference = compare_classes(examined, arguments.other) if arguments.other else ""
    if arguments.json:
        print(json.dumps(as_dict(examined, difference, arguments), indent=1, allow_nan=False))
    else:
        print(as_text(examined, difference, arguments))
    if arguments.fix:
        say(fix(examined, arguments.images, arguments.fix))
    if arguments.show:
        say(show(examined, arguments.images, arguments.show))
    return 4 if examined.errors() or difference else 0


def check_paths(arguments):
    """Raises UserError if an input is missing or an output exists already."""
    for path, exists in ((arguments.annotations, os.path.isfile), (arguments.images, os.path.isdir)):
        if not exists(path):
            raise UserError(f"no {'annotation file' if exists is os.path.isfile else 'image directory'} {path}")
    if arguments.other and not os.path.isfile(arguments.other):
        raise UserError(f"no annotation file {arguments.other}")
    for path in filter(None, (arguments.fix, arguments.show and arguments.show / "index.html")):
        check_unused(path)


# ------------------------------------------------------------------------------------------------------------ examining


def examine(annotation_file, image_dir, *, decode):
    """Applies all rules; returns Examined.

    Args:
        decode: whether to decode the images whose files exist, or only to read their headers.
    Raises:
        DatasetError: the file is not in COCO's format at all.
    """
    say(f"reading {annotation_file}")
    content, findings = read_json(annotation_file), []
    annotations = read_annotations(dict(content), image_dir, findings, progress=bar("annotations", "image"))
    if config.MODE_MASK and 0 < len(annotations.without_segmentation) < count_objects(annotations.records):
        for annotation_id in annotations.without_segmentation:
            text = f"annotation id {annotation_id} has no segmentation"
            findings.append(rules.Finding("no segmentation", text, annotation_id=annotation_id))
    gone = {finding.file_name for finding in findings if finding.rule in ("missing file", "outside file")}
    there = [record for record in annotations.records if annotations.file_names[record.image_id] not in gone]
    findings += examine_images(there, annotations.file_names, decode=decode)
    statistics = statistics_of(annotations, findings)
    return Examined(content, annotations, findings, statistics)


def count_objects(records):
    """The number of objects in all records."""
    return sum(len(record.labels) for record in records)


def bar(title, unit):
    """A function that wraps an iterable in a progress bar."""
    return lambda items: tqdm(items, desc=title, unit=unit, mininterval=0.5)


def say(text):
    """Prints a line on standard error, apart from the report."""
    print(f"tools.doctor: {text}", file=sys.stderr, flush=True)


def examine_images(records, file_names, *, decode):
    """The findings about image files: unreadable ones, and those of another size than annotated."""

    def examine_image(record):
        try:
            height, width = load_image(record.path).shape[:2] if decode else image_size(record.path)
        except ImageError as error:
            return rules.Finding("unreadable", str(error), file_names[record.image_id])
        problem = size_problem(record, height, width)
        return rules.Finding("size", problem, file_names[record.image_id]) if problem else None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        done = tqdm(pool.map(examine_image, records), total=len(records), desc="images", unit="image", mininterval=0.5)
        return [finding for finding in done if finding]


# ----------------------------------------------------------------------------------------------------------- statistics


def statistics_of(annotations, findings):
    """Counts images, objects and classes: a JSON-serialisable dict. Appends findings on unused classes and on objects
    that vanish at the training size."""
    records = annotations.records
    objects = collections.Counter(label for record in records for label in record.labels[~record.is_crowd].tolist())
    crowds = collections.Counter(label for record in records for label in record.labels[record.is_crowd].tolist())
    images = collections.Counter(label for record in records for label in np.unique(record.labels).tolist())
    for k, (category_id, name) in enumerate(annotations.categories.items(), start=1):
        if not objects[k]:
            findings.append(rules.Finding("unused class", f"category id {category_id} ({name}) has no object"))
    kinds = collections.Counter(
        {list: "polygons", dict: "rle", type(None): "none"}[type(each)] for r in records for each in r.segmentations
    )
    return {
        "images": len(records),
        "images_without_objects": sum(not len(record.labels) for record in records),
        "objects": objects.total(),
        "crowds": crowds.total(),
        "segmentations": dict(kinds),
        "classes": [
            {"id": category_id, "name": name, "objects": objects[k], "crowds": crowds[k], "images": images[k]}
            for k, (category_id, name) in enumerate(annotations.categories.items(), start=1)
        ],
        "training": training_statistics(annotations, findings),
    }


def training_statistics(annotations, findings):
    """The sizes of the objects at the training size, compared with the anchors: a dict, or None without objects."""
    if config.PREPROC.TRAIN_CROP_SIZE:  # large-scale jitter varies about this scale
        short_edge = max_size = config.PREPROC.TRAIN_CROP_SIZE
    else:
        short_edge = int(np.min(config.PREPROC.TRAIN_SHORT_EDGE_SIZE))
        max_size = largest_edge(config)
    sizes = []
    for index, record in enumerate(annotations.records):
        height, width = resized_shape(record.height, record.width, short_edge=short_edge, max_size=max_size)
        faults = annotations.faults.get(index) or [""] * len(record.labels)
        is_used = ~record.is_crowd & np.array([not f or f == rules.NO_MASK for f in faults], bool)
        sides = (record.boxes_xyxy[:, 2:] - record.boxes_xyxy[:, :2]) * (width / record.width, height / record.height)
        for side in sides[is_used & (sides.prod(axis=1) <= np_boxes.MIN_BOX_AREA)]:
            name = annotations.file_names[record.image_id]
            text = f"an object in {name} is {side[0]:.2f} x {side[1]:.2f} pixels large in training"
            findings.append(rules.Finding("vanishing", text, name))
        sizes.append(sides[is_used])
    sizes = np.concatenate([*sizes, np.zeros((0, 2))])
    if not len(sizes):
        return None
    edges = np.sqrt(sizes.prod(axis=1))
    best_iou, best_size = best_anchors(sizes)
    return {
        "short_edge": short_edge,
        "max_size": max_size,
        "sqrt_area": {f"p{p}": round(float(np.percentile(edges, p)), 1) for p in PERCENTILES},
        "objects_by_anchor_size": {
            f"{size:g}": int((best_size == size).sum()) for size in sorted(config.RPN.ANCHOR_SIZES)
        },
        "share_with_few_anchors": round(float((best_iou < FEW_ANCHORS_IOU).mean()), 4),
    }


def best_anchors(sizes):
    """The highest IoU of each object, float [G, 2] (width, height), with an anchor of the same centre, and the size of
    that anchor: two arrays [G]."""
    anchors = np_boxes.base_anchors(config.RPN.ANCHOR_SIZES, config.RPN.ANCHOR_RATIOS)
    anchors = anchors[:, 2:] - anchors[:, :2]
    common = np.minimum(sizes[:, None], anchors).prod(axis=2)
    iou = common / (sizes.prod(axis=1)[:, None] + anchors.prod(axis=1) - common)
    of_size = np.repeat(config.RPN.ANCHOR_SIZES, len(config.RPN.ANCHOR_RATIOS))
    return iou.max(axis=1), of_size[iou.argmax(axis=1)]


def compare_classes(examined, other):
    """A text on how the classes of another json differ; "" if they are equal."""
    findings = []
    categories = dict(sorted(rules.check_categories(read_json(other)["categories"], findings).items()))
    if broken := [finding.text for finding in findings if finding.level == rules.REFUSED]:
        return f"{other}: {rules.name_some(broken, separator='; ')}"
    return class_difference(examined.annotations.categories.values(), categories.values())


# ------------------------------------------------------------------------------------------------------------ reporting


def as_dict(examined, difference, arguments):
    """The report for --json, a dict."""
    by_rule = group(examined.findings)
    return {
        "annotations": arguments.annotations,
        "images": arguments.images,
        "errors": len(examined.errors()),
        "findings": {
            rule: {
                "level": found[0].level,
                "what": rules.RULES[rule][1],
                "count": len(found),
                "list": [finding._asdict() for finding in found],
            }
            for rule, found in by_rule.items()
        },
        **({"other": arguments.other, "difference": difference or None} if arguments.other else {}),
        "statistics": examined.statistics,
    }


def group(findings):
    """Groups findings by rule: {rule: list}, in the order of RULES."""
    found = collections.defaultdict(list)
    for finding in findings:
        found[finding.rule].append(finding)
    return {rule: found[rule] for rule in rules.RULES if rule in found}


def as_text(examined, difference, arguments):
    """The report as text."""
    statistics = examined.statistics
    lines = [
        f"{arguments.annotations}: {rules.count(statistics['images'], 'image')} "
        f"({statistics['images_without_objects']} without objects), {rules.count(statistics['objects'], 'object')}, "
        f"{rules.count(statistics['crowds'], 'crowd region')}, {len(statistics['classes'])} classes",
        f"segmentations: {', '.join(f'{n} {kind}' for kind, n in statistics['segmentations'].items()) or 'none'}",
    ]
    if not statistics["segmentations"].keys() - {"none"}:
        lines.append("no object has a segmentation: train with MODE_MASK=False")
    for level in (rules.REFUSED, rules.DROPPED, rules.NOTED):
        for rule, found in group(examined.findings).items():
            if found[0].level == level:
                lines += ["", f"{level}: {len(found)} x {rules.RULES[rule][1]}"]
                lines += [f"  {rules.name_some([f.text for f in found], limit=NAMED, separator=chr(10) + '  ')}"]
    lines += ["", class_table(statistics["classes"]), "", training_text(statistics["training"])]
    if arguments.other:
        lines += ["", f"classes of {arguments.other}: {difference or 'the same'}"]
    errors = len(examined.errors())
    lines += ["", "clean" if not errors + bool(difference) else f"{rules.count(errors + bool(difference), 'error')}"]
    return "\n".join(lines)


def class_table(classes):
    """A table of the classes in the statistics, as text."""
    rows = [(each["id"], each["name"], each["objects"], each["crowds"], each["images"]) for each in classes]
    return tabulate(rows, ["id", "class", "objects", "crowds", "images"], tablefmt="simple")


def training_text(training):
    """Lines on `training_statistics`."""
    if training is None:
        return "no object to train on"
    percentiles = ", ".join(f"{p} {value:g}" for p, value in training["sqrt_area"].items())
    anchors = ", ".join(f"{size}: {n}" for size, n in training["objects_by_anchor_size"].items())
    return (
        f"at the training size (short edge {training['short_edge']}, long edge up to {training['max_size']:g}):\n"
        f"  object size, square root of the area in pixels, percentiles: {percentiles}\n"
        f"  objects by the size of their best anchor: {anchors}\n"
        f"  {training['share_with_few_anchors']:.1%} of the objects overlap no anchor by IoU {FEW_ANCHORS_IOU}"
        + (
            ": consider other RPN.ANCHOR_SIZES or RPN.ANCHOR_RATIOS"
            if training["share_with_few_anchors"] > MANY_WITH_FEW_ANCHORS
            else ""
        )
    )


# --------------------------------------------------------------------------------------------------------------- fixing


def fix(examined, image_dir, path):
    """Writes a copy of the json without the faults; returns a line on what it kept.

    It removes broken images with their objects, broken objects, and polygons without an area. It clips boxes, replaces
    repeated annotation ids, and computes areas that are missing or at most 1 pixel.
    """
    content = dict(examined.content)
    content["annotations"] = with_own_ids(content["annotations"])
    content["images"] = unique_images(content["images"])
    findings = []
    categories = {entry["id"]: entry for entry in reversed(content["categories"]) if is_category(entry)}
    images = rules.check_images(content["images"], findings)
    bad_rules = ("missing file", "outside file", "unreadable", "size")
    bad_files = {finding.file_name for finding in examined.findings if finding.rule in bad_rules}
    images = {id_: entry for id_, entry in images.items() if entry and entry["file_name"] not in bad_files}
    by_image = rules.check_annotations(content["annotations"], images, categories, findings)
    needs_mask = any(finding.rule == "no segmentation" for finding in examined.findings)
    annotations = [
        cleaned
        for image_id, entries in by_image.items()
        for cleaned in (clean(entry, images[image_id], needs_mask=needs_mask) for entry in entries)
        if cleaned
    ]
    before = {key: len(content[key]) for key in ("images", "annotations", "categories")}
    content["categories"] = sorted(categories.values(), key=lambda entry: entry["id"])
    content["images"], content["annotations"] = list(images.values()), annotations
    write_json(content, path)
    kept = ", ".join(f"{len(content[key])} of {before[key]} {key}" for key in before)
    return f"{path}: kept {kept}; check it: .venv/bin/python -m tools.doctor {path} {image_dir}"


def with_own_ids(entries):
    """The annotations, with a new id in place of each missing or repeated one."""
    taken = {e["id"] for e in entries if isinstance(e, dict) and type(e.get("id")) is int}
    free, used, kept = itertools.count(max(taken, default=0) + 1), set(), []
    for entry in filter(lambda entry: isinstance(entry, dict), entries):
        has_own = type(entry.get("id")) is int and entry["id"] not in used
        kept.append(entry if has_own else {**entry, "id": next(free)})
        used.add(kept[-1]["id"])
    return kept


def unique_images(entries):
    """The images without those whose id or file_name an earlier one has."""
    ids, names, kept = set(), set(), []
    for entry in filter(is_image, entries):
        if entry["id"] not in ids and entry["file_name"] not in names:
            kept.append(entry)
        ids.add(entry["id"])
        names.add(entry["file_name"])
    return kept


def is_image(entry):
    """Whether an entry has an id and a file_name of the right types."""
    return isinstance(entry, dict) and type(entry.get("id")) is int and type(entry.get("file_name")) is str


def is_category(entry):
    """Whether an entry has an id and a name of the right types."""
    return isinstance(entry, dict) and type(entry.get("id")) is int and type(entry.get("name")) is str


def clean(entry, image, *, needs_mask):
    """Repairs a usable annotation: a copy that breaks no rule, or None if that is impossible.

    Args:
        needs_mask: whether an object without a segmentation is broken.
    """
    height, width = image["height"], image["width"]
    raw = np_boxes.xywh_to_xyxy(np.array(entry["bbox"], np.float64))
    box = np_boxes.clip(raw, height, width)
    entry = {"iscrowd": 0, **entry}
    if entry["iscrowd"] is None:
        entry["iscrowd"] = 0
    if isinstance(entry.get("segmentation"), list):
        entry["segmentation"] = [
            polygon
            for polygon in entry["segmentation"]
            if not isinstance(polygon, list)  # broken: check_objects reports it below
            or (len(polygon) >= 2 * MIN_POLYGON_POINTS and len(polygon) % 2 == 0)
        ]
    findings = []
    probe = {**entry, "area": entry.get("area") if (entry.get("area") or 0) > np_boxes.MIN_BOX_AREA else None}
    objects = rules.check_objects(image, [probe], findings)
    if any(finding.rule == "segmentation" for finding in findings) or is_dropped(objects.faults[0], entry, needs_mask):
        return None
    if probe["area"] is None:
        mask = segmentation_to_mask(objects.segmentations[0], height, width)
        entry["area"] = float(mask.sum() or np_boxes.area(box)[0])
        if entry["area"] <= np_boxes.MIN_BOX_AREA:
            return None
    if np.any(box != raw):
        entry["bbox"] = np_boxes.xyxy_to_xywh(box)[0].tolist()
    return entry


def is_dropped(fault, entry, needs_mask):
    """Whether a fault removes the object. `ignore` does not, nor a missing mask in a data set without segmentations."""
    return fault not in ("", "ignore") and (needs_mask or fault != rules.NO_MASK or not rules.lacks_segmentation(entry))


def write_json(content, path):
    """Writes a new file, whole or not at all."""
    try:
        text = json.dumps(content, allow_nan=False)
    except ValueError:
        problem = "a field that no rule covers holds a number that is not finite: correct it in the source"
        raise UserError(f"{path} was not written: {problem}") from None
    write_whole(path, text, overwrite=False)


# -------------------------------------------------------------------------------------------------------------- showing


def show(examined, image_dir, directory):
    """Writes a page of thumbnails, images with findings first; returns a line that names it."""
    texts = collections.defaultdict(list)
    for finding in examined.findings:
        texts[finding.file_name].append(finding.text)
    records, file_names = examined.annotations.records, examined.annotations.file_names
    first = [record for record in records if file_names[record.image_id] in texts][: THUMBNAILS // 2]
    others = [record for record in records if file_names[record.image_id] not in texts]
    count = min(len(others), THUMBNAILS - len(first))
    shown = first + [others[index] for index in np.linspace(0, len(others) - 1, count).astype(int)]
    figures = []
    for number, record in enumerate(bar("thumbnails", "image")(shown), start=1):
        name = file_names[record.image_id]
        figures.append(figure(record, examined, directory / f"{number:03d}.jpg", name, texts[name]))
    page = PAGE.format(title=html.escape(os.path.basename(image_dir.rstrip("/"))), figures="\n".join(figures))
    write_whole(directory / "index.html", page, overwrite=False)
    return f"{directory / 'index.html'}: {len(shown)} of {len(records)} images, {len(first)} of them with findings"


PAGE = """<!DOCTYPE html>
<meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.4 sans-serif; margin: 24px; background: #fafafa; color: #222 }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 20px }}
figure {{ margin: 0; background: #fff; padding: 8px; border: 1px solid #ddd }}
img {{ width: 100%; height: 260px; object-fit: contain; background: #eee }}
figcaption {{ overflow-wrap: anywhere }} .finding {{ color: #b00020 }}
</style>
<h1>{title}</h1>
<main>
{figures}
</main>
"""


def figure(record, examined, path, name, texts):
    """Writes the thumbnail of one image; returns its HTML, without a picture if the image cannot be read."""
    caption = f"{html.escape(name)}: {rules.count(len(record.labels), 'object')}"
    for text in texts[:NAMED]:
        caption += f'<div class="finding">{html.escape(text)}</div>'
    try:
        image = load_record_image(record)
    except ImageError:
        return f"<figure><figcaption>{caption}</figcaption></figure>"
    picture = viz.draw_ground_truth(image, record, list(examined.annotations.categories.values()))
    scale = min(1.0, THUMBNAIL_EDGE / max(picture.shape[:2]))
    picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    write_whole(path, cv2.imencode(".jpg", picture)[1].tobytes(), overwrite=False, durable=False)
    return f'<figure><img src="{path.name}" alt=""><figcaption>{caption}</figcaption></figure>'


def run_program():
    """Runs the command; returns its exit code."""
    try:
        return main(parse_arguments())
    except DatasetError as error:
        say(error)
        return 4
    except UserError as error:
        say(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run_program())
