"""Faster, Mask and Cascade R-CNN, composed of the parts of this package.

`build_training` and `build_inference` read like the papers' figures; each function below them wires one part. Only this
file reads settings; the parts get values.

settings: a config.Config, the first argument of all functions here. Models of different settings can share a process.
Shapes: N images, H and W of the padded batch, G ground truths, S RoI slots per image, R = N * S RoIs of all images, F
foreground RoIs of all images, C classes, M mask resolution. `input_signature` describes the batch.

C4 is a pyramid of one level; it differs from FPN only in the source of the RoI features.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorpack.compat import tfv1

from common import boxes as np_boxes
from common.registry import Registry
from common.weights import BACKBONE_VARIABLES, MODEL_VARIABLES
from config import Config, ConfigError, largest_edge, padding_multiple

from . import (
    box_head,
    box_ops,
    cascade,
    convnext,  # noqa: F401 - it registers itself
    mask_head,
    parameters,
    roi_align,
    rpn,
)
from .backbone import BACKBONES
from .fpn import fpn
from .layers import BATCH_NORMS, collect_variables, mean_of_pixels, shape_list

# Tensor names of the stages of inference: proposals [N, P, 4] and their logits [N, P], best first; class probabilities
# [N, P, C + 1] and refined boxes [N, P, C or 1, 4] of each proposal. Boxes are in pixels of the network's input.
STAGE_TENSORS = ("proposals/boxes", "proposals/logits", "predictions/probabilities", "predictions/boxes")
C4_RESOLUTION = 14
BOX_RESOLUTION, MASK_RESOLUTION = 7, 14


def input_signature(settings: Config, *, training: bool) -> list[tf.TensorSpec]:
    """Returns the TensorSpecs of a batch; their names are the arguments of `build_training` or `build_inference`."""
    spec = {
        "image": ([None, None, None, 3], tf.uint8),  # [N, H, W, 3], BGR
        "image_shape": ([None, 2], tf.int32),  # height, width without the padding
    }
    if training:
        spec["gt_boxes"] = ([None, None, 4], tf.float32)  # [N, G, 4], x1 y1 x2 y2 in pixels; zero rows fill up
        spec["gt_labels"] = ([None, None], tf.int64)  # [N, G], 0 = padding, -1 = crowd region
        if settings.MODE_MASK:
            spec["gt_masks"] = ([None, None, None, None], tf.uint8)  # [N, G, H, 4 * ceil(W / 32)], packed bits
        spec["image_id"] = ([None], tf.int64)
        spec["sample_key"] = ([None, 2], tf.int32)  # seed, position in the order of the data
    return [tf.TensorSpec(shape, dtype, name) for name, (shape, dtype) in spec.items()]


def check(settings: Config) -> None:
    """Verifies the settings that name registered parts, which config.py does not know.

    Raises:
        ConfigError: a name is not registered, or the backbone does not support the mode.
    """
    CONVENTIONS.find(settings.CONVENTIONS)
    box_head.BOX_LOSSES.find(settings.FRCNN.BOX_LOSS)
    backbone = BACKBONES.find(settings.BACKBONE.NAME)
    if settings.MODE_FPN:
        box_head.HEADS.find(settings.FPN.FRCNN_HEAD_FUNC)
        mask_head.HEADS.find(settings.FPN.MRCNN_HEAD_FUNC)
    elif backbone.last_stage is None:
        raise ConfigError(f"BACKBONE.NAME={settings.BACKBONE.NAME} has no last stage to run on RoIs: set MODE_FPN=True")


@collect_variables(MODEL_VARIABLES)
def build_training(
    settings: Config,
    image: tf.Tensor,
    image_shape: tf.Tensor,
    gt_boxes: tf.Tensor,
    gt_labels: tf.Tensor,
    image_id: tf.Tensor,
    sample_key: tf.Tensor,
    gt_masks: tf.Tensor | None = None,
) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
    """Builds the losses of a batch, whose tensors `input_signature` describes.

    Returns:
        two dicts of float32 scalars: losses, each the mean over images, to be summed; and metrics
    """
    del image_id  # only messages need it
    build = functools.partial(_losses, settings, image, image_shape, gt_boxes, gt_labels, sample_key, gt_masks)
    return parameters.packed(build)


def _losses(settings, image, image_shape, gt_boxes, gt_labels, sample_key, gt_masks):
    """Returns losses and metrics: see `build_training`."""
    features, strides = _features(settings, image, image_shape, training=True)
    logits, deltas, anchors = _rpn(settings, features, strides, image_shape)
    losses, metrics = _rpn_losses(settings, features, anchors, image_shape, gt_boxes, gt_labels, sample_key)
    proposals = _propose(settings, logits, deltas, anchors, image_shape, training=True)
    rois = box_head.sample_rois(
        proposals,
        gt_boxes,
        gt_labels,
        sample_key,
        foreground_iou=settings.FRCNN.FG_THRESH,
        batch_per_image=settings.FRCNN.BATCH_PER_IM,
        foreground_ratio=settings.FRCNN.FG_RATIO,
    )
    roi_features = _RoIFeatures(settings, features, strides, training=True, after=[proposals.boxes])
    box_losses, box_metrics, box_features = _box_branch(settings, roi_features, rois, image_shape, gt_boxes, gt_labels)
    losses, metrics = {**losses, **box_losses}, {**metrics, **box_metrics}
    if settings.MODE_MASK:
        mask_losses, mask_metrics = _mask_branch(settings, roi_features, box_features, rois, image_shape, gt_masks)
        losses, metrics = {**losses, **mask_losses}, {**metrics, **mask_metrics}
    return losses, metrics


@collect_variables(MODEL_VARIABLES)
def build_inference(settings: Config, image: tf.Tensor, image_shape: tf.Tensor) -> box_head.Detections:
    """Builds the detections of a batch.

    Args:
        image: uint8 [N, H, W, 3], BGR, padded at the bottom and right. image_shape: int32 [N, 2].
    Returns:
        box_head.Detections of all images together, with masks [R, M, M] if settings.MODE_MASK. A detection with score
            NaN means that the network overflowed on that image.
    """
    features, strides = _features(settings, image, image_shape, training=False)
    logits, deltas, anchors = _rpn(settings, features, strides, image_shape)
    proposals = _propose(settings, logits, deltas, anchors, image_shape, training=False)
    _name_stages(proposals.boxes, proposals.logits)
    roi_features = _RoIFeatures(settings, features, strides, training=False, after=[proposals.boxes])
    # float16 overflows in the maps first, and a CPU's ReLU converts the NaN that result in the heads to 0.
    maps = features if features[0].dtype == tf.float16 else []
    detections = _detect(settings, roi_features, proposals, image_shape, [*maps, logits, deltas])
    if not settings.MODE_MASK:
        return detections
    boxes, labels, image_index = _at_least_one(detections.boxes, detections.labels, detections.image_index)
    logits = _mask_logits(settings, roi_features.for_masks(boxes, image_index), labels)[
        : tf.shape(detections.labels)[0]
    ]
    scores = tf.where(_is_finite(logits), detections.scores, math.nan)
    return detections._replace(scores=scores, masks=tf.sigmoid(logits))


def _is_finite(x):
    """Returns whether all values of each item of [N, ...] are finite: bool [N]."""
    return tf.reduce_all(tf.math.is_finite(x), axis=list(range(1, x.shape.rank)))


def _name_stages(*tensors, first=0):
    """Gives the tensors the names STAGE_TENSORS[first], STAGE_TENSORS[first + 1], ..."""
    for tensor, name in zip(tensors, STAGE_TENSORS[first:]):
        tf.identity(tensor, name)


# ---------------------------------------------------------------------------------------------------- conventions


class _Conventions(NamedTuple):
    """Framework-specific details that no published configuration states but that trained weights depend on.

    The epsilon in the rule that assigns RoIs to levels also differs between frameworks, without a measurable effect.
    """

    half_pixel: bool  # see `roi_align.roi_align`
    adaptive: bool  # see `roi_align.roi_align`
    rounded_anchors: bool  # coordinates rounded to whole pixels
    fitted_anchors: bool  # spacing: padded image size // map size, instead of the level's stride
    largest_box: float | None  # limit in pixels of a box grown from the smallest anchor; None: the largest image
    norm_first: bool  # in box and mask heads: GroupNorm before ReLU
    best_first: bool  # see `rpn.anchor_targets`
    across_border: bool  # see `rpn.anchor_targets`


REFERENCE = _Conventions(
    half_pixel=True,
    adaptive=False,
    rounded_anchors=False,
    fitted_anchors=False,
    largest_box=None,
    norm_first=False,
    best_first=False,
    across_border=False,
)
_OF_PYTORCH = REFERENCE._replace(largest_box=1000, norm_first=True, best_first=True, across_border=True)
CONVENTIONS = Registry("CONVENTIONS")
CONVENTIONS.register("tensorpack", REFERENCE)
CONVENTIONS.register(
    "torchvision",
    _OF_PYTORCH._replace(half_pixel=False, rounded_anchors=True, fitted_anchors=True),
)
CONVENTIONS.register("detectron2", _OF_PYTORCH._replace(adaptive=True))


def _conventions(settings):
    return CONVENTIONS.find(settings.CONVENTIONS)


# ---------------------------------------------------------------------------------------------------- features


def _norm(name, training):
    """The norm of this name; in inference, SyncBN uses its stored statistics and is folded."""
    return "FreezeBN" if name == "SyncBN" and not training else name


def _head_options(settings, norm, is_valid, training):
    """Returns the keywords of a head's convolutions. norm: of the registered head. is_valid: bool, of R, or None."""
    if norm == "BN":
        norm = settings.FPN.NORM if settings.FPN.NORM in BATCH_NORMS else "SyncBN"
    return {
        "norm": _norm(norm, training),
        "norm_first": _conventions(settings).norm_first,
        "is_valid": None if is_valid is None else tf.reshape(is_valid, [-1]),
    }


