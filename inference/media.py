"""Predicts on files: reads images and videos, writes pictures, videos, and results in COCO's format.

Shape shorthand: N images of a batch; R detections; H, W height and width of an image.
"""

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from common import viz
from common.errors import ImageError
from common.files import Whole, unused_path, write_new
from common.workers import map_ahead
from config import UserError
from dataset.images import load_image
from evaluation.results import coco_results, results_file
from inference.predictor import ImageDetections, Predictor

# Four threads decode up to eight images before the network needs them, and four more draw the last ones.
AHEAD = {"num_threads": 4, "num_ahead": 8, "early": True}
MAX_WAITING = 32  # images that wait for others of their size, to fill a batch


class VideoError(UserError):
    """A video that cannot be read or written; the message names its path."""


class Written(NamedTuple):
    """The output for one input file."""

    path: Path  # of the picture or video
    counts: Counter[str]  # of the detections by class name

    def __str__(self) -> str:
        found = ", ".join(f"{number} {name}" for name, number in self.counts.most_common())
        return f"{self.path}: {found or 'nothing found'}"


class Style(NamedTuple):
    """The choice of detections to show, and the way to write them."""

    class_names: tuple[str, ...]  # of the labels 1..C
    category_ids: tuple[int, ...]  # of the labels 1..C
    score_threshold: float  # in [0, 1]
    labels: frozenset[int] | None = None  # labels to keep; None keeps all
    with_json: bool = False  # whether to write a json beside each picture or video

    def select(self, detections: ImageDetections) -> ImageDetections:
        """The detections to show, by score and label."""
        keep = np.asarray(detections.scores) >= self.score_threshold
        if self.labels is not None:
            keep &= np.isin(detections.labels, list(self.labels))
        return detections.select(keep)

    def draw(self, image: np.ndarray, detections: ImageDetections) -> np.ndarray:
        """The picture of an image, uint8 [H, W, 3] BGR; small images are enlarged: see `viz.draw_detections`."""
        return viz.draw_detections(image, detections, self.class_names, score_threshold=self.score_threshold)

    def count(self, detections: ImageDetections) -> Counter[str]:
        """The number of detections by class name."""
        return Counter(self.class_names[label - 1] for label in detections.labels)

    def results(self, image_id: int | str, detections: ImageDetections) -> list[dict]:
        """The detections in COCO's results format, see `evaluation.results.coco_results`, with `category_name`."""
        results = coco_results(image_id, detections, self.category_ids)
        names = (self.class_names[label - 1] for label in detections.labels)
        return [{**result, "category_name": name} for result, name in zip(results, names)]


# ---------------------------------------------------------------- images


def predict_files(
    predictor: Predictor,
    paths: Collection[Path],
    style: Style,
    output_dir: str | Path,
    *,
    batch_size: int,
    report: Callable[[ImageError], None],
) -> Iterator[Written]:
    """Detects objects in image files and writes STEM-detections.png for each (and .json); yields a Written for each.

    The images of a batch have the same padded size, so that no result depends on the others; the order is that of the
    batches. Threads decode the next images and draw the last ones. An unusable file goes to `report` and is skipped.

    Args:
        batch_size: number of images, at most.
    Raises:
        NonFiniteError: the network returned NaN or infinity. FileError: an output cannot be written.
    """

    def contents(item):
        path, image, found = item
        found = style.select(found)
        files = {".png": viz.encode_picture(style.draw(image, found))}
        if style.with_json:
            files[".json"] = json.dumps(style.results(str(path), found), allow_nan=False).encode()
        return path, files, style.count(found)

    progress = tqdm(total=len(paths), unit="image", disable=None)
    with progress:
        loaded = _readable(map_ahead(_load, paths, **AHEAD), report, progress)
        found = _found(predictor, loaded, batch_size)
        for path, files, counts in map_ahead(contents, found, **AHEAD):
            progress.update()
            # Not in the threads: the order of the inputs determines which of equal names gets which number.
            yield Written(write_new(Path(output_dir) / f"{path.stem}-detections.png", files), counts)


def _load(path):
    """Loads an image; returns (path, image or ImageError)."""
    try:
        return path, load_image(path)
    except ImageError as error:
        return path, error


