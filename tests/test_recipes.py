"""The files in recipes/ and `--config @FILE`: published settings, complete headers, precedence, one-line errors."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from tensorpack.compat import tfv1
from tensorpack.tfutils.tower import TowerContext
from test_train import run

import config as config_module
from common import weights
from config import FLAT_DEFAULTS, Config, ConfigError, as_overrides
from dataset import shapes
from modeling import rcnn
from training.run import make_schedule

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "recipes"
ZOO = "http://models.tensorpack.com/FasterRCNN/COCO-MaskRCNN-"
C4, FPN = {"MODE_FPN": False}, {"MODE_FPN": True}
BOX, MASK = {"MODE_MASK": False}, {"MODE_MASK": True}
CASCADE = {"FPN.CASCADE": True}
R101 = {"BACKBONE.RESNET_NUM_BLOCKS": (3, 4, 23, 3)}
GN = {
    "FPN.NORM": "GN",
    "BACKBONE.NORM": "GN",
    "FPN.FRCNN_HEAD_FUNC": "fastrcnn_4conv1fc_gn_head",
    "FPN.MRCNN_HEAD_FUNC": "maskrcnn_up4conv_gn_head",
}
QUICK = {
    "FRCNN.BATCH_PER_IM": 64,
    "PREPROC.TRAIN_SHORT_EDGE_SIZE": 600,
    "PREPROC.MAX_SIZE": 1024,
    "TRAIN.LR_SCHEDULE": (140000, 180000, 200000),
}
TWO_X = {"TRAIN.LR_SCHEDULE": (240000, 320000, 360000)}
THREE_X = {
    "TEST.RESULT_SCORE_THRESH": 1e-4,
    "PREPROC.TRAIN_SHORT_EDGE_SIZE": (640, 800),
    "TRAIN.LR_SCHEDULE": (420000, 500000, 540000),
}
NINE_X = {
    "PREPROC.TRAIN_SHORT_EDGE_SIZE": (640, 800),
    "TRAIN.LR_SCHEDULE": (1500000, 1580000, 1620000),
    "BACKBONE.FREEZE_AT": 0,
}
R50_WEIGHTS = "ImageNet-R50-AlignPadding.npz"
R101_WEIGHTS = "ImageNet-R101-AlignPadding.npz"
GN_WEIGHTS = "ImageNet-R50-GroupNorm32-AlignPadding.npz"


# Of other frameworks: box AP, mask AP, blocks of the third stage, and the passes over the data.
TODAYS = {
    "r50_fpn_lsj_100ep": ("44.6", "40.3", 6, 100),
    "r50_fpn_lsj_200ep": ("46.3", "41.7", 6, 200),
    "r50_fpn_lsj_400ep": ("47.4", "42.5", 6, 400),
    "r101_fpn_lsj_100ep": ("46.4", "41.6", 23, 100),
    "r101_fpn_lsj_200ep": ("48.0", "43.1", 23, 200),
    "r101_fpn_lsj_400ep": ("48.9", "43.7", 23, 400),
    "convnext_t_fpn_mask_3x": ("46.2", "41.7", 9, 36),
    "convnext_t_fpn_cascade_mask_3x": ("50.4", "43.7", 9, 36),
}
SMALL = (
    *("BACKBONE.WIDTH=8", "BACKBONE.RESNET_NUM_BLOCKS=[1,1,1,1]", "FPN.NUM_CHANNEL=16"),
    *("FPN.FRCNN_CONV_HEAD_DIM=16", "FPN.FRCNN_FC_HEAD_DIM=32", "MRCNN.HEAD_DIM=16"),
    *("RPN.ANCHOR_SIZES=[8,16,32,64,128]", "RPN.TRAIN_PER_LEVEL_NMS_TOPK=50", "RPN.TEST_PER_LEVEL_NMS_TOPK=50"),
    *("RPN.BATCH_PER_IM=32", "FRCNN.BATCH_PER_IM=16", "TRAIN.BATCH_SIZE_PER_GPU=2"),
    *("PREPROC.TRAIN_SHORT_EDGE_SIZE=64", "PREPROC.TEST_SHORT_EDGE_SIZE=64", "PREPROC.MAX_SIZE=96"),
    *("DATA.NUM_WORKERS=0", "DATA.TRAIN=shapes_train", "DATA.VAL=shapes_val"),
    *("TRAIN.WARMUP=5", "TRAIN.EPOCHS=4", "TRAIN.STEPS_PER_EPOCH=20"),
)


class Row(NamedTuple):
    """A row of tensorpack's results table; the settings include the mode even where it is the default."""

    settings: dict
    box_ap: str
    mask_ap: str | None
    time: str
    checkpoint: str | None  # the part of its address after ZOO, without ".npz"
    weights: str | None  # to start from; None: random weights


