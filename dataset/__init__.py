"""Data sets by name: what `DATA.TRAIN` and `DATA.VAL` may say, found below `DATA.BASEDIR`.

    dataset = get_dataset("coco_val2017", "~/data/coco")
    dataset.class_names, dataset.records(training=False)

To add one in COCO's format, register a function that makes it; to add a format, write a subclass of Dataset:

    register("cats_train", lambda basedir: CocoDataset("cats_train", basedir / "cats.json", basedir / "images"))
"""

import difflib
from pathlib import Path

from dataset.coco import CocoDataset
from dataset.record import Dataset, DatasetError, Record

__all__ = ["CocoDataset", "Dataset", "DatasetError", "Record", "get_dataset", "register"]

_registry = {}


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


def get_dataset(name, basedir):
    """The data set of this name, read from below `basedir`.

    Raises:
        DatasetError: no such name, or its files are missing or unusable.
    """
    if name not in _registry:
        near = difflib.get_close_matches(name, _registry, n=3)
        known = f"near: {', '.join(near)}" if near else f"known: {', '.join(_registry)}"
        raise DatasetError(f"no data set {name!r} ({known})")
    basedir = Path(basedir).expanduser()
    if not basedir.is_dir():
        raise DatasetError(f"{name}: no directory {basedir}: set DATA.BASEDIR to the directory that holds the data set")
    return _registry[name](basedir)


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
