"""Boxes, anchors and masks in NumPy: what the data, the evaluation and the drawing share.

Shape shorthand: N, M boxes; G objects; H, W image height and width; P points of a polygon.

Conventions: `boxes_xyxy` are `x1 y1 x2 y2` in continuous pixel coordinates: (0, 0) is the top-left corner of the
top-left pixel, pixel (row i, column j) covers [j, j + 1] x [i, i + 1], and a box's width is x2 - x1. No function
changes its input.
"""

import numpy as np
import pycocotools.mask as mask_util

# Below three points a polygon has no area.
MIN_POLYGON_POINTS = 3
# Objects of at most so many square pixels cannot be learned: in the file's image as in the resized one.
MIN_BOX_AREA = 1


def area(boxes_xyxy):
    """Area of each box, float [N], in square pixels; 0 for reversed boxes."""
    boxes_xyxy = _as_boxes(boxes_xyxy)
    sides = np.maximum(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 0)
    return sides[:, 0] * sides[:, 1]


def pairwise_iou(boxes_a, boxes_b):
    """Intersection over union of all pairs, float32 [N, M] in [0, 1]; 0 where both boxes are empty.

    The union is (area a + area b) - intersection, in float32 and in this order: ties between ground truths then break
    as in the reference.
    """
    boxes_a, boxes_b = (_as_boxes(boxes).astype(np.float32) for boxes in (boxes_a, boxes_b))
    top_left = np.maximum(boxes_a[:, None, :2], boxes_b[None, :, :2])
    bottom_right = np.minimum(boxes_a[:, None, 2:], boxes_b[None, :, 2:])
    intersection = np.maximum(bottom_right - top_left, 0).prod(axis=2)
    union = (area(boxes_a)[:, None] + area(boxes_b)[None, :]) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def clip(boxes_xyxy, height, width):
    """Boxes [N, 4] with all four coordinates limited to the image: x to [0, width], y to [0, height]."""
    boxes_xyxy = _as_boxes(boxes_xyxy)
    return np.clip(boxes_xyxy, 0, np.array([width, height, width, height], boxes_xyxy.dtype))


def xywh_to_xyxy(boxes_xywh):
    """`x1 y1 width height` (COCO's format) to `x1 y1 x2 y2`, [N, 4]."""
    boxes_xywh = _as_boxes(boxes_xywh)
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def xyxy_to_xywh(boxes_xyxy):
    """`x1 y1 x2 y2` to `x1 y1 width height` (COCO's format), [N, 4]."""
    boxes_xyxy = _as_boxes(boxes_xyxy)
    return np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1)


def flip_horizontal(boxes_xyxy, width):
    """Boxes [N, 4] in the mirror image of an image `width` pixels wide: left and right edge change places."""
    boxes_xyxy = _as_boxes(boxes_xyxy)
    return np.stack([width - boxes_xyxy[:, 2], boxes_xyxy[:, 1], width - boxes_xyxy[:, 0], boxes_xyxy[:, 3]], axis=1)


def scale(boxes_xyxy, scale_x, scale_y):
    """Boxes [N, 4] after the image was resized by `scale_x` and `scale_y`."""
    boxes_xyxy = _as_boxes(boxes_xyxy)
    return boxes_xyxy * np.array([scale_x, scale_y, scale_x, scale_y], boxes_xyxy.dtype)


def base_anchors(sizes, ratios):
    """The anchors of one cell, centred on (0, 0), float32 [len(sizes) * len(ratios), 4], size-major.

    Width sqrt(size^2 / ratio) and height ratio * width: all ratios of a size have the same area. Nothing is rounded.
    """
    sizes, ratios = np.meshgrid(np.asarray(sizes, np.float64), np.asarray(ratios, np.float64), indexing="ij")
    widths = np.sqrt(sizes**2 / ratios).ravel()
    heights = ratios.ravel() * widths
    return (np.stack([-widths, -heights, widths, heights], axis=1) / 2).astype(np.float32)


