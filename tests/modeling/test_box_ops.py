"""Boxes in TensorFlow against slow definitions in NumPy and cases worked by hand."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import decode, encode, evaluate, greedy_nms, random_boxes

from common import boxes as np_boxes
from modeling import box_ops

NONE = np.zeros((2, 0, 4), np.float32)
LOG_8 = float(np.log(8))


# ------------------------------------------------------------------------------------------------------ area and limits


def test_area_by_hand():
    boxes = [[1, 2, 4, 8], [0, 0, 0.5, 0.5], [3, 3, 3, 5], [5, 5, 2, 9], [5, 5, 2, 2.0]]
    np.testing.assert_array_equal(evaluate(box_ops.area, [boxes, boxes]), [[18, 0.25, 0, 0, 0]] * 2)
    assert evaluate(box_ops.area, NONE).shape == (2, 0)


def test_clip_limits_all_four_coordinates_to_each_image():
    boxes = [[-5, -6, 50, 60], [12, 40, 30, 45], [-9, -9, -1, -1], [1, 2, 3, 4.0]]
    clipped = evaluate(box_ops.clip, [boxes, boxes], np.int32([[20, 10], [41, 48]]))
    narrow = [[0, 0, 10, 20], [10, 20, 10, 20], [0, 0, 0, 0], [1, 2, 3, 4]]
    wide = [[0, 0, 48, 41], [12, 40, 30, 41], [0, 0, 0, 0], [1, 2, 3, 4]]
    np.testing.assert_array_equal(clipped, [narrow, wide])
    assert evaluate(box_ops.clip, NONE, np.int32([[20, 10], [41, 48]])).shape == (2, 0, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_only_finite_boxes_with_both_sides_above_the_size_are_larger(bad):
    boxes = [[0, 0, 5, 5.1], [0, 0, 5.1, 5], [1, 1, 6.5, 6.5], [9, 9, 1, 1], [0, 0, bad, 9], [bad, 0, 9, 9]]
    is_larger = evaluate(lambda boxes: box_ops.is_nonempty(boxes, 5.0), boxes)
    assert is_larger.tolist() == [False, False, True, False, False, False]


# ------------------------------------------------------------------------------------------------------------- overlaps


def slow_overlaps(box, other):
    """Intersection over union and over the area of `box`, in float32 and in the order of the definition."""
    zero = np.float32(0)
    width = max(min(box[2], other[2]) - max(box[0], other[0]), zero)
    height = max(min(box[3], other[3]) - max(box[1], other[1]), zero)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    intersection = width * height
    return intersection / ((areas[0] + areas[1]) - intersection), intersection / areas[0]


def test_overlaps_equal_the_definition_to_the_last_bit():
    """Which anchors tie for the best of an object depends on the rounding."""
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 2, 25), random_boxes(rng, 2, 30)
    iou, ioa = evaluate(lambda a, b: (box_ops.pairwise_iou(a, b), box_ops.pairwise_ioa(a, b)), a, b)
    assert iou.shape == ioa.shape == (2, 25, 30) and np.count_nonzero(iou) > 200
    for n, i, j in np.ndindex(iou.shape):
        assert (iou[n, i, j], ioa[n, i, j]) == slow_overlaps(a[n, i], b[n, j])


def test_overlaps_by_hand():
    a = [[[0, 0, 2, 2], [5, 5, 5, 5.0]]]
    b = [[[1, 1, 3, 3], [0, 0, 2, 2], [0, 0, 2, 1], [2, 0, 4, 2], [5, 5, 5, 5], [0, 0, 4, 4.0]]]
    iou, ioa = evaluate(lambda a, b: (box_ops.pairwise_iou(a, b), box_ops.pairwise_ioa(a, b)), a, b)
    np.testing.assert_allclose(iou, [[[1 / 7, 1, 0.5, 0, 0, 0.25], [0] * 6]], rtol=1e-6)
    np.testing.assert_allclose(ioa, [[[0.25, 1, 0.5, 0, 0, 1], [0] * 6]], rtol=1e-6)


@pytest.mark.parametrize("function", [box_ops.pairwise_iou, box_ops.pairwise_ioa])
def test_no_boxes_have_no_overlaps(function):
    some = np.ones((2, 3, 4), np.float32)
    shapes = evaluate(lambda a, b: [tf.shape(function(*pair)) for pair in ((a, b), (b, a), (a, a))], NONE, some)
    assert [tuple(shape) for shape in shapes] == [(2, 0, 3), (2, 3, 0), (2, 0, 0)]


# ------------------------------------------------------------------------------------------------ encoding and decoding


def test_encoding_by_hand():
    """From centre (5, 5) and size (10, 10) to centre (15, 25) and size (20, 40)."""
    deltas = evaluate(lambda a, b: box_ops.encode(a, b, weights=(10, 10, 5, 5)), [[5, 5, 25, 45.0]], [[0, 0, 10, 10.0]])
    np.testing.assert_allclose(deltas, [[10, 20, 5 * np.log(2), 5 * np.log(4)]], rtol=1e-6)


def test_decoding_by_hand():
    boxes = evaluate(
        lambda deltas, references: box_ops.decode(deltas, references, max_log_size=LOG_8, weights=(10, 10, 5, 5)),
        [[10, 20, 5 * np.log(2), 5 * np.log(4)], [0, 0, 500, -500]],
        [[0, 0, 10, 10.0], [0, 0, 10, 10.0]],
    )
    np.testing.assert_allclose(boxes, [[5, 5, 25, 45], [-35, 5, 45, 5]], rtol=1e-5)


def test_encoding_and_decoding_equal_the_definition_and_invert_each_other():
    rng = np.random.default_rng(1)
    boxes, references = random_boxes(rng, 3, 7, 5), random_boxes(rng, 3, 7, 1)
    weights = (10, 9, 5, 4)

    def build(boxes, references):
        deltas = box_ops.encode(boxes, references, weights=weights)
        return deltas, box_ops.decode(deltas, references, max_log_size=20.0, weights=weights)

    deltas, decoded = evaluate(build, boxes, references)
    for n, i, j in np.ndindex(3, 7, 5):
        expected = encode(boxes[n, i, j], references[n, i, 0]) * weights
        np.testing.assert_allclose(deltas[n, i, j], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(decoded, boxes, rtol=1e-4, atol=1e-3)


def test_decoding_limits_growth_but_not_shrinking():
    rng = np.random.default_rng(2)
    deltas, references = rng.normal(0, 4, (20, 4)).astype(np.float32), random_boxes(rng, 20)
    decoded = evaluate(lambda *arrays: box_ops.decode(*arrays, max_log_size=LOG_8), deltas, references)
    expected = [decode(d, r, max_log_size=LOG_8) for d, r in zip(deltas, references)]
    assert np.any(deltas[:, 2:] > LOG_8) and np.any(deltas[:, 2:] < -LOG_8)
    np.testing.assert_allclose(decoded, expected, rtol=1e-4, atol=1e-2)


# ------------------------------------------------------------------------------------------------------------- sampling


def keys_of(sample_key, identity, purpose="anchors"):
    return evaluate(
        lambda *arrays: box_ops.random_keys(*arrays, purpose=purpose), np.int32(sample_key), np.int64(identity)
    )


def test_random_keys_belong_to_the_image_wherever_it_is():
    identity = np.arange(500)
    images = [(3, 7), (3, 8), (4, 7)]
    alone = [keys_of([image], identity)[0] for image in images]
    np.testing.assert_array_equal(keys_of(images, identity), alone)
    np.testing.assert_array_equal(keys_of(images[::-1], identity), alone[::-1])


def test_random_keys_belong_to_the_candidate_and_not_to_its_index():
    rng = np.random.default_rng(3)
    identity = rng.choice(2**33, 300, replace=False)
    order = rng.permutation(300)
    keys = keys_of([(1, 2), (1, 3)], identity)
    np.testing.assert_array_equal(keys_of([(1, 2), (1, 3)], identity[order]), keys[:, order])
    of_each_image = keys_of([(1, 2), (1, 3)], np.stack([identity, identity[order]]))
    np.testing.assert_array_equal(of_each_image, [keys[0], keys[1, order]])


def test_random_keys_differ_by_seed_position_and_purpose():
    identity = np.arange(2000)
    streams = [*keys_of([(5, 1), (6, 1), (5, 2), (1, 5)], identity), keys_of([(5, 1)], identity, purpose="rois")[0]]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert np.mean(one == other) < 0.01
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(2000)


def test_random_keys_are_uniform_over_candidates_and_over_images():
    positions = np.stack([np.full(400, 9), np.arange(400)], axis=1)
    keys = keys_of(positions, np.arange(400))
    assert keys.dtype == np.float32 and keys.min() >= 0 and keys.max() < 1
    for part in (keys, keys[:1], keys[:, :1]):
        counts, _ = np.histogram(part, bins=20, range=(0, 1))
        assert np.sum((counts - part.size / 20) ** 2) / (part.size / 20) < 50, "chi-squared of 19 degrees of freedom"
    for a, b in ((keys[1:], keys[:-1]), (keys[:, 1:], keys[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / 400


def sample(is_foreground, is_background, keys, **options):
    return evaluate(lambda *arrays: box_ops.sample(*arrays, **options), is_foreground, is_background, keys)


def check_sample(picked, is_foreground, is_background, *, size, foreground_ratio):
    """That one image's sample is as large as the rules allow, and made of what is eligible."""
    num_foreground = min(is_foreground.sum(), int(size * foreground_ratio))
    num_background = min(is_background.sum(), size - num_foreground)
    index, from_foreground, is_valid = picked
    slot = np.arange(min(size, len(is_foreground)))
    np.testing.assert_array_equal(from_foreground, slot < num_foreground)
    np.testing.assert_array_equal(is_valid, slot < num_foreground + num_background)
    assert is_foreground[index[from_foreground]].all()
    assert is_background[index[is_valid & ~from_foreground]].all()
    assert len(set(index[is_valid])) == num_foreground + num_background


