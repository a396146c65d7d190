"""ConvNeXts of torchvision and of Keras, tiny to large. The norms of a detector's outputs start at 1 and 0.

Keras's `.h5` and `.keras` files contain the normalisation of pixels as a layer without weights; both have RGB images,
normalised with ImageNet's mean and deviation, which are our defaults.
"""

import re

import numpy as np

from config import Config

from .mapping import (
    CONVOLUTION,
    CONVOLUTION_OF_RGB,
    IMAGENET_PIXELS,
    LINEAR,
    SAME,
    Layout,
    MappingError,
    Model,
    Pair,
    layer,
)

# [C, 1, 7, 7] <-> [7, 7, C, 1]
DEPTHWISE = Layout(lambda w: w.transpose(2, 3, 0, 1), lambda w: w.transpose(2, 3, 0, 1))
POINTWISE = Layout(lambda w: w.T[None, None], lambda w: w[0, 0].T)  # [O, I] <-> [1, 1, I, O]
SCALE = Layout(lambda x: x[:, 0, 0], lambda x: x[:, None, None])  # [C, 1, 1] <-> [C]
# Keras's kernels: of the first layer, from red, green, blue; [7, 7, 1, C] <-> [7, 7, C, 1]; [I, O] <-> [1, 1, I, O].
KERAS_RGB = Layout(lambda w: w[:, :, ::-1], lambda w: w[:, :, ::-1])
KERAS_DEPTHWISE = Layout(lambda w: w.transpose(0, 1, 3, 2), lambda w: w.transpose(0, 1, 3, 2))
KERAS_POINTWISE = Layout(lambda w: w[None, None], lambda w: w[0, 0])


def recognise(arrays: dict[str, np.ndarray], **unused) -> Model | None:
    """The Model of a file, or None if the names are neither torchvision's nor Keras's ConvNeXts."""
    del unused
    if "features.1.0.layer_scale" in arrays:
        return _of_torchvision(arrays)
    names = {_keras_layer(name): name for name in arrays}
    return _of_keras(arrays, names) if ("stem_conv", 0) in names else None


def _norm(ours, theirs):
    return [Pair(f"{ours}/gamma", f"{theirs}.weight", SAME), Pair(f"{ours}/beta", f"{theirs}.bias", SAME)]


def _pairs(num_blocks, *, has_classifier):
    """The pairs of torchvision's network."""
    pairs = layer("conv0", "features.0.0", CONVOLUTION_OF_RGB) + _norm("ln0", "features.0.1")
    for stage, blocks in enumerate(num_blocks):
        if stage > 0:
            pairs += _norm(f"group{stage}/ln", f"features.{2 * stage}.0")
            pairs += layer(f"group{stage}/downsample", f"features.{2 * stage}.1", CONVOLUTION)
        for i in range(blocks):
            ours, theirs = f"group{stage}/block{i}", f"features.{2 * stage + 1}.{i}"
            pairs += layer(f"{ours}/depthwise", f"{theirs}.block.0", DEPTHWISE)
            pairs += _norm(f"{ours}/ln", f"{theirs}.block.2")
            pairs += layer(f"{ours}/widen", f"{theirs}.block.3", POINTWISE)
            pairs += layer(f"{ours}/narrow", f"{theirs}.block.5", POINTWISE)
            pairs.append(Pair(f"{ours}/scale", f"{theirs}.layer_scale", SCALE))
    if has_classifier:
        pairs += _norm("linear/ln", "classifier.0") + layer("linear", "classifier.2", LINEAR)
    return pairs


def _settings(num_blocks, width):
    return {
        "BACKBONE.NAME": "convnext",
        "BACKBONE.RESNET_NUM_BLOCKS": num_blocks,
        "BACKBONE.WIDTH": width,
        **IMAGENET_PIXELS,
    }


def _output_norms(width):
    """Norms that do nothing but normalise, float32, by name."""
    ones = {f"norm_c{stage + 2}/gamma": np.ones(width * 2**stage, np.float32) for stage in range(4)}
    return ones | {name.replace("gamma", "beta"): np.zeros_like(x) for name, x in ones.items()}


