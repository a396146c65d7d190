"""What a training refuses before it begins: names that nothing has registered."""

import pytest

from config import Config, ConfigError
from modeling import backbone, rcnn
from training.run import check_names

# Settings, and a name that the message must offer; plugins of other tests may have registered more.
OF_THE_MODEL = [
    ("CONVENTIONS=caffe2", "torchvision"),
    ("BACKBONE.NAME=resnet_50", "resnet"),
    ("FRCNN.BOX_LOSS=l3", "l1"),
    ("FPN.FRCNN_HEAD_FUNC=maskrcnn_up4conv_head", "fastrcnn_4conv1fc_head"),
    ("FPN.MRCNN_HEAD_FUNC=fastrcnn_2fc_head", "maskrcnn_up4conv_head"),
]
OF_THE_TRAINING = [
    ("TRAIN.OPTIMIZER=momentun", "momentum"),
    ("TRAIN.LOGGERS=['tensorboard','no_logger']", "tensorboard"),
    ("PREPROC.TRANSFORMS=['no_transform']", "--plugins imports modules"),
    ("TEST.METRICS=['no_metric']", "--plugins imports modules"),
]


def settings_of(*overrides):
    settings = Config()
    settings.update(["MODE_FPN=True", *overrides])
    settings.check()
    return settings


@pytest.mark.parametrize(
    ("check", "override", "known"),
    [
        *[(rcnn.check, *row) for row in OF_THE_MODEL],
        *[(check_names, *row) for row in (*OF_THE_MODEL, *OF_THE_TRAINING)],
    ],
)
def test_names_that_nothing_has_registered_are_refused(check, override, known):
    key, _, value = override.partition("=")
    name = value.strip("[]").split(",")[-1].strip("'")
    with pytest.raises(ConfigError) as error:
        check(settings_of(override))
    message = str(error.value)
    assert message.startswith(f"no {key} {name!r} (")
    assert known in message.partition("(")[2]
    assert "\n" not in message


def test_names_that_are_registered_pass():
    for name in backbone.BACKBONES:
        check_names(settings_of(f"BACKBONE.NAME={name}"))
    for conventions in rcnn.CONVENTIONS:
        check_names(settings_of(f"CONVENTIONS={conventions}"))
    check_names(Config())


def test_names_are_not_evaluated(tmp_path):
    payload = f"__import__('os').system('touch {tmp_path / 'X'}')"
    for key in ("CONVENTIONS", "BACKBONE.NAME", "FPN.FRCNN_HEAD_FUNC", "TRAIN.OPTIMIZER"):
        with pytest.raises(ConfigError, match=f"no {key} .__import__"):
            check_names(settings_of(f"{key}={payload}"))
    assert not (tmp_path / "X").exists()


def test_c4_needs_a_backbone_with_a_last_stage(monkeypatch):
    monkeypatch.delitem(backbone.BACKBONES, "pyramid_only", raising=False)  # and again at the end
    backbone.register("pyramid_only", lambda image, **options: [])
    check_names(settings_of("BACKBONE.NAME=pyramid_only"))
    with pytest.raises(ConfigError, match="BACKBONE.NAME=pyramid_only has no last stage to run on RoIs: set MODE_FPN"):
        check_names(settings_of("BACKBONE.NAME=pyramid_only", "MODE_FPN=False"))
