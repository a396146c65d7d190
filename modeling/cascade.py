"""Cascade R-CNN (arXiv:1712.00726): a sequence of box heads, each applied to the boxes that the previous one refined.

Shapes: N images, S RoI slots per image, R = N * S, C classes.
"""

from typing import NamedTuple

import tensorflow as tf

from . import box_ops


class Stage(NamedTuple):
    """Input and output of one stage."""

    boxes: tf.Tensor  # float32 [N, S, 4], the stage's RoIs
    is_valid: tf.Tensor  # bool [N, S]
    class_logits: tf.Tensor  # float32 [R, C + 1]
    deltas: tf.Tensor  # float32 [R, 1, 4], class-agnostic


def cascade(boxes, is_valid, image_shape, *, head, weights, max_log_size):
    """Runs the stages.

    Args:
        boxes: float32 [N, S, 4], the first stage's RoIs. is_valid: bool [N, S]. image_shape: int32 [N, 2].
        head: function (stage index, boxes [N, S, 4], is_valid [N, S]) -> class_logits, deltas
        weights: of box regression, one tuple of 4 per stage. max_log_size: see `box_ops.decode`.
    Returns:
        list of Stage; and the boxes that the last stage refined, float32 [N, S, 4], clipped to the image
    """
    stages = []
    for index, stage_weights in enumerate(weights):
        class_logits, deltas = head(index, boxes, is_valid)
        stages.append(Stage(boxes, is_valid, class_logits, deltas))
        deltas = tf.reshape(deltas, tf.shape(boxes))
        refined = box_ops.decode(deltas, boxes, weights=stage_weights, max_log_size=max_log_size)
        boxes = tf.stop_gradient(box_ops.clip(refined, image_shape))
        is_valid = is_valid & box_ops.is_nonempty(boxes)
        boxes = tf.where(tf.math.is_finite(boxes), boxes, 0.0)  # RoIAlign requires finite boxes
    return stages, boxes


def mean_probabilities(stages):
    """Averages the softmax of the stages, each computed on its own boxes: float32 [R, C + 1]."""
    return tf.add_n([tf.nn.softmax(stage.class_logits) for stage in stages]) / len(stages)


def scale_gradient(x, scale):
    """Returns `x` unchanged and multiplies its gradient by `scale`: the stages share the features they pool from."""

    @tf.custom_gradient
    def identity(x):
        return tf.identity(x), lambda dy: dy * scale

    return identity(x)
