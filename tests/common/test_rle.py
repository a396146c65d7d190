"""Masks and run lengths, against pycocotools, exact but slow definitions, and cases worked by hand."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from helpers import paste_by_definition, paste_mask, random_boxes

from common.rle import compress_rle, encode_rle, pack_masks, paste_rle, rle_areas, segmentation_to_mask

# --------------------------------------------------------------------------------------------------------------- masks


def triangle_mask(height, width, inside):
    rows, columns = np.mgrid[:height, :width] + 0.5
    return inside(columns, rows).astype(np.uint8)


def test_rectangles_cover_their_pixels():
    polygon = np.float32([[2, 1], [6, 1], [6, 4], [2, 4]])
    expected = np.zeros((7, 9), np.uint8)
    expected[1:4, 2:6] = 1
    np.testing.assert_array_equal(segmentation_to_mask([polygon], 7, 9), expected)


def test_several_polygons_are_one_object():
    one, other = np.float32([[0, 0], [4, 0], [4, 4], [0, 4]]), np.float32([[2, 2], [8, 2], [8, 6], [2, 6]])
    mask = segmentation_to_mask([one, other], 8, 10)
    assert (mask.sum(), mask.max()) == (16 + 24 - 4, 1)


def test_polygons_equal_pycocotools():
    rng = np.random.default_rng(3)
    for _ in range(50):
        polygons = [rng.uniform(-10, 60, (rng.integers(3, 12), 2)).round(1) for _ in range(rng.integers(1, 4))]
        expected = mask_util.decode(mask_util.merge(mask_util.frPyObjects([p.ravel() for p in polygons], 50, 40)))
        as_stored = [p.astype(np.float32) for p in polygons]
        np.testing.assert_array_equal(segmentation_to_mask(as_stored, 50, 40), expected)


def test_two_points_are_no_box():
    """pycocotools takes a list whose first entry has four numbers for boxes x, y, width, height."""
    two_points, triangle = np.float32([[1, 1], [5, 5]]), np.float32([[10, 10], [30, 10], [10, 30]])
    assert not segmentation_to_mask([two_points], 40, 40).any()
    mask = segmentation_to_mask([two_points, triangle], 40, 40)
    np.testing.assert_array_equal(mask, segmentation_to_mask([triangle], 40, 40))
    assert 180 < mask.sum() < 220


@pytest.mark.parametrize("nothing", [None, [], [np.zeros((0, 2), np.float32)]])
def test_no_segmentation_is_an_empty_mask(nothing):
    mask = segmentation_to_mask(nothing, 5, 6)
    assert (mask.shape, mask.dtype, mask.any()) == ((5, 6), np.uint8, False)


@pytest.mark.parametrize("huge", [1e4, 1e9, 1e30])
def test_huge_polygons_are_cut_and_keep_their_directions(huge):
    """The diagonal of the square from -huge to huge; handed to pycocotools as it is, this crashes the process."""
    polygon = np.array([[-huge, -huge], [huge, -huge], [huge, huge]])
    expected = triangle_mask(20, 30, lambda x, y: x > y)
    mask = segmentation_to_mask([polygon], 20, 30)
    assert np.count_nonzero(mask != expected) <= 20, "they may differ on the diagonal only"
    assert not np.any((mask != expected) & ~np.eye(20, 30, dtype=bool))


def test_polygons_outside_are_empty():
    assert not segmentation_to_mask([np.float32([[1e6, 1e6], [2e6, 1e6], [2e6, 2e6]])], 20, 30).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_polygons_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        segmentation_to_mask([np.float32([[1, 1], [5, bad], [5, 5]])], 20, 30)


def column_runs(mask):
    """Run lengths as in COCO's uncompressed RLE, column by column, the first one of zeros."""
    pixels = np.concatenate([[0], mask.T.ravel()])
    changes = np.flatnonzero(np.diff(pixels))
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


def random_masks():
    rng = np.random.default_rng(4)
    for density in (0, 0.02, 0.5, 0.98, 1):
        for _ in range(10):
            yield (rng.random(rng.integers(1, 70, 2)) < density).astype(np.uint8)


def test_rle_of_every_kind_is_decoded():
    for mask in random_masks():
        compressed = mask_util.encode(np.asfortranarray(mask))
        as_text = {"size": compressed["size"], "counts": compressed["counts"].decode()}
        runs = {"size": list(mask.shape), "counts": column_runs(mask)}
        for rle in (compressed, as_text, runs):
            np.testing.assert_array_equal(segmentation_to_mask(rle, *mask.shape), mask)
        assert compress_rle(runs, *mask.shape) == compressed


