"""Boxes in TensorFlow against slow definitions in NumPy and cases worked by hand."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import decode, encode, evaluate, random_boxes

from modeling import box_ops, device

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


# ------------------------------------------------------------------------------------------- gathering and the largest


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_gathering_per_image_and_its_gradient(dtype):
    """The gradient adds in float32: 512 times 1.0 and once 300 in bfloat16 would stop at 256."""
    values = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    index = np.int64([[3, 0] + [1] * 512, [2, 2] + [0] * 512])

    def build(values, index):
        values = tf.cast(values, dtype)
        gathered = box_ops.gather(values, index)
        return tf.cast(gathered, tf.float32), tf.cast(tf.gradients(gathered, values)[0], tf.float32)

    gathered, gradient = evaluate(build, values, index)
    np.testing.assert_array_equal(gathered, np.stack([values[0][index[0]], values[1][index[1]]]))
    counts = [[1, 512, 0, 1], [512, 0, 2, 0]]
    np.testing.assert_array_equal(gradient, np.repeat(np.float32(counts)[..., None], 3, axis=2))


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize("size, k", [(1, 1), (5, 5), (300, 7), (300, 40), (301, 300), (17, 2), (16, 0)])
def test_the_largest_come_in_order_and_ties_by_index(size, k, is_long):
    values = np.random.default_rng(size).integers(0, 30, (3, size)).astype(np.float32)
    values[1] = 7.0
    with device.building_for(gpu=True):
        best, index = evaluate(lambda x: box_ops.top_k(x, tf.constant(k), is_long=is_long), values)
    expected = np.argsort(-values, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_array_equal(best, np.take_along_axis(values, expected, axis=1))


def test_a_share_counts_what_is_in_both():
    """Two of three; the part may have more; of nothing the share is 0."""
    whole, part = [True, True, False, True, False], [True, False, True, True, True]
    assert evaluate(box_ops.share, np.array(part), np.array(whole)) == pytest.approx(2 / 3)
    assert evaluate(box_ops.share, np.array(part), np.zeros(5, bool)) == 0


def test_the_largest_of_long_rows_are_none_of_the_padding():
    """All values are negative, and the parts of the row need padding."""
    values = -np.random.default_rng(3).permutation(1001).astype(np.float32)[None] - 1
    with device.building_for(gpu=True):
        best, index = evaluate(lambda x: box_ops.top_k(x, 20, is_long=True), values)
    np.testing.assert_array_equal(best[0], -np.arange(1, 21))
    np.testing.assert_array_equal(values[0, index[0]], best[0])


def test_the_sum_of_coordinates_and_its_gradient():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    total, gradient = evaluate(lambda x: (y := box_ops.sum_of_coordinates(x), tf.gradients(y * y, x)[0]), x)
    np.testing.assert_array_equal(total, x.sum(axis=2))
    np.testing.assert_array_equal(gradient, np.repeat(2 * x.sum(axis=2, keepdims=True), 4, axis=2))
