"""Small models of other systems in NumPy: their names, shapes and formulas, as their publications and files have them.

Nothing here knows how the project's converter works; arrays are in the systems' own layouts (PyTorch's OIHW, Keras's
HWIO). Maps are NHWC all the same, because the slow convolution of the tests is.
"""

import numpy as np
from helpers import convolve, group_norm, relu

NUM_BLOCKS = (1, 2, 1, 1)
WIDTH = 8


class Shapes(dict):
    """Name -> shape, as random arrays: positive where a variance or a norm's scale is wanted."""

    def arrays(self, seed=0):
        rng = np.random.default_rng(seed)
        arrays = {}
        for name, shape in self.items():
            arrays[name] = rng.normal(size=shape) * np.sqrt(2.0 / max(np.prod(shape[1:]), 1))
            if len(shape) == 1:
                arrays[name] = rng.normal(0, 0.3, shape)
            if any(
                word in name for word in ("var", "gamma", "norm.weight", "bn1.weight", "bn2.weight", "_s", ".1.weight")
            ):
                arrays[name] = rng.uniform(0.5, 1.5, shape)
        return {name: x.astype(np.float32) for name, x in arrays.items()}


# ------------------------------------------------------------------------------------------------------ ResNets


class TorchvisionNames:
    """torchvision: RGB on 0..1 by ImageNet's statistics, stride on the 3x3 convolution."""

    mean, std, is_rgb = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True
    image_scale = 255.0
    stride_1x1, epsilon = False, 1e-5
    norm_leaves = ("weight", "bias", "running_mean", "running_var")

    def stem(self):
        return "conv1", "bn1"

    def layer(self, stage, block, part):
        folder = f"layer{stage + 1}.{block}"
        if part == "shortcut":
            return f"{folder}.downsample.0", f"{folder}.downsample.1"
        return f"{folder}.conv{part}", f"{folder}.bn{part}"

    def norm(self, arrays, name, x):
        gamma, beta, mean, variance = (arrays[f"{name}.{leaf}"] for leaf in self.norm_leaves)
        return (x - mean) / np.sqrt(variance + self.epsilon) * gamma + beta

    def kernel(self, arrays, name):
        return arrays[f"{name}.weight"].transpose(2, 3, 1, 0)

    def convolution_shapes(self, name, norm, size, inputs, outputs):
        yield f"{name}.weight", (outputs, inputs, size, size)
        for leaf in self.norm_leaves:
            yield f"{norm}.{leaf}", (outputs,)


class Detectron2Names(TorchvisionNames):
    """Detectron2 with MSRA's weights: BGR minus its mean, stride on the first 1x1 convolution."""

    mean, std, is_rgb = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), False
    image_scale = 1.0
    stride_1x1 = True

    def __init__(self, prefix="", last_stage=None):
        self.prefix, self.last_stage = prefix, last_stage or f"{prefix}res5"

    def stem(self):
        return f"{self.prefix}stem.conv1", f"{self.prefix}stem.conv1.norm"

    def layer(self, stage, block, part):
        folder = self.last_stage if stage == 3 else f"{self.prefix}res{stage + 2}"
        name = f"{folder}.{block}.{part if part == 'shortcut' else f'conv{part}'}"
        return name, f"{name}.norm"


class RGBDetectron2Names(Detectron2Names):
    """Detectron2's copy of torchvision's weights."""

    mean, std, is_rgb = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), True
    stride_1x1 = False


class DetectronNames(Detectron2Names):
    """Detectron's own: batch norm is a scale and a shift."""

    norm_leaves = ("s", "b")

    def stem(self):
        return "conv1", "res_conv1_bn"

    def layer(self, stage, block, part):
        branch = {"shortcut": "1", 1: "2a", 2: "2b", 3: "2c"}[part]
        name = f"res{stage + 2}_{block}_branch{branch}"
        return name, f"{name}_bn"

    def norm(self, arrays, name, x):
        return x * arrays[f"{name}_s"] + arrays[f"{name}_b"]

    def kernel(self, arrays, name):
        return arrays[f"{name}_w"].transpose(2, 3, 1, 0)

    def convolution_shapes(self, name, norm, size, inputs, outputs):
        yield f"{name}_w", (outputs, inputs, size, size)
        yield f"{norm}_s", (outputs,)
        yield f"{norm}_b", (outputs,)


