"""Detectron2's ResNets and its Faster, Mask and Cascade R-CNN (C4 and FPN), and the ResNets of Detectron before it.

Files do not contain the position of the stride, and rarely the pixel statistics. Both are taken from the model zoo's
configurations for such weights, and a note states so. Images are BGR, unless the pixel statistics in the file are in
RGB order. The background class is the last one, and has no box.
"""

import re

import numpy as np

from config import Config

from . import coco
from .mapping import (
    CONVOLUTION,
    CONVOLUTION_OF_RGB,
    LINEAR,
    SAME,
    MappingError,
    Model,
    Pair,
    bottleneck_name,
    check_counterpart,
    layer,
    per_class,
)

BATCH_NORM = {"gamma": "weight", "beta": "bias", "mean/EMA": "running_mean", "variance/EMA": "running_var"}
AFFINE = {"gamma": "weight", "beta": "bias"}
EPSILON = 1e-5
ANTIALIAS_NOTE = "images are resized with antialiasing, as there (PREPROC.ANTIALIAS)"
# Pixel statistics (red, green, blue) and the position of the stride, by the origin of the backbone.
MSRA = {
    "BACKBONE.STRIDE_1X1": True,
    "PREPROC.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "PREPROC.PIXEL_STD": [1.0, 1.0, 1.0],
}
FAIR_GN = {**MSRA, "BACKBONE.STRIDE_1X1": False}
FAIR_RESNEXT = {**FAIR_GN, "PREPROC.PIXEL_STD": [58.395, 57.12, 57.375]}
TORCHVISION = FAIR_RESNEXT  # the same numbers, but the input is RGB


def recognise(arrays: dict[str, np.ndarray], **unused) -> Model | None:
    """The Model of a file, or None if the names are not Detectron2's.

    Raises:
        MappingError: it is a model of theirs without a counterpart here.
    """
    if "proposal_generator.rpn_head.objectness_logits.weight" in arrays:
        if not {"backbone.stem.conv1.weight", "backbone.bottom_up.stem.conv1.weight"} & arrays.keys():
            kind = "a RegNet" if "backbone.bottom_up.stem.conv.weight" in arrays else "another backbone than a ResNet"
            raise MappingError(f"it is a detector of Detectron2 with {kind}, which has no counterpart here")
        is_c4 = "backbone.stem.conv1.weight" in arrays
        return _detector(_Names(arrays, is_c4=is_c4))
    if "stem.conv1.weight" in arrays or "res2_0_branch2a_w" in arrays:
        return _backbone(_Names(arrays, is_c4=None))
    return None


class _Names:
    """The arrays of a file by Detectron2's names, even if the file has Detectron's.

    Attributes:
        arrays: dict by the file's names. is_c4: False for a pyramid, None for a backbone alone.
        prefix: of the backbone's names. is_caffe2: whether the names are Detectron's.
        is_group_norm: whether the backbone has GroupNorm, not batch norm.
    """

    def __init__(self, arrays, *, is_c4):
        self.arrays, self.is_c4 = arrays, is_c4
        self.prefix = prefix = {None: "", True: "backbone.", False: "backbone.bottom_up."}[is_c4]
        self.is_caffe2 = "res2_0_branch2a_w" in arrays
        self.is_group_norm = any("_gn_" in name for name in arrays) or (
            not self.is_caffe2 and f"{prefix}stem.conv1.norm.running_mean" not in arrays
        )

    def in_file(self, name):
        """The file's name of a backbone's array that Detectron2 calls `name`."""
        if not self.is_caffe2:
            return name
        norm = "gn" if self.is_group_norm else "bn"
        name = name.removeprefix(self.prefix).replace(".norm.weight", f"_{norm}_s").replace(".norm.bias", f"_{norm}_b")
        name = name.replace(".weight", "_w").replace("stem.conv1_bn", "res_conv1_bn").replace("stem.conv1", "conv1")
        name = re.sub(r"\.conv([123])", lambda m: "_branch2" + "abc"[int(m[1]) - 1], name)
        return name.replace(".shortcut", "_branch1").replace(".", "_")

    def has(self, ours, theirs):
        """Whether there is an array that we call `ours` and Detectron2 calls `theirs`."""
        del ours
        return self.in_file(theirs) in self.arrays

    def backbone_name(self):
        """BACKBONE.NAME, from the shapes of the first convolutions."""
        if not self.has("group0/block0/conv3/W", f"{self.prefix}res2.0.conv3.weight"):
            return "resnet_basic"
        stem, kernel = (self.arrays[self.in_file(f"{self.prefix}{x}.weight")] for x in ("stem.conv1", "res2.0.conv2"))
        return bottleneck_name(stem.shape[0], kernel.shape)

    def size(self, ours, theirs):
        """The number of outputs of a layer, whose bias we call `ours` and whose weight Detectron2 calls `theirs`."""
        del ours
        return len(self.arrays[theirs])

    def num_classes(self, ours, theirs):
        """The number of classes, without background, of the layer `ours` or `theirs` that scores them."""
        del ours
        return len(self.arrays.get(f"{theirs}.bias", [0])) - 1


