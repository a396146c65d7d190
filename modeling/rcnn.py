"""Faster, Mask and Cascade R-CNN: the one place that knows how the parts fit together, and that reads the config.

Shapes: N images, H and W of the padded batch, G ground truths, S RoI slots per image, R = N * S RoIs of all images,
F foreground RoIs of all images, C classes, M mask resolution. The batch is described in `input_signature`.

C4 is a pyramid of one level: only where the features of RoIs come from differs.
"""

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorpack import ModelDesc
from tensorpack.compat import tfv1
from tensorpack.models import regularize_cost
from tensorpack.tfutils.summary import add_moving_summary

import boxes as np_boxes
import optimizers
from config import config

from . import box_head, box_ops, cascade, mask_head, rpn
from .backbone import BACKBONES, BLOCKS, frozen, resnet_stage
from .fpn import fpn
from .layers import shape_list

# Names of what the stages of inference make: proposals [N, P, 4] and their logits [N, P], best first; the probabilities
# [N, P, C + 1] of each proposal, and its refined boxes [N, P, C or 1, 4]. Boxes are in pixels of the network's input.
STAGE_TENSORS = ("proposals/boxes", "proposals/logits", "predictions/probabilities", "predictions/boxes")
C4_RESOLUTION = 14
BOX_RESOLUTION, MASK_RESOLUTION = 7, 14
FPN_STRIDE = 32  # FPN works on images padded to a multiple of this


def input_signature(*, training):
    """The batch, as TensorSpecs by name."""
    spec = {
        "image": ([None, None, None, 3], tf.uint8),  # [N, H, W, 3], BGR
        "image_shape": ([None, 2], tf.int32),  # height, width of the part that is image
    }
    if training:
        spec["gt_boxes"] = ([None, None, 4], tf.float32)  # [N, G, 4], zero rows past an image's own count
        spec["gt_labels"] = ([None, None], tf.int64)  # [N, G], 0 = padding, -1 = crowd region
        if config.MODE_MASK:
            spec["gt_masks"] = ([None, None, None, None], tf.uint8)  # [N, G, H, ceil(W / 8)], packed bits
        spec["image_id"] = ([None], tf.int64)
        spec["sample_key"] = ([None, 2], tf.int32)  # seed, position in the order of the data
    return [tf.TensorSpec(shape, dtype, name) for name, (shape, dtype) in spec.items()]


class Tower(NamedTuple):
    """What a training step tells of one tower."""

    cost: tf.Tensor  # float32 scalar, the sum of the losses
    losses: dict  # name: float32 scalar
    image_id: tf.Tensor  # int64 [N]
    sample_key: tf.Tensor  # int32 [N, 2]


class RCNN(ModelDesc):
    """The training graph, as tensorpack's trainers take it.

    Attributes:
        towers: a Tower for each training tower, once the graph is built.
        gradient_norm: float32 scalar, of the mean gradient over all towers and ranks in a step.
    """

    def __init__(self, *, learning_rate, accumulate=1):
        """
        Args:
            learning_rate: for the mean gradient of a whole update. accumulate: steps of which an update is made.
        """
        self._learning_rate, self._accumulate = learning_rate, accumulate
        self.towers, self.gradient_norm = [], None

    def inputs(self):
        return input_signature(training=True)

    def build_graph(self, *inputs):
        batch = dict(zip((spec.name for spec in self.inputs()), inputs))
        losses, metrics = build_training(**batch)
        decay = config.TRAIN.WEIGHT_DECAY
        losses["wd_cost"] = regularize_cost(".*/W", lambda w: decay * tf.nn.l2_loss(w), name="wd_cost_sum")
        losses = {name: tf.identity(loss, name) for name, loss in losses.items()}
        for loss in losses.values():
            tfv1.add_to_collection(tfv1.GraphKeys.LOSSES, loss)
        total_cost = tf.add_n(list(losses.values()), name="total_cost")
        self.towers.append(Tower(total_cost, losses, batch["image_id"], batch["sample_key"]))
        add_moving_summary(total_cost, *losses.values())
        add_moving_summary(*[tf.identity(metric, name) for name, metric in metrics.items()])
        return total_cost

    def optimizer(self):
        learning_rate = tfv1.get_variable("learning_rate", initializer=self._learning_rate, trainable=False)
        tfv1.summary.scalar("learning_rate-summary", learning_rate)
        optimizer = tfv1.train.MomentumOptimizer(learning_rate, 0.9)
        if self._accumulate > 1:
            optimizer = optimizers.Accumulated(optimizer, self._accumulate)
        if config.TRAIN.PRECISION == "float16":
            optimizer = optimizers.LossScaled(optimizer)
        return optimizers.Measured(optimizer, self)


