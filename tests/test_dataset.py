"""Data sets: reading COCO's format, refusing what cannot be used, and the generated shapes."""

import contextlib
import gc
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO

import boxes
import dataset
from dataset import CocoDataset, DatasetError, TooManyDropped, get_dataset, get_datasets, shapes

ROOT = Path(__file__).resolve().parent.parent
COCO_TINY = Path(os.environ.get("RCNN_COCO_TINY", ROOT.parent / "shared" / "coco_tiny"))
needs_coco_tiny = pytest.mark.skipif(not COCO_TINY.is_dir(), reason="no coco_tiny; set RCNN_COCO_TINY to its directory")

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


def annotation(**changes):
    """A valid annotation: a square of 20 x 20 at (10, 10)."""
    default = {"id": 1, "image_id": 5, "category_id": 7, "iscrowd": 0, "area": 400, "bbox": [10, 10, 20, 20]}
    return {**default, "segmentation": [SQUARE], **changes}


def image(image_id, **changes):
    return {"id": image_id, "file_name": f"{image_id}.jpg", "height": 40, "width": 60, **changes}


def coco_json(**changes):
    """A valid file: sparse and unordered category ids, two images, one object. No `info`."""
    categories = [{"id": 90, "name": "owl"}, {"id": 0, "name": "ant"}, {"id": 7, "name": "cat"}]
    content = {"images": [image(9), image(5)], "annotations": [annotation()], "categories": categories}
    return {**content, **changes}


@pytest.fixture
def make(tmp_path):
    """Write a json (content, or its text) and empty image files, and open it."""

    def write_and_open(content=None, *, files=("5.jpg", "9.jpg"), **options):
        text = content if isinstance(content, str) else json.dumps(coco_json() if content is None else content)
        (tmp_path / "some.json").write_text(text)
        (tmp_path / "images").mkdir(exist_ok=True)
        for name in files:
            (tmp_path / "images" / name).touch()
        return CocoDataset("some", tmp_path / "some.json", tmp_path / "images", **options)

    return write_and_open


def with_annotations(*annotations):
    numbered = [{**a, "id": number} for number, a in enumerate(annotations, start=1)]
    return coco_json(annotations=numbered)


# ------------------------------------------------------------------------------------------------------------ records


def test_classes_come_from_the_file_in_the_order_of_their_ids(make):
    data = make(with_annotations(*(annotation(category_id=c) for c in (7, 90, 0))))
    assert (data.class_names, data.category_ids) == (("ant", "cat", "owl"), (0, 7, 90))
    assert data.records(training=False)[0].labels.tolist() == [2, 3, 1]


def test_a_record_holds_what_the_file_says(make, tmp_path):
    first, second = make().records(training=False)
    assert (first.image_id, first.height, first.width, first.path) == (5, 40, 60, str(tmp_path / "images" / "5.jpg"))
    np.testing.assert_array_equal(first.boxes_xyxy, [[10, 10, 30, 30]])
    np.testing.assert_array_equal(first.segmentations[0], [np.reshape(SQUARE, (4, 2))])
    assert (first.boxes_xyxy.dtype, first.labels.dtype, first.is_crowd.dtype) == (np.float32, np.int64, bool)
    assert first.segmentations[0][0].dtype == np.float32
    assert (second.image_id, second.boxes_xyxy.shape, second.labels.shape, second.segmentations) == (
        9,
        (0, 4),
        (0,),
        (),
    )
    assert (second.boxes_xyxy.dtype, second.labels.dtype, second.is_crowd.dtype) == (np.float32, np.int64, bool)


def test_records_are_frozen_and_travel_to_other_processes(make):
    record = make().records(training=False)[0]
    with pytest.raises(AttributeError):
        record.path = "other"
    copy = pickle.loads(pickle.dumps(record))
    np.testing.assert_array_equal(copy.boxes_xyxy, record.boxes_xyxy)
    assert len(repr(record)) < 200, "messages with a record in them must stay readable"


def test_boxes_are_clipped_to_the_image(make):
    data = make(with_annotations(annotation(bbox=[-5, 30, 100, 100])))
    np.testing.assert_array_equal(data.records(training=False)[0].boxes_xyxy, [[0, 30, 60, 40]])


