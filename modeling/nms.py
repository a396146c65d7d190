"""Non-maximum suppression of many problems at once: B images, or images and levels. No variables, no settings.

Greedy suppression within a problem: each box, best first, suppresses the following boxes of its class whose IoU with it
exceeds a threshold. Boxes of equal score count in the order of their indices. On a GPU no op does this without waiting
for the host, so it is composed of others there: see `_greedy`. `device.is_gpu` chooses the form.

Shapes: B problems, A candidates, T candidates of a tile, C classes, Q = 1 (a box shared by the classes) or C, D
detections. boxes: float32 [..., 4], x1 y1 x2 y2 in pixels.
"""

from typing import NamedTuple

import tensorflow as tf

from . import box_ops, device
from .layers import shape_list

NO_SCORE = -1.0  # score of boxes that are not candidates
ROUNDS = 8  # of `_greedy` between two looks at whether it has settled
TILE = 1000  # candidates that `_detect_in_tiles` takes at a time
FLAG = tf.bfloat16  # dtype of matrices of 0 and 1: their products count from zero, and need only differ from it


def suppress(boxes, is_candidate, *, iou_threshold, max_output, strips=2):
    """Suppresses boxes of one class that are sorted, best first.

    Args:
        boxes: float32 [B, A, 4]. is_candidate: bool [B, A]. max_output: integer or int32 scalar, A at most.
        strips: of the matrix of pairs, for a GPU. Of S strips, a share of (S + 1) / 2S of the matrix is computed; each
            has launches of its own.
    Returns:
        index int64 [B, max_output] into A, ascending, 0 where not valid; is_valid bool [B, max_output]
    """
    boxes = tf.stop_gradient(boxes)
    countdown = _countdown(tf.shape(boxes)[1])
    if not device.is_gpu():
        return _suppress_on_cpu(boxes, is_candidate, countdown, iou_threshold, max_output)
    overlaps = _strips(_sides(boxes), iou_threshold, countdown, count=strips)
    is_kept, is_settled = _greedy(overlaps, is_candidate, is_candidate)
    is_kept, _ = tf.while_loop(
        lambda _, is_settled: ~tf.reduce_all(is_settled),
        lambda is_kept, _: _greedy(overlaps, is_candidate, is_kept),
        (is_kept, is_settled),
        parallel_iterations=1,
    )
    return _first(is_kept, countdown, max_output)


def _countdown(size):
    """Numbers that fall from `size` to 1: float32 [A], scores of sorted boxes. Exact and positive, unlike logits."""
    return tf.cast(tf.range(size, 0, -1), tf.float32)


def _first(is_kept, countdown, max_output):
    """Returns index int64 [B, max_output] of the first true entries of bool [B, A], 0 for the rest; whether valid."""
    value, index = tf.math.top_k(tf.where(is_kept, countdown, 0.0), max_output)
    is_valid = value > 0.0
    return tf.where(is_valid, tf.cast(index, tf.int64), 0), is_valid


def _suppress_on_cpu(boxes, is_candidate, countdown, iou_threshold, max_output):
    scores = tf.where(is_candidate, countdown, NO_SCORE)
    _, kept, _, is_valid = _combined(boxes[:, :, None], scores[:, :, None], iou_threshold, max_output)
    first = tf.cast(tf.shape(boxes)[1], tf.int64)
    return tf.where(is_valid, first - tf.cast(kept, tf.int64), 0), is_valid


def _sides(boxes):
    """Returns x1, y1, x2, y2 and the area of boxes [B, A, 4]: float32 [B, 5, A]."""
    return tf.stack([*tf.unstack(boxes, axis=-1), box_ops.area(boxes)], axis=1)


def _overlaps(sides, others, iou_threshold):
    """Whether the IoU of boxes exceeds the threshold: `_sides` [B, 5, A] and [B, 5, K] -> bool [B, A, K].

    The threshold is a number, or float32 [A, K]. The result has the bits of `box_ops.pairwise_iou`, in fewer passes:
    with the union of two empty boxes, 0 / 0 is NaN, which exceeds nothing; one side's clipping at 0 keeps the product
    of two negative sides from counting.
    """
    x1, y1, x2, y2, area = _as_rows(*tf.unstack(sides, axis=1))
    other_x1, other_y1, other_x2, other_y2, other_area = _as_columns(*tf.unstack(others, axis=1))
    width = tf.maximum(tf.minimum(x2, other_x2) - tf.maximum(x1, other_x1), 0.0)
    intersection = width * (tf.minimum(y2, other_y2) - tf.maximum(y1, other_y1))
    return intersection / ((area + other_area) - intersection) > iou_threshold


