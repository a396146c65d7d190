"""What is told of evaluations: tables, reasons, pictures; and ./eval.py as a program."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorpack.utils import logger
from test_metrics import result_for, true_object, write_truth

from config import UserError
from evaluation import charts, metrics, report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(logger, "info", lines.append)
    return lines


def table_and_notes(line):
    """Of what `report.log` writes for one kind: the title, the cells of the row, the lines below."""
    title, _, _, _, row, _, *notes = line.split("\n")
    return title, [cell.strip() for cell in row.strip("│").split("│")], notes


def test_tables(tmp_path, log):
    truth = [true_object(1), true_object(2, box=(100, 100, 50, 50))]
    report.log(metrics.evaluate(write_truth(tmp_path, truth), [result_for(truth[0])]), "tiny")
    assert len(log) == 2
    for line, word, objects in zip(log, ("box", "mask"), ("objects", "objects with a mask")):
        title, cells, notes = table_and_notes(line)
        assert title == f"{word} AP on tiny"
        assert cells == ["0.505", "0.505", "0.505", "1.000", "0.000", "n/a"]  # precision 1 up to recall 0.5: 51 of 101
        assert notes == [
            f"AP medium: 0, no detection reaches an IoU of 0.5 with medium {objects} of its class",
            f"AP large: n/a, the ground truth has no large {objects}",
            "highest F1: 0.667 at scores of 0.500 and above, precision 1.000, recall 0.500 "
            "(IoU 0.5, all classes together)",
        ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (None, "AP, AP50, AP75, AP small: 0, there are no detections"),
        ({"category_id": 2}, "AP, AP50, AP75: 0, no detection has a class with objects"),
        ({"bbox": [18, 10, 20, 20]}, "AP, AP50: 0, no detection reaches an IoU of 0.5 with objects of its"),
        ({"bbox": [12, 10, 20, 20], "segmentation": None}, "AP75: 0, no detection reaches an IoU of 0.75"),
    ],
)
def test_an_ap_of_0_comes_with_its_reason(tmp_path, log, changes, reason):
    """The boxes moved by 8 and by 3 of 20 pixels have IoUs of 12 / 28 = 0.43 and 17 / 23 = 0.74."""
    truth = [true_object(1)]
    results = [] if changes is None else [result_for(truth[0]) | changes]
    if changes and "segmentation" in changes:
        results[0]["bbox"] = [13, 10, 20, 20]
    report.log(metrics.evaluate(write_truth(tmp_path, truth), results, kinds=("bbox",)), "tiny")
    _, cells, notes = table_and_notes(log[0])
    assert "0.000" in cells
    assert any(note.startswith(reason) for note in notes), notes


def test_table_of_classes(tmp_path, log):
    truth = [true_object(1), true_object(2, box=(100, 100, 50, 50))]
    evaluations = metrics.evaluate(write_truth(tmp_path, truth), [result_for(truth[0], 0.7)], kinds=("bbox",))
    report.log(evaluations, "tiny", per_class=True)
    title, _, head, _, *rows = log[1].split("\n")
    assert title.startswith("box AP of classes on tiny")
    cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in (head, *rows[:2])]
    assert cells[0] == list(report.CLASS_HEADERS)
    assert cells[1] == [
        "c1",
        "2",
        "0.505",
        "0.505",
        "0.505",
        "1.000",
        "0.000",
        "n/a",
        "0.700",
        "1.000",
        "0.500",
        "0.667",
    ]
    assert cells[2] == ["c2", "0", *["n/a"] * 10]


def random_evaluations(tmp_path, num_classes):
    """Every class has an object that is found in a third of the cases, or taken for the next class."""
    rng = np.random.default_rng(num_classes)
    ids = range(1, num_classes + 1)
    truth = [true_object(n, box=(10, 10, 40, 40), category_id=n, image_id=n) for n in ids]
    results = [
        result_for({**truth[n], "category_id": 1 + (n + n % 3 // 2) % num_classes}, rng.random())
        for n in range(num_classes)
    ]
    return metrics.evaluate(write_truth(tmp_path, truth, images=ids, categories=ids), results)


def test_report_folder(tmp_path):
    evaluations = random_evaluations(tmp_path, 5)
    report.write(evaluations, tmp_path / "new" / "report")
    names = {path.name for path in (tmp_path / "new" / "report").iterdir()}
    pictures = {
        f"{kind}-{what}.png" for kind in ("box", "mask") for what in ("curves", "curves-of-classes", "confusion")
    }
    assert names == {"metrics.json", *pictures}
    numbers = json.loads((tmp_path / "new" / "report" / "metrics.json").read_text())
    for each in evaluations:
        for name, value in each.metrics().items():
            assert numbers[name] == (None if np.isnan(value) else value)
        assert [row["class"] for row in numbers[f"classes({each.kind})"]] == list(each.class_names)
        assert numbers[f"classes({each.kind})"][0]["AP50"] == each.average_precision("IoU=0.5", 0)
    with pytest.raises(UserError, match="report exists already"):
        report.write(evaluations, tmp_path / "new" / "report")


def test_report_of_nothing(tmp_path):
    (tmp_path / "report").mkdir()  # an empty folder may be filled
    report.write(metrics.evaluate(write_truth(tmp_path, []), [], kinds=("bbox",)), tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"metrics.json", "box-curves.png"}


def pixels(picture):
    return np.asarray(picture).astype(int)


def test_curves_lie_where_their_values_are():
    """A curve at 0.75 in red: its pixels are a quarter of the way down the vertical axis."""
    curve = charts.Curve(np.array([0.0, 1.0]), np.array([0.75, 0.75]), (255, 0, 0))
    picture = pixels(charts.draw_curves([curve], title="t"))
    rows, columns = np.nonzero((picture[:, :, 0] > 200) & (picture[:, :, 1:].max(axis=2) < 80))
    ink = (picture.max(axis=2) < 100).sum(axis=0)
    left = int(np.argmax(ink > 300))  # the vertical axis, drawn in ink
    axis = np.nonzero(picture[:, left].max(axis=1) < 100)[0]
    assert abs(columns.min() - left) <= 2
    assert np.mean(rows) == pytest.approx(axis.min() + 0.25 * (axis.max() - axis.min()), abs=2)


def test_matrix_is_darkest_where_a_row_s_counts_are():
    counts = np.array([[9, 1, 0], [0, 5, 0], [0, 0, 0]])
    picture = pixels(charts.draw_matrix(counts, ["a", "b", "c"], ["a", "b", "missed"], title="t"))
    cell = 56
    corner = picture.shape[1] - 16 - 3 * cell, picture.shape[0] - 16 - 3 * cell  # the margin is 16
    darkness = np.array(
        [[255 - picture[corner[1] + r * cell + 4, corner[0] + c * cell + 4].mean() for c in range(3)] for r in range(3)]
    )
    assert darkness[1, 1] == darkness.max() > darkness[0, 0] > darkness[0, 1] > 20
    assert darkness[0, 2] == darkness[1, 0] == 0 and not darkness[2].any()


@pytest.mark.parametrize("num_classes", [1, 80])
def test_pictures_of_few_and_many_classes_have_a_usable_size(tmp_path, num_classes):
    report.write(random_evaluations(tmp_path, num_classes), tmp_path / "report")
    for path in (tmp_path / "report").glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) >= 150 and max(picture.size) <= 2600, path.name


# ---------------------------------------------------------------- ./eval.py


def run_program(*arguments):
    """./eval.py as users start it: exit code and output."""
    environment = {**os.environ, "PATH": "/usr/bin:/bin"}
    command = [ROOT / "eval.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_program(tmp_path):
    truth = [true_object(1), true_object(2, box=(100, 100, 50, 50), image_id=2)]
    annotations = write_truth(tmp_path, truth)
    (tmp_path / "results.json").write_text(json.dumps([result_for(truth[0])]))
    code, output = run_program(tmp_path / "results.json", annotations, "--per-class", "--report", tmp_path / "report")
    assert code == 0, output
    assert "results in 1 of 2 images: the objects in the others count as missed" in output
    assert output.count("│ 0.505 │  0.505 │  0.505 │") == 4 and output.count("│ c1 ") == 2
    assert (tmp_path / "report" / "mask-confusion.png").exists()


@pytest.mark.slow
def test_program_answers_mistakes_in_one_line(tmp_path):
    annotations = write_truth(tmp_path, [true_object(1)])
    (tmp_path / "results.json").write_text(json.dumps([{"image_id": 1, "category_id": 1, "score": 1}]))
    code, output = run_program(tmp_path / "results.json", annotations)
    message = f"eval.py: {tmp_path / 'results.json'}: the results have neither bbox nor segmentation"
    assert (code, output.splitlines()[-1]) == (2, message)
    assert "Traceback" not in output