def test_area_iscrowd_and_info_may_be_missing(make):
    content = with_annotations(annotation())
    for key in ("area", "iscrowd"):
        del content["annotations"][0][key]
    (record,) = make(content).records(training=True)
    assert record.is_crowd.tolist() == [False]


def test_annotation_id_zero_is_an_id(make):
    assert len(make(coco_json(annotations=[annotation(id=0)])).records(training=True)) == 1


def test_crowd_regions_of_every_encoding(make):
    mask = np.zeros((40, 60), np.uint8)
    mask[3:20, 5:50] = 1
    compressed = boxes.encode_rle(mask)
    runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(mask.T.ravel())) + 1, [mask.size]])).tolist()
    kinds = [{"size": [40, 60], "counts": runs}, compressed]
    data = make(with_annotations(annotation(), *(annotation(iscrowd=1, segmentation=s) for s in kinds)))
    (record,) = data.records(training=True)
    assert record.is_crowd.tolist() == [False, True, True]
    for segmentation in record.segmentations[1:]:
        assert (segmentation["size"], type(segmentation["counts"])) == ([40, 60], bytes)
        np.testing.assert_array_equal(mask_util.decode(segmentation), mask)


def test_objects_that_cannot_be_learned_are_left_out_of_training_only(make, caplog):
    caplog.set_level("INFO")
    rle = boxes.encode_rle(np.ones((40, 60)))
    bad = [
        annotation(area=1),
        annotation(area=0),
        annotation(ignore=1),
        annotation(bbox=[60, 5, 9, 9]),
        annotation(bbox=[-9, 5, 9, 9]),
        annotation(bbox=[10, 10, 0, 5]),
        annotation(bbox=[10, 10, -3, 5]),
        annotation(segmentation=[]),
        annotation(segmentation=[[1, 1, 5, 5]]),
        annotation(segmentation=[[1, 1, 5, 5, 9, 9, 9]]),
    ]
    good = [annotation(area=2), annotation(ignore=0), annotation(segmentation=[[1, 1, 5, 5], SQUARE])]
    good += [annotation(segmentation=rle), annotation(iscrowd=1, segmentation=[])]
    data = make(with_annotations(*bad, *good))
    assert len(data.records(training=False)[0].labels) == len(bad + good)
    (record,) = data.records(training=True)
    assert [None if s is None else len(s) for s in record.segmentations] == [1, 1, 1, 2, None]
    assert record.boxes_xyxy.shape == (5, 4)
    assert record.labels.shape == record.is_crowd.shape == (5,)
    # Marked as `ignore` is no fault.
    assert "9 objects of 15 left out of training" in caplog.text
    for line in ("area <= 1: 2", "outside the image: 2", "height 0: 1", "below 0: 1", "no usable polygon: 3"):
        assert line in caplog.text
    assert "annotation id 6: width or height 0, bbox [10, 10, 0, 5] (in 5.jpg)" in caplog.text
    assert len(data.records(training=True, masks=False)[0].labels) == len(good) + 3


def test_missing_area_counts_as_the_boxs(make):
    small, large = annotation(bbox=[10, 10, 0.5, 2]), annotation(bbox=[10, 10, 1.5, 2])
    data = make(with_annotations(*({k: v for k, v in a.items() if k != "area"} for a in (small, large))))
    np.testing.assert_array_equal(data.records(training=True)[0].boxes_xyxy, [[10, 10, 11.5, 12]])


def test_images_without_objects(make):
    crowd = annotation(image_id=9, iscrowd=1, segmentation=boxes.encode_rle(np.ones((40, 60))))
    content = with_annotations(annotation(), crowd)
    content["images"].append(image(11))
    data = make(content, files=("5.jpg", "9.jpg", "11.jpg"))
    assert [r.image_id for r in data.records(training=True)] == [5]
    assert [r.image_id for r in data.records(training=True, filter_empty=False)] == [5, 9, 11]
    assert [r.image_id for r in data.records(training=False)] == [5, 9, 11]


def test_nothing_left_to_train_on_is_refused(make):
    data = make(with_annotations(annotation(area=0)))
    with pytest.raises(DatasetError, match=r"some\.json: no image with an object"):
        data.records(training=True)


def test_objects_without_segmentation_need_training_without_masks(make):
    content = with_annotations(annotation(), annotation(), annotation(segmentation=None))
    del content["annotations"][1]["segmentation"]
    data = make(content)
    with pytest.raises(DatasetError, match=r"2 annotations without segmentation \(the first: id 2\).*MODE_MASK=False"):
        data.records(training=True)
    assert len(data.records(training=True, masks=False)[0].labels) == 3
    assert data.records(training=False)[0].segmentations[1:] == (None, None)


