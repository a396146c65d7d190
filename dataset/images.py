"""Finds, decodes and checks image files; resizes images and pads them to a batch.

Shapes: N images; H, W height and width. Images are uint8 [H, W, 3] BGR.
"""

import contextlib
import glob
import io
import logging
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from common.errors import DataError, ImageError
from config import round_up
from dataset.record import DatasetError, Record

logger = logging.getLogger(__name__)

# Larger images are never decoded: a file of a few hundred bytes can expand to gigabytes.
MAX_PIXELS = 100_000_000
# No edge is resized below the coarsest stride (a 1 x 5000 image would vanish).
MIN_EDGE = 32
# Evenly spaced images whose size is compared with the annotations before a training; takes 0.1 ms each.
SIZE_SAMPLE = 500
# Unreadable images that the log names, and substitutes that are tried for one of them.
NAMED_IMAGES, SUBSTITUTES = 10, 100

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jp2", ".pgm", ".ppm"}
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"}
_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9"
_EXIF_ORIENTATION, _SIDEWAYS = 274, (5, 6, 7, 8)
# Formats whose orientation OpenCV applies and Pillow's `size` ignores.
_ORIENTED = ("JPEG", "MPO", "PNG", "WEBP")
Image.MAX_IMAGE_PIXELS = None  # Pillow's own error does not name the image; MAX_PIXELS is lower


def find_files(patterns: Iterable[str | Path], suffixes: Collection[str]) -> tuple[list[Path], list[str]]:
    """Returns the files that paths, folders and glob patterns refer to, each once, and the patterns without a file.

    Args:
        patterns: a folder stands for the files directly in it, `**` in a pattern for any number of folders.
        suffixes: IMAGE_SUFFIXES or VIDEO_SUFFIXES, which select files of folders and patterns.

    Returns:
        list of Path; list of one message per pattern without a file
    """
    paths, problems = {}, []
    for pattern in map(str, patterns):
        found, problem = _find(pattern, suffixes)
        paths.update(dict.fromkeys(map(Path, found)))
        if not found:
            problems.append(f"{pattern}: {problem}")
    return list(paths), problems


def _find(pattern, suffixes):
    """Returns the files that one pattern refers to, and the message for the case that there are none."""
    if os.path.isfile(pattern):  # a file name may contain glob's characters
        return [pattern], None
    if not os.path.isdir(pattern) and not glob.has_magic(pattern):
        return [], "no such file"
    inside = os.path.join(glob.escape(pattern), "*") if os.path.isdir(pattern) else pattern
    found = (path for path in glob.iglob(inside, recursive=True) if Path(path).suffix.lower() in suffixes)
    return sorted(filter(os.path.isfile, found)), f"no file with one of the suffixes {' '.join(sorted(suffixes))}"


def load_image(path: str | Path) -> np.ndarray:
    """Reads an image file as uint8 [H, W, 3] BGR: see `decode_image`.

    Raises:
        ImageError: the file is missing, unreadable, truncated, not an image, or has more than MAX_PIXELS.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    return decode_image(content, path)


def decode_image(content: bytes, name: str | Path) -> np.ndarray:
    """Decodes the content of an image file to uint8 [H, W, 3] BGR, upright (EXIF orientation applied).

    Grayscale, palette, CMYK and 16-bit images are converted; an alpha channel is dropped.

    Args:
        content: the file's bytes. name: for messages.

    Raises:
        ImageError: the content is truncated, not an image, or has more than MAX_PIXELS.
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


def image_size(path: str | Path) -> tuple[int, int]:
    """Reads (height, width) in pixels of an image file, upright, from its header alone.

    Raises:
        ImageError: the file is missing, unreadable, not an image, or has more than MAX_PIXELS.
    """
    try:
        with open(path, "rb") as file:
            (width, height), is_sideways = _read_header(path, file)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    return (width, height) if is_sideways else (height, width)


def _read_header(path, file):
    """Returns (width, height) as stored, and whether the orientation swaps them. Decodes no pixels."""
    try:
        with Image.open(file) as image:
            size, is_sideways = image.size, image.format in _ORIENTED and _is_sideways(image)
    except Exception as error:  # Pillow passes on any exception of its parsers
        raise ImageError(f"{path}: not readable as an image") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"{path}: {size[0]} x {size[1]} pixels are more than the {MAX_PIXELS:,} that are allowed")
    return size, is_sideways


def _is_sideways(image):
    try:
        return image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
    except Exception:  # damaged EXIF data, which OpenCV ignores as well
        return False


def check_sizes(records: Sequence[Record], *, max_dropped: float) -> None:
    """Compares the annotated sizes with the headers of the files, for up to SIZE_SAMPLE images.

    A wrong size is usually a systematic fault that makes nearly every box wrong. Unreadable images are not counted.

    Raises:
        DatasetError: more than the share `max_dropped` (0..1) of the sample differs.
    """
    sample = [records[i] for i in np.unique(np.linspace(0, len(records) - 1, SIZE_SAMPLE).astype(int))]
    problems = []
    for record in sample:
        with contextlib.suppress(ImageError):
            problems += filter(None, [size_problem(record, *image_size(record.path))])
    if len(problems) > max_dropped * len(sample):
        listed = "\n  ".join(problems[:NAMED_IMAGES])
        raise DatasetError(f"{len(problems)} of {len(sample)} images have other sizes than annotated:\n  {listed}")


