"""Data sets by name or by file: what `DATA.TRAIN` and `DATA.VAL` may say.

    dataset = get_dataset("coco_val2017", "~/data/coco")              a registered name, found below DATA.BASEDIR
    dataset = get_dataset("cats/val.json:cats/images")                annotations in COCO's format, and their images
    dataset.class_names, dataset.records(training=False)

To add a name, register a function that makes the data set; to add a format, write a subclass (docs/custom_data.md):

    register("cats_train", lambda basedir: CocoDataset("cats_train", basedir / "cats.json", basedir / "images"))
"""

import difflib
import re
from pathlib import Path

from dataset.coco import CocoDataset
from dataset.record import Dataset, DatasetError, Record, TooManyDropped

__all__ = [
    "CocoDataset",
    "Dataset",
    "DatasetError",
    "Record",
    "TooManyDropped",
    "class_difference",
    "get_dataset",
    "get_datasets",
    "register",
    "short_names",
]

_registry = {}
_FILES = re.compile(r"(?P<annotations>.+\.json):(?P<images>.+)", re.DOTALL)


def register(name, build):
    """Make a data set known under a name.

    Args:
        build: function from the base directory (pathlib.Path) to a Dataset; called each time the data set is asked for.

    Raises:
        DatasetError: the name is taken.
    """
    if name in _registry:
        raise DatasetError(f"data set {name} is registered already")
    _registry[name] = build


def get_dataset(name, basedir="."):
    """One data set.

    Args:
        name: a registered name; or "ANNOTATIONS.json:IMAGE_DIR", paths of files in COCO's format.
        basedir: the directory that registered names are found in.

    Raises:
        DatasetError: no such name, or its files are missing or unusable.
    """
    if files := _FILES.fullmatch(name):
        return CocoDataset(short_names([name])[0], files["annotations"], files["images"])
    if name not in _registry:
        near = difflib.get_close_matches(name, _registry, n=3)
        known = f"near: {', '.join(near)}" if near else f"known: {', '.join(_registry)}"
        raise DatasetError(f"no data set {name!r} ({known}; or ANNOTATIONS.json:IMAGE_DIR)")
    basedir = Path(basedir).expanduser()
    if not basedir.is_dir():
        raise DatasetError(f"{name}: no directory {basedir}: set DATA.BASEDIR to the directory that holds the data set")
    return _registry[name](basedir)


def get_datasets(names, basedir="."):
    """The data sets of these names, as a list; one that is named twice is read once. They must have the same classes.

    Raises:
        DatasetError: with the problems of all of them.
    """
    found, problems = {}, []
    for name, short_name in zip(names, short_names(names)):
        try:
            if name not in found:
                found[name] = get_dataset(name, basedir)
                found[name].name = short_name
        except DatasetError as error:
            found[name] = None
            problems.append(str(error))
    usable = [dataset for dataset in found.values() if dataset]
    for dataset in usable[1:]:
        if difference := class_difference(usable[0].class_names, dataset.class_names):
            problems.append(f"the classes of {dataset.name} are not those of {usable[0].name}: {difference}")
    if problems:
        raise DatasetError("\n".join(problems))
    return [found[name] for name in names]


def short_names(names):
    """What each data set is called in logs and in names of files: registered names, and the stems of json files."""
    unique = {}
    for name in names:
        files = _FILES.fullmatch(name)
        short = Path(files["annotations"]).stem if files else name
        taken = [other for key, other in unique.items() if key != name]
        number = next(n for n in range(1, len(names) + 1) if (f"{short}-{n}" if n > 1 else short) not in taken)
        unique.setdefault(name, f"{short}-{number}" if number > 1 else short)
    return [unique[name] for name in names]


def class_difference(expected, found):
    """How two tuples of class names differ, in words; "" where they are the same in the same order."""
    if tuple(expected) == tuple(found):
        return ""
    missing = [name for name in expected if name not in found]
    added = [name for name in found if name not in expected]
    parts = [f"{', '.join(names[:10])} {what}" for names, what in ((missing, "missing"), (added, "added")) if names]
    if parts:
        return "; ".join(parts)
    pairs = enumerate(zip(expected, found), start=1)
    first = next((f"class {k} is {b}, not {a}" for k, (a, b) in pairs if a != b), None)
    return f"their ids put them in another order ({first})" if first else f"{len(found)}, not {len(expected)} classes"


def _register_coco_layout(name, split, image_dir, *, max_images=None, source="COCO is at https://cocodataset.org"):
    """A data set in COCO's layout: `annotations/instances_SPLIT.json` beside the image directories."""
    annotation_file = f"annotations/instances_{split}.json"
    hint = f"DATA.BASEDIR must hold {annotation_file} and {image_dir}/. {source}"

    def build(basedir):
        return CocoDataset(name, basedir / annotation_file, basedir / image_dir, max_images=max_images, hint=hint)

    register(name, build)


for _split, _image_dir in (
    ("train2014", "train2014"),
    ("val2014", "val2014"),
    # 5,000 images of val2014 that the field tested on before 2017, and the other 35,504, used for training.
    ("minival2014", "val2014"),
    ("valminusminival2014", "val2014"),
    ("train2017", "train2017"),
    ("val2017", "val2017"),
):
    _register_coco_layout(f"coco_{_split}", _split, _image_dir)
_register_coco_layout("coco_val2017_100", "val2017", "val2017", max_images=100)
for _name in ("shapes_train", "shapes_val"):
    _register_coco_layout(_name, _name, _name, source="To make it: python -m dataset.shapes BASEDIR")
