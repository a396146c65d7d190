"""From files to batches: against Pillow, against what is painted in the images, and with workers that fail or die."""

import dataclasses
import gc
import hashlib
import io
import itertools
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from fractions import Fraction
from multiprocessing.connection import wait
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from PIL import Image

import boxes
import data
from config import Config
from dataset import DatasetError, Record, get_dataset

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60  # seconds, for what should take well under one

AUGMENTATION = {"short_edge": 64, "max_size": 128}
SETTINGS = {"batch_size": 1, "multiple": 32, "with_masks": True, "seed": 7}
EVALUATION = {"batch_size": 2, "short_edge": 64, "max_size": 128, "multiple": 32}

# Objects of different shape, none symmetric, in an image 90 wide and 60 high: x, y, ...
TRIANGLE = [[8, 6], [40, 14], [20, 50]]
ARROW = [[50, 30], [84, 30], [84, 56], [70, 44], [50, 52]]


def make_image(path, height, width, polygons=()):
    """A dark gradient, with polygon k painted white in channel k."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:] = np.linspace(0, 60, width)[None, :, None]
    for channel, polygon in enumerate(polygons):
        image[..., channel][boxes.segmentation_to_mask([np.array(polygon)], height, width) > 0] = 255
    assert cv2.imwrite(str(path), image)


def make_record(folder, image_id, height, width, polygons=(), *, crowd=(), segmentations=None):
    path = folder / f"{image_id}.png"
    make_image(path, height, width, polygons)
    corners = [np.concatenate([np.min(polygon, axis=0), np.max(polygon, axis=0)]) for polygon in polygons]
    return Record(
        image_id=image_id,
        path=str(path),
        height=height,
        width=width,
        boxes_xyxy=np.array(corners, np.float32).reshape(-1, 4),
        labels=np.arange(1, len(polygons) + 1, dtype=np.int64),
        is_crowd=np.isin(np.arange(len(polygons)), crowd),
        segmentations=tuple(segmentations or [[np.array(polygon, np.float32)] for polygon in polygons]),
    )


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Seven images: four wide, one square, two tall; with two, one or no objects."""
    folder = tmp_path_factory.mktemp("images")
    sizes = [(60, 90), (60, 90), (90, 60), (64, 64), (48, 100), (120, 50), (50, 70)]
    objects = [[TRIANGLE, ARROW], [ARROW], [], [TRIANGLE], [TRIANGLE], [TRIANGLE], []]
    return [make_record(folder, i, *size, polygons) for i, (size, polygons) in enumerate(zip(sizes, objects), 11)]


def split_off_augmentation(changes):
    """(Augmentation, the other settings)."""
    fields = {name: changes.pop(name) for name in data.Augmentation._fields if name in changes}
    return data.Augmentation(**fields), changes


def stream(records, **changes):
    augmentation, others = split_off_augmentation({**AUGMENTATION, **SETTINGS, **changes})
    return data.TrainingData(records, augmentation=augmentation, **others)


def take(batches, count):
    with_close = iter(batches)
    taken = list(itertools.islice(with_close, count))
    with_close.close()
    return taken


def fingerprint(batches):
    digest = hashlib.sha256()
    for batch in batches:
        for name, array in sorted(batch.items()):
            digest.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def unpack(packed, width):
    return np.unpackbits(packed, axis=-1)[..., :width]


def mask_iou(a, b):
    return np.logical_and(a, b).sum() / np.logical_or(a, b).sum()


