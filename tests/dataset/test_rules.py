"""What is refused in a COCO json, and what training leaves out."""

import json

import numpy as np
import pytest
from coco_files import SQUARE, annotation, coco_json, image, with_annotations

from common.rle import segmentation_to_mask
from dataset import CocoDataset, DatasetError, TooManyDropped

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
    mask = segmentation_to_mask(record.segmentations[1], 40, 60)
    assert mask[10:30, 10:30].any() and not mask[:5].any()
