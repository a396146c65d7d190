"""Boxes and anchors in NumPy, for data, evaluation and drawing.

Shapes: N, M boxes.

Conventions: `boxes_xyxy` are `x1 y1 x2 y2` in continuous pixel coordinates: (0, 0) is the top-left corner of the
top-left pixel, pixel (row i, column j) covers [j, j + 1] x [i, i + 1], and a box's width is x2 - x1. No function
modifies its input.
"""

import numpy as np

# Objects of at most this many square pixels are too small to learn, in the original image as in the resized one.
MIN_BOX_AREA = 1


def area(boxes_xyxy):
    """Returns the area of each box in square pixels, float [N]; 0 for boxes with a negative side."""
    boxes_xyxy = _as_boxes(boxes_xyxy)
    sides = np.maximum(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 0)
    return sides[:, 0] * sides[:, 1]


def pairwise_iou(boxes_a, boxes_b):
    """Returns the intersection over union of all pairs, float32 [N, M] in [0, 1]; 0 where both boxes are empty.

    The union is (area a + area b) - intersection, in float32 and in this order, so that ties between ground truths are
    broken as in the reference.
    """
    boxes_a, boxes_b = (_as_boxes(boxes).astype(np.float32) for boxes in (boxes_a, boxes_b))
    top_left = np.maximum(boxes_a[:, None, :2], boxes_b[None, :, :2])
    bottom_right = np.minimum(boxes_a[:, None, 2:], boxes_b[None, :, 2:])
    intersection = np.maximum(bottom_right - top_left, 0).prod(axis=2)
    union = (area(boxes_a)[:, None] + area(boxes_b)[None, :]) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def clip(boxes_xyxy, height, width):
    """Limits all four coordinates of boxes [N, 4] to the image: x to [0, width], y to [0, height]."""
    boxes_xyxy = _as_boxes(boxes_xyxy)
    return np.clip(boxes_xyxy, 0, np.array([width, height, width, height], boxes_xyxy.dtype))


def xywh_to_xyxy(boxes_xywh):
    """Converts boxes [N, 4] from `x1 y1 width height` (COCO's format) to `x1 y1 x2 y2`."""
    boxes_xywh = _as_boxes(boxes_xywh)
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def xyxy_to_xywh(boxes_xyxy):
    """Converts boxes [N, 4] from `x1 y1 x2 y2` to `x1 y1 width height` (COCO's format)."""
    boxes_xyxy = _as_boxes(boxes_xyxy)
    return np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1)


def flip_horizontal(boxes_xyxy, width):
    """Mirrors boxes [N, 4] within an image `width` pixels wide: left and right edges change places."""
    boxes_xyxy = _as_boxes(boxes_xyxy)
    return np.stack([width - boxes_xyxy[:, 2], boxes_xyxy[:, 1], width - boxes_xyxy[:, 0], boxes_xyxy[:, 3]], axis=1)


def scale(boxes_xyxy, scale_x, scale_y):
    """Scales boxes [N, 4] with an image that is resized by the factors `scale_x` and `scale_y`."""
    boxes_xyxy = _as_boxes(boxes_xyxy)
    return boxes_xyxy * np.array([scale_x, scale_y, scale_x, scale_y], boxes_xyxy.dtype)


def intersect(boxes_a, boxes_b):
    """Returns the intersection of each pair of boxes [..., 4]: a box with a negative side if they do not overlap."""
    a, b = np.asarray(boxes_a), np.asarray(boxes_b)
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    return np.concatenate([low, high], axis=-1)


def base_anchors(sizes, ratios):
    """Returns the anchors of one cell, centred on (0, 0): float32 [len(sizes) * len(ratios), 4], size-major.

    A width is sqrt(size^2 / ratio), a height ratio * width: all ratios of a size have the same area. Nothing is
    rounded.

    Args:
        sizes: square roots of the areas, in pixels. ratios: height / width.
    """
    sizes, ratios = np.meshgrid(np.asarray(sizes, np.float64), np.asarray(ratios, np.float64), indexing="ij")
    widths = np.sqrt(sizes**2 / ratios).ravel()
    heights = ratios.ravel() * widths
    return (np.stack([-widths, -heights, widths, heights], axis=1) / 2).astype(np.float32)


def _as_boxes(boxes):
    """Returns boxes as a floating-point array [N, 4]: an empty list becomes [0, 4], integers become float32."""
    boxes = np.asarray(boxes)
    if boxes.dtype.kind != "f":
        boxes = boxes.astype(np.float32)
    return boxes.reshape(-1, 4)
