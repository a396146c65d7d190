"""From dataset records to batches of NumPy arrays: decode, resize, flip, rasterise, group and pad.

    for batch in training_data(records): ...                    without end; the settings come from the configuration
    for records, batch in evaluation_data(records): ...         every image once

Shape shorthand: N images of a batch; H, W height and width; G most objects of an image in a batch, at least 1.

The order is a pure function of the seed. A position is the number of images that all ranks together were given before;
an epoch is one permutation of the records; an image's random choices come from (seed, position). So neither the number
of workers nor an interruption changes what is trained on.

Imports neither TensorFlow nor tensorpack (whose import is TensorFlow's): worker processes start fast and stay small.
"""

import atexit
import contextlib
import fcntl
import functools
import glob
import io
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import traceback
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

import boxes
from config import UserError, config
from dataset import DatasetError, Record

logger = logging.getLogger(__name__)

# What the backbone's strides need: FPN adds levels of different stride, C4 takes any size.
FPN_MULTIPLE = 32
# No edge is resized below the coarsest stride (a 1 x 5000 image would vanish).
MIN_EDGE = 32
CROWD_LABEL = -1
# A file of a few hundred bytes can ask for gigabytes: images of more pixels are never decoded.
MAX_PIXELS = 100_000_000
# A box that loses no more than this at an edge of the example is not cut.
CUT_PIXELS = 0.5
# How many images' sizes are compared with the annotations before a training, evenly spread; costs 0.1 ms each.
SIZE_SAMPLE = 500
# Images that cannot be read: so many are named, and so many others tried in the place of one.
NAMED_IMAGES, SUBSTITUTES = 10, 100
# Results that may wait for their turn, for each worker; bounds the memory.
LOOKAHEAD_PER_WORKER = 3
# What Linux lets any user ask for.
PIPE_BYTES = 2**20
# Decoding for evaluation costs milliseconds per image: more threads would only disturb the model.
MAX_EVALUATION_THREADS = 4

# What a random number is for, so that an epoch and a position of the same number differ.
_ORDER, _EXAMPLE, _SUBSTITUTE = 0, 1, 2

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jp2", ".pgm", ".ppm"}
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"}
_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9"
_EXIF_ORIENTATION, _SIDEWAYS = 274, (5, 6, 7, 8)
# The formats whose orientation OpenCV applies and Pillow's `size` does not.
_ORIENTED = ("JPEG", "MPO", "PNG", "WEBP")
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit comes without the image's name; MAX_PIXELS is lower


class DataError(UserError):
    """The data ended the run: a worker failed or died. One line that names the image and the cause."""

    exit_code = 4


class ImageError(DataError):
    """An image file that cannot be used; the message names its path."""


# ---------------------------------------------------------------- settings


def network_geometry():
    """(max_size, multiple) of the configured model: limit of the long edge, and what padded sizes are a multiple of.

    In FPN mode the limit is rounded up to the multiple, as in the reference (1333 means 1344).
    """
    multiple = FPN_MULTIPLE if config.MODE_FPN else 1
    return _round_up(config.PREPROC.MAX_SIZE, multiple), multiple


def training_data(records, *, start=0, shard_index=0, num_shards=1):
    """TrainingData with the configuration's settings; the arguments are TrainingData's."""
    max_size, multiple = network_geometry()
    augmentation = Augmentation(
        short_edge=config.PREPROC.TRAIN_SHORT_EDGE_SIZE,
        max_size=max_size,
        crop_size=config.PREPROC.TRAIN_CROP_SIZE,
        crop_scale=config.PREPROC.TRAIN_CROP_SCALE,
        color_jitter=config.PREPROC.COLOR_JITTER,
    )
    return TrainingData(
        records,
        batch_size=config.TRAIN.BATCH_SIZE_PER_GPU,
        augmentation=augmentation,
        multiple=multiple,
        with_masks=config.MODE_MASK,
        seed=config.TRAIN.SEED,
        num_workers=config.DATA.NUM_WORKERS,
        repeat_threshold=config.DATA.REPEAT_THRESHOLD,
        max_skipped=config.DATA.MAX_DROPPED,
        start=start,
        shard_index=shard_index,
        num_shards=num_shards,
    )


class Geometry(NamedTuple):
    """How images become a batch: `resize_image`'s short_edge and max_size, and `pad_images`' multiple; in pixels."""

    short_edge: int
    max_size: float
    multiple: int

    def padded_shape(self, height, width):
        """(height, width) of the batch of an image of this size alone."""
        shape = resized_shape(height, width, short_edge=self.short_edge, max_size=self.max_size)
        return tuple(_round_up(edge, self.multiple) for edge in shape)

    def batch(self, images):
        """`pad_images` of the resized images."""
        resized = [resize_image(image, short_edge=self.short_edge, max_size=self.max_size) for image in images]
        return pad_images(resized, multiple=self.multiple)