@pytest.mark.parametrize("size, foreground_ratio", [(8, 0.5), (7, 0.25), (30, 0.5), (100, 0.9), (8, 1.0), (8, 0.0)])
def test_sample_keeps_its_limits_and_picks_only_what_is_eligible(size, foreground_ratio):
    rng = np.random.default_rng(4)
    kind = np.array([rng.choice(3, 30, p=p) for p in ([0.5, 0.3, 0.2], [0.9, 0.1, 0], [0.1, 0.1, 0.8], [1, 0, 0])])
    options = dict(size=size, foreground_ratio=foreground_ratio)
    picked = sample(kind == 1, kind == 2, rng.random((4, 30)).astype(np.float32), **options)
    for n in range(4):
        check_sample([x[n] for x in picked], kind[n] == 1, kind[n] == 2, **options)


def test_sample_of_no_candidates():
    nothing = np.zeros((2, 0), bool)
    picked = sample(nothing, nothing, np.zeros((2, 0), np.float32), size=4, foreground_ratio=0.5)
    assert [x.shape for x in picked] == [(2, 0)] * 3


def test_what_is_not_eligible_does_not_change_the_sample():
    rng = np.random.default_rng(5)
    kind, keys = rng.choice(3, (3, 40)), rng.random((3, 40)).astype(np.float32)
    more_kind = np.concatenate([kind, np.zeros((3, 25), int)], axis=1)
    more_keys = np.concatenate([keys, np.ones((3, 25), np.float32)], axis=1)
    options = dict(size=12, foreground_ratio=0.5)
    for one, other in zip(
        sample(kind == 1, kind == 2, keys, **options), sample(more_kind == 1, more_kind == 2, more_keys, **options)
    ):
        np.testing.assert_array_equal(one, other)