class GroupNormDetectronNames(DetectronNames):
    """Detectron's with GroupNorm, 32 groups, of which narrow layers here have fewer: two channels each."""

    stride_1x1 = False

    def stem(self):
        return "conv1", "conv1_gn"

    def layer(self, stage, block, part):
        name, _ = super().layer(stage, block, part)
        return name, f"{name}_gn"

    def norm(self, arrays, name, x):
        return group_norm(x, arrays[f"{name}_s"], arrays[f"{name}_b"], groups=min(32, x.shape[-1] // 2))


class KerasNames(TorchvisionNames):
    """Keras: convolutions have biases, BGR minus its mean, stride on the first 1x1 convolution, another epsilon."""

    mean, std, is_rgb = (103.939, 116.779, 123.68), (1.0, 1.0, 1.0), False
    image_scale = 1.0
    stride_1x1, epsilon = True, 1.001e-5
    norm_leaves = ("gamma", "beta", "moving_mean", "moving_variance")

    def stem(self):
        return "conv1_conv", "conv1_bn"

    def layer(self, stage, block, part):
        name = f"conv{stage + 2}_block{block + 1}_{0 if part == 'shortcut' else part}"
        return f"{name}_conv", f"{name}_bn"

    def norm(self, arrays, name, x):
        """The bias of the convolution before it counts among what is normalised."""
        bias = arrays[name.replace("_bn", "_conv") + ".bias"]
        return super().norm(arrays, name, x + bias)

    def kernel(self, arrays, name):
        return arrays[f"{name}.kernel"]

    def convolution_shapes(self, name, norm, size, inputs, outputs):
        yield f"{name}.kernel", (size, size, inputs, outputs)
        yield f"{name}.bias", (outputs,)
        for leaf in self.norm_leaves:
            yield f"{norm}.{leaf}", (outputs,)


def resnet_shapes(names, *, num_blocks=NUM_BLOCKS, width=WIDTH, convolutions=3):
    """The arrays of a ResNet of bottleneck blocks, or of basic ones where `convolutions` is 2."""
    shapes = Shapes(names.convolution_shapes(*names.stem(), 7, 3, width))
    inputs = width
    for stage, blocks in enumerate(num_blocks):
        inner = width * 2**stage
        outputs = inner * (4 if convolutions == 3 else 1)
        for block in range(blocks):
            sizes = {1: (1, inputs, inner), 2: (3, inner, inner), 3: (1, inner, outputs)}
            if convolutions == 2:
                sizes = {1: (3, inputs, inner), 2: (3, inner, inner)}
            if inputs != outputs:
                sizes["shortcut"] = (1, inputs, outputs)
            for part, size in sizes.items():
                shapes.update(names.convolution_shapes(*names.layer(stage, block, part), *size))
            inputs = outputs
    return shapes


def resnet_features(names, arrays, image, *, num_blocks=NUM_BLOCKS, convolutions=3):
    """c2 to c5 [1, H, W, C] of a uint8 [H, W, 3] BGR image; padding is symmetric."""

    def layer(name, norm, x, *, stride=1):
        kernel = names.kernel(arrays, name)
        pad = kernel.shape[0] // 2
        return names.norm(arrays, norm, convolve(x, kernel, stride=stride, before=pad, after=pad))

    pixels = image[:, :, ::-1] if names.is_rgb else image
    x = ((pixels / names.image_scale - names.mean) / names.std).astype(np.float32)[None]
    x = relu(layer(*names.stem(), x, stride=2))
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2].max(axis=(4, 5))
    outputs = []
    for stage, blocks in enumerate(num_blocks):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            strided = 1 if names.stride_1x1 or convolutions == 2 else 2
            y = x
            for part in range(1, convolutions + 1):
                y = layer(*names.layer(stage, block, part), y, stride=stride if part == strided else 1)
                y = relu(y) if part < convolutions else y
            shortcut = names.layer(stage, block, "shortcut")
            has_shortcut = any(name.startswith(shortcut[0]) for name in arrays)
            x = relu(y + (layer(*shortcut, x, stride=stride) if has_shortcut else x))
        outputs.append(x)
    return outputs


# ------------------------------------------------------------------------------------------- Detectron2's detectors

NUM_CLASSES = 5
CHANNELS, FC_CHANNELS, MASK_CHANNELS = 16, 24, 12


def _linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


AFFINE, STATISTICS = ("weight", "bias"), ("running_mean", "running_var")


def _convolution(name, outputs, inputs, size, *, norm=None):
    """norm: "GN" or "BN", in place of a bias."""
    leaves = {None: (), "GN": AFFINE, "BN": AFFINE + STATISTICS}[norm]
    after = {f"{name}.norm.{leaf}": (outputs,) for leaf in leaves} or {f"{name}.bias": (outputs,)}
    return {f"{name}.weight": (outputs, inputs, size, size), **after}


def detector_shapes(*, is_c4=False, masks=True, cascade=False, norm=None):
    """The arrays of Detectron2's Faster, Mask or Cascade R-CNN.

    Args:
        norm: "GN", or "BN" as in its new baselines, with two convolutions in the RPN
    """
    names = Detectron2Names("backbone.", "roi_heads.res5") if is_c4 else Detectron2Names("backbone.bottom_up.")
    shapes = resnet_shapes(names)
    if norm == "GN":
        shapes = Shapes({name: shape for name, shape in shapes.items() if "running" not in name})
    anchors, channels = (15, WIDTH * 16) if is_c4 else (3, CHANNELS)
    for name in ("conv.conv0", "conv.conv1") if norm == "BN" else ("conv",):
        shapes.update(_convolution(f"proposal_generator.rpn_head.{name}", channels, channels, 3))
    shapes.update(_convolution("proposal_generator.rpn_head.objectness_logits", anchors, channels, 1))
    shapes.update(_convolution("proposal_generator.rpn_head.anchor_deltas", 4 * anchors, channels, 1))
    for i in () if is_c4 else (2, 3, 4, 5):
        shapes.update(_convolution(f"backbone.fpn_lateral{i}", CHANNELS, WIDTH * 2**i, 1, norm=norm))
        shapes.update(_convolution(f"backbone.fpn_output{i}", CHANNELS, CHANNELS, 3, norm=norm))
    for stage in ("0.", "1.", "2.") if cascade else ("",):
        shapes.update(_box_head_shapes(stage, is_c4=is_c4, cascade=cascade, norm=norm))
    if masks:
        inputs = WIDTH * 32 if is_c4 else CHANNELS
        for i in () if is_c4 else (1, 2, 3, 4):
            outputs = MASK_CHANNELS
            shapes.update(_convolution(f"roi_heads.mask_head.mask_fcn{i}", outputs, inputs, 3, norm=norm))
            inputs = outputs
        shapes["roi_heads.mask_head.deconv.weight"] = (inputs, MASK_CHANNELS, 2, 2)
        shapes["roi_heads.mask_head.deconv.bias"] = (MASK_CHANNELS,)
        shapes.update(_convolution("roi_heads.mask_head.predictor", NUM_CLASSES, MASK_CHANNELS, 1))
    return shapes


def _box_head_shapes(stage, *, is_c4, cascade, norm):
    shapes, inputs, features = {}, CHANNELS * 49, FC_CHANNELS
    if is_c4:
        features = WIDTH * 32
    elif norm:
        for i in (1, 2, 3, 4):
            shapes.update(_convolution(f"roi_heads.box_head.{stage}conv{i}", CHANNELS, CHANNELS, 3, norm=norm))
        shapes.update(_linear(f"roi_heads.box_head.{stage}fc1", FC_CHANNELS, inputs))
    else:
        shapes.update(_linear(f"roi_heads.box_head.{stage}fc1", FC_CHANNELS, inputs))
        shapes.update(_linear(f"roi_heads.box_head.{stage}fc2", FC_CHANNELS, FC_CHANNELS))
    predictor = f"roi_heads.box_predictor.{stage}"
    shapes.update(_linear(f"{predictor}cls_score", NUM_CLASSES + 1, features))
    shapes.update(_linear(f"{predictor}bbox_pred", 4 if cascade else 4 * NUM_CLASSES, features))
    return shapes


def box_outputs(arrays, x, stage=""):
    """Detectron2's box head on RoIs [R, 7, 7, C]: probabilities [R, classes + 1], background last, and deltas."""
    head, predictor = f"roi_heads.box_head.{stage}", f"roi_heads.box_predictor.{stage}"
    if f"{head}fc1.weight" not in arrays:
        x = x.mean(axis=(1, 2))
    else:
        for i in (1, 2, 3, 4):
            if f"{head}conv{i}.weight" in arrays:
                x = _convolve_norm_relu(arrays, f"{head}conv{i}", x)
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        for fc in ("fc1", "fc2"):
            if f"{head}{fc}.weight" in arrays:
                x = relu(x @ arrays[f"{head}{fc}.weight"].T + arrays[f"{head}{fc}.bias"])
    logits, deltas = (
        x @ arrays[f"{predictor}{name}.weight"].T + arrays[f"{predictor}{name}.bias"]
        for name in ("cls_score", "bbox_pred")
    )
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True), deltas.reshape(len(x), -1, 4)