def _as_rows(*tensors):
    """[B, A] -> [B, A, 1] of each. An indexing with None is a launch on a GPU, this none."""
    return [tf.expand_dims(x, 2) for x in tensors]


def _as_columns(*tensors):
    """[B, K] -> [B, 1, K] of each."""
    return [tf.expand_dims(x, 1) for x in tensors]


def _strips(sides, iou_threshold, countdown, *, count, class_index=None):
    """Computes which boxes may suppress which: of each box, all before it that overlap it and have its class.

    Of the matrix of all pairs, the part below the diagonal suffices: it comes in strips of rows, each up to its end.

    Args:
        sides: float32 [B, 5, A], of `_sides`. countdown: float32 [A]. count: of strips.
        class_index: int64 [B, A], or None if there is one class
    Returns:
        list of matrices of 0 and 1, [B, rows, columns]: each row is a box, each column one that may suppress it
    """
    size = tf.shape(sides)[2]
    bounds = [None, *(size * i // count for i in range(1, count)), None]
    strips = []
    for start, end in zip(bounds, bounds[1:]):
        is_before = tf.expand_dims(_part(countdown, start, end), 1) < _part(countdown, None, end)
        threshold = tf.where(is_before, iou_threshold, float("inf"))  # spares a pass over all problems' pairs
        may_suppress = _overlaps(_part(sides, start, end), _part(sides, None, end), threshold)
        if class_index is not None:
            may_suppress &= _same(_part(class_index, start, end), _part(class_index, None, end))
        strips.append(tf.cast(may_suppress, FLAG))
    return strips


def _part(x, start, end):
    """Returns x[..., start:end]; of the whole, an indexing is a launch, this none."""
    return x if start is None and end is None else x[..., start:end]


def _greedy(strips, is_candidate, is_kept):
    """Approaches the greedy choice as a fixed point, in ROUNDS: a box is kept if no kept box before it overlaps it.

    Whatever it starts from, each round settles at least one more box, and all whose chains of dependence are short: a
    few rounds solve even dense clusters. It is solved when a round changes nothing.

    Args:
        strips: see `_strips`. is_candidate: bool [B, A]. is_kept: bool [B, A], to start from.
    Returns:
        is_kept bool [B, A]; is_settled bool [B], whether the problem is solved
    """
    candidate, kept = _as_rows(tf.cast(is_candidate, FLAG), tf.cast(is_kept, FLAG))
    ends = [tf.shape(strip)[2] for strip in strips[:-1]]
    for _ in range(ROUNDS):
        last = kept
        suppressing = [tf.matmul(strip, kept[:, :end]) for strip, end in zip(strips, ends)]
        suppressing.append(tf.matmul(strips[-1], kept))
        count = tf.concat(suppressing, axis=1) if ends else suppressing[0]
        kept = tf.maximum(candidate - count, 0)  # 1 for a candidate that none suppresses, else 0
    return tf.squeeze(kept, 2) > 0, tf.reduce_all(tf.equal(last, kept), axis=[1, 2])


def detect(boxes, scores, *, iou_threshold, max_output):
    """Suppresses boxes within each class, and returns the best of all classes.

    Args:
        boxes: float32 [B, A, Q, 4]. scores: float32 [B, A, C], above 0, or NO_SCORE.
    Returns:
        boxes float32 [B, max_output, 4], scores [B, max_output], best first, class_index int64 [B, max_output],
            is_valid bool [B, max_output]; entries that are not valid are zero
    """
    if device.is_gpu():
        return _detect_in_tiles(boxes, scores, iou_threshold, max_output)
    boxes, scores, class_index, is_valid = _combined(boxes, scores, iou_threshold, max_output)
    return boxes, scores, tf.cast(class_index, tf.int64), is_valid


def _combined(boxes, scores, iou_threshold, max_output):
    """TensorFlow's op for CPUs, which solves one problem after another. It takes scores above 0 only."""
    kept = tf.image.combined_non_max_suppression(
        boxes,
        scores,
        max_output_size_per_class=max_output,
        max_total_size=max_output,
        iou_threshold=iou_threshold,
        score_threshold=0.0,
        clip_boxes=False,
    )
    is_valid = tf.sequence_mask(kept.valid_detections, max_output)
    return kept.nmsed_boxes, kept.nmsed_scores, kept.nmsed_classes, is_valid


class _State(NamedTuple):
    """What `_detect_in_tiles` has found, and where it stands. Candidates are ordered by falling score, rising index."""

    boxes: tf.Tensor  # float32 [B, D, 4], zero where there are none yet
    scores: tf.Tensor  # float32 [B, D], likewise
    class_index: tf.Tensor  # int64 [B, D]
    end_score: tf.Tensor  # float32 [B, 1], of the last candidate of the tiles that are solved
    end_index: tf.Tensor  # int64 [B, 1]
    is_kept: tf.Tensor  # bool [B, T], of the present tile; see `_greedy`
    is_done: tf.Tensor  # bool [B]


def _detect_in_tiles(boxes, scores, iou_threshold, max_output):
    """Takes the best TILE candidates of all classes at a time, until each problem has its results: mostly one tile."""
    b, count, classes = shape_list(scores)
    scores = tf.stop_gradient(tf.reshape(scores, [b, count * classes]))
    kinds = shape_list(boxes)[2]  # Q
    boxes = tf.stop_gradient(tf.reshape(boxes, [b, -1, 4]))
    size = tf.minimum(TILE, count * classes)
    sizes = dict(size=size, classes=classes, kinds=kinds)
    state = _State(
        boxes=tf.zeros([b, max_output, 4]),
        scores=tf.zeros([b, max_output]),
        class_index=tf.zeros([b, max_output], tf.int64),
        end_score=tf.fill([b, 1], float("inf")),
        end_index=tf.zeros([b, 1], tf.int64),
        is_kept=tf.ones([b, size], tf.bool),
        is_done=tf.zeros([b], tf.bool),
    )

    def look(*state):
        state = _State(*state)
        return _solved(state, _take_tile(boxes, scores, state, **sizes), iou_threshold)

    state = tf.while_loop(
        lambda *state: ~tf.reduce_all(_State(*state).is_done), look, look(*state), parallel_iterations=1
    )
    return state.boxes, state.scores, state.class_index, state.scores > 0.0


def _take_tile(boxes, scores, state, *, size, classes, kinds):
    """Returns the next `size` candidates after the end of the solved tiles.

    Args:
        boxes: float32 [B, A * Q, 4]. scores: float32 [B, A * C]. size: T. classes: C. kinds: Q.
    Returns:
        boxes float32 [B, T, 4], scores float32 [B, T], class_index int64 [B, T], index int64 [B, T] into `scores`
    """
    index = tf.cast(tf.range(tf.shape(scores)[1]), tf.int64)
    is_left = (scores < state.end_score) | (tf.equal(scores, state.end_score) & (index > state.end_index))
    best, index = box_ops.top_k(tf.where(is_left, scores, NO_SCORE), size, is_long=True)
    classes_per_box = tf.cast(classes // kinds, tf.int64)
    return box_ops.gather(boxes, index // classes_per_box), best, index % tf.cast(classes, tf.int64), index


def _solved(state, tile, iou_threshold):
    """Returns the state after ROUNDS more of the tile, and with its results added where it has settled."""
    boxes, scores, class_index, index = tile
    countdown = _countdown(tf.shape(scores)[1])
    is_found, sides = state.scores > 0.0, _sides(boxes)
    blocked = _overlaps(sides, _sides(state.boxes), iou_threshold) & _same(class_index, state.class_index)
    blocked &= tf.expand_dims(is_found, 1)
    is_candidate = (scores > 0.0) & ~tf.reduce_any(blocked, axis=2)
    strips = _strips(sides, iou_threshold, countdown, count=1, class_index=class_index)
    is_kept, is_settled = _greedy(strips, is_candidate, state.is_kept)
    found = [tf.concat(pair, axis=1) for pair in zip(state[:3], (boxes, scores, class_index))]
    slots = state.scores.shape[1]
    place, is_valid = _first(tf.concat([is_found, is_kept], axis=1), _countdown(slots + tf.shape(scores)[1]), slots)
    found = [box_ops.gather(x, place) for x in found]
    found = [tf.where(is_valid[..., None] if x.shape.rank == 3 else is_valid, x, tf.zeros([], x.dtype)) for x in found]
    end_score = tf.reduce_min(scores, axis=1, keepdims=True)  # infinite without candidates
    end_index = tf.reduce_max(tf.where(tf.equal(scores, end_score), index, -1), axis=1, keepdims=True)
    has_more = (end_score[:, 0] > 0.0) & tf.math.is_finite(end_score[:, 0])
    is_done = tf.reduce_all(is_valid, axis=1) | ~has_more
    new = _State(*found, end_score, end_index, tf.ones_like(is_kept), is_done)
    new = [_choose(is_settled, one, other) for one, other in zip(new, state._replace(is_kept=is_kept))]
    return _State(*[_choose(state.is_done, old, one) for old, one in zip(state, new)])


def _same(class_index, others):
    """Whether pairs have the same class: int64 [B, A], [B, K] -> bool [B, A, K]."""
    return tf.equal(*_as_rows(class_index), *_as_columns(others))


def _choose(condition, one, other):
    """Picks per problem: bool [B], [B, ...], [B, ...] -> [B, ...]."""
    return tf.where(tf.reshape(condition, [-1] + [1] * (one.shape.rank - 1)), one, other)


def detect_softly(boxes, scores, *, kind, iou_threshold, sigma, score_threshold, max_output):
    """Applies Soft-NMS (arXiv:1704.04503): a box that overlaps a better one of its class loses a part of its score.

    The loop repeatedly selects the best candidate of all classes; as scores only fall, this gives the same order as
    separate selections per class, merged by their final scores.

    Args:
        boxes, scores: as in `detect`
        kind: "linear": factor 1 - IoU above `iou_threshold`; "gaussian": factor exp(-IoU^2 / sigma)
        score_threshold: 0 or more; selected boxes need a final score above it
    Returns:
        as `detect`
    """
    b, count, classes = shape_list(scores)
    boxes = tf.broadcast_to(boxes, [b, count, classes, 4])
    problem, known_shape = tf.cast(tf.range(b), tf.int64), scores.shape
    dtypes = (tf.float32, tf.float32, tf.int64)

    def pick(i, scores, picks):
        best = tf.argmax(tf.reshape(scores, [b, count * classes]), axis=1)
        class_index = best % tf.cast(classes, tf.int64)
        place = tf.stack([problem, best // tf.cast(classes, tf.int64), class_index], axis=1)
        box, score = tf.gather_nd(boxes, place), tf.gather_nd(scores, place)
        rivals = tf.gather(boxes, class_index, axis=2, batch_dims=1)  # [B, A, 4]
        iou = box_ops.pairwise_iou(rivals, box[:, None])
        factor = (
            tf.exp(-tf.square(iou) / sigma) if kind == "gaussian" else tf.where(iou > iou_threshold, 1.0 - iou, 1.0)
        )
        is_rival = tf.one_hot(class_index, classes, True, False)[:, None]
        scores = tf.where(is_rival & (scores > 0.0), scores * factor, scores)
        scores = tf.tensor_scatter_nd_update(scores, place, tf.fill([b], NO_SCORE))
        picks = [array.write(i, x) for array, x in zip(picks, (box, score, class_index))]
        return i + 1, tf.ensure_shape(scores, known_shape), picks

    picks = [tf.TensorArray(dtype, max_output) for dtype in dtypes]
    _, _, picks = tf.while_loop(lambda i, *_: i < max_output, pick, (0, scores, picks))
    boxes, scores, class_index = (tf.transpose(x, [1, 0, *range(2, x.shape.rank)]) for x in (p.stack() for p in picks))
    is_valid = scores > score_threshold
    return tf.where(is_valid[..., None], boxes, 0.0), tf.where(is_valid, scores, 0.0), class_index, is_valid
