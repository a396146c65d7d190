"""Creates training examples from records: resize, mirror, crop, change colours, rasterise masks, apply transforms.

Shapes: N images; G objects; H, W height and width. Boxes are float32 x1 y1 x2 y2 in pixels; images uint8 BGR.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np

from common import boxes as np_boxes
from common.errors import ImageError
from common.registry import Registry
from common.rle import pack_masks, packed_mask_box, segmentation_to_mask
from config import round_up
from dataset.images import MIN_EDGE, load_record_image, resize_image
from dataset.record import Record, Segmentation

CROWD_LABEL = -1
# Boxes that extend no more than this beyond the example, in pixels, do not count as cut.
CUT_PIXELS = 0.5

# Uses of random numbers: part of each seed, so that an epoch and a position of equal number differ.
ORDER, EXAMPLE, SUBSTITUTE = 0, 1, 2


class TrainingTask(NamedTuple):
    """The task of a worker: one image, and its position in the order of the data."""

    record: Record
    position: int  # images of all ranks before this one

    def __str__(self):
        return f"image {self.record.image_id} ({self.record.path})"


class Unreadable(NamedTuple):
    """Replaces an example whose image cannot be used."""

    task: TrainingTask
    problem: str  # message that names the image


class Augmentation(NamedTuple):
    """Random changes of training examples, in addition to mirroring every second one."""

    short_edge: int | tuple[int, ...]  # pixels: one size; (low, high), drawn evenly, inclusive; or 3 and more choices
    max_size: float  # limit of the long edge in pixels
    antialias: bool = False  # see `dataset.images.resize`
    # Side S of the square cut out at a random place, or 0. Before the cut, the long edge is resized to S times a random
    # factor (large-scale jitter, arXiv:2012.07177) instead of the sizes above.
    crop_size: int = 0
    crop_scale: tuple[float, float] = (0.1, 2.0)  # lowest and highest factor
    color_jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)  # strengths of `jitter_color`
    transforms: tuple["Transform", ...] = ()  # registered functions, applied last: see `register_transform`

    def draw_size(self, rng: np.random.Generator) -> dict[str, float]:
        """Draws the size of an example before the crop: the keywords of `resized_shape`."""
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
    """Creates a training example from a task. It works in any process and always gives the same result."""

    augmentation: Augmentation
    with_masks: bool  # whether examples have `gt_masks`
    seed: int  # in [0, 2^31)

    def __call__(self, task: TrainingTask) -> dict[str, Any] | Unreadable:
        """Returns the batch entries of TrainingData without the N axis; the object axis has the image's own length.

        If the image cannot be used, returns an Unreadable.
        """
        record = task.record
        try:
            image = load_record_image(record)
        except ImageError as error:
            return Unreadable(task, str(error))
        rng = np.random.default_rng((self.seed, EXAMPLE, task.position))
        image, view = self._augment(image, rng)
        keep, boxes_xyxy, masks = self._objects(record, view)
        if self.augmentation.transforms:
            image, kept, boxes_xyxy, masks = self._transform(image, boxes_xyxy, masks, rng)
            keep = keep[kept]
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
        """Returns the augmented image and its View."""
        augmentation, (file_height, file_width) = self.augmentation, image.shape[:2]
        flip = bool(rng.random() < 0.5)
        if flip:
            image = cv2.flip(image, 1)
        image = resize_image(image, **augmentation.draw_size(rng), antialias=augmentation.antialias)
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
        """Returns the indices of the visible objects, int [G], their boxes float32 [G, 4], and masks or None.

        The box of an object that the crop cuts is intersected with the box of the mask's visible part, which is often
        smaller.
        """
        mapped_xyxy = view.map_boxes(record.boxes_xyxy)
        boxes_xyxy = np_boxes.clip(mapped_xyxy, view.height, view.width).astype(np.float32)
        keep = np.flatnonzero(np_boxes.area(boxes_xyxy) > np_boxes.MIN_BOX_AREA)
        is_cut = np.any(np.abs(mapped_xyxy - boxes_xyxy) > CUT_PIXELS, axis=1)[keep]
        boxes_xyxy = boxes_xyxy[keep]
        segmentations = [None if record.is_crowd[i] else record.segmentations[i] for i in keep]
        masks = view.draw_masks(segmentations) if self.with_masks else None
        for slot in np.flatnonzero(is_cut):
            if segmentations[slot] is not None:
                mask = view.draw_masks([segmentations[slot]])[0] if masks is None else masks[slot]
                boxes_xyxy[slot] = np_boxes.intersect(boxes_xyxy[slot], packed_mask_box(mask))
        is_large = np_boxes.area(boxes_xyxy) > np_boxes.MIN_BOX_AREA
        return keep[is_large], boxes_xyxy[is_large], None if masks is None else masks[is_large]

    def _transform(self, image, boxes_xyxy, masks, rng):
        """Applies the transforms.

        Returns:
            image, indices of the remaining objects, and their boxes and packed masks
        """
        if masks is not None:
            masks = np.unpackbits(masks, axis=-1, count=image.shape[1]).astype(bool)
        example = Example(image, boxes_xyxy, masks)
        for function in self.augmentation.transforms:
            example = _checked(function(example, rng), function, len(boxes_xyxy), with_masks=masks is not None)
        clipped_xyxy = np_boxes.clip(example.boxes_xyxy, *example.image.shape[:2]).astype(np.float32)
        kept = np.flatnonzero(np_boxes.area(clipped_xyxy) > np_boxes.MIN_BOX_AREA)
        packed = None if masks is None else pack_masks(example.masks[kept])
        return example.image, kept, clipped_xyxy[kept], packed


class View(NamedTuple):
    """The map from an image to a training example of [height, width].

    A point (x, y) of the image file lies at (x * scale_x + shift_x, y * scale_y + shift_y) in the example; scale_x is
    negative if it is mirrored. Parts of the image may lie outside the example.
    """

    height: int  # of the example, in pixels
    width: int
    scale_x: float = 1.0
    shift_x: float = 0.0
    scale_y: float = 1.0
    shift_y: float = 0.0

    def map_boxes(self, boxes_xyxy: np.ndarray) -> np.ndarray:
        """Maps boxes [G, 4] of the image file into this view, float64, not clipped."""
        xs, ys = boxes_xyxy[:, 0::2].astype(np.float64), boxes_xyxy[:, 1::2].astype(np.float64)
        xs = np.sort(xs * self.scale_x + self.shift_x, axis=1)
        ys = ys * self.scale_y + self.shift_y
        return np.stack([xs[:, 0], ys[:, 0], xs[:, 1], ys[:, 1]], axis=1)

    def draw_masks(self, segmentations: Sequence[Segmentation]) -> np.ndarray:
        """Draws masks of G objects of the image file (polygons, RLE or None): uint8 [G, H, ceil(W / 8)], packed."""
        masks = np.zeros((len(segmentations), self.height, round_up(self.width, 8) // 8), np.uint8)
        for mask, segmentation in zip(masks, segmentations):
            if isinstance(segmentation, dict):
                mask[:] = pack_masks(self._warped_mask(segmentation))
            elif segmentation:
                self._draw([self._polygon(polygon) for polygon in segmentation], mask)
        return masks

    def _polygon(self, polygon):
        return np.asarray(polygon, np.float64) * (self.scale_x, self.scale_y) + (self.shift_x, self.shift_y)

    def _draw(self, polygons, packed):
        """Draws polygons into a packed mask [H, ceil(W / 8)]; touches only their bounding box, to save time."""
        points = np.concatenate(polygons)
        low, high = np.floor(points.min(axis=0)) - 1, np.ceil(points.max(axis=0)) + 1
        left, top = np.clip(low, 0, (self.width, self.height)).astype(int)
        right, bottom = np.clip(high, 0, (self.width, self.height)).astype(int)
        left -= left % 8
        if right > left and bottom > top:
            shifted = [polygon - (left, top) for polygon in polygons]
            part = pack_masks(segmentation_to_mask(shifted, bottom - top, right - left))
            packed[top:bottom, left // 8 : left // 8 + part.shape[1]] = part

    def _warped_mask(self, rle):
        mask = segmentation_to_mask(rle, *rle["size"]) * np.uint8(255)
        # OpenCV's coordinates have their origin at the centre of the first pixel.
        shift_x = self.scale_x / 2 + self.shift_x - 0.5
        shift_y = self.scale_y / 2 + self.shift_y - 0.5
        to_view = np.array([[self.scale_x, 0, shift_x], [0, self.scale_y, shift_y]])
        size = (self.width, self.height)
        return cv2.warpAffine(mask, to_view, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) > 127


def _random_crop(image, size, rng):
    """Crops an image to at most `size` pixels per side (0: all); returns the part, and its left and top."""
    height, width = (min(edge, size or edge) for edge in image.shape[:2])
    if (height, width) == image.shape[:2]:
        return image, 0, 0
    top, left = (int(rng.integers(whole - part, endpoint=True)) for whole, part in zip(image.shape, (height, width)))
    return np.ascontiguousarray(image[top : top + height, left : left + width]), left, top


def jitter_color(image: np.ndarray, strengths: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, contrast and saturation of an image, uint8 [H, W, 3] BGR, at random.

    Each of the three is a factor drawn uniformly from [1 - s, 1 + s], for its strength s in 0..1. Brightness multiplies
    all values, contrast their distance to the mean, saturation the distance of each pixel to its grey.
    """
    brightness, contrast, saturation = (1 + s * rng.uniform(-1, 1) for s in strengths)
    mean = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).mean() * brightness
    values = (np.arange(256) * brightness - mean) * contrast + mean
    image = cv2.LUT(image, np.clip(np.rint(values), 0, 255).astype(np.uint8))
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    return cv2.addWeighted(image, saturation, grey, 1 - saturation, 0)


