"""The configuration: recipes paste, values are typed, mistakes are named, frozen is frozen, files survive."""

import copy
import json
import logging
import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common import checkpoint
from common.files import FileError
from config import (
    ADAPTABLE,
    FLAT_DEFAULTS,
    GROUPS,
    OF_WEIGHTS,
    Config,
    ConfigError,
    UserError,
    as_overrides,
    config,
    largest_edge,
    lr_schedule_steps,
    padding_multiple,
    round_up,
    uses_augmentation,
)

HERE = Path(__file__).parent
GN = {
    "FPN.NORM=GN": "GN",
    "BACKBONE.NORM=GN": "GN",
    "FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_gn_head": "fastrcnn_4conv1fc_gn_head",
    "FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_gn_head": "maskrcnn_up4conv_gn_head",
}
R101 = {"BACKBONE.RESNET_NUM_BLOCKS=[3,4,23,3]": (3, 4, 23, 3)}
FPN = {"MODE_FPN=True": True}
CASCADE = {"FPN.CASCADE=True": True}
# The configurations of the published results table, with what each setting must become.
RECIPES = {
    "R50-C4 super quick": {
        "MODE_MASK=False": False,
        "FRCNN.BATCH_PER_IM=64": 64,
        "PREPROC.TRAIN_SHORT_EDGE_SIZE=600": 600,
        "PREPROC.MAX_SIZE=1024": 1024,
        "TRAIN.LR_SCHEDULE=[140000,180000,200000]": (140000, 180000, 200000),
    },
    "R50-C4 box": {"MODE_MASK=False": False},
    "R50-FPN box": {"MODE_MASK=False": False, **FPN},
    "R50-C4": {},
    "R50-FPN": FPN,
    "R50-FPN 2x": {**FPN, "TRAIN.LR_SCHEDULE=[240000,320000,360000]": (240000, 320000, 360000)},
    "R50-FPN-GN": {**FPN, **GN, "TRAIN.LR_SCHEDULE=[240000,320000,360000]": (240000, 320000, 360000)},
    "R50-FPN Cascade": {**FPN, **CASCADE},
    "R101-C4": R101,
    "R101-FPN": {**FPN, **R101},
    "R101-FPN 3x Cascade": {
        **FPN,
        **CASCADE,
        **R101,
        "TEST.RESULT_SCORE_THRESH=1e-4": 0.0001,
        "PREPROC.TRAIN_SHORT_EDGE_SIZE=[640,800]": (640, 800),
        "TRAIN.LR_SCHEDULE=[420000,500000,540000]": (420000, 500000, 540000),
    },
    "R101-FPN-GN 9x Cascade": {
        **FPN,
        **CASCADE,
        **R101,
        **GN,
        "PREPROC.TRAIN_SHORT_EDGE_SIZE=[640,800]": (640, 800),
        "TRAIN.LR_SCHEDULE=[1500000,1580000,1620000]": (1500000, 1580000, 1620000),
        "BACKBONE.FREEZE_AT=0": 0,
    },
    "R50-FPN-SyncBN": {**FPN, "BACKBONE.NORM=SyncBN": "SyncBN"},
}


def value_of(tree, key):
    """The value at a dotted key, by attribute."""
    for name in key.split("."):
        tree = getattr(tree, name)
    return tree


def updated(*overrides):
    fresh = Config()
    fresh.update(overrides)
    return fresh


def message_of(function, *arguments):
    """The message of the ConfigError that a call must raise."""
    with pytest.raises(ConfigError) as raised:
        function(*arguments)
    return str(raised.value)


