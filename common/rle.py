"""Polygons, masks and COCO's run-length encodings in NumPy.

Shapes: N masks or boxes; G objects; H, W image height and width; P points of a polygon; M side of a predicted mask.
Coordinates are those of common/boxes.py. No function modifies its input.
"""

import numpy as np
import pycocotools.mask as mask_util

# Below three points a polygon has no area.
MIN_POLYGON_POINTS = 3


def segmentation_to_mask(segmentation, height, width):
    """Rasterises one object's segmentation to a mask, uint8 [H, W] of 0 and 1.

    Args:
        segmentation: a list of polygons, each float [P, 2] of x, y; or an RLE dict `{"size": [h, w], "counts": bytes}`
            of the image's size; or None, which gives an empty mask. Polygons of fewer than 3 points have no area and
            are left out.

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
    """Converts a run-length encoding to the compressed form `{"size": [height, width], "counts": bytes}`.

    Args:
        rle: COCO's `{"size": [h, w], "counts": ...}`; the counts compressed (str or bytes) or a list of run lengths.

    Raises:
        ValueError: size or runs do not fit the image. pycocotools' native code does not check them.
    """
    if rle.get("size") not in ([height, width], (height, width)):
        raise ValueError(f"RLE size {rle.get('size')} is not the image's [{height}, {width}]")
    counts = rle.get("counts")
    packed = isinstance(counts, str | bytes)
    runs = _unpack_counts([counts])[0] if packed else np.asarray(counts)
    if runs.ndim != 1 or runs.dtype.kind not in "iu" or np.any((runs < 0) | (runs > height * width)):
        raise ValueError("RLE counts are not run lengths")
    if runs.sum() != height * width:
        raise ValueError(f"RLE counts add up to {runs.sum()}, not to {height} x {width} pixels")
    if packed:
        return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    return mask_util.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)


def rle_areas(rles):
    """Returns the number of object pixels in each compressed RLE, int64 [N].

    Raises:
        ValueError: the runs of an RLE do not add up to its size. pycocotools' native code does not check them.
    """
    if not rles:
        return np.zeros(0, np.int64)
    runs, stops = _unpack_counts([rle["counts"] for rle in rles])
    starts = np.concatenate([[0], stops[:-1]])
    if np.any(runs < 0) or np.any(np.add.reduceat(runs, starts) != np.prod([rle["size"] for rle in rles], axis=1)):
        raise ValueError("RLE counts do not add up to the pixels of the image")
    return np.add.reduceat(runs * (_places(stops) % 2), starts)


def encode_rle(mask):
    """Encodes a mask [H, W], non-zero = object, as COCO's compressed RLE `{"size": [h, w], "counts": str}` for JSON."""
    rle = mask_util.encode(np.asfortranarray(np.asarray(mask) != 0, np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def pack_masks(masks):
    """Packs masks [G, H, W] of 0 and 1 into bits, uint8 [G, H, ceil(W / 8)]: the leftmost pixel is the highest bit."""
    return np.packbits(np.asarray(masks) != 0, axis=-1, bitorder="big")


def packed_mask_box(packed):
    """Returns the smallest box around a packed mask, uint8 [H, ceil(W / 8)]: float32 [4], zeros for an empty mask."""
    rows = np.flatnonzero(packed.any(axis=1))
    columns = np.flatnonzero(np.unpackbits(np.bitwise_or.reduce(packed, axis=0)))
    if not len(rows):
        return np.zeros(4, np.float32)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def paste_masks(masks, boxes_xyxy, height, width):
    """Pastes masks like `paste_rle`, but returns pixels: bool [N, H, W]."""
    pasted = np.zeros((len(masks), height, width), bool)
    if not len(masks):
        return pasted
    index, columns, rows = _column_ends(masks, boxes_xyxy, height, width)
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(index)]):
        x, y = columns[start:stop], rows[start:stop]
        left, right, top, bottom = x[0], x[-1] + 1, y.min(), y.max()
        changes = np.zeros((bottom - top + 1, right - left), bool)
        np.logical_xor.at(changes, (y - top, x - left), True)
        np.logical_xor.accumulate(changes[:-1], axis=0, out=pasted[index[start], top:bottom, left:right])
    return pasted


def paste_rle(masks, boxes_xyxy, height, width):
    """Pastes masks predicted for boxes into their image: a list of N compressed RLEs in the form of `encode_rle`.

    A mask's cells fill its box and are surrounded by cells of 0; a pixel belongs to the object if the bilinear
    interpolation between the cells' centres, taken at the pixel's centre, is at least 0.5. Boxes may extend beyond the
    image. A box that is empty or not finite gives an empty mask.

    Args:
        masks: float [N, M, M] (or any [N, rows, columns]), probabilities in [0, 1].
        boxes_xyxy: float [N, 4], pixels of the image.

    The function never visits single pixels. Down a column of pixels the interpolation is linear from cell to cell, so
    the two cells determine the point where it crosses 0.5; the crossings of all columns are the ends of the runs.
    """
    if not len(masks):
        return []
    index, columns, rows = _column_ends(masks, boxes_xyxy, height, width)
    return _rle_of_ends(index, columns * height + rows, len(masks), height, width)