def tight_box(mask):
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def children():
    """Living child processes, without multiprocessing's own resource tracker, which ends with the parent."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(child.cmdline())
    ]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# -------------------------------------------------------------------------------------------------------- reading files


def smooth_picture(mode="RGB"):
    """A smooth picture, which lossy formats keep, 48 wide and 32 high."""
    small = np.random.default_rng(3).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(small, (48, 32), interpolation=cv2.INTER_CUBIC)).convert(mode)


def encode(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def load_bytes(folder, content, name="a picture, é"):
    path = folder / name
    path.write_bytes(content)
    return data.load_image(str(path))


@pytest.mark.parametrize(
    ("mode", "kind", "tolerance"),
    [
        ("RGB", "PNG", 0),
        ("RGB", "BMP", 0),
        ("RGB", "JPEG", 6),
        ("L", "PNG", 0),
        ("L", "JPEG", 3),
        ("LA", "PNG", 0),
        ("RGBA", "PNG", 0),
        ("P", "PNG", 0),
        ("1", "PNG", 0),
        ("CMYK", "JPEG", 6),
    ],
)
def test_load_image_gives_the_colours_that_pillow_reads(tmp_path, mode, kind, tolerance):
    content = encode(smooth_picture(mode), kind)
    image = load_bytes(tmp_path, content)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert image.dtype == np.uint8 and image.shape == (32, 48, 3)
    # JPEG decoders may round differently, and interpolate colour in their own way.
    assert np.abs(image[..., ::-1].astype(int) - expected).mean() <= tolerance


@pytest.mark.parametrize("channels", [1, 3])
def test_load_image_keeps_the_high_byte_of_16_bits(tmp_path, channels):
    values = np.random.default_rng(0).integers(0, 2**16, (5, 7, channels), dtype=np.uint16)
    _, content = cv2.imencode(".png", values)
    image = load_bytes(tmp_path, content.tobytes())
    np.testing.assert_allclose(image, np.broadcast_to(values / 257, (5, 7, 3)), atol=1)


# EXIF orientation: what must be done to the stored pixels to see them upright (exif.org, tag 274).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_load_image_applies_the_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    plain = load_bytes(tmp_path, encode(smooth_picture(), "JPEG"))
    image = load_bytes(tmp_path, encode(smooth_picture(), "JPEG", exif=exif))
    np.testing.assert_array_equal(image, UPRIGHT[orientation](plain))


def jpeg_with_thumbnail():
    """The thumbnail in the header has an end marker of its own."""
    content, thumbnail = encode(smooth_picture(), "JPEG"), encode(smooth_picture().resize((12, 8)), "JPEG")
    segment = b"Exif\0\0" + thumbnail
    return content[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + content[2:]


COMPLETE = {
    "JPEG": lambda: encode(smooth_picture(), "JPEG"),
    "progressive JPEG": lambda: encode(smooth_picture(), "JPEG", progressive=True),
    "JPEG with a thumbnail": jpeg_with_thumbnail,
    "JPEG with fill bytes": lambda: encode(smooth_picture(), "JPEG").replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),
    "PNG": lambda: encode(smooth_picture(), "PNG"),
    "BMP": lambda: encode(smooth_picture(), "BMP"),
    "WEBP": lambda: encode(smooth_picture(), "WEBP"),
}


@pytest.mark.parametrize("kind", COMPLETE)
def test_truncated_images_are_refused_and_bytes_after_the_end_are_not(tmp_path, kind):
    content = COMPLETE[kind]()
    assert load_bytes(tmp_path, content + b"appended").shape == (32, 48, 3)
    # Not every OpenCV notices that a JPEG is cut off; data does.
    complaint = "half: the image is cut off" if "JPEG" in kind else "half: not readable"
    for length in (4, *(int(len(content) * share) for share in (0.02, 0.3, 0.6, 0.95)), len(content) - 1):
        with pytest.raises(data.ImageError, match=complaint):
            load_bytes(tmp_path, content[:length], name="half")


def test_what_is_no_image_is_refused_by_name(tmp_path):
    for name, content in (
        ("empty.jpg", b""),
        ("text.jpg", b"no image at all, not even near"),
        ("start", b"\xff\xd8\xff"),
    ):
        with pytest.raises(data.ImageError, match=name):
            load_bytes(tmp_path, content, name=name)
    with pytest.raises(data.ImageError, match=r"gone\.jpg: No such file"):
        data.load_image(str(tmp_path / "gone.jpg"))
    with pytest.raises(data.ImageError, match="directory"):
        data.load_image(str(tmp_path))
    assert data.ImageError.exit_code == 4


# ---------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (800, 1067)),  # 640 * 800 / 480 = 1066.67
        (640, 480, (1067, 800)),
        (427, 640, (800, 1199)),  # 1199.06
        (800, 800, (800, 800)),
        (400, 1200, (448, 1344)),  # limited: 1344 / 1200 * 400
        (2000, 1000, (1344, 672)),
        (1, 5000, (32, 1344)),  # 0.27 would be no pixel
        (5000, 1, (1344, 32)),
        (1, 1, (800, 800)),
    ],
)
def test_resized_shape_by_hand(height, width, expected):
    assert data.resized_shape(height, width, short_edge=800, max_size=1344) == expected


def test_resized_shape_is_exact():
    """The definition in fractions, where floating point leaves no doubt."""
    rng = np.random.default_rng(0)
    for height, width in rng.integers(40, 2000, (2000, 2)).tolist():
        scale = min(Fraction(800, min(height, width)), Fraction(1333, max(height, width)))
        exact = [height * scale + Fraction(1, 2), width * scale + Fraction(1, 2)]
        if all(abs(edge - round(edge)) > 1e-9 or scale * min(height, width) == 800 for edge in exact):
            expected = tuple(max(int(edge), 32) for edge in exact)
            assert data.resized_shape(height, width, short_edge=800, max_size=1333) == expected


def test_short_edges_below_the_smallest_edge_are_kept():
    assert data.resized_shape(100, 200, short_edge=16, max_size=64) == (16, 32)


@pytest.mark.parametrize(("multiple", "expected"), [(32, (64, 96)), (1, (41, 70))])
def test_pad_images(multiple, expected):
    rng = np.random.default_rng(0)
    images = [rng.integers(1, 255, (*size, 3), dtype=np.uint8) for size in ((41, 60), (30, 70))]
    padded, shapes = data.pad_images(images, multiple=multiple)
    assert padded.shape == (2, *expected, 3) and padded.dtype == np.uint8 and shapes.dtype == np.int32
    np.testing.assert_array_equal(shapes, [[41, 60], [30, 70]])
    for image, slot in zip(images, padded):
        height, width = image.shape[:2]
        np.testing.assert_array_equal(slot[:height, :width], image)
        assert slot.sum() == image.sum()


def test_polygons_drawn_in_part_equal_polygons_drawn_in_full():
    rng = np.random.default_rng(0)
    height, width = 83, 101
    view = data.View(height, width)
    wrong = []
    for _ in range(300):
        # Whole numbers, so that shifting them is exact. Many reach outside.
        polygons = [rng.integers(0, 50, (5, 2)) + rng.integers(-40, 90, 2) for _ in range(2)]
        mask = boxes.segmentation_to_mask(polygons, height, width)
        packed = view.draw_masks([polygons])[0]
        assert packed.shape == (height, 13)
        wrong.append((unpack(packed, width) != mask).sum())
    # pycocotools rounds where an edge passes exactly between two pixels, one way or the other.
    assert max(wrong) <= 2 and sum(wrong) <= 5


def test_masks_come_without_polygons_too():
    view = data.View(10, 13)
    assert view.draw_masks([None, []]).shape == (2, 10, 2)
    assert not view.draw_masks([None, []]).any()
    assert view.draw_masks([]).shape == (0, 10, 2)


# ------------------------------------------------------------------------------------------------- training examples


def seen_twice(record, **changes):
    """The same image as it is and mirrored: two positions of its stream, told apart by the painted picture."""
    augmentation, others = split_off_augmentation({"short_edge": 75, "max_size": 400, **changes})
    maker = data.ExampleMaker(augmentation, **{"with_masks": True, "seed": 0, **others})
    examples = {}
    for position in range(50):
        example = maker(data.TrainingTask(record, position))
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
    rles = [boxes.encode_rle(boxes.segmentation_to_mask([np.array(p)], 60, 90)) for p in (TRIANGLE, ARROW)]
    polygons = make_record(tmp_path, 1, 60, 90, [TRIANGLE, ARROW])
    encoded = make_record(tmp_path, 1, 60, 90, [TRIANGLE, ARROW], segmentations=rles)
    for a, b in zip(seen_twice(polygons), seen_twice(encoded)):
        for mask_a, mask_b in zip(unpack(a["gt_masks"], 113), unpack(b["gt_masks"], 113)):
            assert mask_iou(mask_a, mask_b) > 0.94


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


def test_an_image_without_objects_has_one_row_of_padding(tmp_path):
    (batch,) = take(stream([make_record(tmp_path, 1, 40, 60)]), 1)
    assert batch["gt_boxes"].shape == (1, 1, 4) and not batch["gt_boxes"].any()
    assert batch["gt_labels"].tolist() == [[0]]
    assert batch["gt_masks"].shape == (1, 1, 64, 12) and not batch["gt_masks"].any()


@pytest.mark.parametrize(("height", "width"), [(1, 200), (200, 1), (1, 1)])
def test_lines_and_single_pixels(tmp_path, height, width):
    record = make_record(tmp_path, 1, height, width, [[[0, 0], [width, 0], [width, height], [0, height]]])
    (batch,) = take(stream([record], with_masks=False), 1)
    assert batch["image_shape"].min() >= 32
    np.testing.assert_allclose(batch["gt_boxes"][0, 0, 2:], batch["image_shape"][0, ::-1], rtol=1e-5)


@pytest.mark.parametrize(("height", "width", "said"), [(60, 91, "91 x 60"), (90, 60, "60 x 90.*EXIF")])
def test_an_image_of_another_size_than_its_record_is_refused(tmp_path, height, width, said):
    good = make_record(tmp_path, 1, 60, 90)
    bad = dataclasses.replace(good, height=height, width=width)
    with pytest.raises(data.DataError, match=rf"1\.png: the image is 90 x 60 pixels, but .* {said}"):
        next(iter(stream([bad])))
    with pytest.raises(data.DataError, match=r"1\.png"):
        next(iter(data.EvaluationData([bad], **EVALUATION)))
    # And before anything starts, from the header.
    with pytest.raises(DatasetError, match=rf"^1 of 2 images .*\n.*1\.png: the image is 90 x 60 pixels, .* {said}"):
        data.check_sizes([good, bad], max_share=0.4)
    data.check_sizes([good, bad], max_share=0.5)
    data.check_sizes([good], max_share=0.0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_size_in_the_header_is_the_size_of_the_image(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "image"
    path.write_bytes(encode(smooth_picture(), kind, exif=exif))
    assert data.image_size(str(path)) == data.load_image(str(path)).shape[:2]


def test_sizes_of_a_large_data_set_are_sampled(tmp_path):
    """Evenly: of the 1000 images, one file, those of the second half have another size than annotated."""
    record = make_record(tmp_path, 1, 60, 90)
    wrong = dataclasses.replace(record, width=91)
    with pytest.raises(DatasetError, match="^250 of 500 images") as error:
        data.check_sizes([record] * 500 + [wrong] * 500, max_share=0.49)
    assert len(str(error.value).splitlines()) == 1 + data.NAMED_IMAGES
    unreadable = dataclasses.replace(record, path=str(tmp_path / "none.png"))
    data.check_sizes([unreadable], max_share=0)


# ---------------------------------------------------------------------------------------------------------- batches


def test_a_batch_is_its_examples_padded(tmp_path):
    wide = [make_record(tmp_path, 1, 60, 90, [TRIANGLE]), make_record(tmp_path, 2, 45, 90, [TRIANGLE, ARROW])]
    tasks = [data.TrainingTask(record, position) for position, record in enumerate(wide, 5)]
    maker = data.ExampleMaker(data.Augmentation(short_edge=45, max_size=200), with_masks=True, seed=3)
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
    with pytest.raises(data.DataError, match="no images"):
        stream([])


# ----------------------------------------------------------------------------------------------------- augmentation


def crops(record, count, *, crop_size=64, crop_scale=(0.5, 2.0), with_masks=True, seed=0):
    augmentation = data.Augmentation(64, 96, crop_size=crop_size, crop_scale=crop_scale)
    maker = data.ExampleMaker(augmentation, with_masks=with_masks, seed=seed)
    return [maker(data.TrainingTask(record, position)) for position in range(count)]


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
            assert boxes.pairwise_iou([box], [tight_box(painted)])[0, 0] > 0.8 or painted.sum() < 100
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
    rles = [boxes.encode_rle(boxes.segmentation_to_mask([np.array(p)], 60, 90)) for p in (TRIANGLE, ARROW)]
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

    changed = data.jitter_color(image, (0.2, 0.3, 0.5), Fixed())
    grey = image @ [0.114, 0.587, 0.299]
    bright = image * 1.2
    mean = grey.mean() * 1.2
    expected = (bright - mean) * 0.7 + mean
    own_grey = (expected @ [0.114, 0.587, 0.299])[..., None]
    expected = np.clip((expected - own_grey) * 1.5 + own_grey, 0, 255)
    np.testing.assert_allclose(changed, expected, atol=2)
    assert changed.dtype == np.uint8
    np.testing.assert_allclose(data.jitter_color(image, (0.0, 0.0, 0.0), rng), image, atol=1)


def test_colour_jitter_changes_colours_only(tmp_path):
    record = make_record(tmp_path, 1, 60, 90, [TRIANGLE])
    (plain,), (coloured,), (again,) = (
        take(stream([record], color_jitter=jitter), 1) for jitter in ((0.0,) * 3, (0.4,) * 3, (0.4,) * 3)
    )
    assert fingerprint([coloured]) == fingerprint([again])
    for name in set(plain) - {"image"}:
        np.testing.assert_array_equal(plain[name], coloured[name])
    assert np.abs(plain["image"].astype(int) - coloured["image"]).mean() > 1


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


# ---------------------------------------------------------------------------------------------------------- workers


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


@pytest.mark.slow
def test_an_unreadable_image_is_skipped_and_nothing_else_changes(records, tmp_path, caplog):
    settings = {"batch_size": 2, "short_edge": (50, 90), "seed": 5}
    bad = [12, 17]
    partly = [damaged(record, tmp_path) if record.image_id in bad else record for record in records]
    good = take(stream(records, **settings), 20)
    runs = [take(stream(partly, **settings, max_skipped=0.3, num_workers=n), 20) for n in (0, 2)]
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
        resumed = take(stream(partly, **settings, max_skipped=0.3, start=start), 20 - start)
        assert fingerprint(resumed) == fingerprint(runs[0][start:])
    warnings = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(warnings) == 12, "one for each stream and image, however often it comes"
    assert all(".png: not readable" in warning for warning in warnings)


def test_too_many_unreadable_images_end_the_stream_by_name(records, tmp_path):
    broken = [damaged(record, tmp_path) if record.image_id in (12, 13) else record for record in records]
    take(stream(broken, max_skipped=2 / 7), 20)
    with pytest.raises(
        data.DataError, match=r"^2 of 7 images .* DATA\.MAX_DROPPED=0\.2 .*1[23]\.png: not readable"
    ) as error:
        take(stream(broken, max_skipped=0.2), 20)
    assert error.value.exit_code == 4
    everything = [damaged(record, tmp_path) for record in records]
    with pytest.raises(data.DataError, match="no image can be read"):
        take(stream(everything, max_skipped=1.0), 1)


def test_only_the_first_skipped_images_are_named(caplog):
    skipped = data.SkippedImages(1000, 1.0)
    for number in [*range(1, 201), *range(1, 201)]:
        skipped.add(f"{number}.jpg", f"{number}.jpg: broken")
    named = [record.getMessage() for record in caplog.records]
    assert named == [f"unreadable image {n}, skipped: {n}.jpg: broken" for n in (*range(1, 11), 100)]


def numbers_but_13(task):
    if task == 13:
        raise ValueError("unlucky\nnumber")
    return task


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_failure_travels_with_its_task_and_traceback(caplog, num_workers):
    results = data.OrderedMap(numbers_but_13, itertools.count(5), num_workers=num_workers)
    assert next(results) == 5
    with caplog.at_level(logging.ERROR), pytest.raises(data.DataError, match="^13: ValueError: unlucky number$"):
        for _ in results:
            pass
    assert "numbers_but_13" in caplog.text and "Traceback" in caplog.text
    assert not children()
    with pytest.raises(data.DataError, match="closed"):
        next(results)


def megabytes(task):
    return os.getpid(), np.full(2**24, task, np.uint8)


@pytest.mark.slow
def test_a_worker_killed_while_it_sends_is_noticed():
    results = data.OrderedMap(megabytes, itertools.count(), num_workers=1)
    pid, _ = next(results)
    # The next result has begun to arrive and does not fit into the pipe: nobody reads, so the worker is still sending.
    wait_until(lambda: wait(results._busy, 0))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(data.DataError, match=r"a data worker was killed \(SIGKILL: out of memory\?\) .* 1$"):
        next(results)
    assert not children()


def stuck_after_4(task):
    if task >= 4:
        time.sleep(5 * PATIENCE)
    return os.getpid()


@pytest.mark.slow
def test_close_from_another_thread_ends_a_stuck_stream():
    results = data.OrderedMap(stuck_after_4, itertools.count(), num_workers=2)
    pids = {next(results) for _ in range(4)}
    for pid in pids:
        os.kill(pid, signal.SIGTERM)  # Workers outlive it: the parent may want to finish its step.
    raised = []

    def consume():
        try:
            next(results)
        except data.DataError as error:
            raised.append(str(error))

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    consumer.join(0.5)
    assert consumer.is_alive() and len(children()) == 2
    results.close()
    consumer.join(PATIENCE)
    assert raised == ["the stream of training data has been closed"]
    assert not children()


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


PROGRAM = """
    import itertools, sys, threading, time
    sys.path[:0] = {paths!r}
    import data, test_data

    def consume(results, all_given):
        for number, pid in enumerate(results, 1):
            print(pid, flush=True)
            if number == 4:
                all_given.set()

    if __name__ == "__main__":
        results = data.OrderedMap(test_data.stuck_after_4, itertools.count(), num_workers=2)
        all_given = threading.Event()
        threading.Thread(target=consume, args=(results, all_given), daemon=True).start()
        all_given.wait()
        {end}
