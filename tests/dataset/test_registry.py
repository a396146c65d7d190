"""Data sets by name and by file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from coco_files import annotation, categories, coco_json, image

import dataset
from dataset import DatasetError, get_dataset, get_datasets
from dataset.registry import DATASETS

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------------------------------ files by name


def write_set(folder, name, content):
    (folder / "images").mkdir(exist_ok=True)
    for entry in content["images"]:
        (folder / "images" / entry["file_name"]).touch()
    (folder / f"{name}.json").write_text(json.dumps(content))
    return f"{folder / name}.json:{folder / 'images'}"


def test_a_json_and_its_images_are_a_data_set(tmp_path, monkeypatch):
    path = write_set(tmp_path, "a train", coco_json())
    data = get_dataset(path, "/nowhere")
    assert (data.name, data.annotation_file) == ("a train", str(tmp_path / "a train.json"))
    assert [record.image_id for record in data.records(training=False)] == [5, 9]
    monkeypatch.chdir(tmp_path)
    assert get_dataset("a train.json:images").class_names == data.class_names
    monkeypatch.setenv("HOME", str(tmp_path))
    assert get_dataset("~/a train.json:~/images").class_names == data.class_names
    with pytest.raises(DatasetError, match=r"other: no annotation file .*other\.json"):
        get_dataset("other.json:images")
    with pytest.raises(DatasetError, match="a train: no image directory elsewhere"):
        get_dataset("a train.json:elsewhere")
    with pytest.raises(DatasetError, match=r"ANNOTATIONS\.json:IMAGE_DIR"):
        get_dataset("a train.json")


def test_a_file_that_is_named_twice_is_read_once(tmp_path):
    path = write_set(tmp_path, "a", coco_json())
    first, other, again = get_datasets([path, write_set(tmp_path, "b", coco_json()), path])
    assert first is again and first is not other


def test_names_for_files_are_short_and_differ(tmp_path):
    names = ["coco_val2017", "x/val.json:i", "y/val.json:i", "x/val.json:i", "val.v2.json:j", "z/val.json:i"]
    expected = ["coco_val2017", "val", "val-2", "val", "val.v2", "val-3"]
    assert dataset.short_names(names) == expected
    (tmp_path / "other").mkdir()
    paths = [write_set(folder, "val", coco_json()) for folder in (tmp_path, tmp_path / "other")]
    assert [data.name for data in get_datasets(paths)] == ["val", "val-2"]


def test_data_sets_must_agree_on_their_classes(tmp_path):
    def agree(*names):
        content = coco_json(categories=categories(*names), annotations=[])
        return get_datasets([write_set(tmp_path, "a", coco_json()), write_set(tmp_path, "b", content)])

    # Other ids in the same order are the same classes; results have each file's own.
    first, second = agree("ant", "cat", "owl")
    assert (first.category_ids, second.category_ids) == ((0, 7, 90), (0, 1, 2))
    for names, difference in (
        (("cat", "ant", "owl"), r"their ids put them in another order \(class 1 is cat, not ant\)"),
        (("ant", "cat"), "owl missing$"),
        (("ant", "cat", "dog", "elk", "owl"), "dog, elk added"),
        (("ant", "cat", "dog"), "owl missing; dog added"),
        (("ant", "cat", "owl", "owl"), "4, not 3 classes"),
    ):
        with pytest.raises(DatasetError, match=f"^the classes of b are not those of a: {difference}"):
            agree(*names)


def test_the_problems_of_all_data_sets_come_together(tmp_path):
    good = write_set(tmp_path, "good", coco_json())
    broken = write_set(tmp_path, "broken", coco_json(annotations=[annotation(bbox=None)]))
    other = write_set(tmp_path, "other", coco_json(categories=categories("dog"), annotations=[]))
    with pytest.raises(DatasetError) as error:
        get_datasets([good, broken, "gone.json:images", other])
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    for line, part in zip(lines, ("broken.json: annotation id 1 (in", "gone: no annotation file", "classes of other")):
        assert part.split(" (in")[0] in line


# ------------------------------------------------------------------------------------------------------------ registry


@pytest.mark.parametrize(
    ("name", "annotation_file", "image_dir"),
    [
        ("coco_train2017", "instances_train2017.json", "train2017"),
        ("coco_val2017", "instances_val2017.json", "val2017"),
        ("coco_val2017_100", "instances_val2017.json", "val2017"),
        ("coco_train2014", "instances_train2014.json", "train2014"),
        ("coco_val2014", "instances_val2014.json", "val2014"),
        ("coco_minival2014", "instances_minival2014.json", "val2014"),
        ("coco_valminusminival2014", "instances_valminusminival2014.json", "val2014"),
        ("shapes_train", "instances_shapes_train.json", "shapes_train"),
        ("shapes_val", "instances_shapes_val.json", "shapes_val"),
    ],
)
def test_standard_names(tmp_path, name, annotation_file, image_dir):
    (tmp_path / "annotations").mkdir()
    (tmp_path / image_dir).mkdir()
    images = [image(i) for i in range(150, 0, -1)]
    (tmp_path / "annotations" / annotation_file).write_text(json.dumps(coco_json(images=images)))
    for entry in images:
        (tmp_path / image_dir / entry["file_name"]).touch()
    data = get_dataset(name, str(tmp_path))
    records = data.records(training=False)
    assert data.name == name
    assert data.annotation_file == str(tmp_path / "annotations" / annotation_file)
    assert [r.image_id for r in records] == list(data.image_ids) == list(range(1, (100 if "100" in name else 150) + 1))
    assert records[0].path == str(tmp_path / image_dir / "1.jpg")


def test_missing_files_are_named_with_what_is_expected(tmp_path):
    with pytest.raises(DatasetError, match="coco_val2017: no directory .*nowhere.*DATA.BASEDIR"):
        get_dataset("coco_val2017", tmp_path / "nowhere")
    expected = r"must hold annotations/instances_val2017\.json and val2017/"
    with pytest.raises(DatasetError, match=rf"no annotation file .*instances_val2017\.json\. .*{expected}"):
        get_dataset("coco_val2017", tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{}")
    with pytest.raises(DatasetError, match=rf"no image directory .*val2017\. .*{expected}"):
        get_dataset("coco_val2017", tmp_path)
    with pytest.raises(DatasetError, match=r"python -m dataset\.shapes"):
        get_dataset("shapes_train", tmp_path)


def test_unknown_names_are_refused_with_near_ones(tmp_path):
    with pytest.raises(DatasetError, match=r"no data set 'coco_tran2017' \(near: coco_train2017"):
        get_dataset("coco_tran2017", tmp_path)
    with pytest.raises(DatasetError, match="known: .*shapes_train"):
        get_dataset("zzz", tmp_path)


def test_data_sets_can_be_registered_once(make, tmp_path, monkeypatch):
    monkeypatch.delitem(DATASETS, "mine", raising=False)  # and again at the end
    made = make()
    dataset.register("mine", lambda basedir: made if basedir == tmp_path else None)
    assert get_dataset("mine", str(tmp_path)) is made
    with pytest.raises(DatasetError, match="data set 'mine' is registered already"):
        dataset.register("mine", lambda basedir: None)


def test_importing_the_package_imports_no_tensorflow():
    code = "import sys, dataset, dataset.shapes; assert not {'tensorflow', 'tensorpack'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
