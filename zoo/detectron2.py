"""Detectron2's ResNets and its Faster, Mask and Cascade R-CNN (C4 and FPN), and the ResNets of Detectron before it.

Files do not contain the position of the stride, and rarely the pixel statistics. Both are taken from the model zoo's
configurations for such weights, and a note states so. Images are BGR, unless the pixel statistics in the file are in
RGB order. The background class is the last one, and has no box.
"""

import re

import numpy as np

from . import coco
from .mapping import CONVOLUTION, CONVOLUTION_OF_RGB, LINEAR, SAME, Model, Pair, bottleneck_name, layer, per_class

FROZEN_NORM = {"gamma": "weight", "beta": "bias", "mean/EMA": "running_mean", "variance/EMA": "running_var"}
AFFINE = {"gamma": "weight", "beta": "bias"}
EPSILON = 1e-5
# Pixel statistics (red, green, blue) and the position of the stride, by the origin of the backbone.
MSRA = {
    "BACKBONE.STRIDE_1X1": True,
    "PREPROC.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "PREPROC.PIXEL_STD": [1.0, 1.0, 1.0],
}
FAIR_GN = {**MSRA, "BACKBONE.STRIDE_1X1": False}
FAIR_RESNEXT = {**FAIR_GN, "PREPROC.PIXEL_STD": [58.395, 57.12, 57.375]}
TORCHVISION = FAIR_RESNEXT  # the same numbers, but the input is RGB


def recognise(arrays, **unused):
    """The Model of a file, or None if the names are not Detectron2's."""
    if "proposal_generator.rpn_head.conv.weight" in arrays:
        is_c4 = "backbone.stem.conv1.weight" in arrays
        return _detector(_Names(arrays, "backbone." if is_c4 else "backbone.bottom_up."), is_c4=is_c4)
    if "stem.conv1.weight" in arrays or "res2_0_branch2a_w" in arrays:
        return _backbone(_Names(arrays, ""))
    return None


class _Names:
    """The arrays of a file by Detectron2's names, even if the file has Detectron's.

    Attributes:
        arrays: dict by the file's names. prefix: of the backbone's names. is_caffe2: whether the names are Detectron's.
        is_group_norm: whether the backbone has GroupNorm, not batch norm.
    """

    def __init__(self, arrays, prefix):
        self.arrays, self.prefix = arrays, prefix
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

    def __contains__(self, name):
        return self.in_file(name) in self.arrays

    def shape(self, name):
        """The shape of the array that Detectron2 calls `name`."""
        return self.arrays[self.in_file(name)].shape


# ------------------------------------------------------------------------------------------------------ backbones


def _stage(stage, prefix, *, is_c4=False):
    """The folder of the blocks of a stage 0..3; in C4 the last stage belongs to the head."""
    return f"roi_heads.res{stage + 2}" if is_c4 and stage == 3 else f"{prefix}res{stage + 2}"


def _architecture(names, *, is_c4):
    """Derives (BACKBONE.NAME, blocks per stage, convolutions per block) from names and shapes."""
    num_blocks = []
    for stage in range(4):
        folder, count = _stage(stage, names.prefix, is_c4=is_c4), 0
        while f"{folder}.{count}.conv1.weight" in names:
            count += 1
        num_blocks.append(count)
    if f"{names.prefix}res2.0.conv3.weight" not in names:
        return "resnet_basic", num_blocks, 2
    kernel_shape = names.shape(f"{names.prefix}res2.0.conv2.weight")
    return bottleneck_name(names.shape(f"{names.prefix}stem.conv1.weight")[0], kernel_shape), num_blocks, 3


def _norm_layer(ours, theirs, names, layout=CONVOLUTION):
    """The pairs of a backbone's convolution and of its norm."""
    scope = "gn" if names.is_group_norm else "bn"
    leaves = AFFINE if names.is_group_norm or names.is_caffe2 else FROZEN_NORM
    pairs = [Pair(f"{ours}/{scope}/{leaf}", names.in_file(f"{theirs}.norm.{x}"), SAME) for leaf, x in leaves.items()]
    return [Pair(f"{ours}/W", names.in_file(f"{theirs}.weight"), layout), *pairs]


