"""Weights of other systems: what they compute here is what they compute there; what is no weights file is refused.

tests/golden/torchvision holds what torchvision computes from synthetic weights (tests/golden/synthetic.py).
"""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow as tf
from golden.synthetic import synthetic_image, synthetic_state_dict
from tensorpack.compat import tfv1

import boxes
import checkpoint
from config import Config
from modeling import backbone, rcnn
from tools import convert
from zoo import files

GOLDEN = Path(__file__).parent / "golden" / "torchvision"


def synthetic_arrays(model):
    """torchvision's arrays of a golden model."""
    return synthetic_state_dict(json.loads((GOLDEN / f"{model}.json").read_text()))


def write_pth(path, arrays):
    with open(path, "wb") as file:
        files.write_torch(file, arrays)
    return path


def run_convert(*arguments):
    convert.main(convert.parse_arguments([str(argument) for argument in arguments]))


@pytest.fixture
def configure(monkeypatch):
    """Makes the model read a configuration of the test's own: what a checkpoint carries, and overrides."""

    def set_config(path, *overrides):
        fresh = Config()
        fresh.update(overrides)
        fresh.adopt(checkpoint.carried_settings(path), source=path)
        fresh.freeze()
        monkeypatch.setattr(rcnn, "config", fresh)
        return fresh

    return set_config


# ------------------------------------------------------------------------------------------------------ backbones


def features(path, image, settings):
    """c2 to c5 of one image, uint8 [H, W, 3] BGR, by the backbone of a converted file."""
    with tf.Graph().as_default(), tfv1.Session() as session:
        batch = tf.constant(image[None])
        outputs = backbone.BACKBONES[settings.BACKBONE.NAME](
            rcnn._normalise(batch, tf.constant([image.shape[:2]])),
            num_blocks=settings.BACKBONE.RESNET_NUM_BLOCKS,
            width=64,
            freeze_at=0,
            freeze_affine=False,
            **rcnn._backbone_options(training=False),
        )
        checkpoint.load(path, session, check=checkpoint.check_backbone)
        return [x[0] for x in session.run(outputs)]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet50", "resnext50_32x4d"])
def test_torchvision_backbones_give_the_golden_features(model, tmp_path, configure):
    write_pth(tmp_path / "source.pth", synthetic_arrays(model))
    run_convert(tmp_path / "source.pth", tmp_path / "out.npz")
    golden = np.load(GOLDEN / f"{model}.npz", allow_pickle=False)
    outputs = features(tmp_path / "out.npz", synthetic_image(*golden["image"])[0], configure(tmp_path / "out.npz"))
    for name, x in zip(("c2", "c3", "c4", "c5"), outputs):
        assert x.shape == tuple(golden[f"{name}_shape"])
        for found, key in (
            (x[:4, :4, :16], "corner"),
            (x.mean((0, 1)), "channel_mean"),
            (x.std((0, 1)), "channel_std"),
        ):
            expected = golden[f"{name}_{key}"]
            np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max(), err_msg=f"{name} {key}")


# ------------------------------------------------------------------------------------------------------ detectors


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """The golden Mask R-CNN as a .pth file; Faster R-CNN's arrays are the same without those of the masks."""
    arrays = synthetic_arrays("maskrcnn_resnet50_fpn")
    return write_pth(tmp_path_factory.mktemp("detector") / "maskrcnn.pth", arrays)


def detect(path, image):
    """Detections of one image, uint8 [H, W, 3] BGR, which enters the network as it is."""
    with tf.Graph().as_default(), tfv1.Session(config=rcnn.session_config()) as session:
        inference = rcnn.Inference()
        checkpoint.load(path, session, check=checkpoint.check_complete)
        return inference.bind(session)(image[None], np.array([image.shape[:2]], np.int32))


def matches(found, golden, prefix):
    """Index of the found detection for each golden one, or -1: same label, IoU above 0.99, score within 5e-3."""
    iou = boxes.pairwise_iou(golden[f"{prefix}/boxes"], found.boxes)
    close = np.abs(golden[f"{prefix}/scores"][:, None] - found.scores) < 5e-3
    same = (golden[f"{prefix}/labels"][:, None] == found.labels) & close & (iou > 0.99)
    return np.where(same.any(axis=1), same.argmax(axis=1), -1)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def test_torchvision_detectors_give_the_golden_detections(model, detector, tmp_path, configure):
    """With all 91 class slots, of which the synthetic weights use also those that no class has."""
    golden = np.load(GOLDEN / f"{model}.npz", allow_pickle=False)
    source = detector
    if model.startswith("faster"):
        source = write_pth(tmp_path / "source.pth", synthetic_arrays(model))
    run_convert(source, tmp_path / "out.npz", "--all-slots")
    settings = configure(tmp_path / "out.npz")
    assert (model == "maskrcnn_resnet50_fpn") == settings.MODE_MASK
    for k in ("image0", "image1"):
        image = synthetic_image(*golden[k])[0]
        found = detect(tmp_path / "out.npz", image)
        index = matches(found, golden, k)
        assert np.mean(index >= 0) >= 0.98
        if settings.MODE_MASK:
            check_mask_areas(found, index, golden[f"{k}/mask_areas"], image.shape[:2])


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