def test_long_runs_are_decoded():
    mask = np.zeros((1000, 1500), np.uint8)
    mask[:, 700:1400] = 1
    np.testing.assert_array_equal(segmentation_to_mask(encode_rle(mask), 1000, 1500), mask)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [4, 5], "counts": [20]}, "size"),
        ({"counts": [30]}, "size"),
        ({"size": 30, "counts": [30]}, "size"),
        ({"size": [5, 6]}, "not run lengths"),
        ({"size": [5, 6], "counts": []}, "not run lengths"),
        ({"size": [5, 6], "counts": ["30"]}, "not run lengths"),
        ({"size": [5, 6], "counts": [30.0]}, "not run lengths"),
        ({"size": [5, 6], "counts": [-2, 32]}, "not run lengths"),
        ({"size": [5, 6], "counts": [2**40]}, "not run lengths"),
        ({"size": [5, 6], "counts": [2**63 - 1, 2**63 - 1, 32]}, "not run lengths"),
        ({"size": [5, 6], "counts": [10, 19]}, "add up to 29"),
        ({"size": [5, 6], "counts": [10, 21]}, "add up to 31"),
        ({"size": [5, 6], "counts": ""}, "cut off"),
        ({"size": [5, 6], "counts": "P"}, "cut off"),
        ({"size": [5, 6], "counts": "n0é"}, "wrong character"),
        ({"size": [5, 6], "counts": "n0 "}, "wrong character"),
        ({"size": [5, 6], "counts": "pn0"}, "wrong character"),
        ({"size": [5, 6], "counts": "oooooooooooo0"}, "beyond 32 bits"),
        ({"size": [5, 6], "counts": "o0"}, "not run lengths"),
        ({"size": [5, 6], "counts": b":" * 4}, "add up to 50"),
    ],
)
def test_broken_rle_is_refused(rle, message):
    with pytest.raises(ValueError, match=message):
        segmentation_to_mask(rle, 5, 6)


def test_rle_areas():
    """Of several at once, among them an empty one, a full one and one whose numbers go down as well as up."""
    rng = np.random.default_rng(22)
    masks = [rng.random((9, 7)) < density for density in (0.0, 0.02, 0.5, 0.98, 1.0)]
    masks += [np.triu(np.ones((300, 300))), np.zeros((300, 200)), np.eye(1000, 70)]
    rles = [encode_rle(mask) for mask in masks]
    assert rle_areas(rles).tolist() == [np.count_nonzero(mask) for mask in masks]
    assert rle_areas([]).tolist() == []


@pytest.mark.parametrize("counts", ["o1", "", "P", "03l0", "~"])
def test_rle_areas_refuses_broken_counts(counts):
    """Runs that add up to less or that are below 0, no runs, a number that is cut off, and a wrong character."""
    good = encode_rle(np.eye(6))
    with pytest.raises(ValueError, match="RLE counts"):
        rle_areas([good, {"size": [6, 6], "counts": counts}, good])


def test_encode_rle_is_read_by_pycocotools_and_json():
    for mask in random_masks():
        rle = json.loads(json.dumps(encode_rle(mask)))
        np.testing.assert_array_equal(mask_util.decode(rle), mask)


@pytest.mark.parametrize("mask", [np.array([[0, 1, 2, 255, 256, -1, 0]]), np.array([[0, 0.5, 1, 2, 0.1, 3, 0]])])
def test_encode_rle_takes_any_non_zero_value(mask):
    np.testing.assert_array_equal(mask_util.decode(encode_rle(mask)), [[0, 1, 1, 1, 1, 1, 0]])


def test_pack_masks_by_hand():
    masks = np.zeros((2, 1, 10), np.uint8)
    masks[0, 0, [0, 7, 8]] = 1
    masks[1, 0, 9] = 255
    np.testing.assert_array_equal(pack_masks(masks), [[[0b10000001, 0b10000000]], [[0, 0b01000000]]])