def test_every_candidate_is_picked_equally_often():
    images, kind = 4000, np.array([0, 1, 2, 2, 1, 2, 2, 0, 1, 2, 2, 2, 1])
    keys = keys_of(np.stack([np.full(images, 1), np.arange(images)], axis=1), np.arange(len(kind)))
    everywhere = np.tile(kind, (images, 1))
    index, _, is_valid = sample(everywhere == 1, everywhere == 2, keys, size=5, foreground_ratio=0.5)
    assert is_valid.all()
    counts = np.bincount(index.ravel(), minlength=len(kind))
    for number, picked in ((1, 2), (2, 3)):
        share = picked / np.sum(kind == number)
        spread = np.sqrt(images * share * (1 - share))
        assert np.all(np.abs(counts[kind == number] - images * share) < 4.5 * spread)


# ------------------------------------------------------------------------------------------------------------------ NMS


def nms(boxes, scores, **options):
    return evaluate(lambda *arrays: box_ops.batched_nms(*arrays, **options), np.float32(boxes), np.float32(scores))


def slow_nms(boxes, scores, *, iou_threshold, max_output):
    """One problem, boxes [A, Q, 4], scores [A, C]: the kept (score, class, box), best first."""
    kept = []
    for c in range(scores.shape[1]):
        candidates = np.flatnonzero(scores[:, c] > box_ops.NO_SCORE)
        of_class = boxes[candidates, min(c, boxes.shape[1] - 1)]
        picked = greedy_nms(of_class, scores[candidates, c], iou_threshold)
        kept += [(scores[candidates[i], c], c, of_class[i]) for i in picked]
    return sorted(kept, key=lambda found: -found[0])[:max_output]


