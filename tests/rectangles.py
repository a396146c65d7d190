"""A data set of rectangles, and a network that knows it."""

import json

import cv2
import numpy as np
from helpers import found

from config import Config
from dataset import CocoDataset


def make_settings():
    """Defaults with FPN's padding, small images, and no worker processes."""
    settings = Config()
    settings.update(["MODE_FPN=True", "PREPROC.TEST_SHORT_EDGE_SIZE=50", "PREPROC.MAX_SIZE=200", "DATA.NUM_WORKERS=0"])
    return settings


SIZES = ((67, 100), (100, 67), (45, 45), (120, 90), (67, 100))


def make_dataset(folder):
    """Writes five images with two rectangles each, of whole pixels, and their annotations; opens the data set."""
    annotations = []
    for image_id, (height, width) in enumerate(SIZES, start=1):
        cv2.imwrite(str(folder / f"{image_id}.png"), np.full((height, width, 3), image_id, np.uint8))
        for x, y, side in ((2, 3, 24), (20, 22, 21)):
            polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
            one = {"image_id": image_id, "category_id": 30 if side == 24 else 40, "bbox": [x, y, side, side]}
            one |= {"segmentation": [polygon], "area": side * side, "iscrowd": 0}
            annotations.append({**one, "id": len(annotations) + 1})
    images = [
        {"id": number, "height": height, "width": width, "file_name": f"{number}.png"}
        for number, (height, width) in enumerate(SIZES, start=1)
    ]
    categories = [{"id": 30, "name": "big"}, {"id": 40, "name": "small"}]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "truth.json").write_text(json.dumps(content))
    return CocoDataset("rectangles", folder / "truth.json", folder)


def perfect(dataset):
    """A network that knows the data set: the image's number is the value of its pixels."""
    records = {record.image_id: record for record in dataset.records(training=False)}

    def predict(image, image_shape):
        rows = []
        for index, (height, width) in enumerate(image_shape.tolist()):
            record = records[int(image[index, 0, 0, 0])]
            factors = np.array([width / record.width, height / record.height] * 2)
            for label, box in zip(record.labels, record.boxes_xyxy):
                rows.insert(0, (box * factors, 0.5 + label / 10, label, index))
        return found(*rows, masks=np.ones((len(rows), 28, 28), np.float32))

    return predict
