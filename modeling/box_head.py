"""The second stage for boxes, Fast R-CNN (arXiv:1504.08083): RoIs and their targets, heads, losses, detections.

Shapes: N images, P proposals, G ground truths, S RoI slots per image, R = N * S RoIs of all images, C classes,
D channels.
labels: int64, 1..C, 0 = background. class_logits: before the softmax over C + 1, background first.
deltas: see `box_ops`, times the box regression weights; one box per class (background included) or one for all.
"""

from typing import NamedTuple

import tensorflow as tf

from . import box_ops
from .layers import conv2d_of_head, fully_connected, normal_initializer, shape_list

PROPOSAL_IDENTITY = 2**20  # random numbers of proposals start here, those of ground truths at 0


class RoIs(NamedTuple):
    """Regions to classify, with their targets. Slots that aren't valid take no part in any loss."""

    boxes: tf.Tensor  # float32 [N, S, 4], no gradient
    labels: tf.Tensor  # int64 [N, S], 0 = background
    gt_index: tf.Tensor  # int32 [N, S], the ground truth that a foreground RoI belongs to
    is_valid: tf.Tensor  # bool [N, S]

    @property
    def is_foreground(self):
        """bool [N, S]"""
        return self.is_valid & (self.labels > 0)


def label_rois(boxes, is_valid, gt_boxes, gt_labels, *, foreground_iou):
    """Give each box the label of the ground truth that it overlaps most, or background below `foreground_iou`.

    Args:
        boxes: float32 [N, S, 4]. is_valid: bool [N, S].
        gt_boxes: float32 [N, G, 4], G >= 1. gt_labels: int64 [N, G]; only labels > 0 (no padding, no crowd) match.
    Returns:
        RoIs
    """
    iou = tf.where((gt_labels > 0)[:, None, :], box_ops.pairwise_iou(boxes, gt_boxes), -1.0)
    gt_index = tf.argmax(iou, axis=2, output_type=tf.int32)
    is_foreground = is_valid & (tf.reduce_max(iou, axis=2) >= foreground_iou)
    labels = tf.where(is_foreground, tf.gather(gt_labels, gt_index, batch_dims=1), 0)
    return RoIs(tf.stop_gradient(boxes), labels, gt_index, is_valid)


def sample_rois(proposals, gt_boxes, gt_labels, sample_key, *, foreground_iou, batch_per_image, foreground_ratio):
    """The RoIs of a training step: a random sample of the proposals and of the ground truth boxes themselves.

    Args:
        proposals: rpn.Proposals. sample_key: int32 [N, 2], see `box_ops.random_keys`.
    Returns:
        RoIs, S = min(batch_per_image, P + G), foreground first
    """
    boxes = tf.concat([proposals.boxes, gt_boxes], axis=1)
    is_valid = tf.concat([proposals.is_valid, gt_labels > 0], axis=1)
    identity = tf.concat(
        [
            tf.range(tf.shape(x)[1], dtype=tf.int32) + first
            for x, first in ((proposals.boxes, PROPOSAL_IDENTITY), (gt_boxes, 0))
        ],
        axis=0,
    )
    keys = box_ops.random_keys(sample_key, tf.cast(identity, tf.int64), purpose="rois")
    rois = label_rois(boxes, is_valid, gt_boxes, gt_labels, foreground_iou=foreground_iou)
    picked = box_ops.sample(
        rois.is_foreground,
        is_valid & ~rois.is_foreground,
        keys,
        size=batch_per_image,
        foreground_ratio=foreground_ratio,
    )
    boxes, labels, gt_index = (
        tf.gather(x, picked.index, batch_dims=1) for x in (rois.boxes, rois.labels, rois.gt_index)
    )
    return RoIs(boxes, labels, gt_index, picked.is_valid)


def image_index(boxes):
    """The image of each of the boxes [N, S, 4], flattened: int32 [N * S]."""
    n, slots, _ = shape_list(boxes)
    return tf.repeat(tf.range(n), slots)


def fastrcnn_2fc_head(x, *, fc_channels, **unused):
    """Two fully connected layers: [R, 7, 7, D] -> [R, fc_channels]."""
    del unused
    x = fully_connected("fc6", x, fc_channels, activation=tf.nn.relu)
    return fully_connected("fc7", x, fc_channels, activation=tf.nn.relu)


def fastrcnn_4conv1fc_head(x, *, conv_channels, fc_channels, norm, norm_first=False):
    """Four 3x3 convolutions, optionally normalised, and one fully connected layer: [R, 7, 7, D] -> [R, fc_channels]."""
    for i in range(4):
        x = conv2d_of_head(f"conv{i}", f"gn{i}", x, conv_channels, norm=norm, norm_first=norm_first)
    return fully_connected("fc", x, fc_channels, activation=tf.nn.relu)


# FPN.FRCNN_HEAD_FUNC -> (function, norm)
HEADS = {
    "fastrcnn_2fc_head": (fastrcnn_2fc_head, "None"),
    "fastrcnn_4conv1fc_head": (fastrcnn_4conv1fc_head, "None"),
    "fastrcnn_4conv1fc_gn_head": (fastrcnn_4conv1fc_head, "GN"),
}