def _column_ends(masks, boxes_xyxy, height, width):
    """Finds the rows at which pasted masks begin and end in each column of their image.

    Returns, all int64, sorted in this order:
        index of the mask; column of pixels; row in [0, H] at which the pixels of the column change between 0 and 1,
            seen from the top, with 0 above the first row
    """
    masks, boxes_xyxy = np.asarray(masks, np.float32), np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    _, cells_high, cells_wide = masks.shape
    padded = np.zeros((len(masks), cells_wide + 2, cells_high + 2), np.float32)
    padded[:, 1:-1, 1:-1] = masks.transpose(0, 2, 1)
    index, columns, cells, weights = _pixel_columns(boxes_xyxy, cells_wide, width)
    # lines[i]: the cells of a whole mask, from top to bottom, interpolated at the pixel column i.
    lines = padded[index, cells]
    lines += weights[:, None] * (padded[index, cells + 1] - lines)
    line, rows = _crossings(lines, *boxes_xyxy[index][:, [1, 3]].T)
    return index[line], columns[line], np.clip(rows, 0, height).astype(np.int64)


def _pixel_columns(boxes_xyxy, cells_wide, width):
    """Finds the columns of pixels that each box covers, and their positions between the cells of its mask.

    Returns, with one entry for each column of each box, in this order:
        int64 index of the box; int64 column of pixels; int64 column of cells, counted in the padded mask, whose centre
            is at or before the pixel's; float32 in [0, 1], the pixel centre's distance from there in cells
    """
    low, high = boxes_xyxy[:, 0], boxes_xyxy[:, 2]
    with np.errstate(invalid="ignore"):
        sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
        is_usable = (np.isfinite(sides) & (sides > 0)).all(axis=1)
    # A pixel centre outside the box is closer to the padding than to the mask: its value is below 0.5.
    start, stop = (
        np.where(is_usable, np.clip(edge, 0, width), 0).astype(int) for edge in (np.floor(low), np.ceil(high))
    )
    counts = stop - start
    index = np.repeat(np.arange(len(boxes_xyxy)), counts)
    columns = np.arange(len(index)) + np.repeat(start - (np.cumsum(counts) - counts), counts)
    positions = (columns + 0.5 - low[index]) / (sides[index, 0] / cells_wide) + 0.5
    positions = np.clip(positions, 0, cells_wide + 1)
    cells = np.minimum(positions.astype(np.int64), cells_wide)
    return index, columns, cells, (positions - cells).astype(np.float32)


def _crossings(lines, low, high):
    """Finds where lines of cells cross 0.5.

    Args:
        lines: float32 [L, cells + 2]; the first and the last cell are padding, 0.
        low, high: float64 [L], in pixels: where a line's first cell begins and its last cell ends, without the padding.
    Returns:
        index of the line, int64; and the first row of pixels beyond the crossing, float64
    """
    is_object = lines >= 0.5
    line, cell = np.divmod(np.flatnonzero(is_object[:, 1:] != is_object[:, :-1]), lines.shape[1] - 1)
    before, after = lines[line, cell].astype(np.float64), lines[line, cell + 1]
    low, high = low[line], high[line]
    centre = low + (cell - 0.5 + (0.5 - before) / (after - before)) * (high - low) / (lines.shape[1] - 2)
    # 0.5 counts as object, so a row whose centre lies exactly there belongs to it. The slack absorbs rounding errors.
    slack = 1e-9
    return line, np.where(after > before, np.ceil(centre - 0.5 - slack), np.floor(centre - 0.5 + slack) + 1)


def _rle_of_ends(index, ends, num_masks, height, width):
    """Encodes masks whose pixels, column by column, change between 0 and 1 before the pixels `ends`.

    An end that occurs twice in a mask cancels itself.

    Args:
        index: int64 [E], the mask that an end belongs to. ends: int64 [E], in [0, H * W].
    """
    pixels = height * width
    span = pixels + 1
    last = np.arange(num_masks) * span + pixels  # the last run of each mask ends with the image
    keys = np.sort(np.concatenate([(index * span + ends)[ends < pixels], last]), kind="stable")
    keys, times = np.unique(keys, return_counts=True)
    keys = keys[times % 2 == 1]
    stops = np.searchsorted(keys, last) + 1
    runs = np.diff(keys, prepend=-1)
    runs[np.concatenate([[0], stops[:-1]])] -= 1
    return [{"size": [height, width], "counts": text} for text in _pack_counts(runs, stops)]


