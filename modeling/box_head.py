"""The box head, the second stage of Fast R-CNN (arXiv:1504.08083): RoIs and their targets, heads, losses, detections.

Shapes: N images, P proposals, G ground truths, S RoI slots per image, R = N * S RoIs of all images, C classes, D
channels.
labels: int64, 1..C, 0 = background. class_logits: before the softmax over C + 1, background first.
deltas: see `box_ops`, times the box regression weights; one box per class (background included) or one for all.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from common.registry import Registry

from . import box_ops, nms
from .layers import conv2d_of_head, fully_connected, normal_initializer, shape_list

MAX_LOG_SIZE = math.log(1000 / 16)  # of the boxes that `giou_loss` decodes
PROPOSAL_IDENTITY = 2**20  # identities of proposals start here, those of ground truths at 0


class RoIs(NamedTuple):
    """Regions to classify, with their targets. Slots that are not valid contribute to no loss."""

    boxes: tf.Tensor  # float32 [N, S, 4], no gradient
    labels: tf.Tensor  # int64 [N, S], 0 = background
    gt_index: tf.Tensor  # int64 [N, S], the ground truth matched with a foreground RoI
    is_valid: tf.Tensor  # bool [N, S]

    @property
    def is_foreground(self) -> tf.Tensor:
        """Foreground slots, bool [N, S]."""
        return self.is_valid & (self.labels > 0)


def label_rois(boxes, is_valid, gt_boxes, gt_labels, *, foreground_iou):
    """Gives each box the label of the ground truth with the highest IoU, or background below `foreground_iou`.

    Args:
        boxes: float32 [N, S, 4]. is_valid: bool [N, S].
        gt_boxes: float32 [N, G, 4], G >= 1. gt_labels: int64 [N, G]; only labels > 0 (no padding, no crowd) match.
    Returns:
        RoIs
    """
    iou = tf.where((gt_labels > 0)[:, None, :], box_ops.pairwise_iou(boxes, gt_boxes), -1.0)
    gt_index = tf.argmax(iou, axis=2)
    is_foreground = is_valid & (tf.reduce_max(iou, axis=2) >= foreground_iou)
    labels = tf.where(is_foreground, box_ops.gather(gt_labels, gt_index), 0)
    return RoIs(tf.stop_gradient(boxes), labels, gt_index, is_valid)


def sample_rois(proposals, gt_boxes, gt_labels, sample_key, *, foreground_iou, batch_per_image, foreground_ratio):
    """Samples the RoIs of a training step at random from the proposals and the ground truth boxes.

    Args:
        proposals: rpn.Proposals. gt_boxes, gt_labels, foreground_iou: see `label_rois`.
        sample_key: int32 [N, 2], see `box_ops.random_keys`. batch_per_image: RoIs per image.
        foreground_ratio: largest share of foreground, 0..1
    Returns:
        RoIs, S = min(batch_per_image, P + G), foreground first
    """
    boxes = tf.concat([proposals.boxes, gt_boxes], axis=1)
    is_valid = tf.concat([proposals.is_valid, gt_labels > 0], axis=1)
    counts = (tf.shape(x)[1] for x in (proposals.boxes, gt_boxes))
    identity = tf.concat([tf.range(count) + first for count, first in zip(counts, (PROPOSAL_IDENTITY, 0))], axis=0)
    keys = box_ops.random_keys(sample_key, tf.cast(identity, tf.int64), purpose="rois")
    rois = label_rois(boxes, is_valid, gt_boxes, gt_labels, foreground_iou=foreground_iou)
    picked = box_ops.sample(
        rois.is_foreground,
        is_valid & ~rois.is_foreground,
        keys,
        size=batch_per_image,
        foreground_ratio=foreground_ratio,
    )
    boxes, labels, gt_index = (box_ops.gather(x, picked.index) for x in (rois.boxes, rois.labels, rois.gt_index))
    return RoIs(boxes, labels, gt_index, picked.is_valid)


def image_index(boxes):
    """Returns the index of the image of each of the boxes [N, S, 4], flattened: int32 [N * S]."""
    n, slots, _ = shape_list(boxes)
    image = tf.cast(tf.range(n * slots), tf.int64) // tf.cast(slots, tf.int64)
    return tf.cast(image, tf.int32)


def fastrcnn_2fc_head(x, *, fc_channels, **unused):
    """Applies two fully connected layers: [R, 7, 7, D] -> [R, fc_channels]."""
    del unused
    x = fully_connected("fc6", x, fc_channels, activation=tf.nn.relu)
    return fully_connected("fc7", x, fc_channels, activation=tf.nn.relu)


def fastrcnn_4conv1fc_head(x, *, conv_channels, fc_channels, **options):
    """Applies four 3x3 convolutions and one fully connected layer: [R, 7, 7, D] -> [R, fc_channels].

    Args:
        options: of the convolutions (`norm`, `norm_first`, `is_valid`), see `conv2d_of_head`
    """
    for i in range(4):
        x = conv2d_of_head(f"conv{i}", f"gn{i}", x, conv_channels, **options)
    return fully_connected("fc", x, fc_channels, activation=tf.nn.relu)


HEADS = Registry("FPN.FRCNN_HEAD_FUNC")  # values: (function, norm)
HEADS.register("fastrcnn_2fc_head", (fastrcnn_2fc_head, "None"))
HEADS.register("fastrcnn_4conv1fc_head", (fastrcnn_4conv1fc_head, "None"))
HEADS.register("fastrcnn_4conv1fc_gn_head", (fastrcnn_4conv1fc_head, "GN"))
HEADS.register("fastrcnn_4conv1fc_bn_head", (fastrcnn_4conv1fc_head, "BN"))  # that of FPN.NORM, or SyncBN


def box_outputs(features, *, num_classes, class_agnostic):
    """Applies the last layers, which classify RoIs and refine their boxes.

    Args:
        features: [R, D]. num_classes: C, without background.
    Returns:
        class_logits float32 [R, C + 1]; deltas float32 [R, C + 1, 4], or [R, 1, 4] if class-agnostic
    """
    boxes = 1 if class_agnostic else num_classes + 1
    class_logits = fully_connected("class", features, num_classes + 1, initializer=normal_initializer(0.01))
    deltas = fully_connected("box", features, 4 * boxes, initializer=normal_initializer(0.001))
    return tf.cast(class_logits, tf.float32), tf.cast(tf.reshape(deltas, [-1, boxes, 4]), tf.float32)


BOX_LOSSES = Registry("FRCNN.BOX_LOSS")


def register_box_loss(name: str, function: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """Registers a box loss under a name for FRCNN.BOX_LOSS.

    Args:
        function: (deltas, boxes, gt_boxes, weights) -> float32 [N, S], the loss of each RoI. The first three are
            float32 [N, S, 4]: `boxes` are the RoIs, `gt_boxes` the ground truth of each. For RoIs that are not
            foreground, whose loss is dropped, both are the same unit box. `weights`: 4 box regression weights.
    Returns:
        the function
    Raises:
        ConfigError: the name is registered already.
    """
    return BOX_LOSSES.register(name, function)


def l1_loss(deltas, boxes, gt_boxes, weights):
    """Returns the sum of |deltas - targets| over the four coordinates, float32 [N, S]: see `register_box_loss`."""
    return box_ops.sum_of_coordinates(tf.abs(deltas - box_ops.encode(gt_boxes, boxes, weights=weights)))


def giou_loss(deltas, boxes, gt_boxes, weights):
    """Returns 1 - GIoU (arXiv:1902.09630 algorithm 1) of the decoded and the true boxes, float32 [N, S], 0 to 2."""
    decoded = box_ops.decode(deltas, boxes, weights=weights, max_log_size=MAX_LOG_SIZE)
    (low, high), (true_low, true_high) = (tf.split(x, 2, axis=-1) for x in (decoded, gt_boxes))

    def area(low, high):
        width, height = tf.unstack(tf.maximum(high - low, 0.0), axis=-1)
        return width * height

    intersection = area(tf.maximum(low, true_low), tf.minimum(high, true_high))
    hull = area(tf.minimum(low, true_low), tf.maximum(high, true_high))
    union = area(low, high) + area(true_low, true_high) - intersection
    return 1.0 - intersection / union + (hull - union) / hull


register_box_loss("l1", l1_loss)
register_box_loss("giou", giou_loss)


def box_losses(class_logits, deltas, rois, gt_boxes, *, weights, box_loss=l1_loss, box_loss_weight=1.0):
    """Computes the cross-entropy of the labels and the box loss of the foreground.

    Args:
        class_logits: float32 [R, C + 1]. deltas: float32 [R, C + 1 or 1, 4], dimension 1 static. rois: RoIs, R = N * S.
        gt_boxes: float32 [N, G, 4]. weights: of box regression. box_loss: see `register_box_loss`.
        box_loss_weight: its factor
    Returns:
        dict of scalars, each the sum over an image's RoIs divided by the number of its valid RoIs; the mean over images
    """
    n, slots = shape_list(rois.labels)
    labels = tf.reshape(rois.labels, [-1])
    label_losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=class_logits)
    if deltas.shape[1] != 1:
        deltas = box_ops.gather(deltas, labels[:, None])
    deltas = tf.reshape(deltas, [n, slots, 4])
    matched = box_ops.gather(gt_boxes, rois.gt_index)
    # Other slots get two equal unit boxes: the logarithm of an empty box's width would make the gradient NaN.
    is_foreground = rois.is_foreground[..., None]
    matched, boxes = (tf.where(is_foreground, x, tf.constant([0.0, 0.0, 1.0, 1.0])) for x in (matched, rois.boxes))
    losses = tf.where(rois.is_foreground, box_loss(deltas, boxes, matched, weights), 0.0)
    return {
        "label_loss": _mean_over_rois(tf.reshape(label_losses, [n, slots]), rois.is_valid),
        "box_loss": box_loss_weight * _mean_over_rois(losses, rois.is_valid),
    }


def _mean_over_rois(losses, is_valid):
    """Averages [N, S] over each image's valid RoIs, then over images."""
    is_valid = tf.cast(is_valid, tf.float32)
    weights = tf.math.divide_no_nan(is_valid, tf.reduce_sum(is_valid, axis=1, keepdims=True))
    return tf.reduce_sum(losses * weights) / tf.cast(tf.shape(losses)[0], tf.float32)