def leaves(tree, prefix=""):
    """{dotted key: value} of a tree of dicts."""
    flat = {}
    for name, value in tree.items():
        flat.update(leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def as_json(value):
    return json.loads(json.dumps(value))


# -------------------------------------------------------------------------------------------- defaults and recipes


def test_defaults_are_the_references():
    reference = leaves(json.loads((HERE / "data" / "reference_config.json").read_text()))
    ours = leaves(Config().to_dict())
    assert {key: as_json(ours[key]) for key in reference} == reference
    assert {key: type(as_json(ours[key])) for key in reference} == {key: type(x) for key, x in reference.items()}
    others = {
        "PLUGINS": (),
        "CONVENTIONS": "tensorpack",
        "BACKBONE.NAME": "resnet",
        "BACKBONE.NORM_EPSILON": 1e-5,
        "BACKBONE.WIDTH": 64,
        "RPN.NUM_CONVS": 1,
        "PREPROC.ANTIALIAS": False,
        "FRCNN.BOX_LOSS_WEIGHT": 1.0,
        "PREPROC.TRAIN_PAD": False,
        "TRAIN.MOMENTUM": 0.9,
        "TRAIN.ADAM_BETAS": (0.9, 0.999),
        "TRAIN.BACKBONE_RATE_DECAY": 1.0,
        "TRAIN.CLIP_NORM": 0.0,
        "TRAIN.EMA_DECAY": 0.0,
        "TRAIN.WARMUP_FACTOR": 0.0,
        "TRAIN.LR_POLICY": "steps",
        "TRAIN.EPOCHS": 0.0,
        "TRAIN.DECAY_AT": (),
        "DATA.CATEGORY_IDS": (),
        "DATA.MAX_DROPPED": 0.01,
        "DATA.REPEAT_THRESHOLD": 0.0,
        "PREPROC.TRAIN_CROP_SIZE": 0,
        "PREPROC.TRAIN_CROP_SCALE": (0.1, 2.0),
        "PREPROC.COLOR_JITTER": (0.0, 0.0, 0.0),
        "PREPROC.TRANSFORMS": (),
        "FRCNN.BOX_LOSS": "l1",
        "TRAIN.BATCH_SIZE_PER_GPU": 1,
        "TRAIN.PRECISION": "float32",
        "TRAIN.OPTIMIZER": "momentum",
        "TRAIN.LOGGERS": ("tensorboard",),
        "TRAIN.SEED": 0,
        "TRAIN.EVAL_PICTURES": 0,
        "TRAIN.STALL_TIMEOUT": 600.0,
        "TEST.BATCH_SIZE_PER_GPU": 1,
        "TEST.METRICS": (),
        "TEST.SOFT_NMS": "None",
        "TEST.SOFT_NMS_SIGMA": 0.5,
        "TEST.TTA_FLIP": False,
        "TEST.TTA_SCALES": (1.0,),
        "TEST.PRECISION": "float32",
    }
    assert {key: ours[key] for key in set(ours) - set(reference)} == others
    assert {key: type(ours[key]) for key in others} == {key: type(value) for key, value in others.items()}


def test_defaults_pass_the_check_in_silence(caplog):
    Config().check()
    assert caplog.records == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_published_recipes_paste(recipe, caplog):
    fresh = updated(*RECIPES[recipe])
    for setting, expected in RECIPES[recipe].items():
        value = value_of(fresh, setting.partition("=")[0])
        assert value == expected and type(value) is type(expected), setting
    fresh.check()
    assert caplog.records == []


def test_global_config_is_a_config():
    assert isinstance(config, Config)


# ----------------------------------------------------------------------------------------------- values and types


@pytest.mark.parametrize(
    "override, expected",
    [
        ("BACKBONE.WEIGHTS=/path/with spaces.npz", "/path/with spaces.npz"),
        ("BACKBONE.WEIGHTS='/path/with spaces.npz'", "/path/with spaces.npz"),
        ('BACKBONE.WEIGHTS="/a=b/c.npz"', "/a=b/c.npz"),
        ("BACKBONE.WEIGHTS=/a=b/c.npz", "/a=b/c.npz"),
        ("BACKBONE.WEIGHTS=", ""),
        ("BACKBONE.WEIGHTS=2017", "2017"),
        ("BACKBONE.WEIGHTS=['a']", "['a']"),
        ("BACKBONE.WEIGHTS=b'a'", "b'a'"),
        ("FPN.NORM=None", "None"),
        ("TRAINER=horovod", "horovod"),
        ("DATA.VAL=coco_val2017", ("coco_val2017",)),
        ("DATA.VAL=2017", ("2017",)),
        ("DATA.TRAIN=('a','b')", ("a", "b")),
        ("DATA.TRAIN=['a']", ("a",)),
        ("DATA.VAL=[]", ()),
        ("TRAIN.LR_SCHEDULE=1x", "1x"),
        ("TRAIN.LR_SCHEDULE='3x'", "3x"),
        ("TRAIN.LR_SCHEDULE=(10,20.0)", (10, 20)),
        ("TRAIN.NUM_GPUS=None", None),
        ("TRAIN.NUM_GPUS=8", 8),
        ("TRAIN.BASE_LR=1", 1.0),
        ("TRAIN.BASE_LR = 2e-2", 0.02),
        ("TRAIN.STEPS_PER_EPOCH=1e3", 1000),
        ("RPN.MIN_SIZE=0.01", 0.01),
        ("RPN.BATCH_PER_IM=1000000", 1000000),
        ("PREPROC.MAX_SIZE=1333.5", 1333.5),
        ("PREPROC.MAX_SIZE=1333.0", 1333),
        ("PREPROC.TRAIN_SHORT_EDGE_SIZE=[640,672,704]", (640, 672, 704)),
        ("PREPROC.PIXEL_MEAN=(0,1,2)", (0.0, 1.0, 2.0)),
        ("RPN.ANCHOR_SIZES=[16,32,64.5]", (16.0, 32.0, 64.5)),
        ("MODE_FPN=True", True),
    ],
)
def test_values_are_read(override, expected):
    value = value_of(updated(override), override.partition("=")[0].strip())
    assert value == expected
    assert type(value) is type(expected)
    if isinstance(value, tuple):
        assert [type(x) for x in value] == [type(x) for x in expected]


@pytest.mark.parametrize(
    "override",
    [
        "MODE_FPN=1",
        "MODE_FPN=true",
        "MODE_FPN='True'",
        "MODE_FPN=",
        "TRAIN.SEED=True",
        "TRAIN.SEED=1.5",
        "TRAIN.SEED=None",
        "TRAIN.NUM_GPUS=False",
        "TRAIN.NUM_GPUS=two",
        "TRAIN.BASE_LR=True",
        "TRAIN.BASE_LR='0.1'",
        "TRAIN.BASE_LR=nan",
        "TRAIN.BASE_LR=1e999",
        "TRAIN.BASE_LR=-1e999",
        "TRAIN.BASE_LR=0.1j",
        "TRAIN.BASE_LR=[0.1]",
        "TRAIN.BASE_LR=1" + "0" * 400,
        "TRAIN.BASE_LR=1" + "0" * 10**6,
        "TRAIN.SEED=0x" + "f" * 10**5,
        "TRAIN.BASE_LR=0.1*2",
        "TRAIN.LR_SCHEDULE=[1.5]",
        "TRAIN.LR_SCHEDULE=['1x']",
        "PREPROC.TRAIN_SHORT_EDGE_SIZE=600.5",
        "PREPROC.TRAIN_SHORT_EDGE_SIZE=[True,800]",
        "PREPROC.TEST_SHORT_EDGE_SIZE=[800,800]",
        "PREPROC.PIXEL_STD=[1,2,1e999]",
        "PREPROC.PIXEL_STD=123",
        "RPN.ANCHOR_RATIOS={1,2}",
        "RPN.ANCHOR_RATIOS={[]: 1}",
        "BACKBONE.RESNET_NUM_BLOCKS=3,4,'6',3",
        "CASCADE.BBOX_REG_WEIGHTS=[10,10,5,5]",
        "DATA.TRAIN=['a',1]",
        "TRAIN.SEED=" + "[" * 10**5,
        "TRAIN.SEED=" + "-" * 10**5 + "1",
        "TRAIN.SEED=1\x00",
        "TRAIN.SEED=1\nTRAIN.SEED=2",
    ],
    ids=lambda override: override[:30].replace("\x00", "NUL"),
)
def test_wrong_types_name_the_key(override):
    fresh = Config()
    key = override.partition("=")[0]
    message = message_of(fresh.update, [override])
    assert message.startswith(f"{key}=") and ": expected " in message
    assert "\n" not in message and len(message) < 200
    assert fresh.changes() == {}


def test_types_hold_for_attributes():
    fresh = Config()
    fresh.TRAIN.BASE_LR = 1
    assert type(fresh.TRAIN.BASE_LR) is float
    sizes = [640, 800]
    fresh.PREPROC.TRAIN_SHORT_EDGE_SIZE = sizes
    sizes.append(1)
    assert fresh.PREPROC.TRAIN_SHORT_EDGE_SIZE == (640, 800)
    with pytest.raises(ConfigError, match="MODE_FPN=1: expected True or False"):
        fresh.MODE_FPN = 1
    with pytest.raises(ConfigError, match=r"TRAIN.BASE_LR=nan: expected finite number"):
        fresh.TRAIN.BASE_LR = float("nan")
    with pytest.raises(ConfigError, match="unknown key TRAIN.LR"):
        fresh.TRAIN.LR = 1.0
    with pytest.raises(ConfigError, match="TRAIN is a group"):
        fresh.TRAIN = {}


def test_injected_code_does_not_run(tmp_path):
    target = tmp_path / "X"
    payload = f"__import__('os').system('touch {target}')"
    for key in leaves(Config().to_dict()):
        fresh = Config()
        try:
            fresh.update([f"{key}={payload}"])
        except ConfigError as error:
            assert key in str(error)
        else:
            assert value_of(fresh, key) in (payload, (payload,))  # a text, and no more than that
    for key in ("TRAINER", "TRAIN.LR_SCHEDULE", "FPN.PROPOSAL_MODE"):
        assert f"{key}=__import__" in message_of(updated(f"{key}={payload}").check)
    assert not target.exists()


def test_fresh_trees_share_nothing():
    first, second = Config(), Config()
    first.update(["TRAIN.BASE_LR=3", "DATA.TRAIN=a"])
    assert second.changes() == {} and Config().TRAIN.BASE_LR == 0.01


# ------------------------------------------------------------------------------------------- what weights need

NEEDED = {"BACKBONE.STRIDE_1X1": True, "PREPROC.PIXEL_STD": [1.0, 1.0, 1.0], "MODE_MASK": False}


def test_adopted_settings_replace_defaults_alone():
    config = Config()
    config.update(["PREPROC.PIXEL_STD=[1,1,1]", "MODE_MASK=True"])  # the same; and one that costs no accuracy
    config.adopt(NEEDED, source="weights.npz")
    assert (config.BACKBONE.STRIDE_1X1, config.PREPROC.PIXEL_STD, config.MODE_MASK) == (True, (1.0, 1.0, 1.0), True)


def test_a_contradiction_names_both_and_what_to_paste():
    config = Config()
    config.update(["PREPROC.PIXEL_STD=[2,2,2]", "BACKBONE.STRIDE_1X1=False"])
    message = message_of(lambda settings: config.adopt(settings, source="weights.npz"), NEEDED)
    assert message == (
        "weights.npz requires BACKBONE.STRIDE_1X1=True PREPROC.PIXEL_STD='[1.0,1.0,1.0]', "
        "but --config sets BACKBONE.STRIDE_1X1=False PREPROC.PIXEL_STD='[2.0,2.0,2.0]'"
    )
    assert config.MODE_MASK is True  # nothing was set


def test_a_saved_configuration_counts_as_given(tmp_path):
    checkpoint.save_config(Config(), tmp_path / "config.json")
    config = Config()
    config.load(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="weights.npz requires .*but --config sets BACKBONE.STRIDE_1X1=False"):
        config.adopt(NEEDED, source="weights.npz")


@pytest.mark.parametrize("settings", [{"NO.KEY": 1}, {"BACKBONE.STRIDE_1X1": "yes"}])
def test_adopted_settings_are_checked(settings):
    with pytest.raises(ConfigError, match="^weights.npz: "):
        Config().adopt(settings, source="weights.npz")


def test_what_is_given_to_another_configuration_does_not_count():
    config, other = Config(), Config()
    other.update(["BACKBONE.STRIDE_1X1=False"])
    config.adopt(NEEDED, source="weights.npz")
    assert (config.BACKBONE.STRIDE_1X1, other.BACKBONE.STRIDE_1X1) == (True, False)


def test_settings_as_text_can_be_pasted():
    """Through a shell: every key."""
    settings = FLAT_DEFAULTS | {"DATA.CLASS_NAMES": ("BG", "stop sign", "it's")}
    config = Config()
    config.update(shlex.split(as_overrides(settings)))
    assert {key: config.value(key) for key in settings} == settings


def test_every_key_that_changes_what_weights_compute_is_theirs():
    assert sorted(OF_WEIGHTS) == [
        "BACKBONE.NORM_EPSILON",
        "BACKBONE.STRIDE_1X1",
        "BACKBONE.TF_PAD_MODE",
        "CASCADE.BBOX_REG_WEIGHTS",
        "CONVENTIONS",
        "FRCNN.BBOX_REG_WEIGHTS",
        "PREPROC.ANTIALIAS",
        "PREPROC.PIXEL_MEAN",
        "PREPROC.PIXEL_STD",
        "RPN.ANCHOR_RATIOS",
        "RPN.ANCHOR_SIZES",
    ]


@pytest.mark.parametrize("key", ["BACKBONE.NORM", "FPN.NORM"])
def test_batch_norm_of_weights_may_be_frozen_or_not(key):
    for needed, given in (("FreezeBN", "SyncBN"), ("SyncBN", "FreezeBN"), ("GN", "GN")):
        settings = updated(f"{key}={given}")
        settings.adopt({key: needed}, source="weights.npz")
        assert settings.value(key) == given
    for needed, given in (("FreezeBN", "GN"), ("GN", "SyncBN"), ("FreezeBN", "None")):
        with pytest.raises(ConfigError) as raised:
            updated(f"{key}={given}").adopt({key: needed}, source="weights.npz")
        assert str(raised.value) == f"weights.npz requires {key}={needed}, but --config sets {key}={given}"


@pytest.mark.parametrize("key", FLAT_DEFAULTS)
def test_keys_that_may_differ_from_what_weights_need(key):
    """Those of data, training and testing, and the sizes of anchors and images; no others."""
    expected = key in ("MODE_MASK", "RPN.ANCHOR_SIZES", "RPN.ANCHOR_RATIOS", "PREPROC.MAX_SIZE")
    expected = expected or key.partition(".")[0] in ("DATA", "TEST", "TRAIN")
    expected = expected or key.startswith(("PREPROC.TRAIN_", "PREPROC.TEST_"))
    assert key.startswith(ADAPTABLE) == expected


# ------------------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("BASE_LR", ["TRAIN.BASE_LR"]),
        ("base_lr", ["TRAIN.BASE_LR"]),
        ("train.base_lr", ["TRAIN.BASE_LR"]),
        ("TRAIN.BASELR", ["TRAIN.BASE_LR"]),
        ("TRIAN.BASE_LR", ["TRAIN.BASE_LR"]),
        ("TEST.BASE_LR", ["TRAIN.BASE_LR"]),
        ("BATCH_PER_IM", ["RPN.BATCH_PER_IM", "FRCNN.BATCH_PER_IM"]),
        ("BACKBONE.MAX_SIZE", ["PREPROC.MAX_SIZE"]),
        ("preproc.num_workers", ["DATA.NUM_WORKERS"]),
        ("BACKBONE.SEED", ["TRAIN.SEED"]),
        ("MODE_FNP", ["MODE_FPN"]),
        ("FPN.FREEZE_AT", ["BACKBONE.FREEZE_AT"]),
        ("PREPROC.MAXSIZE", ["PREPROC.MAX_SIZE"]),
        ("update", []),
        ("_values", []),
    ],
)
def test_unknown_keys_name_the_nearest(key, nearest):
    message = message_of(Config().update, [f"{key}=1"])
    assert "\n" not in message and key in message
    for expected in nearest:
        assert expected in message.partition("did you mean")[2], message