def _backbone_options(settings, training):
    """Returns the keywords of a registered backbone."""
    return {
        "width": settings.BACKBONE.WIDTH,
        "freeze_at": settings.BACKBONE.FREEZE_AT,
        "freeze_affine": settings.BACKBONE.FREEZE_AFFINE,
        "norm": _norm(settings.BACKBONE.NORM, training),
        "epsilon": settings.BACKBONE.NORM_EPSILON,
        "tf_pad_mode": settings.BACKBONE.TF_PAD_MODE,
        "stride_1x1": settings.BACKBONE.STRIDE_1X1,
    }


def _normalise(settings, image, image_shape):
    """Converts uint8 BGR to float32, minus PIXEL_MEAN, divided by PIXEL_STD; padding becomes 0."""
    mean, std = (np.array(x[::-1], np.float32) for x in (settings.PREPROC.PIXEL_MEAN, settings.PREPROC.PIXEL_STD))
    height, width = tf.shape(image)[1], tf.shape(image)[2]
    image_height, image_width = tf.split(tf.cast(image_shape, tf.float32), 2, axis=1)
    rows, columns = (tf.cast(tf.range(size), tf.float32) for size in (height, width))
    is_image = (rows < image_height)[:, :, None] & (columns < image_width)[:, None, :]
    is_image = tf.cast(is_image, tf.float32)[..., None]
    return (tf.cast(image, tf.float32) - mean) * is_image / std