def build_training(image, image_shape, gt_boxes, gt_labels, image_id, sample_key, gt_masks=None):
    """The losses of a batch: see `input_signature`.

    Returns:
        two dicts of float32 scalars: losses, each the mean over images and to be summed up; and metrics
    """
    del image_id  # travels with the batch for messages
    features, strides = _features(image, image_shape, training=True)
    logits, deltas, anchors = _rpn(features, strides, image_shape)
    losses, metrics = _rpn_losses(features, anchors, image_shape, gt_boxes, gt_labels, sample_key)
    proposals = _propose(logits, deltas, anchors, image_shape, training=True)
    rois = box_head.sample_rois(
        proposals,
        gt_boxes,
        gt_labels,
        sample_key,
        foreground_iou=config.FRCNN.FG_THRESH,
        batch_per_image=config.FRCNN.BATCH_PER_IM,
        foreground_ratio=config.FRCNN.FG_RATIO,
    )
    roi_features = _RoIFeatures(features, strides, training=True)
    box_losses, box_metrics, box_features = _box_branch(roi_features, rois, image_shape, gt_boxes, gt_labels)
    losses, metrics = {**losses, **box_losses}, {**metrics, **box_metrics}
    if config.MODE_MASK:
        mask_losses, mask_metrics = _mask_branch(roi_features, box_features, rois, image_shape, gt_masks)
        losses, metrics = {**losses, **mask_losses}, {**metrics, **mask_metrics}
    return losses, metrics


def build_inference(image, image_shape):
    """The detections of a batch.

    Args:
        image: uint8 [N, H, W, 3], BGR, padded at the bottom and right. image_shape: int32 [N, 2].
    Returns:
        box_head.Detections of all images together, with masks [R, M, M] if config.MODE_MASK. One of score NaN tells
        that numbers on the way to an image's detections were not finite.
    """
    features, strides = _features(image, image_shape, training=False)
    logits, deltas, anchors = _rpn(features, strides, image_shape)
    proposals = _propose(logits, deltas, anchors, image_shape, training=False)
    _name_stages(proposals.boxes, proposals.logits)
    roi_features = _RoIFeatures(features, strides, training=False)
    detections, raw = _detect(roi_features, proposals, image_shape)
    # float16 overflows in the maps first, and ReLU on a CPU would make 0 of the NaN that follow from it in the heads.
    maps = features if features[0].dtype == tf.float16 else []
    detections = _tell_non_finite(detections, [*maps, *logits, *deltas, *raw])
    if not config.MODE_MASK:
        return detections
    boxes, labels, image_index = _at_least_one(detections.boxes, detections.labels, detections.image_index)
    logits = _mask_logits(roi_features.for_masks(boxes, image_index), labels)[: tf.shape(detections.labels)[0]]
    scores = tf.where(_is_finite(logits), detections.scores, math.nan)
    return detections._replace(scores=scores, masks=tf.sigmoid(logits))


