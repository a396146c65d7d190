"""A generated data set in COCO's format: overlapping discs, boxes, triangles, stars and crosses on textured ground.

    python -m dataset.shapes DIR --train 800 --val 200 --size 128 --seed 0

Classes differ by shape alone: colours, sizes and rotations are random. Annotations describe the visible part of each
object. An image depends only on seed, split and its number, so the same settings give the same bytes.

Objects are drawn on a grid that is SUBPIXELS times finer than the image in both directions ("fine" in names below). The
image is its average, which gives smooth edges; outlines come from the fine grid, so polygons have subpixel accuracy.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import tqdm

from common.files import write_whole
from common.rle import MIN_POLYGON_POINTS, encode_rle, segmentation_to_mask
from config import UserError
from dataset.record import DatasetError

SUBPIXELS = 4
MAX_OBJECTS = 8
# Radius of the circle around an object, relative to the image's side.
RADIUS_RANGE = (0.09, 0.23)
# Smallest visible share of an object, not behind others or outside the image.
MIN_VISIBLE = 0.4
# Colour distance (root of the sum of squares over B, G, R) between an object and nearly all of its surroundings.
MIN_CONTRAST = 70
# Polygons with a lower IoU with the visible pixels, because of a hole or a sliver, are replaced by an RLE.
MIN_POLYGON_IOU = 0.95
MIN_SIZE = 32
# Recorded in the annotations; changes whenever the same settings give other images.
VERSION = 1

_PLACING_ATTEMPTS = 30
_COLOUR_ATTEMPTS = 30
_MARKER = ".incomplete.json"


class Shape(NamedTuple):
    """One drawn object."""

    label: int  # class index from 0
    visible_fine: np.ndarray  # its visible part on the fine grid, bool [size * SUBPIXELS, size * SUBPIXELS]


# ------------------------------------------------------------------------------------------------------------- outlines


def _rotation(angle):
    """Returns a matrix [2, 2] that rotates points [P, 2] by the angle in radians: points @ matrix."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, sine], [-sine, cosine]])


def _regular(corners):
    """Returns the corners of a regular polygon on the unit circle, float64 [corners, 2]."""
    angles = 2 * np.pi * np.arange(corners) / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star():
    """Returns a star of five points with deeper notches than a pentagram: small stars must not look like discs."""
    return _regular(10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]


def _cross():
    """Returns a plus sign of four arms, each 0.62 wide and reaching 0.95 from the centre."""
    arm = np.array([(0.95, -0.31), (0.95, 0.31), (0.31, 0.31)])
    return np.concatenate([arm @ _rotation(quarter * np.pi / 2) for quarter in range(4)])


# Name: outline in a circle of radius about 1; the factors equalise the apparent sizes.
OUTLINES = {
    "disc": 0.85 * _regular(64),
    "box": _regular(4),
    "triangle": 1.1 * _regular(3),
    "star": 1.15 * _star(),
    "cross": _cross(),
}


# -------------------------------------------------------------------------------------------------------------- drawing


def draw_image(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[Shape]]:
    """Draws one random image.

    Args:
        rng: numpy.random.Generator.
        size: side of the square image in pixels.

    Returns:
        the image, uint8 [size, size, 3] BGR, and a list of 1 to MAX_OBJECTS Shapes, from back to front
    """
    canvas = _draw_ground(rng, size)
    labels, owner, areas = [], np.full((size * SUBPIXELS, size * SUBPIXELS), -1, np.int8), []
    for _ in range(rng.integers(1, MAX_OBJECTS + 1)):
        label = int(rng.integers(len(OUTLINES)))
        placed = _place(rng, list(OUTLINES.values())[label], owner, areas)
        if placed is None:
            continue
        mask_fine, area_fine = placed
        canvas = _paint(rng, canvas, mask_fine)
        owner[mask_fine] = len(labels)
        labels.append(label)
        areas.append(area_fine)
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return image, [Shape(label, owner == index) for index, label in enumerate(labels)]