def inference_geometry():
    """The Geometry of the configured model in evaluation and prediction; of test-time augmentation's largest scale."""
    max_size, multiple = network_geometry()
    scale = max(config.TEST.TTA_SCALES)
    return Geometry(round(config.PREPROC.TEST_SHORT_EDGE_SIZE * scale), max_size * scale, multiple)


def evaluation_data(records, *, shard_index=0, num_shards=1):
    """EvaluationData with the configuration's settings; the arguments are EvaluationData's."""
    return EvaluationData(
        records,
        batch_size=config.TEST.BATCH_SIZE_PER_GPU,
        **inference_geometry()._asdict(),
        max_skipped=config.DATA.MAX_DROPPED,
        num_threads=min(config.DATA.NUM_WORKERS, MAX_EVALUATION_THREADS),
        shard_index=shard_index,
        num_shards=num_shards,
    )


# ---------------------------------------------------------------- images


def find_files(patterns, suffixes):
    """The files, each once, that names of files and folders and glob patterns mean, and what is wrong with the others.

    Args:
        patterns: a folder stands for the files directly in it, `**` in a pattern for any number of folders.
        suffixes: IMAGE_SUFFIXES or VIDEO_SUFFIXES: what counts in folders and patterns.

    Returns:
        list of Path, list of str: a line for each pattern that means nothing
    """
    paths, problems = {}, []
    for pattern in map(str, patterns):
        found, problem = _find(pattern, suffixes)
        paths.update(dict.fromkeys(map(Path, found)))
        if not found:
            problems.append(f"{pattern}: {problem}")
    return list(paths), problems


def _find(pattern, suffixes):
    """What one pattern means, and what to say if that is nothing."""
    if os.path.isfile(pattern):  # a name may hold glob's characters
        return [pattern], None
    if not os.path.isdir(pattern) and not glob.has_magic(pattern):
        return [], "no such file"
    inside = os.path.join(glob.escape(pattern), "*") if os.path.isdir(pattern) else pattern
    found = (path for path in glob.iglob(inside, recursive=True) if Path(path).suffix.lower() in suffixes)
    return sorted(filter(os.path.isfile, found)), f"no file with one of the suffixes {' '.join(sorted(suffixes))}"


def load_image(path):
    """An image file as uint8 [H, W, 3] BGR: see `decode_image`.

    Raises:
        ImageError: missing, unreadable, cut off, no image, or one of more than MAX_PIXELS.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    return decode_image(content, path)


def decode_image(content, name):
    """The content of an image file as uint8 [H, W, 3] BGR, upright (EXIF orientation applied).

    Grayscale, palette, CMYK and 16-bit images are converted; an alpha channel is dropped.

    Args:
        content: bytes. name: for messages.

    Raises:
        ImageError: cut off, or no image.
    """
    if _is_cut_off(content):
        raise ImageError(f"{name}: the image is cut off ({len(content)} bytes)")
    _read_header(name, io.BytesIO(content))
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise ImageError(f"{name}: not readable as an image ({error.err})") from error
    if image is None:
        raise ImageError(f"{name}: not readable as an image")
    return image


def image_size(path):
    """(height, width) in pixels of an image file, upright, from its header alone.

    Raises:
        ImageError: missing, unreadable, no image, or one of more than MAX_PIXELS.
    """
    try:
        with open(path, "rb") as file:
            (width, height), is_sideways = _read_header(path, file)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    return (width, height) if is_sideways else (height, width)


def _read_header(path, file):
    """(width, height) as stored, and whether upright swaps them. Decodes nothing."""
    try:
        with Image.open(file) as image:
            size, is_sideways = image.size, image.format in _ORIENTED and _is_sideways(image)
    except Exception as error:  # Pillow's formats raise whatever their parsers do
        raise ImageError(f"{path}: not readable as an image") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"{path}: {size[0]} x {size[1]} pixels are more than the {MAX_PIXELS:,} that are read")
    return size, is_sideways


def _is_sideways(image):
    try:
        return image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
    except Exception:  # damaged EXIF data; OpenCV passes over it, too
        return False


def check_sizes(records, *, max_share):
    """Compare the sizes that the annotations state with the files' headers, for up to SIZE_SAMPLE images.

    What is wrong here is wrong systematically, and nearly every box with it. Unreadable images are not counted.

    Raises:
        DatasetError: more than this share of the sample differs.
    """
    sample = [records[i] for i in np.unique(np.linspace(0, len(records) - 1, SIZE_SAMPLE).astype(int))]
    problems = []
    for record in sample:
        with contextlib.suppress(ImageError):
            problems += filter(None, [size_problem(record, *image_size(record.path))])
    if len(problems) > max_share * len(sample):
        listed = "\n  ".join(problems[:NAMED_IMAGES])
        raise DatasetError(f"{len(problems)} of {len(sample)} images have other sizes than annotated:\n  {listed}")


def size_problem(record, height, width):
    """What to say of an image whose upright size is not the record's, so that every box is wrong; or None."""
    if (height, width) == (record.height, record.width):
        return None
    swapped = (
        ", swapped: they ignore the file's EXIF orientation" if (width, height) == (record.height, record.width) else ""
    )
    return (
        f"{record.path}: the image is {width} x {height} pixels, but the annotations say "
        f"{record.width} x {record.height}{swapped}"
    )