def test_crowd_regions_need_no_segmentation(make):
    (record,) = make(with_annotations(annotation(), annotation(iscrowd=1, segmentation=None))).records(training=True)
    assert record.segmentations[1] is None


def test_only_the_first_images_by_id(make):
    data = make(max_images=1, files=("5.jpg",))
    assert data.image_ids == (5,)
    assert [r.image_id for r in data.records(training=False)] == [5]
    assert make().image_ids == (5, 9)


def test_files_in_subdirectories_and_with_unusual_names(make, tmp_path):
    (tmp_path / "images" / "a" / "b").mkdir(parents=True)
    (tmp_path / "images" / "a" / "b" / "ü 1.jpg").touch()
    record = make(coco_json(images=[image(5, file_name="a/b/ü 1.jpg")])).records(training=False)[0]
    assert Path(record.path) == tmp_path / "images" / "a" / "b" / "ü 1.jpg"


def test_cycle_collector_is_left_as_it_was(make):
    assert gc.isenabled()
    make()
    assert gc.isenabled()
    gc.disable()
    try:
        make()
        assert not gc.isenabled()
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------------------ refusals

NO_BBOX = {key: value for key, value in annotation().items() if key != "bbox"}
RLE = {"size": [40, 60], "counts": [2400]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "the top level is a list"),
        ('{"images": [', "not valid JSON"),
        ("", "not valid JSON"),
        ("\x00\xff", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"images": [' + "9" * 1_000_000 + "]}", "not valid JSON"),
        ('{"images": [], "annotations": []}', 'no key "categories"'),
        ('{"categories": [], "annotations": []}', 'no key "images"'),
        ('{"categories": [], "images": []}', 'no key "annotations"'),
        ('{"categories": {}, "images": [], "annotations": []}', 'no list "categories"'),
        ('{"categories": [], "images": [1], "annotations": []}', 'the list "categories" is empty'),
        ('{"categories": [1], "images": [], "annotations": []}', 'the list "images" is empty'),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_json_that_is_not_coco(make, text, message):
    with pytest.raises(DatasetError) as error:
        make(text)
    assert message in str(error.value)
    assert "some.json: " in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (coco_json(categories=[{"id": 7}]), r"categories\[0\] must have"),
        (coco_json(categories=[{"id": 7, "name": "a"}, {"id": "8", "name": "b"}]), r"categories\[1\] must have"),
        (coco_json(categories=[{"id": 7, "name": "a"}] * 2), "category id 7 occurs twice"),
        (coco_json(images=[image(5), "x"]), r"images\[1\] must have"),
        (coco_json(images=[image(5), image(5, file_name="9.jpg")]), "image id 5 occurs twice"),
        (coco_json(images=[image(5), image(9, file_name="5.jpg")]), "file_name 5.jpg occurs twice"),
        (coco_json(images=[image(5, file_name=None)]), r"\(id 5\) has no file_name"),
        (coco_json(images=[image(5, height=0)]), r"\(id 5\) has no usable height and width: 0, 60"),
        (coco_json(images=[image(5, width="60")]), r"\(id 5\) has no usable height and width"),
        (coco_json(images=[image(5, height=10**9, width=10**9)]), r"\(id 5\) has no usable height and width"),
        (coco_json(annotations=[[]]), r"annotation \[0\] must have"),
        (coco_json(annotations=[annotation(id=None)]), r"annotation \[0\] must have"),
        (coco_json(annotations=[annotation(), annotation()]), "annotation id 1 occurs twice"),
        (coco_json(annotations=[annotation(image_id=6)]), "annotation id 1 has an unknown image_id: 6"),
        (coco_json(annotations=[annotation(image_id=[])]), "annotation id 1 has an unknown image_id"),
        (coco_json(annotations=[annotation(category_id=8)]), "annotation id 1 has an unknown category_id: 8"),
        (coco_json(annotations=[annotation(category_id=False)]), "annotation id 1 has an unknown category_id: False"),
        (coco_json(annotations=[annotation(category_id=[])]), "annotation id 1 has an unknown category_id"),
        (coco_json(annotations=[NO_BBOX]), "annotation id 1 must have a bbox"),
        (coco_json(annotations=[annotation(bbox=[1, 2, 3])]), "annotation id 1 must have a bbox"),
        (coco_json(annotations=[annotation(bbox=[1, 2, 3, "4"])]), "annotation id 1 must have a bbox"),
        (coco_json(annotations=[annotation(bbox=[1, 2, 3, 10**400])]), "annotation id 1 must have a bbox"),
        (coco_json(annotations=[annotation(area="big")]), "annotation id 1 has an area"),
        (coco_json(annotations=[annotation(iscrowd="0")]), "annotation id 1 has an iscrowd"),
        (coco_json(annotations=[annotation(segmentation="x")]), "annotation id 1 has a broken segmentation"),
        (
            coco_json(annotations=[annotation(segmentation=SQUARE)]),
            "1 has a broken segmentation: a polygon is not a list",
        ),
        (
            coco_json(annotations=[annotation(segmentation=[["1"] * 6])]),
            "1 has a broken segmentation: a polygon is not",
        ),
        (
            coco_json(annotations=[annotation(segmentation=[[[1, 2], [3]]])]),
            "1 has a broken segmentation: a polygon is not",
        ),
        (
            coco_json(annotations=[annotation(segmentation=[[[1, 2], [3, 4], [5, 0]]])]),
            "broken segmentation: a polygon is",
        ),
        (coco_json(annotations=[annotation(segmentation=[[1, 2, 3, 4, 5, 1e35]])]), "not finite"),
        (
            coco_json(annotations=[annotation(segmentation={**RLE, "size": [60, 40]})]),
            "1 has a broken segmentation: RLE size",
        ),
        (coco_json(annotations=[annotation(segmentation={**RLE, "counts": [2399]})]), "RLE counts add up to 2399"),
        (coco_json(annotations=[annotation(segmentation={**RLE, "counts": "oooooooooooo0"})]), "beyond 32 bits"),
        (coco_json(annotations=[annotation(segmentation={})]), "RLE size None"),
    ],
)
def test_broken_entries_are_refused_by_name(make, content, message):
    with pytest.raises(DatasetError, match=message) as error:
        make(content)
    assert str(error.value).startswith(str(error.value).split("some.json")[0] + "some.json: ")
    assert "\n" not in str(error.value)
    assert "problems" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "-Infinity"])