def _of_torchvision(arrays):
    num_blocks = [
        sum(re.fullmatch(rf"features\.{2 * stage + 1}\.\d+\.layer_scale", name) is not None for name in arrays)
        for stage in range(4)
    ]
    width = len(arrays["features.1.0.layer_scale"])
    pairs = _pairs(num_blocks, has_classifier="classifier.2.weight" in arrays)
    name = f"torchvision's ConvNeXt of {sum(num_blocks)} blocks"
    return Model(name, pairs, _settings(num_blocks, width), added=_output_norms(width))


def counterpart(values: dict[str, np.ndarray], settings: Config) -> Model:
    """torchvision's Model with the architecture of our backbone; the norms of its outputs have no place there.

    Raises:
        MappingError: it is a detector, of which torchvision has none.
    """
    if "rpn/conv0/W" in values:
        raise MappingError("torchvision has no detectors with ConvNeXt")
    num_blocks = list(settings.BACKBONE.RESNET_NUM_BLOCKS)
    pairs = _pairs(num_blocks, has_classifier="linear/W" in values)
    width = settings.BACKBONE.WIDTH
    return Model("torchvision's ConvNeXt", pairs, _settings(num_blocks, width), added=_output_norms(width))


# ------------------------------------------------------------------------------------------------------ Keras


def _keras_layer(name):
    """Splits a name of Keras: ("stage_0_block_1_layernorm", 1) for ".../convnext_tiny_stage_0_block_1_layernorm/beta".

    The number is that of the array in its layer: 0 for kernels and factors, 1 for biases and shifts.
    """
    folder, _, leaf = name.rpartition("/")
    layer_name = re.sub(r"^convnext_[a-z]+_", "", folder.rpartition("/")[2])
    if layer_name.endswith("_layer_scale"):
        return layer_name, 0
    return layer_name, {"kernel": 0, "gamma": 0, "bias": 1, "beta": 1, "0": 0, "1": 1}.get(leaf)


def _of_keras(arrays, names):
    num_blocks = [
        sum(re.fullmatch(rf"stage_{i}_block_\d+_depthwise_conv", x[0]) is not None for x in names) // 2
        for i in range(4)
    ]

    def pair(ours, layer_name, number, layout=SAME):
        return Pair(ours, names.get((layer_name, number), layer_name), layout)

    def of_layer(ours, layer_name, layout=SAME):
        return [pair(f"{ours}/W", layer_name, 0, layout), pair(f"{ours}/b", layer_name, 1)]

    def norm(ours, layer_name):
        return [pair(f"{ours}/gamma", layer_name, 0), pair(f"{ours}/beta", layer_name, 1)]

    pairs = of_layer("conv0", "stem_conv", KERAS_RGB) + norm("ln0", "stem_layernorm")
    for stage, blocks in enumerate(num_blocks):
        if stage > 0:
            pairs += norm(f"group{stage}/ln", f"downsampling_layernorm_{stage - 1}")
            pairs += of_layer(f"group{stage}/downsample", f"downsampling_conv_{stage - 1}")
        for i in range(blocks):
            ours, theirs = f"group{stage}/block{i}", f"stage_{stage}_block_{i}"
            pairs += of_layer(f"{ours}/depthwise", f"{theirs}_depthwise_conv", KERAS_DEPTHWISE)
            pairs += norm(f"{ours}/ln", f"{theirs}_layernorm")
            pairs += of_layer(f"{ours}/widen", f"{theirs}_pointwise_conv_1", KERAS_POINTWISE)
            pairs += of_layer(f"{ours}/narrow", f"{theirs}_pointwise_conv_2", KERAS_POINTWISE)
            pairs.append(pair(f"{ours}/scale", f"{theirs}_layer_scale", 0))
    if ("head_dense", 0) in names:
        pairs += norm("linear/ln", "head_layernorm") + of_layer("linear", "head_dense")
    width = arrays[names["stem_conv", 0]].shape[3]
    ignored = frozenset(name for name in arrays if name.startswith("optimizer"))
    name = f"Keras's ConvNeXt of {sum(num_blocks)} blocks"
    return Model(name, pairs, _settings(num_blocks, width), ignored=ignored, added=_output_norms(width))