def _backbone_pairs(names, num_blocks, num_convolutions, *, is_rgb, is_c4=False):
    stem = CONVOLUTION_OF_RGB if is_rgb else CONVOLUTION
    pairs = _norm_layer("conv0", f"{names.prefix}stem.conv1", names, stem)
    for stage, blocks in enumerate(num_blocks):
        for i in range(blocks):
            ours, theirs = f"group{stage}/block{i}", f"{_stage(stage, names.prefix, is_c4=is_c4)}.{i}"
            for k in range(1, num_convolutions + 1):
                pairs += _norm_layer(f"{ours}/conv{k}", f"{theirs}.conv{k}", names)
            if f"{theirs}.shortcut.weight" in names:
                pairs += _norm_layer(f"{ours}/convshortcut", f"{theirs}.shortcut", names)
    return pairs


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


def _backbone_settings(name, num_blocks, names):
    return {
        "BACKBONE.NAME": name,
        "BACKBONE.RESNET_NUM_BLOCKS": num_blocks,
        "BACKBONE.TF_PAD_MODE": False,
        "BACKBONE.NORM_EPSILON": EPSILON,
        **({"BACKBONE.NORM": "GN"} if names.is_group_norm else {}),
    }


def _backbone(names):
    name, num_blocks, num_convolutions = _architecture(names, is_c4=False)
    pixels, is_rgb, note = _pixels(names, name)
    pairs = _backbone_pairs(names, num_blocks, num_convolutions, is_rgb=is_rgb)
    added = _statistics_without_effect(pairs, names)
    for weight, bias in (("fc1000_w", "fc1000_b"), ("pred_w", "pred_b"), ("stem.fc.weight", "stem.fc.bias")):
        if weight in names.arrays:
            pairs += [Pair("linear/W", weight, LINEAR), Pair("linear/b", bias, SAME)]
    return Model(
        f"a ResNet of Detectron{'' if names.is_caffe2 else '2'}, {sum(num_blocks) * num_convolutions + 2} layers",
        pairs,
        {**_backbone_settings(name, num_blocks, names), **pixels},
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


def _detector(names, *, is_c4):
    arrays = names.arrays
    name, num_blocks, num_convolutions = _architecture(names, is_c4=is_c4)
    pixels, is_rgb, note = _pixels(names, name)
    is_cascade = "roi_heads.box_predictor.0.cls_score.weight" in arrays
    masks = "roi_heads.mask_head.predictor.weight" in arrays
    predictor = "roi_heads.box_predictor.0." if is_cascade else "roi_heads.box_predictor."
    num_classes = len(arrays.get(f"{predictor}cls_score.bias", [0])) - 1
    pairs = _backbone_pairs(names, num_blocks, num_convolutions, is_rgb=is_rgb, is_c4=is_c4)
    for ours, theirs in (("rpn/conv0", "conv"), ("rpn/class", "objectness_logits"), ("rpn/box", "anchor_deltas")):
        pairs += layer(ours, f"proposal_generator.rpn_head.{theirs}", CONVOLUTION)
    heads = {}
    if not is_c4:
        pairs += _fpn_pairs(arrays)
        heads = _head_settings(arrays, is_cascade=is_cascade, masks=masks)
    pairs += _box_pairs(arrays, num_classes, is_c4=is_c4, is_cascade=is_cascade)
    pairs += _mask_pairs(arrays, is_c4=is_c4) if masks else []
    pairs, added = _without_absent_biases(pairs, arrays)
    settings = {
        "CONVENTIONS": "detectron2",
        "MODE_FPN": not is_c4,
        "MODE_MASK": masks,
        **heads,
        **_backbone_settings(name, num_blocks, names),
        **pixels,
        **_anchors(arrays),
        **_box_weights(is_cascade),
        **coco.settings(num_classes),
    }
    kind = "Cascade" if is_cascade else "Mask" if masks else "Faster"
    return Model(
        f"Detectron2's {kind} R-CNN {'C4' if is_c4 else 'FPN'}",
        pairs,
        settings,
        ignored=_no_weights(arrays),
        added=added,
        notes=(note,),
    )


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


def _head_settings(arrays, *, is_cascade, masks):
    """The settings of the pyramid and its heads."""
    box_head = "roi_heads.box_head.0." if is_cascade else "roi_heads.box_head."
    group_norm = {False: "", True: "_gn"}
    settings = {"FPN.CASCADE": is_cascade, "FPN.NORM": "None", "FPN.FRCNN_HEAD_FUNC": "fastrcnn_2fc_head"}
    if "backbone.fpn_lateral2.norm.weight" in arrays:
        settings["FPN.NORM"] = "GN"
    if f"{box_head}conv1.weight" in arrays:
        suffix = group_norm[f"{box_head}conv1.norm.weight" in arrays]
        settings["FPN.FRCNN_HEAD_FUNC"] = f"fastrcnn_4conv1fc{suffix}_head"
    if masks:
        suffix = group_norm["roi_heads.mask_head.mask_fcn1.norm.weight" in arrays]
        settings["FPN.MRCNN_HEAD_FUNC"] = f"maskrcnn_up4conv{suffix}_head"
    return settings


def _layer_and_norm(ours, norm, theirs, arrays, layout=CONVOLUTION):
    """The pairs of a layer with bias, and of the GroupNorm behind it where there is one."""
    pairs = layer(ours, theirs, layout)
    if f"{theirs}.norm.weight" in arrays:
        pairs += [Pair(f"{norm}/{leaf}", f"{theirs}.norm.{x}", SAME) for leaf, x in AFFINE.items()]
    return pairs


def _without_absent_biases(pairs, arrays):
    """Splits off biases that the file lacks, since a norm follows their convolution: (other pairs, {name: zeros})."""
    added, kept = {}, []
    for pair in pairs:
        weight = pair.theirs.removesuffix(".bias") + ".weight"
        norm = pair.theirs.removesuffix(".bias") + ".norm.weight"
        if pair.ours.endswith("/b") and pair.theirs not in arrays and norm in arrays and weight in arrays:
            added[pair.ours] = np.zeros(len(arrays[weight]), np.float32)
        else:
            kept.append(pair)
    return kept, added


def _fpn_pairs(arrays):
    pairs = []
    for i in (2, 3, 4, 5):
        pairs += _layer_and_norm(f"fpn/lateral_1x1_c{i}", f"fpn/gn_c{i}", f"backbone.fpn_lateral{i}", arrays)
        pairs += _layer_and_norm(f"fpn/posthoc_3x3_p{i}", f"fpn/gn_p{i}", f"backbone.fpn_output{i}", arrays)
    return pairs


def _box_pairs(arrays, num_classes, *, is_c4, is_cascade):
    if not is_cascade:
        ours = "fastrcnn" if is_c4 else "fastrcnn/outputs"
        pairs = _output_pairs(ours, "roi_heads.box_predictor", num_classes, is_class_agnostic=False)
        return pairs if is_c4 else pairs + _box_head_pairs("fastrcnn", "roi_heads.box_head", arrays)
    pairs = []
    for k in range(3):
        ours = f"cascade_rcnn_stage{k + 1}"
        pairs += _box_head_pairs(f"{ours}/head", f"roi_heads.box_head.{k}", arrays)
        theirs = f"roi_heads.box_predictor.{k}"
        pairs += _output_pairs(f"{ours}/outputs", theirs, num_classes, is_class_agnostic=True)
    return pairs


def _box_head_pairs(ours, theirs, arrays):
    if f"{theirs}.conv1.weight" not in arrays:
        return layer(f"{ours}/fc6", f"{theirs}.fc1") + layer(f"{ours}/fc7", f"{theirs}.fc2")
    pairs = layer(f"{ours}/fc", f"{theirs}.fc1")
    for i in range(4):
        pairs += _layer_and_norm(f"{ours}/conv{i}", f"{ours}/gn{i}", f"{theirs}.conv{i + 1}", arrays)
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


def _mask_pairs(arrays, *, is_c4):
    pairs = []
    for i in range(0 if is_c4 else 4):
        theirs = f"roi_heads.mask_head.mask_fcn{i + 1}"
        pairs += _layer_and_norm(f"maskrcnn/fcn{i}", f"maskrcnn/gn{i}", theirs, arrays)
    pairs += layer("maskrcnn/deconv", "roi_heads.mask_head.deconv", CONVOLUTION)
    return pairs + layer("maskrcnn/conv", "roi_heads.mask_head.predictor", CONVOLUTION)