def test_numbers_beyond_the_floating_range(make, number):
    text = json.dumps(coco_json(annotations=[annotation(bbox=[1, 2, 3, 12345])])).replace("12345", number)
    with pytest.raises(DatasetError, match="annotation id 1 must have a bbox"):
        make(text)
    text = json.dumps(coco_json(annotations=[annotation(segmentation=[[1, 2, 3, 4, 5, 12345]])])).replace(
        "12345", number
    )
    with pytest.raises(DatasetError, match="annotation id 1 has a broken segmentation: .* not finite"):
        make(text)


def test_all_problems_come_in_one_message(make):
    content = with_annotations(
        annotation(category_id=8), annotation(), annotation(bbox=None), annotation(segmentation=RLE)
    )
    content["annotations"][3]["segmentation"] = {**RLE, "counts": [1]}
    content["images"].append(image(11))
    with pytest.raises(DatasetError) as error:
        make(content)
    for part in ("4 problems ", "annotation id 1 ", "annotation id 3 ", "annotation id 4 ", "1 of 3 images missing"):
        assert part in str(error.value)
    assert "annotation id 2 " not in str(error.value)


def test_many_problems_are_counted_and_the_first_named(make):
    with pytest.raises(DatasetError) as error:
        make(with_annotations(*[annotation(category_id=8)] * 1000))
    assert "1000 problems" in str(error.value)
    assert "annotation id 10 " in str(error.value)
    assert "annotation id 11 " not in str(error.value)
    assert "and 990 more" in str(error.value)


def test_missing_images_are_named(make, tmp_path):
    with pytest.raises(DatasetError, match=r"2 of 2 images missing in .*images: 9\.jpg, 5\.jpg|5\.jpg, 9\.jpg"):
        make(files=())
    (tmp_path / "images" / "9.jpg").mkdir()
    with pytest.raises(DatasetError, match=r"1 of 2 images missing in .*images: 9\.jpg$"):
        make(files=("5.jpg",))