def mask_logits(arrays, x):
    """Detectron2's mask head on RoIs [R, 14, 14, C] (C4: [R, 7, 7, C]): [R, 28, 28, classes]."""
    for i in (1, 2, 3, 4):
        if f"roi_heads.mask_head.mask_fcn{i}.weight" in arrays:
            x = _convolve_norm_relu(arrays, f"roi_heads.mask_head.mask_fcn{i}", x)
    weight = arrays["roi_heads.mask_head.deconv.weight"]
    r, height, width, _ = x.shape
    y = np.einsum("rijc,coab->riajbo", x, weight).reshape(r, 2 * height, 2 * width, -1)
    y = relu(y + arrays["roi_heads.mask_head.deconv.bias"])
    predictor = arrays["roi_heads.mask_head.predictor.weight"].transpose(2, 3, 1, 0)
    return convolve(y, predictor, bias=arrays["roi_heads.mask_head.predictor.bias"])


def _convolve_norm_relu(arrays, name, x):
    y = convolve(
        x, arrays[f"{name}.weight"].transpose(2, 3, 1, 0), bias=arrays.get(f"{name}.bias", 0), before=1, after=1
    )
    if f"{name}.norm.running_mean" in arrays:
        mean, variance, gamma, beta = (arrays[f"{name}.norm.{leaf}"] for leaf in (*STATISTICS, *AFFINE))
        y = (y - mean) / np.sqrt(variance + 1e-5) * gamma + beta
    elif f"{name}.norm.weight" in arrays:
        y = group_norm(y, arrays[f"{name}.norm.weight"], arrays[f"{name}.norm.bias"], groups=min(32, y.shape[-1] // 2))
    return relu(y)