@pytest.mark.parametrize(
    "key, named",
    [
        ("BATCH_PER_IM", ["FRCNN.BATCH_PER_IM", "RPN.BATCH_PER_IM"]),  # equal names; the next one is far less similar
        ("BACKBONE.SEED", ["TRAIN.SEED"]),
        ("NORM", ["BACKBONE.NORM", "FPN.NORM"]),
        ("BBOX_REG_WEIGHTS", ["CASCADE.BBOX_REG_WEIGHTS", "FRCNN.BBOX_REG_WEIGHTS"]),
        ("PRECISION", ["TEST.PRECISION", "TRAIN.PRECISION"]),
        ("TOPK", None),  # no key is similar enough
    ],
)
def test_no_far_keys_are_named(key, named):
    _, _, near = message_of(Config().update, [f"{key}=1"]).partition("did you mean ")
    assert (sorted(near.rstrip("?").split(" or ")) if near else None) == named


def test_long_texts_are_cut_at_80_characters():
    for length, shown in ((80, "Q" * 80), (81, "Q" * 77 + "...")):
        assert message_of(Config().update, ["Q" * length]) == f"{shown}: expected KEY=VALUE"


def test_unlike_everything():
    assert message_of(Config().update, ["QQQQ=1"]) == "unknown key QQQQ: config.py lists all keys"
    assert len(message_of(Config().update, ["Q" * 10**6 + "=1"])) < 200


