"""Region Proposal Network, arXiv:1506.01497, over a list of levels: one in C4, five in FPN.

Shapes: N images, H and W of a level's map, K anchors per cell, A anchors of a level or of all levels, G ground truths,
S sampled anchors per image, P proposals per image.
anchors: float32 [A, 4] x1 y1 x2 y2 in pixels of the padded image, the same for all images, ordered row, column, kind.
labels of anchors: foreground, background, or neither (ignored). logits: objectness, before the sigmoid.
deltas: see `box_ops`, with weights of 1.
"""

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorpack.compat import tfv1

from . import box_ops, nms
from .layers import conv2d, normal_initializer, shape_list

MAX_CELLS = 2**12  # limit per side of a map, for which 32 bits identify the anchors of five levels
LOWEST = float(tf.float32.min)  # logit of boxes that are not candidates
OBJECTS = 32  # ground truths that `anchor_targets` takes at a time: 120 MiB for an image of 800x800
HUBER_DELTA = 1.0 / 9  # smooth L1 with beta 1/9, as in Detectron


class Anchors(NamedTuple):
    """The anchors of all levels, one level after the other."""

    boxes: tf.Tensor  # float32 [A, 4]
    identity: tf.Tensor  # int64 [A], identifies an anchor independently of the map's size
    is_valid: tf.Tensor  # bool [N, A], the cell belongs to the image, not to the padding of the batch
    sizes: list  # number of each level's anchors: integers or int32 scalars


class Proposals(NamedTuple):
    """The best boxes of each image, best first."""

    boxes: tf.Tensor  # float32 [N, P, 4], clipped to the image, no gradient; zeros where not valid
    logits: tf.Tensor  # float32 [N, P]
    is_valid: tf.Tensor  # bool [N, P]


def rpn_head(features, *, channels, num_anchors, num_convs=1):
    """Applies the head, which all levels share: 3x3 convolutions, then a 1x1 convolution for each output.

    Args:
        features: list of [N, H, W, C]. channels: of the hidden layers. num_anchors: per cell.
        num_convs: number of hidden layers
    Returns:
        logits: float32 [N, A]; deltas: float32 [N, A, 4], of all levels
    """
    options = dict(channels=channels, num_anchors=num_anchors, num_convs=num_convs)
    outputs = [_outputs(x, **options) for x in features]
    return tuple(tf.cast(tf.concat(levels, axis=1), tf.float32) for levels in zip(*outputs))


def _outputs(x, *, channels, num_anchors, num_convs, inside=None):
    """Returns the outputs of `rpn_head` for K anchors in each cell of one map: [N, H * W * K], [N, H * W * K, 4].

    Args:
        x: [N, H, W, C]. inside: bool [N, H, W], which cells of patches belong to their map; the outputs are then those
            of a patch's central cell. None: `x` are whole maps.
    """
    init = normal_initializer(0.01)
    padding = "SAME" if inside is None else "VALID"
    with tfv1.variable_scope("rpn", reuse=tfv1.AUTO_REUSE):
        for i in range(num_convs):
            options = dict(initializer=init, padding=padding, activation=tf.nn.relu)
            x = conv2d(f"conv{i}", x, channels, 3, **options)
            if inside is not None and i < num_convs - 1:  # the next convolution sees zeros around the map
                inside = inside[:, 1:-1, 1:-1]
                x = tf.where(inside[..., None], x, tf.zeros([], x.dtype))
        logits = conv2d("class", x, num_anchors, 1, initializer=init)
        deltas = conv2d("box", x, 4 * num_anchors, 1, initializer=init)
    n = shape_list(x)[0]
    return tf.reshape(logits, [n, -1]), tf.reshape(deltas, [n, -1, 4])


