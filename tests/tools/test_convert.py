"""Weights of other systems: what they compute here is what they compute there; what is no weights file is refused.

tests/golden/torchvision holds what torchvision computes from synthetic weights (tests/golden/synthetic.py).
"""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import cv2
import foreign
import h5py
import helpers
import numpy as np
import pytest
import tensorflow as tf
import test_train
from golden.synthetic import synthetic_image, synthetic_state_dict
from safetensors.numpy import save_file
from tensorpack.compat import tfv1

from common import boxes as np_boxes
from common import checkpoint, weights
from config import Config, UserError
from dataset import shapes
from inference.graph import Inference, session_config
from modeling import box_ops, convnext, rcnn
from modeling.backbone import BACKBONES
from modeling.layers import collect_variables
from tools import convert
from zoo import files, torchvision

GOLDEN = Path(__file__).parents[1] / "golden" / "torchvision"


def synthetic_arrays(model):
    """torchvision's arrays of a golden model."""
    return synthetic_state_dict(json.loads((GOLDEN / f"{model}.json").read_text()))


def write_pth(path, arrays):
    with open(path, "wb") as file:
        files.write_torch(file, arrays)
    return path


def run_convert(*arguments):
    convert.main(convert.parse_arguments([str(argument) for argument in arguments]))


def settings_of(path, *overrides):
    """The settings that a converted checkpoint carries, with overrides."""
    settings = Config()
    settings.update(overrides)
    settings.adopt(checkpoint.carried_settings(path), source=path)
    settings.freeze()
    return settings


# ------------------------------------------------------------------------------------------------------ backbones


def features(path, image, settings):
    """c2 to c5 of one image, uint8 [H, W, 3] BGR, by the backbone of a converted file."""
    with tf.Graph().as_default(), tfv1.Session() as session:
        batch = tf.constant(image[None])
        options = rcnn._backbone_options(settings, training=False) | {"freeze_at": 0, "freeze_affine": False}
        with collect_variables(weights.MODEL_VARIABLES), collect_variables(weights.BACKBONE_VARIABLES):
            outputs = BACKBONES[settings.BACKBONE.NAME].build(
                rcnn._normalise(settings, batch, tf.constant([image.shape[:2]])),
                num_blocks=settings.BACKBONE.RESNET_NUM_BLOCKS,
                **options,
            )
        weights.load(path, session, check=weights.check_backbone)
        return [x[0] for x in session.run(outputs)]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet50", "resnext50_32x4d"])
def test_torchvision_backbones_give_the_golden_features(model, tmp_path):
    write_pth(tmp_path / "source.pth", synthetic_arrays(model))
    run_convert(tmp_path / "source.pth", tmp_path / "out.npz")
    golden = np.load(GOLDEN / f"{model}.npz", allow_pickle=False)
    outputs = features(tmp_path / "out.npz", synthetic_image(*golden["image"])[0], settings_of(tmp_path / "out.npz"))
    for name, x in zip(("c2", "c3", "c4", "c5"), outputs):
        assert x.shape == tuple(golden[f"{name}_shape"])
        for found, key in (
            (x[:4, :4, :16], "corner"),
            (x.mean((0, 1)), "channel_mean"),
            (x.std((0, 1)), "channel_std"),
        ):
            expected = golden[f"{name}_{key}"]
            np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max(), err_msg=f"{name} {key}")


def write_pickle(path, tree, *, protocol=None):
    path.write_bytes(pickle.dumps(tree, protocol=protocol))
    return path


def write_h5(path, arrays):
    """As Keras does: a group for the layer, in it one of the same name, in it the arrays."""
    with h5py.File(path, "w") as file:
        for name, x in arrays.items():
            layer, leaf = name.rsplit(".", 1)
            file[f"{layer}/{layer}/{leaf}:0"] = x
    return path


def write_detectron2(path, arrays):
    return write_pickle(path, {"model": arrays, "__author__": "Detectron2 Model Zoo"})


def write_detectron(path, arrays):
    return write_pickle(path, {"blobs": arrays | {"conv1_w_momentum": np.zeros(3), "conv1_b": np.ones(8)}}, protocol=2)


SYSTEMS = {
    "torchvision": (foreign.TorchvisionNames(), 3, write_pth),
    "torchvision, basic blocks": (foreign.TorchvisionNames(), 2, write_pth),
    "Detectron2, torchvision's weights": (foreign.RGBDetectron2Names(), 3, write_detectron2),
    "Detectron": (foreign.DetectronNames(), 3, write_detectron),
    "Detectron, GroupNorm": (foreign.GroupNormDetectronNames(), 3, write_detectron),
    "Keras": (foreign.KerasNames(), 3, write_h5),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_backbones_compute_what_they_compute_there(system, tmp_path):
    """Channel order, pixel statistics, padding, stride, epsilon and folded biases, against NumPy."""
    names, convolutions, write = SYSTEMS[system]
    arrays = foreign.resnet_shapes(names, convolutions=convolutions).arrays()
    run_convert(write(tmp_path / "source", arrays), tmp_path / "out.npz")
    settings = settings_of(tmp_path / "out.npz")
    image = synthetic_image(64, 96, 4, 0)[0]
    outputs = features(tmp_path / "out.npz", image, settings)
    assert len(outputs) == 4
    for found, (expected,) in zip(outputs, foreign.resnet_features(names, arrays, image, convolutions=convolutions)):
        assert np.mean(expected > 0) > 0.05
        np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())


def test_bias_and_epsilon_of_keras_are_folded(tmp_path):
    """Where variances are as small as the epsilon."""
    arrays = foreign.resnet_shapes(foreign.KerasNames()).arrays()
    arrays["conv1_bn.moving_variance"] *= 1e-7
    run_convert(write_h5(tmp_path / "source.h5", arrays), tmp_path / "out.npz")
    ours = {name: np.float64(x) for name, x in weights.read(tmp_path / "out.npz").items()}
    theirs = {name: np.float64(x) for name, x in arrays.items()}
    x = np.linspace(-1, 1, 8)
    centred = x + theirs["conv1_conv.bias"] - theirs["conv1_bn.moving_mean"]
    expected = centred / np.sqrt(theirs["conv1_bn.moving_variance"] + 1.001e-5)
    epsilon = checkpoint.carried_settings(tmp_path / "out.npz")["BACKBONE.NORM_EPSILON"]
    found = (x - ours["conv0/bn/mean/EMA"]) / np.sqrt(ours["conv0/bn/variance/EMA"] + epsilon)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ ConvNeXt