def _readable(loaded, report, progress):
    """Yields (path, image) of the files that can be read; passes the errors of the others to `report`."""
    for path, image in loaded:
        if isinstance(image, ImageError):
            report(image)
            progress.update()
        else:
            yield path, image


def _found(predictor, loaded, batch_size):
    """Yields (path, image, ImageDetections), batch by batch."""
    for batch in _batches_of_one_size(
        loaded, batch_size, lambda item: predictor.geometry.padded_shape(*item[1].shape[:2])
    ):
        paths, images = zip(*batch)
        yield from zip(paths, images, predictor(images))


def _batches_of_one_size(items, batch_size, size_of):
    """Yields lists of at most `batch_size` items of equal size; the longest list early, if too many items wait."""
    waiting = {}
    for item in items:
        waiting.setdefault(size_of(item), []).append(item)
        size, fullest = max(waiting.items(), key=lambda pair: len(pair[1]))
        if len(fullest) == batch_size or sum(map(len, waiting.values())) >= max(MAX_WAITING, batch_size):
            yield waiting.pop(size)
    yield from waiting.values()


# ---------------------------------------------------------------- videos


def predict_videos(
    predictor: Predictor,
    paths: Iterable[Path],
    style: Style,
    output_dir: str | Path,
    *,
    batch_size: int,
    report: Callable[[VideoError], None],
) -> Iterator[Written]:
    """Calls `predict_video` for each file and yields its result. An unusable file goes to `report` and is skipped."""
    for path in paths:
        try:
            yield predict_video(predictor, path, style, output_dir, batch_size=batch_size)
        except VideoError as error:
            report(error)


def predict_video(
    predictor: Predictor, path: str | Path, style: Style, output_dir: str | Path, *, batch_size: int
) -> Written:
    """Detects objects in every frame of a video and writes STEM-detections.mp4 (and .json), without sound.

    The counts are those of all frames together. The image_id of a result is the number of its frame, starting at 0.

    Args:
        batch_size: number of frames, at most.
    Raises:
        VideoError: the video cannot be read, or no video can be written. FileError: the json cannot be written.
        NonFiniteError: the network returned NaN or infinity.
    """
    frames, fps, count = _open_video(path)
    suffixes = [".json"] if style.with_json else []
    target = unused_path(Path(output_dir) / f"{Path(path).stem}-detections.mp4", suffixes=suffixes)
    counts = Counter()

    def found():
        while batch := list(itertools.islice(frames, batch_size)):
            yield from zip(batch, map(style.select, predictor(batch)))

    with (
        Whole(target, numbered=True) as video,
        _picture_writer(video, fps) as write_picture,
        results_file(target.with_suffix(".json") if style.with_json else None) as write_results,
        tqdm(total=count or None, unit="frame", disable=None) as progress,
    ):
        drawn = map_ahead(lambda pair: (style.draw(*pair), pair[1]), found(), **AHEAD)
        for number, (picture, detections) in enumerate(drawn):
            write_picture(picture)
            if style.with_json:
                write_results(style.results(number, detections))
            counts += style.count(detections)
            progress.update()
    return Written(video.path, counts)


def _open_video(path):
    """Returns an iterator over the frames, uint8 [H, W, 3] BGR; frames per second; their number, 0 if unknown."""
    capture = cv2.VideoCapture(str(path))
    is_read, first = capture.read() if capture.isOpened() else (False, None)
    if not is_read:
        raise VideoError(f"{path}: not readable as a video")

    def frames():
        frame, more = first, True
        while more:
            yield frame
            more, frame = capture.read()
        capture.release()

    fps, count = capture.get(cv2.CAP_PROP_FPS), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    return frames(), fps if 0 < fps <= 1000 else 25.0, max(count, 0)


@contextlib.contextmanager
def _picture_writer(video, fps):
    """Writes a new mp4 file, a files.Whole: yields a function that appends a picture, uint8 [H, W, 3] BGR, all of one
    size."""
    writer = None

    def write(picture):
        nonlocal writer
        size = picture.shape[1::-1]
        if writer is None:
            writer = cv2.VideoWriter(str(video.part), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
            if not writer.isOpened():
                width, height = size
                raise VideoError(f"cannot write {video.path}: OpenCV can't make an mp4 of {width} x {height} pixels")
        writer.write(picture)

    try:
        yield write
    finally:
        if writer is not None:
            writer.release()