def rpn_head_at(features, index, *, channels, num_anchors, num_convs=1):
    """Computes the outputs of `rpn_head` for selected anchors from the cells around each: 3x3 for one hidden layer.

    A loss uses a few hundred of an image's 240,000 anchors. Its gradient through whole maps, nearly all zeros, would
    take an eighth of a training step's arithmetic; from these cells it takes next to none.

    Args:
        features: list of [N, H, W, C]. index: integers [N, S], into the anchors of all levels joined.
        channels, num_anchors, num_convs: see `rpn_head`
    Returns:
        logits float32 [N, S], deltas float32 [N, S, 4]
    """
    index = tf.cast(index, tf.int64)
    patches, inside = (
        tf.reshape(x, [-1, *x.shape[2:]]) for x in _patches(features, index // num_anchors, radius=num_convs)
    )
    options = dict(channels=channels, num_anchors=num_anchors, num_convs=num_convs)
    outputs = _outputs(patches, inside=inside, **options)
    kind = tf.reshape(index % num_anchors, [-1])
    logits, deltas = (tf.cast(box_ops.gather(x, kind[:, None]), tf.float32) for x in outputs)
    return tf.reshape(logits, tf.shape(index)), tf.reshape(deltas, [*shape_list(index), 4])


def _sizes(features):
    """Returns the heights and the widths of L maps [N, H, W, C]: int32 [L], [L]."""
    return tf.unstack(tf.stack([tf.shape(x)[1:3] for x in features]), axis=1)


def _patches(features, cell, *, radius):
    """Returns the K x K cells around each of the given cells, K = 2 * `radius` + 1, zero outside their map.

    Args:
        features: list of [N, H, W, C]. cell: int64 [N, S], counted over all levels.
    Returns:
        [N, S, K, K, C]; and which of them are inside the map, bool [N, S, K, K]
    """
    side = 2 * radius + 1
    n, _, _, channels = shape_list(features[0])
    level, row, column, height, width = (x[..., None, None] for x in _locate(cell, features))
    around = tf.constant(np.arange(-radius, radius + 1), tf.int64)
    rows, columns = row + around[:, None], column + around
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    place = tf.reshape(tf.where(inside, rows * width + columns, 0), [n, -1])
    level = tf.reshape(tf.tile(level, [1, 1, side, side]), [n, -1])
    cells = [
        box_ops.gather(tf.reshape(x, [n, -1, channels]), tf.where(tf.equal(level, i), place, 0))
        for i, x in enumerate(features)
    ]
    count = tf.size(level)
    first = tf.reshape(level, [-1]) * tf.cast(count, tf.int64)
    cells = box_ops.gather_rows(tf.reshape(tf.stack(cells), [-1, channels]), first + _count_up(count))
    cells = tf.reshape(cells, [n, -1, side, side, channels])
    return tf.where(inside[..., None], cells, tf.zeros([], cells.dtype)), inside


def _locate(cell, features):
    """Returns level, row and column of cells that are counted over all levels, and the height and width of the level.

    Args:
        cell: int64 [...]. features: list of [N, H, W, C].
    Returns:
        five int64 [...]
    """
    heights, widths = _sizes(features)
    ends = tf.cast(tf.cumsum(heights * widths), tf.int64)
    is_above = cell >= tf.reshape(ends[:-1], [-1] + [1] * cell.shape.rank)
    level = tf.reduce_sum(tf.cast(is_above, tf.int64), axis=0)
    height, width, end = (tf.gather(tf.cast(x, tf.int64), level) for x in (heights, widths, ends))
    place = cell - end + height * width
    return level, place // width, place % width, height, width


def make_anchors(features, valid_cells, *, strides, base_anchors):
    """Returns the Anchors of L levels: K in each cell.

    Args:
        features: list of [N, H, W, C], for their sizes
        valid_cells: float32 [N, L, 2], rows and columns of each image that are not padding of the batch
        strides: pixels per cell, integers [L, 1], or int32 [L, 4] for x y x y
        base_anchors: NumPy float32 [L, K, 4], centred on (0, 0)
    """
    kinds = base_anchors.shape[1]
    heights, widths = _sizes(features)
    level, row, column, *_ = _locate(_count_up(tf.reduce_sum(heights * widths)), features)
    identity = ((level * MAX_CELLS + row) * MAX_CELLS + column)[:, None] * kinds + np.arange(kinds)
    row_column = tf.cast(tf.stack([row, column], axis=1), tf.float32)
    center = tf.reverse(tf.tile(row_column, [1, 2]), [1]) * tf.gather(tf.cast(strides, tf.float32), level)
    boxes = center[:, None] + tf.gather(np.asarray(base_anchors, np.float32), level)
    inside = tf.reduce_all(row_column < tf.gather(valid_cells, level, axis=1), axis=2)
    is_valid = tf.reshape(tf.tile(inside[:, :, None], [1, 1, kinds]), [tf.shape(valid_cells)[0], -1])
    sizes = [kinds * size for size in tf.unstack(heights * widths)]
    return Anchors(tf.reshape(boxes, [-1, 4]), tf.reshape(identity, [-1]), is_valid, sizes)


def _count_up(size):
    """Numbers 0, 1, ...: int64 [size]. The host makes those of `tf.range`; up to 2^24, float32 counts exactly."""
    return tf.cast(tf.cumsum(tf.ones([size]), exclusive=True), tf.int64)


class AnchorTargets(NamedTuple):
    """The label of each anchor, and its ground truth."""

    is_foreground: tf.Tensor  # bool [N, A]
    is_background: tf.Tensor  # bool [N, A]
    gt_index: tf.Tensor  # int64 [N, A], the ground truth with the highest IoU, the first one on ties


def anchor_targets(
    anchors,
    is_valid,
    image_shape,
    gt_boxes,
    gt_labels,
    *,
    foreground_iou,
    background_iou,
    crowd_overlap,
    best_first=False,
    across_border=False,
):
    """Labels anchors (arXiv:1506.01497 sec. 3.1.2).

    Args:
        anchors: float32 [A, 4]. is_valid: bool [N, A]. image_shape: int32 [N, 2].
        gt_boxes: float32 [N, G, 4], G >= 1. gt_labels: int64 [N, G], 0 = padding, -1 = crowd region.
        foreground_iou, background_iou: anchors are foreground at or above the first, background below the second; an
            object's best anchors are foreground, too, unless they are background
        crowd_overlap: anchors with a larger share inside a crowd region are ignored; >= 1 disables this
        best_first: an object's best anchors that overlap with it are foreground even below `background_iou`
        across_border: anchors that extend beyond the image take part, too
    Returns:
        AnchorTargets
    """
    candidate = is_valid if across_border else is_valid & _is_inside(anchors, image_shape)
    # In the reference, all candidates are the best of an object that none of them overlaps.
    least_best = float(np.finfo(np.float32).tiny) if best_first else 0.0
    found = _match(anchors, candidate, gt_boxes, gt_labels, crowd_overlap=crowd_overlap, least_best=least_best)
    is_background = candidate & (found.best_iou < background_iou)
    if best_first:
        is_background &= ~found.is_best
    is_foreground = candidate & (found.is_best | (found.best_iou >= foreground_iou)) & ~is_background
    if crowd_overlap < 1:
        is_foreground, is_background = is_foreground & ~found.is_crowd, is_background & ~found.is_crowd
    return AnchorTargets(is_foreground, is_background, found.gt_index)


class _Matches(NamedTuple):
    """What is known of the anchors from some of the ground truths."""

    best_iou: tf.Tensor  # float32 [N, A], the highest with an object, -1 without one
    gt_index: tf.Tensor  # int64 [N, A], the first ground truth that has it
    is_best: tf.Tensor  # bool [N, A], no candidate has a higher IoU with some object
    is_crowd: tf.Tensor  # bool [N, A], covered by a crowd region


def _match(anchors, candidate, gt_boxes, gt_labels, *, crowd_overlap, least_best):
    """Compares anchors [A, 4] with the ground truths, OBJECTS of these at a time: the memory of all pairs would grow
    with their number. Returns _Matches.

    Args:
        candidate: bool [N, A]. least_best: IoU that an object's best anchors must have
    """
    shape, count = tf.shape(candidate), tf.shape(gt_labels)[1]

    def look(start, known):
        boxes, labels = (x[:, start : start + OBJECTS] for x in (gt_boxes, gt_labels))
        usable = candidate[:, :, None] & (labels > 0)[:, None, :]
        iou = tf.where(usable, box_ops.pairwise_iou(anchors[None], boxes), -1.0)
        best_iou, best_of_gt = tf.reduce_max(iou, axis=2), tf.reduce_max(iou, axis=1, keepdims=True)
        is_better = best_iou > known.best_iou
        index = tf.argmax(iou, axis=2) + tf.cast(start, tf.int64)
        best_of_gt = tf.where(best_of_gt < least_best, math.inf, best_of_gt)
        is_best = tf.reduce_any(tf.equal(iou, best_of_gt), axis=2)
        is_crowd = known.is_crowd
        if crowd_overlap < 1:
            is_crowd |= _is_covered_by_crowd(anchors, boxes, labels, crowd_overlap)
        best_iou, index = tf.maximum(best_iou, known.best_iou), tf.where(is_better, index, known.gt_index)
        return start + OBJECTS, _Matches(best_iou, index, is_best | known.is_best, is_crowd)

    none = tf.zeros(shape, tf.bool)
    known = _Matches(tf.fill(shape, -1.0), tf.zeros(shape, tf.int64), none, none)
    return tf.while_loop(lambda start, _: start < count, look, (0, known), parallel_iterations=1)[1]


def _is_inside(anchors, image_shape):
    x1, y1, x2, y2 = tf.unstack(anchors[None], axis=-1)
    height, width = tf.split(tf.cast(image_shape, tf.float32), 2, axis=1)
    return (x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height)


def _is_covered_by_crowd(anchors, gt_boxes, gt_labels, crowd_overlap):
    ioa = box_ops.pairwise_ioa(anchors[None], gt_boxes)
    return tf.reduce_any((ioa > crowd_overlap) & (gt_labels < 0)[:, None, :], axis=2)


def rpn_losses(logits, deltas, anchors, gt_index, gt_boxes, picked, *, batch_per_image):
    """Computes the losses on a sample of S anchors per image, of all levels together; the mean over images.

    Args:
        logits: float32 [N, S]. deltas: float32 [N, S, 4]. anchors: float32 [A, 4]. gt_index: int64 [N, A].
        gt_boxes: float32 [N, G, 4]. picked: box_ops.Sample. batch_per_image: its intended size.
    Returns:
        dict of scalars, each a sum over the sample / `batch_per_image`
    """
    labels = tf.cast(picked.is_foreground, tf.float32)
    label_losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits)
    # Slots that are not foreground get two equal boxes, which keep the logarithm finite; their loss is dropped below.
    matched = box_ops.gather(gt_boxes, box_ops.gather(gt_index, picked.index))
    picked_anchors = tf.gather(anchors, picked.index)
    matched = tf.where(picked.is_foreground[..., None], matched, picked_anchors)
    errors = deltas - box_ops.encode(matched, picked_anchors)
    box_losses = box_ops.sum_of_coordinates(huber(errors, HUBER_DELTA)) / HUBER_DELTA
    per_image = float(batch_per_image) * tf.cast(tf.shape(logits)[0], tf.float32)
    return {
        "rpn_losses/label_loss": tf.reduce_sum(tf.where(picked.is_valid, label_losses, 0.0)) / per_image,
        "rpn_losses/box_loss": tf.reduce_sum(tf.where(picked.is_foreground, box_losses, 0.0)) / per_image,
    }