def _place(rng, outline, owner, areas):
    """Finds a place where the new object and those behind it remain visible.

    Returns:
        the object on the fine grid (bool) and its whole area in fine pixels; or None if no place was found
    """
    side = owner.shape[0]
    visible = _count_owned(owner, len(areas))
    for _ in range(_PLACING_ATTEMPTS):
        radius = side * np.exp(rng.uniform(*np.log(RADIUS_RANGE)))
        polygon = radius * outline @ _rotation(rng.uniform(0, 2 * np.pi)) + rng.uniform(0.08, 0.92, size=2) * side
        mask_fine = np.zeros(owner.shape, np.uint8)
        # Coordinates in 1/16 of a fine pixel; OpenCV's pixel centres are integers.
        cv2.fillPoly(mask_fine, [np.rint((polygon - 0.5) * 16).astype(np.int32)], 1, shift=4)
        mask_fine = mask_fine.astype(bool)
        area_fine = cv2.contourArea(polygon.astype(np.float32))
        remaining = visible - _count_owned(owner[mask_fine], len(areas))
        if mask_fine.sum() >= MIN_VISIBLE * area_fine and np.all(remaining >= MIN_VISIBLE * np.array(areas)):
            return mask_fine, area_fine
    return None


def _count_owned(owner, objects):
    """Counts the fine pixels that belong to each of the objects, int64 [objects]."""
    return np.bincount(owner.ravel() + 1, minlength=objects + 1)[1:]


def _paint(rng, canvas, mask_fine):
    """Returns the canvas with an object of a random, slightly shaded colour that contrasts with its surroundings."""
    size = canvas.shape[0]
    coverage = _to_pixels(mask_fine)
    outside = cv2.dilate(coverage, np.ones((5, 5))) - coverage > 0.5
    colour = _contrasting_colour(rng, canvas[outside])
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    direction = rng.uniform(0, 2 * np.pi)
    shade = 1 + 0.5 * (rows * np.sin(direction) + columns * np.cos(direction))
    surface = colour * shade[..., None] + rng.normal(0, 3, (size, size, 1))
    return canvas + coverage[..., None] * (surface - canvas)


def _contrasting_colour(rng, surroundings):
    """Returns a random colour, float64 [3] BGR, that contrasts with `surroundings` [pixels, 3] as far as possible."""
    best, best_contrast = None, -1.0
    for _ in range(_COLOUR_ATTEMPTS):
        colour = _random_colour(rng, saturation=(0.3, 1.0), value=(0.25, 1.0))
        contrast = np.percentile(np.linalg.norm(surroundings - colour, axis=1), 3) if len(surroundings) else np.inf
        if contrast > best_contrast:
            best, best_contrast = colour, contrast
        if contrast >= MIN_CONTRAST:
            break
    return best


def _random_colour(rng, *, saturation, value):
    """Returns a colour of any hue, float64 [3] BGR in 0..255; saturation and value are ranges in 0..1."""
    hsv = np.float32([[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(*value)]]])
    return 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float64)


def _draw_ground(rng, size):
    """Draws two or three muted colours mixed by smooth noise, in every second image stripes or checks, and grain."""
    first, second, third = (_random_colour(rng, saturation=(0.0, 0.55), value=(0.2, 0.95)) for _ in range(3))
    mix = _smooth_noise(rng, size, octaves=(2, 4, 8, 16))[..., None]
    ground = first * (1 - mix) + second * mix
    if rng.random() < 0.5:
        pattern = rng.uniform(0.15, 0.6) * _pattern(rng, size)[..., None]
        ground = ground * (1 - pattern) + third * pattern
    fine_mix = 24 * (_smooth_noise(rng, size, octaves=(16, 32)) - 0.5)
    return ground + fine_mix[..., None] + rng.normal(0, 5, (size, size, 3))


def _smooth_noise(rng, size, *, octaves):
    """Adds enlarged random grids, of which coarse ones dominate: float64 [size, size] in [0, 1].

    Args:
        octaves: numbers of cells per side of the grids
    """
    noise = sum(
        cv2.resize(rng.random((cells + 1, cells + 1)), (size, size), interpolation=cv2.INTER_CUBIC) / cells
        for cells in octaves
    )
    return (noise - noise.min()) / (noise.max() - noise.min())


