"""Keras applications' ResNet50, 101 and 152 (the first version), from `.h5`, `.weights.h5` and `.keras` files.

Kernels have our layout. The input is BGR minus ImageNet's mean; the stride is in the first 1x1 convolution of a block.
Convolutions have biases, and batch norm has another epsilon: both are folded into the statistics of the norms.
"""

import re

import numpy as np

from .mapping import SAME, Layout, Model, Pair

EPSILON, OUR_EPSILON = 1.001e-5, 1e-5
LEAVES = {
    True: ("gamma", "beta", "moving_mean", "moving_variance"),  # of norms
    False: ("kernel", "bias"),  # of other layers
}


def recognise(arrays: dict[str, np.ndarray], **unused) -> Model | None:
    """The Model of a file, or None if the names are not those of Keras's ResNets."""
    names = {_layer_and_leaf(name): name for name in arrays}
    if ("conv1_conv", "kernel") not in names or ("conv2_block1_1_conv", "kernel") not in names:
        return None
    num_blocks = [_count(names, stage) for stage in (2, 3, 4, 5)]
    pairs = _norm_layer("conv0", "conv1", arrays, names)
    for stage, blocks in enumerate(num_blocks):
        for i in range(blocks):
            ours, theirs = f"group{stage}/block{i}", f"conv{stage + 2}_block{i + 1}"
            for k in (1, 2, 3):
                pairs += _norm_layer(f"{ours}/conv{k}", f"{theirs}_{k}", arrays, names)
            if i == 0:
                pairs += _norm_layer(f"{ours}/convshortcut", f"{theirs}_0", arrays, names)
    if ("predictions", "kernel") in names:
        pairs += [_pair(names, f"linear/{x}", "predictions", leaf) for x, leaf in (("W", "kernel"), ("b", "bias"))]
    biases = [name for (layer, leaf), name in names.items() if leaf == "bias" and layer.endswith("_conv")]
    return Model(
        f"Keras's ResNet{sum(num_blocks) * 3 + 2}",
        pairs,
        {
            "BACKBONE.NAME": "resnet",
            "BACKBONE.RESNET_NUM_BLOCKS": num_blocks,
            "BACKBONE.STRIDE_1X1": True,
            "BACKBONE.TF_PAD_MODE": False,
            "BACKBONE.NORM_EPSILON": OUR_EPSILON,
            "PREPROC.PIXEL_MEAN": [123.68, 116.779, 103.939],
            "PREPROC.PIXEL_STD": [1.0, 1.0, 1.0],
        },
        ignored=frozenset(biases + [name for name in arrays if name.startswith("optimizer")]),
        notes=(f"the biases of {len(biases)} convolutions and the epsilon {EPSILON} are folded into the norms",),
    )


def _layer_and_leaf(name):
    """Splits a name: ("conv1_bn", "gamma") for "model_weights/conv1_bn/conv1_bn/gamma" and for "conv1_bn/0"."""
    folder, _, leaf = name.rpartition("/")
    layer = folder.rpartition("/")[2]
    leaves = LEAVES[layer.endswith("_bn")]
    return layer, leaves[int(leaf)] if re.fullmatch("[0-3]", leaf) and int(leaf) < len(leaves) else leaf


def _count(names, stage):
    blocks = 0
    while (f"conv{stage}_block{blocks + 1}_1_conv", "kernel") in names:
        blocks += 1
    return blocks


def _pair(names, ours, layer, leaf, layout=SAME):
    return Pair(ours, names.get((layer, leaf), f"{layer}/{leaf}"), layout)


def _norm_layer(ours, theirs, arrays, names):
    """The pairs of a convolution and its norm: (x + bias - mean) / sqrt(variance + their epsilon)."""
    bias = arrays.get(names.get((f"{theirs}_conv", "bias")), 0.0)
    mean = Layout(lambda mean: mean - bias, None)
    variance = Layout(lambda variance: variance + (EPSILON - OUR_EPSILON), None)
    return [
        _pair(names, f"{ours}/W", f"{theirs}_conv", "kernel"),
        _pair(names, f"{ours}/bn/gamma", f"{theirs}_bn", "gamma"),
        _pair(names, f"{ours}/bn/beta", f"{theirs}_bn", "beta"),
        _pair(names, f"{ours}/bn/mean/EMA", f"{theirs}_bn", "moving_mean", mean),
        _pair(names, f"{ours}/bn/variance/EMA", f"{theirs}_bn", "moving_variance", variance),
    ]
