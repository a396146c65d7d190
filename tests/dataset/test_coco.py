"""Reading COCO's format: records, splits for training, other formats, and real data against pycocotools."""

import gc
import json
import pickle
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from coco_files import SQUARE, annotation, categories, coco_json, image, open_with_pycocotools, with_annotations

from common import boxes as np_boxes
from common.rle import encode_rle, segmentation_to_mask
from dataset import CocoDataset, DatasetError, get_dataset

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
    compressed = encode_rle(mask)
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
    rle = encode_rle(np.ones((40, 60)))
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
    crowd = annotation(image_id=9, iscrowd=1, segmentation=encode_rle(np.ones((40, 60))))
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


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_data_equals_pycocotools(coco_tiny, split):
    data = get_dataset(f"coco_{split}", coco_tiny)
    reference = open_with_pycocotools(coco_tiny / "annotations" / f"instances_{split}.json")
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
            np.testing.assert_allclose(np_boxes.xyxy_to_xywh(box)[0], entry["bbox"], atol=0.02)
            mask = segmentation_to_mask(segmentation, record.height, record.width)
            np.testing.assert_array_equal(mask, reference.annToMask(entry))


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_data_trains_with_every_image(coco_tiny, split):
    data = get_dataset(f"coco_{split}", coco_tiny)
    records = data.records(training=True)
    assert len(records) == 80
    assert all(np_boxes.area(record.boxes_xyxy).min() > 0 for record in records)
    assert all(Path(record.path).is_file() for record in records)
