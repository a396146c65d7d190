"""Non-maximum suppression against a greedy loop in NumPy, in the form for CPUs and in that for GPUs."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import evaluate, greedy_nms, random_boxes

from common import boxes as np_boxes
from modeling import device, nms


@pytest.fixture(params=[False, True], ids=["for a CPU", "for a GPU"])
def form(request):
    """Builds the graphs of a test in both forms; the one for GPUs takes tiles of 20 candidates, to need several."""
    with device.building_for(gpu=request.param), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nms, "TILE", 20)
        yield request.param


def detect(boxes, scores, **options):
    return evaluate(lambda *arrays: nms.detect(*arrays, **options), np.float32(boxes), np.float32(scores))


def slow_nms(boxes, scores, *, iou_threshold, max_output):
    """One problem, boxes [A, Q, 4], scores [A, C]: the kept (score, class, box), best first."""
    kept = []
    for c in range(scores.shape[1]):
        candidates = np.flatnonzero(scores[:, c] > nms.NO_SCORE)
        of_class = boxes[candidates, min(c, boxes.shape[1] - 1)]
        picked = greedy_nms(of_class, scores[candidates, c], iou_threshold)
        kept += [(scores[candidates[i], c], c, of_class[i]) for i in picked]
    return sorted(kept, key=lambda found: -found[0])[:max_output]


@pytest.mark.parametrize("max_output", [6, 1000])
@pytest.mark.parametrize("boxes_per_candidate", [1, 3])
def test_detections_equal_a_greedy_loop(boxes_per_candidate, max_output, form):
    rng = np.random.default_rng(6)
    boxes = random_boxes(rng, 4, 60, boxes_per_candidate, high=40)
    scores = rng.random((4, 60, 3)).astype(np.float32)
    scores[rng.random(scores.shape) < [[[0]], [[0.3]], [[0.95]], [[1]]]] = nms.NO_SCORE
    options = dict(iou_threshold=0.4, max_output=max_output)
    kept_boxes, kept_scores, kept_classes, is_valid = detect(boxes, scores, **options)
    assert kept_boxes.shape == (4, max_output, 4)
    for n in range(4):
        expected = slow_nms(boxes[n], scores[n], **options)
        assert is_valid[n].tolist() == [i < len(expected) for i in range(max_output)]
        assert [(s, c) for s, c in zip(kept_scores[n], kept_classes[n])][: len(expected)] == [e[:2] for e in expected]
        for box, (_, _, expected_box) in zip(kept_boxes[n], expected):
            np.testing.assert_array_equal(box, expected_box)
        for x in (kept_boxes, kept_scores, kept_classes):
            assert not x[n][~is_valid[n]].any()


def test_a_problem_that_is_solved_at_once_does_not_end_another(form):
    """A chain, of which each box overlaps only the next, takes many rounds; distant boxes take one."""
    left = 4 * np.arange(80.0)[:, None]
    chain = np.concatenate([left, 0 * left, left + 10, 0 * left + 10], axis=1)
    distant = np.concatenate([20 * left, 0 * left, 20 * left + 10, 0 * left + 10], axis=1)
    for order in ((chain, distant), (distant, chain)):
        index, is_valid = evaluate(
            lambda boxes, is_candidate: nms.suppress(boxes, is_candidate, iou_threshold=0.4, max_output=80, strips=2),
            np.float32(order),
            np.ones((2, 80), bool),
        )
        for problem, boxes in enumerate(order):
            expected = list(range(0, 80, 2)) if boxes is chain else list(range(80))
            assert index[problem][is_valid[problem]].tolist() == expected


def test_detections_are_suppressed_strictly_above_the_threshold(form):
    boxes, scores = [[[[0, 0, 10, 10]], [[0, 0, 10, 5]]]], [[[0.9], [0.8]]]
    assert detect(boxes, scores, iou_threshold=0.5, max_output=2)[-1].tolist() == [[True, True]]
    assert detect(boxes, scores, iou_threshold=0.4999, max_output=2)[-1].tolist() == [[True, False]]


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
def test_soft_nms_equals_a_slow_one(kind, boxes_per_candidate, form):
    rng = np.random.default_rng(8)
    boxes = random_boxes(rng, 2, 30, boxes_per_candidate, high=30)
    scores = rng.random((2, 30, 3)).astype(np.float32)
    scores[rng.random(scores.shape) < [[[0.2]], [[0.9]]]] = nms.NO_SCORE
    options = dict(kind=kind, iou_threshold=0.3, sigma=0.5, score_threshold=0.2, max_output=25)
    found = evaluate(lambda *arrays: nms.detect_softly(*arrays, **options), boxes, scores)
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
        found = evaluate(lambda *arrays, k=kind: nms.detect_softly(*arrays, kind=k, **options), boxes, scores)
        np.testing.assert_allclose(found[1][0], [0.9, 0.7, score, 0, 0], rtol=1e-5)


def test_nms_of_nothing(form):
    no_candidates, no_problems = np.zeros((2, 0, 1, 4)), np.zeros((0, 3, 1, 4))
    for boxes in (no_candidates, no_problems):
        kept = detect(boxes, boxes[..., 0], iou_threshold=0.5, max_output=4)
        assert kept[0].shape == (len(boxes), 4, 4) and kept[-1].shape == (len(boxes), 4)
        assert not kept[-1].any()


# ---------------------------------------------------------------------------------------------------- one class, sorted


def clusters(rng, count, size):
    """Problems of boxes around a few centres, as proposals are: float32 [count, size, 4]."""
    center, side = rng.uniform(0, 400, (count, 12, 2)), rng.uniform(20, 300, (count, 12, 2))
    which = rng.integers(0, 12, (count, size))
    center, side = (np.take_along_axis(x, which[..., None], axis=1) for x in (center, side))
    center, side = center + rng.normal(0, 0.1, side.shape) * side, side * np.exp(rng.normal(0, 0.15, side.shape))
    return np.concatenate([center - side / 2, center + side / 2], axis=2).astype(np.float32)


def problems(rng):
    """A thousand problems of 40 sorted boxes, in groups: on a grid, with ties and duplicates; clustered; all equal; far
    apart; empty; float32 [1000, 40, 4], bool [1000, 40]."""
    corner, side = rng.integers(0, 20, (400, 40, 2)), rng.integers(0, 10, (400, 40, 2))
    grid = np.concatenate([corner, corner + side], axis=2).astype(np.float32)
    equal = np.tile(np.float32([3, 4, 30, 40]), (50, 40, 1))
    apart = np.tile(np.float32([0, 0, 5, 5]), (50, 40, 1)) + 10 * np.arange(40, dtype=np.float32)[:, None]
    empty = grid[:100, :, [0, 1, 0, 3]]
    boxes = np.concatenate([grid, clusters(rng, 400, 40), equal, apart, empty])
    return boxes, rng.random(boxes.shape[:2]) < rng.choice([0, 0.1, 0.9, 1], (len(boxes), 1))


def suppress(boxes, is_candidate, **options):
    return evaluate(lambda *arrays: nms.suppress(*arrays, **options), boxes, is_candidate)


@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 0.7])
def test_suppression_equals_a_greedy_loop(iou_threshold, form):
    boxes, is_candidate = problems(np.random.default_rng(11))
    index, is_valid = suppress(boxes, is_candidate, iou_threshold=iou_threshold, max_output=25)
    assert (index.dtype, index.shape) == (np.int64, (1000, 25))
    for box, candidate, found, valid in zip(boxes, is_candidate, index, is_valid):
        candidates = np.flatnonzero(candidate)
        picked = greedy_nms(box[candidates], -np.arange(len(candidates)), iou_threshold)
        expected = candidates[picked][:25].tolist()
        assert found[valid].tolist() == expected and valid.tolist() == [i < len(expected) for i in range(25)]
        assert not found[~valid].any()


def test_both_forms_pick_the_same_of_two_thousand_clustered_boxes():
    boxes = clusters(np.random.default_rng(12), 3, 2000)
    found = []
    for gpu in (False, True):
        with device.building_for(gpu=gpu):
            found.append(suppress(boxes, np.ones((3, 2000), bool), iou_threshold=0.7, max_output=2000))
    np.testing.assert_array_equal(*(index for index, _ in found))
    np.testing.assert_array_equal(*(valid for _, valid in found))
    assert 100 < found[0][1].sum(axis=1).min() < 1900


@pytest.mark.parametrize("rounds", [1, 2])
def test_long_chains_of_dependence_take_more_looks(rounds, monkeypatch):
    """Each box overlaps only its neighbours: every second one is kept, which takes a round per box."""
    monkeypatch.setattr(nms, "ROUNDS", rounds)
    left = np.arange(60, dtype=np.float32)[:, None] * 4
    boxes = np.concatenate([left, left * 0, left + 10, left * 0 + 10], axis=1)[None]
    with device.building_for(gpu=True):
        index, is_valid = suppress(boxes, np.ones((1, 60), bool), iou_threshold=0.4, max_output=60)
    assert index[is_valid].tolist() == list(range(0, 60, 2))


def test_no_op_of_the_form_for_gpus_is_for_cpus_alone():
    with device.building_for(gpu=True), tf.Graph().as_default() as graph:
        nms.suppress(tf.zeros([2, 9, 4]), tf.ones([2, 9], tf.bool), iou_threshold=0.5, max_output=9)
        nms.detect(tf.zeros([2, 9, 1, 4]), tf.ones([2, 9, 3]), iou_threshold=0.5, max_output=9)
    assert not [op.type for op in graph.get_operations() if "NonMax" in op.type]
