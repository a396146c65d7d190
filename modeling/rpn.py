"""Region Proposal Network, arXiv:1506.01497, over a list of levels: one in C4, five in FPN.

Shapes: N images, H and W of a level's map, K anchors per cell, A anchors of a level or of all levels, G ground truths,
S sampled anchors per image, P proposals per image.
anchors: float32 [A, 4] x1 y1 x2 y2 in pixels of the padded image, the same for all images, ordered row, column, kind.
labels of anchors: foreground, background, or neither (ignored). logits: objectness, before the sigmoid.
deltas: see `box_ops`, with weights of 1.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorpack.compat import tfv1

from . import box_ops
from .layers import conv2d, normal_initializer, shape_list

MAX_CELLS = 2**12  # limit per side of a map, for which 32 bits identify the anchors of five levels
LOWEST = float(tf.float32.min)  # logit of boxes that are not candidates
HUBER_DELTA = 1.0 / 9  # smooth L1 with beta 1/9, as in Detectron


class Anchors(NamedTuple):
    """The anchors of one level, or of all levels joined."""

    boxes: tf.Tensor  # float32 [A, 4]
    identity: tf.Tensor  # int64 [A], identifies an anchor independently of the map's size
    is_valid: tf.Tensor  # bool [N, A], the cell belongs to the image, not to the padding of the batch


class Proposals(NamedTuple):
    """The best boxes of each image, best first."""

    boxes: tf.Tensor  # float32 [N, P, 4], clipped to the image, no gradient; zeros where not valid
    logits: tf.Tensor  # float32 [N, P]
    is_valid: tf.Tensor  # bool [N, P]


def rpn_head(features, *, channels, num_anchors, padding="SAME"):
    """Applies the head, which all levels share.

    Args:
        features: list of [N, H, W, C]. channels: of the hidden layer. num_anchors: per cell. padding: of the first
            convolution; "VALID" removes one cell on each side.
    Returns:
        logits: list of float32 [N, A]; deltas: list of float32 [N, A, 4]
    """
    logits, deltas = [], []
    init = normal_initializer(0.01)
    for x in features:
        with tfv1.variable_scope("rpn", reuse=tfv1.AUTO_REUSE):
            hidden = conv2d("conv0", x, channels, 3, initializer=init, padding=padding, activation=tf.nn.relu)
            level_logits = conv2d("class", hidden, num_anchors, 1, initializer=init)
            level_deltas = conv2d("box", hidden, 4 * num_anchors, 1, initializer=init)
        n = shape_list(x)[0]
        logits.append(tf.cast(tf.reshape(level_logits, [n, -1]), tf.float32))
        deltas.append(tf.cast(tf.reshape(level_deltas, [n, -1, 4]), tf.float32))
    return logits, deltas


def rpn_head_at(features, index, *, channels, num_anchors):
    """Computes the outputs of `rpn_head` for selected anchors from the 3x3 cells around each.

    A loss uses a few hundred of an image's 240,000 anchors. Its gradient through whole maps, nearly all zeros, would
    take an eighth of a training step's arithmetic; from these cells it takes next to none.

    Args:
        features: list of [N, H, W, C]. index: int32 [N, S], into the anchors of all levels joined.
    Returns:
        logits float32 [N, S], deltas float32 [N, S, 4]
    """
    patches = _patches(features, index // num_anchors)
    options = dict(channels=channels, num_anchors=num_anchors, padding="VALID")
    outputs = rpn_head([tf.reshape(patches, [-1, *patches.shape[2:]])], **options)
    kind = tf.reshape(index % num_anchors, [-1])
    logits, deltas = (tf.gather(x, kind, batch_dims=1) for (x,) in outputs)
    return tf.reshape(logits, tf.shape(index)), tf.reshape(deltas, [*shape_list(index), 4])


def _patches(features, cell):
    """Returns the 3x3 cells around each of the given cells, zero outside their map.

    Args:
        features: list of [N, H, W, C]. cell: int32 [N, S], counted over all levels.
    Returns:
        [N, S, 3, 3, C]
    """
    of_levels = []
    for x in features:
        n, height, width, channels = shape_list(x)
        rows = (cell // width)[:, :, None, None] + tf.constant([-1, 0, 1])[:, None]
        columns = (cell % width)[:, :, None, None] + tf.constant([-1, 0, 1])
        of_level = ((cell >= 0) & (cell < height * width))[:, :, None, None]
        inside = of_level & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        place = tf.where(inside, rows * width + columns, 0)
        cells = tf.gather(tf.reshape(x, [n, height * width, channels]), place, batch_dims=1)
        of_levels.append(tf.where(inside[..., None], cells, tf.zeros([], x.dtype)))
        cell -= height * width
    return tf.add_n(of_levels)


def level_anchors(feature_map, valid_cells, *, stride, base_anchors, level):
    """Returns the Anchors of one level.

    Args:
        feature_map: [N, H, W, C], for its size
        valid_cells: int32 [N, 2], rows and columns of each image that are not padding of the batch
        stride: pixels per cell, an integer or int32 [4] for x y x y
        base_anchors: NumPy float32 [K, 4], centred on (0, 0). level: index of the level.
    """
    _, height, width, _ = shape_list(feature_map)
    kinds = len(base_anchors)
    row, column = (x[..., None] for x in tf.meshgrid(tf.range(height), tf.range(width), indexing="ij"))
    kind = tf.range(kinds)
    center = tf.cast(tf.stack([column, row, column, row], axis=-1) * stride, tf.float32)
    boxes = tf.reshape(center + np.asarray(base_anchors, np.float32), [-1, 4])
    digits = [tf.cast(x, tf.int64) for x in (row, column, kind)]
    identity = ((level * MAX_CELLS + digits[0]) * MAX_CELLS + digits[1]) * kinds + digits[2]
    inside = (row[None] < valid_cells[:, 0, None, None, None]) & (column[None] < valid_cells[:, 1, None, None, None])
    is_valid = tf.reshape(tf.repeat(inside, kinds, axis=-1), [tf.shape(valid_cells)[0], -1])
    return Anchors(boxes, tf.reshape(identity, [-1]), is_valid)


def join_anchors(anchors):
    """Joins the Anchors of all levels into one."""
    boxes, identity = (tf.concat([getattr(level, name) for level in anchors], axis=0) for name in ("boxes", "identity"))
    return Anchors(boxes, identity, tf.concat([level.is_valid for level in anchors], axis=1))


class AnchorTargets(NamedTuple):
    """The label of each anchor, and its ground truth."""

    is_foreground: tf.Tensor  # bool [N, A]
    is_background: tf.Tensor  # bool [N, A]
    gt_index: tf.Tensor  # int32 [N, A], the ground truth with the highest IoU, the first one on ties


def anchor_targets(
    anchors, is_valid, image_shape, gt_boxes, gt_labels, *, foreground_iou, background_iou, crowd_overlap
):
    """Labels anchors. Only those entirely inside the image take part (arXiv:1506.01497 sec. 3.1.2).

    Args:
        anchors: float32 [A, 4]. is_valid: bool [N, A]. image_shape: int32 [N, 2].
        gt_boxes: float32 [N, G, 4], G >= 1. gt_labels: int64 [N, G], 0 = padding, -1 = crowd region.
        foreground_iou, background_iou: anchors are foreground at or above the first, background below the second; an
            object's best anchors are foreground, too, unless they are background
        crowd_overlap: anchors with a larger share inside a crowd region are ignored; >= 1 disables this
    Returns:
        AnchorTargets
    """
    candidate = is_valid & _is_inside(anchors, image_shape)
    is_object = gt_labels > 0
    usable = candidate[:, :, None] & is_object[:, None, :]
    iou = tf.where(usable, box_ops.pairwise_iou(anchors[None], gt_boxes), -1.0)
    best_iou = tf.reduce_max(iou, axis=2)
    best_of_gt = tf.reduce_max(iou, axis=1, keepdims=True)
    is_best = tf.reduce_any(tf.equal(iou, best_of_gt) & usable, axis=2)
    # Background takes precedence: an object's best anchor may still be below `background_iou`.
    is_background = candidate & (best_iou < background_iou)
    is_foreground = candidate & (is_best | (best_iou >= foreground_iou)) & ~is_background
    if crowd_overlap < 1:
        covered = _is_covered_by_crowd(anchors, gt_boxes, gt_labels, crowd_overlap)
        is_foreground, is_background = is_foreground & ~covered, is_background & ~covered
    return AnchorTargets(is_foreground, is_background, tf.argmax(iou, axis=2, output_type=tf.int32))


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
        logits: float32 [N, S]. deltas: float32 [N, S, 4]. anchors: float32 [A, 4]. gt_index: int32 [N, A].
        gt_boxes: float32 [N, G, 4]. picked: box_ops.Sample. batch_per_image: its intended size.
    Returns:
        dict of scalars, each a sum over the sample / `batch_per_image`
    """
    labels = tf.cast(picked.is_foreground, tf.float32)
    label_losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits)
    # Slots that are not foreground get two equal boxes, which keep the logarithm finite; their loss is dropped below.
    matched = tf.gather(gt_boxes, tf.gather(gt_index, picked.index, batch_dims=1), batch_dims=1)
    picked_anchors = tf.gather(anchors, picked.index)
    matched = tf.where(picked.is_foreground[..., None], matched, picked_anchors)
    errors = deltas - box_ops.encode(matched, picked_anchors)
    box_losses = tf.reduce_sum(huber(errors, HUBER_DELTA), axis=2) / HUBER_DELTA
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
    logits, deltas, anchors, image_shape, *, pre_nms_topk, post_nms_topk, nms_threshold, min_size, max_log_size
):
    """Decodes, clips, filters, suppresses and ranks boxes: the proposals of each image.

    Args:
        logits, deltas, anchors: lists of [N, A], [N, A, 4] and Anchors, one entry per group in which boxes compete in
            NMS (a level, or all levels joined)
        image_shape: int32 [N, 2]. pre_nms_topk: candidates per group.
        post_nms_topk: boxes kept per group by NMS, and kept at the end over all groups
        nms_threshold: IoU. min_size: pixels, see `box_ops.is_nonempty`. max_log_size: see `box_ops.decode`.
    Returns:
        Proposals, P = `post_nms_topk`, or groups * the largest group's candidates if that is less
    """
    boxes, best_logits = [], []
    for group_logits, group_deltas, group_anchors in zip(logits, deltas, anchors):
        group_logits = tf.where(group_anchors.is_valid, group_logits, LOWEST)
        group_logits, index = tf.math.top_k(group_logits, tf.minimum(pre_nms_topk, tf.shape(group_logits)[1]))
        references = tf.gather(group_anchors.boxes, index)
        best_deltas = tf.gather(group_deltas, index, batch_dims=1)
        group_boxes = box_ops.clip(box_ops.decode(best_deltas, references, max_log_size=max_log_size), image_shape)
        keep = box_ops.is_nonempty(group_boxes, min_size)
        boxes.append(group_boxes)
        best_logits.append(tf.where(keep, group_logits, LOWEST))
    return _suppress_and_rank(boxes, best_logits, nms_threshold=nms_threshold, keep=post_nms_topk)