class _NamesOfOurs(_Names):
    """The arrays that our variables become, for the way back.

    Attributes:
        arrays: empty: there is no file.
    """

    def __init__(self, values, backbone_name, *, is_c4):
        super().__init__({}, is_c4=is_c4)
        self._values, self._backbone_name = values, backbone_name
        self.is_group_norm = "conv0/gn/gamma" in values

    def has(self, ours, theirs):
        """See _Names.has."""
        return ours in self._values

    def backbone_name(self):
        """See _Names.backbone_name."""
        return self._backbone_name

    def size(self, ours, theirs):
        """See _Names.size."""
        return len(self._values[ours])

    def num_classes(self, ours, theirs):
        """See _Names.num_classes."""
        return len(self._values.get(f"{ours}/b", [0])) - 1


# ------------------------------------------------------------------------------------------------------ backbones


def _stage(stage, names):
    """The folder of the blocks of a stage 0..3; in C4 the last stage belongs to the head."""
    return f"roi_heads.res{stage + 2}" if names.is_c4 and stage == 3 else f"{names.prefix}res{stage + 2}"


def _num_blocks(names):
    """The blocks of each stage."""
    num_blocks = []
    for stage in range(4):
        count = 0
        while names.has(f"group{stage}/block{count}/conv1/W", f"{_stage(stage, names)}.{count}.conv1.weight"):
            count += 1
        num_blocks.append(count)
    return num_blocks


def _norm_layer(ours, theirs, names, layout=CONVOLUTION):
    """The pairs of a backbone's convolution and of its norm."""
    scope = "gn" if names.is_group_norm else "bn"
    leaves = AFFINE if names.is_group_norm or names.is_caffe2 else BATCH_NORM
    pairs = [Pair(f"{ours}/{scope}/{leaf}", names.in_file(f"{theirs}.norm.{x}"), SAME) for leaf, x in leaves.items()]
    return [Pair(f"{ours}/W", names.in_file(f"{theirs}.weight"), layout), *pairs]


def _backbone_pairs(names, *, is_rgb):
    stem = CONVOLUTION_OF_RGB if is_rgb else CONVOLUTION
    pairs = _norm_layer("conv0", f"{names.prefix}stem.conv1", names, stem)
    for stage, blocks in enumerate(_num_blocks(names)):
        for i in range(blocks):
            ours, theirs = f"group{stage}/block{i}", f"{_stage(stage, names)}.{i}"
            for k in range(1, _num_convolutions(names) + 1):
                pairs += _norm_layer(f"{ours}/conv{k}", f"{theirs}.conv{k}", names)
            if names.has(f"{ours}/convshortcut/W", f"{theirs}.shortcut.weight"):
                pairs += _norm_layer(f"{ours}/convshortcut", f"{theirs}.shortcut", names)
    return pairs


def _num_convolutions(names):
    """The convolutions of a block."""
    return 2 if names.backbone_name() == "resnet_basic" else 3