PUBLISHED = {
    "r50_c4_box_quick": Row({**C4, **BOX, **QUICK}, "34.1", None, "7.5 h on 8", None, R50_WEIGHTS),
    "r50_c4_box_1x": Row({**C4, **BOX}, "35.6", None, "23 h on 8", None, R50_WEIGHTS),
    "r50_fpn_box_1x": Row({**FPN, **BOX}, "37.5", None, "11 h on 8", None, R50_WEIGHTS),
    "r50_c4_mask_1x": Row({**C4, **MASK}, "36.2", "31.8", "23.5 h on 8", "R50C41x", R50_WEIGHTS),
    "r50_fpn_mask_1x": Row({**FPN, **MASK}, "38.2", "34.8", "13.5 h on 8", None, R50_WEIGHTS),
    "r50_fpn_mask_2x": Row({**FPN, **MASK, **TWO_X}, "38.9", "35.4", "25 h on 8", "R50FPN2x", R50_WEIGHTS),
    "r50_fpn_gn_mask_2x": Row({**FPN, **MASK, **GN, **TWO_X}, "40.4", "36.3", "31 h on 8", "R50FPN2xGN", GN_WEIGHTS),
    "r50_fpn_cascade_mask_1x": Row({**FPN, **MASK, **CASCADE}, "41.7", "36.2", "17 h on 8", None, R50_WEIGHTS),
    "r101_c4_mask_1x": Row({**C4, **MASK, **R101}, "40.1", "34.6", "28 h on 8", "R101C41x", R101_WEIGHTS),
    "r101_fpn_mask_1x": Row({**FPN, **MASK, **R101}, "40.7", "36.8", "18 h on 8", "R101FPN1x", R101_WEIGHTS),
    "r101_fpn_cascade_mask_3x": Row(
        {**FPN, **MASK, **CASCADE, **R101, **THREE_X}, "46.6", "40.3", "69 h on 8", "R101FPN3xCasAug", R101_WEIGHTS
    ),
    "r101_fpn_gn_cascade_mask_9x": Row(
        {**FPN, **MASK, **CASCADE, **R101, **GN, **NINE_X},
        "47.7",
        "41.7",
        "28 h on 64",
        "R101FPN9xGNCasAugScratch",
        None,
    ),
}
# The models of tests/golden/recipes.json that a recipe trains; SyncBN has no published row.
GOLDEN = {
    "R50-C4-box": ["r50_c4_box_1x", "r50_c4_box_quick"],
    "R50-C4-mask": ["r50_c4_mask_1x"],
    "R50-FPN-box": ["r50_fpn_box_1x"],
    "R50-FPN-mask": ["r50_fpn_mask_1x", "r50_fpn_mask_2x"],
    "R50-FPN-GN-mask": ["r50_fpn_gn_mask_2x"],
    "R50-FPN-Cascade-mask": ["r50_fpn_cascade_mask_1x"],
    "R101-C4-mask": ["r101_c4_mask_1x"],
    "R101-FPN-mask": ["r101_fpn_mask_1x"],
    "R101-FPN-Cascade-mask": ["r101_fpn_cascade_mask_3x"],
    "R101-FPN-GN-Cascade-mask": ["r101_fpn_gn_cascade_mask_9x"],
}
OF_TRAINING = ("TRAIN.", "PREPROC.TRAIN_SHORT_EDGE_SIZE", "PREPROC.MAX_SIZE", "FRCNN.BATCH_PER_IM")


