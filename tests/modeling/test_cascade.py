"""The cascade's boxes, gradients and probabilities against NumPy."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import decode, evaluate, random_boxes

from common import boxes as np_boxes
from modeling import cascade

WEIGHTS = [(10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)]
SHAPES = [[60, 70], [50, 90]]
MAX_LOG_SIZE = 0.3


def run_cascade(boxes, is_valid, deltas, build_more=lambda *_: ()):
    """The stages, the last boxes, and what `build_more` makes of them; head `index` returns deltas[index]."""

    def build(boxes, is_valid, image_shape, deltas):
        def head(index, boxes, is_valid):
            return tf.reshape(tf.where(is_valid[..., None], boxes * 0.01, -1.0), [-1, 4]), deltas[index]

        stages, last = cascade.cascade(
            boxes, is_valid, image_shape, head=head, weights=WEIGHTS, max_log_size=MAX_LOG_SIZE
        )
        return stages, last, build_more(stages, last, deltas)

    return evaluate(build, np.float32(boxes), is_valid, np.int32(SHAPES), np.float32(deltas))


def slow_refine(boxes, deltas, weights):
    """[N, S, 4] and [N * S, 1, 4]: decoded and clipped."""
    deltas = deltas.reshape(boxes.shape) / weights
    refined = [[decode(d, b, max_log_size=MAX_LOG_SIZE) for d, b in zip(*image)] for image in zip(deltas, boxes)]
    return np.stack([np_boxes.clip(np.float32(of_image), *shape) for of_image, shape in zip(refined, SHAPES)])


def test_each_stage_sees_what_the_one_before_refined():
    """Decoded with that stage's weights, and clipped; what is empty then is invalid from there on."""
    rng = np.random.default_rng(0)
    boxes = random_boxes(rng, 2, 30, high=60)
    is_valid = rng.random((2, 30)) < 0.8
    deltas = (rng.normal(0, 1, (3, 60, 1, 4)) * np.array(WEIGHTS)[:, None, None]).astype(np.float32)
    stages, last, _ = run_cascade(boxes, is_valid, deltas)
    for index, stage in enumerate(stages):
        np.testing.assert_allclose(stage.boxes, boxes, rtol=1e-3, atol=1e-2)
        np.testing.assert_array_equal(stage.is_valid, is_valid)
        seen = np.where(stage.is_valid[..., None], stage.boxes * 0.01, -1.0)
        np.testing.assert_allclose(stage.class_logits, seen.reshape(-1, 4), rtol=1e-5)
        np.testing.assert_array_equal(stage.deltas, deltas[index])
        boxes = slow_refine(stage.boxes, deltas[index], WEIGHTS[index])
        is_valid = is_valid & (boxes[..., 2:] > boxes[..., :2]).all(axis=2)
    np.testing.assert_allclose(last, boxes, rtol=1e-3, atol=1e-2)
    counts = [stage.is_valid.sum() for stage in stages]
    assert counts[0] > counts[1] > counts[2] > 10


def test_what_becomes_empty_stays_invalid():
    """The first box moves out of its image, and the second stage would move it back."""
    boxes = [[[10, 10, 20, 20], [30, 30, 40, 40]]] * 2
    deltas = np.zeros((3, 4, 1, 4))
    deltas[0, 0, 0, 0], deltas[1, 0, 0, 0] = 100 * WEIGHTS[0][0], -100 * WEIGHTS[1][0]
    stages, _, _ = run_cascade(boxes, np.ones((2, 2), bool), deltas)
    assert [stage.is_valid.tolist() for stage in stages] == [
        [[True, True], [True, True]],
        [[False, True], [True, True]],
        [[False, True], [True, True]],
    ]


def test_boxes_that_are_not_finite_become_empty():
    """RoIAlign cannot sample outside of all numbers: the next stage gets zeros, which are not valid."""
    deltas = np.zeros((3, 4, 1, 4))
    deltas[0, 1, 0, 1], deltas[0, 2, 0, 2] = np.nan, np.nan
    stages, last, _ = run_cascade([[[10, 10, 20, 20], [30, 30, 40, 40]]] * 2, np.ones((2, 2), bool), deltas)
    assert stages[1].is_valid.tolist() == [[True, False], [False, True]]
    assert all(np.isfinite(boxes).all() for boxes in (stages[1].boxes, stages[2].boxes, last))
    np.testing.assert_array_equal(stages[1].boxes[0, 1, [1, 3]], 0)


def test_no_gradient_flows_through_the_boxes():
    def check(stages, last, deltas):
        boxes = [stage.boxes for stage in stages[1:]] + [last]
        logits = [stage.class_logits for stage in stages]
        assert tf.gradients(boxes, deltas) == [None]
        assert tf.gradients(logits, deltas) == [None]
        return ()

    run_cascade([[[10, 10, 20, 20]]] * 2, np.ones((2, 1), bool), np.zeros((3, 2, 1, 4)), check)


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_scaled_gradient(dtype):
    x = np.random.default_rng(1).normal(size=50).astype(np.float32)

    def build(x):
        y = cascade.scale_gradient(tf.cast(x, dtype), 1 / 3)
        assert y.dtype == dtype
        return tf.cast(tf.cast(x, dtype), tf.float32), tf.cast(y, tf.float32), tf.gradients(5 * y, x)[0]

    x, y, gradient = evaluate(build, x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_allclose(gradient, np.full(50, 5 / 3), rtol=1e-2 if dtype == tf.bfloat16 else 1e-6)


def test_probabilities_are_the_mean_of_the_stages_softmax():
    logits = np.random.default_rng(2).normal(0, 3, (3, 7, 5)).astype(np.float32)
    mean = evaluate(
        lambda logits: cascade.mean_probabilities([cascade.Stage(None, None, x, None) for x in tf.unstack(logits, 3)]),
        logits,
    )
    odds = np.exp(np.float64(logits))
    np.testing.assert_allclose(mean, (odds / odds.sum(axis=2, keepdims=True)).mean(axis=0), rtol=1e-5)