def size_problem(record: Record, height: int, width: int) -> str | None:
    """Returns a message if the upright size of a record's image differs from the annotated one; else None."""
    if (height, width) == (record.height, record.width):
        return None
    swapped = (
        ", swapped: they ignore the file's EXIF orientation" if (width, height) == (record.height, record.width) else ""
    )
    return (
        f"{record.path}: the image is {width} x {height} pixels, but the annotations state "
        f"{record.width} x {record.height}{swapped}"
    )


def load_record_image(record: Record) -> np.ndarray:
    """Reads the image of a record: see `load_image`.

    Raises:
        ImageError: see `load_image`; or the size is not the record's.
    """
    image = load_image(record.path)
    if problem := size_problem(record, *image.shape[:2]):
        raise ImageError(problem)
    return image


class SkippedImages:
    """Counts the images that cannot be read, logs the first ones, and ends the run if they are too many."""

    def __init__(self, num_images: int, max_dropped: float):
        """
        Args:
            num_images: of the data set. max_dropped: share of them, 0..1, that may be skipped.
        """
        self._num_images, self._max_dropped = num_images, max_dropped
        self._paths = set()

    def add(self, path: str, problem: str) -> None:
        """Counts an image, once for each path.

        Raises:
            DataError: too many images have been counted.
        """
        if path in self._paths:
            return
        self._paths.add(path)
        number = len(self._paths)
        if number > self._max_dropped * self._num_images:
            raise DataError(
                f"{number} of {self._num_images} images cannot be used (python -m tools.doctor lists them), more than "
                f"DATA.MAX_DROPPED={self._max_dropped:g} allows; the last: {problem}"
            )
        if number <= NAMED_IMAGES or number in (10**n for n in range(2, 9)):
            logger.warning(f"unreadable image {number}, skipped: {problem}")


def _is_cut_off(content):
    """Returns whether a file is empty, or a JPEG without its end marker. Bytes after the end marker are allowed.

    OpenCV rejects truncated files of other formats, but for a JPEG some releases return an image that is partly grey.
    """
    # The header is skipped: a thumbnail in it has an end marker of its own.
    return not content or (content.startswith(_JPEG_START) and _JPEG_END not in content[_jpeg_scan(content) :])


def _jpeg_scan(content):
    """Returns the position of a JPEG's first scan, after the header; beyond the content if that ends before."""
    position = 2
    while position + 4 <= len(content) and content[position : position + 2] != _JPEG_SCAN:
        # A segment is 0xff, its kind (not 0xff, a fill byte), and the length of the rest. Decoders skip other bytes.
        is_segment = content[position] == 0xFF and content[position + 1] != 0xFF
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big") if is_segment else 1
    return position


# ---------------------------------------------------------------- sizes


class Geometry(NamedTuple):
    """The sizes with which images become a batch, in pixels."""

    short_edge: int  # see `resized_shape`
    max_size: float  # see `resized_shape`
    multiple: int  # see `pad_images`
    antialias: bool = False  # see `resize`

    def padded_shape(self, height: int, width: int) -> tuple[int, int]:
        """Returns the (height, width) of a batch of one image of this size."""
        shape = resized_shape(height, width, short_edge=self.short_edge, max_size=self.max_size)
        return tuple(round_up(edge, self.multiple) for edge in shape)

    def batch(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Resizes images [H, W, 3] and pads them to a batch: see `pad_images`."""
        return pad_images([self.resize(image) for image in images], multiple=self.multiple)

    def resize(self, image: np.ndarray) -> np.ndarray:
        """Resizes one image [H, W, 3]."""
        return resize_image(image, short_edge=self.short_edge, max_size=self.max_size, antialias=self.antialias)


def resized_shape(height: int, width: int, *, short_edge: float, max_size: float) -> tuple[int, int]:
    """Returns the (height, width) in pixels to which an image is resized for the network.

    The short edge becomes `short_edge`, or less if the long edge would exceed `max_size`; rounded as in the reference.
    No edge becomes shorter than MIN_EDGE (or `short_edge`, if that is less).
    """
    scale = short_edge / min(height, width)
    scale *= min(1, max_size / (scale * max(height, width)))
    smallest = min(MIN_EDGE, short_edge)
    return max(int(height * scale + 0.5), smallest), max(int(width * scale + 0.5), smallest)


def resize_image(image: np.ndarray, *, short_edge: float, max_size: float, antialias: bool = False) -> np.ndarray:
    """Resizes an image [H, W, 3] to its `resized_shape`: see `resize`."""
    height, width = resized_shape(*image.shape[:2], short_edge=short_edge, max_size=max_size)
    return resize(image, height, width, antialias=antialias)


def resize(image: np.ndarray, height: int, width: int, *, antialias: bool) -> np.ndarray:
    """Resizes an image, uint8 [H, W, 3] to uint8 [height, width, 3], bilinearly.

    Args:
        antialias: average all pixels under a triangle as wide as two pixels of the result, as Pillow does. Otherwise
            each pixel of the result is interpolated from four, whatever the scale, as OpenCV does.
    """
    if antialias:
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def pad_images(images: Sequence[np.ndarray], *, multiple: int, smallest: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Combines images of different sizes in one array, with zeros at the bottom and right.

    Returns:
        uint8 [N, H, W, 3], H and W the largest of all and of `smallest`, rounded up to `multiple`; int32 [N, 2], the
        sizes of the images
    """
    shapes = np.array([image.shape[:2] for image in images], np.int32)
    padded = np.zeros((len(images), *round_up(shapes.max(axis=0, initial=smallest), multiple), 3), np.uint8)
    for slot, image in zip(padded, images):
        slot[: image.shape[0], : image.shape[1]] = image
    return padded, shapes