def _pattern(rng, size):
    """Draws soft stripes or checks in a random direction, float64 [size, size] in [0, 1]."""
    rows, columns = np.mgrid[:size, :size] / size
    angle, periods = rng.uniform(0, np.pi), rng.uniform(3, 12)
    along, across = rows * np.sin(angle) + columns * np.cos(angle), rows * np.cos(angle) - columns * np.sin(angle)
    wave = np.sin(2 * np.pi * periods * along + rng.uniform(0, 2 * np.pi))
    if rng.random() < 0.5:
        wave = wave * np.sin(2 * np.pi * periods * across)
    return 0.5 + 0.5 * np.tanh(3 * wave)


def _to_pixels(mask_fine):
    """Returns the share of each pixel that the mask covers, float32 [size, size]."""
    size = mask_fine.shape[0] // SUBPIXELS
    return cv2.resize(mask_fine.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)


# ---------------------------------------------------------------------------------------------------------- annotations


def visible_mask(visible_fine):
    """Returns the pixels of which at least half show the object, uint8 [size, size]."""
    return (_to_pixels(visible_fine) >= 0.5).astype(np.uint8)


def annotate(visible_fine: np.ndarray) -> dict[str, Any]:
    """Returns COCO's `segmentation`, `area` and `bbox` of an object's visible part, bool on the fine grid.

    The segmentation is a list of polygons; or, if they cannot describe the part (it has a hole), an RLE dict.
    """
    mask = visible_mask(visible_fine)
    polygons = _outline(visible_fine)
    raster = segmentation_to_mask(polygons, *mask.shape)
    is_exact = (raster & mask).sum() >= MIN_POLYGON_IOU * (raster | mask).sum()
    rows, columns = (np.flatnonzero(visible_fine.any(axis=axis)) for axis in (1, 0))
    x, y, right, bottom = (v / SUBPIXELS for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return {
        "segmentation": [polygon.ravel().tolist() for polygon in polygons] if is_exact else encode_rle(mask),
        "area": float(visible_fine.sum() / SUBPIXELS**2),
        "bbox": [float(v) for v in (x, y, right - x, bottom - y)],
    }


def _outline(visible_fine):
    """Returns the outer contours, a list of float64 [P, 2] in pixels of the image.

    OpenCV's contours run through the centres of the border's pixels. In a region that is enlarged by one pixel to the
    right and downwards, these points are the corners between pixels of the original.
    """
    grown = np.pad(visible_fine, (0, 1)).astype(np.uint8)
    grown[1:] |= grown[:-1].copy()
    grown[:, 1:] |= grown[:, :-1].copy()
    contours, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    contours = [cv2.approxPolyDP(contour, 1.0, closed=True)[:, 0] / SUBPIXELS for contour in contours]
    return [contour for contour in contours if len(contour) >= MIN_POLYGON_POINTS]


# ---------------------------------------------------------------------------------------------------------------- files


def generate(directory: str | Path, *, train: int = 800, val: int = 200, size: int = 128, seed: int = 0) -> list[str]:
    """Writes the splits `shapes_train` and `shapes_val` below a directory; existing splits are kept.

    Args:
        train, val: numbers of images.
        size: side of the images in pixels.
        seed: of the random numbers, together with the split.

    Returns:
        list of the annotation files that were written now

    Raises:
        DatasetError: the directory contains other files, or the data set with other settings; nothing is written then.
    """
    splits = [_Split(Path(directory).expanduser(), *split, size, seed) for split in (("train", train), ("val", val))]
    missing = [split for split in splits if not split.is_complete()]
    for split in missing:
        split.write()
    return [str(split.annotation_file) for split in missing]


class _Split:
    """One split on disk. The annotations are written last: a split is complete if they exist."""

    def __init__(self, directory, name, count, size, seed):
        self.settings = {"version": VERSION, "split": name, "images": count, "size": size, "seed": seed}
        self.annotation_file = directory / "annotations" / f"instances_shapes_{name}.json"
        self.image_dir = directory / f"shapes_{name}"
        self.marker = self.image_dir / _MARKER

    def is_complete(self):
        """Returns whether exactly these images exist; raises DatasetError if others are in their place."""
        if self.annotation_file.exists():
            self._require_settings(self.annotation_file)
            present = set(os.listdir(self.image_dir)) if self.image_dir.is_dir() else set()
            return present.issuperset(map(self._file_name, self._numbers()))
        if self.marker.exists():
            self._require_settings(self.marker)
        elif self.image_dir.exists() and not all(".part" in name for name in os.listdir(self.image_dir)):
            raise DatasetError(f"{self.image_dir} contains other files: choose another directory")
        return False

    def write(self):
        """Draws all images and writes all files; files of an interrupted run are replaced by equal ones."""
        self.annotation_file.parent.mkdir(parents=True, exist_ok=True)
        self.image_dir.mkdir(exist_ok=True)
        write_whole(self.marker, json.dumps({"info": self._info()}))
        images, annotations = [], []
        for number in tqdm.tqdm(self._numbers(), desc=self.image_dir.name, unit="image", mininterval=1):
            image, shapes = draw_image(self._rng(number), self.settings["size"])
            write_whole(self.image_dir / self._file_name(number), _encode(image), durable=False)
            height, width = image.shape[:2]
            images.append({"id": number, "file_name": self._file_name(number), "height": height, "width": width})
            for shape in shapes:
                ids = {"id": len(annotations) + 1, "image_id": number, "category_id": shape.label + 1, "iscrowd": 0}
                annotations.append(ids | annotate(shape.visible_fine))
        categories = [{"id": index, "name": name} for index, name in enumerate(OUTLINES, start=1)]
        content = {"info": self._info(), "images": images, "annotations": annotations, "categories": categories}
        write_whole(self.annotation_file, json.dumps(content, separators=(",", ":")))
        parts = self.annotation_file.parent.glob(f".{self.annotation_file.stem}.*.part*")
        for leftover in [self.marker, *self.image_dir.glob(".*.part*"), *parts]:  # of an interrupted run
            leftover.unlink()

    def _numbers(self):
        return range(1, self.settings["images"] + 1)

    def _rng(self, number):
        return np.random.default_rng([self.settings["seed"], ("train", "val").index(self.settings["split"]), number])

    @staticmethod
    def _file_name(number):
        return f"{number:06d}.jpg"

    def _info(self):
        return {"description": "shapes, generated by python -m dataset.shapes", "shapes": self.settings}

    def _require_settings(self, path):
        """Raises DatasetError unless the file belongs to a data set of the same settings."""
        try:
            found = dict(json.loads(path.read_bytes())["info"]["shapes"])
        except (OSError, ValueError, KeyError, TypeError):
            raise DatasetError(f"{path} does not belong to a shapes data set: choose another directory") from None
        if found != self.settings:
            differences = [
                f"{key} {found.get(key)}, not {value}"
                for key, value in self.settings.items()
                if found.get(key) != value
            ]
            raise DatasetError(
                f"{path} was generated with other settings ({'; '.join(differences)}): choose another directory"
            )


def _encode(image):
    options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", image, options)[1].tobytes()


# --------------------------------------------------------------------------------------------------------- command line


def main(arguments=None):
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dataset.shapes", description="Generate the shapes data set.")
    parser.add_argument("directory", metavar="DIR", help="folder to write to; set DATA.BASEDIR=DIR to use it")
    parser.add_argument("--train", type=_at_least(1), default=800, metavar="N", help="training images (%(default)s)")
    parser.add_argument("--val", type=_at_least(1), default=200, metavar="N", help="validation images (%(default)s)")
    parser.add_argument(
        "--size", type=_at_least(MIN_SIZE), default=128, help="side of the images in pixels (%(default)s)"
    )
    parser.add_argument("--seed", type=_at_least(0), default=0, help="of the random numbers (%(default)s)")
    options = parser.parse_args(arguments)
    directory = options.directory
    try:
        written = generate(directory, train=options.train, val=options.val, size=options.size, seed=options.seed)
    except (UserError, OSError) as error:
        print(f"dataset.shapes: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        print("dataset.shapes: interrupted; the same command completes the data set", file=sys.stderr)
        return 130
    print("\n".join(f"wrote {path}" for path in written) or f"{directory}: nothing to do, this data set exists")
    return 0


def _at_least(minimum):
    def whole_number(text):
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}")
        return int(text)

    return whole_number


if __name__ == "__main__":
    sys.exit(main())
