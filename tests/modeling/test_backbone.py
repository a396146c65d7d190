"""ResNet and the feature pyramid against the published description in NumPy: paddings, sizes, frozen variables."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from helpers import batch_norm, convolve, evaluate, group_norm, relu, stored_norm, variables

from config import ConfigError
from modeling import backbone, fpn, layers

tfv1 = tf.compat.v1
ROOT = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------------------------ ResNet in NumPy


class SlowResNet:
    """A ResNet of bottleneck blocks with frozen batch norm; `tf_pad_mode` swaps the sides of the padding."""

    def __init__(self, values, *, tf_pad_mode, stride_1x1, epsilon=1e-5):
        self._values = values
        self._epsilon = epsilon
        self._stride_1x1 = stride_1x1
        self._stem_padding = dict(before=2, after=3) if tf_pad_mode else dict(before=3, after=2)
        self._padding = dict(before=0, after=1) if tf_pad_mode else dict(before=1, after=0)

    def layer(self, name, x, **options):
        """Convolution and batch norm."""
        return self.norm(name, convolve(x, self._values[f"{name}/W"], **options))

    def norm(self, name, y):
        norm = {key: self._values[f"{name}/bn/{key}"] for key in ("mean/EMA", "variance/EMA", "gamma", "beta")}
        return (y - norm["mean/EMA"]) / np.sqrt(norm["variance/EMA"] + self._epsilon) * norm["gamma"] + norm["beta"]

    def stem(self, image):
        x = relu(self.layer("conv0", image, stride=2, **self._stem_padding))
        padding = (self._padding["before"], self._padding["after"])
        x = np.pad(x, [(0, 0), padding, padding, (0, 0)])
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2]
        return windows.max(axis=(4, 5))

    def grouped_layer(self, name, x, **options):
        """Each group of channels by itself; the kernel's size says how many there are."""
        inputs, outputs = self._values[f"{name}/W"].shape[2:]
        groups = x.shape[-1] // inputs
        y = []
        for group in range(groups):
            kernel = self._values[f"{name}/W"][..., group * outputs // groups : (group + 1) * outputs // groups]
            y.append(convolve(x[..., group * inputs : (group + 1) * inputs], kernel, **options))
        return self.norm(name, np.concatenate(y, axis=-1))

    def basic_block(self, name, x, stride):
        padding = self._padding if stride == 2 else dict(before=1, after=1)
        y = relu(self.layer(f"{name}/conv1", x, stride=stride, **padding))
        y = self.layer(f"{name}/conv2", y, before=1, after=1)
        if f"{name}/convshortcut/W" in self._values:
            x = self.layer(f"{name}/convshortcut", x[:, :-1, :-1] if stride == 2 else x, stride=stride)
        return relu(x + y)

    def block(self, name, x, stride):
        """The strided 1x1 convolutions see a map without its last row and column."""
        if f"{name}/conv3/W" not in self._values:
            return self.basic_block(name, x, stride)
        shorter = x[:, :-1, :-1] if stride == 2 else x
        strides = (stride, 1) if self._stride_1x1 else (1, stride)
        y = relu(self.layer(f"{name}/conv1", shorter if strides[0] == 2 else x, stride=strides[0]))
        padding = self._padding if strides[1] == 2 else dict(before=1, after=1)
        y = relu(self.grouped_layer(f"{name}/conv2", y, stride=strides[1], **padding))
        y = self.layer(f"{name}/conv3", y)
        if f"{name}/convshortcut/W" in self._values:
            x = self.layer(f"{name}/convshortcut", shorter, stride=stride)
        return relu(x + y)

    def __call__(self, image, num_blocks):
        x, outputs = self.stem(image), []
        for stage, blocks in enumerate(num_blocks):
            for block in range(blocks):
                x = self.block(f"group{stage}/block{block}", x, 2 if stage > 0 and block == 0 else 1)
            outputs.append(x)
        return outputs


OPTIONS = dict(width=2, norm="FreezeBN", freeze_at=0, freeze_affine=False, tf_pad_mode=False, stride_1x1=False)


@pytest.mark.parametrize("stride_1x1", [False, True])
@pytest.mark.parametrize("tf_pad_mode", [False, True])
@pytest.mark.parametrize("height, width", [(32, 48), (43, 57), (47, 34)])
def test_resnet_equals_the_definition(height, width, tf_pad_mode, stride_1x1):
    """Also where sizes are odd: the last row or column is lost at each stride."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    num_blocks, modes = (2, 1, 1), dict(tf_pad_mode=tf_pad_mode, stride_1x1=stride_1x1)
    outputs, values = evaluate(
        lambda x: (backbone.resnet(x, num_blocks=num_blocks, **{**OPTIONS, **modes}), variables()),
        image,
        random_variables=rng,
    )
    for output, expected, stride in zip(outputs, SlowResNet(values, **modes)(image, num_blocks), (4, 8, 16)):
        assert output.shape == (2, height // stride, width // stride, 2 * stride)
        assert np.mean(expected > 0) > 0.1
        np.testing.assert_allclose(output, expected, atol=1e-4 * expected.max())


@pytest.mark.parametrize("name", [name for name in backbone.BACKBONES if name.startswith("res")])
def test_every_backbone_equals_the_definition(name):
    """Narrow ones: where the groups of a stage would have less than a channel each, they have one."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 64, 32, 3)).astype(np.float32)
    options = {**OPTIONS, "width": 8, "epsilon": 1e-2}
    outputs, values = evaluate(
        lambda x: (backbone.BACKBONES[name].build(x, num_blocks=(1, 2, 1, 1), **options), variables()),
        image,
        random_variables=rng,
    )
    expected = SlowResNet(values, tf_pad_mode=False, stride_1x1=False, epsilon=1e-2)(image, (1, 2, 1, 1))
    assert len(outputs) == 4
    for output, x in zip(outputs, expected):
        assert output.shape == x.shape
        assert np.mean(x > 0) > 0.05
        np.testing.assert_allclose(output, x, atol=1e-4 * x.max())


def test_a_name_is_registered_once():
    with pytest.raises(ConfigError, match="BACKBONE.NAME 'resnet' is registered already"):
        backbone.register("resnet", lambda image, **options: [])


def num_parameters(name, num_blocks):
    with tf.Graph().as_default():
        image = tfv1.placeholder(tf.float32, [None, None, None, 3])
        backbone.BACKBONES[name].build(image, num_blocks=num_blocks, **{**OPTIONS, "width": 64})
        return sum(v.shape.num_elements() for v in tfv1.trainable_variables())


@pytest.mark.parametrize(
    ("name", "num_blocks", "millions", "features"),
    [
        ("resnet_basic", (2, 2, 2, 2), 11.69, 512),
        ("resnet_basic", (3, 4, 6, 3), 21.80, 512),
        ("resnet", (3, 4, 6, 3), 25.56, 2048),
        ("resnext_32x4d", (3, 4, 6, 3), 25.03, 2048),
        ("resnext_32x8d", (3, 4, 23, 3), 88.79, 2048),
        ("resnext_64x4d", (3, 4, 23, 3), 83.46, 2048),
    ],
)
def test_published_backbones_have_the_published_size(name, num_blocks, millions, features):
    """Of the whole classification network, as torchvision's documentation states it."""
    with_classifier = num_parameters(name, num_blocks) + (features + 1) * 1000
    assert round(with_classifier / 1e6, 2) == pytest.approx(millions, abs=0.011)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradient_of_a_convolution_in_groups(stride):
    """Against the gradients of one ordinary convolution for each group."""
    rng = np.random.default_rng(3)
    x, kernel = rng.normal(size=(2, 9, 8, 12)), rng.normal(size=(3, 3, 4, 6))
    padding = layers.explicit_padding(1, 1)

    def gradients(convolution):
        def run(x):
            weights = tf.constant(kernel, tf.float32)
            y = convolution(x, weights)
            return [y, *tf.gradients(tf.reduce_sum(tf.sin(y)), [x, weights])]

        return evaluate(run, x)

    def group_by_group(x, kernel):
        pairs = zip(tf.split(x, 3, axis=3), tf.split(kernel, 3, axis=3))
        return tf.concat([tf.nn.conv2d(part, k, stride, padding) for part, k in pairs], axis=3)

    found = gradients(lambda x, kernel: layers._grouped_conv2d(x, kernel, strides=stride, padding=padding))
    for one, other in zip(found, gradients(group_by_group)):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_last_stage_halves_the_features_of_rois():
    """C4's head: 14x14 becomes 7x7."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 14, 14, 8)).astype(np.float32)
    options = dict(norm="FreezeBN", freeze=(), tf_pad_mode=False, stride_1x1=False)
    y, values = evaluate(
        lambda x: (backbone.resnet_stage(x, 3, num_blocks=2, width=4, **options), variables()), x, random_variables=rng
    )
    resnet = SlowResNet(values, tf_pad_mode=False, stride_1x1=False)
    expected = resnet.block("group3/block1", resnet.block("group3/block0", x, 2), 1)
    assert y.shape == (3, 7, 7, 16)
    np.testing.assert_allclose(y, expected, atol=1e-4 * expected.max())


# ------------------------------------------------------------------------------------------- names and frozen variables


def build_resnet(**options):
    image = tfv1.placeholder(tf.float32, [None, None, None, 3])
    return backbone.resnet(image, num_blocks=(1, 1, 1, 1), **{**OPTIONS, **options})


def parts_trained():
    """What of the stem and of each stage is trained, in the order of the network: "W", "gamma", "beta"."""
    parts = {part: set() for part in ("conv0", "group0", "group1", "group2", "group3")}
    for variable in tfv1.trainable_variables():
        part, *_, name = variable.op.name.split("/")
        parts[part].add(name)
    return list(parts.values())


@pytest.mark.parametrize("freeze_affine", [False, True])
@pytest.mark.parametrize("freeze_at", [0, 1, 2, 3, 4, 5])
def test_the_first_parts_are_frozen(freeze_at, freeze_affine):
    with tf.Graph().as_default():
        build_resnet(freeze_at=freeze_at, freeze_affine=freeze_affine)
        of_trained_part = {"W"} if freeze_affine else {"W", "gamma", "beta"}
        assert parts_trained() == [set()] * freeze_at + [of_trained_part] * (5 - freeze_at)


@pytest.mark.parametrize("freeze_at", [3, 4, 5])
def test_the_last_stage_on_rois_is_the_fifth_part(freeze_at):
    options = {**OPTIONS, "freeze_at": freeze_at, "num_blocks": (1, 1, 1, 1)}
    with tf.Graph().as_default():
        backbone.resnet_last_stage(tfv1.placeholder(tf.float32, [None, 14, 14, 8]), **options)
        assert bool(tfv1.trainable_variables()) == (freeze_at < 5)


def test_names_of_variables():
    """A shortcut has a convolution only where the number of channels changes."""
    layers = ["conv0"]
    for stage, blocks in enumerate((2, 1)):
        for block in range(blocks):
            names = ["conv1", "conv2", "conv3"] + ["convshortcut"] * (block == 0)
            layers += [f"group{stage}/block{block}/{name}" for name in names]
    names = ["W", "bn/gamma", "bn/beta", "bn/mean/EMA", "bn/variance/EMA"]
    with tf.Graph().as_default():
        backbone.resnet(tfv1.placeholder(tf.float32, [None, None, None, 3]), num_blocks=(2, 1), **OPTIONS)
        assert set(variables()) == {f"{layer}/{name}" for layer in layers for name in names}


@pytest.mark.parametrize("norm", ["FreezeBN", "SyncBN", "GN"])
def test_blocks_start_as_their_shortcuts(norm):
    """The last norm of each block starts with gamma 0, every other one with 1."""

    def build(x):
        backbone.resnet(x, num_blocks=(1, 2), **{**OPTIONS, "norm": norm})
        return {name: gamma for name, gamma in variables().items() if name.endswith("gamma")}

    gammas = evaluate(build, np.zeros((1, 32, 32, 3)))
    assert len(gammas) == 1 + 3 * 3 + 2
    for name, gamma in gammas.items():
        np.testing.assert_array_equal(gamma, np.full(gamma.shape, 0 if "/conv3/" in name else 1))


# -------------------------------------------------------------------------------------------------------------- pyramid


def slow_fpn(features, values, *, norm):
    def layer(name, x, norm_name, **options):
        y = convolve(x, values[f"fpn/{name}/W"], bias=values.get(f"fpn/{name}/b", 0.0), **options)
        if norm == "FreezeBN":
            return stored_norm(y, values, f"fpn/{name}/bn")
        scope = f"fpn/{name}/bn" if norm == "SyncBN" else f"fpn/{norm_name}"
        gamma, beta = (values.get(f"{scope}/{name}") for name in ("gamma", "beta"))
        if norm == "SyncBN":
            return batch_norm(y, gamma, beta)
        return group_norm(y, gamma, beta, groups=3) if norm == "GN" else y

    merged = {}
    for level in (5, 4, 3, 2):
        merged[level] = layer(f"lateral_1x1_c{level}", features[level - 2], f"gn_c{level}")
        if level < 5:
            merged[level] = merged[level] + merged[level + 1].repeat(2, axis=1).repeat(2, axis=2)
    outputs = [
        layer(f"posthoc_3x3_p{level}", merged[level], f"gn_p{level}", before=1, after=1) for level in (2, 3, 4, 5)
    ]
    return outputs + [outputs[-1][:, ::2, ::2]]


@pytest.mark.parametrize("norm", ["None", "GN", "FreezeBN", "SyncBN"])
def test_fpn_equals_the_definition(norm):
    """96 x 160 pixels: the coarsest level has an odd number of rows and columns, and p6 every second pixel of p5."""
    rng = np.random.default_rng(2)
    features = [
        rng.normal(size=(2, 96 // stride, 160 // stride, channels)).astype(np.float32)
        for stride, channels in zip((4, 8, 16, 32), (2, 4, 8, 16))
    ]
    outputs, values = evaluate(
        lambda *x: (fpn.fpn(x, channels=6, norm=norm), variables()), *features, random_variables=rng
    )
    assert [x.shape for x in outputs] == [(2, 24, 40, 6), (2, 12, 20, 6), (2, 6, 10, 6), (2, 3, 5, 6), (2, 2, 3, 6)]
    assert len(values) == 8 * {"None": 2, "GN": 4}.get(norm, 5)  # a batch norm takes the place of the bias
    for output, expected in zip(outputs, slow_fpn(features, values, norm=norm)):
        np.testing.assert_allclose(output, expected, atol=1e-4 * np.abs(expected).max())
