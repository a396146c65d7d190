"""Training examples, against what is painted in their images."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from painted import (
    ARROW,
    TRIANGLE,
    fingerprint,
    make_record,
    make_records,
    mask_iou,
    split_off_augmentation,
    stream,
    take,
    tight_box,
    unpack,
)

from common import boxes as np_boxes
from common.rle import encode_rle, segmentation_to_mask
from dataset.augment import Augmentation, ExampleMaker, TrainingTask, View, jitter_color


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("images"))


def test_polygons_drawn_in_part_equal_polygons_drawn_in_full():
    rng = np.random.default_rng(0)
    height, width = 83, 101
    view = View(height, width)
    wrong = []
    for _ in range(300):
        # Whole numbers, so that shifting them is exact. Many reach outside.
        polygons = [rng.integers(0, 50, (5, 2)) + rng.integers(-40, 90, 2) for _ in range(2)]
        mask = segmentation_to_mask(polygons, height, width)
        packed = view.draw_masks([polygons])[0]
        assert packed.shape == (height, 13)
        wrong.append((unpack(packed, width) != mask).sum())
    # pycocotools rounds where an edge passes exactly between two pixels, one way or the other.
    assert max(wrong) <= 2 and sum(wrong) <= 5


def test_masks_come_without_polygons_too():
    view = View(10, 13)
    assert view.draw_masks([None, []]).shape == (2, 10, 2)
    assert not view.draw_masks([None, []]).any()
    assert view.draw_masks([]).shape == (0, 10, 2)


# ------------------------------------------------------------------------------------------------- training examples


def seen_twice(record, **changes):
    """The same image as it is and mirrored: two positions of its stream, told apart by the painted picture."""
    augmentation, others = split_off_augmentation({"short_edge": 75, "max_size": 400, **changes})
    maker = ExampleMaker(augmentation, **{"with_masks": True, "seed": 0, **others})
    examples = {}
    for position in range(50):
        example = maker(TrainingTask(record, position))
        # The background grows brighter to the right.
        examples[bool(example["image"][0, 0, 2] > example["image"][0, -1, 2])] = example
    assert set(examples) == {True, False}
    return examples[False], examples[True]


def test_boxes_and_masks_follow_the_painted_objects(tmp_path):
    record = make_record(tmp_path, 1, 60, 90, [TRIANGLE, ARROW])
    for example, mirrored in zip(seen_twice(record), (False, True)):
        assert example["image"].shape == (75, 113, 3)  # 112.5 rounds up: the two factors differ
        masks = unpack(example["gt_masks"], 113)
        for index, mask in enumerate(masks):
            painted = example["image"][..., index] > 150
            assert mask_iou(mask, painted) > 0.94
            np.testing.assert_allclose(example["gt_boxes"][index], tight_box(painted), atol=1.5)
        expected = np.array(TRIANGLE, float) * [113 / 90, 75 / 60]
        expected[:, 0] = 113 - expected[:, 0] if mirrored else expected[:, 0]
        np.testing.assert_allclose(
            example["gt_boxes"][0], np.concatenate([expected.min(axis=0), expected.max(axis=0)]), rtol=1e-5
        )
        assert example["gt_boxes"].dtype == np.float32
        np.testing.assert_array_equal(example["gt_labels"], [1, 2])


def test_mirrored_example_is_the_mirror_image(tmp_path):
    plain, mirrored = seen_twice(make_record(tmp_path, 1, 60, 90, [TRIANGLE, ARROW]))
    np.testing.assert_allclose(mirrored["image"].astype(int), plain["image"][:, ::-1], atol=1)
    for mask, expected in zip(unpack(mirrored["gt_masks"], 113), unpack(plain["gt_masks"], 113)[..., ::-1]):
        assert mask_iou(mask, expected) > 0.95
    np.testing.assert_allclose(mirrored["gt_boxes"][:, [2, 0]], 113 - plain["gt_boxes"][:, [0, 2]], rtol=1e-5)


def test_run_length_encoded_masks_equal_polygons(tmp_path):
    rles = [encode_rle(segmentation_to_mask([np.array(p)], 60, 90)) for p in (TRIANGLE, ARROW)]
    polygons = make_record(tmp_path, 1, 60, 90, [TRIANGLE, ARROW])
    encoded = make_record(tmp_path, 1, 60, 90, [TRIANGLE, ARROW], segmentations=rles)
    for a, b in zip(seen_twice(polygons), seen_twice(encoded)):
        for mask_a, mask_b in zip(unpack(a["gt_masks"], 113), unpack(b["gt_masks"], 113)):
            assert mask_iou(mask_a, mask_b) > 0.94


@pytest.mark.parametrize("mirrored", [False, True])
def test_polygons_are_drawn_as_pycocotools_draws_them_on_the_whole_example(mirrored):
    """Pixel by pixel, also thin ones, on borders and beyond them: nothing of the outline is left out."""
    rng = np.random.default_rng(3)
    view = View(
        70, 100, scale_x=-1.3 if mirrored else 1.3, shift_x=104.0 if mirrored else -4.0, scale_y=0.9, shift_y=3.0
    )
    polygons = [(rng.uniform(-10, 90, (n, 2)) * rng.choice([0.1, 0.5, 1])).round(2) for n in (3, 4, 5, 8) * 30]
    polygons += [
        np.array([[x, y], [x + 0.7, y], [x + 0.7, y + 30], [x, y + 30]]) for x in (7.6, 8.0, 8.4) for y in (0, 9.5)
    ]
    drawn = unpack(view.draw_masks([[polygon] for polygon in polygons]), 100)
    for polygon, mask in zip(polygons, drawn):
        points = polygon * (view.scale_x, view.scale_y) + (view.shift_x, view.shift_y)
        whole = segmentation_to_mask([points], 70, 100)
        np.testing.assert_array_equal(mask, whole)
    assert sum(mask.any() for mask in drawn) > 60


def test_half_of_the_images_are_mirrored(tmp_path):
    record = make_record(tmp_path, 1, 40, 60)
    images = [batch["image"][0] for batch in take(stream([record]), 400)]
    mirrored = sum(int(image[0, 0, 0]) > int(image[0, 80, 0]) for image in images)
    assert 160 < mirrored < 240  # four standard deviations


@pytest.mark.parametrize(
    ("short_edge", "expected"),
    [(64, {64}), ([64], {64}), ((60, 64), {60, 61, 62, 63, 64}), ((40, 50, 70), {40, 50, 70})],
)
def test_short_edges_are_one_size_or_a_range_or_choices(records, short_edge, expected):
    batches = take(stream(records[:1], short_edge=short_edge, max_size=500), 80)
    counts = Counter(int(batch["image_shape"].min()) for batch in batches)
    assert set(counts) == expected
    assert min(counts.values()) > 80 / len(expected) / 4


def test_crowd_regions_stay_as_boxes_without_a_mask(tmp_path):
    record = make_record(tmp_path, 1, 60, 90, [TRIANGLE, ARROW], crowd=[0])
    (batch,) = take(stream([record]), 1)
    np.testing.assert_array_equal(batch["gt_labels"], [[-1, 2]])
    assert batch["gt_boxes"][0, 0].any()
    assert not batch["gt_masks"][0, 0].any() and batch["gt_masks"][0, 1].any()


def test_objects_that_vanish_when_resized_are_left_out(tmp_path):
    speck = [[10, 10], [13, 10], [13, 13]]
    record = make_record(tmp_path, 1, 600, 900, [speck, [[0, 0], [400, 0], [400, 500]]])
    (batch,) = take(stream([record], short_edge=60), 1)
    np.testing.assert_array_equal(batch["gt_labels"], [[2]])
    (batch,) = take(stream([record], short_edge=600, max_size=2000), 1)
    np.testing.assert_array_equal(batch["gt_labels"], [[1, 2]])


@pytest.mark.parametrize(("height", "width"), [(1, 200), (200, 1), (1, 1)])
def test_lines_and_single_pixels(tmp_path, height, width):
    record = make_record(tmp_path, 1, height, width, [[[0, 0], [width, 0], [width, height], [0, height]]])
    (batch,) = take(stream([record], with_masks=False), 1)
    assert batch["image_shape"].min() >= 32
    np.testing.assert_allclose(batch["gt_boxes"][0, 0, 2:], batch["image_shape"][0, ::-1], rtol=1e-5)


# ----------------------------------------------------------------------------------------------------- augmentation


def crops(record, count, *, crop_size=64, crop_scale=(0.5, 2.0), with_masks=True, seed=0):
    augmentation = Augmentation(64, 96, crop_size=crop_size, crop_scale=crop_scale)
    maker = ExampleMaker(augmentation, with_masks=with_masks, seed=seed)
    return [maker(TrainingTask(record, position)) for position in range(count)]


def test_crops_are_as_large_as_asked_and_scaled_at_random(tmp_path):
    record = make_record(tmp_path, 1, 60, 90, [TRIANGLE])
    shapes = [example["image"].shape[:2] for example in crops(record, 300)]
    assert max(max(shape) for shape in shapes) == 64
    # Long edges from 32 to 128, evenly: two thirds are cut to 64; the short edges are two thirds as long.
    assert 0.57 < np.mean([shape[1] == 64 for shape in shapes]) < 0.77
    assert min(shape[1] for shape in shapes) < 36
    for height, width in shapes:
        assert width == 64 or abs(height - max(32, width * 2 / 3)) <= 1
    fixed = {example["image"].shape[:2] for example in crops(record, 20, crop_scale=(1.0, 1.0))}
    assert fixed == {(43, 64)}
    # Nothing is smaller than a cell of the coarsest feature map.
    small = {example["image"].shape[:2] for example in crops(record, 20, crop_scale=(0.1, 0.3))}
    assert small == {(32, 32)}


def test_boxes_and_masks_follow_the_objects_into_the_crop(tmp_path):
    """The objects are painted: what is white in a channel of the example is what is left of one."""
    record = make_record(tmp_path, 1, 60, 90, [TRIANGLE, ARROW])
    cut, left_out = 0, 0
    for example in crops(record, 200, crop_scale=(1.0, 2.0)):
        width = example["image"].shape[1]
        labels = example["gt_labels"].tolist()
        left_out += 2 - len(labels)
        for label in (1, 2):
            painted = example["image"][..., label - 1] > 150
            if label not in labels:
                assert painted.sum() < 40
                continue
            slot = labels.index(label)
            mask = unpack(example["gt_masks"], width)[slot]
            assert mask_iou(mask, painted) > 0.85 or painted.sum() < 60
            box = example["gt_boxes"][slot]
            # Not as tight around what is white: a triangle has thin tips.
            assert np_boxes.pairwise_iou([box], [tight_box(painted)])[0, 0] > 0.8 or painted.sum() < 100
            cut += box.max() == 64 or box.min() == 0
        assert len(example["gt_boxes"]) == len(example["gt_masks"]) == len(labels)
    assert cut > 60 and left_out > 3


def test_a_cut_box_is_the_box_of_the_mask_where_that_is_tighter(tmp_path):
    """By hand: of an L, the crop may hold only the foot or only the stem."""
    corner = [[0, 0], [10, 0], [10, 80], [80, 80], [80, 90], [0, 90]]
    record = make_record(tmp_path, 1, 90, 90, [corner])
    for with_masks in (True, False):
        widths = set()
        for example in crops(record, 60, crop_size=45, crop_scale=(2.0, 2.0), with_masks=with_masks):
            assert ("gt_masks" in example) == with_masks
            for box in example["gt_boxes"]:
                widths.add(round(float(box[2] - box[0])))
                white = tight_box(example["image"][..., 0] > 150)
                np.testing.assert_allclose(box, white, atol=1)
        # The stem alone is at most 10 wide; clipping its box would have left up to 45.
        assert min(widths) <= 10 and max(widths) == 45
    # Without a mask to look at, the box is clipped.
    boxes_only = dataclasses.replace(record, segmentations=(None,))
    clipped = crops(boxes_only, 60, crop_size=45, crop_scale=(2.0, 2.0), with_masks=False)
    assert min(example["gt_boxes"][0, 2] - example["gt_boxes"][0, 0] for example in clipped) > 10


def test_boxes_that_are_not_cut_stay_as_annotated(tmp_path):
    """Also where the annotator was generous."""
    loose = np.array([[2, 2, 60, 58]], np.float32)
    record = dataclasses.replace(make_record(tmp_path, 1, 60, 90, [TRIANGLE]), boxes_xyxy=loose)
    for example in crops(record, 20, crop_size=90, crop_scale=(1.0, 1.0)):
        box = example["gt_boxes"][0]
        np.testing.assert_allclose([box[1], box[3], box[2] - box[0]], [2, 58, 58], atol=1e-4)


def test_run_length_encoded_masks_are_cropped_like_polygons(tmp_path):
    rles = [encode_rle(segmentation_to_mask([np.array(p)], 60, 90)) for p in (TRIANGLE, ARROW)]
    polygons = crops(make_record(tmp_path, 1, 60, 90, [TRIANGLE, ARROW]), 60)
    encoded = crops(make_record(tmp_path, 1, 60, 90, [TRIANGLE, ARROW], segmentations=rles), 60)
    ious = []
    for one, other in zip(polygons, encoded):
        np.testing.assert_array_equal(one["image"], other["image"])
        of_label = dict(zip(other["gt_labels"].tolist(), other["gt_masks"]))
        for label, mask in zip(one["gt_labels"].tolist(), one["gt_masks"]):
            if np.unpackbits(mask).sum() > 60 and label in of_label:
                ious.append(mask_iou(np.unpackbits(mask), np.unpackbits(of_label[label])))
    assert len(ious) > 60 and min(ious) > 0.8 and np.mean(ious) > 0.94


def test_colour_jitter_by_definition():
    rng = np.random.default_rng(0)
    image = rng.integers(60, 180, (20, 30, 3), dtype=np.uint8)

    class Fixed:
        """Draws the ends of the ranges: the factors 1.2, 0.7 and 1.5."""

        def __init__(self):
            self._draws = iter([1.0, -1.0, 1.0])

        def uniform(self, low, high):
            return next(self._draws)

    changed = jitter_color(image, (0.2, 0.3, 0.5), Fixed())
    grey = image @ [0.114, 0.587, 0.299]
    bright = image * 1.2
    mean = grey.mean() * 1.2
    expected = (bright - mean) * 0.7 + mean
    own_grey = (expected @ [0.114, 0.587, 0.299])[..., None]
    expected = np.clip((expected - own_grey) * 1.5 + own_grey, 0, 255)
    np.testing.assert_allclose(changed, expected, atol=2)
    assert changed.dtype == np.uint8
    np.testing.assert_allclose(jitter_color(image, (0.0, 0.0, 0.0), rng), image, atol=1)


def test_colour_jitter_changes_colours_only(tmp_path):
    record = make_record(tmp_path, 1, 60, 90, [TRIANGLE])
    (plain,), (coloured,), (again,) = (
        take(stream([record], color_jitter=jitter), 1) for jitter in ((0.0,) * 3, (0.4,) * 3, (0.4,) * 3)
    )
    assert fingerprint([coloured]) == fingerprint([again])
    for name in set(plain) - {"image"}:
        np.testing.assert_array_equal(plain[name], coloured[name])
    assert np.abs(plain["image"].astype(int) - coloured["image"]).mean() > 1
