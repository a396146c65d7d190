"""Creates batches of NumPy arrays from dataset records: decode, resize, flip, rasterise, group and pad.

    for batch in training_data(settings, records): ...                    without end
    for records, batch in evaluation_data(settings, records): ...         every image once

Shape shorthand: N images of a batch; H, W height and width; G most objects of an image in a batch, at least 1.

The order is a pure function of the seed. A position counts the images that all ranks together have received before; an
epoch is one permutation of the records; the random choices for an image depend on (seed, position). So neither the
number of workers nor an interruption changes the training data.

This file imports neither TensorFlow nor tensorpack (which imports TensorFlow): worker processes start fast and stay
small.
"""

import functools
import itertools
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from common.errors import DataError, ImageError
from common.workers import OrderedMap, map_ahead
from config import Config, ConfigError, largest_edge, padding_multiple, round_up
from dataset.augment import ORDER, SUBSTITUTE, TRANSFORMS, Augmentation, ExampleMaker, TrainingTask, Unreadable
from dataset.images import (
    SUBSTITUTES,
    Geometry,
    SkippedImages,
    load_record_image,
    pad_images,
)
from dataset.record import Record

# Decoding for evaluation takes milliseconds per image: more threads would only slow down the model.
MAX_EVALUATION_THREADS = 4


# ---------------------------------------------------------------- settings


def training_data(
    settings: Config, records: Sequence[Record], *, start: int = 0, shard_index: int = 0, num_shards: int = 1
) -> "TrainingData":
    """Returns the TrainingData of the settings; the other arguments are those of TrainingData."""
    augmentation = Augmentation(
        short_edge=settings.PREPROC.TRAIN_SHORT_EDGE_SIZE,
        max_size=largest_edge(settings),
        antialias=settings.PREPROC.ANTIALIAS,
        crop_size=settings.PREPROC.TRAIN_CROP_SIZE,
        crop_scale=settings.PREPROC.TRAIN_CROP_SCALE,
        color_jitter=settings.PREPROC.COLOR_JITTER,
        transforms=tuple(TRANSFORMS.find_all(settings.PREPROC.TRANSFORMS)),
    )
    if settings.DATA.NUM_WORKERS:
        _check_transforms(augmentation.transforms, settings.PREPROC.TRANSFORMS)
    return TrainingData(
        records,
        batch_size=settings.TRAIN.BATCH_SIZE_PER_GPU,
        augmentation=augmentation,
        multiple=padding_multiple(settings),
        smallest=settings.PREPROC.TRAIN_CROP_SIZE if settings.PREPROC.TRAIN_PAD else 0,
        with_masks=settings.MODE_MASK,
        seed=settings.TRAIN.SEED,
        num_workers=settings.DATA.NUM_WORKERS,
        repeat_threshold=settings.DATA.REPEAT_THRESHOLD,
        max_dropped=settings.DATA.MAX_DROPPED,
        start=start,
        shard_index=shard_index,
        num_shards=num_shards,
    )


def _check_transforms(transforms, names):
    """Raises ConfigError if workers cannot import a transform."""
    for transform, name in zip(transforms, names):
        try:
            pickle.dumps(transform)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            message = f"PREPROC.TRANSFORMS {name!r}: workers can't import it: define it at the top level of its module"
            raise ConfigError(message) from error


def inference_geometry(settings: Config) -> Geometry:
    """Returns the sizes of images in evaluation and prediction; with several TEST.TTA_SCALES, for the largest."""
    scale = max(settings.TEST.TTA_SCALES)
    short_edge = round(settings.PREPROC.TEST_SHORT_EDGE_SIZE * scale)
    max_size, multiple = largest_edge(settings) * scale, padding_multiple(settings)
    return Geometry(short_edge, max_size, multiple, settings.PREPROC.ANTIALIAS)


def evaluation_data(
    settings: Config, records: Sequence[Record], *, shard_index: int = 0, num_shards: int = 1
) -> "EvaluationData":
    """Returns the EvaluationData of the settings; the other arguments are those of EvaluationData."""
    return EvaluationData(
        records,
        batch_size=settings.TEST.BATCH_SIZE_PER_GPU,
        **inference_geometry(settings)._asdict(),
        max_dropped=settings.DATA.MAX_DROPPED,
        num_threads=min(settings.DATA.NUM_WORKERS, MAX_EVALUATION_THREADS),
        shard_index=shard_index,
        num_shards=num_shards,
    )


def collate(examples: Sequence[dict[str, Any]], *, multiple: int, smallest: int = 0) -> dict[str, np.ndarray]:
    """Combines examples in one batch of the arrays that TrainingData describes, padded as `pad_images` does."""
    images = [example["image"] for example in examples]
    image, image_shape = pad_images(images, multiple=multiple, smallest=smallest)
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
        octets = round_up(image.shape[2], 32) // 8
        batch["gt_masks"] = np.zeros((num, num_objects, image.shape[1], octets), np.uint8)
    for name, (slot, example) in itertools.product(names, enumerate(examples)):
        values = example[name]
        batch[name][(slot, *map(slice, values.shape))] = values
    return batch


