"""Streams of batches: their order, images that cannot be read, and evaluation."""

import dataclasses
import gc
import itertools
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from painted import (
    ARROW,
    TRIANGLE,
    fingerprint,
    make_record,
    make_records,
    stream,
    take,
    tight_box,
    unpack,
)
from processes import children

import data
from common import boxes as np_boxes
from common.errors import DataError
from config import Config
from dataset import DatasetError, get_dataset
from dataset.augment import Augmentation, ExampleMaker, TrainingTask
from dataset.images import check_sizes, resized_shape

ROOT = Path(__file__).resolve().parent.parent
EVALUATION = {"batch_size": 2, "short_edge": 64, "max_size": 128, "multiple": 32}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("images"))


def test_an_image_without_objects_has_one_row_of_padding(tmp_path):
    (batch,) = take(stream([make_record(tmp_path, 1, 40, 60)]), 1)
    assert batch["gt_boxes"].shape == (1, 1, 4) and not batch["gt_boxes"].any()
    assert batch["gt_labels"].tolist() == [[0]]
    assert batch["gt_masks"].shape == (1, 1, 64, 12) and not batch["gt_masks"].any()


@pytest.mark.parametrize(("height", "width", "said"), [(60, 91, "91 x 60"), (90, 60, "60 x 90.*EXIF")])
def test_an_image_of_another_size_than_its_record_is_refused(tmp_path, height, width, said):
    good = make_record(tmp_path, 1, 60, 90)
    bad = dataclasses.replace(good, height=height, width=width)
    with pytest.raises(DataError, match=rf"1\.png: the image is 90 x 60 pixels, but .* {said}"):
        next(iter(stream([bad])))
    with pytest.raises(DataError, match=r"1\.png"):
        next(iter(data.EvaluationData([bad], **EVALUATION)))
    # And before anything starts, from the header.
    with pytest.raises(DatasetError, match=rf"^1 of 2 images .*\n.*1\.png: the image is 90 x 60 pixels, .* {said}"):
        check_sizes([good, bad], max_dropped=0.4)
    check_sizes([good, bad], max_dropped=0.5)
    check_sizes([good], max_dropped=0.0)


# ---------------------------------------------------------------------------------------------------------- batches


def test_a_batch_is_its_examples_padded(tmp_path):
    wide = [make_record(tmp_path, 1, 60, 90, [TRIANGLE]), make_record(tmp_path, 2, 45, 90, [TRIANGLE, ARROW])]
    tasks = [TrainingTask(record, position) for position, record in enumerate(wide, 5)]
    maker = ExampleMaker(Augmentation(short_edge=45, max_size=200), with_masks=True, seed=3)
    # 45 x 68 and 45 x 90: one packs into 9 bytes, the other into 12.
    for multiple, height, width in ((32, 64, 96), (1, 45, 90)):
        examples = [maker(task) for task in tasks]
        batch = data.collate(examples, multiple=multiple)
        types = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
        assert types == {
            "image": ("uint8", (2, height, width, 3)),
            "image_shape": ("int32", (2, 2)),
            "gt_boxes": ("float32", (2, 2, 4)),
            "gt_labels": ("int64", (2, 2)),
            "gt_masks": ("uint8", (2, 2, height, 12)),
            "image_id": ("int64", (2,)),
            "sample_key": ("int32", (2, 2)),
        }
        np.testing.assert_array_equal(batch["image_shape"], [[45, 68], [45, 90]])
        np.testing.assert_array_equal(batch["gt_labels"], [[1, 0], [1, 2]])
        np.testing.assert_array_equal(batch["sample_key"], [[3, 5], [3, 6]])
        np.testing.assert_array_equal(batch["image_id"], [1, 2])
        masks = unpack(batch["gt_masks"], width)
        for slot, example in enumerate(examples):
            image = example["image"]
            np.testing.assert_array_equal(batch["image"][slot, :45, : image.shape[1]], image)
            for index, mask in enumerate(unpack(example["gt_masks"], image.shape[1])):
                np.testing.assert_array_equal(masks[slot, index, :45, : image.shape[1]], mask)
        assert masks.sum() == sum(np.unpackbits(example["gt_masks"]).sum() for example in examples)
        assert not batch["gt_boxes"][0, 1].any() and not masks[0, 1].any()
    assert data.collate(examples[:1], multiple=1)["gt_masks"].shape == (1, 1, 45, 12)  # whole words of 32 pixels


def test_masks_are_absent_when_not_wanted(records):
    (batch,) = take(stream(records, with_masks=False), 1)
    assert "gt_masks" not in batch


# ------------------------------------------------------------------------------------------------------------ order


def planned(records, count, **changes):
    return list(itertools.islice(stream(records, **changes).plan(), count))