def _clip_polygon(polygon, height, width):
    """Clips a polygon [P, 2] to the image and a margin around it, float64; most polygons lie inside and stay unchanged.

    pycocotools crashes on huge coordinates. Clipping (Sutherland and Hodgman, 1974), unlike limiting each coordinate,
    keeps the directions of the edges, as far as float64 resolves them; the margin keeps the new edges along the border
    outside the image.
    """
    polygon = np.asarray(polygon, np.float64).reshape(-1, 2)
    if not np.isfinite(polygon).all():
        raise ValueError("a polygon's coordinate is not finite")
    # Rounding restores the decimals that were stored as float32: pycocotools works on a grid of fifths of a pixel, and
    # COCO's coordinates, with two decimals, often lie exactly between its lines.
    polygon = np.round(np.clip(polygon, -1e9, 1e9), 3)
    margin = max(height, width)
    for axis, limit in ((0, width + margin), (1, height + margin)):
        polygon = _cut_polygon(polygon, axis, limit, sign=1)
        polygon = _cut_polygon(polygon, axis, -margin, sign=-1)
    return polygon


def _cut_polygon(polygon, axis, limit, *, sign):
    """Cuts off the part of a polygon beyond `limit` on one axis: above it for sign 1, below it for sign -1."""
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


def _unpack_counts(texts):
    """Decodes the texts of several compressed RLEs: (all run lengths, int64; the end of each RLE's in them).

    COCO's format: characters from "0" upwards hold 6 bits, 5 of them data, least significant first; bit 6 is set if the
    number continues; the last character's bit 5 is the sign; from the fourth number onwards, a number is the difference
    to the number two places before it.

    Raises:
        ValueError: a text is cut off, or holds a wrong character or a number beyond 32 bits.
    """
    characters = [text.encode() if isinstance(text, str) else text for text in texts]
    bits = np.frombuffer(b"".join(characters), np.uint8) - np.uint8(ord("0"))
    text_ends = np.cumsum([len(each) for each in characters], dtype=np.int64)
    last = (bits & 0x20) == 0
    if not all(characters) or not last[text_ends - 1].all() or np.any(bits > 63):
        raise ValueError("RLE counts are cut off or hold a wrong character")
    ends = np.flatnonzero(last)
    lengths = np.diff(ends, prepend=-1)
    if lengths.max(initial=1) > 7:
        raise ValueError("RLE counts hold a number beyond 32 bits")
    # The last character holds the highest bits and the sign; each one before it adds five bits below.
    numbers = ((bits[ends] & 0x1F).astype(np.int64) ^ 0x10) - 0x10
    for back in range(1, int(lengths.max(initial=1))):
        longer = np.flatnonzero(lengths > back)
        numbers[longer] = numbers[longer] << 5 | (bits[ends[longer] - back] & 0x1F)
    stops = np.searchsorted(ends, text_ends)
    return _undo_differences(numbers, stops), stops


def _undo_differences(numbers, stops):
    """Decodes the numbers of RLEs to run lengths: each after the third is a difference to the one two before."""
    place = _places(stops)
    runs = numbers.copy()
    for first in (1, 2):  # the odd places, and the even ones but 0
        chain = np.flatnonzero((place % 2 == first % 2) & (place > 0))
        sums = np.cumsum(numbers[chain])
        heads = np.flatnonzero(place[chain] == first)
        before = sums[heads] - numbers[chain[heads]]  # sums of the preceding RLEs
        runs[chain] = sums - np.repeat(before, np.diff(heads, append=len(chain)))
    return runs


def _places(stops):
    """Returns the place of each item in its group, from 0, for consecutive groups that end at `stops`."""
    starts = np.concatenate([[0], stops[:-1]]).astype(np.int64)
    return np.arange(stops[-1] if len(stops) else 0) - np.repeat(starts, stops - starts)


def _pack_counts(runs, stops):
    """Encodes the run lengths of several masks, the inverse of `_unpack_counts`: a list of str.

    Args:
        runs: run lengths of all masks, int64. stops: the end of each mask's in `runs`.
    """
    numbers = runs - np.where(_places(stops) > 2, np.roll(runs, 2), 0)
    digits = 1
    while np.any((numbers < -(1 << (5 * digits - 1))) | (numbers >= 1 << (5 * digits - 1))):
        digits += 1
    rest = numbers[:, None] >> (5 * np.arange(digits))
    data = rest & 0x1F
    continues = (rest >> 5) != -(data >> 4)
    is_used = np.roll(continues, 1, axis=1)  # a character is used if the one before it is marked as continued
    is_used[:, 0] = True
    text = (data + 0x20 * continues + ord("0")).astype(np.uint8)[is_used].tobytes().decode("ascii")
    ends = np.cumsum(is_used.sum(axis=1))[stops - 1]
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends)]
