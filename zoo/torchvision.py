"""torchvision's ResNets and ResNeXts, and its Faster and Mask R-CNN on ResNet-50 with a feature pyramid.

Their padding is symmetric, which on even sizes equals our TF_PAD_MODE=False. Their images are RGB in [0, 1], normalised
with ImageNet's mean and deviation, which are our defaults.
"""

import re
from collections.abc import Sequence

import numpy as np

from config import Config

from . import coco
from .mapping import CONVOLUTION, CONVOLUTION_OF_RGB, SAME, MappingError, Model, Pair, bottleneck_name, layer, per_class

BODY = "backbone.body."  # of a detector
NORM = {"gamma": "weight", "beta": "bias", "mean/EMA": "running_mean", "variance/EMA": "running_var"}
# The published weights on COCO, by the beginning of their SHA-256; the epsilon of their batch norm is 0.
COCO_V1 = {"258fb6c6": "fasterrcnn_resnet50_fpn", "bf2d0c1e": "maskrcnn_resnet50_fpn"}
# Patterns of today's names, and the names before torchvision 0.11, which the published files have.
OLD_NAMES = (
    (r"(backbone\.fpn\.\w+_blocks\.\d)\.0\.(\w+)", r"\1.\2"),
    (r"rpn\.head\.conv\.0\.0\.(\w+)", r"rpn.head.conv.\1"),
    (r"roi_heads\.mask_head\.(\d)\.0\.(\w+)", lambda m: f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}.{m[2]}"),
)
UNUSED_LOGIT = -100.0  # of class slots that only torchvision has: probability 0


def recognise(arrays: dict[str, np.ndarray], *, sha256: str, all_slots: bool = False) -> Model | None:
    """The Model of a state dict, or None if the names are not torchvision's.

    Args:
        sha256: of the file, hexadecimal. all_slots: keep the 10 class slots between COCO's ids that no class uses.
    """
    if f"{BODY}layer1.0.conv1.weight" in arrays and "rpn.head.cls_logits.weight" in arrays:
        return _detector(arrays, sha256=sha256, all_slots=all_slots)
    if "conv1.weight" in arrays and "layer1.0.conv1.weight" in arrays:
        return _classifier(arrays)
    return None


# ------------------------------------------------------------------------------------------------------ backbones


def _shapes(arrays, prefix):
    """Derives (BACKBONE.NAME, blocks per stage, convolutions per block) from names and shapes."""
    stages = (1, 2, 3, 4)
    patterns = [re.compile(rf"{re.escape(prefix)}layer{stage}\.(\d+)\.conv1\.weight") for stage in stages]
    num_blocks = [sum(pattern.fullmatch(name) is not None for name in arrays) for pattern in patterns]
    if f"{prefix}layer1.0.conv3.weight" not in arrays:
        return "resnet_basic", num_blocks, 2
    kernel_shape = arrays[f"{prefix}layer1.0.conv2.weight"].shape
    return bottleneck_name(arrays[f"{prefix}conv1.weight"].shape[0], kernel_shape), num_blocks, 3


def _norm_layer(ours, convolution, norm, layout=CONVOLUTION):
    """The pairs of a convolution followed by batch norm."""
    pairs = [Pair(f"{ours}/bn/{leaf}", f"{norm}.{theirs}", SAME) for leaf, theirs in NORM.items()]
    return [Pair(f"{ours}/W", f"{convolution}.weight", layout), *pairs]


def backbone_pairs(num_blocks: Sequence[int], num_convolutions: int, *, prefix: str = "") -> list[Pair]:
    """The pairs of a ResNet or ResNeXt without its classifier.

    Args:
        num_blocks: of each stage. num_convolutions: of a block. prefix: of their names.
    """
    pairs = _norm_layer("conv0", f"{prefix}conv1", f"{prefix}bn1", CONVOLUTION_OF_RGB)
    for stage, blocks in enumerate(num_blocks):
        for i in range(blocks):
            ours, theirs = f"group{stage}/block{i}", f"{prefix}layer{stage + 1}.{i}"
            for k in range(1, num_convolutions + 1):
                pairs += _norm_layer(f"{ours}/conv{k}", f"{theirs}.conv{k}", f"{theirs}.bn{k}")
            if i == 0 and (stage > 0 or num_convolutions == 3):
                pairs += _norm_layer(f"{ours}/convshortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1")
    return pairs