def test_groups_and_shapeless_overrides():
    for group in GROUPS:
        assert f"{group} is a group" in message_of(Config().update, [f"{group}={{}}"])
    assert "MODE_FPN: expected KEY=VALUE" in message_of(Config().update, ["MODE_FPN"])


def test_update_tells_all_problems_and_changes_nothing():
    fresh = Config()
    message = message_of(fresh.update, ["MODE_FPN=True", "FOO=1", "TRAIN.BASE_LR=x", "TRAIN"])
    assert [line.split(":")[0] for line in message.splitlines()] == ["unknown key FOO", "TRAIN.BASE_LR=x", "TRAIN"]
    assert fresh.changes() == {}


def test_reading_an_unknown_key_is_an_attribute_error():
    with pytest.raises(AttributeError, match="TRAIN.BASE_LR"):
        Config().TRAIN.BASELR  # noqa: B018
    assert not hasattr(Config(), "FOO")


# ------------------------------------------------------------------------------------------------------- freeze


def test_frozen_means_frozen():
    fresh = updated("DATA.TRAIN=['a']")
    group = fresh.TRAIN
    fresh.freeze()
    attempts = [
        lambda: setattr(fresh, "MODE_FPN", True),
        lambda: setattr(fresh.TRAIN, "BASE_LR", 1.0),
        lambda: setattr(group, "BASE_LR", 1.0),
        lambda: setattr(fresh, "TRAIN", {}),
        lambda: setattr(fresh, "NEW", 1),
        lambda: setattr(fresh, "_frozen", False),
        lambda: setattr(fresh, "_values", {}),
        lambda: delattr(fresh, "MODE_FPN"),
        lambda: delattr(fresh.TRAIN, "BASE_LR"),
        lambda: fresh.update(["MODE_FPN=True"]),
        lambda: fresh.load(os.devnull),
    ]
    before = fresh.to_dict()
    for attempt in attempts:
        with pytest.raises(ConfigError):
            attempt()
    assert fresh.to_dict() == before
    before["TRAIN"]["BASE_LR"] = 7.0
    assert fresh.TRAIN.BASE_LR == 0.01


def test_no_value_can_be_changed_in_place():
    for key, value in leaves(Config().to_dict()).items():
        hash(value)  # only immutable values, nested ones included, have a hash
        assert value_of(Config(), key) == value


def test_copies_and_pickles_keep_the_values():
    frozen = updated("TRAIN.BASE_LR=3")
    frozen.freeze()
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert other.to_dict() == frozen.to_dict()
        with pytest.raises(ConfigError):
            other.TRAIN.BASE_LR = 4.0


# -------------------------------------------------------------------------------------------------------- files


def test_save_and_load(tmp_path):
    path = tmp_path / "config.json"
    overrides = ["DATA.TRAIN=('ä','b c')", "TRAIN.NUM_GPUS=3", "TRAIN.BASE_LR=1"]
    first = updated(*RECIPES["R101-FPN-GN 9x Cascade"], *overrides)
    first.freeze()
    checkpoint.save_config(first, path)
    second = Config()
    second.load(path)
    assert second.to_dict() == first.to_dict()
    assert leaves(json.loads(path.read_text())) == as_json(leaves(first.to_dict()))
    assert os.listdir(tmp_path) == ["config.json"]


def test_missing_keys_keep_their_defaults_and_overrides_win(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"MODE_FPN": true, "TRAIN": {"BASE_LR": 1, "SEED": 4}, "FPN": {}}')
    fresh = Config()
    fresh.load(path)
    assert fresh.changes() == {"MODE_FPN": True, "TRAIN.BASE_LR": 1.0, "TRAIN.SEED": 4}
    fresh.update(["TRAIN.SEED=5"])
    assert fresh.TRAIN.SEED == 5