"""


def start_program(tmp_path, end):
    """A program whose thread waits for stuck workers: its process, and the ids of the workers'."""
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM).format(paths=[str(ROOT), str(ROOT / "tests")], end=end))
    program = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)
    return program, {int(program.stdout.readline()) for _ in range(4)}


@pytest.mark.slow
def test_stuck_workers_do_not_hold_up_the_end_of_the_program(tmp_path):
    program, pids = start_program(tmp_path, end="sys.exit(5)")
    program.communicate(timeout=PATIENCE)
    assert program.returncode == 5
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.slow
def test_stuck_workers_end_when_the_parent_is_killed(tmp_path):
    program, pids = start_program(tmp_path, end="time.sleep(1e3)")
    program.kill()
    program.communicate(timeout=PATIENCE)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


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
            expected = data.resized_shape(record.height, record.width, short_edge=64, max_size=128)
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
    with pytest.raises(data.DataError, match=r"1\.png"):
        list(data.EvaluationData([*records, bad], **EVALUATION, num_threads=2))
    for num_threads in (0, 2):
        groups = list(data.EvaluationData([bad, *records], **EVALUATION, max_skipped=0.2, num_threads=num_threads))
        seen = [record.image_id for group, _ in groups for record in group]
        assert sorted(seen) == [record.image_id for record in records]
        assert all(len(group) == len(batch["image"]) == len(batch["image_shape"]) for group, batch in groups)
    assert list(data.EvaluationData([], **EVALUATION)) == []