def convnext_maps(path, image, settings):
    """c2 to c5 before the norms that detectors add, by the backbone of a converted file."""
    with tf.Graph().as_default(), tfv1.Session() as session:
        batch, shape = tf.constant(image[None]), tf.constant([image.shape[:2]])
        options = dict(num_blocks=settings.BACKBONE.RESNET_NUM_BLOCKS, width=settings.BACKBONE.WIDTH, freeze_at=0)
        with collect_variables(weights.MODEL_VARIABLES), collect_variables(weights.BACKBONE_VARIABLES):
            outputs = convnext.stages(rcnn._normalise(settings, batch, shape), **options)
        weights.load(path, session, check=weights.check_finetune)
        return [x[0] for x in session.run(outputs)]


@pytest.mark.slow
def test_convnext_gives_the_golden_features_and_goes_back(tmp_path):
    arrays = synthetic_arrays("convnext_tiny")
    run_convert(write_pth(tmp_path / "source.pth", arrays), tmp_path / "out.npz")
    settings = settings_of(tmp_path / "out.npz")
    assert (settings.BACKBONE.NAME, settings.BACKBONE.WIDTH) == ("convnext", 96)
    assert settings.BACKBONE.RESNET_NUM_BLOCKS == (3, 3, 9, 3)
    golden = np.load(GOLDEN / "convnext_tiny.npz", allow_pickle=False)
    maps = convnext_maps(tmp_path / "out.npz", synthetic_image(*golden["image"])[0], settings)
    for name, x in zip(("c2", "c3", "c4", "c5"), maps):
        assert x.shape == tuple(golden[f"{name}_shape"])
        values = {"corner": x[:4, :4, :16], "channel_mean": x.mean((0, 1)), "channel_std": x.std((0, 1))}
        for key, found in values.items():
            expected = golden[f"{name}_{key}"]
            np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max(), err_msg=f"{name} {key}")
    run_convert(tmp_path / "out.npz", tmp_path / "again.pth", "--to", "torchvision")
    again = files.read(tmp_path / "again.pth")
    assert again.keys() == arrays.keys()
    for name, x in arrays.items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)


@pytest.mark.parametrize(("model", "blocks", "width"), [("small", [3, 3, 27, 3], 96), ("base", [3, 3, 27, 3], 128)])
def test_larger_convnexts_are_recognised(model, blocks, width):
    shapes = json.loads((GOLDEN / f"convnext_{model}.json").read_text())
    found = convert.recognise({name: np.empty(shape, np.float32) for name, shape in shapes.items()}, sha256="")
    assert (found.settings["BACKBONE.RESNET_NUM_BLOCKS"], found.settings["BACKBONE.WIDTH"]) == (blocks, width)
    assert {pair.theirs for pair in found.pairs} == set(shapes)


KERAS_LAYERS = (  # torchvision's names, Keras's, and the axes of its kernels
    (r"features\.0\.0", "stem_conv", (2, 3, 1, 0)),
    (r"features\.0\.1", "stem_layernorm", None),
    (r"features\.([246])\.0", "downsampling_layernorm_{half}", None),
    (r"features\.([246])\.1", "downsampling_conv_{half}", (2, 3, 1, 0)),
    (r"features\.([1357])\.(\d+)\.block\.0", "stage_{half}_block_{1}_depthwise_conv", (2, 3, 1, 0)),
    (r"features\.([1357])\.(\d+)\.block\.2", "stage_{half}_block_{1}_layernorm", None),
    (r"features\.([1357])\.(\d+)\.block\.3", "stage_{half}_block_{1}_pointwise_conv_1", (1, 0)),
    (r"features\.([1357])\.(\d+)\.block\.5", "stage_{half}_block_{1}_pointwise_conv_2", (1, 0)),
    (r"features\.([1357])\.(\d+)", "stage_{half}_block_{1}_layer_scale", None),
    (r"classifier\.0", "head_layernorm", None),
    (r"classifier\.2", "head_dense", (1, 0)),
)


@pytest.mark.parametrize("numbered", [False, True])
def test_convnexts_of_keras_are_those_of_torchvision(numbered, tmp_path):
    """By names as in `.h5`, and as in `.weights.h5`; the same network gives the same file."""
    shapes = json.loads((GOLDEN / "convnext_tiny.json").read_text())
    sizes = {96: 8, 192: 16, 384: 32, 768: 64, 1536: 128, 3072: 256, 1000: 10}
    shapes = {name: [sizes.get(size, size) for size in shape] for name, shape in shapes.items()}
    arrays = synthetic_state_dict(shapes)
    with h5py.File(tmp_path / "keras.h5", "w") as file:
        for name, x in arrays.items():
            layer, _, leaf = name.rpartition(".")
            ((found, keras_name, axes),) = [
                (match, *rest) for pattern, *rest in KERAS_LAYERS if (match := re.fullmatch(pattern, layer))
            ]
            numbers = [int(x) for x in found.groups()]
            half = (numbers[0] - 1) // 2 if numbers else 0
            keras_name = f"convnext_tiny_{keras_name.format(*numbers, half=half)}"
            is_first, is_norm = leaf != "bias", axes is None
            kind = ("gamma" if is_norm else "kernel") if is_first else "beta" if is_norm else "bias"
            kind = "variable_3" if leaf == "layer_scale" else kind
            x = x.transpose(axes) if is_first and axes else x.reshape(-1) if leaf == "layer_scale" else x
            folder = keras_name if numbered else f"model_weights/{keras_name}/{keras_name}"
            file[f"{folder}/{int(not is_first) if numbered else kind}"] = x
    run_convert(write_pth(tmp_path / "torch.pth", arrays), tmp_path / "torch.npz")
    run_convert(tmp_path / "keras.h5", tmp_path / "keras.npz")
    ours, theirs = (weights.read(tmp_path / f"{name}.npz") for name in ("torch", "keras"))
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(theirs[name], x, err_msg=name)
    carried = [checkpoint.carried_settings(tmp_path / f"{name}.npz") for name in ("torch", "keras")]
    assert carried[0] == carried[1]


