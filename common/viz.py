"""Draws detections and ground truth on images, puts pictures side by side, and shows them in a window.

Images are uint8 [H, W, 3] BGR; boxes are x1 y1 x2 y2 in continuous pixel coordinates of the image. Labels are 1..C, and
`class_names[label - 1]` is a label's name.
"""

import functools
import math
import os
import subprocess
import sys
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.files import write_new
from common.rle import segmentation_to_mask

# Images with a shorter long edge (in pixels) are enlarged before drawing, because labels would cover them.
MIN_LONG_EDGE = 480
MASK_OPACITY = 0.45
WIDE_MASK_OPACITY = 0.25  # of a mask that covers the whole picture and would hide everything else
PALETTE_SIZE = 96
FIRST_COLOUR_LAB = (62, 62, 50)  # a warm red, for the most frequent class of many data sets
MIN_FONT_SIZE = 12
CROWDED = 15  # objects in a picture above which letters are smaller
INK = (24, 24, 24)
PAPER = (255, 255, 255)


class Item(NamedTuple):
    """One object to draw."""

    box_xyxy: np.ndarray  # float [4]
    colour: tuple[int, int, int]  # BGR, 0..255
    text: str  # of the label
    mask: np.ndarray | None  # [H, W], non-zero = object


def draw_detections(image_bgr, detections, class_names, *, score_threshold):
    """Returns a picture of the detections whose score is at least `score_threshold`.

    Args:
        detections: inference.ImageDetections, best first: boxes_xyxy [R, 4], scores [R], labels [R], masks [R, H, W] or
            None.
    Returns:
        uint8 BGR, as large as the image, or a whole multiple of it if the image's long edge is below MIN_LONG_EDGE
    """
    items = []
    for index in np.flatnonzero(np.asarray(detections.scores) >= score_threshold):
        label = int(detections.labels[index])
        text = f"{class_names[label - 1]} {100 * detections.scores[index]:.0f}%"
        mask = None if detections.masks is None else detections.masks[index]
        items.append(Item(detections.boxes_xyxy[index], class_colour(label), text, mask))
    return draw_items(image_bgr, items)


def draw_ground_truth(image_bgr, record, class_names):
    """Returns a picture of the objects of a dataset.Record, crowd regions included; size as in `draw_detections`."""
    height, width = image_bgr.shape[:2]
    items = []
    for box, label, is_crowd, segmentation in zip(
        record.boxes_xyxy, record.labels, record.is_crowd, record.segmentations, strict=True
    ):
        mask = None if segmentation is None else segmentation_to_mask(segmentation, height, width)
        text = class_names[label - 1] + (" (crowd)" if is_crowd else "")
        items.append(Item(box, class_colour(int(label)), text, mask))
    return draw_items(image_bgr, items)


