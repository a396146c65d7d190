"""Draws charts as PIL images: curves over axes from 0 to 1, small charts in a grid, and matrices of counts.

All drawing is done at SCALE times the size and then reduced, which smooths lines and letters.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SCALE = 2  # of the drawing relative to the finished picture
INK, FAINT, GRID, PAPER = (40, 40, 40), (110, 110, 110), (225, 225, 225), (255, 255, 255)
# From dark to light, distinguishable in grey as well.
SHADES = ((68, 1, 84), (49, 104, 142), (53, 183, 121), (240, 190, 20))
FULL_CELL = (8, 60, 125)
MIN_CELL, MAX_CELL, MATRIX_SIDE = 15, 56, 900  # pixels
MIN_COUNTED_CELL = 26  # smaller cells have no room for numbers
MAX_NAME = 22  # characters


class Curve(NamedTuple):
    """A line of a chart."""

    x: np.ndarray  # float [n], in [0, 1]
    y: np.ndarray  # float [n], in [0, 1]
    colour: tuple[int, int, int]  # RGB, 0..255
    label: str = ""  # for the legend


def shade(place):
    """Returns the RGB colour at a position in [0, 1] from dark to light."""
    position = min(max(place, 0), 1) * (len(SHADES) - 1)
    index = min(int(position), len(SHADES) - 2)
    return tuple(int(round(a + (b - a) * (position - index))) for a, b in zip(SHADES[index], SHADES[index + 1]))


def draw_curves(curves, *, title, x_label="", y_label="", is_small=False):
    """Draws Curves as a PIL image; `is_small` makes it a panel for `arrange`."""
    width, height, letters = (190, 160, 10) if is_small else (860, 640, 15)
    sheet = Sheet(width, height)
    left, top = (24, 20) if is_small else (62, 46)
    legend = 0 if is_small else 210
    box = (left, top, width - legend - 12, height - (18 if is_small else 54))
    sheet.text(title, (left, top / 2), size=letters + (1 if is_small else 3), anchor="lm")
    _draw_axes(sheet, box, step=0.5 if is_small else 0.1, label_step=0.5 if is_small else 0.2, size=letters - 1)
    sheet.text(x_label, ((box[0] + box[2]) / 2, height - 12), size=letters, anchor="mm")
    sheet.text(y_label, (12, (box[1] + box[3]) / 2), size=letters, anchor="mm", is_vertical=True)
    for index, curve in enumerate(curves):
        points = [(box[0] + x * (box[2] - box[0]), box[3] - y * (box[3] - box[1])) for x, y in zip(curve.x, curve.y)]
        sheet.line(points, curve.colour, 1.5 if is_small else 2.5)
        if curve.label:
            y = top + (index + 0.5) * 1.7 * letters
            sheet.line([(box[2] + 18, y), (box[2] + 42, y)], curve.colour, 3)
            sheet.text(curve.label, (box[2] + 50, y), size=letters, anchor="lm")
    return sheet.finish()


def _draw_axes(sheet, box, *, step, label_step, size):
    """Draws a grid with numbers from 0 to 1 along two sides of a box (x1, y1, x2, y2)."""
    x1, y1, x2, y2 = box
    for place in np.arange(0, 1 + step / 2, step):
        x, y = x1 + place * (x2 - x1), y2 - place * (y2 - y1)
        colour = INK if place == 0 else GRID
        sheet.line([(x, y1), (x, y2)], colour, 1)
        sheet.line([(x1, y), (x2, y)], colour, 1)
    for place in np.arange(0, 1 + label_step / 2, label_step):
        x, y = x1 + place * (x2 - x1), y2 - place * (y2 - y1)
        sheet.text(f"{place:.1f}", (x, y2 + 0.8 * size), size=size, anchor="mm", colour=FAINT)
        sheet.text(f"{place:.1f}", (x1 - 0.4 * size, y), size=size, anchor="rm", colour=FAINT)


def arrange(panels, *, title):
    """Arranges panels of equal size in rows below a title: one PIL image."""
    columns = math.ceil(math.sqrt(len(panels) * 1.4))
    rows = math.ceil(len(panels) / columns)
    width, height = panels[0].size
    top = 40
    sheet = Sheet(max(columns * width, text_width(title, 16) + 28), rows * height + top)
    sheet.text(title, (14, top / 2), size=16, anchor="lm")
    picture = sheet.finish()
    for index, panel in enumerate(panels):
        picture.paste(panel, (index % columns * width, top + index // columns * height))
    return picture


def draw_matrix(counts, row_names, column_names, *, title):
    """Draws a matrix of counts [rows, columns] as a PIL image; a cell's colour shows its share of its row."""
    cell = min(max(MATRIX_SIDE // max(counts.shape), MIN_CELL), MAX_CELL)
    size = min(max(10, cell // 3 + 2), 14)
    names = [[_shortened(name) for name in group] for group in (row_names, column_names)]
    margin = 16 + max(text_width(name, size) for group in names for name in group)
    left, top = margin, margin + 36
    width = max(left + counts.shape[1] * cell, text_width(title, 15) + 10) + 16
    sheet = Sheet(width, top + counts.shape[0] * cell + 16)
    sheet.text(title, (10, 18), size=15, anchor="lm")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for row, column in np.ndindex(*counts.shape):
        x, y = left + column * cell, top + row * cell
        share, count = shares[row, column], counts[row, column]
        colour = tuple(int(round(255 + (full - 255) * math.sqrt(share))) for full in FULL_CELL)
        sheet.rectangle((x, y, x + cell, y + cell), colour, GRID)
        if count and cell >= MIN_COUNTED_CELL:
            ink = PAPER if share > 0.25 else INK
            sheet.text(str(count), (x + cell / 2, y + cell / 2), size=size - 1, anchor="mm", colour=ink)
    for row, name in enumerate(names[0]):
        sheet.text(name, (left - 6, top + (row + 0.5) * cell), size=size, anchor="rm")
    for column, name in enumerate(names[1]):
        sheet.text(name, (left + (column + 0.5) * cell, top - 6), size=size, anchor="mb", is_vertical=True)
    return sheet.finish()


def _shortened(name):
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "\u2026"


def text_width(text, size):
    """Returns the width of a text in pixels."""
    return math.ceil(_font(size).getlength(text))


@functools.cache
def _font(size):
    return ImageFont.load_default(size)


class Sheet:
    """A white sheet to draw on, in pixels of the finished picture, fractions included."""

    def __init__(self, width, height):
        self._size = (round(width), round(height))
        self._image = Image.new("RGB", tuple(SCALE * side for side in self._size), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points, colour, width):
        """Draws a line through points (x, y)."""
        scaled = [(SCALE * x, SCALE * y) for x, y in points]
        self._draw.line(scaled, colour, max(1, round(SCALE * width)), joint="curve")

    def rectangle(self, box, colour, outline):
        """Draws a filled rectangle x1 y1 x2 y2."""
        self._draw.rectangle([SCALE * value for value in box], colour, outline)

    def text(self, text, place, *, size, anchor, colour=INK, is_vertical=False):
        """Writes a text, upwards if vertical.

        `anchor`, as in PIL, is the point of the text that lies at `place` (x, y).
        """
        font = _font(SCALE * size)
        x, y = (SCALE * value for value in place)
        if not is_vertical:
            self._draw.text((x, y), text, colour, font=font, anchor=anchor)
            return
        _, top, right, bottom = font.getbbox(text)
        patch = Image.new("RGB", (math.ceil(right), math.ceil(bottom + top)), PAPER)
        ImageDraw.Draw(patch).text((0, 0), text, INK, font=font)
        patch = patch.rotate(90, expand=True)
        upper = y - patch.height if anchor[1] == "b" else y - patch.height / 2
        self._image.paste(patch, (round(x - patch.width / 2), round(upper)))

    def finish(self):
        """Returns the picture, a PIL image."""
        return self._image.resize(self._size, Image.Resampling.LANCZOS)