@pytest.mark.parametrize(
    "content, named",
    [
        ("", "damaged"),
        ('{"MODE_FPN": tr', "damaged"),
        ("\x80\x81", "damaged"),
        ("[" * 10**5, "damaged"),
        ('{"TRAIN": {"SEED": 1' + "0" * 10**6 + "}}", "damaged"),
        ("[1, 2]", "not a configuration"),
        ('{"TRAIN": {"BASELR": 1}}', "TRAIN.BASE_LR"),
        ('{"FOO": {}}', "FOO"),
        ('{"FOO": ' + '{"a": ' * 200 + "1" + "}" * 201, "FOO"),
        ('{"TRAIN": 1}', "TRAIN is a group"),
        ('{"MODE_FPN": {"A": 1}}', "MODE_FPN"),
        ('{"MODE_FPN": 1}', "MODE_FPN"),
        ('{"TRAIN": {"BASE_LR": NaN}}', "TRAIN.BASE_LR"),
        ('{"TRAIN": {"BASE_LR": "0.1"}}', "TRAIN.BASE_LR"),
    ],
    ids=range(14),
)
def test_bad_files_name_the_file_and_the_key(tmp_path, content, named):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    fresh = Config()
    message = message_of(fresh.load, path)
    assert str(path) in message and named in message and "\n" not in message
    assert fresh.changes() == {}


def test_every_problem_of_a_file_is_told(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"FOO": 1, "TRAIN": {"SEED": "x"}}')
    lines = message_of(Config().load, path).splitlines()
    assert len(lines) == 2 and all(line.startswith(f"{path}: ") for line in lines)


def test_files_that_cannot_be_read_or_written(tmp_path):
    assert str(tmp_path / "none.json") in message_of(Config().load, tmp_path / "none.json")
    assert str(tmp_path) in message_of(Config().load, tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "config.json", tmp_path / "folder"):
        with pytest.raises(FileError, match=f"cannot write {path}: "):
            checkpoint.save_config(Config(), path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]  # nothing half-written is left
    assert os.listdir(tmp_path / "folder") == []


def test_a_failing_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left"):
        checkpoint.save_config(Config(), path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]


# -------------------------------------------------------------------------------------------------------- check


@pytest.mark.parametrize(
    "override",
    [
        "TRAINER=mirrored",
        "BACKBONE.NORM=BN",
        "BACKBONE.FREEZE_AT=6",
        "BACKBONE.FREEZE_AT=-1",
        "FPN.NORM=BN",
        "FPN.PROPOSAL_MODE=level",
        "TRAIN.PRECISION=float64",
        "TEST.PRECISION=half",
        "DATA.ABSOLUTE_COORD=False",
        "DATA.NUM_WORKERS=-1",
        "DATA.NUM_CATEGORY=0",
        "DATA.MAX_DROPPED=1.1",
        "DATA.REPEAT_THRESHOLD=-0.1",
        "PREPROC.TRAIN_CROP_SIZE=31",
        "PREPROC.TRAIN_CROP_SIZE=-64",
        "PREPROC.TRAIN_CROP_SCALE=[1]",
        "PREPROC.TRAIN_CROP_SCALE=[]",
        "PREPROC.TRAIN_CROP_SCALE=[0,1]",
        "PREPROC.COLOR_JITTER=[0.1,0.1]",
        "PREPROC.COLOR_JITTER=[0.1,0.1,1.5]",
        "TRAIN.NUM_GPUS=0",
        "TRAIN.BATCH_SIZE_PER_GPU=0",
        "TRAIN.BASE_LR=0",
        "TRAIN.BASE_LR=-0.1",
        "TRAIN.WARMUP=-1",
        "TRAIN.SEED=-1",
        "TRAIN.SEED=2147483648",
        "TRAIN.LR_SCHEDULE=0x",
        "TRAIN.LR_SCHEDULE=10x",
        "TRAIN.LR_SCHEDULE=5",
        "TRAIN.LR_SCHEDULE=[]",
        "TRAIN.LR_SCHEDULE=[20,10]",
        "TRAIN.LR_SCHEDULE=[10,10]",
        "TRAIN.LR_SCHEDULE=[0,10]",
        "PREPROC.TRAIN_SHORT_EDGE_SIZE=0",
        "PREPROC.TRAIN_SHORT_EDGE_SIZE=[0,800]",
        "PREPROC.TEST_SHORT_EDGE_SIZE=-800",
        "PREPROC.MAX_SIZE=15",
        "PREPROC.PIXEL_MEAN=[1,2]",
        "PREPROC.PIXEL_MEAN=[1,2,256]",
        "PREPROC.PIXEL_STD=[1,2,0]",
        "RPN.POSITIVE_ANCHOR_THRESH=1.1",
        "RPN.PROPOSAL_NMS_THRESH=-0.1",
        "RPN.MIN_SIZE=-1",
        "RPN.HEAD_DIM=0",
        "RPN.TEST_POST_NMS_TOPK=0",
        "FRCNN.BBOX_REG_WEIGHTS=[1,1,1]",
        "BACKBONE.RESNET_NUM_BLOCKS=[3,4,6]",
        "BACKBONE.RESNET_NUM_BLOCKS=[3,4,6,0]",
        "CASCADE.IOUS=[0.5,0.6]",
        "CASCADE.IOUS=[0.5,0.6,1.7]",
        "CASCADE.BBOX_REG_WEIGHTS=[[1,1,1,1],[1,1,1,1]]",
        "CASCADE.BBOX_REG_WEIGHTS=[[1,1,1,1],[1,1,1,1],[1,1,1,0]]",
        "TEST.RESULT_SCORE_THRESH=5",
        "TEST.RESULTS_PER_IM=0",
    ],
)
def test_values_out_of_range_name_the_key(override):
    message = message_of(updated(override).check)
    assert override.partition("=")[0] in message and "\n" not in message and "must be" in message


