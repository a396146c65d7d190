"""Images with painted objects, as records, as examples and as streams of batches."""

import hashlib
import itertools

import cv2
import numpy as np

import data
from common.rle import segmentation_to_mask
from dataset import Record
from dataset.augment import Augmentation

AUGMENTATION = {"short_edge": 64, "max_size": 128}


SETTINGS = {"batch_size": 1, "multiple": 32, "with_masks": True, "seed": 7}


# Objects of different shape, none symmetric, in an image 90 wide and 60 high: x, y, ...
TRIANGLE = [[8, 6], [40, 14], [20, 50]]


ARROW = [[50, 30], [84, 30], [84, 56], [70, 44], [50, 52]]


def make_image(path, height, width, polygons=()):
    """A dark gradient, with polygon k painted white in channel k."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:] = np.linspace(0, 60, width)[None, :, None]
    for channel, polygon in enumerate(polygons):
        image[..., channel][segmentation_to_mask([np.array(polygon)], height, width) > 0] = 255
    assert cv2.imwrite(str(path), image)


def make_record(folder, image_id, height, width, polygons=(), *, crowd=(), segmentations=None):
    path = folder / f"{image_id}.png"
    make_image(path, height, width, polygons)
    corners = [np.concatenate([np.min(polygon, axis=0), np.max(polygon, axis=0)]) for polygon in polygons]
    return Record(
        image_id=image_id,
        path=str(path),
        height=height,
        width=width,
        boxes_xyxy=np.array(corners, np.float32).reshape(-1, 4),
        labels=np.arange(1, len(polygons) + 1, dtype=np.int64),
        is_crowd=np.isin(np.arange(len(polygons)), crowd),
        segmentations=tuple(segmentations or [[np.array(polygon, np.float32)] for polygon in polygons]),
    )


def make_records(folder):
    """Seven images: four wide, one square, two tall; with two, one or no objects."""
    sizes = [(60, 90), (60, 90), (90, 60), (64, 64), (48, 100), (120, 50), (50, 70)]
    objects = [[TRIANGLE, ARROW], [ARROW], [], [TRIANGLE], [TRIANGLE], [TRIANGLE], []]
    return [make_record(folder, i, *size, polygons) for i, (size, polygons) in enumerate(zip(sizes, objects), 11)]


def split_off_augmentation(changes):
    """(Augmentation, the other settings)."""
    fields = {name: changes.pop(name) for name in Augmentation._fields if name in changes}
    return Augmentation(**fields), changes


def stream(records, **changes):
    augmentation, others = split_off_augmentation({**AUGMENTATION, **SETTINGS, **changes})
    return data.TrainingData(records, augmentation=augmentation, **others)


def take(batches, count):
    with_close = iter(batches)
    taken = list(itertools.islice(with_close, count))
    with_close.close()
    return taken


def fingerprint(batches):
    digest = hashlib.sha256()
    for batch in batches:
        for name, array in sorted(batch.items()):
            digest.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def unpack(packed, width):
    return np.unpackbits(packed, axis=-1)[..., :width]


def mask_iou(a, b):
    return np.logical_and(a, b).sum() / np.logical_or(a, b).sum()


def tight_box(mask):
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