@pytest.mark.parametrize("max_output", [6, 1000])
@pytest.mark.parametrize("boxes_per_candidate", [1, 3])
def test_nms_equals_a_greedy_loop(boxes_per_candidate, max_output):
    rng = np.random.default_rng(6)
    boxes = random_boxes(rng, 4, 60, boxes_per_candidate, high=40)
    scores = rng.random((4, 60, 3)).astype(np.float32)
    scores[rng.random(scores.shape) < [[[0]], [[0.3]], [[0.95]], [[1]]]] = box_ops.NO_SCORE
    options = dict(iou_threshold=0.4, max_output=max_output)
    kept_boxes, kept_scores, kept_classes, is_valid = nms(boxes, scores, **options)
    assert kept_boxes.shape == (4, max_output, 4)
    for n in range(4):
        expected = slow_nms(boxes[n], scores[n], **options)
        assert is_valid[n].tolist() == [i < len(expected) for i in range(max_output)]
        assert [(s, c) for s, c in zip(kept_scores[n], kept_classes[n])][: len(expected)] == [e[:2] for e in expected]
        for box, (_, _, expected_box) in zip(kept_boxes[n], expected):
            np.testing.assert_array_equal(box, expected_box)
        for x in (kept_boxes, kept_scores, kept_classes):
            assert not x[n][~is_valid[n]].any()


def test_nms_suppresses_strictly_above_the_threshold():
    boxes, scores = [[[[0, 0, 10, 10]], [[0, 0, 10, 5]]]], [[[0.9], [0.8]]]
    assert nms(boxes, scores, iou_threshold=0.5, max_output=2)[-1].tolist() == [[True, True]]
    assert nms(boxes, scores, iou_threshold=0.4999, max_output=2)[-1].tolist() == [[True, False]]


def slow_soft_nms(boxes, scores, *, kind, iou_threshold, sigma, score_threshold, max_output):
    """Soft-NMS of one class after the other, as the paper writes it, then the best: list of (score, class, box)."""
    found = []
    for c in range(scores.shape[1]):
        class_boxes, left = boxes[:, min(c, boxes.shape[1] - 1)], dict(enumerate(scores[:, c].astype(np.float64)))
        while left:
            best = max(left, key=left.get)
            found.append((left.pop(best), c, class_boxes[best]))
            for i in left:
                iou = np_boxes.pairwise_iou(class_boxes[i], class_boxes[best])[0, 0]
                if kind == "gaussian":
                    left[i] *= np.exp(-(iou**2) / sigma)
                elif iou > iou_threshold:
                    left[i] *= 1 - iou
    return sorted((each for each in found if each[0] > score_threshold), key=lambda each: -each[0])[:max_output]


