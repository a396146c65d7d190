"""torchvision's ResNets and ResNeXts, and both versions of its Faster and Mask R-CNN with a feature pyramid.

Their padding is symmetric, which on even sizes equals our TF_PAD_MODE=False. Their images are RGB in [0, 1], normalised
with ImageNet's mean and deviation, which are our defaults.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from config import Config

from . import coco
from .mapping import (
    CONVOLUTION,
    CONVOLUTION_OF_RGB,
    IMAGENET_PIXELS,
    SAME,
    Model,
    Pair,
    bottleneck_name,
    check_counterpart,
    layer,
    per_class,
)

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
        **IMAGENET_PIXELS,
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


class Heads(NamedTuple):
    """The architecture of a detector beside its backbone. The second version of theirs has batch norm everywhere."""

    pyramid_norm: bool  # batch norm in the pyramid
    rpn_convs: int  # 3x3 convolutions of the RPN
    box_convs: bool  # four convolutions and one fully connected layer in the box head, not two fully connected ones
    box_norm: bool  # batch norm in these convolutions
    masks: bool  # a mask branch
    mask_norm: bool  # batch norm in its convolutions

    @classmethod
    def of(cls, has: Callable[[str, str], bool]) -> "Heads":
        """Derives it from the names of arrays. has: function (our name, theirs) -> whether there is such an array."""
        count = 1  # today's name, or that before torchvision 0.11
        while has(f"rpn/conv{count}/W", f"rpn.head.conv.{count}.0.weight"):
            count += 1
        return cls(
            pyramid_norm=has("fpn/lateral_1x1_c2/bn/gamma", "backbone.fpn.inner_blocks.0.1.running_mean"),
            rpn_convs=count,
            box_convs=has("fastrcnn/conv0/W", "roi_heads.box_head.0.0.weight"),
            box_norm=has("fastrcnn/conv0/bn/gamma", "roi_heads.box_head.0.1.running_mean"),
            masks=has("maskrcnn/conv/W", "roi_heads.mask_predictor.mask_fcn_logits.weight"),
            mask_norm=has("maskrcnn/fcn0/bn/gamma", "roi_heads.mask_head.0.1.running_mean"),
        )

    def settings(self) -> dict[str, object]:
        """The settings {key: value} of this architecture."""
        convs = "4conv1fc_bn" if self.box_norm else "4conv1fc" if self.box_convs else "2fc"
        return {
            "MODE_MASK": self.masks,
            "FPN.NORM": "FreezeBN" if self.pyramid_norm else "None",
            "RPN.NUM_CONVS": self.rpn_convs,
            "FPN.FRCNN_HEAD_FUNC": f"fastrcnn_{convs}_head",
            "FPN.MRCNN_HEAD_FUNC": f"maskrcnn_up4conv{'_bn' if self.mask_norm else ''}_head",
        }


def _convolution(ours, theirs, has_norm):
    """The pairs of a block of theirs: a convolution, with a bias or followed by batch norm."""
    if has_norm:
        return _norm_layer(ours, f"{theirs}.0", f"{theirs}.1")
    return layer(ours, f"{theirs}.0", CONVOLUTION)


def detector_pairs(
    num_blocks: Sequence[int], num_convolutions: int, heads: Heads, *, num_slots: int, slots: Sequence[int]
) -> list[Pair]:
    """The pairs of a Faster or Mask R-CNN with a feature pyramid.

    Args:
        num_blocks, num_convolutions: see `backbone_pairs`. num_slots: number of their classes, background included.
        slots: as `class_slots` returns them.
    """
    pairs = backbone_pairs(num_blocks, num_convolutions, prefix=BODY)
    for i in range(4):
        pairs += _convolution(f"fpn/lateral_1x1_c{i + 2}", f"backbone.fpn.inner_blocks.{i}", heads.pyramid_norm)
        pairs += _convolution(f"fpn/posthoc_3x3_p{i + 2}", f"backbone.fpn.layer_blocks.{i}", heads.pyramid_norm)
    for i in range(heads.rpn_convs):
        pairs += layer(f"rpn/conv{i}", f"rpn.head.conv.{i}.0", CONVOLUTION)
    pairs += layer("rpn/class", "rpn.head.cls_logits", CONVOLUTION)
    pairs += layer("rpn/box", "rpn.head.bbox_pred", CONVOLUTION)
    pairs += _box_head_pairs(heads)
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
    return pairs + (_mask_pairs(heads, num_slots, slots) if heads.masks else [])


def _box_head_pairs(heads):
    theirs = "roi_heads.box_head"
    if not heads.box_convs:
        return layer("fastrcnn/fc6", f"{theirs}.fc6") + layer("fastrcnn/fc7", f"{theirs}.fc7")
    pairs = layer("fastrcnn/fc", f"{theirs}.5")  # the fourth is a flattening
    for i in range(4):
        pairs += _convolution(f"fastrcnn/conv{i}", f"{theirs}.{i}", heads.box_norm)
    return pairs


def _mask_pairs(heads, num_slots, slots):
    pairs, theirs = [], "roi_heads.mask_predictor"
    for i in range(4):
        pairs += _convolution(f"maskrcnn/fcn{i}", f"roi_heads.mask_head.{i}", heads.mask_norm)
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
    heads = Heads.of(lambda ours, theirs: theirs in arrays)
    pairs = detector_pairs(num_blocks, num_convolutions, heads, num_slots=num_slots, slots=slots)
    published = COCO_V1.get(sha256[:8])
    settings = detector_settings(name, num_blocks, heads, epsilon=0.0 if published else 1e-5)
    return Model(
        f"torchvision's {'Mask' if heads.masks else 'Faster'} R-CNN with a feature pyramid"
        + (", second version" if heads.pyramid_norm else "")
        + (f", {published}, as published" if published else ""),
        [pair._replace(theirs=_name_in(arrays, pair.theirs)) for pair in pairs],
        {**settings, **coco.settings(len(slots) - 1)},
        ignored=_counters(arrays),
        notes=tuple(_notes(num_slots - len(slots), is_epsilon_known=bool(published) or heads.pyramid_norm)),
    )


def _name_in(arrays, name):
    """The name of an array in the file, which may be an old one."""
    for pattern, replacement in () if name in arrays else OLD_NAMES:
        old = re.sub(pattern, replacement, name)
        if old in arrays:
            return old
    return name


def detector_settings(name: str, num_blocks: Sequence[int], heads: Heads, *, epsilon: float) -> dict[str, object]:
    """The settings {key: value} that a detector of theirs needs.

    Args:
        name, num_blocks: BACKBONE.NAME and RESNET_NUM_BLOCKS. epsilon: of the backbone's batch norm.
    """
    return {
        "CONVENTIONS": "torchvision",
        "PREPROC.ANTIALIAS": False,
        "MODE_FPN": True,
        "FPN.CASCADE": False,
        **heads.settings(),
        **_backbone_settings(name, num_blocks, epsilon=epsilon),
        "RPN.ANCHOR_SIZES": [32, 64, 128, 256, 512],
        "RPN.ANCHOR_RATIOS": [0.5, 1.0, 2.0],
        "FRCNN.BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0],
    }


def _notes(num_dropped, *, is_epsilon_known):
    if num_dropped:
        yield f"{num_dropped} class slots between COCO's ids, which no class uses, are dropped (--all-slots keeps them)"
    if not is_epsilon_known:
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
    heads = Heads.of(lambda ours, theirs: ours in values) if "rpn/conv0/W" in values else None
    if heads:
        needed = detector_settings(name, num_blocks, heads, epsilon=epsilon)
    else:
        needed = _backbone_settings(name, num_blocks, epsilon=epsilon)
    check_counterpart("torchvision", settings, needed)
    if not heads:
        pairs = backbone_pairs(num_blocks, num_convolutions) + (layer("linear", "fc") if "linear/W" in values else [])
        return Model("torchvision's ResNet or ResNeXt", pairs, needed)
    num_classes = len(values.get("fastrcnn/outputs/class/b", [0])) - 1
    num_slots = coco.LAST_ID + 1 if settings.DATA.CLASS_NAMES[1:] == coco.NAMES else num_classes + 1
    options = dict(num_slots=num_slots, slots=class_slots(num_slots, all_slots=num_classes + 1 == num_slots))
    pairs = detector_pairs(num_blocks, num_convolutions, heads, **options)
    return Model(
        f"torchvision's {'Mask' if heads.masks else 'Faster'} R-CNN, num_classes={num_slots}",
        pairs,
        needed,
        constants=_zero_counters(pairs) if heads.pyramid_norm else {},
        notes=(f"the epsilon of batch norm is {epsilon}: FrozenBatchNorm2d's default is 1e-5",),
    )


def _zero_counters(pairs):
    """The counters of batches beside the statistics of batch norms that are not frozen: they only tell training."""
    means = (pair.theirs for pair in pairs if pair.theirs.endswith(".running_mean"))
    return {name.replace("running_mean", "num_batches_tracked"): np.zeros([], np.int64) for name in means}


def _count_blocks(values, stage):
    return sum(re.fullmatch(rf"group{stage}/block\d+/conv1/W", name) is not None for name in values)