# ------------------------------------------------------------------------------------------------------ detectors


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """The golden Mask R-CNN as a .pth file; Faster R-CNN's arrays are the same without those of the masks."""
    arrays = synthetic_arrays("maskrcnn_resnet50_fpn")
    return write_pth(tmp_path_factory.mktemp("detector") / "maskrcnn.pth", arrays)


def detect(path, image, settings):
    """Detections of one image, uint8 [H, W, 3] BGR, which enters the network as it is."""
    return detect_and_maps(path, image, settings)[0]


def detect_and_maps(path, image, settings):
    """Detections of one image, and the maps of the pyramid, [H, W, C]."""
    batch = image[None], np.array([image.shape[:2]], np.int32)
    with tf.Graph().as_default(), tfv1.Session(config=session_config()) as session:
        inference = Inference(settings)
        with tfv1.variable_scope(tfv1.get_variable_scope(), reuse=True):
            maps, _ = rcnn._features(settings, *map(tf.constant, batch), training=False)
        weights.load(path, session, check=weights.check_complete)
        return inference.bind(session)(*batch), [x[0] for x in session.run(maps)]


def matches(found, golden, prefix):
    """Index of the found detection for each golden one, or -1: same label, IoU above 0.99, score within 5e-3."""
    iou = np_boxes.pairwise_iou(golden[f"{prefix}/boxes"], found.boxes)
    close = np.abs(golden[f"{prefix}/scores"][:, None] - found.scores) < 5e-3
    same = (golden[f"{prefix}/labels"][:, None] == found.labels) & close & (iou > 0.99)
    return np.where(same.any(axis=1), same.argmax(axis=1), -1)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def test_torchvision_detectors_give_the_golden_detections(model, detector, tmp_path):
    """With all 91 class slots, of which the synthetic weights use also those that no class has."""
    golden = np.load(GOLDEN / f"{model}.npz", allow_pickle=False)
    source = detector
    if model.startswith("faster"):
        source = write_pth(tmp_path / "source.pth", synthetic_arrays(model))
    run_convert(source, tmp_path / "out.npz", "--all-slots")
    settings = settings_of(tmp_path / "out.npz")
    assert (model == "maskrcnn_resnet50_fpn") == settings.MODE_MASK
    for k in ("image0", "image1"):
        image = synthetic_image(*golden[k])[0]
        found = detect(tmp_path / "out.npz", image, settings)
        index = matches(found, golden, k)
        assert np.mean(index >= 0) >= 0.98
        if settings.MODE_MASK:
            check_mask_areas(found, index, golden[f"{k}/mask_areas"], image.shape[:2])


def second_version(model):
    """torchvision's arrays of a golden detector of the second version, whose class scores have a scale of their own."""
    arrays, golden = synthetic_arrays(model), np.load(GOLDEN / f"{model}.npz", allow_pickle=False)
    arrays["roi_heads.box_predictor.cls_score.weight"] *= golden["cls_score_weight_scale"]
    arrays["roi_heads.box_predictor.cls_score.bias"] = golden["cls_score_bias"]
    return arrays, golden


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2"])
def test_second_versions_of_torchvision_give_the_golden_pyramid_and_detections(model, tmp_path):
    """Batch norm everywhere, two convolutions in the RPN, four in the box head; and the way back is exact."""
    arrays, golden = second_version(model)
    source, path = write_pth(tmp_path / "source.pth", arrays), tmp_path / "out.npz"
    run_convert(source, path, "--all-slots")
    settings = settings_of(path)
    for k in ("image0", "image1"):
        image = synthetic_image(*golden[k])[0]
        found, maps = detect_and_maps(path, image, settings)
        for level, x in zip(("0", "1", "2", "3", "pool"), maps):
            corner, mean = (golden[f"{k}/p_{level}_{name}"] for name in ("corner", "channel_mean"))
            for y, expected in ((x[:4, :4, :16], corner[: x.shape[0], : x.shape[1]]), (x.mean((0, 1)), mean)):
                np.testing.assert_allclose(y, expected, atol=1e-3 * np.abs(expected).max(), err_msg=f"{k} p_{level}")
        index = matches(found, golden, k)
        assert np.mean(index >= 0) >= 0.98
        if settings.MODE_MASK:
            check_mask_areas(found, index, golden[f"{k}/mask_areas"], image.shape[:2])
    run_convert(path, tmp_path / "again.pth", "--to", "torchvision")
    again = files.read(tmp_path / "again.pth")
    assert again.keys() == arrays.keys()
    for name, x in arrays.items():
        x = np.concatenate([np.zeros_like(x[:1]), x[1:]]) if "mask_fcn_logits" in name else x  # the background's
        np.testing.assert_array_equal(again[name], x, err_msg=name)
        assert again[name].dtype == x.dtype


def check_mask_areas(found, index, areas, size):
    """Pasted as torchvision pastes, which differs from our way on small boxes, the masks have the golden areas."""
    kept = np.flatnonzero(index >= 0)
    pasted = [area_as_torchvision_pastes(found.masks[i], found.boxes[i], size) for i in index[kept]]
    np.testing.assert_allclose(pasted, areas[kept], rtol=0.02, atol=1)


def area_as_torchvision_pastes(mask, box, size):
    """Pixels above 0.5 of a mask with a ring of zeros, stretched to the box rounded towards zero, one pixel larger."""
    cells = len(mask) + 2
    center, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * (cells / len(mask))
    x1, y1, x2, y2 = np.concatenate([center - half, center + half]).astype(np.int64)
    stretched = cv2.resize(np.pad(mask, 1), (max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)), interpolation=cv2.INTER_LINEAR)
    visible = stretched[max(-y1, 0) : size[0] - y1, max(-x1, 0) : size[1] - x1]
    return np.sum(visible > 0.5)


# ------------------------------------------------------------------------------------------- Detectron2's detectors