@pytest.mark.parametrize(
    "overrides, remedy",
    [
        (["FPN.CASCADE=True"], "MODE_FPN=True"),
        (["MODE_FPN=True", "FPN.ANCHOR_STRIDES=[4,8,16,32]"], None),
        (["MODE_FPN=True", "FPN.ANCHOR_STRIDES=[8,16,32,64,128]"], "FPN.ANCHOR_STRIDES=[4,8,16,32,64]"),
        (["MODE_FPN=True", "FPN.ANCHOR_STRIDES=[4,8,16,32,48]"], "FPN.ANCHOR_STRIDES=[4,8,16,32,64]"),
        (["RPN.ANCHOR_SIZES=[32,64]", "MODE_FPN=True"], "RPN.ANCHOR_SIZES=[16,32,64,128,256]"),
        (["RPN.ANCHOR_STRIDE=32"], "RPN.ANCHOR_STRIDE=16"),
        (["RPN.ANCHOR_SIZES=[]"], "RPN.ANCHOR_SIZES=[64]"),
        (["RPN.ANCHOR_RATIOS=[]"], "RPN.ANCHOR_RATIOS=[1]"),
        (["RPN.NEGATIVE_ANCHOR_THRESH=0.8"], "RPN.POSITIVE_ANCHOR_THRESH=0.8"),
        (["RPN.FG_RATIO=0.0"], "RPN.FG_RATIO=0.1"),
        (["FRCNN.BATCH_PER_IM=3"], "FRCNN.BATCH_PER_IM=4"),
        (["CASCADE.BBOX_REG_WEIGHTS=[[1,1,1,1],[1,1,1,1],[1,1,1]]"], None),
        (["BACKBONE.FREEZE_AFFINE=True", "BACKBONE.NORM=SyncBN"], "BACKBONE.NORM=FreezeBN"),
        (["BACKBONE.NORM=GN", "BACKBONE.WIDTH=34"], "BACKBONE.WIDTH=32"),
        (["BACKBONE.NORM=GN", "BACKBONE.WIDTH=15"], "BACKBONE.WIDTH=16"),
        (["MODE_FPN=True", "FPN.NORM=GN", "FPN.NUM_CHANNEL=100"], "FPN.NUM_CHANNEL=96"),
        (["FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_gn_head", "FPN.FRCNN_CONV_HEAD_DIM=33"], "FPN.FRCNN_CONV_HEAD_DIM=32"),
        (["FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_gn_head", "MRCNN.HEAD_DIM=33"], "MRCNN.HEAD_DIM=34"),
        (["PREPROC.TRAIN_SHORT_EDGE_SIZE=[800,640]"], "PREPROC.TRAIN_SHORT_EDGE_SIZE=[800,640,480]"),
        (["PREPROC.TRAIN_SHORT_EDGE_SIZE=[]"], "PREPROC.TRAIN_SHORT_EDGE_SIZE=[640]"),
        (["PREPROC.TRAIN_CROP_SCALE=[2,1]"], "PREPROC.TRAIN_CROP_SCALE=[1,2]"),
        (["DATA.NUM_CATEGORY=2", "DATA.CATEGORY_IDS=[-1]"], "DATA.CATEGORY_IDS=[-1,0]"),
        (["DATA.NUM_CATEGORY=2", "DATA.CATEGORY_IDS=[3,3]"], "DATA.CATEGORY_IDS=[3,0]"),
        (["DATA.TRAIN=[]"], "DATA.TRAIN=a"),
        (["DATA.TRAIN="], "DATA.TRAIN=a"),
        (["DATA.VAL=['a','']"], "DATA.VAL=[]"),
        (["DATA.CLASS_NAMES=['BG','a']", "DATA.NUM_CATEGORY=2"], "DATA.NUM_CATEGORY=1"),
        (["DATA.CLASS_NAMES=['a','b']", "DATA.NUM_CATEGORY=1"], "DATA.CLASS_NAMES=['BG','a']"),
        (["TEST.TTA_SCALES=[]"], "TEST.TTA_SCALES=[1]"),
        (["TEST.TTA_FLIP=True", "TEST.SOFT_NMS=linear"], "TEST.SOFT_NMS=None"),
        (["TEST.SOFT_NMS=gaussian", "TEST.TTA_SCALES=[0.5]"], "TEST.TTA_SCALES=[1]"),
        (["RPN.BATCH_PER_IM=1"], "RPN.BATCH_PER_IM=2"),
        (["TRAIN.EPOCHS=3"], "TRAIN.DECAY_AT=[0.5,1]"),
        (["TRAIN.EPOCHS=3", "TRAIN.DECAY_AT=[0.9,0.5]"], "TRAIN.DECAY_AT=[0.5]"),
        (["TRAIN.EPOCHS=3", "TRAIN.DECAY_AT=[0.5,0.5]"], "TRAIN.DECAY_AT=[0.5,0.6]"),
        (["MODE_FPN=True", "FPN.NORM=GN", "FPN.NUM_CHANNEL=66"], "FPN.NUM_CHANNEL=62"),
        (["MODE_FPN=True", "FPN.NORM=GN", "FPN.NUM_CHANNEL=95"], "FPN.NUM_CHANNEL=64"),
        (["BACKBONE.NORM=GN", "BACKBONE.WIDTH=36"], "BACKBONE.WIDTH=2"),
    ],
)
def test_contradictions_are_refused_until_remedied(overrides, remedy):
    fresh = updated(*overrides)
    message = message_of(fresh.check)
    assert overrides[-1].partition("=")[0] in message
    if remedy:
        fresh.update([remedy])
        fresh.check()


SHARES = [
    "DATA.MAX_DROPPED",
    "DATA.REPEAT_THRESHOLD",
    "PREPROC.COLOR_JITTER",
    "RPN.POSITIVE_ANCHOR_THRESH",
    "RPN.NEGATIVE_ANCHOR_THRESH",
    "RPN.FG_RATIO",
    "RPN.PROPOSAL_NMS_THRESH",
    "FRCNN.FG_THRESH",
    "FRCNN.FG_RATIO",
    "CASCADE.IOUS",
    "TEST.FRCNN_NMS_THRESH",
    "TEST.RESULT_SCORE_THRESH",
    "TEST.RESULT_SCORE_THRESH_VIS",
]
MAY_BE_ZERO = [
    "DATA.NUM_WORKERS",
    "TRAIN.SEED",
    "TRAIN.WEIGHT_DECAY",
    "TRAIN.WARMUP",
    "TRAIN.EVAL_PERIOD",
    "TRAIN.EVAL_PICTURES",
    "TRAIN.WARMUP_INIT_LR",
    "TRAIN.CLIP_NORM",
    "TRAIN.EPOCHS",
    "RPN.MIN_SIZE",
    "RPN.CROWD_OVERLAP_THRESH",
    "BACKBONE.NORM_EPSILON",
]
OTHER_ENDS = {  # values accepted, values refused
    "DATA.CATEGORY_IDS": ([-5, 0, 2**40], []),
    "DATA.NUM_CATEGORY": ([-1, 1, 2**31 - 1], [-2, 0, 2**31]),
    "PREPROC.TRAIN_CROP_SIZE": ([0, 32, 2**15 - 1], [-1, 1, 31, 2**15]),
    "PREPROC.MAX_SIZE": ([16, 2**31 - 1], [0, 15.9, 2**31]),
    "PREPROC.PIXEL_MEAN": ([0, 255], [-0.1, 255.1]),
    "BACKBONE.FREEZE_AT": ([0, 1, 2, 3, 4, 5], [-1, 6]),
    "TRAIN.STARTING_EPOCH": ([1], [0, 2]),
    **{
        key: ([0, 0.999], [-1e-3, 1])
        for key in ("TRAIN.MOMENTUM", "TRAIN.ADAM_BETAS", "TRAIN.EMA_DECAY", "TRAIN.WARMUP_FACTOR")
    },
    "TRAIN.BACKBONE_RATE_DECAY": ([1e-3, 1], [0, 1.001]),
}