def _statistics_without_effect(pairs, names):
    """Statistics without effect, by name: Detectron's batch norm is a scale and a shift only, and has none."""
    if names.is_group_norm or not names.is_caffe2:
        return {}
    added = {}
    for pair in pairs:
        if pair.ours.endswith("/bn/gamma") and pair.theirs in names.arrays:
            layer_name, channels = pair.ours.removesuffix("/gamma"), names.arrays[pair.theirs].shape
            added[f"{layer_name}/mean/EMA"] = np.zeros(channels, np.float32)
            added[f"{layer_name}/variance/EMA"] = np.full(channels, 1 - EPSILON, np.float32)
    return added


def _pixels(names, backbone_name):
    """The settings of pixel statistics and stride, whether the input is RGB, and a note on these assumptions."""
    stored = [names.arrays.get(f"pixel_{x}") for x in ("mean", "std")]
    origin, settings, is_rgb = "MSRA's ResNets", MSRA, False
    if backbone_name.startswith("resnext"):
        origin, settings = "FAIR's ResNeXts", FAIR_RESNEXT
    elif names.is_group_norm:
        origin, settings = "FAIR's ResNets with GroupNorm", FAIR_GN
    elif "stem.conv1.norm.running_mean" in names.arrays:
        origin, settings, is_rgb = "torchvision's ResNets", TORCHVISION, True
    if all(x is not None and x.size == 3 for x in stored):
        mean, std = (x.ravel().tolist() for x in stored)
        is_rgb = mean[0] > mean[2]  # ImageNet has more red than blue
        order = slice(None) if is_rgb else slice(None, None, -1)
        settings = {**settings, "PREPROC.PIXEL_MEAN": mean[order], "PREPROC.PIXEL_STD": std[order]}
    text = f"the stride's position, and pixel statistics that the file lacks, are assumed to be those of {origin}; "
    return settings, is_rgb, text + "other weights need --set BACKBONE.STRIDE_1X1=... PREPROC.PIXEL_STD=..."


def _backbone_settings(names):
    return {
        "BACKBONE.NAME": names.backbone_name(),
        "BACKBONE.RESNET_NUM_BLOCKS": _num_blocks(names),
        "BACKBONE.TF_PAD_MODE": False,
        "BACKBONE.NORM_EPSILON": EPSILON,
        **({"BACKBONE.NORM": "GN"} if names.is_group_norm else {}),
    }


def _backbone(names):
    pixels, is_rgb, note = _pixels(names, names.backbone_name())
    pairs = _backbone_pairs(names, is_rgb=is_rgb)
    added = _statistics_without_effect(pairs, names)
    for weight, bias in (("fc1000_w", "fc1000_b"), ("pred_w", "pred_b"), ("stem.fc.weight", "stem.fc.bias")):
        if weight in names.arrays:
            pairs += [Pair("linear/W", weight, LINEAR), Pair("linear/b", bias, SAME)]
    return Model(
        f"a ResNet of Detectron{'' if names.is_caffe2 else '2'}, "
        f"{sum(_num_blocks(names)) * _num_convolutions(names) + 2} layers",
        pairs,
        {**_backbone_settings(names), **pixels},
        ignored=_no_weights(names.arrays),
        added=added,
        notes=(note,),
    )


def _no_weights(arrays):
    """Names of arrays that are no weights: counters, constants, and a bias in MSRA's files that Detectron ignores."""
    return frozenset(
        name
        for name in arrays
        if name in ("pixel_mean", "pixel_std", "conv1_b")
        or "anchor_generator.cell_anchors" in name
        or name.endswith((".num_batches_tracked", "_momentum"))
        or name.startswith(("optimizer/", "scheduler/"))
    )


# ------------------------------------------------------------------------------------------------------ detectors


def _detector(names):
    arrays = names.arrays
    pixels, is_rgb, note = _pixels(names, names.backbone_name())
    pairs, added = _detector_pairs(names, is_rgb=is_rgb)
    settings = {**_detector_settings(names), **pixels, **_anchors(arrays)}
    return Model(
        _title(settings), pairs, settings, ignored=_no_weights(arrays), added=added, notes=(note, ANTIALIAS_NOTE)
    )