@pytest.mark.parametrize("kind", ["linear", "gaussian"])
@pytest.mark.parametrize("boxes_per_candidate", [1, 3])
def test_soft_nms_equals_a_slow_one(kind, boxes_per_candidate):
    rng = np.random.default_rng(8)
    boxes = random_boxes(rng, 2, 30, boxes_per_candidate, high=30)
    scores = rng.random((2, 30, 3)).astype(np.float32)
    scores[rng.random(scores.shape) < [[[0.2]], [[0.9]]]] = box_ops.NO_SCORE
    options = dict(kind=kind, iou_threshold=0.3, sigma=0.5, score_threshold=0.2, max_output=25)
    found = evaluate(lambda *arrays: box_ops.batched_soft_nms(*arrays, **options), boxes, scores)
    for n, (kept_boxes, kept_scores, kept_classes, is_valid) in enumerate(zip(*found)):
        expected = slow_soft_nms(boxes[n], scores[n], **options)
        assert is_valid.tolist() == [i < len(expected) for i in range(25)]
        assert kept_classes[is_valid].tolist() == [c for _, c, _ in expected]
        np.testing.assert_allclose(kept_scores[is_valid], [score for score, _, _ in expected], rtol=1e-5)
        np.testing.assert_array_equal(kept_boxes[is_valid], [box for _, _, box in expected])
        assert not kept_scores[~is_valid].any()


def test_soft_nms_keeps_what_nms_suppresses_with_less_score():
    boxes, scores = [[[[0.0, 0, 10, 10]], [[0, 0, 10, 8]], [[50, 50, 60, 60]]]], [[[0.9], [0.8], [0.7]]]
    options = dict(iou_threshold=0.5, sigma=0.5, score_threshold=0.05, max_output=5)
    for kind, score in (("linear", 0.8 * 0.2), ("gaussian", 0.8 * np.exp(-(0.8**2) / 0.5))):
        found = evaluate(lambda *arrays, k=kind: box_ops.batched_soft_nms(*arrays, kind=k, **options), boxes, scores)
        np.testing.assert_allclose(found[1][0], [0.9, 0.7, score, 0, 0], rtol=1e-5)


def test_nms_of_nothing():
    no_candidates, no_problems = np.zeros((2, 0, 1, 4)), np.zeros((0, 3, 1, 4))
    for boxes in (no_candidates, no_problems):
        kept = nms(boxes, boxes[..., 0], iou_threshold=0.5, max_output=4)
        assert kept[0].shape == (len(boxes), 4, 4) and kept[-1].shape == (len(boxes), 4)
        assert not kept[-1].any()


# ------------------------------------------------------------------------------------------------------------- RoIAlign


def sample_weights(low, high, size, resolution):
    """The linear map [2 * resolution, size] from one axis of a map to its samples between `low` and `high`."""
    weights = np.zeros((2 * resolution, size))
    cell = (np.float64(high) - low) / (2 * resolution)
    for i in range(2 * resolution):
        position = low + (i + 0.5) * cell - 0.5 + 1  # among the pixel centres of the extended axis
        if not 0 <= position <= size + 1:
            continue
        left = int(np.floor(position))
        for extended, share in ((left, 1 - (position - left)), (left + 1, position - left)):
            original = min(max(extended - 1, 0), size - 1)  # what the border repeats
            weights[i, original] += share if extended <= size + 1 else 0
    return weights


def slow_weights(boxes, height, width, resolution):
    """The linear map of RoIAlign from a map [H, W] to each RoI: [R, resolution, resolution, H, W]."""
    maps = []
    for x1, y1, x2, y2 in boxes:
        rows, columns = sample_weights(y1, y2, height, resolution), sample_weights(x1, x2, width, resolution)
        rows, columns = (w.reshape(resolution, 2, -1).mean(axis=1) for w in (rows, columns))
        maps.append(np.einsum("iy,jx->ijyx", rows, columns))
    return np.reshape(maps, (len(boxes), resolution, resolution, height, width))