def is_number(value):
    return is_number(value[0]) if isinstance(value, tuple) and value else type(value) in (int, float)


def with_last(value, number):
    """A value whose last number is another one."""
    return (*value[:-1], with_last(value[-1], number)) if isinstance(value, tuple) and value else number


@pytest.mark.parametrize("key", [key for key, x in FLAT_DEFAULTS.items() if is_number(x)] + ["DATA.CATEGORY_IDS"])
def test_the_ends_of_every_range(key):
    if key in OTHER_ENDS:
        accepted, refused = OTHER_ENDS[key]
    elif key in SHARES:
        accepted, refused = [0, 1], [-1e-3, 1 + 1e-3]
    else:
        least, below = (0, -1) if key in MAY_BE_ZERO else (1, 0)
        accepted, refused = [least, 2**31 - 1], [below, 2**31]
    for number, fits in [(x, True) for x in accepted] + [(x, False) for x in refused]:
        fresh = Config()
        default = FLAT_DEFAULTS[key]
        fresh.set_tree(tree_of(key, (number,) if default == () else with_last(default, number)))
        assert any(line.startswith(f"{key}=") for line in problems_of(fresh)) != fits, number


def tree_of(key, value):
    group, _, name = key.rpartition(".")
    return {group: {name: value}} if group else {name: value}


def problems_of(settings):
    """The lines of the check."""
    try:
        settings.check()
    except ConfigError as error:
        return str(error).splitlines()
    return []


def test_lists_have_their_length():
    for key, length in (("PREPROC.PIXEL_STD", 3), ("FRCNN.BBOX_REG_WEIGHTS", 4), ("BACKBONE.RESNET_NUM_BLOCKS", 4)):
        for wrong in (length - 1, length + 1):
            (line,) = problems_of(updated(f"{key}={[1] * wrong}"))
            assert line.startswith(f"{key}=") and line.endswith(f"must be a list of {length}")
        assert problems_of(updated(f"{key}={[1] * length}")) == []


@pytest.mark.parametrize(
    "key, choices",
    [
        ("TRAINER", "replicated horovod"),
        ("BACKBONE.NORM", "FreezeBN SyncBN GN None"),
        ("TRAIN.PRECISION", "float32 bfloat16 float16"),
        ("TEST.PRECISION", "float32 bfloat16 float16"),
        ("TEST.SOFT_NMS", "None linear gaussian"),
        ("FPN.PROPOSAL_MODE", "Level Joint"),
        ("TRAIN.LR_POLICY", "steps linear cosine"),
        ("FPN.NORM", "None GN SyncBN FreezeBN"),
    ],
)
def test_every_choice_is_accepted_and_others_list_them(key, choices):
    for choice in choices.split():
        assert problems_of(updated(f"{key}={choice}")) == []
    (line,) = problems_of(updated(f"{key}=other"))
    assert line == f"{key}=other: must be one of {', '.join(choices.split())}"


def test_all_problems_are_told_at_once():
    lines = message_of(updated("FPN.CASCADE=True", "TRAIN.BASE_LR=0", "TRAINER=x", "RPN.FG_RATIO=2").check).splitlines()
    assert len(lines) == 4
    assert [sum(key in line for line in lines) for key in ("FPN.CASCADE", "TRAIN.BASE_LR", "TRAINER", "FG_RATIO")] == [
        1,
        1,
        1,
        1,
    ]


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["FPN.NORM=GN"], "FPN.NORM has no effect with MODE_FPN=False"),
        (["MODE_FPN=True", "RPN.HEAD_DIM=256"], "RPN.HEAD_DIM has no effect with MODE_FPN=True"),
        (["MODE_FPN=True", "RPN.TEST_POST_NMS_TOPK=9"], "RPN.TEST_POST_NMS_TOPK has no effect with MODE_FPN=True FPN"),
        (["RPN.TEST_PER_LEVEL_NMS_TOPK=9"], "RPN.TEST_PER_LEVEL_NMS_TOPK has no effect with MODE_FPN=False"),
        (
            ["MODE_FPN=True", "FPN.PROPOSAL_MODE=Joint", "RPN.TEST_PER_LEVEL_NMS_TOPK=9"],
            "RPN.TEST_PER_LEVEL_NMS_TOPK has no effect with FPN.PROPOSAL_MODE=Joint",
        ),
        (["CASCADE.IOUS=[0.4,0.5,0.6]"], "CASCADE.IOUS has no effect with FPN.CASCADE=False"),
        (["BACKBONE.NAME=resnet_basic", "BACKBONE.STRIDE_1X1=True"], "BACKBONE.STRIDE_1X1 has no effect with BACKBONE"),
        (["MODE_MASK=False", "MRCNN.HEAD_DIM=64"], "MRCNN.HEAD_DIM has no effect with MODE_MASK=False"),
        (["PREPROC.TRAIN_CROP_SCALE=[1,2]"], "PREPROC.TRAIN_CROP_SCALE has no effect with PREPROC.TRAIN_CROP_SIZE=0"),
        (
            ["PREPROC.TRAIN_CROP_SIZE=64", "PREPROC.TRAIN_SHORT_EDGE_SIZE=[64,96]"],
            "PREPROC.TRAIN_SHORT_EDGE_SIZE has no effect with PREPROC.TRAIN_CROP_SIZE>0",
        ),
        (
            ["MODE_FPN=True", "FPN.CASCADE=True", "FRCNN.BBOX_REG_WEIGHTS=[1,1,1,1]"],
            "FRCNN.BBOX_REG_WEIGHTS has no effect with FPN.CASCADE=True",
        ),
        (["RPN.TRAIN_PER_LEVEL_NMS_TOPK=9"], "RPN.TRAIN_PER_LEVEL_NMS_TOPK has no effect with MODE_FPN=False"),
        (["MODE_FPN=True", "RPN.TRAIN_PRE_NMS_TOPK=9"], "RPN.TRAIN_PRE_NMS_TOPK has no effect with MODE_FPN=True FPN"),
        (["MODE_FPN=True", "RPN.TRAIN_POST_NMS_TOPK=9"], "RPN.TRAIN_POST_NMS_TOPK has no effect with MODE_FPN=True"),
        (["MODE_FPN=True", "RPN.TEST_PRE_NMS_TOPK=9"], "RPN.TEST_PRE_NMS_TOPK has no effect with MODE_FPN=True FPN"),
        (
            ["MODE_FPN=True", "FPN.PROPOSAL_MODE=Joint", "RPN.TRAIN_PER_LEVEL_NMS_TOPK=9"],
            "RPN.TRAIN_PER_LEVEL_NMS_TOPK has no effect with FPN.PROPOSAL_MODE=Joint",
        ),
        (["TEST.SOFT_NMS_SIGMA=0.4"], "TEST.SOFT_NMS_SIGMA has no effect with TEST.SOFT_NMS=None"),
        (["TEST.SOFT_NMS=linear", "TEST.SOFT_NMS_SIGMA=0.4"], "TEST.SOFT_NMS_SIGMA has no effect with TEST.SOFT_NMS=l"),
        (
            ["TEST.SOFT_NMS=gaussian", "TEST.FRCNN_NMS_THRESH=0.4"],
            "TEST.FRCNN_NMS_THRESH has no effect with TEST.SOFT_NMS=gaussian",
        ),
        (
            ["MODE_FPN=True", "MODE_MASK=False", "FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_gn_head"],
            "FPN.MRCNN_HEAD_FUNC has no effect with MODE_MASK=False",
        ),
    ],
)
def test_settings_without_effect_are_warned_of(overrides, expected, caplog):
    with caplog.at_level(logging.WARNING):
        updated(*overrides).check()
    assert [record.getMessage().startswith(expected) for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "overrides",
    [
        ["MODE_FPN=True", "FPN.PROPOSAL_MODE=Joint", "RPN.TEST_POST_NMS_TOPK=9"],
        ["TEST.SOFT_NMS=gaussian", "TEST.SOFT_NMS_SIGMA=0.4"],
        ["TEST.SOFT_NMS=linear", "TEST.FRCNN_NMS_THRESH=0.4"],
        ["PREPROC.TRAIN_CROP_SIZE=64", "PREPROC.TRAIN_CROP_SCALE=[1,2]"],
        ["MODE_FPN=True", "FPN.CASCADE=True", "CASCADE.IOUS=[0.4,0.5,0.6]"],
        ["FRCNN.BBOX_REG_WEIGHTS=[1,1,1,1]", "RPN.HEAD_DIM=512"],
    ],
)
def test_settings_with_an_effect_are_not_warned_of(overrides, caplog):
    updated(*overrides).check()
    assert caplog.records == []