VARIANTS = {
    "FPN": {},
    "FPN without masks": dict(masks=False),
    "FPN, GroupNorm": dict(norm="GN"),
    "FPN, batch norm": dict(norm="BN"),
    "Cascade, batch norm": dict(norm="BN", cascade=True),
    "C4": dict(is_c4=True),
    "Cascade": dict(cascade=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_of_detectron2_compute_what_they_compute_there(variant, tmp_path):
    """Every variable is found, none left over; probabilities, boxes and masks of given RoIs agree with NumPy."""
    options = VARIANTS[variant]
    arrays = foreign.detector_shapes(**options).arrays()
    run_convert(write_detectron2(tmp_path / "source.pkl", arrays), tmp_path / "out.npz")
    settings = settings_of(tmp_path / "out.npz")
    scopes = [f"cascade_rcnn_stage{k}" for k in (1, 2, 3)] if settings.FPN.CASCADE else ["fastrcnn"]
    rng = np.random.default_rng(0)
    channels = foreign.WIDTH * 32 if options.get("is_c4") else foreign.CHANNELS
    rois = rng.normal(size=(6, 7, 7, channels)).astype(np.float32)
    side = 7 if options.get("is_c4") else 14
    labels = np.arange(1, foreign.NUM_CLASSES + 1)
    mask_rois = rng.normal(size=(len(labels), side, side, channels)).astype(np.float32)
    with tf.Graph().as_default(), tfv1.Session() as session:
        Inference(settings)
        with tfv1.variable_scope(tfv1.get_variable_scope(), reuse=True):
            agnostic = settings.FPN.CASCADE
            x = tf.constant(rois)
            heads = [rcnn._head_outputs(settings, x, scope, class_agnostic=agnostic) for scope in scopes]
            masks = rcnn._mask_logits(settings, tf.constant(mask_rois), labels) if settings.MODE_MASK else tf.zeros([])
        matched, _ = weights.load(tmp_path / "out.npz", session, check=weights.check_complete)
        assert not matched.unused
        heads, masks = session.run((heads, masks))
    for k, (logits, deltas) in enumerate(heads):
        stage = f"{k}." if settings.FPN.CASCADE else ""
        check_box_outputs(logits, deltas, *foreign.box_outputs(arrays, rois, stage))
    if settings.MODE_MASK:
        expected = foreign.mask_logits(arrays, mask_rois)[labels - 1, :, :, labels - 1]
        np.testing.assert_allclose(masks, expected, atol=1e-4 * np.abs(expected).max())


def test_pyramid_and_proposals_of_detectron2_are_taken_level_by_level(tmp_path):
    arrays = foreign.detector_shapes(masks=False).arrays()
    run_convert(write_detectron2(tmp_path / "source.pkl", arrays), tmp_path / "out.npz")
    values = weights.read(tmp_path / "out.npz")
    theirs = {f"fpn/posthoc_3x3_p{i}": f"backbone.fpn_output{i}" for i in (2, 3, 4, 5)}
    theirs |= {f"fpn/lateral_1x1_c{i}": f"backbone.fpn_lateral{i}" for i in (2, 3, 4, 5)}
    names = {"conv0": "conv", "class": "objectness_logits", "box": "anchor_deltas"}
    theirs |= {f"rpn/{ours}": f"proposal_generator.rpn_head.{name}" for ours, name in names.items()}
    for ours, name in theirs.items():
        np.testing.assert_array_equal(values[f"{ours}/W"].transpose(3, 2, 0, 1), arrays[f"{name}.weight"])
        np.testing.assert_array_equal(values[f"{ours}/b"], arrays[f"{name}.bias"])


def check_box_outputs(logits, deltas, probabilities, their_deltas):
    """Ours have the background first; theirs last, and no box of it."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    found = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found[:, 1:], probabilities[:, :-1], atol=1e-4)
    np.testing.assert_allclose(found[:, 0], probabilities[:, -1], atol=1e-4)
    first = 1 if deltas.shape[1] > 1 else 0
    assert np.ptp(probabilities) > 0.1
    np.testing.assert_allclose(deltas[:, first:], their_deltas, atol=1e-4 * np.abs(their_deltas).max())


def test_boxes_of_detectron2_are_decoded_with_its_limit(tmp_path):
    """A box grows by at most 1000 / 16, whatever the largest image."""
    run_convert(write_detectron2(tmp_path / "source.pkl", foreign.detector_shapes().arrays()), tmp_path / "out.npz")
    settings = settings_of(tmp_path / "out.npz", "PREPROC.MAX_SIZE=400")
    deltas, reference = np.float32([[1.0, -2.0, 3.0, 40.0]]), np.float32([[10, 20, 50, 90]])
    options = dict(weights=settings.FRCNN.BBOX_REG_WEIGHTS, max_log_size=rcnn._max_log_size(settings))
    (found,) = helpers.evaluate(lambda d, r: box_ops.decode(d, r, **options), deltas, reference)
    expected = helpers.decode(deltas[0] / [10, 10, 5, 5], reference[0], max_log_size=np.log(1000 / 16))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[3] - found[1] == pytest.approx(70 * 1000 / 16)


@pytest.mark.parametrize("levels", [[[16], [32.5], [64], [128], [256]], [[24, 48, 96]]])
def test_anchors_in_the_file_decide(levels, tmp_path):
    """Detectron2's: for each size and ratio a box of area size^2 about the origin."""
    arrays = foreign.detector_shapes(masks=False).arrays()
    for level, sizes in enumerate(levels):
        shapes = [(size / np.sqrt(ratio), size * np.sqrt(ratio)) for size in sizes for ratio in (0.5, 1.5)]
        anchors = np.float32([[-w / 2, -h / 2, w / 2, h / 2] for w, h in shapes])
        arrays[f"proposal_generator.anchor_generator.cell_anchors.{level}"] = anchors
    run_convert(write_detectron2(tmp_path / "source.pkl", arrays), tmp_path / "out.npz")
    carried = checkpoint.carried_settings(tmp_path / "out.npz")
    assert carried["RPN.ANCHOR_SIZES"] == sum(levels, [])
    assert carried["RPN.ANCHOR_RATIOS"] == [0.5, 1.5]


def test_pixel_statistics_in_the_file_decide(tmp_path):
    arrays = foreign.detector_shapes(masks=False).arrays()
    for means, is_rgb in (([103.5, 116.3, 123.7], False), ([123.7, 116.3, 103.5], True)):
        stored = {"pixel_mean": np.float32(means).reshape(3, 1, 1), "pixel_std": np.float32([1, 2, 3]).reshape(3, 1, 1)}
        output = tmp_path / f"{is_rgb}.npz"
        run_convert(write_detectron2(tmp_path / "source.pkl", arrays | stored), output)
        carried, kernel = checkpoint.carried_settings(output), weights.read(output)["conv0/W"]
        np.testing.assert_allclose(carried["PREPROC.PIXEL_MEAN"], [123.7, 116.3, 103.5], rtol=1e-6)
        assert carried["PREPROC.PIXEL_STD"] == ([1, 2, 3] if is_rgb else [3, 2, 1])
        their_blue = arrays["backbone.bottom_up.stem.conv1.weight"][:, 2 if is_rgb else 0]
        np.testing.assert_array_equal(kernel[:, :, 0].transpose(2, 0, 1), their_blue)


# ------------------------------------------------------------------------------------------------ torchvision's files


def small_torchvision_detector(num_slots=91):
    """torchvision's names for a narrow Mask R-CNN, from those of the golden one."""
    names = foreign.TorchvisionNames()
    body = foreign.resnet_shapes(names)
    shapes = foreign.Shapes({f"backbone.body.{name}": shape for name, shape in body.items()})
    sizes = {256: 16, 512: 64, 1024: 128, 2048: 256, 12544: 16 * 49, 91: num_slots, 364: 4 * num_slots}
    for name, shape in json.loads((GOLDEN / "maskrcnn_resnet50_fpn.json").read_text()).items():
        if "body" not in name:
            shapes[name] = tuple(sizes.get(size, size) for size in shape)
    for i in range(4):
        shapes[f"backbone.fpn.inner_blocks.{i}.0.weight"] = (16, foreign.WIDTH * 4 * 2**i, 1, 1)
    shapes["roi_heads.box_head.fc6.weight"] = (128, 16 * 49)
    return shapes.arrays()


def test_unused_class_slots_are_left_out(tmp_path):
    """Background and the classes at COCO's ids stay, in that order; masks have no background."""
    arrays = small_torchvision_detector()
    run_convert(write_pth(tmp_path / "source.pth", arrays), tmp_path / "out.npz")
    values, carried = weights.read(tmp_path / "out.npz"), checkpoint.carried_settings(tmp_path / "out.npz")
    assert carried["DATA.NUM_CATEGORY"] == 80
    for label, name, coco_id in ((1, "person", 1), (12, "stop sign", 13), (80, "toothbrush", 90)):
        assert carried["DATA.CLASS_NAMES"][label] == name
        theirs, ours = "roi_heads.box_predictor", "fastrcnn/outputs"
        logits = arrays[f"{theirs}.cls_score.weight"][coco_id]
        np.testing.assert_array_equal(values[f"{ours}/class/W"][:, label], logits)
        boxes = arrays[f"{theirs}.bbox_pred.weight"][4 * coco_id : 4 * coco_id + 4].T
        np.testing.assert_array_equal(values[f"{ours}/box/W"][:, 4 * label : 4 * label + 4], boxes)
        mask = arrays["roi_heads.mask_predictor.mask_fcn_logits.bias"][coco_id]
        assert values["maskrcnn/conv/b"][label - 1] == mask


def test_names_of_the_published_detectors_and_their_epsilon(tmp_path):
    """The files of 2019 have other names for some layers; their batch norm has no epsilon."""
    new = small_torchvision_detector()
    old = {}
    for name, x in new.items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        name = name.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if "_blocks." in name else name
        for i in range(4):
            name = name.replace(f"roi_heads.mask_head.{i}.0.", f"roi_heads.mask_head.mask_fcn{i + 1}.")
        old[name] = x
    assert len(set(old) - set(new)) == 16 + 2 + 8
    run_convert(write_pth(tmp_path / "new.pth", new), tmp_path / "new.npz")
    run_convert(write_pth(tmp_path / "old.pth", old), tmp_path / "old.npz")
    assert (tmp_path / "new.npz").read_bytes() == (tmp_path / "old.npz").read_bytes()
    assert torchvision.recognise(new, sha256="bf2d0c1e" + 56 * "0").settings["BACKBONE.NORM_EPSILON"] == 0
    assert torchvision.recognise(new, sha256=64 * "0").settings["BACKBONE.NORM_EPSILON"] == 1e-5


@pytest.mark.parametrize(("num_slots", "options"), [(91, []), (91, ["--all-slots"]), (6, [])])
def test_out_and_back_is_exact(num_slots, options, tmp_path):
    arrays = small_torchvision_detector(num_slots)
    run_convert(write_pth(tmp_path / "first.pth", arrays), tmp_path / "first.npz", *options)
    run_convert(tmp_path / "first.npz", tmp_path / "second.pth", "--to", "torchvision")
    run_convert(tmp_path / "second.pth", tmp_path / "second.npz", *options)
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()
    again = files.read(tmp_path / "second.pth")
    assert again.keys() == arrays.keys()
    for name, x in arrays.items():
        if num_slots == 91 and not options and "predictor" in name and "conv5_mask" not in name:
            continue  # what belongs to slots that were left out is gone: see the next test
        x = x[1:] if "mask_fcn_logits" in name else x  # so is the background's mask
        np.testing.assert_array_equal(again[name][-len(x) :], x, err_msg=name)


def test_slots_that_no_class_has_are_never_detected(tmp_path):
    run_convert(write_pth(tmp_path / "first.pth", small_torchvision_detector()), tmp_path / "first.npz")
    run_convert(tmp_path / "first.npz", tmp_path / "second.pth", "--to", "torchvision")
    arrays = files.read(tmp_path / "second.pth")
    weight, bias = (arrays[f"roi_heads.box_predictor.cls_score.{x}"] for x in ("weight", "bias"))
    assert not weight[[12, 26, 83]].any()
    assert (bias[[12, 26, 83]] == -100).all()
    assert (bias[[0, 1, 13, 90]] > -3).all()


def test_backbones_go_back_to_torchvision(tmp_path):
    arrays = foreign.resnet_shapes(foreign.TorchvisionNames()).arrays()
    arrays.update({"fc.weight": np.ones((7, 256), np.float32), "fc.bias": np.ones(7, np.float32)})
    run_convert(write_pth(tmp_path / "first.pth", arrays), tmp_path / "first.npz")
    run_convert(tmp_path / "first.npz", tmp_path / "second.pth", "--to", "torchvision")
    again = files.read(tmp_path / "second.pth")
    assert again.keys() == arrays.keys()
    for name, x in arrays.items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_torchvision_computes_otherwise_is_not_written(variant, tmp_path):
    arrays = foreign.detector_shapes(**VARIANTS[variant]).arrays()
    run_convert(write_pickle(tmp_path / "source.pkl", arrays), tmp_path / "first.npz")
    with pytest.raises(UserError, match="no counterpart of models with CONVENTIONS=detectron2, "):
        run_convert(tmp_path / "first.npz", tmp_path / "second.pth", "--to", "torchvision")
    assert not (tmp_path / "second.pth").exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_detectors_go_back_to_detectron2(variant, tmp_path):
    arrays = foreign.detector_shapes(**VARIANTS[variant]).arrays()
    counter = {"backbone.bottom_up.stem.conv1.norm.num_batches_tracked": np.int64(7)}  # no weight
    run_convert(write_detectron2(tmp_path / "source.pkl", arrays | counter), tmp_path / "first.npz")
    run_convert(tmp_path / "first.npz", tmp_path / "second.pth", "--to", "detectron2")
    again = files.read(tmp_path / "second.pth")
    assert again.keys() == arrays.keys()
    for name, x in arrays.items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)


def test_backbones_go_back_to_detectron2(tmp_path):
    arrays = foreign.resnet_shapes(foreign.Detectron2Names("")).arrays()
    run_convert(write_detectron2(tmp_path / "source.pkl", arrays), tmp_path / "first.npz")
    run_convert(tmp_path / "first.npz", tmp_path / "second.pth", "--to", "detectron2")
    again = files.read(tmp_path / "second.pth")
    assert again.keys() == arrays.keys()
    stem = "stem.conv1.weight"
    for name, x in arrays.items():  # a backbone with statistics of batch norm had RGB images there
        np.testing.assert_array_equal(again[name], x[:, ::-1] if name == stem else x, err_msg=name)


def test_what_detectron2_has_not_is_not_written(tmp_path):
    arrays = foreign.detector_shapes(norm="GN").arrays()
    run_convert(write_detectron2(tmp_path / "source.pkl", arrays), tmp_path / "first.npz")
    values, carried = weights.read(tmp_path / "first.npz"), checkpoint.carried_settings(tmp_path / "first.npz")
    with pytest.raises(UserError, match="no counterpart of models with CONVENTIONS=tensorpack$"):
        run_convert(tmp_path / "first.npz", tmp_path / "a.pth", "--to", "detectron2", "--set", "CONVENTIONS=tensorpack")
    values["fpn/lateral_1x1_c3/b"][2] = 0.5
    with open(tmp_path / "biased.npz", "wb") as file:
        checkpoint.write_npz(file, values, carried)
    with pytest.raises(UserError, match="no bias before a norm, but fpn/lateral_1x1_c3/b is not 0"):
        run_convert(tmp_path / "biased.npz", tmp_path / "b.pth", "--to", "detectron2")


def test_other_backbones_of_detectron2_are_named(tmp_path):
    arrays = foreign.detector_shapes().arrays()
    other = {name: x for name, x in arrays.items() if "bottom_up" not in name}
    for stem, message in (
        ("stem.conv.weight", "with a RegNet, which has no"),
        ("blocks.0.weight", "with another backbone"),
    ):
        source = write_detectron2(tmp_path / f"{stem}.pkl", other | {f"backbone.bottom_up.{stem}": np.ones(3)})
        with pytest.raises(UserError, match=message):
            run_convert(source, tmp_path / "out.npz")


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "model.module."])
def test_a_prefix_of_all_names_is_stripped(prefix, tmp_path):
    arrays = small_torchvision_detector()
    run_convert(write_pth(tmp_path / "plain.pth", arrays), tmp_path / "plain.npz")
    wrapped = {f"{prefix}{name}": x for name, x in arrays.items()}
    run_convert(write_pth(tmp_path / "wrapped.pth", wrapped), tmp_path / "wrapped.npz")
    assert (tmp_path / "plain.npz").read_bytes() == (tmp_path / "wrapped.npz").read_bytes()