# ---------------------------------------------------------------- registered transforms


class Example(NamedTuple):
    """An image with its objects, as a registered transform receives and returns it."""

    image: np.ndarray  # uint8 [H, W, 3] BGR
    boxes_xyxy: np.ndarray  # float32 [G, 4]; clipped to the image after all transforms
    masks: np.ndarray | None  # bool [G, H, W], empty for crowd regions; None in a training without masks


Transform = Callable[[Example, np.random.Generator], Example]
TRANSFORMS = Registry("PREPROC.TRANSFORMS")


def register_transform(name: str, function: Transform) -> Transform:
    """Registers a transform under a name for PREPROC.TRANSFORMS; transforms follow the built-in ones, in their order.

    Args:
        function: (Example, numpy.random.Generator) -> Example with the same G objects in the same order; objects
            without an area in the image are left out afterwards. Workers import the function by module and name: define
            it at the top level of a module, preferably of one that does not import TensorFlow.
    Returns:
        the function
    Raises:
        ConfigError: the name is registered already.
    """
    return TRANSFORMS.register(name, function)


def warp_affine(
    example: Example, matrix: np.ndarray, *, height: int | None = None, width: int | None = None
) -> Example:
    """Applies an affine map to an example; pixels without a source become zero.

    Args:
        matrix: float [2, 3]; (x, y) in continuous pixel coordinates goes to matrix @ (x, y, 1).
        height, width: of the result in pixels; by default those of the image.
    Returns:
        Example. An object's box is the smallest around its warped mask or, without a mask, around its warped corners.
    """
    matrix = np.asarray(matrix, np.float64)
    size = (width or example.image.shape[1], height or example.image.shape[0])
    # OpenCV's coordinates have their origin at the centre of the first pixel.
    centred = np.concatenate([matrix[:, :2], matrix @ [[0.5], [0.5], [1.0]] - 0.5], axis=1)
    image = cv2.warpAffine(example.image, centred, size, flags=cv2.INTER_LINEAR)
    x1, y1, x2, y2 = example.boxes_xyxy.astype(np.float64).T
    corners = np.stack([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])  # [4, 2, G]
    moved = np.einsum("ij,kjg->kig", matrix[:, :2], corners) + matrix[:, 2:]
    boxes_xyxy = np.concatenate([moved.min(axis=0), moved.max(axis=0)]).T.astype(np.float32)
    if example.masks is None:
        return Example(image, boxes_xyxy, None)
    masks = np.zeros((len(boxes_xyxy), size[1], size[0]), bool)
    for slot, mask in enumerate(example.masks):
        if mask.any():
            masks[slot] = cv2.warpAffine(mask * np.uint8(255), centred, size, flags=cv2.INTER_LINEAR) > 127
            boxes_xyxy[slot] = packed_mask_box(pack_masks(masks[slot]))
    return Example(image, boxes_xyxy, masks)


def _checked(example, function, num_objects, *, with_masks):
    """Returns the Example that a transform returned; raises TypeError if it is none, or of wrong dtypes or shapes."""
    name = f"transform {getattr(function, '__qualname__', function)}"
    if not isinstance(example, Example):
        raise TypeError(f"{name} must return an Example, not {type(example).__name__}")
    image, boxes_xyxy, masks = example
    if image.dtype != np.uint8 or image.ndim != 3 or np.shape(boxes_xyxy) != (num_objects, 4):
        raise TypeError(f"{name} must return a uint8 image and {num_objects} boxes")
    shape = (num_objects, *image.shape[:2])
    if with_masks and np.shape(masks) != shape:
        raise TypeError(f"{name} must return masks of shape {list(shape)}")
    return example