def _compute_dtype(settings, training):
    return tf.as_dtype(settings.TRAIN.PRECISION if training else settings.TEST.PRECISION)


def _features(settings, image, image_shape, *, training):
    """Returns the maps for proposals, [N, H / stride, W / stride, C] in the compute dtype, and their strides."""
    num_blocks = settings.BACKBONE.RESNET_NUM_BLOCKS
    with collect_variables(BACKBONE_VARIABLES):
        features = BACKBONES.find(settings.BACKBONE.NAME).build(
            tf.cast(_normalise(settings, image, image_shape), _compute_dtype(settings, training)),
            num_blocks=num_blocks if settings.MODE_FPN else num_blocks[:3],
            **_backbone_options(settings, training),
        )
    if settings.MODE_FPN:
        options = dict(channels=settings.FPN.NUM_CHANNEL, norm=_norm(settings.FPN.NORM, training))
        return fpn(features, **options), settings.FPN.ANCHOR_STRIDES
    return features[-1:], [settings.RPN.ANCHOR_STRIDE]


class _RoIFeatures:
    """Pools the features of RoIs. C4 and FPN differ here, and only here."""

    def __init__(self, settings, features, strides, *, training, after=()):
        self._settings, self._training = settings, training
        # p6 serves proposals only
        levels = slice(0, 4) if settings.MODE_FPN else slice(0, 1)
        conventions = _conventions(settings)
        self._pyramid = roi_align.Pyramid(
            features[levels],
            strides[levels],
            half_pixel=conventions.half_pixel,
            adaptive=conventions.adaptive,
            after=after,
        )
        self._dtype = features[0].dtype

    def _align(self, boxes, image_index, resolution):
        aligned = self._pyramid.align(boxes, image_index, resolution=resolution)
        return tf.cast(aligned, self._dtype)

    def _c4_stage(self, boxes, image_index):
        """Applies the backbone's last stage to RoIs: [R, 7, 7, D]."""
        x = self._align(boxes, image_index, C4_RESOLUTION)
        shared = tfv1.variable_scope(tfv1.get_variable_scope(), reuse=tfv1.AUTO_REUSE)
        with shared, collect_variables(BACKBONE_VARIABLES):
            return BACKBONES.find(self._settings.BACKBONE.NAME).last_stage(
                x,
                num_blocks=self._settings.BACKBONE.RESNET_NUM_BLOCKS,
                **_backbone_options(self._settings, self._training),
            )

    def for_boxes(self, boxes, image_index):
        """Pools features for the box head: boxes float32 [R, 4], image_index int32 [R] -> [R, 7, 7, D]."""
        if self._settings.MODE_FPN:
            return self._align(boxes, image_index, BOX_RESOLUTION)
        return self._c4_stage(boxes, image_index)

    def for_masks(self, boxes, image_index, *, box_features=None, rows=None):
        """Pools features for the mask head: boxes float32 [F, 4], image_index int32 [F] -> [F, M / 2, M / 2, D].

        In C4, masks share the features of the boxes: if `box_features` [R, 7, 7, D] are given, the result is their
        `rows`.
        """
        if self._settings.MODE_FPN:
            return self._align(boxes, image_index, MASK_RESOLUTION)
        if box_features is not None:
            return box_ops.gather_rows(box_features, rows)
        return self._c4_stage(boxes, image_index)


