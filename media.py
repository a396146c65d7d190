"""From files to files: images, folders and videos in; pictures, COCO-style results and videos out.

Shape shorthand: N images of a batch; R detections; H, W height and width of an image.
"""

import itertools
import json
import os
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

import data
import viz
from checkpoint import unused_path
from config import UserError
from eval import ResultsFile, coco_results

THREADS = 4
MAX_AHEAD = 8  # images that are decoded before the network has time for them, or wait to be drawn
MAX_WAITING = 32  # images that wait until there are enough of their size for a batch


class VideoError(UserError):
    """A video that cannot be read, or written in any way; the message names its path."""


class Written(NamedTuple):
    """What became of an input. path: of the picture or video; counts: Counter of class names."""

    path: Path
    counts: Counter

    def __str__(self):
        found = ", ".join(f"{number} {name}" for name, number in self.counts.most_common())
        return f"{self.path}: {found or 'nothing found'}"


class Style(NamedTuple):
    """What is kept and written of the detections.

    class_names, category_ids: of the labels 1..C. score_threshold: in [0, 1]. labels: those to keep, or None for all.
    with_json: whether a json goes with each picture or video.
    """

    class_names: tuple
    category_ids: tuple
    score_threshold: float
    labels: frozenset | None = None
    with_json: bool = False

    def select(self, detections):
        """The ImageDetections to show."""
        keep = np.asarray(detections.scores) >= self.score_threshold
        if self.labels is not None:
            keep &= np.isin(detections.labels, list(self.labels))
        return detections.select(keep)

    def draw(self, image, detections):
        """uint8 [H, W, 3] BGR; larger than the image where that is small: see `viz.draw_detections`."""
        return viz.draw_detections(image, detections, self.class_names, score_threshold=self.score_threshold)

    def count(self, detections):
        """Counter of class names."""
        return Counter(self.class_names[label - 1] for label in detections.labels)

    def results(self, image_id, detections):
        """A list of dicts as `eval.coco_results` makes them, with `category_name`."""
        results = coco_results(image_id, detections, self.category_ids)
        names = (self.class_names[label - 1] for label in detections.labels)
        return [{**result, "category_name": name} for result, name in zip(results, names)]


# ---------------------------------------------------------------- images


def predict_files(predictor, paths, style, output_dir, *, batch_size, report):
    """Finds objects in image files, and writes STEM-detections.png of each (and .json); yields a Written of each.

    Images that go through the network together have the same padded size, so that no result depends on the neighbours:
    the order is that of the batches. Threads decode ahead and draw behind. A bad file is passed to `report` as an
    ImageError and passed over.
    """

    def contents(path, image, found):
        found = style.select(found)
        files = {".png": viz.encode_picture(style.draw(image, found))}
        if style.with_json:
            files[".json"] = json.dumps(style.results(str(path), found), allow_nan=False).encode()
        return path, files, style.count(found)

    progress = tqdm(total=len(paths), unit="image", disable=None)
    with progress, ThreadPoolExecutor(THREADS) as pool:
        loaded = _readable(_in_threads(pool, _load, ((path,) for path in paths)), report, progress)
        found = _found(predictor, loaded, batch_size)
        for path, files, counts in _in_threads(pool, contents, found):
            progress.update()
            # Here, not in the threads: where names are equal, the order of the inputs says who gets which number.
            yield Written(viz.save_new(Path(output_dir) / f"{path.stem}-detections.png", files), counts)


def _load(path):
    """(path, image or the ImageError)"""
    try:
        return path, data.load_image(path)
    except data.ImageError as error:
        return path, error


def _readable(loaded, report, progress):
    for path, image in loaded:
        if isinstance(image, data.ImageError):
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
    """Yields lists of at most `batch_size` items of equal size; the fullest early, if too many items are waiting."""
    waiting = {}
    for item in items:
        waiting.setdefault(size_of(item), []).append(item)
        size, fullest = max(waiting.items(), key=lambda pair: len(pair[1]))
        if len(fullest) == batch_size or sum(map(len, waiting.values())) >= max(MAX_WAITING, batch_size):
            yield waiting.pop(size)
    yield from waiting.values()


def _in_threads(pool, function, arguments):
    """Yields function(*a) of each of the arguments, in order, with at most MAX_AHEAD waiting."""
    pending = deque()
    try:
        for each in arguments:
            pending.append(pool.submit(function, *each))
            if len(pending) > MAX_AHEAD or pending[0].done():
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


# ---------------------------------------------------------------- videos


def predict_videos(predictor, paths, style, output_dir, *, batch_size, report):
    """`predict_video` of each file; yields a Written of each. A bad file is passed to `report` and passed over."""
    for path in paths:
        try:
            yield predict_video(predictor, path, style, output_dir, batch_size=batch_size)
        except VideoError as error:
            report(error)


def predict_video(predictor, path, style, output_dir, *, batch_size):
    """Finds objects in every frame of a video, and writes STEM-detections.mp4 (and .json); returns a Written.

    The counts are of all frames together. Results have the frame's number, from 0, as image_id. Sound is left out.

    Raises:
        VideoError: it cannot be read, or no video can be written.
    """
    frames, fps, count = _open_video(path)
    suffixes = [".json"] if style.with_json else []
    target = unused_path(Path(output_dir) / f"{Path(path).stem}-detections.mp4", suffixes=suffixes)
    counts = Counter()

    def found():
        while batch := list(itertools.islice(frames, batch_size)):
            yield from zip(batch, map(style.select, predictor(batch)))

    with (
        _VideoFile(target, fps) as video,
        ResultsFile(target.with_suffix(".json") if style.with_json else None) as results,
        tqdm(total=count or None, unit="frame", disable=None) as progress,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        drawn = _in_threads(pool, lambda frame, found: (style.draw(frame, found), found), found())
        for number, (picture, detections) in enumerate(drawn):
            video.write(picture)
            if style.with_json:
                results.write(style.results(number, detections))
            counts += style.count(detections)
            progress.update()
    return Written(target, counts)


def _open_video(path):
    """Returns an iterator over the frames, uint8 [H, W, 3], frames per second, and their number (0: not known)."""
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


class _VideoFile:
    """An mp4 file that has its name only when it is complete. It has the size of the first picture."""

    def __init__(self, path, fps):
        self._path, self._fps = path, fps
        self._part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
        self._writer = None

    def __enter__(self):
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VideoError(f"cannot write {self._path}: {error.strerror}") from error
        return self

    def write(self, picture):
        size = picture.shape[1::-1]
        if self._writer is None:
            self._writer = cv2.VideoWriter(str(self._part), cv2.VideoWriter_fourcc(*"mp4v"), self._fps, size)
            if not self._writer.isOpened():
                raise VideoError(f"cannot write {self._path}: OpenCV can't make an mp4 of {size[0]} x {size[1]} pixels")
        self._writer.write(picture)

    def __exit__(self, exception_type, exception, traceback):
        if self._writer is not None:
            self._writer.release()
        if exception_type is None:
            os.replace(self._part, self._path)
        self._part.unlink(missing_ok=True)