def segmentation_to_mask(segmentation, height, width):
    """One object's mask, uint8 [H, W] of 0 and 1.

    Args:
        segmentation: a list of polygons, each float [P, 2] of x, y; or an RLE dict `{"size": [h, w], "counts": bytes}`
            whose size is the image's; or None, which gives an empty mask. Polygons of fewer than 3 points have no area
            and are left out.

    Raises:
        ValueError: a coordinate is not finite, or the RLE does not describe a mask of this size.
    """
    if segmentation is None:
        return np.zeros((height, width), np.uint8)
    if isinstance(segmentation, dict):
        return mask_util.decode(compress_rle(segmentation, height, width))
    polygons = [_clip_polygon(polygon, height, width) for polygon in segmentation]
    polygons = [polygon.ravel() for polygon in polygons if len(polygon) >= MIN_POLYGON_POINTS]
    if not polygons:
        return np.zeros((height, width), np.uint8)
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, height, width)))


def compress_rle(rle, height, width):
    """A run-length encoding as `{"size": [height, width], "counts": bytes}`, compressed.

    Args:
        rle: COCO's `{"size": [h, w], "counts": ...}`; the counts compressed (str or bytes) or a list of run lengths.

    Raises:
        ValueError: size or runs do not fit the image. Checked here because the native code does not check.
    """
    if rle.get("size") not in ([height, width], (height, width)):
        raise ValueError(f"RLE size {rle.get('size')} is not the image's [{height}, {width}]")
    counts = rle.get("counts")
    packed = isinstance(counts, str | bytes)
    runs = _unpack_counts(counts) if packed else np.asarray(counts)
    if runs.ndim != 1 or runs.dtype.kind not in "iu" or np.any((runs < 0) | (runs > height * width)):
        raise ValueError("RLE counts are not run lengths")
    if runs.sum() != height * width:
        raise ValueError(f"RLE counts add up to {runs.sum()}, not to {height} x {width} pixels")
    if packed:
        return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    return mask_util.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)