# ---------------------------------------------------------------- streams


class TrainingData:
    """An infinite stream of training batches of N images; wide and tall images are in separate batches.

    A batch is a dict of
        image        uint8 [N, H, W, 3]             BGR, zeros at the bottom and right
        image_shape  int32 [N, 2]                   height, width without the padding
        gt_boxes     float32 [N, G, 4]              x1 y1 x2 y2 in pixels of `image`; zeros past an image's own count
        gt_labels    int64 [N, G]                   1..C; 0 = padding, -1 = crowd region
        gt_masks     uint8 [N, G, H, B]             bits, the leftmost pixel the highest; zeros for crowd regions and up
                                                    to B = 4 * ceil(W / 32) bytes; only `with_masks`
        image_id     int64 [N]
        sample_key   int32 [N, 2]                   (seed, position)

    To resume, pass the number of batches used so far as `start`: the stream continues with the next batch, whatever was
    prepared ahead and lost. Images that remain at the end of an epoch (fewer than N of a kind) are used in the next.

    Iteration starts the workers; closing (or collecting) the iterator ends them, and so does `close`, from any thread.
    A second iteration ends the first.

    An image that cannot be read is skipped, with a warning: another image of its kind takes its position. The choice
    depends on seed and position only, so the rest of the stream stays unchanged.

    Raises (from the iterator):
        DataError: too many images cannot be read, or a worker failed or died.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        batch_size: int,
        augmentation: Augmentation,
        multiple: int,
        smallest: int = 0,
        with_masks: bool,
        seed: int,
        num_workers: int = 0,
        start: int = 0,
        shard_index: int = 0,
        num_shards: int = 1,
        repeat_threshold: float = 0.0,
        max_dropped: float = 0.0,
    ):
        """
        Args:
            records: at least one.
            batch_size: N.
            augmentation: random changes of the images.
            multiple: padded heights and widths are multiples of it. smallest: and at least this.
            with_masks: whether batches have `gt_masks`.
            seed: int in [0, 2^31).
            num_workers: processes; 0 prepares images in this process. The batches are the same.
            start: number of batches to skip.
            shard_index, num_shards: this stream takes the positions p with p % num_shards == shard_index.
            repeat_threshold: see `repeat_factors`; 0 shows each image once per epoch.
            max_dropped: share of the images, 0..1, that may be skipped.
        Raises:
            DataError: there are no records.
        """
        if not records:
            raise DataError("there are no images to train on")
        self._repeats = repeat_factors(records, repeat_threshold) if repeat_threshold else None
        self._skipped = SkippedImages(len(records), max_dropped)
        self._records = records
        self._batch_size, self._seed, self._start = batch_size, seed, start
        self._padding = {"multiple": multiple, "smallest": smallest}
        self._shard_index, self._num_shards = shard_index, num_shards
        self._make = ExampleMaker(augmentation, with_masks, seed)
        self._num_workers = num_workers
        self._examples = None

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        self.close()
        batches = itertools.islice(self.plan(), self._start, None)
        tasks = (TrainingTask(self._records[index], position) for batch in batches for position, index in batch)
        self._examples = OrderedMap(self._make, tasks, num_workers=self._num_workers)
        return self._batches(self._examples)

    def _batches(self, examples):
        try:
            while True:
                batch = [self._readable(next(examples)) for _ in range(self._batch_size)]
                yield collate(batch, **self._padding)
        finally:
            examples.close()

    def _readable(self, example):
        """Returns the example; if its image cannot be used, the example of another image with the same randomness."""
        for attempt in range(SUBSTITUTES):
            if not isinstance(example, Unreadable):
                return example
            self._skipped.add(example.task.record.path, example.problem)
            example = self._make(self._substitute(example.task, attempt))
        raise DataError(f"no image can be read: {SUBSTITUTES} were tried in place of {example.task}")

    def _substitute(self, task, attempt):
        """Returns a task for another image of the same kind, wide or tall."""
        group = self._groups[_is_wide(task.record)]
        rng = np.random.default_rng((self._seed, SUBSTITUTE, task.position, attempt))
        return TrainingTask(group[rng.integers(len(group))], task.position)

    @functools.cached_property
    def _groups(self):
        return {kind: [record for record in self._records if _is_wide(record) == kind] for kind in (True, False)}

    def close(self) -> None:
        """Ends the workers; an iteration still in use raises DataError."""
        if self._examples is not None:
            self._examples.close()

    def awaited(self) -> str:
        """Returns a description of the image that the next batch waits for; "" if none is being prepared."""
        return self._examples.awaited() if self._examples is not None else ""

    def batch_of(self, positions: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns the batch of these positions again, to examine a failure."""
        index = dict(itertools.islice(self._order(), max(positions) + 1))
        tasks = [TrainingTask(self._records[index[position]], position) for position in positions]
        examples = [self._readable(self._make(task)) for task in tasks]
        return collate(examples, **self._padding)

    def plan(self) -> Iterator[list[tuple[int, int]]]:
        """Yields the batches without end, each a list of N (position, index of the record); reads no file."""
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
            rng = np.random.default_rng((self._seed, ORDER, epoch))
            for index in rng.permutation(self._epoch(rng)).tolist():
                yield next(position), index

    def _epoch(self, rng):
        """Returns the images of an epoch: their number, or their indices with repetitions."""
        if self._repeats is None:
            return len(self._records)
        whole = np.floor(self._repeats)
        extra = rng.random(len(whole)) < self._repeats - whole
        return np.repeat(np.arange(len(whole)), (whole + extra).astype(int))


