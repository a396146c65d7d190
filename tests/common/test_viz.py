"""Pictures: what must be on them and what must not, at every size, and a window on a virtual display."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from virtual_display import VirtualDisplay, needs_display, shows

from common import viz
from config import UserError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("disc", "box")
PAINT = (10, 200, 30)


def detections(boxes_xyxy, *, scores=None, labels=None, masks=None):
    count = len(boxes_xyxy)
    return SimpleNamespace(
        boxes_xyxy=np.array(boxes_xyxy, np.float32).reshape(-1, 4),
        scores=np.full(count, 0.9, np.float32) if scores is None else np.array(scores, np.float32),
        labels=np.ones(count, int) if labels is None else np.array(labels),
        masks=masks,
    )


def draw(image, found):
    return viz.draw_detections(image, found, NAMES, score_threshold=0.5)


def grey_image(height, width):
    return np.full((height, width, 3), 100, np.uint8)


# ---------------------------------------------------------------- detections


def test_box_lines_are_at_the_box_in_the_colour_of_the_class():
    picture = draw(grey_image(600, 800), detections([[200, 100, 600, 500]], labels=[2]))
    for row, column in ((100, 550), (499, 300), (300, 200), (300, 599)):
        assert tuple(picture[row, column]) == viz.class_colour(2)
    assert (picture[150:450, 250:550] == 100).all()  # the inside is left alone
    assert (picture[520:] == 100).all()
    assert (picture[:, :180] == 100).all()


def test_box_of_the_whole_image_has_all_four_lines_inside():
    picture = draw(grey_image(600, 800), detections([[0, 0, 800, 600]]))
    for row, column in ((599, 400), (300, 0), (300, 799)):
        assert tuple(picture[row, column]) == viz.class_colour(1)


def test_mask_is_tinted_inside_and_nowhere_else():
    mask = np.zeros((600, 800), bool)
    mask[200:400, 300:500] = True
    mask[300:380, 380:460] = False
    picture = draw(grey_image(600, 800), detections([[250, 150, 550, 450]], masks=mask[np.newaxis]))
    opacity = viz.MASK_OPACITY + (viz.WIDE_MASK_OPACITY - viz.MASK_OPACITY) * mask.sum() / mask.size
    expected = (1 - opacity) * 100 + opacity * np.array(viz.class_colour(1))
    np.testing.assert_allclose(picture[220:280, 320:480], np.broadcast_to(expected, (60, 160, 3)), atol=1)
    assert (picture[310:370, 390:450] == 100).all()  # the hole
    assert (picture[165:190, 265:535] == 100).all()  # between mask and box
    assert tuple(picture[300, 300]) == viz.class_colour(1)  # the outline


def test_score_threshold():
    image = grey_image(600, 800)
    weak = detections([[200, 100, 600, 500]], scores=[0.49])
    assert (draw(image, weak) == image).all()
    assert (draw(image, detections([[200, 100, 600, 500]], scores=[0.5])) != image).any()


def test_label_tells_class_and_score(monkeypatch):
    monkeypatch.setattr(viz, "draw_items", lambda image, items: items)
    found = detections([[0, 0, 9, 9], [0, 0, 9, 9]], scores=[0.876, 0.5], labels=[2, 1])
    assert [item.text for item in draw(grey_image(10, 10), found)] == ["box 88%", "disc 50%"]


def test_image_is_not_changed_and_small_ones_are_enlarged():
    for height, width in ((75, 100), (600, 800), (2250, 3000)):
        image = grey_image(height, width)
        picture = draw(image, detections([[10, 10, 60, 60]], masks=np.ones((1, height, width), bool)))
        assert (image == 100).all()
        factor = picture.shape[0] / height
        assert picture.shape == (height * factor, width * factor, 3) and factor == int(factor)
        assert factor == 1 if width >= viz.MIN_LONG_EDGE else picture.shape[1] >= viz.MIN_LONG_EDGE


def test_enlarged_picture_has_box_and_mask_at_the_enlarged_place():
    mask = np.zeros((1, 60, 100), bool)
    mask[0, 20:40, 40:70] = True
    picture = draw(grey_image(60, 100), detections([[30, 10, 80, 50]], masks=mask))  # 5 times
    assert tuple(picture[249, 300]) == viz.class_colour(1)  # bottom of the box
    changed = (picture != 100).any(axis=2)
    assert changed[110:190, 210:340].all()  # the mask
    assert not changed[210:240, 160:390].any()  # between mask and box
    assert not changed[60:, :140].any()  # left of the box


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 7), (480, 20)])
def test_any_size_and_boxes_beyond_the_image(shape):
    image = grey_image(*shape)
    masks = np.zeros((3, *shape), bool)
    masks[1:] = True
    found = detections([[0, 0, 1, 1], [-50, -50, 9000, 9000], [3, 3, 3, 3]], masks=masks)
    picture = draw(image, found)
    assert picture.shape[0] % shape[0] == 0
    assert picture.shape[1] % shape[1] == 0


def test_nothing_found_changes_nothing():
    image = grey_image(600, 800)
    assert (draw(image, detections([])) == image).all()


# ---------------------------------------------------------------- labels


def test_label_place_is_inside_and_takes_a_free_one():
    rng = np.random.default_rng(0)
    picture_shape, patch_shape = (400, 500), (20, 90, 3)
    box = np.array([100, 100, 300, 250])
    taken = []
    for _ in range(6):  # as many labels as one box has places without overlap
        place = viz._free_place(box, patch_shape, picture_shape, labels=taken, objects=[])
        assert all(viz._overlap(place, other) == 0 for other in taken)
        taken.append(place)
    assert taken[0] == (100, 80, 190, 100)  # the first choice: above the corner
    for _ in range(200):
        x1, y1 = rng.uniform(-100, 600, 2)
        box = np.array([x1, y1, x1 + rng.uniform(0, 400), y1 + rng.uniform(0, 400)])
        left, top, right, bottom = viz._free_place(box, patch_shape, picture_shape, labels=taken, objects=[])
        assert left >= 0 and right == left + 90 and right <= 500
        assert top >= 0 and bottom == top + 20 and bottom <= 400


def test_label_avoids_a_small_object():
    box = np.array([100, 100, 300, 250])
    small = np.array([105, 82, 125, 98])
    place = viz._free_place(box, (20, 90, 3), (400, 500), labels=[], objects=[small])
    assert viz._overlap(place, small) == 0


def test_label_grows_with_the_picture_and_fits_into_it():
    for height, width in ((375, 500), (640, 480), (3000, 4000)):
        patch = viz._label_patch("person 99%", PAINT, viz._font_size(height, width), width)
        assert 0.02 < patch.shape[0] / np.sqrt(height * width) < 0.06
    for width in (40, 100, 200):
        patch = viz._label_patch("an extraordinarily long class name 100%", PAINT, 14, width)
        assert patch.shape[1] <= width


def test_crowded_picture_has_smaller_letters(monkeypatch):
    sizes = []
    original = viz._label_patch
    monkeypatch.setattr(viz, "_label_patch", lambda *args: sizes.append(args[2]) or original(*args))
    many = [[x, y, x + 90, y + 90] for x, y in itertools.product(range(0, 800, 100), range(0, 600, 100))]
    draw(grey_image(600, 800), detections(many))
    draw(grey_image(600, 800), detections(many[:3]))
    assert len(set(sizes[: len(many)])) == 1
    assert sizes[0] < sizes[-1]


def test_text_is_dark_on_light_and_light_on_dark():
    for colour, is_dark in (((255, 255, 255), True), ((0, 230, 255), True), ((120, 0, 0), False)):
        patch = viz._label_patch("HHHH", colour, 30, 500).astype(int)
        extreme = patch.min() if is_dark else patch.min(axis=2).max()
        assert extreme <= 40 if is_dark else extreme >= 240


def test_colours_are_distinct():
    colours = [viz.class_colour(label) for label in range(1, 81)]
    assert len(set(colours)) == 80
    lab = cv2.cvtColor(np.float32([colours]) / 255, cv2.COLOR_BGR2Lab)[0]
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1000 * np.eye(80)
    # Around 2 is the least that an eye can tell, side by side.
    assert distances.min() > 8
    assert distances[:16, :16].min() > 30


# ---------------------------------------------------------------- ground truth, pairs, files


def record():
    return SimpleNamespace(
        boxes_xyxy=np.float32([[100, 100, 300, 300], [400, 100, 700, 500]]),
        labels=np.array([1, 2]),
        is_crowd=np.array([False, True]),
        segmentations=([np.float32([[100, 100], [300, 100], [300, 300], [100, 300]])], None),
    )


def test_ground_truth_has_names_masks_and_crowds(monkeypatch):
    image = grey_image(600, 800)
    picture = viz.draw_ground_truth(image, record(), NAMES)
    assert (picture[150:250, 150:250] != 100).any(axis=2).all()  # filled
    assert (picture[150:450, 450:650] == 100).all()  # no mask
    assert tuple(picture[499, 550]) == viz.class_colour(2)
    monkeypatch.setattr(viz, "draw_items", lambda image, items: items)
    assert [item.text for item in viz.draw_ground_truth(image, record(), NAMES)] == ["disc", "box (crowd)"]


def test_boxes_alone():
    boxes_and_colours = [([100, 100, 300, 300], PAINT), ([100, 100, 300, 200], (0, 0, 255))]
    picture = viz.draw_boxes(grey_image(500, 600), boxes_and_colours)
    assert tuple(picture[250, 100]) == PAINT and tuple(picture[100, 200]) == (0, 0, 255)
    assert (picture[320:] == 100).all() and (picture[210:290, 110:290] == 100).all()


def test_side_by_side():
    left, right = np.full((100, 200, 3), 50, np.uint8), np.full((50, 80, 3), 150, np.uint8)
    picture = viz.side_by_side(left, right, ("found", "truth"))
    bar = picture.shape[0] - 100
    assert bar > 10
    assert (picture[bar:, :200] == 50).all()
    assert (picture[bar:, -160:] == 150).all()  # scaled from 80 wide to 160
    assert (picture[bar:, 200:-160] == 255).all()
    assert picture[:bar, :100].min() < 100  # title
    assert picture[:bar, -160:-80].min() < 100


def test_save_picture_never_overwrites(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    paths = [viz.save_picture(picture + np.uint8(number), tmp_path / "new" / "a.b.png") for number in range(3)]
    assert [path.name for path in paths] == ["a.b.png", "a.b-1.png", "a.b-2.png"]
    for number, path in enumerate(paths):
        assert (cv2.imread(str(path)) == picture + np.uint8(number)).all()


def test_save_picture_names_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/a.png"):
        viz.save_picture(grey_image(3, 3), tmp_path / "file" / "a.png")


# ---------------------------------------------------------------- window


@pytest.mark.parametrize("display", [None, ":4711"])
def test_no_window_without_a_display(monkeypatch, display):
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    if display:
        monkeypatch.setenv("DISPLAY", display)
    assert viz.has_display() is False


SHOW = """
import numpy as np
from common import viz
assert viz.has_display()
paint = lambda height, width, colour: np.full((height, width, 3), colour, np.uint8)
viz.show([("one", paint(300, 400, (0, 0, 255))), ("two", paint(2000, 3000, (0, 255, 0))), ("three", paint(9, 9, 0))])
"""


@pytest.mark.slow
@needs_display
def test_window_shows_pictures_until_q(tmp_path):
    with VirtualDisplay(tmp_path) as display:
        environment = {**os.environ, "DISPLAY": display.name}
        environment.pop("QT_QPA_PLATFORM", None)
        process = subprocess.Popen([sys.executable, "-c", SHOW], cwd=ROOT, env=environment)
        try:
            assert display.wait_for(process, shows((0, 0, 255), pixels=300 * 400), remap="one")
            fitted = shows((0, 255, 0), pixels=0.99 * 1200 * 800)
            assert display.wait_for(process, fitted, press=("one", "space"), remap="two")
            assert not shows((0, 255, 0), pixels=1201 * 801)(display.screen())
            display.wait_for(process, lambda screen: False, press=("two", "q"))
            assert process.wait(0) == 0
        finally:
            process.kill()