def updated(*overrides):
    fresh = Config()
    fresh.update(overrides)
    return fresh


def message_of(*overrides):
    """The message of the ConfigError that the overrides must raise; nothing may be set."""
    fresh = Config()
    with pytest.raises(ConfigError) as raised:
        fresh.update(overrides)
    assert fresh.changes() == {}
    return str(raised.value)


def write(path, text):
    """Writes a file of settings; returns it as an override."""
    path.write_text(text, encoding="utf-8")
    return f"@{path}"


def header_of(recipe):
    """{label: text} of the comment lines "# Label: text", and "" for the first line, the title."""
    lines = (FOLDER / f"{recipe}.cfg").read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    assert all(line.startswith("# ") for line in comments) and comments == lines[: len(comments)]
    return {"": comments[0]} | dict(re.findall(r"^# (\w+): +(.*)", "\n".join(comments), re.MULTILINE))


# ------------------------------------------------------------------------------------------------------- the files


def test_every_published_row_has_a_file():
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(f"{name}.cfg" for name in [*PUBLISHED, *TODAYS])


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_has_the_published_settings_and_no_others(recipe, caplog):
    lines = (FOLDER / f"{recipe}.cfg").read_text().splitlines()
    settings = [line for line in lines if line and not line.startswith("#")]
    expected = PUBLISHED[recipe].settings
    assert sorted(line.partition("=")[0] for line in settings) == sorted(expected)
    config = updated(f"@recipes/{recipe}.cfg")
    assert {key: config.value(key) for key in expected} == expected
    assert config.changes().keys() <= expected.keys()
    config.check()
    assert caplog.records == []


@pytest.mark.parametrize("recipe", TODAYS)
def test_a_recipe_of_today_has_its_header_and_its_schedule(recipe, caplog):
    """On 8 GPUs: Detectron2's updates of batch 64 and rate 0.1; ConvNeXt's epochs of batch 16."""
    box_ap, mask_ap, blocks, epochs = TODAYS[recipe]
    header, config = header_of(recipe), updated(f"@recipes/{recipe}.cfg")
    assert header["Published"].startswith(f"box AP {box_ap}, mask AP {mask_ap} on val2017, ")
    assert "https://" in header["Source"] and header["Schedule"].startswith("batch ")
    assert header["Train"].startswith(f"./train.py --config @recipes/{recipe}.cfg DATA.BASEDIR=/path/to/COCO/DIR")
    config.check()
    assert caplog.records == []
    assert list(config.BACKBONE.RESNET_NUM_BLOCKS) == [3, 4 if recipe.startswith("r") else 3, blocks, 3]
    schedule = make_schedule(config, devices=8, num_images=118000)
    assert schedule.passes == pytest.approx(epochs, rel=3e-3) and schedule.accumulate == 1
    updates = epochs * 118000 / schedule.images_per_step
    shares = (8 / 9, 26 / 27) if "lsj" in recipe else (27 / 36, 33 / 36)
    np.testing.assert_allclose(schedule.decay_steps, np.array(shares) * updates, atol=1)
    if "lsj" in recipe:
        assert (schedule.images_per_step, schedule.learning_rate) == (64, pytest.approx(0.1))
        assert [schedule.learning_rate_at(step) for step in (0, 500)] == pytest.approx([0.0067, 0.1])
    else:
        rate = 2e-4 if "cascade" in recipe else 1e-4
        assert (schedule.images_per_step, schedule.learning_rate) == (16, pytest.approx(rate))