ROIS = {
    "inside": [2.3, 1.7, 7.9, 4.2],
    "whole image": [0, 0, 11, 7],
    "on the top left border": [0, 0, 3, 2.5],
    "on the bottom right border": [8.2, 5.1, 11, 7],
    "thinner than a pixel": [4.4, 1, 4.6, 6],
    "a tenth of a pixel": [5.95, 2.95, 6.05, 3.05],
    "beyond the border": [-3, -2, 14, 9],
    "outside": [20, 20, 25, 25],
    "empty": [4, 4, 4, 4],
}


@pytest.mark.parametrize("resolution", [1, 2, 7])
@pytest.mark.parametrize("many_channels", [1024, 2], ids=["at once", "lean"])
def test_roi_align_and_its_gradient_equal_the_definition(many_channels, resolution, monkeypatch):
    monkeypatch.setattr(box_ops, "MANY_CHANNELS", many_channels)
    rng = np.random.default_rng(7)
    features = rng.normal(size=(3, 7, 11, 2)).astype(np.float32)
    boxes = np.float32([*ROIS.values(), *random_boxes(rng, 10, low=-1, high=8, size=3)])
    image_index = rng.integers(0, 3, len(boxes)).astype(np.int32)
    upstream = rng.normal(size=(len(boxes), resolution, resolution, 2)).astype(np.float32)

    def build(features, boxes, image_index, upstream):
        crops = box_ops.roi_align(box_ops.extend_border(features), boxes, image_index, resolution=resolution)
        assert tf.gradients(crops, boxes) == [None]
        return crops, tf.gradients(crops, features, upstream)[0]

    crops, gradient = evaluate(build, features, boxes, image_index, upstream)
    weights = slow_weights(boxes, 7, 11, resolution)
    expected = np.einsum("rijyx,ryxc->rijc", weights, features[image_index])
    np.testing.assert_allclose(crops, expected, rtol=1e-4, atol=1e-4)
    expected_gradient = np.zeros(features.shape)
    np.add.at(expected_gradient, image_index, np.einsum("rijyx,rijc->ryxc", weights, upstream))
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_roi_align_without_the_half_pixel_equals_torchvision_s_definition():
    """Sample by sample: pixel centres at + 0; samples up to a pixel beyond the map take its border, others are 0; no
    RoI is narrower than a cell."""
    rng = np.random.default_rng(8)
    features = rng.normal(size=(1, 7, 11, 2)).astype(np.float32)
    boxes = np.float32([*ROIS.values(), *random_boxes(rng, 10, low=-1, high=8, size=3)])

    def value(y, x):
        if not (-1 <= y <= 7 and -1 <= x <= 11):
            return np.zeros(2)
        y, x = min(max(y, 0), 6), min(max(x, 0), 10)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, 6), min(left + 1, 10)
        upper, lower = (
            features[0, i, left] * (left + 1 - x) + features[0, i, right] * (x - left) for i in (top, bottom)
        )
        return upper * (top + 1 - y) + lower * (y - top)

    def cell(box, i, j):
        x1, y1, x2, y2 = np.float64(box)
        width, height = max(x2 - x1, 1.0) / 3, max(y2 - y1, 1.0) / 3
        places = [(y1 + (i + a) * height, x1 + (j + b) * width) for a in (0.25, 0.75) for b in (0.25, 0.75)]
        return np.mean([value(*place) for place in places], axis=0)

    crops = evaluate(
        lambda features, boxes: box_ops.roi_align(
            box_ops.extend_border(features), boxes, tf.zeros(len(ROIS) + 10, tf.int32), resolution=3, half_pixel=False
        ),
        features,
        boxes,
    )
    expected = [[[cell(box, i, j) for j in range(3)] for i in range(3)] for box in boxes]
    np.testing.assert_allclose(crops, expected, atol=1e-4)