def _backbone_settings(name, num_blocks, *, epsilon=1e-5):
    return {
        "BACKBONE.NAME": name,
        "BACKBONE.RESNET_NUM_BLOCKS": num_blocks,
        "BACKBONE.STRIDE_1X1": False,
        "BACKBONE.TF_PAD_MODE": False,
        "BACKBONE.NORM_EPSILON": epsilon,
        "PREPROC.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "PREPROC.PIXEL_STD": [58.395, 57.12, 57.375],
    }


def _counters(arrays):
    """Names of the counters of batches, which are no weights."""
    return frozenset(name for name in arrays if name.endswith(".num_batches_tracked"))


def _classifier(arrays):
    name, num_blocks, num_convolutions = _shapes(arrays, "")
    pairs = backbone_pairs(num_blocks, num_convolutions)
    if "fc.weight" in arrays:
        pairs += layer("linear", "fc")
    depth = sum(num_blocks) * num_convolutions + 2
    kind = "ResNet" if name.startswith("resnet") else f"ResNeXt {name.partition('_')[2]}"
    return Model(
        f"torchvision's {kind} of {depth} layers",
        pairs,
        _backbone_settings(name, num_blocks),
        ignored=_counters(arrays),
    )


# ------------------------------------------------------------------------------------------------------ detectors


def detector_pairs(
    num_blocks: Sequence[int], num_convolutions: int, *, num_slots: int, slots: Sequence[int], masks: bool
) -> list[Pair]:
    """The pairs of a Faster or Mask R-CNN with a feature pyramid.

    Args:
        num_blocks, num_convolutions: see `backbone_pairs`. num_slots: number of their classes, background included.
        slots: as `class_slots` returns them. masks: whether there is a mask branch.
    """
    pairs = backbone_pairs(num_blocks, num_convolutions, prefix=BODY)
    for i in range(4):
        pairs += layer(f"fpn/lateral_1x1_c{i + 2}", f"backbone.fpn.inner_blocks.{i}.0", CONVOLUTION)
        pairs += layer(f"fpn/posthoc_3x3_p{i + 2}", f"backbone.fpn.layer_blocks.{i}.0", CONVOLUTION)
    pairs += layer("rpn/conv0", "rpn.head.conv.0.0", CONVOLUTION)
    pairs += layer("rpn/class", "rpn.head.cls_logits", CONVOLUTION)
    pairs += layer("rpn/box", "rpn.head.bbox_pred", CONVOLUTION)
    pairs += layer("fastrcnn/fc6", "roi_heads.box_head.fc6")
    pairs += layer("fastrcnn/fc7", "roi_heads.box_head.fc7")
    theirs, boxes = "roi_heads.box_predictor", dict(size=4, num_theirs=num_slots)
    pairs += layer(
        "fastrcnn/outputs/class",
        f"{theirs}.cls_score",
        per_class(slots, num_theirs=num_slots),
        per_class(slots, num_theirs=num_slots, inner=SAME, empty=UNUSED_LOGIT),
    )
    pairs += layer(
        "fastrcnn/outputs/box",
        f"{theirs}.bbox_pred",
        per_class(slots, **boxes),
        per_class(slots, inner=SAME, **boxes),
    )
    return pairs + (_mask_pairs(num_slots, slots) if masks else [])


def _mask_pairs(num_slots, slots):
    pairs, theirs = [], "roi_heads.mask_predictor"
    for i in range(4):
        pairs += layer(f"maskrcnn/fcn{i}", f"roi_heads.mask_head.{i}.0", CONVOLUTION)
    pairs += layer("maskrcnn/deconv", f"{theirs}.conv5_mask", CONVOLUTION)
    masks = dict(num_theirs=num_slots)
    return pairs + layer(
        "maskrcnn/conv",
        f"{theirs}.mask_fcn_logits",
        per_class(slots[1:], inner=CONVOLUTION, **masks),
        per_class(slots[1:], inner=SAME, **masks),
    )


def class_slots(num_slots: int, *, all_slots: bool = False) -> tuple[int, ...]:
    """The slots in their model of background and of our classes; the slot of a class of COCO is its category id."""
    if num_slots == coco.LAST_ID + 1 and not all_slots:
        return (0, *coco.IDS)
    return tuple(range(num_slots))