def huber(x, delta):
    """Returns x^2 / 2 for |x| <= `delta`, delta * (|x| - delta / 2) beyond (Huber 1964)."""
    magnitude = tf.abs(x)
    bounded = tf.minimum(magnitude, delta)
    return bounded * (magnitude - 0.5 * bounded)


def rpn_metrics(logits, picked):
    """Returns how well the sampled anchors, logits [N, S], are classified: a dict of scalars, for summaries only."""
    positive = logits > 0.0
    correct = tf.equal(positive, picked.is_foreground) & picked.is_valid
    found = positive & picked.is_foreground
    return {
        "rpn/num_foreground": box_ops.mean_count(picked.is_foreground),
        "rpn/accuracy": box_ops.share(correct, picked.is_valid),
        "rpn/recall": box_ops.share(found, picked.is_foreground),
    }


def propose(
    logits, deltas, anchors, image_shape, *, groups, pre_nms_topk, post_nms_topk, nms_threshold, min_size, max_log_size
):
    """Decodes, clips, filters, suppresses and ranks boxes: the proposals of each image.

    Args:
        logits: float32 [N, A]. deltas: float32 [N, A, 4]. anchors: Anchors. image_shape: int32 [N, 2].
        groups: numbers of adjacent anchors whose boxes compete in NMS: those of each level, or of all together
        pre_nms_topk: candidates per group.
        post_nms_topk: boxes kept per group by NMS, and kept at the end over all groups
        nms_threshold: IoU. min_size: pixels, see `box_ops.is_nonempty`. max_log_size: see `box_ops.decode`.
    Returns:
        Proposals, P = `post_nms_topk`, or groups * the largest group's candidates if that is less
    """
    logits, index = _candidates(tf.where(anchors.is_valid, logits, LOWEST), groups, count=pre_nms_topk)
    deltas, references = box_ops.gather(deltas, index), tf.gather(anchors.boxes, index)
    boxes = box_ops.clip(box_ops.decode(deltas, references, max_log_size=max_log_size), image_shape)
    logits = tf.where(box_ops.is_nonempty(boxes, min_size), logits, LOWEST)
    strips = 4 if pre_nms_topk > 1000 else 2  # of as many pairs, a pass costs more than a launch
    return _suppress_and_rank(
        boxes, logits, groups=len(groups), nms_threshold=nms_threshold, keep=post_nms_topk, strips=strips
    )