def _tell_non_finite(detections, tensors):
    """Adds a detection of score NaN, label 1 and an empty box for each image of which one of `tensors` [N, ...] is not
    finite: it follows the image's others.

    NMS drops what is not finite, so that nothing else would tell an overflow from an image without objects.
    """
    is_finite = tf.reduce_all(tf.stack([_is_finite(x) for x in tensors]), axis=0)
    image_index = tf.cast(tf.where(~is_finite)[:, 0], tf.int32)
    count = tf.size(image_index)
    told = box_head.Detections(
        boxes=tf.zeros([count, 4]),
        scores=tf.fill([count], math.nan),
        labels=tf.ones([count], tf.int64),
        image_index=image_index,
    )
    all_but_masks = zip(detections[:4], told[:4])
    joined = box_head.Detections(*[tf.concat(parts, axis=0) for parts in all_but_masks])
    by_image = tf.argsort(joined.image_index, stable=True)
    return box_head.Detections(*[tf.gather(x, by_image) for x in joined[:4]])


def _is_finite(x):
    """Whether all of each item of [N, ...] is finite: bool [N]."""
    return tf.reduce_all(tf.math.is_finite(x), axis=list(range(1, x.shape.rank)))


def _name_stages(*tensors, first=0):
    """Gives tensors the names of STAGE_TENSORS from `first` on."""
    for tensor, name in zip(tensors, STAGE_TENSORS[first:]):
        tf.identity(tensor, name)


# ---------------------------------------------------------------------------------------------------- conventions


class _Conventions(NamedTuple):
    """In what detectors of one architecture differ and their settings don't say: weights expect what they learned with.

    Also different, and without effect that could be measured: the epsilon in the rule that assigns RoIs to levels.
    """

    half_pixel: bool  # of `box_ops.roi_align`
    adaptive: bool  # of `box_ops.roi_align`
    rounded_anchors: bool  # to whole pixels
    fitted_anchors: bool  # lie as many whole pixels apart as cells of the padded image fit in, not the level's stride
    largest_box: float | None  # from the smallest anchor to this many pixels a box may grow; None: to the largest image
    norm_first: bool  # in box and mask heads: GroupNorm, then ReLU


REFERENCE = _Conventions(
    half_pixel=True,
    adaptive=False,
    rounded_anchors=False,
    fitted_anchors=False,
    largest_box=None,
    norm_first=False,
)
CONVENTIONS = {
    "tensorpack": REFERENCE,
    "torchvision": REFERENCE._replace(
        half_pixel=False, rounded_anchors=True, fitted_anchors=True, largest_box=1000, norm_first=True
    ),
    "detectron2": REFERENCE._replace(adaptive=True, largest_box=1000, norm_first=True),
}


def _conventions():
    return CONVENTIONS[config.CONVENTIONS]


# ---------------------------------------------------------------------------------------------------- features


def _backbone_options(training):
    """What every stage is made with. Without training, batch norm uses the stored statistics, so it can be folded."""
    norm = config.BACKBONE.NORM
    return {
        "norm": "FreezeBN" if norm == "SyncBN" and not training else norm,
        "epsilon": config.BACKBONE.NORM_EPSILON,
        "tf_pad_mode": config.BACKBONE.TF_PAD_MODE,
        "stride_1x1": config.BACKBONE.STRIDE_1X1,
    }


def _normalise(image, image_shape):
    """uint8 BGR to float32 of mean 0 and deviation 1; the padding stays 0."""
    mean, std = (np.array(x[::-1], np.float32) for x in (config.PREPROC.PIXEL_MEAN, config.PREPROC.PIXEL_STD))
    height, width = tf.shape(image)[1], tf.shape(image)[2]
    rows, columns = (tf.sequence_mask(image_shape[:, axis], size) for axis, size in ((0, height), (1, width)))
    is_image = tf.cast(rows[:, :, None] & columns[:, None, :], tf.float32)[..., None]
    return (tf.cast(image, tf.float32) - mean) * is_image / std


def _compute_dtype(training):
    return tf.as_dtype(config.TRAIN.PRECISION if training else config.TEST.PRECISION)