# ---------------------------------------------------------------------------------------- configuration and real data


@pytest.fixture
def config(monkeypatch):
    config = Config()
    monkeypatch.setattr(data, "config", config)
    return config


def test_settings_come_from_the_configuration(config, records):
    config.update(["PREPROC.TRAIN_SHORT_EDGE_SIZE=40", "PREPROC.TEST_SHORT_EDGE_SIZE=50", "PREPROC.MAX_SIZE=70"])
    config.update(["TRAIN.BATCH_SIZE_PER_GPU=2", "TEST.BATCH_SIZE_PER_GPU=3", "DATA.NUM_WORKERS=0", "TRAIN.SEED=5"])
    config.update(["MODE_MASK=False", "MODE_FPN=False"])
    (batch,) = take(data.training_data(records[:1]), 1)
    assert batch["image"].shape == (2, 40, 60, 3) and "gt_masks" not in batch
    assert batch["sample_key"].tolist() == [[5, 0], [5, 1]]
    ((_, batch),) = data.evaluation_data(records[:2])
    assert batch["image"].shape == (2, 47, 70, 3)
    config.update(["MODE_FPN=True", "MODE_MASK=True"])
    (batch,) = take(data.training_data(records[:1], start=1, shard_index=1, num_shards=2), 1)
    assert batch["image"].shape == (2, 64, 64, 3) and batch["gt_masks"].shape == (2, 2, 64, 8)
    assert batch["sample_key"].tolist() == [[5, 5], [5, 7]]
    # 70 is rounded up to 96.
    ((_, batch),) = data.evaluation_data(records[:2])
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
            assert (real >= 0).all() and (real[:, 2:] <= [width, height]).all() and (boxes.area(real) > 1).all()
            assert not masks[slot, :, height:].any() and not masks[slot, :, :, width:].any()
        for index in np.argwhere(batch["gt_labels"] > 0):
            mask, box = masks[tuple(index)], batch["gt_boxes"][tuple(index)]
            if mask.sum() > 100:
                overlaps.append(boxes.pairwise_iou([box], [tight_box(mask)])[0, 0])
    assert len(overlaps) > 200 and np.mean(overlaps) > 0.9 and np.mean(np.array(overlaps) > 0.8) > 0.95
    assert (np.concatenate([batch["gt_labels"].ravel() for batch in batches]) == -1).any()


def test_coco_for_evaluation(coco_tiny):
    records = get_dataset("coco_val2017", coco_tiny).records(training=False)
    batches = list(data.EvaluationData(records, batch_size=4, short_edge=100, max_size=160, multiple=32, num_threads=2))
    assert sorted(record.image_id for group, _ in batches for record in group) == sorted(r.image_id for r in records)
    assert len(batches) < len(records) / 2