# ---------------------------------------------------------------------------------------------------- proposals


def _rpn(settings, features, strides, image_shape):
    """Returns the RPN's outputs for all levels: float32 logits [N, A], deltas [N, A, 4], and rpn.Anchors."""
    logits, deltas = rpn.rpn_head(features, **_rpn_options(settings))
    distances = np.array(strides)[:, None]
    anchors = rpn.make_anchors(
        features,
        _valid_cells(settings, image_shape, strides),
        strides=_fitted_distances(features, strides) if _conventions(settings).fitted_anchors else distances,
        base_anchors=_base_anchors(settings),
    )
    return logits, deltas, anchors


def _rpn_options(settings):
    return {
        "channels": settings.FPN.NUM_CHANNEL if settings.MODE_FPN else settings.RPN.HEAD_DIM,
        "num_anchors": _base_anchors(settings).shape[1],
        "num_convs": settings.RPN.NUM_CONVS,
    }


def _base_anchors(settings):
    """Returns the anchors of one cell of each level, centred on (0, 0): float32 NumPy [L, K, 4]."""
    sizes, ratios = settings.RPN.ANCHOR_SIZES, settings.RPN.ANCHOR_RATIOS
    size_of_level = [[size] for size in sizes] if settings.MODE_FPN else [sizes]
    base_anchors = np.stack([np_boxes.base_anchors(sizes, ratios) for sizes in size_of_level])
    return np.round(base_anchors) if _conventions(settings).rounded_anchors else base_anchors


