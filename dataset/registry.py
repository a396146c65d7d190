"""Data sets by name or by file: the values of `DATA.TRAIN` and `DATA.VAL`.

    dataset = get_dataset("coco_val2017", "~/data/coco")              a registered name, found below DATA.BASEDIR
    dataset = get_dataset("cats/val.json:cats/images")                annotations in COCO's format, and their images
    dataset.class_names, dataset.records(training=False)

To add a name, register a function that creates the data set; to add a format, write a subclass (docs/custom_data.md):

    register("cats_train", lambda basedir: CocoDataset("cats_train", basedir / "cats.json", basedir / "images"))
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from common.registry import Registry
from dataset.coco import CocoDataset
from dataset.record import Dataset, DatasetError, Record

DATASETS = Registry("data set", error=DatasetError, otherwise="; or ANNOTATIONS.json:IMAGE_DIR")
_FILES = re.compile(r"(?P<annotations>.+\.json):(?P<images>.+)", re.DOTALL)


def register(name: str, build: Callable[[Path], Dataset]) -> Callable[[Path], Dataset]:
    """Registers a data set under a name.

    Args:
        build: function from the base directory (pathlib.Path) to a Dataset; called each time the data set is requested.
    Returns:
        the function
    Raises:
        DatasetError: the name is registered already.
    """
    return DATASETS.register(name, build)


def get_dataset(name: str, basedir: str | Path = ".") -> Dataset:
    """Returns one data set.

    Args:
        name: a registered name; or "ANNOTATIONS.json:IMAGE_DIR", paths of files in COCO's format.
        basedir: the directory that contains the files of registered names.

    Raises:
        DatasetError: the name is not registered, or its files are missing or unusable.
    """
    if files := _FILES.fullmatch(name):
        return CocoDataset(short_names([name])[0], files["annotations"], files["images"])
    build = DATASETS.find(name)
    basedir = Path(basedir).expanduser()
    if not basedir.is_dir():
        raise DatasetError(f"{name}: no directory {basedir}: set DATA.BASEDIR to the directory that holds the data set")
    return build(basedir)


def get_datasets(names: Sequence[str], basedir: str | Path = ".") -> list[Dataset]:
    """Returns the data sets of these names, which must have the same classes; a repeated name is read once.

    Raises:
        DatasetError: with the problems of all data sets.
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


def short_names(names: Sequence[str]) -> list[str]:
    """Returns the name of each data set in logs and file names: its registered name, or the stem of its json file."""
    unique = {}
    for name in names:
        files = _FILES.fullmatch(name)
        short = Path(files["annotations"]).stem if files else name
        taken = [other for key, other in unique.items() if key != name]
        number = next(n for n in range(1, len(names) + 1) if (f"{short}-{n}" if n > 1 else short) not in taken)
        unique.setdefault(name, f"{short}-{number}" if number > 1 else short)
    return [unique[name] for name in names]


def find_records(texts: Iterable[str], records: Iterable[Record]) -> list[tuple[Path, Record | None]]:
    """Returns the images that a user names: a list of (Path, Record, or None for an image without annotations).

    Args:
        texts: image files, or ids of images. records: list of Records to search.
    Raises:
        DatasetError: a text is neither a file nor the id of an image of the records.
    """
    by_id = {str(record.image_id): record for record in reversed(records)}  # of several with one id, the first
    by_path = {os.path.realpath(record.path): record for record in records}
    found = []
    for text in texts:
        record = by_path.get(os.path.realpath(text)) or by_id.get(text)
        if not (record or os.path.isfile(text)):
            raise DatasetError(f"{text}: no such file, and no id of an image in the data sets")
        found.append((Path(record.path if record else text), record))
    return found


def class_difference(expected: Sequence[str], found: Sequence[str]) -> str:
    """Describes how two sequences of class names differ; "" if they are equal, order included."""
    if tuple(expected) == tuple(found):
        return ""
    missing = [name for name in expected if name not in found]
    added = [name for name in found if name not in expected]
    parts = [f"{', '.join(names[:10])} {change}" for names, change in ((missing, "missing"), (added, "added")) if names]
    if parts:
        return "; ".join(parts)
    pairs = enumerate(zip(expected, found), start=1)
    first = next((f"class {k} is {b}, not {a}" for k, (a, b) in pairs if a != b), None)
    return f"their ids put them in another order ({first})" if first else f"{len(found)}, not {len(expected)} classes"


def _register_coco_layout(name, split, image_dir, *, max_images=None, source="COCO is at https://cocodataset.org"):
    """Registers a data set in COCO's layout: `annotations/instances_SPLIT.json` beside the image directories."""
    annotation_file = f"annotations/instances_{split}.json"
    hint = f"DATA.BASEDIR must hold {annotation_file} and {image_dir}/. {source}"

    def build(basedir):
        return CocoDataset(name, basedir / annotation_file, basedir / image_dir, max_images=max_images, hint=hint)

    register(name, build)


for _split, _image_dir in (
    ("train2014", "train2014"),
    ("val2014", "val2014"),
    # 5,000 images of val2014, the usual test images before 2017; the other 35,504 were used for training.
    ("minival2014", "val2014"),
    ("valminusminival2014", "val2014"),
    ("train2017", "train2017"),
    ("val2017", "val2017"),
):
    _register_coco_layout(f"coco_{_split}", _split, _image_dir)
_register_coco_layout("coco_val2017_100", "val2017", "val2017", max_images=100)
for _name in ("shapes_train", "shapes_val"):
    _register_coco_layout(_name, _name, _name, source="To make it: python -m dataset.shapes BASEDIR")