EXPECTED = {
    "r50_fpn_lsj_100ep": {"rpn/conv1/W": (3, 3, 256, 256), "fastrcnn/conv3/bn/gamma": (256,), "fpn/gn_c2/gamma": None},
    "r101_fpn_lsj_400ep": {"group2/block22/conv3/W": (1, 1, 256, 1024), "maskrcnn/fcn3/bn/mean/EMA": (256,)},
    "convnext_t_fpn_mask_3x": {
        "group2/block8/depthwise/W": (7, 7, 384, 1),
        "norm_c5/gamma": (768,),
        "rpn/conv1/W": None,
    },
    "convnext_t_fpn_cascade_mask_3x": {
        "cascade_rcnn_stage3/head/conv3/bn/beta": (256,),
        "fpn/lateral_1x1_c5/b": (256,),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", EXPECTED)
def test_the_full_graph_of_a_recipe_of_today_has_its_variables(recipe):
    config = updated(f"@recipes/{recipe}.cfg", "DATA.NUM_CATEGORY=80")
    with tf.Graph().as_default(), TowerContext("", is_training=True):
        inputs = {
            spec.name: tfv1.placeholder(spec.dtype, spec.shape) for spec in rcnn.input_signature(config, training=True)
        }
        rcnn.build_training(config, **inputs)
        found = {name: tuple(x.shape.as_list()) for name, x in weights.model_variables().items()}
    assert {name: found.get(name) for name in EXPECTED[recipe]} == EXPECTED[recipe]


@pytest.fixture(scope="module")
def basedir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    shapes.generate(directory, train=10, val=2, size=64, seed=3)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["r50_fpn_lsj_100ep", "convnext_t_fpn_mask_3x", "convnext_t_fpn_cascade_mask_3x"])
def test_a_recipe_of_today_trains_at_a_reduced_size(recipe, basedir, tmp_path):
    """Twenty steps, its losses finite; the weights are saved, evaluated and read again."""
    small = [*SMALL, *(["PREPROC.TRAIN_CROP_SIZE=64"] if "lsj" in recipe else [])]
    settings = [f"@recipes/{recipe}.cfg", *small, f"DATA.BASEDIR={basedir}", "TRAIN.EMA_DECAY=0.9"]
    result = run("train.py", "--logdir", tmp_path / "run", "--config", *settings)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads((tmp_path / "run" / "stats.json").read_text())
    assert rows[-1]["global_step"] == 20 and np.isfinite(rows[-1]["total_cost"])
    assert (tmp_path / "run" / "shapes_val-20.json").exists()
    reader = tf.train.load_checkpoint(str(tmp_path / "run" / "model-20"))
    values = weights.read(tmp_path / "run" / "model-20")
    name = "fpn/lateral_1x1_c2/W"
    np.testing.assert_array_equal(values[name], reader.get_tensor(f"EMA/{name}"))
    assert (values[name] != reader.get_tensor(name)).any()


@pytest.mark.parametrize("model", GOLDEN)
def test_a_recipe_trains_the_model_of_the_golden_files(model):
    golden = updated(*json.loads((ROOT / "tests" / "golden" / "recipes.json").read_text())[model])
    for recipe in GOLDEN[model]:
        changes = updated(f"@recipes/{recipe}.cfg").changes()
        assert {key: x for key, x in changes.items() if not key.startswith(OF_TRAINING)} == golden.changes()


def test_all_golden_models_but_sync_bn_have_a_recipe():
    golden = json.loads((ROOT / "tests" / "golden" / "recipes.json").read_text())
    assert set(golden) - set(GOLDEN) == {"R50-FPN-SyncBN-mask"}
    assert sorted(sum(GOLDEN.values(), [])) == sorted(PUBLISHED)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_header_has_commands_figures_and_address(recipe):
    row, header = PUBLISHED[recipe], header_of(recipe)
    train = f"./train.py --config @recipes/{recipe}.cfg DATA.BASEDIR=/path/to/COCO/DIR"
    if row.weights:
        train += f" BACKBONE.WEIGHTS=/path/to/{row.weights}"
    assert header["Train"] == train
    figures = f"box AP {row.box_ap}" + (f", mask AP {row.mask_ap}" if row.mask_ap else "")
    assert header["Published"] == f"{figures} on minival2014 (the images of val2017)"
    assert header["Time"] == f"{row.time} NVIDIA V100 GPUs"
    if row.checkpoint:
        assert header["Checkpoint"] == f"{ZOO}{row.checkpoint}.npz"
        loaded = f"COCO-MaskRCNN-{row.checkpoint}.npz --config @recipes/{recipe}.cfg DATA.BASEDIR=/path/to/COCO/DIR"
    else:
        assert header["Checkpoint"].startswith("none published")
        loaded = "train_log/rcnn"
    assert header["Evaluate"] == f"./predict.py --evaluate output.json --load {loaded}"


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_title_names_the_model(recipe):
    settings, title = PUBLISHED[recipe].settings, header_of(recipe)[""]
    model = "Mask R-CNN" if settings["MODE_MASK"] else "Faster R-CNN"
    depth = "R101" if "BACKBONE.RESNET_NUM_BLOCKS" in settings else "R50"
    body = f"{depth}-FPN" if settings["MODE_FPN"] else f"{depth}-C4"
    assert title.startswith("# Cascade " + model if "FPN.CASCADE" in settings else "# " + model)
    assert body in title and ("GroupNorm" in title) == ("FPN.NORM" in settings)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_commands_of_the_header_are_accepted(recipe):
    header, config = header_of(recipe), {}
    for label in ("Train", "Evaluate"):
        _, _, overrides = header[label].partition(" --config ")
        config[label] = updated(*overrides.split())
    assert config["Train"].DATA.BASEDIR == "/path/to/COCO/DIR"
    weights = PUBLISHED[recipe].weights
    assert config["Train"].value("BACKBONE.WEIGHTS") == (f"/path/to/{weights}" if weights else "")
    if PUBLISHED[recipe].checkpoint:
        config["Evaluate"].BACKBONE.WEIGHTS = config["Train"].BACKBONE.WEIGHTS
        assert config["Evaluate"].to_dict() == config["Train"].to_dict()


# ------------------------------------------------------------------------------------------------- order and places


def test_later_words_win_over_a_file_and_a_file_over_earlier_words(tmp_path):
    seed = write(tmp_path / "seed.cfg", "TRAIN.SEED=5\nMODE_FPN=True\n")
    assert updated(seed, "TRAIN.SEED=1").TRAIN.SEED == 1
    assert updated("TRAIN.SEED=1", seed).TRAIN.SEED == 5
    assert updated("TRAIN.SEED=1", seed, "MODE_FPN=False").changes() == {"TRAIN.SEED": 5}


def test_later_files_and_lines_win(tmp_path):
    first = write(tmp_path / "first.cfg", "TRAIN.SEED=1\nTRAIN.SEED=2\nTRAIN.BASE_LR=3\n")
    second = write(tmp_path / "second.cfg", "TRAIN.SEED=4\n")
    assert updated(first, second).changes() == {"TRAIN.SEED": 4, "TRAIN.BASE_LR": 3.0}
    assert updated(second, first).changes() == {"TRAIN.SEED": 2, "TRAIN.BASE_LR": 3.0}


def test_a_path_is_relative_to_the_current_directory_first_then_to_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert updated("@recipes/r50_fpn_mask_1x.cfg").changes() == {"MODE_FPN": True}
    (tmp_path / "recipes").mkdir()
    write(tmp_path / "recipes" / "r50_fpn_mask_1x.cfg", "TRAIN.SEED=7")
    assert updated("@recipes/r50_fpn_mask_1x.cfg").changes() == {"TRAIN.SEED": 7}
    assert updated(f"@{FOLDER / 'r50_fpn_mask_1x.cfg'}").changes() == {"MODE_FPN": True}


def test_settings_of_a_file_count_as_given(tmp_path):
    config = updated(write(tmp_path / "a.cfg", "BACKBONE.STRIDE_1X1=False"))
    with pytest.raises(ConfigError, match="BACKBONE.STRIDE_1X1=False"):
        config.adopt({"BACKBONE.STRIDE_1X1": True}, source="weights.npz")


def test_a_frozen_configuration_reads_no_file():
    config = Config()
    config.freeze()
    with pytest.raises(ConfigError, match="frozen"):
        config.update(["@recipes/r50_fpn_mask_1x.cfg"])
    assert config.changes() == {}


@pytest.mark.slow
def test_a_program_reads_a_file(tmp_path):
    (tmp_path / "bad.cfg").write_text("MODE_FPN=True\nMODE_MSAK=True\n")
    command = [ROOT / "train.py", "--logdir", tmp_path / "run", "--config", "@bad.cfg", "TRAIN.SEED=1"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "bad.cfg:2: unknown key MODE_MSAK: did you mean MODE_MASK" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------ the format


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", {}),
        ("\n  \n\t\n", {}),
        ("# TRAIN.SEED=1\n   # it's \"quoted\n#TRAIN.SEED=2\n#it's", {}),
        ("TRAIN.SEED=1 # TRAIN.SEED=2", {"TRAIN.SEED": 1}),
        ("TRAIN.SEED=1\t#it's", {"TRAIN.SEED": 1}),
        ("BACKBONE.WEIGHTS=/a#b.npz", {"BACKBONE.WEIGHTS": "/a#b.npz"}),
        ("BACKBONE.WEIGHTS='/a #b.npz' # c", {"BACKBONE.WEIGHTS": "/a #b.npz"}),
        ("TRAIN.SEED=1 MODE_FPN=True\tTRAIN.BASE_LR=2", {"TRAIN.SEED": 1, "MODE_FPN": True, "TRAIN.BASE_LR": 2.0}),
        ("  TRAIN.SEED=1\r\nMODE_FPN=True\r\n", {"TRAIN.SEED": 1, "MODE_FPN": True}),
        ("\ufeffTRAIN.SEED=1", {"TRAIN.SEED": 1}),
        ("BACKBONE.RESNET_NUM_BLOCKS=[3,4,23,3]", {"BACKBONE.RESNET_NUM_BLOCKS": (3, 4, 23, 3)}),
        ("BACKBONE.RESNET_NUM_BLOCKS='[3, 4, 23, 3]'", {"BACKBONE.RESNET_NUM_BLOCKS": (3, 4, 23, 3)}),
        ("'BACKBONE.RESNET_NUM_BLOCKS = [3, 4, 23, 3]'", {"BACKBONE.RESNET_NUM_BLOCKS": (3, 4, 23, 3)}),
        ("PREPROC.TRAIN_SHORT_EDGE_SIZE=(640,800)", {"PREPROC.TRAIN_SHORT_EDGE_SIZE": (640, 800)}),
        ("TRAIN.LR_SCHEDULE=3x", {"TRAIN.LR_SCHEDULE": "3x"}),
        ("TRAIN.LR_SCHEDULE='3x'", {"TRAIN.LR_SCHEDULE": "3x"}),
        ("TEST.RESULT_SCORE_THRESH=1e-4", {"TEST.RESULT_SCORE_THRESH": 1e-4}),
        ("TRAIN.NUM_GPUS=8", {"TRAIN.NUM_GPUS": 8}),
        ("BACKBONE.NORM=None", {"BACKBONE.NORM": "None"}),
        ("DATA.TRAIN=a", {"DATA.TRAIN": ("a",)}),
        ("DATA.TRAIN=['a','b c'] # two", {"DATA.TRAIN": ("a", "b c")}),
        ('DATA.TRAIN=("a","b#c")', {"DATA.TRAIN": ("a", "b#c")}),
        ("DATA.TRAIN=\"['a', 'b']\"", {"DATA.TRAIN": ("a", "b")}),
        ("DATA.TRAIN=a.json:'my images'", {"DATA.TRAIN": ("a.json:my images",)}),
        ("BACKBONE.WEIGHTS='/path/with spaces.npz'", {"BACKBONE.WEIGHTS": "/path/with spaces.npz"}),
        ('BACKBONE.WEIGHTS="/it\'s a=b.npz"', {"BACKBONE.WEIGHTS": "/it's a=b.npz"}),
        (r"BACKBONE.WEIGHTS=/path/with\ spaces.npz", {"BACKBONE.WEIGHTS": "/path/with spaces.npz"}),
        ("BACKBONE.WEIGHTS=/ä.npz", {"BACKBONE.WEIGHTS": "/ä.npz"}),
        ("BACKBONE.WEIGHTS=$HOME/`id`/*.npz", {"BACKBONE.WEIGHTS": "$HOME/`id`/*.npz"}),
        ("DATA.BASEDIR=''", {"DATA.BASEDIR": ""}),
    ],
)
def test_lines_are_read(text, expected, tmp_path):
    (tmp_path / "a.cfg").write_bytes(text.encode())
    assert updated(f"@{tmp_path / 'a.cfg'}").changes() == expected