def adaptive_roi_align(features, boxes, image_index, upstream=None):
    def build(features, boxes, image_index):
        extended = box_ops.extend_border(features)
        crops = box_ops.roi_align(extended, boxes, image_index, resolution=2, adaptive=True)
        return crops, tf.gradients(crops, features, upstream)[0]

    return evaluate(build, features, np.float32(boxes), np.int32(image_index))


def test_adaptive_roi_align_takes_a_sample_per_pixel():
    """Detectron2's `sampling_ratio=0`: of cells of 3.4 x 1.2 pixels, 4 x 2 samples; of empty ones, one."""
    rng = np.random.default_rng(9)
    features = rng.normal(size=(2, 9, 14, 3)).astype(np.float32)
    boxes = np.float32([*ROIS.values(), *random_boxes(rng, 30, low=-1, high=8, size=4)])
    image_index = rng.integers(0, 2, len(boxes))
    upstream = rng.normal(size=(len(boxes), 2, 2, 3)).astype(np.float32)
    crops, gradient = adaptive_roi_align(features, boxes, image_index, upstream)
    counts = set()
    for box, image, crop in zip(boxes, image_index, crops):
        across, down = (max(int(np.ceil((box[i + 2] - box[i]) / np.float32(2))), 1) for i in (0, 1))
        counts.add((across, down))
        rows = sample_weights(box[1], box[3], 9, down).reshape(2, down, 9).mean(axis=1)
        columns = sample_weights(box[0], box[2], 14, across).reshape(2, across, 14).mean(axis=1)
        np.testing.assert_allclose(crop, np.einsum("iy,jx,yxc->ijc", rows, columns, features[image]), atol=1e-4)
    assert len(counts) > 8
    other = rng.normal(size=features.shape).astype(np.float32)
    of_other, _ = adaptive_roi_align(other, boxes, image_index, upstream)
    np.testing.assert_allclose(np.sum(gradient * other), np.sum(of_other * upstream), rtol=1e-3)  # it is linear


def test_adaptive_roi_align_of_no_rois():
    crops, gradient = adaptive_roi_align(np.ones((1, 4, 4, 3), np.float32), np.zeros((0, 4)), np.zeros(0))
    assert crops.shape == (0, 2, 2, 3)
    assert not gradient.any()


def test_roi_align_of_a_ramp_is_the_ramp_at_the_centres_of_the_cells():
    rows, columns = np.mgrid[:8, :9] + 0.5
    ramp = np.float32(3 * columns + 10 * rows)[None, :, :, None]
    crop = evaluate(
        lambda features, boxes: box_ops.roi_align(box_ops.extend_border(features), boxes, [0], resolution=2),
        ramp,
        [[1, 2, 5, 3.0]],
    )
    np.testing.assert_allclose(
        crop[0, :, :, 0], [[3 * 2 + 10 * 2.25, 3 * 4 + 10 * 2.25], [3 * 2 + 10 * 2.75, 3 * 4 + 10 * 2.75]], rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_maps_are_extended_by_what_is_next_to_the_border(dtype):
    features = np.arange(12, dtype=np.float32).reshape(1, 3, 4, 1)
    extended = evaluate(lambda x: box_ops.extend_border(tf.cast(x, dtype)), features)
    assert extended.dtype == np.float32
    np.testing.assert_array_equal(
        extended[0, :, :, 0],
        [[0, 0, 1, 2, 3, 3], [0, 0, 1, 2, 3, 3], [4, 4, 5, 6, 7, 7], [8, 8, 9, 10, 11, 11], [8, 8, 9, 10, 11, 11]],
    )


# --------------------------------------------------------------------------------------------------------------- levels


def roi_levels(boxes, num_levels=4):
    return evaluate(lambda boxes: box_ops.roi_level(boxes, num_levels=num_levels), np.float32(boxes)).tolist()


def test_roi_level_by_hand():
    """2 to 5 for sides below 112, from 112, from 224 and from 448 pixels; levels count from 0 here."""
    sides = [0, 1, 50, 111.9, 112, 223.9, 224, 447, 448, 449, 2000]
    assert roi_levels([[7, 9, 7 + side, 9 + side] for side in sides]) == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3]