def _title(settings):
    kind = "Cascade" if settings.get("FPN.CASCADE") else "Mask" if settings["MODE_MASK"] else "Faster"
    return f"Detectron2's {kind} R-CNN {'FPN' if settings['MODE_FPN'] else 'C4'}"


def _detector_pairs(names, *, is_rgb):
    """The pairs of a detector; and variables of ours without a counterpart: see `_without_absent_biases`."""
    pairs = _backbone_pairs(names, is_rgb=is_rgb) + _rpn_pairs(names)
    pairs += [] if names.is_c4 else _fpn_pairs(names)
    pairs += _box_pairs(names)
    pairs += _mask_pairs(names) if _has_masks(names) else []
    return _without_absent_biases(pairs, names)


def _detector_settings(names):
    """The settings of the architecture and its conventions."""
    is_cascade = _is_cascade(names)
    return {
        "CONVENTIONS": "detectron2",
        "PREPROC.ANTIALIAS": True,
        "MODE_FPN": not names.is_c4,
        "MODE_MASK": _has_masks(names),
        "RPN.NUM_CONVS": _num_rpn_convs(names),
        **({} if names.is_c4 else _head_settings(names)),
        **_backbone_settings(names),
        **_box_weights(is_cascade),
        **coco.settings(names.num_classes(*_class_layer(is_cascade, is_c4=names.is_c4))),
    }


def _is_cascade(names):
    return names.has("cascade_rcnn_stage1/outputs/class/W", "roi_heads.box_predictor.0.cls_score.weight")


def _has_masks(names):
    return names.has("maskrcnn/conv/W", "roi_heads.mask_head.predictor.weight")


def _class_layer(is_cascade, *, is_c4):
    """The names of the (first) layer that scores classes, ours and theirs."""
    if is_cascade:
        return "cascade_rcnn_stage1/outputs/class", "roi_heads.box_predictor.0.cls_score"
    return f"fastrcnn/{'' if is_c4 else 'outputs/'}class", "roi_heads.box_predictor.cls_score"


def _num_rpn_convs(names):
    count = 0
    while names.has(f"rpn/conv{count}/W", f"proposal_generator.rpn_head.conv.conv{count}.weight"):
        count += 1
    return max(count, 1)


def _rpn_pairs(names):
    """The pairs of the RPN, whose convolutions are numbered where there are several."""
    theirs, count = "proposal_generator.rpn_head", _num_rpn_convs(names)
    pairs = layer("rpn/class", f"{theirs}.objectness_logits", CONVOLUTION)
    pairs += layer("rpn/box", f"{theirs}.anchor_deltas", CONVOLUTION)
    for i in range(count):
        pairs += layer(f"rpn/conv{i}", f"{theirs}.conv.conv{i}" if count > 1 else f"{theirs}.conv", CONVOLUTION)
    return pairs


def _anchors(arrays):
    """The settings of anchor sizes and ratios, from the anchors [K, 4] in the file; the usual ones if it has none."""
    cells = [x for name, x in sorted(arrays.items()) if "anchor_generator.cell_anchors" in name]
    if not cells:
        return {"RPN.ANCHOR_SIZES": [32, 64, 128, 256, 512], "RPN.ANCHOR_RATIOS": [0.5, 1.0, 2.0]}
    x1, y1, x2, y2 = np.float64(np.concatenate(cells)).T
    sizes, ratios = np.sqrt((x2 - x1) * (y2 - y1)), (y2 - y1) / (x2 - x1)
    return {
        f"RPN.ANCHOR_{name}": list(dict.fromkeys(np.round(values, 3).tolist()))
        for name, values in (("SIZES", sizes), ("RATIOS", ratios))
    }