def _features(image, image_shape, *, training):
    """Maps for the proposals, [N, H / stride, W / stride, C] in the compute dtype, and their strides in pixels."""
    num_blocks = config.BACKBONE.RESNET_NUM_BLOCKS
    features = BACKBONES[config.BACKBONE.NAME](
        tf.cast(_normalise(image, image_shape), _compute_dtype(training)),
        num_blocks=num_blocks if config.MODE_FPN else num_blocks[:3],
        width=config.BACKBONE.WIDTH,
        freeze_at=config.BACKBONE.FREEZE_AT,
        freeze_affine=config.BACKBONE.FREEZE_AFFINE,
        **_backbone_options(training),
    )
    if config.MODE_FPN:
        return fpn(features, channels=config.FPN.NUM_CHANNEL, norm=config.FPN.NORM), config.FPN.ANCHOR_STRIDES
    return features[-1:], [config.RPN.ANCHOR_STRIDE]


class _RoIFeatures:
    """Pools the features of RoIs. The published models of the two families differ here, and only here."""

    def __init__(self, features, strides, *, training):
        # p6 is for proposals alone
        levels = slice(0, 4) if config.MODE_FPN else slice(0, 1)
        self._pyramid = [box_ops.extend_border(x) for x in features[levels]]
        self._strides = strides[levels]
        self._dtype = features[0].dtype
        self._training = training

    def _align(self, boxes, image_index, resolution):
        aligned = box_ops.multilevel_roi_align(
            self._pyramid,
            self._strides,
            boxes,
            image_index,
            resolution=resolution,
            half_pixel=_conventions().half_pixel,
            adaptive=_conventions().adaptive,
        )
        return tf.cast(aligned, self._dtype)

    def _c4_stage(self, boxes, image_index):
        """The backbone's last stage, on RoIs: [R, 7, 7, D]."""
        x = self._align(boxes, image_index, C4_RESOLUTION)
        with tfv1.variable_scope(tfv1.get_variable_scope(), reuse=tfv1.AUTO_REUSE):
            return resnet_stage(
                x,
                3,
                block=BLOCKS[config.BACKBONE.NAME],
                num_blocks=config.BACKBONE.RESNET_NUM_BLOCKS[3],
                width=config.BACKBONE.WIDTH * 8,
                freeze=frozen(4, config.BACKBONE.FREEZE_AT, config.BACKBONE.FREEZE_AFFINE),
                **_backbone_options(self._training),
            )

    def for_boxes(self, boxes, image_index):
        """boxes float32 [R, 4], image_index int32 [R] -> [R, 7, 7, D]"""
        if config.MODE_FPN:
            return self._align(boxes, image_index, BOX_RESOLUTION)
        return self._c4_stage(boxes, image_index)

    def for_masks(self, boxes, image_index, *, box_features=None, rows=None):
        """boxes float32 [F, 4], image_index int32 [F] -> [F, M / 2, M / 2, D].

        C4's masks share the features of the boxes: where `box_features` [R, 7, 7, D] are given, they are its `rows`.
        """
        if config.MODE_FPN:
            return self._align(boxes, image_index, MASK_RESOLUTION)
        if box_features is not None:
            return tf.gather(box_features, rows)
        return self._c4_stage(boxes, image_index)


# ---------------------------------------------------------------------------------------------------- proposals


def _rpn(features, strides, image_shape):
    """RPN head and anchors of every level: lists of float32 logits [N, A], deltas [N, A, 4], rpn.Anchors."""
    logits, deltas = rpn.rpn_head(features, **_rpn_options())
    distances = _fitted_distances(features, strides) if _conventions().fitted_anchors else strides
    anchors = [
        rpn.level_anchors(x, _valid_cells(image_shape, stride), stride=distance, base_anchors=base, level=level)
        for level, (x, stride, distance, base) in enumerate(zip(features, strides, distances, _base_anchors()))
    ]
    return logits, deltas, anchors