def _suppress_and_rank(boxes, logits, *, nms_threshold, keep):
    """Applies NMS within each group, one problem per image and group, and selects the best over all groups."""
    size = tf.reduce_max(tf.stack([tf.shape(x)[1] for x in logits]))
    fill = [size - tf.shape(x)[1] for x in logits]
    boxes = tf.stack([tf.pad(x, [[0, 0], [0, f], [0, 0]]) for x, f in zip(boxes, fill)], axis=1)
    logits = tf.stack([tf.pad(x, [[0, 0], [0, f]], constant_values=LOWEST) for x, f in zip(logits, fill)], axis=1)
    n, groups = tf.shape(logits)[0], logits.shape[1]
    boxes = tf.stop_gradient(tf.reshape(boxes, [n * groups, size, 4]))
    logits = tf.stop_gradient(tf.reshape(logits, [n * groups, size]))
    index, is_valid = _suppress(boxes, logits, nms_threshold=nms_threshold, keep=tf.minimum(keep, size))
    boxes, logits = (tf.gather(x, index, batch_dims=1) for x in (boxes, logits))
    logits = tf.reshape(tf.where(is_valid, logits, LOWEST), [n, -1])
    logits, index = tf.math.top_k(logits, tf.minimum(keep, tf.shape(logits)[1]))
    boxes = tf.gather(tf.reshape(boxes, [n, -1, 4]), index, batch_dims=1)
    is_valid = logits > LOWEST
    return Proposals(tf.where(is_valid[..., None], boxes, 0.0), logits, is_valid)


def _suppress(boxes, logits, *, nms_threshold, keep):
    """Applies NMS to boxes [B, A, 4] that are sorted, best first; their order serves as score.

    Returns:
        index int32 [B, keep] into A, and is_valid bool [B, keep]
    """
    size = tf.shape(logits)[1]
    countdown = tf.cast(size - tf.range(size), tf.float32)  # exact in float32 and positive, unlike logits
    scores = tf.where(logits > LOWEST, countdown[None, :], box_ops.NO_SCORE)
    _, kept, _, is_valid = box_ops.batched_nms(
        boxes[:, :, None, :], scores[:, :, None], iou_threshold=nms_threshold, max_output=keep
    )
    return tf.where(is_valid, size - tf.cast(kept, tf.int32), 0), is_valid