def test_settings_as_text_can_stand_in_a_file(tmp_path):
    """Every key, on one line as `as_overrides` writes them."""
    settings = FLAT_DEFAULTS | {"DATA.CLASS_NAMES": ("BG", "stop sign", "it's", '#"1"'), "TRAIN.SEED": 3}
    config = updated(write(tmp_path / "a.cfg", as_overrides(settings)))
    assert {key: config.value(key) for key in settings} == settings


# ----------------------------------------------------------------------------------------------------------- errors


def test_a_missing_file_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = Path(config_module.__file__).parent
    expected = f"@recipes/none.cfg: there is no such file here or in {folder}"
    assert message_of("TRAIN.SEED=1", "@recipes/none.cfg") == expected
    assert message_of("@").startswith("@: ")


def test_a_directory_is_named(tmp_path):
    assert message_of(f"@{tmp_path}") == f"cannot read the settings in {tmp_path}: Is a directory"


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n", b"\0" * 100, b"TRAIN.SEED=1\0", "TRAIN.SEED=1 # ä".encode("latin-1")]
)
def test_a_binary_file_is_named(content, tmp_path):
    path = tmp_path / "a.cfg"
    path.write_bytes(content)
    assert message_of(f"@{path}") == f"{path} is not a file of settings: it is not text"


