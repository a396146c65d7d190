"""docs/custom_data.md, run as it stands on a generated data set of two classes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_train import SETTINGS, run

import dataset
from dataset import shapes
from dataset.registry import DATASETS
from evaluation import metrics

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "custom_data.md").read_text()
# Category ids as an annotation tool may choose them; a name that sorts behind the other.
CATEGORIES = {41: "moon", 0: "box"}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def make_data(folder):
    """Two classes, in COCO's format as tools export it: no info, no area, no iscrowd, masks of both kinds."""
    shapes.generate(folder / "shapes", train=10, val=4, size=64, seed=5)
    (folder / "my_data").mkdir()
    images = folder / "my_data" / "images"
    images.mkdir()
    for split in ("train", "val"):
        source = json.loads((folder / "shapes" / "annotations" / f"instances_shapes_{split}.json").read_text())
        for entry in source["images"]:
            name = f"{split} {entry['file_name']}"
            (folder / "shapes" / f"shapes_{split}" / entry["file_name"]).rename(images / name)
            entry["file_name"] = name
        for entry in source["annotations"]:
            entry["category_id"] = (0, 41)[entry["category_id"] % 2]
            del entry["area"], entry["iscrowd"]
        source["categories"] = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
        del source["info"]
        (folder / "my_data" / f"{split}.json").write_text(json.dumps(source))
    return next(images.iterdir())


@pytest.mark.slow
def test_the_page(tmp_path):
    photo = make_data(tmp_path)
    # A detector of other data, with other classes, to start from.
    checkpoint = tmp_path / "checkpoint"
    shapes.generate(tmp_path / "other", train=4, val=1, size=64, seed=1)
    settings = [*SETTINGS, f"DATA.BASEDIR={tmp_path / 'other'}", "TRAIN.LR_SCHEDULE=[1]", "DATA.VAL=[]"]
    result = run("train.py", "--logdir", checkpoint, "--config", *settings)
    assert result.returncode == 0, result.stderr
    small = [setting for setting in SETTINGS if not setting.startswith(("DATA.TRAIN=", "DATA.VAL="))]
    mine = f"""
        TRAIN=my_data/train.json IMAGES=my_data/images VAL=my_data/val.json
        CHECKPOINT={checkpoint} MODEL="{" ".join(small)}"
        SCHEDULE="TRAIN.LR_SCHEDULE=[2] TRAIN.STEPS_PER_EPOCH=4"
        RUN=train_log/my_data PHOTO="{photo}"
    """
    values, *commands = blocks("sh")
    for name in re.findall(r"\$([A-Z]+)", "".join(commands)):
        assert f"{name}=" in values and f"{name}=" in mine
    for entry in ROOT.iterdir():
        if entry.name not in ("docs", ".git", ".venv"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    script = "set -eux\n" + mine + "".join(commands)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    check_doctor(tmp_path, done)
    check_training(tmp_path, done)
    check_results(tmp_path)


def check_doctor(folder, done):
    assert done.stdout.count("clean\n") == 3, "train, val and the copy"
    assert "classes of my_data/val.json: the same" in done.stdout
    assert len(list((folder / "my_data_pages").glob("*.jpg"))) == 10
    fixed, source = (json.loads((folder / name).read_text()) for name in ("my_data_clean.json", "my_data/train.json"))
    assert fixed["images"] == source["images"]
    assert [entry["bbox"] for entry in fixed["annotations"]] == [entry["bbox"] for entry in source["annotations"]]


def check_training(folder, done):
    output = done.stdout + done.stderr
    assert re.search(r"loaded, [1-9]\d* mismatched, 0 absent, 0 unused", output)
    saved = json.loads((folder / "train_log" / "my_data" / "config.json").read_text())["DATA"]
    assert saved["CLASS_NAMES"] == ["BG", "box", "moon"]
    assert (saved["CATEGORY_IDS"], saved["NUM_CATEGORY"]) == ([0, 41], 2)


def check_results(folder):
    results = json.loads((folder / "results.json").read_text())
    truth = json.loads((folder / "my_data" / "val.json").read_text())
    assert {result["category_id"] for result in results} <= set(CATEGORIES) and results
    assert {result["image_id"] for result in results} <= {entry["id"] for entry in truth["images"]}
    (drawn,) = (folder / "my_pictures").glob("*.png")
    assert cv2.imread(str(drawn)) is not None


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("train", "val"), [("train2017", "val2017"), ("val2017", "train2017")])
def test_real_images_train_and_evaluate(train, val, coco_tiny, tmp_path):
    """With everything that augments them, too."""
    names = [f"DATA.TRAIN=coco_{train}", f"DATA.VAL=coco_{val}", f"DATA.BASEDIR={coco_tiny}"]
    more = ["PREPROC.TRAIN_CROP_SIZE=64", "PREPROC.COLOR_JITTER=[0.4,0.4,0.4]", "DATA.REPEAT_THRESHOLD=0.1"]
    more += ["DATA.FILTER_EMPTY_ANNOTATIONS=False", "TRAIN.LR_SCHEDULE=[10]", "TRAIN.STEPS_PER_EPOCH=40"]
    result = run("train.py", "--logdir", tmp_path / "run", "--config", *SETTINGS, *names, *more)
    assert result.returncode == 0, result.stderr
    assert f"coco_{val}-mAP(segm)/IoU=0.5" in json.loads((tmp_path / "run" / "stats.json").read_text())[-1]
    assert "skipped" not in (tmp_path / "run" / "log.log").read_text()


def test_the_worked_example_of_another_format(tmp_path, monkeypatch):
    """The page's class, on the page's kind of file."""
    monkeypatch.delitem(DATASETS, "my_csv_train", raising=False)  # and again at the end
    (source,) = blocks("python")
    exec(compile(source, "docs/custom_data.md", "exec"), {})
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        cv2.imwrite(str(tmp_path / "images" / name), np.zeros((40, 60, 3), np.uint8))
    (tmp_path / "train.csv").write_text("b.jpg,60,40,owl,1,2,30,20\na.jpg,60,40,ant,5,5,9,9\nb.jpg,60,40,ant,0,0,8,8\n")
    made = dataset.get_dataset("my_csv_train", tmp_path)
    assert (made.class_names, made.category_ids) == (("ant", "owl"), (1, 2))
    first, second = made.records(training=True, masks=False)
    assert (Path(first.path).name, first.labels.tolist(), second.labels.tolist()) == ("b.jpg", [2, 1], [1])
    np.testing.assert_array_equal(first.boxes_xyxy, [[1, 2, 31, 22], [0, 0, 8, 8]])
    results = [
        {"image_id": 1, "category_id": 2, "bbox": [1, 2, 30, 20], "score": 1.0},
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 8, 8], "score": 1.0},
        {"image_id": 2, "category_id": 1, "bbox": [5, 5, 9, 9], "score": 1.0},
    ]
    (box,) = metrics.evaluate(made.annotation_file, results, kinds=("bbox",))
    assert box.metrics()["mAP(bbox)/IoU=0.5:0.95"] == 1
    (tmp_path / "train.csv").write_text("b.jpg,60,40,owl,1,2,30,nan\n")
    with pytest.raises(dataset.DatasetError, match=r"train\.csv: annotation id 1 must have a bbox of 4 finite numbers"):
        dataset.get_dataset("my_csv_train", tmp_path)
