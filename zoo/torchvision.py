"""torchvision's ResNets and ResNeXts, and its Faster and Mask R-CNN on ResNet-50 with a feature pyramid.

Their padding is symmetric, which on even sizes is our TF_PAD_MODE=False; images are RGB on a scale of 0..1,
normalised with ImageNet's mean and deviation, which are our defaults.
"""

import re

from .mapping import CONVOLUTION, CONVOLUTION_OF_RGB, SAME, Model, Pair, layer

BODY = "backbone.body."  # of a detector
NORM = {"gamma": "weight", "beta": "bias", "mean/EMA": "running_mean", "variance/EMA": "running_var"}


def recognise(arrays, *, sha256):
    """The Model of a state dict, or None if the names are not torchvision's."""
    del sha256
    if "conv1.weight" in arrays and "layer1.0.conv1.weight" in arrays:
        return _classifier(arrays)
    return None


# ------------------------------------------------------------------------------------------------------ backbones


def _shapes(arrays, prefix):
    """What the names and shapes say: (BACKBONE.NAME, blocks per stage, convolutions per block)."""
    stages = (1, 2, 3, 4)
    patterns = [re.compile(rf"{re.escape(prefix)}layer{stage}\.(\d+)\.conv1\.weight") for stage in stages]
    num_blocks = [sum(pattern.fullmatch(name) is not None for name in arrays) for pattern in patterns]
    if f"{prefix}layer1.0.conv3.weight" not in arrays:
        return "resnet_basic", num_blocks, 2
    channels, group_width, _, _ = arrays[f"{prefix}layer1.0.conv2.weight"].shape
    groups = channels // group_width
    return ("resnet" if (groups, group_width) == (1, 64) else f"resnext_{groups}x{group_width}d"), num_blocks, 3


def _norm_layer(ours, convolution, norm, layout=CONVOLUTION):
    """The pairs of a convolution followed by batch norm."""
    pairs = [Pair(f"{ours}/bn/{leaf}", f"{norm}.{theirs}", SAME) for leaf, theirs in NORM.items()]
    return [Pair(f"{ours}/W", f"{convolution}.weight", layout), *pairs]


def backbone_pairs(num_blocks, num_convolutions, *, prefix=""):
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
    """Names of what counts batches, which nothing reads."""
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
