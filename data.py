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
import glob
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

import boxes
from config import UserError, config
from dataset import Record

logger = logging.getLogger(__name__)

# What the backbone's strides need: FPN adds levels of different stride, C4 takes any size.
FPN_MULTIPLE = 32
# No edge is resized below the coarsest stride (a 1 x 5000 image would vanish).
MIN_EDGE = 32
CROWD_LABEL = -1
# Results that may wait for their turn, for each worker; bounds the memory.
LOOKAHEAD_PER_WORKER = 3
# What Linux lets any user ask for.
PIPE_BYTES = 2**20
# Decoding for evaluation costs milliseconds per image: more threads would only disturb the model.
MAX_EVALUATION_THREADS = 4

# What a random number is for, so that an epoch and a position of the same number differ.
_ORDER, _EXAMPLE = 0, 1

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jp2", ".pgm", ".ppm"}
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"}
_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9"


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
    return TrainingData(
        records,
        batch_size=config.TRAIN.BATCH_SIZE_PER_GPU,
        short_edge=config.PREPROC.TRAIN_SHORT_EDGE_SIZE,
        max_size=max_size,
        multiple=multiple,
        with_masks=config.MODE_MASK,
        seed=config.TRAIN.SEED,
        num_workers=config.DATA.NUM_WORKERS,
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
    """The Geometry of the configured model in evaluation and prediction."""
    return Geometry(config.PREPROC.TEST_SHORT_EDGE_SIZE, *network_geometry())


def evaluation_data(records, *, shard_index=0, num_shards=1):
    """EvaluationData with the configuration's settings; the arguments are EvaluationData's."""
    return EvaluationData(
        records,
        batch_size=config.TEST.BATCH_SIZE_PER_GPU,
        **inference_geometry()._asdict(),
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
    """An image file as uint8 [H, W, 3] BGR, upright (EXIF orientation applied).

    Grayscale, palette, CMYK and 16-bit images are converted; an alpha channel is dropped.

    Raises:
        ImageError: missing, unreadable, cut off, or no image.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    if _is_cut_off(content):
        raise ImageError(f"{path}: the image is cut off ({len(content)} bytes)")
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise ImageError(f"{path}: not readable as an image ({error.err})") from error
    if image is None:
        raise ImageError(f"{path}: not readable as an image")
    return image


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


def _load_record_image(record):
    """The image of a record; its size must be the record's, or every box would be wrong."""
    image = load_image(record.path)
    size = image.shape[:2]
    if size == (record.height, record.width):
        return image
    swapped = ", swapped: they ignore the file's EXIF orientation" if size == (record.width, record.height) else ""
    raise ImageError(
        f"{record.path}: the image is {size[1]} x {size[0]} pixels, but the annotations say "
        f"{record.width} x {record.height}{swapped}"
    )


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


@dataclass(frozen=True)
class ExampleMaker:
    """Makes one training example from a task: callable in any process, always with the same result.

    Attributes:
        short_edge: int; or (low, high), a uniform integer of this range, ends included; or more than two choices.
        max_size, with_masks, seed: as in TrainingData.
    """

    short_edge: int | tuple
    max_size: int
    with_masks: bool
    seed: int

    def __call__(self, task):
        """The batch's entries (see TrainingData) without the N axis; the object axis has the image's own length."""
        record = task.record
        image = _load_record_image(record)
        rng = np.random.default_rng((self.seed, _EXAMPLE, task.position))
        flip = bool(rng.random() < 0.5)
        if flip:
            image = cv2.flip(image, 1)
        image = resize_image(image, short_edge=_draw_short_edge(self.short_edge, rng), max_size=self.max_size)
        view = View(*image.shape[:2], image.shape[1] / record.width, image.shape[0] / record.height, flip)
        boxes_xyxy = view.map_boxes(record.boxes_xyxy)
        keep = np.flatnonzero(boxes.area(boxes_xyxy) > boxes.MIN_BOX_AREA)
        example = {
            "image": image,
            "gt_boxes": boxes_xyxy[keep],
            "gt_labels": np.where(record.is_crowd, CROWD_LABEL, record.labels)[keep],
            "image_id": record.image_id,
            "sample_key": (self.seed, task.position),
        }
        if self.with_masks:
            example["gt_masks"] = view.draw_masks(
                [None if record.is_crowd[i] else record.segmentations[i] for i in keep]
            )
        return example


class View(NamedTuple):
    """How a training example shows its image: mirrored or not, then resized by two factors to [height, width]."""

    height: int
    width: int
    scale_x: float
    scale_y: float
    flip: bool

    def map_boxes(self, boxes_xyxy):
        """Boxes [G, 4] of the file's image as they lie in this view, float32, clipped to it."""
        boxes_xyxy = boxes.scale(boxes_xyxy, self.scale_x, self.scale_y)
        if self.flip:
            boxes_xyxy = boxes.flip_horizontal(boxes_xyxy, self.width)
        return boxes.clip(boxes_xyxy, self.height, self.width).astype(np.float32)

    def draw_masks(self, segmentations):
        """Masks of G objects of the file's image (polygons, RLE or None) in this view, uint8 [G, H, ceil(W / 8)]."""
        masks = np.zeros((len(segmentations), self.height, _round_up(self.width, 8) // 8), np.uint8)
        for mask, segmentation in zip(masks, segmentations):
            if isinstance(segmentation, dict):
                mask[:] = boxes.pack_masks(self._resized_mask(segmentation))
            elif segmentation:
                self._draw([self._polygon(polygon) for polygon in segmentation], mask)
        return masks

    def _polygon(self, polygon):
        polygon = np.asarray(polygon, np.float64) * (self.scale_x, self.scale_y)
        return polygon * (-1, 1) + (self.width, 0) if self.flip else polygon

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

    def _resized_mask(self, rle):
        mask = boxes.segmentation_to_mask(rle, *rle["size"]) * np.uint8(255)
        if self.flip:
            mask = cv2.flip(mask, 1)
        return cv2.resize(mask, (self.width, self.height), interpolation=cv2.INTER_LINEAR) > 127


def _draw_short_edge(short_edge, rng):
    choices = np.ravel(short_edge)
    if len(choices) == 2:
        return int(rng.integers(choices[0], choices[1], endpoint=True))
    return int(rng.choice(choices))


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
    """

    def __init__(
        self,
        records,
        *,
        batch_size,
        short_edge,
        max_size,
        multiple,
        with_masks,
        seed,
        num_workers=0,
        start=0,
        shard_index=0,
        num_shards=1,
    ):
        """
        Args:
            records: list of Records, at least one.
            batch_size: N.
            short_edge: see ExampleMaker.
            max_size: limit of the long edge in pixels.
            multiple: padded heights and widths are multiples of it.
            seed: int in [0, 2^31).
            num_workers: processes; 0 works in this one. The batches are the same.
            start: number of batches to pass over.
            shard_index, num_shards: this stream takes the positions p with p % num_shards == shard_index.
        """
        if not records:
            raise DataError("there are no images to train on")
        self._records = records
        self._batch_size, self._multiple, self._seed, self._start = batch_size, multiple, seed, start
        self._shard_index, self._num_shards = shard_index, num_shards
        self._make = ExampleMaker(short_edge, max_size, with_masks, seed)
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
                yield collate(list(itertools.islice(examples, self._batch_size)), multiple=self._multiple)
        finally:
            examples.close()

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
        examples = [self._make(TrainingTask(self._records[index[position]], position)) for position in positions]
        return collate(examples, multiple=self._multiple)

    def plan(self):
        """The batches without end, each a list of N (position, index of the record); looks at no file."""
        groups = {True: [], False: []}
        for position, index in self._order():
            if position % self._num_shards != self._shard_index:
                continue
            group = groups[self._records[index].width >= self._records[index].height]
            group.append((position, index))
            if len(group) == self._batch_size:
                yield list(group)
                group.clear()

    def _order(self):
        position = itertools.count()
        for epoch in itertools.count():
            rng = np.random.default_rng((self._seed, _ORDER, epoch))
            for index in rng.permutation(len(self._records)).tolist():
                yield next(position), index


class EvaluationData:
    """All images once: iterating gives (list of n Records, batch), n <= N, the batch a dict of

        image        uint8 [n, H, W, 3]    BGR, zeros at the bottom and right
        image_shape  int32 [n, 2]          height, width of the part that is image

    Images of one batch have the same padded size, so that a result does not depend on its neighbours; the images are
    ordered by that size. Of several shards each takes its share of the same batches. Threads decode ahead, a batch each
    (OpenCV lets go of the interpreter's lock).

    Raises, while iterating:
        ImageError: an image is unreadable or not of the record's size.
    """

    def __init__(
        self, records, *, batch_size, short_edge, max_size, multiple, num_threads=0, shard_index=0, num_shards=1
    ):
        """Arguments as in TrainingData; `num_threads` 0 works without threads."""
        self._records = records
        self._shard_index, self._num_shards = shard_index, num_shards
        self._batch_size, self._multiple, self._num_threads = batch_size, multiple, num_threads
        self._resize = {"short_edge": short_edge, "max_size": max_size}

    def __iter__(self):
        if not self._num_threads:
            return map(self._make, self._own_batches())
        return map_ahead(self._make, self._own_batches(), num_threads=self._num_threads, num_ahead=self._num_threads)

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

    def _make(self, records):
        images = [resize_image(_load_record_image(record), **self._resize) for record in records]
        image, image_shape = pad_images(images, multiple=self._multiple)
        return records, {"image": image, "image_shape": image_shape}


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