def draw_boxes(image_bgr, boxes_and_colours):
    """Returns a picture of boxes alone, given as pairs (float [4], BGR colour); later boxes cover earlier ones."""
    picture, factor = _enlarged(image_bgr)
    line = max(1, _line_width(*picture.shape[:2]) // 2)
    for box_xyxy, colour in boxes_and_colours:
        _draw_box(picture, np.asarray(box_xyxy, np.float64) * factor, colour, line=line)
    return picture


def side_by_side(left, right, titles):
    """Returns two pictures side by side below their titles; the lower one is enlarged to the other's height."""
    height = max(left.shape[0], right.shape[0])
    pictures = [_scaled_to_height(picture, height) for picture in (left, right)]
    size = _font_size(*pictures[0].shape[:2])
    gap = np.full((height + 2 * size, max(2, size // 2), 3), PAPER, np.uint8)
    columns = [_with_title(picture, title, size) for picture, title in zip(pictures, titles, strict=True)]
    return np.hstack([columns[0], gap, columns[1]])


def save_picture(picture, path):
    """Writes a picture as PNG and returns its path: if the file exists, the first free of NAME-1.png, NAME-2.png, ...

    Raises:
        FileError: the file cannot be written.
    """
    return write_new(path, {path.suffix: encode_picture(picture)})


def encode_picture(picture):
    """Encodes a picture as the bytes of a PNG file."""
    return cv2.imencode(".png", picture)[1].tobytes()


def draw_items(image_bgr, items):
    """Draws Items, given most important first: masks and boxes from large to small, labels of important ones on top."""
    picture, factor = _enlarged(image_bgr)
    items = [item._replace(box_xyxy=np.asarray(item.box_xyxy, np.float64) * factor) for item in items]
    large_first = sorted(items, key=lambda item: -_box_area(item.box_xyxy))
    line = _line_width(*picture.shape[:2])
    for item in large_first:
        if item.mask is not None:
            _draw_mask(picture, item.mask, item.colour, factor=factor, line=line)
    for item in large_first:
        _draw_box(picture, item.box_xyxy, item.colour, line=line)
    _draw_labels(picture, items)
    return picture


def class_colour(label):
    """Returns the BGR colour of a label, 0..255 each; colours repeat after PALETTE_SIZE labels."""
    return _palette()[(label - 1) % PALETTE_SIZE]


@functools.cache
def _palette():
    """Returns PALETTE_SIZE BGR colours, each with the largest CIE Lab distance to all before it.

    The candidates are a grid of colours without greys and very dark or light ones, which are hard to see in
    photographs.
    """
    levels = np.linspace(0, 1, 18, dtype=np.float32)
    bgr = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 1, 3)
    lab = cv2.cvtColor(bgr, cv2.COLOR_BGR2Lab)[:, 0]
    vivid = (lab[:, 0] > 45) & (lab[:, 0] < 90) & (np.hypot(lab[:, 1], lab[:, 2]) > 45)
    bgr, lab = bgr[vivid, 0], lab[vivid]
    picks = [int(np.argmin(np.linalg.norm(lab - FIRST_COLOUR_LAB, axis=1)))]
    distance = np.full(len(lab), np.inf)
    while len(picks) < PALETTE_SIZE:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[picks[-1]], axis=1))
        picks.append(int(np.argmax(distance)))
    return [tuple(int(round(255 * float(value))) for value in bgr[pick]) for pick in picks]


def _enlarged(image_bgr):
    """Returns a copy of the image that is large enough to draw on, and the integer factor of its enlargement."""
    height, width = image_bgr.shape[:2]
    factor = max(1, math.ceil(MIN_LONG_EDGE / max(height, width)))
    if factor == 1:
        return image_bgr.copy(), 1
    return cv2.resize(image_bgr, (width * factor, height * factor), interpolation=cv2.INTER_CUBIC), factor


def _font_size(height, width):
    """Returns the height of the letters in pixels, a fixed part of the picture: it looks the same in any viewer."""
    return max(MIN_FONT_SIZE, round(0.024 * math.sqrt(height * width)))


def _line_width(height, width):
    return max(1, round(0.0036 * math.sqrt(height * width)))


def _box_area(box):
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _draw_mask(picture, mask, colour, *, factor, line):
    """Tints the mask's pixels and draws its outline; processes only the mask's bounding rectangle, to save time."""
    mask = np.asarray(mask, np.uint8)
    x, y, width, height = cv2.boundingRect(mask)
    if width == 0:
        return
    mask = mask[y : y + height, x : x + width]
    if factor > 1:  # smooths the stairs of the small image's outlines
        soft = cv2.resize(mask * np.uint8(255), None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
        mask = (soft > 127).astype(np.uint8)
    region = picture[y * factor : (y + height) * factor, x * factor : (x + width) * factor]
    cover = np.count_nonzero(mask) / (picture.shape[0] * picture.shape[1])
    opacity = MASK_OPACITY + (WIDE_MASK_OPACITY - MASK_OPACITY) * cover
    tint = cv2.addWeighted(region, 1 - opacity, np.full_like(region, colour), opacity, 0)
    np.copyto(region, tint, where=mask[:, :, np.newaxis] > 0)
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    offset = (x * factor, y * factor)
    for ink, thickness in _strokes(colour, line):
        cv2.drawContours(picture, contours, -1, ink, thickness, cv2.LINE_AA, offset=offset)


def _draw_box(picture, box, colour, *, line):
    x1, y1, x2, y2 = (int(round(value)) for value in box)
    # The last pixel of a box that ends at x2 in continuous coordinates is x2 - 1.
    for ink, thickness in _strokes(colour, line):
        cv2.rectangle(picture, (x1, y1), (max(x1, x2 - 1), max(y1, y2 - 1)), ink, thickness)


def _strokes(colour, line):
    """Returns (colour, width) of the two strokes of a line; the dark rim separates it from ground of its own colour."""
    return (INK, line + max(2, line // 2)), (colour, line)


def _draw_labels(picture, items):
    height, width = picture.shape[:2]
    size = _font_size(height, width)
    if len(items) > CROWDED:
        size = max(MIN_FONT_SIZE, round(0.85 * size))
    placed = []
    for item in items:
        patch = _label_patch(item.text, item.colour, size, width)
        small = [other.box_xyxy for other in items if _box_area(other.box_xyxy) < 2 * patch.shape[0] * patch.shape[1]]
        places = [place for place, _ in placed]
        placed.append((_free_place(item.box_xyxy, patch.shape, (height, width), labels=places, objects=small), patch))
    for (x1, y1, x2, y2), patch in reversed(placed):
        picture[y1:y2, x1:x2] = patch[: y2 - y1, : x2 - x1]


def _free_place(box, patch_shape, picture_shape, *, labels, objects):
    """Returns the place of a box's label, x1 y1 x2 y2 in whole pixels inside the picture.

    Of the candidates it is the one that hides least of the labels placed before and of the objects as small as a label.
    """

    def hidden(place):
        return sum(_overlap(place, other) for other in labels) + 0.3 * sum(_overlap(place, other) for other in objects)

    return min(
        (_moved_inside(x, y, patch_shape, picture_shape) for x, y in _label_corners(box, patch_shape)), key=hidden
    )


def _label_corners(box, patch_shape):
    """Returns top-left corners for a box's label, best first: above, inside at the top, below, inside at the bottom."""
    x1, y1, x2, y2 = (int(round(value)) for value in box)
    height, width = patch_shape[:2]
    rows = (y1 - height, y1, y2, y2 - height)
    if y1 < height:  # no room above: moved inside, the label would equal the second choice
        rows = rows[1:]
    middle = (x1 + x2 - width) // 2
    return [(x, y) for y in rows for x in (x1, x2 - width, middle)]


def _moved_inside(x, y, patch_shape, picture_shape):
    height, width = (min(a, b) for a, b in zip(patch_shape, picture_shape, strict=False))
    x = min(max(x, 0), picture_shape[1] - width)
    y = min(max(y, 0), picture_shape[0] - height)
    return x, y, x + width, y + height


def _overlap(a, b):
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _label_patch(text, colour, size, max_width):
    """Returns a uint8 BGR patch with the text on the class's colour; shortens a text wider than the picture."""
    font = _font(size)
    pad = max(2, size // 4)
    while len(text) > 2 and font.getlength(text) + 2 * pad > max_width:
        text = text[:-2].rstrip() + "\u2026"
    dark_text = 0.114 * colour[0] + 0.587 * colour[1] + 0.299 * colour[2] > 105
    return _text_patch(text, font, pad, INK if dark_text else PAPER, colour)


def _text_patch(text, font, pad, ink, ground):
    ascent, descent = font.getmetrics()
    shape = (math.ceil(font.getlength(text)) + 2 * pad, ascent + descent + pad // 2)
    patch = Image.new("RGB", shape, ground)  # BGR in, BGR out: Pillow does not interpret the channels
    ImageDraw.Draw(patch).text((pad, pad // 4), text, ink, font=font)
    return np.asarray(patch)


@functools.lru_cache(maxsize=16)
def _font(size):
    return ImageFont.load_default(size)


def _scaled_to_height(picture, height):
    if picture.shape[0] == height:
        return picture
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def _with_title(picture, title, size):
    bar = np.full((2 * size, picture.shape[1], 3), PAPER, np.uint8)
    patch = _label_patch(title, PAPER, size, picture.shape[1])[: bar.shape[0], : bar.shape[1]]
    top = (bar.shape[0] - patch.shape[0]) // 2
    bar[top : top + patch.shape[0], : patch.shape[1]] = patch
    return np.vstack([bar, picture])


def has_display():
    """Returns whether a window can be opened.

    A separate process tries it, because the window library ends the process if the display does not answer.
    """
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    code = "import cv2; cv2.namedWindow('probe', cv2.WINDOW_NORMAL); cv2.destroyAllWindows()"
    try:
        probe = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20)
    except subprocess.TimeoutExpired:
        return False
    return probe.returncode == 0


def show(pictures):
    """Shows (title, picture) pairs in a window: any key shows the next; q, Esc or closing the window ends the show."""
    os.environ.setdefault("QT_LOGGING_RULES", "default.warning=false")  # Qt warns of fonts that are not needed
    for title, picture in pictures:
        window = f"{title}  (any key: next, q: quit)"
        cv2.namedWindow(window, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
        cv2.imshow(window, picture)
        height, width = picture.shape[:2]
        scale = min(1.0, 1200 / width, 800 / height)
        cv2.resizeWindow(window, max(1, int(width * scale)), max(1, int(height * scale)))
        key = _wait_for_key(window)
        cv2.destroyAllWindows()
        if key in (None, ord("q"), 27):
            return


def _wait_for_key(window):
    """Returns the key's code, or None if the window was closed."""
    while True:
        key = cv2.waitKey(50)
        if key != -1:
            return key & 0xFF
        if cv2.getWindowProperty(window, cv2.WND_PROP_VISIBLE) < 1:
            return None
