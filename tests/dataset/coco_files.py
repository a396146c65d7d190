"""Content of small COCO jsons, valid but for what a test changes; and opening jsons as pycocotools does."""

import contextlib
import io

from pycocotools.coco import COCO

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


def annotation(**changes):
    """A valid annotation: a square of 20 x 20 at (10, 10)."""
    default = {"id": 1, "image_id": 5, "category_id": 7, "iscrowd": 0, "area": 400, "bbox": [10, 10, 20, 20]}
    return {**default, "segmentation": [SQUARE], **changes}


def image(image_id, **changes):
    return {"id": image_id, "file_name": f"{image_id}.jpg", "height": 40, "width": 60, **changes}


def coco_json(**changes):
    """A valid file: sparse and unordered category ids, two images, one object. No `info`."""
    categories = [{"id": 90, "name": "owl"}, {"id": 0, "name": "ant"}, {"id": 7, "name": "cat"}]
    content = {"images": [image(9), image(5)], "annotations": [annotation()], "categories": categories}
    return {**content, **changes}


def with_annotations(*annotations):
    numbered = [{**a, "id": number} for number, a in enumerate(annotations, start=1)]
    return coco_json(annotations=numbered)


def categories(*names):
    return [{"id": number, "name": name} for number, name in enumerate(names)]


def open_with_pycocotools(path):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))