def _detector(arrays, *, sha256, all_slots):
    name, num_blocks, num_convolutions = _shapes(arrays, BODY)
    num_slots = len(arrays.get("roi_heads.box_predictor.cls_score.bias", ()))
    slots = class_slots(num_slots, all_slots=all_slots)
    masks = any(name.startswith("roi_heads.mask_predictor.") for name in arrays)
    pairs = detector_pairs(num_blocks, num_convolutions, num_slots=num_slots, slots=slots, masks=masks)
    published = COCO_V1.get(sha256[:8])
    settings = detector_settings(name, num_blocks, masks=masks, epsilon=0.0 if published else 1e-5)
    return Model(
        f"torchvision's {'Mask' if masks else 'Faster'} R-CNN with a feature pyramid"
        + (f", {published}, as published" if published else ""),
        [pair._replace(theirs=_name_in(arrays, pair.theirs)) for pair in pairs],
        {**settings, **coco.settings(len(slots) - 1)},
        ignored=_counters(arrays),
        notes=tuple(_notes(num_slots - len(slots), published)),
    )


def _name_in(arrays, name):
    """The name of an array in the file, which may be an old one."""
    for pattern, replacement in () if name in arrays else OLD_NAMES:
        old = re.sub(pattern, replacement, name)
        if old in arrays:
            return old
    return name


def detector_settings(name: str, num_blocks: Sequence[int], *, masks: bool, epsilon: float) -> dict[str, object]:
    """The settings {key: value} that a detector of theirs needs.

    Args:
        name, num_blocks: BACKBONE.NAME and RESNET_NUM_BLOCKS. masks: MODE_MASK. epsilon: of batch norm.
    """
    return {
        "CONVENTIONS": "torchvision",
        "MODE_FPN": True,
        "MODE_MASK": masks,
        "FPN.CASCADE": False,
        **_backbone_settings(name, num_blocks, epsilon=epsilon),
        "RPN.ANCHOR_SIZES": [32, 64, 128, 256, 512],
        "RPN.ANCHOR_RATIOS": [0.5, 1.0, 2.0],
        "FRCNN.BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0],
    }


def _notes(num_dropped, published):
    if num_dropped:
        yield f"{num_dropped} class slots between COCO's ids, which no class uses, are dropped (--all-slots keeps them)"
    if not published:
        yield (
            "batch norm's epsilon is assumed to be 1e-5; if training began with torchvision's weights on COCO, it was "
            "0: add --set BACKBONE.NORM_EPSILON=0"
        )


# ------------------------------------------------------------------------------------------------------ from ours


def counterpart(values: dict[str, np.ndarray], settings: Config) -> Model:
    """The Model of theirs with the architecture of ours.

    Args:
        values: our variables by name. settings: those of their training.
    Raises:
        MappingError: no model of theirs computes the same with such weights.
    """
    num_blocks = [_count_blocks(values, stage) for stage in range(4)]
    num_convolutions = 3 if "group0/block0/conv3/W" in values else 2
    name, epsilon = settings.BACKBONE.NAME, settings.BACKBONE.NORM_EPSILON
    is_detector = "rpn/conv0/W" in values
    if is_detector:
        masks = "maskrcnn/conv/W" in values
        needed = detector_settings(name, num_blocks, masks=masks, epsilon=epsilon)
    else:
        needed = _backbone_settings(name, num_blocks, epsilon=epsilon)
    other = {key: settings.value(key) for key, value in needed.items() if not _equal(settings.value(key), value)}
    if other:
        shown = ", ".join(f"{key}={value}" for key, value in other.items())
        raise MappingError(f"torchvision has no counterpart of models with {shown}")
    if not is_detector:
        pairs = backbone_pairs(num_blocks, num_convolutions) + (layer("linear", "fc") if "linear/W" in values else [])
        return Model("torchvision's ResNet or ResNeXt", pairs, needed)
    num_classes = len(values.get("fastrcnn/outputs/class/b", [0])) - 1
    num_slots = coco.LAST_ID + 1 if settings.DATA.CLASS_NAMES[1:] == coco.NAMES else num_classes + 1
    options = dict(
        num_slots=num_slots, slots=class_slots(num_slots, all_slots=num_classes + 1 == num_slots), masks=masks
    )
    return Model(
        f"torchvision's {'Mask' if masks else 'Faster'} R-CNN, num_classes={num_slots}",
        detector_pairs(num_blocks, num_convolutions, **options),
        needed,
        notes=(f"the epsilon of batch norm is {epsilon}: FrozenBatchNorm2d's default is 1e-5",),
    )


def _count_blocks(values, stage):
    return sum(re.fullmatch(rf"group{stage}/block\d+/conv1/W", name) is not None for name in values)


def _equal(ours, theirs):
    return (list(ours) if isinstance(ours, tuple) else ours) == theirs
