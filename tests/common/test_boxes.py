"""Boxes and anchors, against pycocotools, and cases worked by hand."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
from helpers import random_boxes

from common import boxes as np_boxes

EMPTY = np.zeros((0, 4), np.float32)


def test_area_by_hand():
    np.testing.assert_array_equal(
        np_boxes.area([[1, 2, 4, 8], [0, 0, 0.5, 0.5], [5, 5, 2, 9], [3, 3, 3, 3]]), [18, 0.25, 0, 0]
    )


def test_area_of_a_box_reversed_in_both_directions_is_zero():
    assert np_boxes.area([[5, 5, 2, 2]]) == [0]


@pytest.mark.parametrize(
    "function",
    [
        np_boxes.xywh_to_xyxy,
        np_boxes.xyxy_to_xywh,
        lambda none: np_boxes.clip(none, 10, 20),
        lambda none: np_boxes.flip_horizontal(none, 20),
        lambda none: np_boxes.scale(none, 2, 3),
    ],
)
@pytest.mark.parametrize("none", [EMPTY, []], ids=["array", "list"])
def test_no_boxes_stay_no_boxes(function, none):
    assert function(none).shape == (0, 4)


def test_no_boxes_have_no_area_and_no_overlaps():
    some = np.ones((3, 4), np.float32)
    assert np_boxes.area(EMPTY).shape == (0,)
    assert np_boxes.pairwise_iou(EMPTY, some).shape == (0, 3)
    assert np_boxes.pairwise_iou(some, EMPTY).shape == (3, 0)


def test_iou_by_hand():
    iou = np_boxes.pairwise_iou(
        [[0, 0, 2, 2], [5, 5, 5, 5]], [[1, 1, 3, 3], [0, 0, 2, 2], [0, 0, 2, 1], [2, 0, 4, 2], [5, 5, 5, 5]]
    )
    np.testing.assert_allclose(iou, [[1 / 7, 1, 0.5, 0, 0], [0, 0, 0, 0, 0]], rtol=1e-6)
    assert iou.dtype == np.float32


def test_iou_equals_pycocotools():
    rng = np.random.default_rng(1)
    a, b = random_boxes(rng, 40, low=-20, high=120), random_boxes(rng, 30, low=-20, high=120)
    xywh = [np.concatenate([x[:, :2], x[:, 2:] - x[:, :2]], axis=1).astype(np.float64) for x in (a, b)]
    expected = mask_util.iou(*xywh, [0] * len(b))
    assert np.count_nonzero(expected) > 100
    np.testing.assert_allclose(np_boxes.pairwise_iou(a, b), expected, atol=1e-6)


def test_iou_rounds_as_the_reference_does():
    """Ties between ground truths depend on it: (area a + area b) - intersection, each step in float32."""
    rng = np.random.default_rng(2)
    a, b = random_boxes(rng, 60, low=-20, high=120), random_boxes(rng, 60, low=-20, high=120)
    other_order = 0
    for i, j in np.ndindex(60, 60):
        (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a[i], b[j]
        intersection = max(min(ax2, bx2) - max(ax1, bx1), np.float32(0)) * max(
            min(ay2, by2) - max(ay1, by1), np.float32(0)
        )
        area_a, area_b = (ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1)
        assert np_boxes.pairwise_iou(a[i], b[j])[0, 0] == intersection / ((area_a + area_b) - intersection)
        other_order += intersection / ((area_a - intersection) + area_b) != intersection / (
            (area_a + area_b) - intersection
        )
    assert other_order > 0, "these boxes do not tell the orders apart"


def test_clip_limits_all_four_coordinates_and_leaves_its_input():
    before = np.array([[-5, -6, 50, 60], [12, 40, 30, 45], [-9, -9, -1, -1], [1, 2, 3, 4]], np.float32)
    given = before.copy()
    after = np_boxes.clip(given, 20, 10)
    np.testing.assert_array_equal(after, [[0, 0, 10, 20], [10, 20, 10, 20], [0, 0, 0, 0], [1, 2, 3, 4]])
    np.testing.assert_array_equal(given, before)


def test_formats_by_hand():
    np.testing.assert_array_equal(np_boxes.xywh_to_xyxy([[1, 2, 3, 4]]), [[1, 2, 4, 6]])
    np.testing.assert_array_equal(np_boxes.xyxy_to_xywh([[1, 2, 4, 6]]), [[1, 2, 3, 4]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floating_types_are_kept(dtype):
    one = np.array([[1, 2, 3, 4]], dtype)
    for result in (
        np_boxes.clip(one, 9, 9),
        np_boxes.scale(one, 2, 3),
        np_boxes.flip_horizontal(one, 9),
        np_boxes.xywh_to_xyxy(one),
    ):
        assert result.dtype == dtype


def test_flip_moves_boxes_as_it_moves_pixels():
    image = np.zeros((8, 11), np.uint8)
    image[2:5, 1:4] = 1
    x1, y1, x2, y2 = np_boxes.flip_horizontal([[1, 2, 4, 5]], 11)[0].astype(int)
    expected = np.zeros_like(image)
    expected[y1:y2, x1:x2] = 1
    np.testing.assert_array_equal(image[:, ::-1], expected)


def test_scale_by_hand():
    np.testing.assert_array_equal(np_boxes.scale([[1, 2, 3, 4]], 2, 0.5), [[2, 1, 6, 2]])


def test_base_anchors_by_hand():
    anchors = np_boxes.base_anchors([8, 16], [0.25, 1.0, 4.0])
    expected = [[-8, -2, 8, 2], [-4, -4, 4, 4], [-2, -8, 2, 8], [-16, -4, 16, 4], [-8, -8, 8, 8], [-4, -16, 4, 16]]
    np.testing.assert_array_equal(anchors, expected)
    assert anchors.dtype == np.float32


def test_base_anchors_are_not_rounded_and_keep_their_area():
    anchors = np_boxes.base_anchors([32, 37.5], [0.5, 1, 2, 3.3])
    sides = anchors[:, 2:] - anchors[:, :2]
    np.testing.assert_allclose(sides.prod(axis=1), np.repeat([32**2, 37.5**2], 4), rtol=1e-6)
    np.testing.assert_allclose(sides[:, 1] / sides[:, 0], [0.5, 1, 2, 3.3] * 2, rtol=1e-6)