def resized_shape(height, width, *, short_edge, max_size):
    """(height, width) in pixels at which the network sees an image.

    The short edge becomes `short_edge`, or less where the long edge would exceed `max_size`; rounded as the reference
    does. No edge falls below MIN_EDGE (or `short_edge`, if that is less).
    """
    scale = short_edge / min(height, width)
    scale *= min(1, max_size / (scale * max(height, width)))
    smallest = min(MIN_EDGE, short_edge)
    return max(int(height * scale + 0.5), smallest), max(int(width * scale + 0.5), smallest)


def resize_image(image, *, short_edge, max_size):
    """An image [H, W, 3] at its `resized_shape`, uint8, bilinear."""
    height, width = resized_shape(*image.shape[:2], short_edge=short_edge, max_size=max_size)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def pad_images(images, *, multiple):
    """Images of different sizes as one array, zeros at the bottom and at the right.

    Returns:
        uint8 [N, H, W, 3], H and W the largest of all, rounded up to `multiple`; int32 [N, 2], the sizes of the images.
    """
    shapes = np.array([image.shape[:2] for image in images], np.int32)
    padded = np.zeros((len(images), *_round_up(shapes.max(axis=0), multiple), 3), np.uint8)
    for slot, image in zip(padded, images):
        slot[: image.shape[0], : image.shape[1]] = image
    return padded, shapes


def load_record_image(record):
    """The image of a record as from `load_image`; ImageError also where its size is not the record's."""
    image = load_image(record.path)
    if problem := size_problem(record, *image.shape[:2]):
        raise ImageError(problem)
    return image


class SkippedImages:
    """Counts the images that cannot be read, names the first ones, and ends it where they are too many."""

    def __init__(self, num_images, max_share):
        """
        Args:
            num_images: of the data set. max_share: 0..1, of them that may be skipped.
        """
        self._num_images, self._max_share = num_images, max_share
        self._paths = set()

    def add(self, path, problem):
        """Count an image once, however often it comes. DataError if they are too many now."""
        if path in self._paths:
            return
        self._paths.add(path)
        number = len(self._paths)
        if number > self._max_share * self._num_images:
            raise DataError(
                f"{number} of {self._num_images} images cannot be used (python -m tools.doctor lists them), more than "
                f"DATA.MAX_DROPPED={self._max_share:g} allows; the last: {problem}"
            )
        if number <= NAMED_IMAGES or number in (10**n for n in range(2, 9)):
            logger.warning(f"unreadable image {number}, skipped: {problem}")


def _is_cut_off(content):
    """Whether the file is empty, or a JPEG without its end. Bytes after the end are allowed.

    OpenCV refuses other formats that are cut off, but of a JPEG some releases return a half grey image.
    """
    # Not in the header: a thumbnail there has an end of its own.
    return not content or (content.startswith(_JPEG_START) and _JPEG_END not in content[_jpeg_scan(content) :])


def _jpeg_scan(content):
    """Where a JPEG's header ends and its first scan begins, or beyond the content if it ends before."""
    position = 2
    while position + 4 <= len(content) and content[position : position + 2] != _JPEG_SCAN:
        # A segment is 0xff, its kind (not 0xff: a fill byte), the length of the rest. Decoders pass over other bytes.
        is_segment = content[position] == 0xFF and content[position + 1] != 0xFF
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big") if is_segment else 1
    return position