def _rpn_options():
    return {
        "channels": config.FPN.NUM_CHANNEL if config.MODE_FPN else config.RPN.HEAD_DIM,
        "num_anchors": len(_base_anchors()[0]),
    }


def _base_anchors():
    """The kinds of anchors of each level, centred on (0, 0): a list of float32 NumPy [K, 4]."""
    sizes, ratios = config.RPN.ANCHOR_SIZES, config.RPN.ANCHOR_RATIOS
    size_of_level = [[size] for size in sizes] if config.MODE_FPN else [sizes]
    base_anchors = [np_boxes.base_anchors(sizes, ratios) for sizes in size_of_level]
    return [np.round(anchors) for anchors in base_anchors] if _conventions().rounded_anchors else base_anchors


def _fitted_distances(features, strides):
    """The distances of anchors that `fitted_anchors` speaks of: a list of int32 [4], x y x y."""
    size = tf.shape(features[0])[1:3] * strides[0]
    return [tf.tile(tf.reverse(size // tf.shape(x)[1:3], [0]), [2]) for x in features]


def _valid_cells(image_shape, stride):
    """Rows and columns of a level's map that each image would have alone: int32 [N, 2]."""
    if not config.MODE_FPN:
        return image_shape // stride
    padded = -(-image_shape // FPN_STRIDE) * FPN_STRIDE
    return -(-padded // stride)


def _rpn_losses(features, anchors, image_shape, gt_boxes, gt_labels, sample_key):
    """Losses and metrics of the RPN, on anchors picked from the list of `_rpn`."""
    anchors = rpn.join_anchors(anchors)
    targets = rpn.anchor_targets(
        anchors.boxes,
        anchors.is_valid,
        image_shape,
        gt_boxes,
        gt_labels,
        foreground_iou=config.RPN.POSITIVE_ANCHOR_THRESH,
        background_iou=config.RPN.NEGATIVE_ANCHOR_THRESH,
        crowd_overlap=config.RPN.CROWD_OVERLAP_THRESH,
    )
    picked = box_ops.sample(
        targets.is_foreground,
        targets.is_background,
        box_ops.random_keys(sample_key, anchors.identity, purpose="anchors"),
        size=config.RPN.BATCH_PER_IM,
        foreground_ratio=config.RPN.FG_RATIO,
    )
    logits, deltas = rpn.rpn_head_at(features, picked.index, **_rpn_options())
    losses = rpn.rpn_losses(
        logits,
        deltas,
        anchors.boxes,
        targets.gt_index,
        gt_boxes,
        picked,
        batch_per_image=config.RPN.BATCH_PER_IM,
    )
    return losses, rpn.rpn_metrics(logits, picked)


def _max_log_size():
    """The limit of a box's growth: from the smallest anchor's scale, 16 pixels, to the largest image."""
    largest = _conventions().largest_box or config.PREPROC.MAX_SIZE
    if config.MODE_FPN and not _conventions().largest_box:
        largest = math.ceil(largest / FPN_STRIDE) * FPN_STRIDE
    return math.log(largest / 16.0)


def _propose(logits, deltas, anchors, image_shape, *, training):
    """rpn.Proposals, from the lists of `_rpn`."""
    phase = "TRAIN" if training else "TEST"
    if config.MODE_FPN and config.FPN.PROPOSAL_MODE == "Level":
        pre_nms_topk = post_nms_topk = getattr(config.RPN, f"{phase}_PER_LEVEL_NMS_TOPK")
    else:
        logits, deltas, anchors = [tf.concat(logits, axis=1)], [tf.concat(deltas, axis=1)], [rpn.join_anchors(anchors)]
        pre_nms_topk, post_nms_topk = (getattr(config.RPN, f"{phase}_{x}_NMS_TOPK") for x in ("PRE", "POST"))
    return rpn.propose(
        logits,
        deltas,
        anchors,
        image_shape,
        pre_nms_topk=pre_nms_topk,
        post_nms_topk=post_nms_topk,
        nms_threshold=config.RPN.PROPOSAL_NMS_THRESH,
        min_size=config.RPN.MIN_SIZE,
        max_log_size=_max_log_size(),
    )


# ---------------------------------------------------------------------------------------------------- boxes


def _head_outputs(x, scope, *, class_agnostic):
    """The box head under the published scopes: [R, 7, 7, D] -> class_logits, deltas."""
    outputs = dict(num_classes=config.DATA.NUM_CATEGORY, class_agnostic=class_agnostic)
    with tfv1.variable_scope(scope):
        if not config.MODE_FPN:
            return box_head.box_outputs(tf.reduce_mean(x, axis=[1, 2]), **outputs)
        head, norm = box_head.HEADS[config.FPN.FRCNN_HEAD_FUNC]
        with tfv1.variable_scope("head") if config.FPN.CASCADE else tf.name_scope("head"):
            x = head(
                x,
                conv_channels=config.FPN.FRCNN_CONV_HEAD_DIM,
                fc_channels=config.FPN.FRCNN_FC_HEAD_DIM,
                norm=norm,
                norm_first=_conventions().norm_first,
            )
        with tfv1.variable_scope("outputs"):
            return box_head.box_outputs(x, **outputs)


def _run_cascade(roi_features, boxes, is_valid, image_shape):
    def head(index, boxes):
        x = roi_features.for_boxes(tf.reshape(boxes, [-1, 4]), box_head.image_index(boxes))
        x = cascade.scale_gradient(x, 1.0 / len(config.CASCADE.IOUS))
        return _head_outputs(x, f"cascade_rcnn_stage{index + 1}", class_agnostic=True)

    return cascade.cascade(
        boxes,
        is_valid,
        image_shape,
        head=head,
        weights=config.CASCADE.BBOX_REG_WEIGHTS,
        max_log_size=_max_log_size(),
    )


def _box_branch(roi_features, rois, image_shape, gt_boxes, gt_labels):
    """Losses and metrics of the box head, or of every stage of a cascade; and the RoIs' features, if not a cascade."""
    if not config.FPN.CASCADE:
        x = roi_features.for_boxes(tf.reshape(rois.boxes, [-1, 4]), box_head.image_index(rois.boxes))
        class_logits, deltas = _head_outputs(x, "fastrcnn", class_agnostic=False)
        losses = box_head.box_losses(class_logits, deltas, rois, gt_boxes, weights=config.FRCNN.BBOX_REG_WEIGHTS)
        metrics = box_head.box_metrics(class_logits, rois)
        return _prefixed("fastrcnn_losses", losses), _prefixed("fastrcnn", metrics), x
    losses, metrics = {}, {}
    stages, _ = _run_cascade(roi_features, rois.boxes, rois.is_valid, image_shape)
    for index, (stage, iou) in enumerate(zip(stages, config.CASCADE.IOUS)):
        if index > 0:
            rois = box_head.label_rois(stage.boxes, stage.is_valid, gt_boxes, gt_labels, foreground_iou=iou)
        weights = config.CASCADE.BBOX_REG_WEIGHTS[index]
        stage_losses = box_head.box_losses(stage.class_logits, stage.deltas, rois, gt_boxes, weights=weights)
        losses.update(_prefixed(f"cascade_loss_stage{index + 1}/fastrcnn_losses", stage_losses))
        metrics.update(_prefixed(f"cascade_stage{index + 1}", box_head.box_metrics(stage.class_logits, rois)))
    return losses, metrics, None


def _detect(roi_features, proposals, image_shape):
    """Classify and refine the proposals, and keep the best.

    Returns:
        Detections without masks; and all that the heads said of an image's proposals, as a list of float32 [N, ...]
    """
    n, slots = tf.shape(proposals.boxes)[0], tf.shape(proposals.boxes)[1]
    if config.FPN.CASCADE:
        stages, boxes = _run_cascade(roi_features, proposals.boxes, proposals.is_valid, image_shape)
        probabilities, boxes = cascade.mean_probabilities(stages), boxes[:, :, None, :]
        raw = [probabilities, *[stage.deltas for stage in stages]]
    else:
        x = roi_features.for_boxes(tf.reshape(proposals.boxes, [-1, 4]), box_head.image_index(proposals.boxes))
        class_logits, deltas = _head_outputs(x, "fastrcnn", class_agnostic=False)
        probabilities = tf.nn.softmax(class_logits)
        raw = [probabilities, deltas]
        deltas = tf.reshape(deltas, [n, slots, config.DATA.NUM_CATEGORY + 1, 4])[:, :, 1:]
        boxes = box_ops.decode(
            deltas, proposals.boxes[:, :, None], weights=config.FRCNN.BBOX_REG_WEIGHTS, max_log_size=_max_log_size()
        )
    probabilities = tf.reshape(probabilities, [n, slots, config.DATA.NUM_CATEGORY + 1])
    _name_stages(probabilities, boxes, first=2)
    detections = box_head.detect(
        probabilities,
        boxes,
        proposals.is_valid,
        image_shape,
        score_threshold=config.TEST.RESULT_SCORE_THRESH,
        nms_threshold=config.TEST.FRCNN_NMS_THRESH,
        max_per_image=config.TEST.RESULTS_PER_IM,
        soft_nms=config.TEST.SOFT_NMS,
        soft_nms_sigma=config.TEST.SOFT_NMS_SIGMA,
    )
    return detections, [tf.reshape(x, [n, -1]) for x in raw]


# ---------------------------------------------------------------------------------------------------- masks


def _at_least_one(*tensors):
    """Tensors of RoIs [R, ...] with a row of zeros in place of none: oneDNN fails on convolutions of empty batches."""
    is_empty = tf.cast(tf.equal(tf.shape(tensors[0])[0], 0), tf.int32)
    return [tf.pad(x, [[0, is_empty]] + [[0, 0]] * (x.shape.rank - 1)) for x in tensors]


def _mask_logits(features, labels):
    """float32 [F, M, M], of each RoI's class. The RoI that stands in for none has label 0, and a mask nobody uses."""
    norm = mask_head.HEADS[config.FPN.MRCNN_HEAD_FUNC] if config.MODE_FPN else "None"
    return mask_head.mask_head(
        features,
        tf.maximum(labels, 1),
        num_convs=4 if config.MODE_FPN else 0,
        channels=config.MRCNN.HEAD_DIM,
        num_classes=config.DATA.NUM_CATEGORY,
        norm=norm,
        norm_first=_conventions().norm_first,
    )


def _mask_branch(roi_features, box_features, rois, image_shape, gt_masks):
    """Losses and metrics of the masks of the foreground RoIs (in a cascade: of the first stage's)."""
    n, slots = shape_list(rois.labels)
    (foreground,) = _at_least_one(tf.where(rois.is_foreground))  # without any, slot 0 stands in and counts for nothing
    boxes, labels, gt_index, is_real = (
        tf.gather_nd(x, foreground) for x in (rois.boxes, rois.labels, rois.gt_index, rois.is_foreground)
    )
    image, slot = tf.unstack(tf.cast(foreground, tf.int32), axis=1)
    x = roi_features.for_masks(boxes, image, box_features=box_features, rows=image * slots + slot)
    logits = _mask_logits(x, labels)
    targets = mask_head.mask_targets(gt_masks, image_shape, image, gt_index, boxes, resolution=logits.shape[1])
    loss = mask_head.mask_loss(logits, targets, image, is_real, num_images=n)
    metrics = mask_head.mask_metrics(logits, targets)
    return {"maskrcnn_loss/maskrcnn_loss": loss}, _prefixed("maskrcnn", metrics)


def _prefixed(prefix, scalars):
    return {f"{prefix}/{name}": value for name, value in scalars.items()}