@pytest.mark.parametrize(
    "line, problem",
    [
        ("MODE_FNP=True", "unknown key MODE_FNP: did you mean MODE_FPN"),
        ("FPN=True", "FPN is a group and cannot be set"),
        ("TRAIN.SEED=x # seed", "TRAIN.SEED=x: expected integer"),
        ("TRAIN.SEED=1 MODE_FPN", "MODE_FPN: expected KEY=VALUE"),
        ("MODE_FPN = True", "MODE_FPN: expected KEY=VALUE"),
        ("''", ": expected KEY=VALUE"),
        ("BACKBONE.RESNET_NUM_BLOCKS=[3, 4, 23, 3]", "BACKBONE.RESNET_NUM_BLOCKS=[3,: expected list of integer"),
        ("DATA.TRAIN=['a', 'b']", "b]: expected KEY=VALUE"),
        ("TRAIN.SEED=__import__('os').getpid()", "TRAIN.SEED=__import__(os).getpid(): expected integer"),
        ("BACKBONE.WEIGHTS='a.npz", "unbalanced quotation mark"),
        ("BACKBONE.WEIGHTS=\"a.npz # '", "unbalanced quotation mark"),
        ("BACKBONE.WEIGHTS=a.npz\\", "unbalanced quotation mark, or backslash at the end of the line"),
        ("@other.cfg", "@other.cfg: a file of settings cannot include another"),
        ("'@other.cfg'", "@other.cfg: a file of settings cannot include another"),
        ("@other.cfg TRAIN.SEED=1", "@other.cfg: a file of settings cannot include another"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(line, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "other.cfg", "TRAIN.SEED=1\n")
    write(tmp_path / "a.cfg", f"# title\n\nMODE_MASK=False\n{line}\n")
    messages = message_of("TRAIN.SEED=1", "@a.cfg").splitlines()
    assert any(message.startswith(f"a.cfg:4: {problem}") for message in messages)
    assert all(message.startswith("a.cfg:4: ") and len(message) < 200 for message in messages)


def test_every_problem_is_named_once(tmp_path):
    override = write(tmp_path / "a.cfg", "FOO=1\nTRAIN.SEED=1 TRAIN.SEED=x\n")
    lines = message_of("MODE_FPN=1", override, "TRAIN").splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "MODE_FPN=1",
        f"{tmp_path / 'a.cfg'}:1",
        f"{tmp_path / 'a.cfg'}:2",
        "TRAIN",
    ]


def test_a_word_that_only_contains_an_at_sign_is_no_file():
    assert updated("BACKBONE.WEIGHTS=@a.npz").BACKBONE.WEIGHTS == "@a.npz"
    assert message_of("TRAIN.SEED@recipes/r50_fpn_mask_1x.cfg").endswith("expected KEY=VALUE")