@pytest.mark.parametrize("name", ["../5.jpg", "/5.jpg", "a/../../5.jpg", "..", "a\\..\\..\\5.jpg"])
def test_file_names_may_not_leave_the_image_directory(make, tmp_path, name):
    (tmp_path / "5.jpg").touch()
    with pytest.raises(DatasetError, match="1 of 1 image outside .*images: "):
        make(coco_json(images=[image(5, file_name=name)]))


def test_links_may_not_leave_the_image_directory(make, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.jpg").touch()
    make()
    (tmp_path / "images" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    (tmp_path / "images" / "inner.jpg").symlink_to(tmp_path / "images" / "9.jpg")
    (tmp_path / "images" / "directory").symlink_to(tmp_path / "elsewhere")
    for name in ("link.jpg", "directory/1.jpg"):
        with pytest.raises(DatasetError, match=f"outside .*images: {name}"):
            make(coco_json(images=[image(5, file_name=name)]))
    make(coco_json(images=[image(5, file_name="inner.jpg")]))


def test_the_image_directory_may_be_a_link(tmp_path, make):
    make()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    assert len(CocoDataset("x", tmp_path / "some.json", tmp_path / "link").records(training=False)) == 2


# ------------------------------------------------------------------------------------------- what training leaves out


# Each breaks one rule; the image is 60 x 40.
DROPPED = [
    ("width or height below 0", {"bbox": [10, 10, -3, 5]}),
    ("width or height below 0", {"bbox": [10, 10, 3, -5]}),
    ("width or height 0", {"bbox": [10, 10, 0, 5]}),
    ("width or height 0", {"bbox": [10, 10, 5, 0]}),
    ("box outside the image", {"bbox": [60, 5, 9, 9]}),
    ("box outside the image", {"bbox": [-9, 5, 9, 9]}),
    ("box outside the image", {"bbox": [1e29, 5, 9, 9]}),
    ("area <= 1", {"bbox": [10, 10, 0.5, 0.5]}),
    ("area <= 1", {"bbox": [59.5, 10, 9, 1]}),
    ("area <= 1", {"area": 0}),
    ("no usable polygon", {"segmentation": []}),
    ("no usable polygon", {"segmentation": [[]]}),
    ("no usable polygon", {"segmentation": [[1, 1, 5, 5]]}),
    ("no usable polygon", {"segmentation": [[1, 1, 5, 5, 9, 9, 9]]}),
]


@pytest.mark.parametrize(("reason", "change"), DROPPED)
def test_what_cannot_be_learned_is_left_out_counted_and_named(make, caplog, reason, change):
    data = make(with_annotations(annotation(), annotation(**change), annotation()))
    (record,) = data.records(training=True, max_dropped=0.34)
    assert len(record.labels) == 2
    assert f"1 object of 3 left out of training ({reason}: 1):\n  annotation id 2: {reason}, bbox [" in caplog.text
    assert "(in 5.jpg)" in caplog.text
    with pytest.raises(
        TooManyDropped, match=r"some\.json: 1 object of 3 .*\n.*id 2.*\n.*33\.00%.*DATA\.MAX_DROPPED"
    ) as error:
        data.records(training=True, max_dropped=0.33)
    assert error.value.exit_code == 4
    if "polygon" in reason:
        assert len(data.records(training=True, max_dropped=0, masks=False)[0].labels) == 3


def test_the_first_ten_dropped_objects_are_named(make, caplog):
    make(with_annotations(*[annotation(bbox=[0, 0, 0, 0])] * 12, annotation())).records(training=True)
    assert "12 objects of 13" in caplog.text
    assert "annotation id 10:" in caplog.text and "annotation id 11:" not in caplog.text
    assert "and 2 more" in caplog.text


def test_what_is_clipped_or_ignored_is_not_dropped(make, caplog):
    far = [*SQUARE[:4], 1e9, 1e9, *SQUARE[6:]]
    data = make(
        with_annotations(
            annotation(bbox=[-50, -50, 100, 100]), annotation(ignore=1), annotation(segmentation=[far, [1, 2]])
        )
    )
    (record,) = data.records(training=True, max_dropped=0)
    assert len(record.labels) == 2 and not caplog.records
    np.testing.assert_array_equal(record.boxes_xyxy[0], [0, 0, 50, 40])
    # The native code crashes on such coordinates, unless they are cut off.
    mask = boxes.segmentation_to_mask(record.segmentations[1], 40, 60)
    assert mask[10:30, 10:30].any() and not mask[:5].any()


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


def categories(*names):
    return [{"id": number, "name": name} for number, name in enumerate(names)]


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


class TextDataset(CocoDataset):
    """Another format: lines of file name, width, height, class, box."""

    def read_content(self):
        content = {"images": [], "annotations": [], "categories": categories("ant", "cat")}
        for number, line in enumerate(Path(self.source_file).read_text().splitlines()):
            name, width, height, category_id, *bbox = line.split()
            entry = {"id": number, "file_name": name, "width": int(width), "height": int(height)}
            content["images"].append(entry)
            box = [float(value) for value in bbox]
            content["annotations"].append(
                {"id": number, "image_id": number, "category_id": int(category_id), "bbox": box}
            )
        return content


def test_another_format_is_one_method(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "images" / name).touch()
    (tmp_path / "list.txt").write_text("a.jpg 60 40 1 10 10 20 20\nb.jpg 60 40 0 5 5 9 9\n")
    data = TextDataset("lines", tmp_path / "list.txt", tmp_path / "images")
    first, second = data.records(training=True, masks=False)
    assert (first.labels.tolist(), second.labels.tolist()) == ([2], [1])
    np.testing.assert_array_equal(first.boxes_xyxy, [[10, 10, 30, 30]])
    # For the evaluation, the same in COCO's format.
    assert json.loads(Path(data.annotation_file).read_text())["annotations"][1]["bbox"] == [5, 5, 9, 9]
    (tmp_path / "list.txt").write_text("a.jpg 60 40 7 10 10 20 20\n")
    with pytest.raises(DatasetError, match=r"list\.txt: annotation id 0 has an unknown category_id: 7 \(in a\.jpg\)"):
        TextDataset("lines", tmp_path / "list.txt", tmp_path / "images")


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
    monkeypatch.setattr(dataset, "_registry", {})
    made = make()
    dataset.register("mine", lambda basedir: made if basedir == tmp_path else None)
    assert get_dataset("mine", str(tmp_path)) is made
    with pytest.raises(DatasetError, match="mine is registered already"):
        dataset.register("mine", lambda basedir: None)


def test_importing_the_package_imports_no_tensorflow():
    code = "import sys, dataset, dataset.shapes; assert not {'tensorflow', 'tensorpack'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ----------------------------------------------------------------------------------------------------------- real data


def open_with_pycocotools(path):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


@needs_coco_tiny
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_data_equals_pycocotools(split):
    data = get_dataset(f"coco_{split}", COCO_TINY)
    reference = open_with_pycocotools(COCO_TINY / "annotations" / f"instances_{split}.json")
    assert data.category_ids == tuple(sorted(reference.cats))
    assert data.class_names == tuple(reference.cats[i]["name"] for i in sorted(reference.cats))
    assert data.image_ids == tuple(sorted(reference.imgs))
    records = data.records(training=False)
    assert sum(len(record.labels) for record in records) == len(reference.anns)
    for record in records:
        entries = reference.imgToAnns[record.image_id]
        assert [data.category_ids[label - 1] for label in record.labels] == [e["category_id"] for e in entries]
        assert record.is_crowd.tolist() == [bool(e["iscrowd"]) for e in entries]
        for box, segmentation, entry in zip(record.boxes_xyxy, record.segmentations, entries):
            np.testing.assert_allclose(boxes.xyxy_to_xywh(box)[0], entry["bbox"], atol=0.02)
            mask = boxes.segmentation_to_mask(segmentation, record.height, record.width)
            np.testing.assert_array_equal(mask, reference.annToMask(entry))


@needs_coco_tiny
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_data_trains_with_every_image(split):
    data = get_dataset(f"coco_{split}", COCO_TINY)
    records = data.records(training=True)
    assert len(records) == 80
    assert all(boxes.area(record.boxes_xyxy).min() > 0 for record in records)
    assert all(Path(record.path).is_file() for record in records)


# -------------------------------------------------------------------------------------------------------------- shapes

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
    writes, write = [], shapes._write_atomically

    def interrupted(path, content):
        writes.append(path)
        if len(writes) == stage:
            path.with_name(path.name + ".part").write_bytes(content[: len(content) // 2])
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(shapes, "_write_atomically", interrupted)
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