def _candidates(logits, groups, *, count):
    """Selects the best of each group: logits float32 [N, groups * K], index int64. A group of fewer has LOWEST ones."""
    n, size = tf.shape(logits)[0], tf.minimum(count, tf.reduce_max(tf.stack(groups)))
    best = []
    for group, (group_logits, width) in enumerate(zip(tf.split(logits, groups, axis=1), groups)):
        filled = tf.pad(group_logits, [[0, 0], [0, tf.maximum(size - width, 0)]], constant_values=LOWEST)
        best.append(box_ops.top_k(filled, size, is_long=group < 2))  # p2 and p3, or all anchors
    logits, index = (tf.stack(parts, axis=1) for parts in zip(*best))
    widths = tf.cast(tf.stack(groups), tf.int64)[:, None]
    index = tf.minimum(index, widths - 1) + tf.cumsum(widths, exclusive=True)
    return tf.reshape(logits, [n, -1]), tf.reshape(index, [n, -1])


def _suppress_and_rank(boxes, logits, *, groups, nms_threshold, keep, strips):
    """Applies NMS within each group, one problem per image and group, and selects the best over all groups.

    Args:
        boxes: float32 [N, groups * A, 4]. logits: float32 [N, groups * A], sorted within each group.
    """
    n = tf.shape(logits)[0]
    size = tf.shape(logits)[1] // groups
    boxes = tf.stop_gradient(tf.reshape(boxes, [n * groups, size, 4]))
    logits = tf.stop_gradient(tf.reshape(logits, [n * groups, size]))
    index, is_valid = nms.suppress(
        boxes, logits > LOWEST, iou_threshold=nms_threshold, max_output=tf.minimum(keep, size), strips=strips
    )
    boxes, logits = (box_ops.gather(x, index) for x in (boxes, logits))
    logits = tf.reshape(tf.where(is_valid, logits, LOWEST), [n, -1])
    logits, index = box_ops.top_k(logits, tf.minimum(keep, tf.shape(logits)[1]), is_long=False)
    boxes = box_ops.gather(tf.reshape(boxes, [n, -1, 4]), index)
    is_valid = logits > LOWEST
    return Proposals(tf.where(is_valid[..., None], boxes, 0.0), logits, is_valid)