# ------------------------------------------------------------------------------------------------ derived values


def test_images_of_pyramids_are_padded_to_multiples_of_32():
    assert padding_multiple(Config()) == 1 and padding_multiple(updated("MODE_FPN=True")) == 32
    assert [round_up(size, 32) for size in (0, 1, 31, 32, 33, 1333, 1344)] == [0, 32, 32, 32, 64, 1344, 1344]
    assert largest_edge(Config()) == 1333
    for size, expected in ((1333, 1344), (1344, 1344), (1344.5, 1376), (1024, 1024)):
        assert largest_edge(updated("MODE_FPN=True", f"PREPROC.MAX_SIZE={size}")) == expected


def test_which_settings_are_test_time_augmentation():
    assert not uses_augmentation(Config())
    assert not uses_augmentation(updated("TEST.TTA_SCALES=[1,1]"))
    assert uses_augmentation(updated("TEST.TTA_FLIP=True"))
    assert uses_augmentation(updated("TEST.TTA_SCALES=[0.5]"))
    assert uses_augmentation(updated("TEST.TTA_SCALES=[1,0.5]"))


def test_values_by_key():
    assert updated("TRAIN.SEED=3").value("TRAIN.SEED") == 3
    assert message_of(Config().value, "TRAIN.SEDE").startswith("unknown key TRAIN.SEDE: did you mean TRAIN.SEED")
    assert (
        message_of(Config().value, "TRAIN")
        == "TRAIN is a group and cannot be set: set its keys, such as TRAIN.NUM_GPUS"
    )


# --------------------------------------------------------------------------------------- schedules, text, errors


@pytest.mark.parametrize("factor", range(2, 10))
def test_longer_schedules_keep_the_low_rates_of_2x(factor):
    """The whole is as many times 180000 steps; 80000 at a tenth of the rate and 40000 at a hundredth."""
    first, second, end = lr_schedule_steps(f"{factor}x")
    assert (end, end - second, second - first) == (factor * 180000, 40000, 80000)


def test_schedules():
    assert lr_schedule_steps("1x") == [120000, 160000, 180000]
    assert lr_schedule_steps("2x") == [240000, 320000, 360000]
    assert lr_schedule_steps("3x") == [420000, 500000, 540000]
    assert lr_schedule_steps("9x") == [1500000, 1580000, 1620000]
    assert lr_schedule_steps((10, 20)) == [10, 20]
    assert lr_schedule_steps([60]) == [60]
    for wrong in ("0x", "10x", "x", "1x ", "2xx", "2", "", [], [2, 1], [1, 1]):
        with pytest.raises(ConfigError):
            lr_schedule_steps(wrong)


def test_every_line_of_the_dump_pastes_back():
    first = updated(*RECIPES["R101-FPN-GN 9x Cascade"], 'BACKBONE.WEIGHTS=/a b/it\'s = "x".npz', "DATA.VAL=a")
    first.DATA.BASEDIR = " 'a' "
    lines = str(first).splitlines()
    assert "TRAIN.BASE_LR = 0.01" in lines and len(lines) == len(leaves(first.to_dict()))
    assert updated(*lines).to_dict() == first.to_dict()
    assert str(first.MRCNN).splitlines() == ["MRCNN.HEAD_DIM = 256", "MRCNN.ACCURATE_PASTE = True"]


def test_changes_are_what_differs_from_the_defaults():
    assert updated("MODE_FPN=True", "TRAIN.BASE_LR=0.01", "TEST.RESULTS_PER_IM=5").changes() == {
        "MODE_FPN": True,
        "TEST.RESULTS_PER_IM": 5,
    }


def test_errors_are_the_users():
    assert issubclass(ConfigError, UserError) and UserError.exit_code == 2


def test_importing_config_imports_nothing_heavy():
    code = "import sys, config; print([m for m in ('numpy', 'tensorflow', 'cv2', 'tensorpack') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