def test_roi_level_depends_on_the_area():
    assert roi_levels([[0, 0, 896, 56], [0, 0, 56, 896], [0, 0, 56, 890], [0, 0, 9000, 1]]) == [2, 2, 1, 0]


def test_roi_level_has_an_epsilon_inside_the_logarithm():
    """0.5 - 0.67e-6 plus 1e-6 is above a half; with the epsilon outside the logarithm it would stay below."""
    assert roi_levels([[0, 0, 111.99985, 111.99985], [0, 0, 111.9995, 111.9995]]) == [1, 0]


def test_roi_level_stays_within_the_pyramid():
    assert roi_levels([[0, 0, side, side] for side in (10, 300, 1000, 5000.0)], num_levels=2) == [0, 1, 1, 1]
    assert roi_levels([[0, 0, side, side] for side in (10, 300, 1000, 5000.0)], num_levels=5) == [0, 2, 4, 4]


STRIDES = [4, 8, 16, 32]


def multilevel_roi_align(pyramid, boxes, image_index, strides=STRIDES):
    """The crops and the gradients of their sum of squares by the pyramid."""

    def build(boxes, image_index, *pyramid):
        extended = [box_ops.extend_border(x) for x in pyramid]
        crops = box_ops.multilevel_roi_align(extended, strides, boxes, image_index, resolution=2)
        assert tf.gradients(crops, boxes) == [None]
        return crops, tf.gradients(tf.reduce_sum(crops * crops), pyramid)

    return evaluate(build, np.float32(boxes), np.int32(image_index), *pyramid)


def pyramid_of(rng, strides):
    return [rng.normal(size=(2, 512 // stride, 640 // stride, 3)).astype(np.float32) for stride in strides]


def test_multilevel_roi_align_takes_each_roi_from_its_level_and_keeps_the_order():
    rng = np.random.default_rng(8)
    pyramid = pyramid_of(rng, STRIDES)
    sides = np.array([500, 30, 230, 120, 60, 490, 111, 300, 150])
    levels = [3, 0, 2, 1, 0, 3, 0, 2, 1]
    corners = np.stack([np.linspace(0, 130, 9), np.linspace(10, 0, 9)], axis=1)
    boxes = np.concatenate([corners, corners + sides[:, None]], axis=1).astype(np.float32)
    image_index = np.arange(9) % 2
    crops, gradients = multilevel_roi_align(pyramid, boxes, image_index)
    expected_gradients = [np.zeros(x.shape) for x in pyramid]
    for box, level, image, crop in zip(boxes, levels, image_index, crops):
        weights = slow_weights([box / STRIDES[level]], *pyramid[level].shape[1:3], 2)[0]
        expected = np.einsum("ijyx,yxc->ijc", weights, pyramid[level][image])
        np.testing.assert_allclose(crop, expected, rtol=1e-3, atol=1e-4)
        expected_gradients[level][image] += np.einsum("ijyx,ijc->yxc", weights, 2 * expected)
    for gradient, expected in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4)


def test_multilevel_roi_align_of_one_level_takes_every_roi_from_it():
    rng = np.random.default_rng(9)
    pyramid = pyramid_of(rng, [16])
    boxes = np.float32([[10, 20, 40, 60], [0, 0, 600, 500]])
    crops, _ = multilevel_roi_align(pyramid, boxes, [1, 0], strides=[16])
    weights = slow_weights(boxes / 16, 32, 40, 2)
    np.testing.assert_allclose(crops, np.einsum("rijyx,ryxc->rijc", weights, pyramid[0][[1, 0]]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strides", [STRIDES, [16]])
def test_multilevel_roi_align_of_no_rois(strides):
    pyramid = pyramid_of(np.random.default_rng(10), strides)
    crops, gradients = multilevel_roi_align(pyramid, np.zeros((0, 4)), [], strides=strides)
    assert crops.shape == (0, 2, 2, 3)
    assert all(not gradient.any() for gradient in gradients)