def _fitted_distances(features, strides):
    """Returns the anchor spacing of `fitted_anchors` for each of L levels: int32 [L, 4], x y x y."""
    size = tf.shape(features[0])[1:3] * strides[0]
    distances = [tf.unstack(size // tf.shape(x)[1:3]) for x in features]
    return tf.stack([[x, y, x, y] for y, x in distances])


def _valid_cells(settings, image_shape, strides):
    """Returns the rows and columns of each of L levels' maps that each image would have alone: float32 [N, L, 2]."""
    size = tf.cast(image_shape, tf.float32)[:, None]
    strides = np.array(strides, np.float32)[:, None]
    if not settings.MODE_FPN:
        return tf.floor(size / strides)
    multiple = padding_multiple(settings)
    return tf.math.ceil(tf.math.ceil(size / multiple) * (multiple / strides))


def _rpn_losses(settings, features, anchors, image_shape, gt_boxes, gt_labels, sample_key):
    """Computes losses and metrics of the RPN on sampled anchors."""
    targets = rpn.anchor_targets(
        anchors.boxes,
        anchors.is_valid,
        image_shape,
        gt_boxes,
        gt_labels,
        foreground_iou=settings.RPN.POSITIVE_ANCHOR_THRESH,
        background_iou=settings.RPN.NEGATIVE_ANCHOR_THRESH,
        crowd_overlap=settings.RPN.CROWD_OVERLAP_THRESH,
        best_first=_conventions(settings).best_first,
        across_border=_conventions(settings).across_border,
    )
    picked = box_ops.sample(
        targets.is_foreground,
        targets.is_background,
        box_ops.random_keys(sample_key, anchors.identity, purpose="anchors"),
        size=settings.RPN.BATCH_PER_IM,
        foreground_ratio=settings.RPN.FG_RATIO,
        is_long=True,
    )
    logits, deltas = rpn.rpn_head_at(features, picked.index, **_rpn_options(settings))
    losses = rpn.rpn_losses(
        logits,
        deltas,
        anchors.boxes,
        targets.gt_index,
        gt_boxes,
        picked,
        batch_per_image=settings.RPN.BATCH_PER_IM,
    )
    return losses, rpn.rpn_metrics(logits, picked)


def _max_log_size(settings):
    """Returns the limit of a box's growth: the log of the largest size / 16 pixels, the smallest anchor's scale."""
    return math.log((_conventions(settings).largest_box or largest_edge(settings)) / 16.0)


def _propose(settings, logits, deltas, anchors, image_shape, *, training):
    """Returns rpn.Proposals from the outputs of `_rpn`."""
    phase = "TRAIN" if training else "TEST"
    if settings.MODE_FPN and settings.FPN.PROPOSAL_MODE == "Level":
        groups = anchors.sizes
        pre_nms_topk = post_nms_topk = getattr(settings.RPN, f"{phase}_PER_LEVEL_NMS_TOPK")
    else:
        groups = [tf.shape(logits)[1]]
        pre_nms_topk, post_nms_topk = (getattr(settings.RPN, f"{phase}_{x}_NMS_TOPK") for x in ("PRE", "POST"))
    return rpn.propose(
        logits,
        deltas,
        anchors,
        image_shape,
        groups=groups,
        pre_nms_topk=pre_nms_topk,
        post_nms_topk=post_nms_topk,
        nms_threshold=settings.RPN.PROPOSAL_NMS_THRESH,
        min_size=settings.RPN.MIN_SIZE,
        max_log_size=_max_log_size(settings),
    )


# ---------------------------------------------------------------------------------------------------- boxes


def _head_outputs(settings, x, scope, *, class_agnostic, is_valid=None, training=False):
    """Applies the box head in the published variable scopes: [R, 7, 7, D] -> class_logits, deltas.

    Args:
        is_valid: bool [N, S], of the R = N * S RoIs, in training
    """
    outputs = dict(num_classes=settings.DATA.NUM_CATEGORY, class_agnostic=class_agnostic)
    with tfv1.variable_scope(scope):
        if not settings.MODE_FPN:
            return box_head.box_outputs(mean_of_pixels(x), **outputs)
        head, norm = box_head.HEADS.find(settings.FPN.FRCNN_HEAD_FUNC)
        with tfv1.variable_scope("head") if settings.FPN.CASCADE else tf.name_scope("head"):
            x = head(
                x,
                conv_channels=settings.FPN.FRCNN_CONV_HEAD_DIM,
                fc_channels=settings.FPN.FRCNN_FC_HEAD_DIM,
                **_head_options(settings, norm, is_valid, training),
            )
        with tfv1.variable_scope("outputs"):
            return box_head.box_outputs(x, **outputs)


def _run_cascade(settings, roi_features, boxes, is_valid, image_shape, *, training):
    """Runs the stages of a cascade on boxes [N, S, 4]: see `cascade.cascade`."""

    def head(index, boxes, is_valid):
        x = roi_features.for_boxes(tf.reshape(boxes, [-1, 4]), box_head.image_index(boxes))
        x = cascade.scale_gradient(x, 1.0 / len(settings.CASCADE.IOUS))
        options = dict(class_agnostic=True, is_valid=is_valid, training=training)
        return _head_outputs(settings, x, f"cascade_rcnn_stage{index + 1}", **options)

    return cascade.cascade(
        boxes,
        is_valid,
        image_shape,
        head=head,
        weights=settings.CASCADE.BBOX_REG_WEIGHTS,
        max_log_size=_max_log_size(settings),
    )


def _box_branch(settings, roi_features, rois, image_shape, gt_boxes, gt_labels):
    """Computes losses and metrics of the box head, or of every stage of a cascade.

    Returns:
        losses, metrics, and the features of the RoIs [R, 7, 7, D], or None for a cascade
    """
    box_loss = box_head.BOX_LOSSES.find(settings.FRCNN.BOX_LOSS)
    loss_options = dict(box_loss=box_loss, box_loss_weight=settings.FRCNN.BOX_LOSS_WEIGHT)
    if not settings.FPN.CASCADE:
        x = roi_features.for_boxes(tf.reshape(rois.boxes, [-1, 4]), box_head.image_index(rois.boxes))
        options = dict(class_agnostic=False, is_valid=rois.is_valid, training=True)
        class_logits, deltas = _head_outputs(settings, x, "fastrcnn", **options)
        options = dict(weights=settings.FRCNN.BBOX_REG_WEIGHTS, **loss_options)
        losses = box_head.box_losses(class_logits, deltas, rois, gt_boxes, **options)
        metrics = box_head.box_metrics(class_logits, rois)
        return _prefixed("fastrcnn_losses", losses), _prefixed("fastrcnn", metrics), x
    losses, metrics = {}, {}
    stages, _ = _run_cascade(settings, roi_features, rois.boxes, rois.is_valid, image_shape, training=True)
    for index, (stage, iou) in enumerate(zip(stages, settings.CASCADE.IOUS)):
        if index > 0:
            rois = box_head.label_rois(stage.boxes, stage.is_valid, gt_boxes, gt_labels, foreground_iou=iou)
        options = dict(weights=settings.CASCADE.BBOX_REG_WEIGHTS[index], **loss_options)
        stage_losses = box_head.box_losses(stage.class_logits, stage.deltas, rois, gt_boxes, **options)
        losses.update(_prefixed(f"cascade_loss_stage{index + 1}/fastrcnn_losses", stage_losses))
        metrics.update(_prefixed(f"cascade_stage{index + 1}", box_head.box_metrics(stage.class_logits, rois)))
    return losses, metrics, None


def _detect(settings, roi_features, proposals, image_shape, computed):
    """Classifies and refines the proposals, and keeps the best: box_head.Detections without masks.

    Args:
        computed: list of [N, ...], which must be finite, as the outputs of the heads
    """
    n, slots = tf.shape(proposals.boxes)[0], tf.shape(proposals.boxes)[1]
    if settings.FPN.CASCADE:
        options = dict(image_shape=image_shape, training=False)
        stages, boxes = _run_cascade(settings, roi_features, proposals.boxes, proposals.is_valid, **options)
        probabilities, boxes = cascade.mean_probabilities(stages), boxes[:, :, None, :]
        raw = [probabilities, *[stage.deltas for stage in stages]]
    else:
        x = roi_features.for_boxes(tf.reshape(proposals.boxes, [-1, 4]), box_head.image_index(proposals.boxes))
        class_logits, deltas = _head_outputs(settings, x, "fastrcnn", class_agnostic=False)
        probabilities = tf.nn.softmax(class_logits)
        raw = [probabilities, deltas]
        deltas = tf.reshape(deltas, [n, slots, settings.DATA.NUM_CATEGORY + 1, 4])[:, :, 1:]
        boxes = box_ops.decode(
            deltas,
            proposals.boxes[:, :, None],
            weights=settings.FRCNN.BBOX_REG_WEIGHTS,
            max_log_size=_max_log_size(settings),
        )
    probabilities = tf.reshape(probabilities, [n, slots, settings.DATA.NUM_CATEGORY + 1])
    _name_stages(probabilities, boxes, first=2)
    computed = computed + [tf.reshape(x, [n, -1]) for x in raw]
    return box_head.detect(
        probabilities,
        boxes,
        proposals.is_valid,
        image_shape,
        is_finite=tf.reduce_all(tf.stack([_is_finite(x) for x in computed]), axis=0),
        score_threshold=settings.TEST.RESULT_SCORE_THRESH,
        nms_threshold=settings.TEST.FRCNN_NMS_THRESH,
        max_per_image=settings.TEST.RESULTS_PER_IM,
        soft_nms=settings.TEST.SOFT_NMS,
        soft_nms_sigma=settings.TEST.SOFT_NMS_SIGMA,
    )


# ---------------------------------------------------------------------------------------------------- masks


def _at_least_one(*tensors):
    """Pads tensors of RoIs [R, ...] with a row of zeros if R = 0: oneDNN fails on convolutions of empty batches."""
    count = tf.shape(tensors[0])[0]
    rows = tf.cast(tf.range(tf.maximum(count, 1)), tf.int64)
    return [tf.gather(_with_zeros(x), rows) for x in tensors]


def _with_zeros(x):
    """Adds a row of zeros to a tensor [R, ...]."""
    wide = tf.cast(x, tf.int64) if x.dtype == tf.int32 else x  # the host would join int32
    return tf.cast(tf.concat([wide, tf.zeros([1, *shape_list(x)[1:]], wide.dtype)], axis=0), x.dtype)


def _mask_logits(settings, features, labels, *, is_real=None, training=False):
    """Returns the logits of each RoI's class, float32 [F, M, M]; unused for label 0, the row of `_at_least_one`."""
    norm = mask_head.HEADS.find(settings.FPN.MRCNN_HEAD_FUNC) if settings.MODE_FPN else "None"
    return mask_head.mask_head(
        features,
        tf.maximum(labels, 1),
        num_convs=4 if settings.MODE_FPN else 0,
        channels=settings.MRCNN.HEAD_DIM,
        num_classes=settings.DATA.NUM_CATEGORY,
        **_head_options(settings, norm, is_real, training),
    )


def _mask_branch(settings, roi_features, box_features, rois, image_shape, gt_masks):
    """Computes the mask head's loss and metrics on the foreground RoIs; in a cascade, on those of the first stage."""
    n, slots = shape_list(rois.labels)
    (row,) = _at_least_one(tf.where(tf.reshape(rois.is_foreground, [-1]))[:, 0])  # if there is none: slot 0, weight 0
    boxes, labels, gt_index, is_real = (
        tf.gather(tf.reshape(x, [-1, *x.shape[2:]]), row)
        for x in (rois.boxes, rois.labels, rois.gt_index, rois.is_foreground)
    )
    image = tf.cast(row // tf.cast(slots, tf.int64), tf.int32)
    x = roi_features.for_masks(boxes, image, box_features=box_features, rows=row)
    logits = _mask_logits(settings, x, labels, is_real=is_real, training=True)
    targets = mask_head.mask_targets(gt_masks, image_shape, image, gt_index, boxes, resolution=logits.shape[1])
    loss = mask_head.mask_loss(logits, targets, image, is_real, num_images=n)
    metrics = mask_head.mask_metrics(logits, targets)
    return {"maskrcnn_loss/maskrcnn_loss": loss}, _prefixed("maskrcnn", metrics)


def _prefixed(prefix, scalars):
    """Returns the dict with `prefix/` before each name."""
    return {f"{prefix}/{name}": value for name, value in scalars.items()}