def repeat_factors(records: Sequence[Record], threshold: float) -> np.ndarray:
    """Returns how often an epoch shows each image on average, float64 [len(records)], at least 1 (arXiv:1908.03195).

    The factor of a class that occurs in a share f of the images is max(1, sqrt(threshold / f)); an image has the factor
    of its rarest class.
    """
    shown = [np.unique(record.labels[~record.is_crowd]) for record in records]
    images = np.bincount(np.concatenate([*shown, np.zeros(1, np.int64)]))
    factors = np.maximum(1, np.sqrt(threshold * len(records) / np.maximum(images, 1)))
    return np.array([factors[labels].max(initial=1) for labels in shown])


def _is_wide(record):
    return record.width >= record.height


class EvaluationData:
    """All images once: iteration yields (list of n Records, batch), n <= N, the batch a dict of

        image        uint8 [n, H, W, 3]    BGR, zeros at the bottom and right
        image_shape  int32 [n, 2]          height, width without the padding

    Images of one batch have the same padded size, so that a result does not depend on the other images; the images are
    ordered by that size. Several shards divide the same batches among themselves. Threads decode ahead, one batch each
    (OpenCV releases the interpreter's lock).

    An image that cannot be read is skipped, with a warning, and has no detections.

    Raises (from the iterator):
        DataError: too many images cannot be read.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        batch_size: int,
        short_edge: int,
        max_size: float,
        multiple: int,
        antialias: bool = False,
        max_dropped: float = 0.0,
        num_threads: int = 0,
        shard_index: int = 0,
        num_shards: int = 1,
    ):
        """Arguments as in TrainingData and Geometry; `num_threads=0` decodes in the calling thread."""
        self._records, self._max_dropped = records, max_dropped
        self._shard_index, self._num_shards = shard_index, num_shards
        self._batch_size, self._num_threads = batch_size, num_threads
        self._geometry = Geometry(short_edge, max_size, multiple, antialias)

    def __iter__(self) -> Iterator[tuple[list[Record], dict[str, np.ndarray]]]:
        skipped = SkippedImages(len(self._records), self._max_dropped)
        for loaded in self._loaded():
            for record, image in loaded:
                if isinstance(image, ImageError):
                    skipped.add(record.path, str(image))
            usable = [(record, image) for record, image in loaded if not isinstance(image, ImageError)]
            if usable:
                records, images = zip(*usable)
                image, image_shape = pad_images(images, multiple=self._geometry.multiple)
                yield list(records), {"image": image, "image_shape": image_shape}

    def _loaded(self):
        """Returns an iterator over batches: lists of (Record, its resized image or an ImageError)."""
        if not self._num_threads:
            return map(self._load, self._own_batches())
        return map_ahead(self._load, self._own_batches(), num_threads=self._num_threads, num_ahead=self._num_threads)

    def num_rounds(self) -> int:
        """Returns the number of batches of the shard with the most batches."""
        return -(-sum(1 for _ in self._batches()) // self._num_shards)

    def image_ids(self) -> list[int]:
        """Returns the ids of the images of all shards, in the order of their batches."""
        return [record.image_id for records in self._batches() for record in records]

    def _own_batches(self):
        return itertools.islice(self._batches(), self._shard_index, None, self._num_shards)

    def _batches(self):
        for _, group in itertools.groupby(sorted(self._records, key=self._padded_shape), self._padded_shape):
            while records := list(itertools.islice(group, self._batch_size)):
                yield records

    def _padded_shape(self, record):
        return self._geometry.padded_shape(record.height, record.width)

    def _load(self, records):
        loaded = []
        for record in records:
            try:
                loaded.append((record, self._geometry.resize(load_record_image(record))))
            except ImageError as error:
                loaded.append((record, error))
        return loaded
