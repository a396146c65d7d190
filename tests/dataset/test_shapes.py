"""The generated data set."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from coco_files import open_with_pycocotools

from common.files import Whole
from dataset import DatasetError, get_dataset, shapes

ROOT = Path(__file__).resolve().parents[2]


SETTINGS = {"train": 6, "val": 3, "size": 64, "seed": 3}


def files_below(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made_shapes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shapes")
    shapes.generate(directory, **SETTINGS)
    return directory


@pytest.fixture(scope="module")
def drawings():
    """40 drawn images of the size that the demonstration uses: list of (image, shapes)."""
    return [shapes.draw_image(np.random.default_rng([1, number]), 128) for number in range(40)]


def read_annotation(entry, size):
    """The mask that pycocotools makes of an annotation."""
    segmentation = entry["segmentation"]
    rle = segmentation
    if isinstance(segmentation, list):
        rle = mask_util.merge(mask_util.frPyObjects(segmentation, size, size))
    return mask_util.decode(rle)


def test_shapes_are_read_like_coco(made_shapes):
    for name, count in (("shapes_train", 6), ("shapes_val", 3)):
        data = get_dataset(name, made_shapes)
        records = data.records(training=True)
        assert len(records) == count
        assert data.class_names == ("disc", "box", "triangle", "star", "cross")
        assert all(cv2.imread(record.path).shape == (64, 64, 3) for record in records)
        reference = open_with_pycocotools(data.annotation_file)
        assert sum(len(record.labels) for record in records) == len(reference.anns)
        assert min(reference.anns) == 1


def test_same_settings_give_the_same_bytes(made_shapes, tmp_path):
    shapes.generate(tmp_path, **SETTINGS)
    assert files_below(tmp_path) == files_below(made_shapes)
    assert len(files_below(tmp_path)) == 6 + 3 + 2


def test_seeds_and_splits_give_different_images(made_shapes, tmp_path):
    shapes.generate(tmp_path, **{**SETTINGS, "seed": 4})
    images = [content for directory in (made_shapes, tmp_path) for content in files_below(directory).values()]
    assert len(set(images)) == 2 * (6 + 3 + 2)


def test_more_images_keep_the_first_ones(made_shapes, tmp_path):
    shapes.generate(tmp_path, **{**SETTINGS, "train": 7})
    assert files_below(tmp_path)["shapes_train/000006.jpg"] == files_below(made_shapes)["shapes_train/000006.jpg"]


def test_images_hold_one_to_eight_objects_of_all_classes(drawings):
    counts = [len(drawn) for _, drawn in drawings]
    assert (min(counts), max(counts)) == (1, 8)
    assert {shape.label for _, drawn in drawings for shape in drawn} == {0, 1, 2, 3, 4}
    assert all((image.shape, image.dtype) == ((128, 128, 3), np.uint8) for image, _ in drawings)


def test_objects_do_not_share_pixels(drawings):
    for _, drawn in drawings:
        assert sum(shape.visible_fine.astype(int) for shape in drawn).max() <= 1


def test_annotations_cover_what_is_visible(drawings):
    for _, drawn in drawings:
        for shape in drawn:
            entry = shapes.annotate(shape.visible_fine)
            # Half of a pixel or more, counted without OpenCV.
            visible = shape.visible_fine.reshape(128, 4, 128, 4).mean(axis=(1, 3)) >= 0.5
            mask = read_annotation(entry, 128).astype(bool)
            assert (mask & visible).sum() >= 0.95 * (mask | visible).sum()
            assert abs(entry["area"] - visible.sum()) <= 0.05 * visible.sum() + 5
            rows, columns = np.nonzero(visible)
            extent = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            np.testing.assert_allclose(entry["bbox"], extent, atol=2)


def test_a_hole_is_kept_by_an_rle():
    visible_fine = np.zeros((256, 256), bool)
    visible_fine[40:200, 40:200] = True
    assert isinstance(shapes.annotate(visible_fine)["segmentation"], list)
    visible_fine[100:140, 100:140] = False
    entry = shapes.annotate(visible_fine)
    assert isinstance(entry["segmentation"], dict)
    mask = read_annotation(entry, 64)
    assert (mask.sum(), mask[30, 30], entry["area"]) == (40 * 40 - 10 * 10, 0, 1500)


def test_exact_outline_of_a_rectangle():
    visible_fine = np.zeros((256, 256), bool)
    visible_fine[41:200, 42:203] = True
    entry = shapes.annotate(visible_fine)
    assert entry["bbox"] == [10.5, 10.25, 40.25, 39.75]
    assert entry["area"] == 40.25 * 39.75
    (polygon,) = entry["segmentation"]
    assert {tuple(point) for point in np.reshape(polygon, (-1, 2))} == {
        (10.5, 10.25),
        (50.75, 10.25),
        (50.75, 50),
        (10.5, 50),
    }


def test_labels_name_the_shapes(drawings):
    """How much a shape fills of its smallest circle and of its convex hull tells the classes apart: of free ones."""
    star, cross = 10 * np.sin(np.pi / 5) * 0.42 / 2, 8 * 0.31 * 0.95 - 4 * 0.31**2
    by_hand = [(1, 1), (2 / np.pi, 1), (3 * np.sqrt(3) / 4 / np.pi, 1)]
    by_hand += [(star / np.pi, star / (5 * np.sin(2 * np.pi / 5) / 2))]
    by_hand += [(cross / (np.pi * (0.95**2 + 0.31**2)), cross / (1.9**2 - 2 * 0.64**2))]
    seen = set()
    for _, drawn in drawings:
        everything = sum(shape.visible_fine for shape in drawn)
        for shape in drawn:
            grown = cv2.dilate(shape.visible_fine.astype(np.uint8), np.ones((5, 5))).astype(bool)
            others = everything & ~shape.visible_fine
            border = np.ones_like(grown)
            border[1:-1, 1:-1] = False
            if not (grown & (others | border)).any():
                points = np.argwhere(shape.visible_fine).astype(np.float32)
                circle = np.pi * cv2.minEnclosingCircle(points)[1] ** 2
                hull = cv2.contourArea(cv2.convexHull(points))
                fills = shape.visible_fine.sum() / np.array([circle, hull])
                np.testing.assert_allclose(fills, by_hand[shape.label], atol=0.06)
                seen.add(shape.label)
    assert seen == {0, 1, 2, 3, 4}


def test_hidden_objects_are_not_drawn():
    """In a scene that one large disc fills nearly, a second object may not cover more than 60 % of it."""
    owner = np.full((256, 256), -1, np.int8)
    disc = cv2.circle(np.zeros((256, 256), np.uint8), (128, 128), 40, 1, -1).astype(bool)
    owner[disc] = 0
    covered = []
    for seed in range(60):
        placed = shapes._place(np.random.default_rng(seed), 2 * shapes.OUTLINES["disc"], owner, [disc.sum()])
        if placed:
            covered.append((placed[0] & disc).sum() / disc.sum())
    assert 0.3 < max(covered) <= 0.6
    assert min(covered) == 0


def test_objects_are_not_outside_the_image():
    owner = np.full((256, 256), -1, np.int8)
    placed = [shapes._place(np.random.default_rng(i), 5 * shapes.OUTLINES["box"], owner, []) for i in range(100)]
    inside = [mask_fine.sum() / area_fine for mask_fine, area_fine in filter(None, placed)]
    assert 0.4 <= min(inside) < 0.5


def test_objects_stand_out_from_what_is_around():
    rng = np.random.default_rng(0)
    surroundings = np.full((50, 3), (200.0, 40.0, 40.0))
    colours = np.array([shapes._contrasting_colour(rng, surroundings) for _ in range(200)])
    assert np.linalg.norm(colours - surroundings[0], axis=1).min() >= shapes.MIN_CONTRAST
    assert np.ptp(colours, axis=0).min() > 150


def test_where_no_colour_stands_out_the_best_one_tried_is_taken():
    everywhere = np.stack(np.meshgrid(*[np.linspace(0, 255, 6)] * 3), axis=-1).reshape(-1, 3)

    def contrast(colour):
        return np.percentile(np.linalg.norm(everywhere - colour, axis=1), 3)

    rng = np.random.default_rng(0)
    chosen = [contrast(shapes._contrasting_colour(rng, everywhere)) for _ in range(20)]
    anyhow = [contrast(shapes._random_colour(rng, saturation=(0.3, 1), value=(0.25, 1))) for _ in range(200)]
    assert max(anyhow + chosen) < shapes.MIN_CONTRAST
    assert min(chosen) > np.median(anyhow)


def test_an_existing_data_set_is_kept(made_shapes, capsys):
    before = {path: path.stat().st_mtime_ns for path in made_shapes.rglob("*")}
    assert shapes.generate(made_shapes, **SETTINGS) == []
    arguments = [str(made_shapes), "--train", "6", "--val", "3", "--size", "64", "--seed", "3"]
    assert shapes.main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in made_shapes.rglob("*")}


@pytest.mark.parametrize("change", [{"seed": 4}, {"size": 96}, {"train": 5}, {"val": 4}])
def test_a_data_set_of_other_settings_is_not_overwritten(made_shapes, change):
    before = files_below(made_shapes)
    (key, value), old = next(iter(change.items())), SETTINGS[next(iter(change))]
    message = f"{'images' if key in ('train', 'val') else key} {old}, not {value}"
    with pytest.raises(DatasetError, match=message):
        shapes.generate(made_shapes, **{**SETTINGS, **change})
    assert files_below(made_shapes) == before


@pytest.mark.parametrize(
    "path", ["shapes_train/000001.jpg", "shapes_val/note.txt", "annotations/instances_shapes_val.json"]
)
def test_foreign_files_are_not_overwritten(tmp_path, path):
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_text("mine")
    with pytest.raises(DatasetError, match="choose another directory"):
        shapes.generate(tmp_path, **SETTINGS)
    assert files_below(tmp_path) == {path: b"mine"}


@pytest.mark.parametrize("stage", range(1, 14))
def test_an_interrupted_run_is_completed(made_shapes, tmp_path, monkeypatch, stage):
    """The writing stops before each of the 13 files (two markers, nine images, two annotation files) in turn."""
    writes, write = [], shapes.write_whole

    def interrupted(path, content, **options):
        writes.append(path)
        if len(writes) == stage:
            part = Whole(path).part
            part.with_name(part.name.replace(str(os.getpid()), "99999")).write_text("half")  # of a killed process
            raise KeyboardInterrupt
        write(path, content, **options)

    monkeypatch.setattr(shapes, "write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes.generate(tmp_path, **SETTINGS)
    monkeypatch.undo()
    written = shapes.generate(tmp_path, **SETTINGS)
    assert str(tmp_path / "annotations" / "instances_shapes_val.json") in written
    assert files_below(tmp_path) == files_below(made_shapes)


def test_an_interrupted_run_of_other_settings_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "draw_image", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shapes.generate(tmp_path, **SETTINGS)
    monkeypatch.undo()
    with pytest.raises(DatasetError, match="size 64, not 96"):
        shapes.generate(tmp_path, **{**SETTINGS, "size": 96})


def test_a_lost_image_is_drawn_again(made_shapes, tmp_path):
    shapes.generate(tmp_path, **SETTINGS)
    (tmp_path / "shapes_val" / "000002.jpg").unlink()
    assert len(shapes.generate(tmp_path, **SETTINGS)) == 1
    assert files_below(tmp_path) == files_below(made_shapes)


@pytest.mark.slow
def test_command_line(made_shapes, tmp_path):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "dataset.shapes", str(tmp_path)]
    command += ["--train", "6", "--val", "3", "--size", "64", "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "instances_shapes_val.json" in done.stdout
    assert files_below(tmp_path) == files_below(made_shapes)
    refused = subprocess.run([*command, "--seed", "9"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "seed 3, not 9" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("arguments", [["--size", "20"], ["--train", "0"], ["--seed", "-1"], ["--val", "x"]])
def test_command_line_refuses_bad_numbers(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        shapes.main([str(tmp_path), *arguments])
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