@pytest.mark.parametrize("shape", [(0, 5, 9), (3, 4, 8), (2, 5, 17)])
def test_pack_masks_is_undone_by_unpacking(shape):
    masks = np.random.default_rng(5).integers(0, 2, shape, dtype=np.uint8)
    packed = pack_masks(masks)
    assert (packed.shape, packed.dtype) == ((*shape[:2], -(-shape[2] // 8)), np.uint8)
    np.testing.assert_array_equal(np.unpackbits(packed, axis=2, count=shape[2]), masks)


# -------------------------------------------------------------------------------------------------------------- pasting


def assert_pasted(mask, box, height, width):
    pasted, values = paste_mask(mask, box, height, width), paste_by_definition(mask, box, height, width)
    assert (pasted.shape, pasted.dtype) == ((height, width), np.uint8)
    decided = np.abs(values - 0.5) > 1e-5
    np.testing.assert_array_equal(pasted[decided], values[decided] >= 0.5)
    return pasted


@pytest.mark.parametrize(
    "box",
    [
        (3.3, 4.1, 21.7, 15.2),
        (0, 0, 30, 24),
        (-12.5, -7.2, 9.4, 8.8),
        (20.2, 15.5, 47.1, 39.9),
        (-300, -200, 320, 250),
        (5.2, -4, 5.9, 30),
        (4.45, 2, 4.55, 20),
        (-5, 9.3, 40, 9.6),
        (40, 40, 60, 60),
        (-9, -9, -2, -2),
    ],
    ids=["inside", "image", "top left", "bottom right", "beyond", "thin", "hair", "flat", "below", "above"],
)
@pytest.mark.parametrize("kind", ["smooth", "binary", "full"])
def test_paste_equals_the_definition(box, kind):
    rng = np.random.default_rng(6)
    mask = {"smooth": rng.random((28, 28)), "binary": rng.integers(0, 2, (28, 28)), "full": np.ones((28, 28))}[kind]
    assert_pasted(mask.astype(np.float32), box, 24, 30)


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (14, 14)])
def test_paste_takes_any_mask_size(shape):
    rng = np.random.default_rng(7)
    for box in random_boxes(rng, 15, low=-10, high=25):
        assert_pasted(rng.random(shape).astype(np.float32), box, 24, 30)


def test_pasted_rle_is_the_one_that_pycocotools_makes():
    """Of masks of many sizes at once: empty ones, whole images, ends at the border, boxes thinner than a pixel."""
    rng = np.random.default_rng(20)
    for height, width in ((24, 30), (1, 1), (7, 300), (200, 3)):
        corners = np.sort(rng.uniform(-20, [width + 20, height + 20], (40, 2, 2)), axis=1)
        some = np.concatenate([corners.reshape(40, 4), [[0, 0, width, height], [5, 5, 5, 9], [-9, -9, 400, 400]]])
        some[:8, 2] = some[:8, 0] + rng.uniform(0, 2, 8)
        masks = (rng.integers(0, 2, (len(some), 6, 5)) + rng.uniform(-0.4, 0.4, (len(some), 6, 5))).clip(0, 1)
        masks[-3] = 1
        masks[30:36] = 0
        pasted = paste_rle(masks, some, height, width)
        assert len(pasted) == len(some)
        for rle, mask, box in zip(pasted, masks, some):
            values = paste_by_definition(mask, box, height, width) if np.all(box[2:] > box[:2]) else np.zeros((1, 1))
            expected = np.broadcast_to(values >= 0.5, (height, width))
            assert rle == encode_rle(expected)
    assert paste_rle(np.zeros((0, 28, 28)), np.zeros((0, 4)), 24, 30) == []


def test_pasted_rle_of_long_runs():
    """Run lengths of one to five characters, and their differences."""
    rng = np.random.default_rng(21)
    for height, width in ((3000, 40), (40, 3000), (2000, 2000)):
        box = np.array([width * 0.3, height * 0.1, width * 0.8, height * 0.9])
        (rle,) = paste_rle(rng.random((1, 14, 14)), [box], height, width)
        assert rle == encode_rle(mask_util.decode(rle))


def test_paste_by_hand():
    """One cell of 1 over [1, 3] x [1, 3]: the centres of its four pixels get 0.75 * 0.75, those around 0.75 * 0.25."""
    expected = np.zeros((4, 5), np.uint8)
    expected[1:3, 1:3] = 1
    np.testing.assert_array_equal(paste_mask(np.ones((1, 1)), [1, 1, 3, 3], 4, 5), expected)


def test_a_full_mask_fills_its_box():
    rng = np.random.default_rng(8)
    for x1, y1, x2, y2 in rng.integers(0, 12, (20, 4)) + [0, 0, 13, 13] + 0.25:
        mask = paste_mask(np.ones((28, 28), np.float32), [x1, y1, x2, y2], 30, 30)
        expected = np.zeros((30, 30), np.uint8)
        expected[int(y1 + 0.5) : int(y2 + 0.5), int(x1 + 0.5) : int(x2 + 0.5)] = 1
        corners = np.abs(mask.astype(int) - expected).sum()
        assert corners <= 4, "only the corner pixels, whose weight is a product of two, may differ"


def test_the_threshold_is_inclusive():
    half = np.full((3, 3), 0.5, np.float32)
    assert paste_mask(half, [0, 0, 9, 9], 9, 9)[4, 4] == 1
    assert paste_mask(half - 1e-6, [0, 0, 9, 9], 9, 9)[4, 4] == 0


def test_a_box_thinner_than_a_pixel_shows_where_it_holds_a_pixels_centre():
    full = np.ones((28, 28), np.float32)
    assert paste_mask(full, [4.45, 2, 4.55, 8], 10, 10).sum(axis=0).tolist() == [0, 0, 0, 0, 6, 0, 0, 0, 0, 0]
    assert not paste_mask(full, [4.6, 2, 4.7, 8], 10, 10).any()


def test_pasting_does_not_depend_on_where_the_image_ends():
    rng = np.random.default_rng(9)
    mask, box = rng.random((28, 28)).astype(np.float32), np.array([-7.3, -4.8, 33.1, 29.4])
    large = paste_mask(mask, box + [20, 20, 20, 20], 60, 70)
    np.testing.assert_array_equal(paste_mask(mask, box, 24, 30), large[20:44, 20:50])


@pytest.mark.parametrize(
    "box", [(5, 5, 5, 9), (9, 5, 2, 8), (np.nan, 1, 5, 5), (-np.inf, 1, np.inf, 5), (1, 1, np.inf, 5)]
)
def test_boxes_without_extent_paste_nothing(box):
    assert not paste_mask(np.ones((28, 28), np.float32), box, 10, 10).any()