def test_every_epoch_visits_every_image_once_in_an_order_of_its_own(records):
    order = [index for ((_, index),) in planned(records, 70)]
    epochs = [tuple(order[start : start + 7]) for start in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 5
    assert order != [index for ((_, index),) in planned(records, 70, seed=8)]
    assert [position for ((position, _),) in planned(records, 70)] == list(range(70))


@pytest.mark.parametrize("num_shards", [2, 3, 10])
def test_shards_share_out_the_positions(records, num_shards):
    whole = dict(itertools.chain(*planned(records, 60)))
    shards = [planned(records, 60 // num_shards, shard_index=i, num_shards=num_shards) for i in range(num_shards)]
    parts = [dict(itertools.chain(*batches)) for batches in shards]
    assert {position: index for part in parts for position, index in part.items()} == whole
    assert all(position % num_shards == shard for shard, part in enumerate(parts) for position in part)


def test_batches_are_wide_or_tall_and_nothing_is_lost(records):
    batches = planned(records, 200, batch_size=3)
    assert all(len(batch) == 3 for batch in batches)
    for batch in batches:
        assert len({records[index].width >= records[index].height for _, index in batch}) == 1
    positions = [position for batch in batches for position, _ in batch]
    assert len(positions) == len(set(positions))
    # Of the kind that did not make the last batch, two may be waiting.
    assert len(set(range(max(positions))) - set(positions)) <= 2
    assert {records[index].width < records[index].height for batch in batches for _, index in batch} == {True, False}


def test_start_passes_over_batches(records):
    whole = take(stream(records, batch_size=2), 12)
    assert fingerprint(take(stream(records, batch_size=2, start=5), 7)) == fingerprint(whole[5:])


def test_an_image_keeps_its_randomness_in_any_batch_and_shard(records):
    """Same position, same example: whatever the batch size and number of shards."""
    settings = {"short_edge": (50, 80)}
    single = {int(b["sample_key"][0, 1]): b for b in take(stream(records, **settings), 30)}
    for batch in take(stream(records, batch_size=2, num_shards=2, shard_index=1, **settings), 5):
        for slot, (_, position) in enumerate(batch["sample_key"].tolist()):
            alone = single[position]
            height, width = alone["image_shape"][0]
            np.testing.assert_array_equal(batch["image_shape"][slot], [height, width])
            np.testing.assert_array_equal(batch["image"][slot, :height, :width], alone["image"][0, :height, :width])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_one_image_is_enough(records, batch_size):
    batches = take(stream(records[:1], batch_size=batch_size), 3)
    assert all(batch["image_id"].tolist() == [11] * batch_size for batch in batches)
    assert len(set(np.concatenate([batch["sample_key"][:, 1] for batch in batches]).tolist())) == 3 * batch_size


def test_no_image_at_all_is_an_error():
    with pytest.raises(DataError, match="no images"):
        stream([])


def test_repeat_factors_by_hand(records):
    """The classes of seven images: {1, 2}, {1}, {}, {1}, {1}, {1}, {}; ARROW alone has label 1."""
    assert [sorted(record.labels.tolist()) for record in records] == [[1, 2], [1], [], [1], [1], [1], []]
    rare, common = np.sqrt(0.9 * 7 / 1), np.sqrt(0.9 * 7 / 5)
    factors = data.repeat_factors(records, 0.9)
    np.testing.assert_allclose(factors, [rare, common, 1, common, common, common, 1])
    np.testing.assert_array_equal(data.repeat_factors(records, 0.1), np.ones(7))
    crowd = dataclasses.replace(records[0], is_crowd=np.array([False, True]))
    assert data.repeat_factors([crowd, *records[1:]], 0.9)[0] == common, "a crowd region shows no object"


def test_rare_classes_come_as_often_as_their_factor_says(records):
    factors = data.repeat_factors(records, 0.9)
    counts = Counter(index for ((_, index),) in planned(records, 5000, repeat_threshold=0.9))
    expected = 5000 * factors / factors.sum()
    np.testing.assert_allclose([counts[index] for index in range(7)], expected, rtol=0.1)
    # Positions stay what they are, for shards and for a resume.
    batches = planned(records, 40, repeat_threshold=0.9)
    assert [position for ((position, _),) in batches] == list(range(40))
    assert planned(records, 20, repeat_threshold=0.9, shard_index=1, num_shards=2) == batches[1::2]
    assert planned(records, 40, repeat_threshold=0.0) == planned(records, 40)


# ------------------------------------------------------------------------------------ workers and unreadable images


@pytest.mark.slow
def test_batches_do_not_depend_on_the_number_of_workers(records):
    before = children()
    runs = [fingerprint(take(stream(records, batch_size=2, short_edge=(50, 90), num_workers=n), 15)) for n in (0, 1, 3)]
    assert len(set(runs)) == 1
    assert fingerprint(take(stream(records, batch_size=2, short_edge=(50, 90), seed=8), 15)) != runs[0]
    assert children() == before


def damaged(record, folder):
    path = folder / Path(record.path).name
    path.write_bytes(Path(record.path).read_bytes()[:60])
    return dataclasses.replace(record, path=str(path))


def test_substitutes_of_one_image_differ_from_position_to_position(tmp_path):
    """By chance, among the nine others of its kind: not one image stands in each time."""
    records = [make_record(tmp_path, number, 40, 60) for number in range(10)]
    partly = [damaged(records[0], make_folder(tmp_path / "bad")), *records[1:]]
    options = {"batch_size": 1, "seed": 3}
    good, found = take(stream(records, **options), 60), take(stream(partly, **options, max_dropped=0.2), 60)
    replaced = [after["image_id"][0] for before, after in zip(good, found) if before["image_id"][0] == 0]
    assert len(replaced) >= 6 and len(set(replaced)) >= 3


def make_folder(path):
    path.mkdir()
    return path


@pytest.mark.slow
def test_an_unreadable_image_is_skipped_and_nothing_else_changes(records, tmp_path, caplog):
    settings = {"batch_size": 2, "short_edge": (50, 90), "seed": 5}
    bad = [12, 17]
    partly = [damaged(record, tmp_path) if record.image_id in bad else record for record in records]
    good = take(stream(records, **settings), 20)
    runs = [take(stream(partly, **settings, max_dropped=0.3, num_workers=n), 20) for n in (0, 2)]
    assert fingerprint(runs[0]) == fingerprint(runs[1])
    replaced, substitutes = 0, set()
    for before, after in zip(good, runs[0]):
        np.testing.assert_array_equal(before["sample_key"], after["sample_key"])
        assert not np.isin(after["image_id"], bad).any()
        replaced += np.isin(before["image_id"], bad).sum()
        substitutes |= set(after["image_id"][np.isin(before["image_id"], bad)].tolist())
        if not np.isin(before["image_id"], bad).any():
            assert fingerprint([before]) == fingerprint([after])
    assert replaced > 2 and len(substitutes) > 1
    # The same after an interruption, whose run does not know what was skipped before.
    for start in (3, 7, 9, 11):
        resumed = take(stream(partly, **settings, max_dropped=0.3, start=start), 20 - start)
        assert fingerprint(resumed) == fingerprint(runs[0][start:])
    warnings = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(warnings) == 12, "one for each stream and image, however often it comes"
    assert all(".png: not readable" in warning for warning in warnings)


def test_too_many_unreadable_images_end_the_stream_by_name(records, tmp_path):
    broken = [damaged(record, tmp_path) if record.image_id in (12, 13) else record for record in records]
    take(stream(broken, max_dropped=2 / 7), 20)
    with pytest.raises(
        DataError, match=r"^2 of 7 images .* DATA\.MAX_DROPPED=0\.2 .*1[23]\.png: not readable"
    ) as error:
        take(stream(broken, max_dropped=0.2), 20)
    assert error.value.exit_code == 4
    everything = [damaged(record, tmp_path) for record in records]
    with pytest.raises(DataError, match="no image can be read"):
        take(stream(everything, max_dropped=1.0), 1)


@pytest.mark.slow
def test_workers_end_with_their_stream(records):
    batches = iter(stream(records, num_workers=2))
    next(batches)
    assert len(children()) == 2
    del batches
    gc.collect()
    assert not children()
    never_used = stream(records, num_workers=1)
    iter(never_used)
    assert len(children()) == 1
    never_used.close()
    assert not children()


@pytest.mark.slow
def test_importing_data_imports_no_framework():
    heavy = "{'tensorflow', 'tensorpack', 'keras', 'torch', 'horovod'}"
    code = f"import sys, data; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("num_threads", [0, 2])
def test_evaluation_visits_every_image_once(records, num_threads):
    seen = []
    for group, batch in data.EvaluationData(records, **EVALUATION, num_threads=num_threads):
        assert set(batch) == {"image", "image_shape"} and len(group) == len(batch["image"]) <= 2
        for record, image, (height, width) in zip(group, batch["image"], batch["image_shape"]):
            seen.append(record.image_id)
            expected = resized_shape(record.height, record.width, short_edge=64, max_size=128)
            assert (height, width) == expected
            resized = cv2.resize(cv2.imread(record.path), (width, height), interpolation=cv2.INTER_LINEAR)
            np.testing.assert_array_equal(image[:height, :width], resized)
            # So that a result does not depend on the images beside it.
            assert image.shape[:2] == (-(-height // 32) * 32, -(-width // 32) * 32)
            assert image.sum() == resized.sum()
    assert sorted(seen) == [record.image_id for record in records]


def test_evaluation_order_is_fixed_and_batches_are_full_where_they_can_be(records):
    groups = [[record.image_id for record in group] for group, _ in data.EvaluationData(records, **EVALUATION)]
    threaded = data.EvaluationData(records, **EVALUATION, num_threads=3)
    assert [[record.image_id for record in group] for group, _ in threaded] == groups
    # Padded: 11, 12, 17 (64 x 90) to 64 x 96; 13 to 96 x 64; 14 to 64 x 64; 15 (61 x 128) to 64 x 128; 16 to 128 x 64.
    assert sorted(groups) == [[11, 12], [13], [14], [15], [16], [17]]


def test_evaluation_may_stop_early_and_raises_what_threads_raise(records, tmp_path):
    threads = threading.active_count()
    results = iter(data.EvaluationData(records, **EVALUATION, num_threads=2))
    next(results)
    results.close()
    assert threading.active_count() == threads
    bad = make_record(tmp_path, 1, 60, 90)
    os.remove(bad.path)
    with pytest.raises(DataError, match=r"1\.png"):
        list(data.EvaluationData([*records, bad], **EVALUATION, num_threads=2))
    for num_threads in (0, 2):
        groups = list(data.EvaluationData([bad, *records], **EVALUATION, max_dropped=0.2, num_threads=num_threads))
        seen = [record.image_id for group, _ in groups for record in group]
        assert sorted(seen) == [record.image_id for record in records]
        assert all(len(group) == len(batch["image"]) == len(batch["image_shape"]) for group, batch in groups)
    assert list(data.EvaluationData([], **EVALUATION)) == []


# ---------------------------------------------------------------------------------------- configuration and real data


def test_settings_come_from_the_configuration(records):
    settings = Config()
    settings.update(["PREPROC.TRAIN_SHORT_EDGE_SIZE=40", "PREPROC.TEST_SHORT_EDGE_SIZE=50", "PREPROC.MAX_SIZE=70"])
    settings.update(["TRAIN.BATCH_SIZE_PER_GPU=2", "TEST.BATCH_SIZE_PER_GPU=3", "DATA.NUM_WORKERS=0", "TRAIN.SEED=5"])
    settings.update(["MODE_MASK=False", "MODE_FPN=False"])
    (batch,) = take(data.training_data(settings, records[:1]), 1)
    assert batch["image"].shape == (2, 40, 60, 3) and "gt_masks" not in batch
    assert batch["sample_key"].tolist() == [[5, 0], [5, 1]]
    ((_, batch),) = data.evaluation_data(settings, records[:2])
    assert batch["image"].shape == (2, 47, 70, 3)
    settings.update(["MODE_FPN=True", "MODE_MASK=True"])
    (batch,) = take(data.training_data(settings, records[:1], start=1, shard_index=1, num_shards=2), 1)
    assert batch["image"].shape == (2, 64, 64, 3) and batch["gt_masks"].shape == (2, 2, 64, 8)
    assert batch["sample_key"].tolist() == [[5, 5], [5, 7]]
    # 70 is rounded up to 96.
    ((_, batch),) = data.evaluation_data(settings, records[:2])
    assert batch["image_shape"].tolist() == [[50, 75], [50, 75]]


def test_coco_for_training(coco_tiny):
    records = get_dataset("coco_train2017", coco_tiny).records(training=True)
    batches = take(stream(records, batch_size=2, short_edge=(160, 200), max_size=320), 60)
    overlaps = []
    for batch in batches:
        masks = unpack(batch["gt_masks"], batch["image"].shape[2])
        assert batch["image"].shape[1] % 32 == batch["image"].shape[2] % 32 == 0
        for slot, (height, width) in enumerate(batch["image_shape"]):
            real = batch["gt_boxes"][slot][batch["gt_labels"][slot] != 0]
            assert (real >= 0).all() and (real[:, 2:] <= [width, height]).all() and (np_boxes.area(real) > 1).all()
            assert not masks[slot, :, height:].any() and not masks[slot, :, :, width:].any()
        for index in np.argwhere(batch["gt_labels"] > 0):
            mask, box = masks[tuple(index)], batch["gt_boxes"][tuple(index)]
            if mask.sum() > 100:
                overlaps.append(np_boxes.pairwise_iou([box], [tight_box(mask)])[0, 0])
    assert len(overlaps) > 200 and np.mean(overlaps) > 0.9 and np.mean(np.array(overlaps) > 0.8) > 0.95
    assert (np.concatenate([batch["gt_labels"].ravel() for batch in batches]) == -1).any()


def test_coco_for_evaluation(coco_tiny):
    records = get_dataset("coco_val2017", coco_tiny).records(training=False)
    batches = list(data.EvaluationData(records, batch_size=4, short_edge=100, max_size=160, multiple=32, num_threads=2))
    assert sorted(record.image_id for group, _ in batches for record in group) == sorted(r.image_id for r in records)
    assert len(batches) < len(records) / 2