def box_metrics(class_logits, rois):
    """Returns how well the sampled RoIs are classified: a dict of scalars, for summaries only."""
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
    """The detections of all images of a batch, in the order of the images, best first within each."""

    boxes: tf.Tensor  # float32 [R, 4] in pixels of the network's input, clipped to the image
    scores: tf.Tensor  # float32 [R]; NaN if values in the network were not finite
    labels: tf.Tensor  # int64 [R], 1..C
    image_index: tf.Tensor  # int32 [R], index into the batch
    masks: tf.Tensor | None = None  # float32 [R, M, M], probabilities within the box


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
    is_finite=None,
):
    """Applies NMS within each class and keeps the best detections of each image over all classes.

    NMS drops boxes and scores that are not finite: an overflow would look like an image without objects. A detection of
    score NaN, label 1 and an empty box follows those of an image that is not `is_finite`.

    Args:
        probabilities: float32 [N, P, C + 1]. boxes: float32 [N, P, C or 1, 4], decoded.
        is_valid: bool [N, P]. image_shape: int32 [N, 2].
        score_threshold: detections need a score above it, in soft-NMS also after the decay
        nms_threshold: IoU. max_per_image: largest number of detections.
        soft_nms: "None", or a kind of `nms.detect_softly`. soft_nms_sigma: its `sigma`.
        is_finite: bool [N], whether all values of an image were finite
    Returns:
        Detections without masks
    """
    n, slots, kinds, _ = shape_list(boxes)
    boxes = tf.reshape(box_ops.clip(tf.reshape(boxes, [n, slots * kinds, 4]), image_shape), [n, slots, kinds, 4])
    scores = probabilities[:, :, 1:]
    keep = is_valid[:, :, None] & (scores > score_threshold) & box_ops.is_nonempty(boxes)
    scores = tf.where(keep, scores, nms.NO_SCORE)
    options = dict(iou_threshold=nms_threshold, max_output=max_per_image)
    if soft_nms == "None":
        kept = nms.detect(boxes, scores, **options)
    else:
        soft_options = dict(kind=soft_nms, sigma=soft_nms_sigma, score_threshold=score_threshold)
        kept = nms.detect_softly(boxes, scores, **options, **soft_options)
    if is_finite is not None:
        kept = _with_mark(*kept, ~is_finite)
    boxes, scores, class_index, is_kept = kept
    kept = tf.where(is_kept)
    labels = tf.gather_nd(class_index, kept) + 1
    return Detections(tf.gather_nd(boxes, kept), tf.gather_nd(scores, kept), labels, tf.cast(kept[:, 0], tf.int32))


def _with_mark(boxes, scores, class_index, is_kept, is_marked):
    """Adds a slot to each image, in use where `is_marked` [N]: shapes of `nms.detect`, D + 1 instead of D."""
    boxes = tf.concat([boxes, tf.zeros_like(boxes[:, :1])], axis=1)
    scores = tf.concat([scores, tf.fill([tf.shape(scores)[0], 1], float("nan"))], axis=1)
    class_index = tf.concat([class_index, tf.zeros_like(class_index[:, :1])], axis=1)
    return boxes, scores, class_index, tf.concat([is_kept, is_marked[:, None]], axis=1)