def box_outputs(features, *, num_classes, class_agnostic):
    """The last layer.

    Args:
        features: [R, D]. num_classes: C, without background.
    Returns:
        class_logits float32 [R, C + 1]; deltas float32 [R, C + 1, 4], or [R, 1, 4] if class-agnostic
    """
    boxes = 1 if class_agnostic else num_classes + 1
    class_logits = fully_connected("class", features, num_classes + 1, initializer=normal_initializer(0.01))
    deltas = fully_connected("box", features, 4 * boxes, initializer=normal_initializer(0.001))
    return tf.cast(class_logits, tf.float32), tf.cast(tf.reshape(deltas, [-1, boxes, 4]), tf.float32)


def box_losses(class_logits, deltas, rois, gt_boxes, *, weights):
    """Cross-entropy of the labels and L1 of the foreground's deltas.

    Args:
        class_logits: float32 [R, C + 1]. deltas: float32 [R, C + 1 or 1, 4], a known number. rois: RoIs, R = N * S.
        gt_boxes: float32 [N, G, 4]. weights: of box regression.
    Returns:
        dict of scalars: sums over an image's RoIs / their number; the mean over images
    """
    n, slots = shape_list(rois.labels)
    labels = tf.reshape(rois.labels, [-1])
    label_losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=class_logits)
    if deltas.shape[1] != 1:
        deltas = tf.gather(deltas, labels, batch_dims=1)
    deltas = tf.reshape(deltas, [n, slots, 4])
    matched = tf.gather(gt_boxes, rois.gt_index, batch_dims=1)
    foreground = rois.is_foreground[..., None]
    # Other slots stand in with a pair of equal boxes, so that no logarithm of nothing reaches the gradient.
    matched, references = (tf.where(foreground, x, tf.constant([0.0, 0.0, 1.0, 1.0])) for x in (matched, rois.boxes))
    errors = tf.where(foreground, tf.abs(deltas - box_ops.encode(matched, references, weights=weights)), 0.0)
    return {
        "label_loss": _mean_over_rois(tf.reshape(label_losses, [n, slots]), rois.is_valid),
        "box_loss": _mean_over_rois(tf.reduce_sum(errors, axis=2), rois.is_valid),
    }


def _mean_over_rois(losses, is_valid):
    """Mean of [N, S] over each image's valid RoIs, then over images."""
    total = tf.reduce_sum(tf.where(is_valid, losses, 0.0), axis=1)
    count = tf.reduce_sum(tf.cast(is_valid, tf.float32), axis=1)
    return tf.reduce_mean(tf.math.divide_no_nan(total, count))


def box_metrics(class_logits, rois):
    """How the classification of the sampled RoIs stands: dict of scalars, for summaries only."""
    predicted = tf.reshape(tf.argmax(class_logits, axis=1), tf.shape(rois.labels))
    is_right = tf.equal(predicted, rois.labels)

    return {
        "num_rois": box_ops.mean_count(rois.is_valid),
        "num_foreground": box_ops.mean_count(rois.is_foreground),
        "accuracy": box_ops.share(is_right, rois.is_valid),
        "foreground_accuracy": box_ops.share(is_right, rois.is_foreground),
        "missed": box_ops.share(tf.equal(predicted, 0), rois.is_foreground),
    }


class Detections(NamedTuple):
    """What was found in a batch: the detections of all images together, by image, best first."""

    boxes: tf.Tensor  # float32 [R, 4] in pixels of the network's input, clipped to the image
    scores: tf.Tensor  # float32 [R]; NaN where numbers in the network were not finite
    labels: tf.Tensor  # int64 [R], 1..C
    image_index: tf.Tensor  # int32 [R], into the batch
    masks: tf.Tensor = None  # float32 [R, M, M], probabilities within the box


def detect(
    probabilities,
    boxes,
    is_valid,
    image_shape,
    *,
    score_threshold,
    nms_threshold,
    max_per_image,
    soft_nms="None",
    soft_nms_sigma=0.5,
):
    """Suppress within each class, and keep the best of each image over all classes.

    Args:
        probabilities: float32 [N, P, C + 1]. boxes: float32 [N, P, C or 1, 4], decoded.
        is_valid: bool [N, P]. image_shape: int32 [N, 2].
        score_threshold: a detection's score is strictly above it, also after soft-NMS
        soft_nms: "None", or a kind of `box_ops.batched_soft_nms`
    Returns:
        Detections without masks
    """
    n, slots, kinds, _ = shape_list(boxes)
    boxes = tf.reshape(box_ops.clip(tf.reshape(boxes, [n, slots * kinds, 4]), image_shape), [n, slots, kinds, 4])
    scores = probabilities[:, :, 1:]
    keep = is_valid[:, :, None] & (scores > score_threshold) & box_ops.is_nonempty(boxes)
    scores = tf.where(keep, scores, box_ops.NO_SCORE)
    options = dict(iou_threshold=nms_threshold, max_output=max_per_image)
    if soft_nms == "None":
        kept = box_ops.batched_nms(boxes, scores, **options)
    else:
        soft_options = dict(kind=soft_nms, sigma=soft_nms_sigma, score_threshold=score_threshold)
        kept = box_ops.batched_soft_nms(boxes, scores, **options, **soft_options)
    boxes, scores, class_index, is_kept = kept
    kept = tf.where(is_kept)
    labels = tf.cast(tf.gather_nd(class_index, kept), tf.int64) + 1
    return Detections(tf.gather_nd(boxes, kept), tf.gather_nd(scores, kept), labels, tf.cast(kept[:, 0], tf.int32))