def test_safetensors_are_read(tmp_path, monkeypatch):
    arrays = small_torchvision_detector()
    run_convert(write_pth(tmp_path / "a.pth", arrays), tmp_path / "a.npz")
    save_file(arrays, tmp_path / "b.safetensors", {"format": "pt"})
    run_convert(tmp_path / "b.safetensors", tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    whole = (tmp_path / "b.safetensors").read_bytes()
    for damaged in (whole[:-5], whole[:5000], whole[:9] + b"x" + whole[10:]):
        (tmp_path / "c.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match="c.safetensors is cut off or damaged: "):
            run_convert(tmp_path / "c.safetensors", tmp_path / "c.npz")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match="b.safetensors: it needs one more package: .venv/bin/pip install safetensors"):
        run_convert(tmp_path / "b.safetensors", tmp_path / "d.npz")


def test_group_norm_and_unknown_heads_are_not_written_or_read(tmp_path):
    """What has no place on the other side is named."""
    source = write_detectron(tmp_path / "gn.pkl", foreign.resnet_shapes(foreign.GroupNormDetectronNames()).arrays())
    run_convert(source, tmp_path / "gn.npz", "--set", "PREPROC.PIXEL_STD=[58.395,57.12,57.375]")
    with pytest.raises(UserError, match="lacks .* variables, first conv0/bn/gamma"):
        run_convert(tmp_path / "gn.npz", tmp_path / "gn.pth", "--to", "torchvision")
    arrays = small_torchvision_detector()
    arrays = {name: x for name, x in arrays.items() if not name.startswith("roi_heads.box_predictor")}
    with pytest.raises(UserError, match="lacks 4 arrays, first roi_heads.box_predictor.cls_score.weight"):
        run_convert(write_pth(tmp_path / "source.pth", arrays), tmp_path / "out.npz")


# ------------------------------------------------------------------------------------------------ reading files

REAL = Path(__file__).parents[1] / "data" / "torch"


@pytest.mark.parametrize("name", ["state_dict.pth", "state_dict_legacy.pth"])
def test_files_that_pytorch_wrote(name):
    """A convolution [3, 2, 1, 1] and its batch norm, seeded with 0: written by PyTorch 2.13 in both of its formats."""
    arrays = files.read(REAL / name)
    expected = json.loads((REAL / "state_dict.json").read_text())
    assert list(arrays) == list(expected)
    for key, values in expected.items():
        np.testing.assert_array_equal(arrays[key], np.array(values, arrays[key].dtype), err_msg=key)
    assert arrays["1.num_batches_tracked"].dtype == np.int64


def python2_pickle(name, array):
    """{name: array} as Python 2's NumPy pickled it: texts and numbers are byte strings."""

    def string(data):
        return b"T" + struct.pack("<i", len(data)) + data

    dtype = b"cnumpy\ndtype\n(" + string(b"f4") + b"K\x00K\x01tR(K\x03" + string(b"<") + b"NNNJ" + b"\xff" * 4 + b"J"
    dtype += b"\xff" * 4 + b"K\x00tb"
    shape = b"(" + b"".join(b"K" + bytes([size]) for size in array.shape) + b"t"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + string(b"b") + b"tR"
    return b"\x80\x02}" + string(name) + made + b"(K\x01" + shape + dtype + b"\x89" + string(array.tobytes()) + b"tbs."


def test_pickles_of_arrays(tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    variants = {
        "C": x,
        "F": np.asfortranarray(x),
        "f8": np.float64(x),
        "big-endian": x.astype(">f4"),
        "i8": np.arange(5),
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        if protocol < 2:
            continue
        arrays = files.read(write_pickle(tmp_path / "source.pkl", {"model": variants, "epoch": 3}, protocol=protocol))
        assert list(arrays) == [f"model/{name}" for name in variants]
        for name, expected in variants.items():
            np.testing.assert_array_equal(arrays[f"model/{name}"], expected)
    (tmp_path / "python2.pkl").write_bytes(python2_pickle(b"conv1_w", x))
    np.testing.assert_array_equal(files.read(tmp_path / "python2.pkl")["conv1_w"], x)


def keras_archive(path, arrays):
    """What Keras 3 writes: arrays by number, in groups that say which layer they are of."""
    with h5py.File(path.with_suffix(".weights.h5"), "w") as file:
        for number, name in enumerate(sorted({name.rsplit(".", 1)[0] for name in arrays})):
            group = file.create_group(f"layers/layer_{number}/vars")
            group.attrs["name"] = name
            order = ("gamma", "beta", "moving_mean", "moving_variance") if name.endswith("_bn") else ("kernel", "bias")
            for index, leaf in enumerate(order):
                group[str(index)] = arrays[f"{name}.{leaf}"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_suffix(".weights.h5"), "model.weights.h5")
        archive.writestr("config.json", "{}")
    return path


def test_all_files_of_keras_are_alike(tmp_path):
    names = foreign.KerasNames()
    arrays = foreign.resnet_shapes(names).arrays()
    arrays.update({"predictions.kernel": np.ones((256, 7), np.float32), "predictions.bias": np.ones(7, np.float32)})
    sources = (
        write_h5(tmp_path / "a.h5", arrays),
        keras_archive(tmp_path / "b.keras", arrays),
        tmp_path / "b.weights.h5",
    )
    for i, source in enumerate(sources):
        run_convert(source, tmp_path / f"{i}.npz")
        assert (tmp_path / f"{i}.npz").read_bytes() == (tmp_path / "0.npz").read_bytes()
    assert weights.read(tmp_path / "0.npz")["linear/W"].shape == (256, 7)


# ------------------------------------------------------------------------------------------------ what is refused


class Payload:
    """Makes a folder when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def torch_archive(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(64))
    return path


def legacy_torch_file(path, tree):
    parts = (files.LEGACY_MAGIC, 1001, {"little_endian": True}, tree, [])
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
    return path


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy", "attribute"])
def test_malicious_pickles_run_nothing(kind, tmp_path):
    victim = tmp_path / "victim"
    tree = OrderedDict({"conv1.weight": Payload(victim)})
    if kind == "pickle":
        write_pickle(tmp_path / "evil", tree)
    elif kind == "zip":
        torch_archive(tmp_path / "evil", pickle.dumps(tree, protocol=2))
    elif kind == "legacy":
        legacy_torch_file(tmp_path / "evil", tree)
    else:  # builtins, by way of what is admitted
        torch_archive(tmp_path / "evil", b"\x80\x04ccollections\nOrderedDict.fromkeys.__globals__\n.")
    with pytest.raises(UserError, match="which is not run") as error:
        run_convert(tmp_path / "evil", tmp_path / "out.npz")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 5
    assert not victim.exists()
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(0, (4, 5), (5, 1)), (10, (7,), (1,)), (-1, (4,), (1,)), (0, (4,), (-1,)), (0, (2**40,), (0,)), (0, (4, 4), (1,))],
)
def test_tensors_beyond_their_data_are_refused(offset, shape, stride):
    tensor = files._Tensor(files._Storage("0", np.dtype("<f4"), 16), offset, shape, stride)
    with pytest.raises(files.WeightsFileError, match="tensor"):
        tensor.array(np.arange(16, dtype=np.float32))


def test_tensors_are_views_of_their_data():
    numbers = np.arange(16, dtype=np.float32)
    storage = files._Storage("0", np.dtype("<f4"), 16)
    assert files._Tensor(storage, 2, (2, 3), (1, 4)).array(numbers).tolist() == [[2, 6, 10], [3, 7, 11]]
    assert files._Tensor(storage, 5, (), ()).array(numbers) == 5
    assert files._Tensor(storage, 0, (0, 3), (3, 1)).array(numbers).shape == (0, 3)


def make_source(kind, path):
    arrays = foreign.resnet_shapes(foreign.TorchvisionNames()).arrays()
    if kind == "pth":
        return write_pth(path, arrays)
    if kind == "pkl":
        return write_detectron2(path, foreign.detector_shapes().arrays())
    if kind == "legacy":
        path.write_bytes((REAL / "state_dict_legacy.pth").read_bytes())
        return path
    return write_h5(path, foreign.resnet_shapes(foreign.KerasNames()).arrays())


@pytest.mark.parametrize("kind", ["pth", "pkl", "legacy", "h5"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_truncated_files_are_refused_in_one_line(kind, share, tmp_path):
    source = make_source(kind, tmp_path / "source")
    content = source.read_bytes()
    source.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=str(source)) as error:
        run_convert(source, tmp_path / "out.npz")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 5
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello, world", "it is no .pth, .pkl, .safetensors, .h5 or .keras file"),
        (pickle.dumps([1, 2, 3]), "holds no arrays by name"),
        (pickle.dumps({"model": {"a": np.array([{}])}}), "arrays of objects"),
        (pickle.dumps({"other.weight": np.zeros(3)}), "is no model that is known here; it holds other.weight"),
        (pickle.dumps({"conv1.weight": np.zeros(3), "layer1.0.conv1.weight": np.zeros(3)}), "lacks 13 arrays, first"),
    ],
)
def test_files_of_something_else(content, message, tmp_path):
    (tmp_path / "source").write_bytes(content)
    with pytest.raises(UserError, match=message):
        run_convert(tmp_path / "source", tmp_path / "out.npz")


def test_leftovers_are_an_error_unless_allowed(tmp_path):
    arrays = foreign.resnet_shapes(foreign.TorchvisionNames()).arrays()
    source = write_pth(tmp_path / "source.pth", {**arrays, "extra.weight": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="1 arrays are left over, first extra.weight; --allow-leftover"):
        run_convert(source, tmp_path / "out.npz")
    run_convert(source, tmp_path / "out.npz", "--allow-leftover")
    with pytest.raises(UserError, match="out.npz exists already"):
        run_convert(source, tmp_path / "out.npz", "--allow-leftover")


@pytest.mark.parametrize("options", [[], ["--to", "torchvision"]])
def test_an_existing_output_is_refused_before_anything_is_read(options, tmp_path):
    (tmp_path / "out.npz").write_bytes(b"kept")
    with pytest.raises(UserError, match="out.npz exists already"):
        run_convert(tmp_path / "no_leftovers.pth", tmp_path / "out.npz", *options)
    assert (tmp_path / "out.npz").read_bytes() == b"kept"


@pytest.mark.slow
def test_the_program_reports_and_refuses(tmp_path):
    """As it is used: what maps to what, both hashes, the settings to paste; then a bad file."""
    source = write_pth(tmp_path / "source.pth", foreign.resnet_shapes(foreign.TorchvisionNames()).arrays())
    command = [sys.executable, "-m", "tools.convert", str(source), str(tmp_path / "out.npz")]
    result = subprocess.run(command, cwd=convert.__file__.rsplit("/", 2)[0], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "layer1.0.conv2.weight" in result.stdout
    assert "BACKBONE.RESNET_NUM_BLOCKS='[1,2,1,1]'" in result.stdout
    for path in (source, tmp_path / "out.npz"):
        hashed = subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout.split()[0]
        assert hashed in result.stdout
    source.write_bytes(b"PK broken")
    command[-1] = str(tmp_path / "other.npz")
    result = subprocess.run(command, cwd=convert.__file__.rsplit("/", 2)[0], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (5, "")
    assert len(result.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------------ as they are used

ROOT = Path(__file__).resolve().parents[2]
OF_THE_FILE = ("MODE_FPN", "BACKBONE.", "RPN.ANCHOR_SIZES")
TRAINING = [text for text in test_train.SETTINGS if not text.startswith(OF_THE_FILE)]


def run_program(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_converted_detector_predicts_without_any_setting(tmp_path):
    """Architecture, conventions and COCO's class names come with the file; what contradicts them is refused."""
    run_convert(write_pth(tmp_path / "source.pth", small_torchvision_detector()), tmp_path / "out.npz")
    cv2.imwrite(str(tmp_path / "image.png"), synthetic_image(64, 96, 4, 0)[0])
    command = ["predict.py", "--predict", tmp_path / "image.png", "--load", tmp_path / "out.npz", "--no-show"]
    options = ["--config", "PREPROC.TEST_SHORT_EDGE_SIZE=64", "TEST.RESULT_SCORE_THRESH_VIS=0.01"]
    done = run_program(*command, "--output", tmp_path / "pictures", *options)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "pictures").glob("image*.png"))
    assert "0 mismatched, 0 absent, 0 unused" in done.stdout + done.stderr
    done = run_program(*command, "--output", tmp_path / "others", "--config", "PREPROC.PIXEL_STD=[1,1,1]")
    assert done.returncode == 2
    assert "requires PREPROC.PIXEL_STD='[58.395,57.12,57.375]', but --config sets" in done.stderr
    assert not (tmp_path / "others").exists()


@pytest.mark.slow
def test_training_takes_the_settings_of_a_converted_backbone(tmp_path):
    names = foreign.DetectronNames()
    source = write_detectron(tmp_path / "source.pkl", foreign.resnet_shapes(names).arrays())
    run_convert(source, tmp_path / "out.npz")
    shapes.generate(tmp_path / "data", train=4, val=2, size=64, seed=3)
    settings = [*TRAINING, "MODE_FPN=True", "FPN.NORM=GN", f"DATA.BASEDIR={tmp_path / 'data'}"]
    settings += [f"BACKBONE.WEIGHTS={tmp_path / 'out.npz'}", "TRAIN.LR_SCHEDULE=[1]", "TRAIN.EVAL_PERIOD=0"]
    done = run_program("train.py", "--logdir", tmp_path / "run", "--config", *settings)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["BACKBONE"]["STRIDE_1X1"] is True
    assert saved["BACKBONE"]["RESNET_NUM_BLOCKS"] == list(foreign.NUM_BLOCKS)
    assert saved["PREPROC"]["PIXEL_STD"] == [1, 1, 1]
    others = [*settings, "BACKBONE.STRIDE_1X1=False"]
    done = run_program("train.py", "--logdir", tmp_path / "other", "--config", *others)
    assert done.returncode == 2
    assert "but --config sets BACKBONE.STRIDE_1X1=False" in done.stderr
    others = [*settings[:-3], *settings[-2:], "PREPROC.PIXEL_STD=[2,2,2]"]
    done = run_program("train.py", "--logdir", tmp_path / "other", "--load", tmp_path / "run", "--config", *others)
    assert done.returncode == 2
    assert "but --config sets PREPROC.PIXEL_STD='[2.0,2.0,2.0]'" in done.stderr