def encode_rle(mask):
    """A mask [H, W] as COCO's compressed RLE `{"size": [h, w], "counts": str}`, ready for json; non-zero is object."""
    rle = mask_util.encode(np.asfortranarray(np.asarray(mask) != 0, np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def pack_masks(masks):
    """Masks [G, H, W] of 0 and 1 as bits, uint8 [G, H, ceil(W / 8)]: the leftmost pixel is the highest bit."""
    return np.packbits(np.asarray(masks) != 0, axis=-1, bitorder="big")


def paste_mask(mask, box_xyxy, height, width):
    """A mask predicted for a box, put into its image: uint8 [H, W] of 0 and 1.

    The mask's cells fill the box and are surrounded by cells of 0; a pixel is 1 where the bilinear interpolation
    between the cells' centres, taken at the pixel's centre, is at least 0.5. Boxes may reach outside the image; an
    empty one gives an empty mask.

    Args:
        mask: float [M, M] (or any [rows, columns]), probabilities in [0, 1].
        box_xyxy: float [4], pixels of the image.

    Interpolates along one axis after the other, and only over the part of the image that the box can reach. (Two matrix
    products would do the same, but wait many times as long for BLAS threads when other work keeps the cores busy.)
    """
    cells_high, cells_wide = np.shape(mask)
    padded = np.zeros((cells_high + 2, cells_wide + 2), np.float32)
    padded[1:-1, 1:-1] = mask
    x1, y1, x2, y2 = np.asarray(box_xyxy, np.float64).tolist()
    rows, cells_y, weights_y = _interpolation(y1, y2, cells_high, height)
    columns, cells_x, weights_x = _interpolation(x1, x2, cells_wide, width)
    lines = padded[cells_y] + weights_y[:, None] * np.diff(padded, axis=0)[cells_y]
    # In place, because this is as large as the box.
    values = np.diff(lines, axis=1).take(cells_x, axis=1)
    values *= weights_x
    values += lines.take(cells_x, axis=1)
    pasted = np.zeros((height, width), np.uint8)
    np.greater_equal(values, 0.5, out=pasted[rows, columns].view(bool))
    return pasted


def _interpolation(low, high, cells, pixels):
    """Where pixel centres lie between the cell centres of a mask with one cell of padding, along one axis.

    Args:
        low, high: extent of the mask without its padding, in pixels.
        cells: of the mask, without the two of padding.
        pixels: of the image.

    Returns:
        The slice of pixels that the mask can reach, and for each of them the cell whose centre is at or before the
        pixel's, int64, and how far the pixel's centre is on the way to the next cell's, float32 in [0, 1].
    """
    cell = (high - low) / cells
    if not 0 < cell < np.inf:
        return slice(0, 0), np.zeros(0, np.int64), np.zeros(0, np.float32)
    # A pixel whose centre is outside the box gets more from the padding than from the mask: less than 0.5.
    start, stop = np.clip([np.floor(low), np.ceil(high)], 0, pixels).astype(int)
    positions = np.clip((np.arange(start, stop) + 0.5 - low) / cell + 0.5, 0, cells + 1)
    before = np.minimum(positions.astype(np.int64), cells)
    return slice(start, stop), before, (positions - before).astype(np.float32)


def _as_boxes(boxes):
    """Boxes as a floating array [N, 4]; an empty list is no boxes, and integers become float32."""
    boxes = np.asarray(boxes)
    if boxes.dtype.kind != "f":
        boxes = boxes.astype(np.float32)
    return boxes.reshape(-1, 4)


def _clip_polygon(polygon, height, width):
    """The part of a polygon [P, 2] near the image, float64; most polygons are inside and come back as they are.

    pycocotools crashes on huge coordinates. Cutting (Sutherland and Hodgman, 1974) instead of limiting each coordinate
    keeps the edges' directions (of numbers that float64 can still tell apart); the margin keeps the new edges along the
    border out of the image.
    """
    polygon = np.asarray(polygon, np.float64).reshape(-1, 2)
    if not np.isfinite(polygon).all():
        raise ValueError("a polygon's coordinate is not finite")
    # Rounding brings back the decimals that were stored as float32: pycocotools works on a grid of fifths of a pixel,
    # and COCO's coordinates, with their two decimals, often lie exactly between its lines.
    polygon = np.round(np.clip(polygon, -1e9, 1e9), 3)
    margin = max(height, width)
    for axis, limit in ((0, width + margin), (1, height + margin)):
        polygon = _cut_polygon(polygon, axis, limit, sign=1)
        polygon = _cut_polygon(polygon, axis, -margin, sign=-1)
    return polygon


def _cut_polygon(polygon, axis, limit, *, sign):
    """Cut off what lies beyond `limit` on one axis: above it for sign 1, below it for sign -1."""
    excess = sign * (polygon[:, axis] - limit)
    if not np.any(excess > 0):
        return polygon
    points = []
    for point, beyond, previous, previous_beyond in zip(polygon, excess, np.roll(polygon, 1, 0), np.roll(excess, 1)):
        if (beyond > 0) != (previous_beyond > 0):
            points.append(previous + (point - previous) * (previous_beyond / (previous_beyond - beyond)))
        if beyond <= 0:
            points.append(point)
    return np.array(points, np.float64).reshape(-1, 2)


def _unpack_counts(counts):
    """The run lengths, int64, in the text of a compressed RLE.

    COCO's format: characters from "0" on hold 6 bits, 5 of them data, least significant first; bit 6 says that the
    number goes on; the last character's bit 5 is the sign; from the fourth number on, a number is the difference to the
    one two before it.
    """
    characters = counts.encode() if isinstance(counts, str) else counts
    bits = np.frombuffer(characters, np.uint8).astype(np.int64) - ord("0")
    last = (bits & 0x20) == 0
    if not len(bits) or not last[-1] or np.any((bits < 0) | (bits > 63)):
        raise ValueError("RLE counts are cut off or hold a wrong character")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = np.arange(len(bits)) - np.repeat(starts, ends - starts + 1)
    if digits.max() > 6:
        raise ValueError("RLE counts hold a number beyond 32 bits")
    numbers = np.add.reduceat((bits & 0x1F) << (5 * digits), starts)
    numbers -= np.where(bits[ends] & 0x10, 1 << (5 * (ends - starts + 1)), 0)
    # The first number stands alone; differences run from the second (odd places) and from the third (even places) on.
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