def _box_weights(is_cascade):
    if is_cascade:
        factors = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
        return {"CASCADE.BBOX_REG_WEIGHTS": [list(x) for x in factors]}
    return {"FRCNN.BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0]}


def _head_settings(names):
    """The settings of the pyramid and its heads."""
    scope, folder = _box_heads(names)[0]
    pyramid = _norm_of("fpn/lateral_1x1_c2", "fpn/gn_c2", "backbone.fpn_lateral2", names)
    norms = {
        "box": _norm_of(f"{scope}/conv0", f"{scope}/gn0", f"{folder}.conv1", names),
        "mask": _norm_of("maskrcnn/fcn0", "maskrcnn/gn0", "roi_heads.mask_head.mask_fcn1", names),
    }
    suffix = {part: {"None": "", "GN": "_gn", "FreezeBN": "_bn"}[norm] for part, norm in norms.items()}
    has_convs = names.has(f"{scope}/conv0/W", f"{folder}.conv1.weight")
    layers = f"4conv1fc{suffix['box']}" if has_convs else "2fc"
    return {
        "FPN.CASCADE": _is_cascade(names),
        "FPN.NORM": pyramid,
        "FPN.FRCNN_HEAD_FUNC": f"fastrcnn_{layers}_head",
        **({"FPN.MRCNN_HEAD_FUNC": f"maskrcnn_up4conv{suffix['mask']}_head"} if _has_masks(names) else {}),
    }


def _norm_of(ours, norm, theirs, names):
    """The norm behind a convolution: "FreezeBN" for any batch norm, "GN" or "None". Names: see `_layer_and_norm`."""
    if names.has(f"{ours}/bn/gamma", f"{theirs}.norm.running_mean"):
        return "FreezeBN"
    return "GN" if names.has(f"{norm}/gamma", f"{theirs}.norm.weight") else "None"


def _layer_and_norm(ours, norm, theirs, names):
    """The pairs of a convolution and of the norm behind it, where there is one.

    Args:
        ours, norm: our names of the layer and of GroupNorm; a batch norm is below the layer, which then has no bias.
    """
    kind = _norm_of(ours, norm, theirs, names)
    if kind == "FreezeBN":
        pairs = [Pair(f"{ours}/bn/{leaf}", f"{theirs}.norm.{x}", SAME) for leaf, x in BATCH_NORM.items()]
        return [Pair(f"{ours}/W", f"{theirs}.weight", CONVOLUTION), *pairs]
    leaves = AFFINE if kind == "GN" else {}
    norm_pairs = [Pair(f"{norm}/{leaf}", f"{theirs}.norm.{x}", SAME) for leaf, x in leaves.items()]
    return layer(ours, theirs, CONVOLUTION) + norm_pairs


def _without_absent_biases(pairs, names):
    """Splits off the biases that they don't have before GroupNorm: (other pairs, {name: zeros})."""
    added, kept, normalised = {}, [], {p.theirs for p in pairs if p.theirs.endswith(".norm.weight")}
    for pair in pairs:
        theirs = pair.theirs.removesuffix(".bias")
        if pair.ours.endswith("/b") and f"{theirs}.norm.weight" in normalised and not names.has("", pair.theirs):
            added[pair.ours] = np.zeros(names.size(pair.ours, f"{theirs}.weight"), np.float32)
        else:
            kept.append(pair)
    return kept, added


def _fpn_pairs(names):
    pairs = []
    for i in (2, 3, 4, 5):
        pairs += _layer_and_norm(f"fpn/lateral_1x1_c{i}", f"fpn/gn_c{i}", f"backbone.fpn_lateral{i}", names)
        pairs += _layer_and_norm(f"fpn/posthoc_3x3_p{i}", f"fpn/gn_p{i}", f"backbone.fpn_output{i}", names)
    return pairs


def _box_heads(names):
    """The names of the box heads, ours and theirs."""
    if _is_cascade(names):
        return [(f"cascade_rcnn_stage{k + 1}/head", f"roi_heads.box_head.{k}") for k in range(3)]
    return [("fastrcnn", "roi_heads.box_head")]


def _box_pairs(names):
    is_cascade = _is_cascade(names)
    ours, theirs = _class_layer(is_cascade, is_c4=names.is_c4)
    num_classes = names.num_classes(ours, theirs)
    if not is_cascade:
        pairs = _output_pairs(
            ours.removesuffix("/class"), "roi_heads.box_predictor", num_classes, is_class_agnostic=False
        )
        return pairs if names.is_c4 else pairs + _box_head_pairs(*_box_heads(names)[0], names)
    pairs = []
    for k, head in enumerate(_box_heads(names)):
        pairs += _box_head_pairs(*head, names)
        outputs = f"cascade_rcnn_stage{k + 1}/outputs", f"roi_heads.box_predictor.{k}"
        pairs += _output_pairs(*outputs, num_classes, is_class_agnostic=True)
    return pairs


def _box_head_pairs(ours, theirs, names):
    if not names.has(f"{ours}/conv0/W", f"{theirs}.conv1.weight"):
        return layer(f"{ours}/fc6", f"{theirs}.fc1") + layer(f"{ours}/fc7", f"{theirs}.fc2")
    pairs = layer(f"{ours}/fc", f"{theirs}.fc1")
    for i in range(4):
        pairs += _layer_and_norm(f"{ours}/conv{i}", f"{ours}/gn{i}", f"{theirs}.conv{i + 1}", names)
    return pairs


def _output_pairs(ours, theirs, num_classes, *, is_class_agnostic):
    background_last = [num_classes, *range(num_classes)]
    logits = dict(num_theirs=num_classes + 1)
    pairs = layer(
        f"{ours}/class",
        f"{theirs}.cls_score",
        per_class(background_last, **logits),
        per_class(background_last, inner=SAME, **logits),
    )
    if is_class_agnostic:
        return pairs + layer(f"{ours}/box", f"{theirs}.bbox_pred")
    no_background, boxes = [-1, *range(num_classes)], dict(size=4, num_theirs=num_classes)
    return pairs + layer(
        f"{ours}/box",
        f"{theirs}.bbox_pred",
        per_class(no_background, **boxes),
        per_class(no_background, inner=SAME, **boxes),
    )


def _mask_pairs(names):
    pairs = []
    for i in range(0 if names.is_c4 else 4):
        theirs = f"roi_heads.mask_head.mask_fcn{i + 1}"
        pairs += _layer_and_norm(f"maskrcnn/fcn{i}", f"maskrcnn/gn{i}", theirs, names)
    pairs += layer("maskrcnn/deconv", "roi_heads.mask_head.deconv", CONVOLUTION)
    return pairs + layer("maskrcnn/conv", "roi_heads.mask_head.predictor", CONVOLUTION)


# ------------------------------------------------------------------------------------------------------ from ours

# Their configuration has these, not their weights: what ours has is told, not compared.
CONFIGURED = ("PREPROC.", "DATA.", "RPN.ANCHOR_", "FRCNN.BBOX_", "CASCADE.BBOX_", "BACKBONE.STRIDE_1X1")


def counterpart(values: dict[str, np.ndarray], settings: Config) -> Model:
    """The Model of theirs with the architecture of ours. It takes BGR images.

    Args:
        values: our variables by name. settings: those of their training.
    Raises:
        MappingError: no model of theirs computes the same with such weights.
    """
    is_c4 = not settings.MODE_FPN if "rpn/conv0/W" in values else None
    names = _NamesOfOurs(values, settings.BACKBONE.NAME, is_c4=is_c4)
    if is_c4 is None:
        pairs, added, needed, title = _backbone_pairs(names, is_rgb=False), {}, _backbone_settings(names), "a ResNet"
    else:
        pairs, added = _detector_pairs(names, is_rgb=False)
        needed = _detector_settings(names)
        title = _title(needed)
    compared = {key: value for key, value in needed.items() if not key.startswith(CONFIGURED)}
    check_counterpart("Detectron2", settings, compared)
    biased = [name for name in added if values[name].any()]
    if biased:
        raise MappingError(f"Detectron2 has no bias before a norm, but {biased[0]} is not 0")
    mean, std = (list(x[::-1]) for x in (settings.PREPROC.PIXEL_MEAN, settings.PREPROC.PIXEL_STD))
    notes = (
        f"its configuration: INPUT.FORMAT BGR, MODEL.PIXEL_MEAN {mean}, MODEL.PIXEL_STD {std}, "
        f"MODEL.RESNETS.STRIDE_IN_1X1 {settings.BACKBONE.STRIDE_1X1}",
    )
    return Model(title, pairs, needed, added=added, notes=notes)
