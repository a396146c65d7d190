"""Weights of other systems: what they compute here is what they compute there; what is no weights file is refused.

tests/golden/torchvision holds what torchvision computes from synthetic weights (tests/golden/synthetic.py).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from golden.synthetic import synthetic_image, synthetic_state_dict
from tensorpack.compat import tfv1

import checkpoint
from config import Config
from modeling import backbone, rcnn
from tools import convert
from zoo import files

GOLDEN = Path(__file__).parent / "golden" / "torchvision"


def synthetic_arrays(model, *, depth=None):
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