def _round_up(size, multiple):
    return -(-size // multiple) * multiple


# ---------------------------------------------------------------- training examples


class TrainingTask(NamedTuple):
    """What travels to a worker: one image, and its position in the order of the data."""

    record: Record
    position: int

    def __str__(self):
        return f"image {self.record.image_id} ({self.record.path})"


class Unreadable(NamedTuple):
    """In the place of an example: its image cannot be used."""

    task: TrainingTask
    problem: str


class Augmentation(NamedTuple):
    """How training examples differ from their images, beside the mirroring of every second one.

    Attributes:
        short_edge: int; or (low, high), a uniform integer of this range, ends included; or more than two choices.
        max_size: limit of the long edge in pixels.
        crop_size: 0, or the side S of the square that an example is cut to, at a random place. The image then comes
            in another size: its long edge is S times a random factor (arXiv:2012.07177 calls it large-scale jitter).
        crop_scale: (low, high) of this factor.
        color_jitter: (brightness, contrast, saturation), each a strength s: a factor from [1 - s, 1 + s].
    """

    short_edge: int | tuple
    max_size: int
    crop_size: int = 0
    crop_scale: tuple = (0.1, 2.0)
    color_jitter: tuple = (0.0, 0.0, 0.0)

    def draw_size(self, rng):
        """The size of one example, before the crop: the keywords of `resized_shape`."""
        if self.crop_size:
            long_edge = max(MIN_EDGE, self.crop_size * rng.uniform(*self.crop_scale))
            return {"short_edge": long_edge, "max_size": long_edge}
        choices = np.ravel(self.short_edge)
        if len(choices) == 2:
            short_edge = rng.integers(choices[0], choices[1], endpoint=True)
        else:
            short_edge = rng.choice(choices)
        return {"short_edge": int(short_edge), "max_size": self.max_size}


@dataclass(frozen=True)
class ExampleMaker:
    """Makes one training example from a task: callable in any process, always with the same result.

    Attributes:
        augmentation: an Augmentation.
        with_masks, seed: as in TrainingData.
    """

    augmentation: Augmentation
    with_masks: bool
    seed: int

    def __call__(self, task):
        """The batch's entries (see TrainingData) without the N axis; the object axis has the image's own length.

        An Unreadable where the image cannot be used.
        """
        record = task.record
        try:
            image = load_record_image(record)
        except ImageError as error:
            return Unreadable(task, str(error))
        rng = np.random.default_rng((self.seed, _EXAMPLE, task.position))
        image, view = self._augment(image, rng)
        keep, boxes_xyxy, masks = self._objects(record, view)
        example = {
            "image": image,
            "gt_boxes": boxes_xyxy,
            "gt_labels": np.where(record.is_crowd, CROWD_LABEL, record.labels)[keep],
            "image_id": record.image_id,
            "sample_key": (self.seed, task.position),
        }
        if self.with_masks:
            example["gt_masks"] = masks
        return example

    def _augment(self, image, rng):
        """The image as the example shows it, and its View."""
        augmentation, (file_height, file_width) = self.augmentation, image.shape[:2]
        flip = bool(rng.random() < 0.5)
        if flip:
            image = cv2.flip(image, 1)
        image = resize_image(image, **augmentation.draw_size(rng))
        height, width = image.shape[:2]
        image, left, top = _random_crop(image, augmentation.crop_size, rng)
        scale_x = width / file_width
        view = View(
            *image.shape[:2],
            scale_x=-scale_x if flip else scale_x,
            shift_x=width - left if flip else -left,
            scale_y=height / file_height,
            shift_y=-top,
        )
        if any(augmentation.color_jitter):
            image = jitter_color(image, augmentation.color_jitter, rng)
        return image, view

    def _objects(self, record, view):
        """Which objects there are, int [G], their boxes float32 [G, 4], and their masks (None without them).

        Of an object that the crop has cut, what is left of its mask often has a smaller box than what is left of its
        box.
        """
        mapped_xyxy = view.map_boxes(record.boxes_xyxy)
        boxes_xyxy = boxes.clip(mapped_xyxy, view.height, view.width).astype(np.float32)
        keep = np.flatnonzero(boxes.area(boxes_xyxy) > boxes.MIN_BOX_AREA)
        is_cut = np.any(np.abs(mapped_xyxy - boxes_xyxy) > CUT_PIXELS, axis=1)[keep]
        boxes_xyxy = boxes_xyxy[keep]
        segmentations = [None if record.is_crowd[i] else record.segmentations[i] for i in keep]
        masks = view.draw_masks(segmentations) if self.with_masks else None
        for slot in np.flatnonzero(is_cut):
            if segmentations[slot] is not None:
                mask = view.draw_masks([segmentations[slot]])[0] if masks is None else masks[slot]
                boxes_xyxy[slot] = boxes.intersect(boxes_xyxy[slot], boxes.packed_mask_box(mask))
        left = boxes.area(boxes_xyxy) > boxes.MIN_BOX_AREA
        return keep[left], boxes_xyxy[left], None if masks is None else masks[left]


class View(NamedTuple):
    """How a training example, [height, width], shows its image.

    What lies at (x, y) in the file's image lies at (x * scale_x + shift_x, y * scale_y + shift_y) in the example;
    scale_x is negative where it is mirrored. Parts of the image may lie outside.
    """

    height: int
    width: int
    scale_x: float = 1.0
    shift_x: float = 0.0
    scale_y: float = 1.0
    shift_y: float = 0.0

    def map_boxes(self, boxes_xyxy):
        """Boxes [G, 4] of the file's image as they lie in this view, float64, not clipped."""
        xs, ys = boxes_xyxy[:, 0::2].astype(np.float64), boxes_xyxy[:, 1::2].astype(np.float64)
        xs = np.sort(xs * self.scale_x + self.shift_x, axis=1)
        ys = ys * self.scale_y + self.shift_y
        return np.stack([xs[:, 0], ys[:, 0], xs[:, 1], ys[:, 1]], axis=1)

    def draw_masks(self, segmentations):
        """Masks of G objects of the file's image (polygons, RLE or None) in this view, uint8 [G, H, ceil(W / 8)]."""
        masks = np.zeros((len(segmentations), self.height, _round_up(self.width, 8) // 8), np.uint8)
        for mask, segmentation in zip(masks, segmentations):
            if isinstance(segmentation, dict):
                mask[:] = boxes.pack_masks(self._warped_mask(segmentation))
            elif segmentation:
                self._draw([self._polygon(polygon) for polygon in segmentation], mask)
        return masks

    def _polygon(self, polygon):
        return np.asarray(polygon, np.float64) * (self.scale_x, self.scale_y) + (self.shift_x, self.shift_y)

    def _draw(self, polygons, packed):
        """Draw polygons into a packed mask [H, ceil(W / 8)], touching only their own part: many times faster."""
        points = np.concatenate(polygons)
        low, high = np.floor(points.min(axis=0)) - 1, np.ceil(points.max(axis=0)) + 1
        left, top = np.clip(low, 0, (self.width, self.height)).astype(int)
        right, bottom = np.clip(high, 0, (self.width, self.height)).astype(int)
        left -= left % 8
        if right > left and bottom > top:
            shifted = [polygon - (left, top) for polygon in polygons]
            part = boxes.pack_masks(boxes.segmentation_to_mask(shifted, bottom - top, right - left))
            packed[top:bottom, left // 8 : left // 8 + part.shape[1]] = part

    def _warped_mask(self, rle):
        mask = boxes.segmentation_to_mask(rle, *rle["size"]) * np.uint8(255)
        # OpenCV's coordinates have their origin in the middle of the first pixel.
        shift_x = self.scale_x / 2 + self.shift_x - 0.5
        shift_y = self.scale_y / 2 + self.shift_y - 0.5
        to_view = np.array([[self.scale_x, 0, shift_x], [0, self.scale_y, shift_y]])
        size = (self.width, self.height)
        return cv2.warpAffine(mask, to_view, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) > 127


def _random_crop(image, size, rng):
    """A part of an image, at most `size` pixels wide and high (0: all of it), and its left and top in the image."""
    height, width = (min(edge, size or edge) for edge in image.shape[:2])
    if (height, width) == image.shape[:2]:
        return image, 0, 0
    top, left = (int(rng.integers(whole - part, endpoint=True)) for whole, part in zip(image.shape, (height, width)))
    return np.ascontiguousarray(image[top : top + height, left : left + width]), left, top


def jitter_color(image, strengths, rng):
    """An image, uint8 [H, W, 3] BGR, with random brightness, contrast and saturation.

    Each is a factor drawn evenly from [1 - s, 1 + s], s in 0..1: of all values; of their distance to the mean; of each
    pixel's distance to its own grey.
    """
    brightness, contrast, saturation = (1 + s * rng.uniform(-1, 1) for s in strengths)
    mean = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).mean() * brightness
    values = (np.arange(256) * brightness - mean) * contrast + mean
    image = cv2.LUT(image, np.clip(np.rint(values), 0, 255).astype(np.uint8))
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    return cv2.addWeighted(image, saturation, grey, 1 - saturation, 0)


def collate(examples, *, multiple):
    """Examples as one batch with the arrays that TrainingData describes."""
    image, image_shape = pad_images([example["image"] for example in examples], multiple=multiple)
    num, num_objects = len(examples), max(1, *(len(example["gt_labels"]) for example in examples))
    batch = {
        "image": image,
        "image_shape": image_shape,
        "gt_boxes": np.zeros((num, num_objects, 4), np.float32),
        "gt_labels": np.zeros((num, num_objects), np.int64),
        "image_id": np.array([example["image_id"] for example in examples], np.int64),
        "sample_key": np.array([example["sample_key"] for example in examples], np.int32),
    }
    names = ["gt_boxes", "gt_labels"]
    if "gt_masks" in examples[0]:
        names.append("gt_masks")
        batch["gt_masks"] = np.zeros((num, num_objects, image.shape[1], _round_up(image.shape[2], 8) // 8), np.uint8)
    for name, (slot, example) in itertools.product(names, enumerate(examples)):
        values = example[name]
        batch[name][(slot, *map(slice, values.shape))] = values
    return batch


# ---------------------------------------------------------------- streams


class TrainingData:
    """An infinite stream of training batches: wide and tall images apart, N at a time.

    A batch is a dict of
        image        uint8 [N, H, W, 3]             BGR, zeros at the bottom and right
        image_shape  int32 [N, 2]                   height, width of the part that is image
        gt_boxes     float32 [N, G, 4]              x1 y1 x2 y2 in pixels of `image`; zeros past an image's own count
        gt_labels    int64 [N, G]                   1..C; 0 = padding, -1 = crowd region
        gt_masks     uint8 [N, G, H, ceil(W / 8)]   bits, the leftmost pixel the highest; zeros for crowd regions;
                                                    only `with_masks`
        image_id     int64 [N]
        sample_key   int32 [N, 2]                   (seed, position)

    To resume, count the batches used and give that number as `start`: the stream goes on with the very next batch,
    whatever was prepared ahead and lost. Images that an epoch leaves over (fewer than N of a kind) go into the next.

    Iterating starts the workers; closing (or collecting) the iterator ends them, and so does `close`, from any thread.
    There is one iteration at a time: a second ends the first.

    An image that cannot be read is skipped, with a warning: at its position stands another one of its kind, which only
    the seed and the position decide, so that the rest of the stream stays as it was. DataError where they are too many.
    """

    def __init__(
        self,
        records,
        *,
        batch_size,
        augmentation,
        multiple,
        with_masks,
        seed,
        num_workers=0,
        start=0,
        shard_index=0,
        num_shards=1,
        repeat_threshold=0.0,
        max_skipped=0.0,
    ):
        """
        Args:
            records: list of Records, at least one.
            batch_size: N.
            augmentation: an Augmentation.
            multiple: padded heights and widths are multiples of it.
            seed: int in [0, 2^31).
            num_workers: processes; 0 works in this one. The batches are the same.
            start: number of batches to pass over.
            shard_index, num_shards: this stream takes the positions p with p % num_shards == shard_index.
            repeat_threshold: see `repeat_factors`; 0 shows each image once per epoch.
            max_skipped: share of the images, 0..1, that may be skipped.
        """
        if not records:
            raise DataError("there are no images to train on")
        self._repeats = repeat_factors(records, repeat_threshold) if repeat_threshold else None
        self._skipped = SkippedImages(len(records), max_skipped)
        self._records = records
        self._batch_size, self._multiple, self._seed, self._start = batch_size, multiple, seed, start
        self._shard_index, self._num_shards = shard_index, num_shards
        self._make = ExampleMaker(augmentation, with_masks, seed)
        self._num_workers = num_workers
        self._examples = None

    def __iter__(self):
        self.close()
        batches = itertools.islice(self.plan(), self._start, None)
        tasks = (TrainingTask(self._records[index], position) for batch in batches for position, index in batch)
        self._examples = OrderedMap(self._make, tasks, num_workers=self._num_workers)
        return self._batches(self._examples)

    def _batches(self, examples):
        try:
            while True:
                batch = [self._readable(next(examples)) for _ in range(self._batch_size)]
                yield collate(batch, multiple=self._multiple)
        finally:
            examples.close()

    def _readable(self, example):
        """The example; or if its image cannot be used, one of another image with the same randomness."""
        for attempt in range(SUBSTITUTES):
            if not isinstance(example, Unreadable):
                return example
            self._skipped.add(example.task.record.path, example.problem)
            example = self._make(self._substitute(example.task, attempt))
        raise DataError(f"no image can be read: {SUBSTITUTES} were tried in the place of {example.task}")

    def _substitute(self, task, attempt):
        """Another image that is as wide or tall as the task's."""
        group = self._groups[_is_wide(task.record)]
        rng = np.random.default_rng((self._seed, _SUBSTITUTE, task.position, attempt))
        return TrainingTask(group[rng.integers(len(group))], task.position)

    @functools.cached_property
    def _groups(self):
        return {kind: [record for record in self._records if _is_wide(record) == kind] for kind in (True, False)}

    def close(self):
        """End the workers; an iteration still in use raises DataError."""
        if self._examples is not None:
            self._examples.close()

    def awaited(self):
        """The image that the next batch waits for, in words; "" where none is being prepared."""
        return self._examples.awaited() if self._examples is not None else ""

    def batch_of(self, positions):
        """The batch of these positions once more, for a look at what went wrong with it."""
        index = dict(itertools.islice(self._order(), max(positions) + 1))
        tasks = [TrainingTask(self._records[index[position]], position) for position in positions]
        examples = [self._readable(self._make(task)) for task in tasks]
        return collate(examples, multiple=self._multiple)

    def plan(self):
        """The batches without end, each a list of N (position, index of the record); looks at no file."""
        groups = {True: [], False: []}
        for position, index in self._order():
            if position % self._num_shards != self._shard_index:
                continue
            group = groups[_is_wide(self._records[index])]
            group.append((position, index))
            if len(group) == self._batch_size:
                yield list(group)
                group.clear()

    def _order(self):
        position = itertools.count()
        for epoch in itertools.count():
            rng = np.random.default_rng((self._seed, _ORDER, epoch))
            for index in rng.permutation(self._epoch(rng)).tolist():
                yield next(position), index

    def _epoch(self, rng):
        """The images of an epoch: their number, or their indices, some of them several times."""
        if self._repeats is None:
            return len(self._records)
        whole = np.floor(self._repeats)
        extra = rng.random(len(whole)) < self._repeats - whole
        return np.repeat(np.arange(len(whole)), (whole + extra).astype(int))


def repeat_factors(records, threshold):
    """How often each image is shown per epoch on average, float64 [len(records)], at least 1 (arXiv:1908.03195).

    Of a class that the share f of the images shows, max(1, sqrt(threshold / f)); of an image, that of its rarest class.
    """
    shown = [np.unique(record.labels[~record.is_crowd]) for record in records]
    images = np.bincount(np.concatenate([*shown, np.zeros(1, np.int64)]))
    factors = np.maximum(1, np.sqrt(threshold * len(records) / np.maximum(images, 1)))
    return np.array([factors[labels].max(initial=1) for labels in shown])


def _is_wide(record):
    return record.width >= record.height


class EvaluationData:
    """All images once: iterating gives (list of n Records, batch), n <= N, the batch a dict of

        image        uint8 [n, H, W, 3]    BGR, zeros at the bottom and right
        image_shape  int32 [n, 2]          height, width of the part that is image

    Images of one batch have the same padded size, so that a result does not depend on its neighbours; the images are
    ordered by that size. Of several shards each takes its share of the same batches. Threads decode ahead, a batch each
    (OpenCV lets go of the interpreter's lock).

    An image that cannot be read is left out, with a warning; nothing is found in it, then. DataError where they are
    too many.
    """

    def __init__(
        self,
        records,
        *,
        batch_size,
        short_edge,
        max_size,
        multiple,
        max_skipped=0.0,
        num_threads=0,
        shard_index=0,
        num_shards=1,
    ):
        """Arguments as in TrainingData and `resized_shape`; `num_threads` 0 works without threads."""
        self._records, self._max_skipped = records, max_skipped
        self._shard_index, self._num_shards = shard_index, num_shards
        self._batch_size, self._multiple, self._num_threads = batch_size, multiple, num_threads
        self._resize = {"short_edge": short_edge, "max_size": max_size}

    def __iter__(self):
        skipped = SkippedImages(len(self._records), self._max_skipped)
        for loaded in self._loaded():
            for record, image in loaded:
                if isinstance(image, ImageError):
                    skipped.add(record.path, str(image))
            usable = [(record, image) for record, image in loaded if not isinstance(image, ImageError)]
            if usable:
                records, images = zip(*usable)
                image, image_shape = pad_images(images, multiple=self._multiple)
                yield list(records), {"image": image, "image_shape": image_shape}

    def _loaded(self):
        """Batches as lists of (Record, its resized image or an ImageError)."""
        if not self._num_threads:
            return map(self._load, self._own_batches())
        return map_ahead(self._load, self._own_batches(), num_threads=self._num_threads, num_ahead=self._num_threads)

    def num_rounds(self):
        """The number of batches of the shard that has most."""
        return -(-sum(1 for _ in self._batches()) // self._num_shards)

    def image_ids(self):
        """The images of all shards in the order of their batches."""
        return [record.image_id for records in self._batches() for record in records]

    def _own_batches(self):
        return itertools.islice(self._batches(), self._shard_index, None, self._num_shards)

    def _batches(self):
        for _, group in itertools.groupby(sorted(self._records, key=self._padded_shape), self._padded_shape):
            while records := list(itertools.islice(group, self._batch_size)):
                yield records

    def _padded_shape(self, record):
        return tuple(
            _round_up(edge, self._multiple) for edge in resized_shape(record.height, record.width, **self._resize)
        )

    def _load(self, records):
        loaded = []
        for record in records:
            try:
                loaded.append((record, resize_image(load_record_image(record), **self._resize)))
            except ImageError as error:
                loaded.append((record, error))
        return loaded


# ---------------------------------------------------------------- threads and worker processes


def map_ahead(function, items, *, num_threads, num_ahead):
    """Yields `function(item)` of each item, in order; threads compute up to `num_ahead` results before they are asked.

    For functions that let go of the interpreter's lock. What one raises is raised here.
    """
    executor, pending = ThreadPoolExecutor(num_threads), deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > num_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


class OrderedMap:
    """Iterator over `function(task)` of endless tasks, in order; spawned processes work ahead (0: this one works).

    A failure ends the iteration: a UserError as it is, anything else as a DataError that names the task, with its
    traceback in the log. So does the death of a worker, and `close`: a stream without end never just stops.

    Each worker has pipes of its own, so that its death is always noticed and its task is known. (The workers of
    concurrent.futures share one: if one is killed while it writes megabytes, the reader waits for the rest for ever.)
    """

    def __init__(self, function, tasks, *, num_workers):
        self._function, self._tasks = function, iter(tasks)
        self._num_sent = self._num_given = 0
        self._done = {}  # number of the task: outcome
        self._busy = {}  # pipe of a worker's results: (worker, number, task)
        self._free = [_start_worker(function) for _ in range(num_workers)]
        self._num_ahead = LOOKAHEAD_PER_WORKER * num_workers
        self._stop = weakref.finalize(self, _stop_workers, [worker.process for worker in self._free])
        # Registered last, it runs before multiprocessing's own end, which would look like the workers' death.
        self._stop.atexit = False
        atexit.register(self._stop)

    def __iter__(self):
        return self

    def __next__(self):
        try:
            self._check_open()
            outcome = self._receive_next() if self._num_ahead else _try(self._function, next(self._tasks))
            return _unwrap(*outcome)
        except BaseException:
            self.close()
            raise

    def close(self):
        """End the iteration and the workers, whatever they are doing; from any thread."""
        atexit.unregister(self._stop)
        self._stop()

    def awaited(self):
        """The task that the next result waits for, in words, with its worker; "" where there is none."""
        for worker, number, task in list(self._busy.values()):
            if number == self._num_given:
                return f"{task}, in worker {worker.process.pid}"
        return ""

    def _receive_next(self):
        self._exchange(timeout=0)
        while self._num_given not in self._done:
            self._exchange(timeout=None)
        self._num_given += 1
        return self._done.pop(self._num_given - 1)

    def _exchange(self, timeout):
        """Take in the results that are there (None: wait for one), then give a task to every free worker."""
        for results in wait(self._busy, timeout):
            worker, number, task = self._busy.pop(results)
            with self._death_noticed(worker, task):
                self._done[number] = results.recv()
            self._free.append(worker)
        while self._free and self._num_sent < self._num_given + self._num_ahead:
            worker, task = self._free.pop(), next(self._tasks)
            self._busy[worker.results] = worker, self._num_sent, task
            self._num_sent += 1
            with self._death_noticed(worker, task):
                worker.tasks.send(task)

    @contextlib.contextmanager
    def _death_noticed(self, worker, task):
        try:
            yield
        except (EOFError, OSError):
            self._check_open()
            worker.process.join()
            raise DataError(f"a data worker {_cause_of_death(worker.process)} while it prepared {task}") from None

    def _check_open(self):
        if not self._stop.alive:
            raise DataError("the stream of training data has been closed")


class Worker(NamedTuple):
    process: multiprocessing.Process
    tasks: Connection
    results: Connection


def _start_worker(function):
    context = multiprocessing.get_context("spawn")
    (their_tasks, tasks), (results, their_results) = context.Pipe(duplex=False), context.Pipe(duplex=False)
    # Linux's 64 KiB would take dozens of turns for an image. There is a limit per user, so it may be refused.
    with contextlib.suppress(AttributeError, OSError):
        fcntl.fcntl(their_results.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    process = context.Process(target=_work, args=(function, their_tasks, their_results), daemon=True)
    process.start()
    # The worker now holds the only copies, so its death closes the pipes.
    their_tasks.close()
    their_results.close()
    return Worker(process, tasks, results)


def _stop_workers(processes):
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _cause_of_death(process):
    if process.exitcode >= 0:
        return f"ended with exit code {process.exitcode}"
    hint = ": out of memory?" if process.exitcode == -signal.SIGKILL else ""
    return f"was killed ({signal.Signals(-process.exitcode).name}{hint})"


def _work(function, tasks, results):
    """A worker's life. It ends with the parent."""
    for interruption in (signal.SIGINT, signal.SIGTERM):
        # Often sent to all processes at once; but the parent still needs data, to finish its step.
        signal.signal(interruption, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    cv2.setNumThreads(1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            results.send(_try(function, tasks.recv()))


def _exit_with_parent():
    """Ends the process with its parent, even in the middle of a task that would never end."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _try(function, task):
    """(result, None, None), or (None, the UserError to raise, and the traceback if something else was raised)."""
    try:
        return function(task), None, None
    except UserError as error:
        return None, error, None
    except Exception as error:
        message = f"{task}: {type(error).__name__}: {' '.join(str(error).split())}"
        return None, DataError(message), traceback.format_exc()


def _unwrap(result, error, trace):
    if trace:
        logger.error("%s\n%s", error, trace)
    if error:
        raise error
    return result
