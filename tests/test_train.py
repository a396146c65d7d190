"""The programs as they are used, in processes of their own, on a tiny model and generated data."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import psutil
import pytest

import train
from common import checkpoint
from common.errors import DataError
from common.plugins import PluginError
from common.ranks import Ranks
from config import VERSION, Config, ConfigError
from dataset import shapes

ROOT = Path(__file__).parent.parent
SETTINGS = [
    "MODE_FPN=True",
    "BACKBONE.WIDTH=8",
    "BACKBONE.RESNET_NUM_BLOCKS=[1,1,1,1]",
    "BACKBONE.NORM=GN",
    "BACKBONE.FREEZE_AT=0",
    "FPN.NUM_CHANNEL=16",
    "FPN.NORM=GN",
    "FPN.FRCNN_FC_HEAD_DIM=32",
    "MRCNN.HEAD_DIM=16",
    "PREPROC.TRAIN_SHORT_EDGE_SIZE=64",
    "PREPROC.TEST_SHORT_EDGE_SIZE=64",
    "PREPROC.MAX_SIZE=96",
    "RPN.ANCHOR_SIZES=[8,16,32,64,128]",
    "RPN.TRAIN_PER_LEVEL_NMS_TOPK=50",
    "RPN.TEST_PER_LEVEL_NMS_TOPK=50",
    "RPN.BATCH_PER_IM=32",
    "FRCNN.BATCH_PER_IM=16",
    "TRAIN.BATCH_SIZE_PER_GPU=2",
    "DATA.NUM_WORKERS=1",
    "TRAIN.WARMUP=2",
    "TRAIN.LR_SCHEDULE=[3]",
    "TRAIN.STEPS_PER_EPOCH=6",
    "TEST.BATCH_SIZE_PER_GPU=2",
    "TRAIN.EVAL_PICTURES=2",
    "DATA.TRAIN=shapes_train",
    "DATA.VAL=shapes_val",
    "TEST.RESULT_SCORE_THRESH=0.01",
    "TEST.RESULT_SCORE_THRESH_VIS=0.01",
]


WITHOUT_TENSORFLOW = """
import runpy, sys
sys.modules.update({"tensorflow": None, "tensorpack": None})
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(program, *arguments, fault="", fault_rank=0, one_core=False, num_ranks=1, with_tensorflow=True):
    """Run a program, also as several ranks; `fault`: see faulty_train.py.

    On one core TensorFlow computes the same bits every time. Without TensorFlow a program that imports it fails.
    """
    interpreter = [sys.executable] if with_tensorflow else [sys.executable, "-c", WITHOUT_TENSORFLOW]
    command = [*interpreter, str(ROOT / program), *map(str, arguments)]
    if num_ranks > 1:
        pytest.importorskip("horovod", reason="Horovod is not installed: make horovod")
        command = [Path(sys.executable).with_name("horovodrun"), "-np", str(num_ranks), *command]
    environment = {**os.environ, "FAULT": fault, "FAULT_RANK": str(fault_rank)}
    pin = (lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})) if one_core else None
    return subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=pin)


@pytest.fixture(scope="module")
def basedir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    shapes.generate(directory, train=10, val=4, size=64, seed=3)
    return directory


@pytest.fixture(scope="module")
def trained(basedir, tmp_path_factory):
    """(directory, output) of a run of 12 steps."""
    logdir = tmp_path_factory.mktemp("runs") / "first"
    result = run("train.py", "--logdir", logdir, "--config", *SETTINGS, f"DATA.BASEDIR={basedir}", one_core=True)
    assert result.returncode == 0, result.stderr
    return logdir, result.stdout + result.stderr


@pytest.mark.slow
class TestTraining:
    def test_says_where_and_how_it_trains(self, trained):
        output = trained[1]
        assert "Training on the CPU" in output
        # 12 steps of 2 images: LR_SCHEDULE counts in steps of 8
        assert "2 images per step, 4 steps per update (total batch 8); learning rate 0.01 after 2 steps" in output
        assert "12 steps in 2 epochs of 6 steps = 2.4 passes over the data" in output

    def test_shows_losses_and_times(self, trained):
        assert all(f"{part}=" in trained[1] for part in ("cost", "data_s", "rpn", "fastrcnn", "maskrcnn", "wd"))
        assert "Estimated Time Left" in trained[1]

    def test_warns_of_nothing(self, trained):
        assert " WRN " not in trained[1]
        assert "Warning" not in trained[1]

    def test_frozen_random_weights_are_warned_of(self, caplog, monkeypatch):
        monkeypatch.setattr(train, "config", Config())
        for freeze_at, num_warnings in ((2, 1), (0, 0)):
            caplog.clear()
            train.config.BACKBONE.FREEZE_AT = freeze_at
            train.adopt_settings(None)
            assert [record.levelname for record in caplog.records] == ["WARNING"] * num_warnings

    def test_leaves_events_statistics_checkpoint_and_configuration(self, trained):
        logdir = trained[0]
        (events,) = logdir.glob("events.out.tfevents.*")
        assert re.findall(rb"shapes_val/\d+", events.read_bytes()) == [b"shapes_val/1", b"shapes_val/2"]  # pictures
        statistics = json.loads((logdir / "stats.json").read_text())
        assert [row["global_step"] for row in statistics] == [6, 12]
        assert np.isfinite([row["total_cost"] for row in statistics]).all()
        assert "shapes_val-mAP(segm)/IoU=0.5" in statistics[-1]
        parts = sum(statistics[-1][f"epoch/{part}"] for part in ("rpn", "fastrcnn", "maskrcnn", "wd"))
        assert statistics[-1]["epoch/cost"] == pytest.approx(parts, rel=1e-5)
        assert statistics[-1]["epoch/step_s"] > 0
        assert (logdir / "model-12.index").exists()
        saved = json.loads((logdir / "config.json").read_text())
        assert saved["DATA"]["CLASS_NAMES"][0] == "BG"
        assert len(saved["DATA"]["CLASS_NAMES"]) == saved["DATA"]["NUM_CATEGORY"] + 1 == 6

    def test_never_touches_a_directory_that_is_not_empty(self, trained, basedir):
        before = sorted(trained[0].iterdir())
        result = run("train.py", "--logdir", trained[0], "--config", *SETTINGS, f"DATA.BASEDIR={basedir}")
        assert result.returncode == 2
        assert f"{trained[0]} exists already" in result.stderr
        assert sorted(trained[0].iterdir()) == before

    def test_fine_tunes_from_a_run(self, trained, basedir, tmp_path):
        settings = [*SETTINGS, f"DATA.BASEDIR={basedir}", "TRAIN.LR_SCHEDULE=[1]", "TRAIN.EVAL_PERIOD=0"]
        result = run("train.py", "--logdir", tmp_path / "run", "--load", trained[0], "--config", *settings)
        assert result.returncode == 0, result.stderr
        assert re.search(r"model-12: \d{3} loaded, 0 mismatched, 0 absent, 0 unused", result.stdout + result.stderr)

    def test_a_broken_image_ends_it_with_an_error(self, basedir, tmp_path):
        shapes.generate(tmp_path, train=2, val=1, size=64, seed=4)
        image = sorted((tmp_path / "shapes_train").iterdir())[0]
        image.write_bytes(image.read_bytes()[:300])
        result = run("train.py", "--logdir", tmp_path / "run", "--config", *SETTINGS, f"DATA.BASEDIR={tmp_path}")
        assert result.returncode == 4
        assert result.stderr.strip().splitlines()[-1].startswith("train.py: ")
        assert image.name in result.stderr.strip().splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]

    def test_one_broken_image_is_left_out_and_named(self, basedir, tmp_path):
        """And one broken object: the run goes on, and its log says so."""
        shapes.generate(tmp_path, train=4, val=1, size=64, seed=4)
        image = sorted((tmp_path / "shapes_train").iterdir())[0]
        image.write_bytes(image.read_bytes()[:-10])
        annotation_file = tmp_path / "annotations" / "instances_shapes_train.json"
        content = json.loads(annotation_file.read_text())
        content["annotations"][-1]["bbox"] = [0, 0, 0, 0]
        annotation_file.write_text(json.dumps(content))
        settings = [*SETTINGS, f"DATA.BASEDIR={tmp_path}", "DATA.MAX_DROPPED=0.3", "DATA.VAL=[]"]
        result = run("train.py", "--logdir", tmp_path / "run", "--config", *settings)
        assert result.returncode == 0, result.stderr
        log = (tmp_path / "run" / "log.log").read_text()
        assert log.count("unreadable image 1, skipped") == 1
        assert f"{image}: the image is cut off" in log
        assert "1 object of " in log and "width or height 0" in log

    def test_a_diverged_run_ends_with_an_error_and_saves_nothing(self, basedir, tmp_path):
        settings = [*SETTINGS, f"DATA.BASEDIR={basedir}", "TRAIN.BASE_LR=1e9", "TRAIN.WARMUP=0"]
        result = run("train.py", "--logdir", tmp_path / "run", "--config", *settings)
        assert result.returncode == 3
        message = result.stderr.strip().splitlines()[-1]
        assert "the loss or its gradient is not finite at step" in message
        assert all(part in message for part in ("images ", "wd_cost=", "label_loss=", "learning rate 1e+09"))
        assert "there is no checkpoint yet" in message
        assert not list((tmp_path / "run").glob("model-*"))
        (batch,) = (tmp_path / "run").glob("diverged-*-rank0.npz")
        assert str(batch) in message
        with np.load(batch) as saved:
            assert saved["tower0/image"].shape[0] == 2
            assert all(str(image_id) in message for image_id in saved["tower0/image_id"])

    def test_interrupted_and_resumed_it_ends_as_if_nothing_had_been(self, trained, basedir, tmp_path):
        logdir = tmp_path / "run"
        arguments = ["--logdir", logdir, "--config", *SETTINGS, f"DATA.BASEDIR={basedir}"]
        resuming = ["--resume", *arguments]

        def start(fault, *arguments):
            return run("tests/faulty_train.py", *arguments, fault=fault, one_core=True)

        assert start("worker_raises=0", *arguments).returncode == 4  # before its first step: it can be tried again
        stopped = start("sigterm_in_step=4", *arguments)
        assert stopped.returncode == 143
        assert stopped.stderr.splitlines()[-1] == "train.py: stopped by SIGTERM; --resume continues from the checkpoint"
        assert sorted(path.name for path in logdir.glob("model-*.index")) == ["model-4.index"]
        stopped = start("sigint_in_evaluation", *resuming)
        assert stopped.returncode == 130
        assert not (logdir / "shapes_val-12.json").exists()
        finished = start("", *resuming)
        assert finished.returncode == 0, finished.stderr
        for name in ("model-12.data-00000-of-00001", "model-12.index", "shapes_val-12.json", "best.json"):
            assert (logdir / name).read_bytes() == (trained[0] / name).read_bytes(), name
        rows, expected = (json.loads((folder / "stats.json").read_text()) for folder in (logdir, trained[0]))
        assert [row["global_step"] for row in rows] == [row["global_step"] for row in expected]
        assert {key: value for key, value in rows[-1].items() if "mAP" in key} == {
            key: value for key, value in expected[-1].items() if "mAP" in key
        }
        assert len(list(logdir.glob("log.log*"))) == 4  # every start has its own


# The same two images in every step, as one batch, as two towers or as two ranks: only the order of sums differs.
WEIGHT_TOLERANCE, MOMENTUM_TOLERANCE = 1e-5, 1e-4

# What the recipes of today add: batch norm of all devices everywhere, AdamW, clipping, averages, a length in epochs.
TODAYS = [
    *[setting for setting in SETTINGS if "NORM=GN" not in setting and "LR_SCHEDULE" not in setting],
    *("BACKBONE.NORM=SyncBN", "FPN.NORM=SyncBN", "RPN.NUM_CONVS=2", "FPN.FRCNN_CONV_HEAD_DIM=16"),
    *("FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_bn_head", "FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_bn_head"),
    *("TRAIN.OPTIMIZER=adamw", "TRAIN.CLIP_NORM=1.0", "TRAIN.EMA_DECAY=0.9", "TRAIN.BACKBONE_RATE_DECAY=0.8"),
    *("TRAIN.EPOCHS=2", "TRAIN.LR_POLICY=cosine", "TRAIN.WARMUP_FACTOR=0.1", "TRAIN.STEPS_PER_EPOCH=5"),
    *("PREPROC.TRAIN_CROP_SIZE=64", "PREPROC.TRAIN_PAD=True", "FRCNN.BOX_LOSS=giou", "TRAIN.EVAL_PICTURES=0"),
]


@pytest.fixture(scope="module")
def trained_today(basedir, tmp_path_factory):
    """The directory of a run of ten steps: two passes over ten images."""
    logdir = tmp_path_factory.mktemp("runs") / "today"
    result = run("train.py", "--logdir", logdir, "--config", *TODAYS, f"DATA.BASEDIR={basedir}", one_core=True)
    assert result.returncode == 0, result.stderr
    return logdir


@pytest.mark.slow
class TestTrainingOfToday:
    def test_interrupted_and_resumed_it_ends_as_if_nothing_had_been(self, trained_today, basedir, tmp_path):
        arguments = ["--logdir", tmp_path / "run", "--config", *TODAYS, f"DATA.BASEDIR={basedir}"]
        stopped = run("tests/faulty_train.py", *arguments, fault="sigterm_in_step=3", one_core=True)
        assert stopped.returncode == 143, stopped.stderr
        finished = run("train.py", "--resume", *arguments, one_core=True)
        assert finished.returncode == 0, finished.stderr
        for name in ("model-10.data-00000-of-00001", "model-10.index", "shapes_val-10.json"):
            assert (tmp_path / "run" / name).read_bytes() == (trained_today / name).read_bytes(), name

    @pytest.mark.long
    def test_two_ranks_train_as_one_with_twice_the_batch(self, basedir, tmp_path):
        """Five updates. With momentum: AdamW turns the rounding of tiny gradients into full steps."""
        common = [*TODAYS, "TRAIN.OPTIMIZER=momentum", "TRAIN.EPOCHS=4", f"DATA.BASEDIR={basedir}"]
        for name, settings, num_ranks in (
            ("one", ["TRAIN.BATCH_SIZE_PER_GPU=8"], 1),
            ("two", ["TRAIN.BATCH_SIZE_PER_GPU=4", "TRAINER=horovod"], 2),
        ):
            arguments = ["--logdir", tmp_path / name, "--config", *common, *settings]
            result = run("train.py", *arguments, num_ranks=num_ranks, one_core=True)
            assert result.returncode == 0, result.stderr
        expected, found = (read_checkpoint(tmp_path / name / "model-5") for name in ("one", "two"))
        assert found.keys() == expected.keys() and any(name.startswith("EMA/") for name in found)
        for name in expected:
            tolerance = MOMENTUM_TOLERANCE if name.endswith("/Momentum") else WEIGHT_TOLERANCE
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=tolerance, err_msg=name)


@pytest.mark.slow
class TestSeveralDevices:
    @pytest.mark.parametrize("settings", [{"TRAIN.NUM_GPUS": 2}, {"TRAINER": "horovod"}])
    def test_two_with_one_image_each_train_as_one_with_two(self, trained, basedir, tmp_path, settings):
        settings = [*SETTINGS, *(f"{key}={value}" for key, value in settings.items()), "TRAIN.BATCH_SIZE_PER_GPU=1"]
        arguments = ["--logdir", tmp_path, "--config", *settings, f"DATA.BASEDIR={basedir}"]
        result = run("train.py", *arguments, num_ranks=2 if "TRAINER=horovod" in settings else 1, one_core=True)
        assert result.returncode == 0, result.stderr
        assert "The reduced gradients equal the mean of the replicas' gradients." in result.stdout
        assert "Do not know how to sync variable" not in result.stdout
        found, expected = (read_checkpoint(folder / "model-12") for folder in (tmp_path, trained[0]))
        recorded = [json.loads((folder / "model-12.json").read_text()) for folder in (tmp_path, trained[0])]
        assert recorded[0]["model variables"] == recorded[1]["model variables"]  # none of a tower's own
        for name in expected.keys() - {"accumulated_steps"}:  # a counter, of which each tower has its own
            tolerance = MOMENTUM_TOLERANCE if name.endswith("/Momentum") else WEIGHT_TOLERANCE
            np.testing.assert_allclose(found[name], expected[name], atol=tolerance, err_msg=name)
        # every image was evaluated, by whichever rank, and the file has their order
        results, by_one = (json.loads((folder / "shapes_val-12.json").read_text()) for folder in (tmp_path, trained[0]))
        assert [result["image_id"] for result in results] == [result["image_id"] for result in by_one]
        np.testing.assert_allclose([x["score"] for x in results], [x["score"] for x in by_one], atol=1e-3)

    @pytest.mark.long
    def test_float16_with_two(self, basedir, tmp_path):
        """Tiny, and two steps: the CPU's gradients of float16 convolutions take hundreds of times as long."""
        smaller = ["BACKBONE.WIDTH=4", "FPN.NUM_CHANNEL=4", "MRCNN.HEAD_DIM=4", "RPN.TRAIN_PER_LEVEL_NMS_TOPK=8"]
        once = ["TRAIN.LR_SCHEDULE=[1]", "TRAIN.STEPS_PER_EPOCH=1", "TRAIN.EVAL_PERIOD=0", "FRCNN.BATCH_PER_IM=8"]
        precision = ["TRAIN.PRECISION=float16", "TRAIN.NUM_GPUS=2", "TRAIN.BATCH_SIZE_PER_GPU=1"]
        arguments = [*SETTINGS, *smaller, *once, *precision, f"DATA.BASEDIR={basedir}"]
        result = run("train.py", "--logdir", tmp_path, "--config", *arguments)
        assert result.returncode == 0, result.stderr
        assert "The reduced gradients equal the mean of the replicas' gradients." in result.stdout
        weights = read_checkpoint(tmp_path)
        assert weights["loss_scale"] >= 1.0
        assert np.abs(weights["fastrcnn/outputs/box/b/Momentum"]).max() > 0  # a step was made, not left out


def read_checkpoint(path):
    """All variables: name -> array."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(path))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


@pytest.mark.slow
class TestPrediction:
    def test_evaluates_with_the_settings_of_the_run(self, trained, tmp_path):
        result = run("predict.py", "--evaluate", tmp_path / "out.json", "--load", trained[0])
        assert result.returncode == 0, result.stderr
        results = json.loads((tmp_path / "out.json").read_text())
        assert {"image_id", "category_id", "bbox", "score", "segmentation"} == results[0].keys()
        # The same weights, data and settings as the training's own evaluation.
        by_training = json.loads((trained[0] / "shapes_val-12.json").read_text())
        assert len(results) == len(by_training)
        for one, other in zip(results, by_training):
            np.testing.assert_allclose(one["bbox"], other["bbox"], atol=1e-2)
        assert "box AP" in result.stdout + result.stderr
        assert "mask AP" in result.stdout + result.stderr

    def test_flags_win_over_the_settings_of_the_run(self, trained, tmp_path):
        flags = ["--config", "TEST.RESULTS_PER_IM=1"]
        result = run("predict.py", "--evaluate", tmp_path / "out.json", "--load", trained[0] / "model-12", *flags)
        assert result.returncode == 0, result.stderr
        assert len(json.loads((tmp_path / "out.json").read_text())) == 4

    def test_draws_a_picture_of_each_image(self, trained, basedir, tmp_path):
        images = sorted((basedir / "shapes_val").iterdir())[:2]
        arguments = ["--predict", *images, "--load", trained[0], "--output", tmp_path, "--no-show"]
        for _ in range(2):  # the second time beside the first one's pictures
            result = run("predict.py", *arguments)
            assert result.returncode == 0, result.stderr
        pictures = sorted(tmp_path.iterdir())
        assert len(pictures) == 4
        assert all(cv2.imread(str(path)) is not None for path in pictures)

    def test_a_bad_image_is_reported_and_the_rest_goes_on(self, trained, basedir, tmp_path):
        good = sorted((basedir / "shapes_val").iterdir())[0]
        bad = tmp_path / "bad.jpg"
        bad.write_bytes(b"no image")
        result = run(
            "predict.py", "--predict", bad, good, "--load", trained[0], "--output", tmp_path / "o", "--no-show"
        )
        assert result.returncode == 1
        assert str(bad) in result.stderr
        assert len(list((tmp_path / "o").iterdir())) == 1

    def test_a_model_of_another_configuration_is_refused(self, trained, basedir, tmp_path):
        image = sorted((basedir / "shapes_val").iterdir())[0]
        flags = ["--config", "FPN.CASCADE=True"]
        result = run("predict.py", "--predict", image, "--load", trained[0], "--output", tmp_path / "o", *flags)
        assert result.returncode == 5
        assert "does not fit the model" in result.stderr
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["DATA.BASEDIR=/nowhere"], "/nowhere"),
        (["TRAIN.BASELR=1"], "TRAIN.BASE_LR"),
        (["TRAIN.BASE_LR=fast"], "TRAIN.BASE_LR"),
        (["BACKBONE.WEIGHTS=/nowhere/R50.npz"], "/nowhere"),
        (["DATA.VAL=coco_val2071"], "coco_val2017"),
    ],
)
def test_mistakes_are_answered_at_once_and_write_nothing(settings, message, basedir, tmp_path):
    logdir = tmp_path / "run"
    flags = ["--logdir", logdir, "--config", *SETTINGS, f"DATA.BASEDIR={basedir}", *settings]
    result = run("train.py", *flags, with_tensorflow=False)
    assert result.returncode == 2
    assert result.stderr.startswith("train.py: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "tensorflow" not in result.stderr.lower()
    assert not logdir.exists()


# ---------------------------------------------------------------- the start, in this process


@pytest.fixture
def fresh(monkeypatch):
    """The settings of train.py, new; they and the loggers of the packages are restored afterwards."""
    fresh = Config()
    monkeypatch.setattr(train, "config", fresh)
    monkeypatch.delenv("HOROVOD_SIZE", raising=False)
    return fresh


def arguments_of(*words):
    return train.parse_arguments([*map(str, words)])


def test_arguments_have_the_documented_defaults(capsys):
    arguments = arguments_of()
    assert vars(arguments) == {"config": [], "logdir": "train_log/rcnn", "load": None, "resume": False, "plugins": []}
    with pytest.raises(SystemExit) as error:
        arguments_of("--version")
    assert error.value.code == 0
    assert capsys.readouterr().out.strip() == VERSION


@pytest.fixture
def start(fresh, basedir, tmp_path, monkeypatch):
    """A function that calls `main` with more arguments up to the start of TensorFlow; it returns the Run."""
    from training import run

    runs = []
    monkeypatch.setattr(run, "train", runs.append)
    monkeypatch.setattr(train, "Watchdog", lambda: "watchdog")
    monkeypatch.setattr(train, "collect_messages", lambda: "messages")

    def start(*arguments, settings=()):
        flags = ["--logdir", tmp_path / "run", "--config", *SETTINGS, f"DATA.BASEDIR={basedir}", *settings, *arguments]
        train.main(arguments_of(*flags))
        return runs.pop()

    return start


def test_a_new_run_has_the_data_s_classes_and_frozen_settings(start, fresh, tmp_path):
    run = start()
    assert run.settings is fresh
    names = list(run.settings.DATA.CLASS_NAMES)
    assert names == ["BG", *run.val_sets[0].class_names]
    assert run.settings.DATA.NUM_CATEGORY == len(names) - 1 == 5
    assert list(run.settings.DATA.CATEGORY_IDS) == list(run.val_sets[0].category_ids) == [1, 2, 3, 4, 5]
    with pytest.raises(ConfigError, match="frozen"):
        run.settings.MODE_FPN = False
    assert len(run.records) == 10
    assert [dataset.name for dataset in run.val_sets] == ["shapes_val"]
    assert (run.weights, run.logdir, run.is_resumed) == (None, tmp_path / "run", False)
    assert (run.watchdog, run.messages) == ("watchdog", "messages")
    assert (run.ranks.rank, run.ranks.size) == (0, 1)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def finished(tmp_path):
    """A run's folder: an empty checkpoint, and settings with another seed and of another architecture."""
    folder = tmp_path / "run"
    folder.mkdir()
    for suffix in (".index", ".data-00000-of-00001"):
        (folder / f"model-6{suffix}").touch()
    settings = Config()
    settings.update([*SETTINGS, "TRAIN.SEED=5", "FPN.NUM_CHANNEL=8", "TEST.RESULTS_PER_IM=7"])
    checkpoint.save_config(settings, folder / "config.json")
    return folder


def test_a_resumed_run_takes_its_settings_and_no_weights(fresh, finished):
    settings, is_resumed = train.prepare(arguments_of("--resume", "--config", "TRAIN.SEED=6"), finished)
    assert is_resumed
    assert (settings["TRAIN"]["SEED"], settings["FPN"]["NUM_CHANNEL"], settings["TEST"]["RESULTS_PER_IM"]) == (6, 8, 7)


def test_a_resumed_run_loads_nothing_else(start, finished):
    run = start("--resume", "--load", finished)
    assert (run.is_resumed, run.weights) == (True, None)


def test_a_fine_tuned_run_loads_the_newest_checkpoint(start, finished, tmp_path):
    run = start("--logdir", tmp_path / "new", "--load", finished)
    assert (run.is_resumed, run.weights) == (False, (finished / "model-6", False))


def test_the_images_of_all_data_sets_are_checked(start, monkeypatch):
    checked = []
    monkeypatch.setattr(
        train, "check_sizes", lambda records, *, max_dropped: checked.append((len(records), max_dropped))
    )
    start(settings=["DATA.MAX_DROPPED=0.25"])
    assert checked == [(10, 0.25), (4, 0.25)]


def test_resuming_a_folder_without_a_checkpoint_starts_a_new_run(fresh, finished):
    (finished / "model-6.index").unlink()
    settings, is_resumed = train.prepare(arguments_of("--resume", "--config", "BACKBONE.FREEZE_AT=0"), finished)
    assert not is_resumed
    assert settings["TRAIN"]["SEED"] == 0
    with pytest.raises(ConfigError, match="exists already"):
        train.prepare(arguments_of(), finished)


def test_fine_tuning_takes_what_the_weights_need_and_nothing_else(fresh, finished, tmp_path):
    arguments = arguments_of("--load", finished, "--config", "MODE_FPN=True")
    settings, is_resumed = train.prepare(arguments, tmp_path / "new")
    assert not is_resumed
    assert settings["RPN"]["ANCHOR_SIZES"] == (8, 16, 32, 64, 128)
    assert settings["BACKBONE"]["NORM"] == Config().BACKBONE.NORM == "FreezeBN"
    assert settings["FPN"]["NUM_CHANNEL"] == Config().FPN.NUM_CHANNEL == 256
    assert (settings["TRAIN"]["SEED"], settings["TEST"]["RESULTS_PER_IM"]) == (0, 100)
    (finished / "config.json").unlink()
    train.prepare(arguments, tmp_path / "new")


def test_plugins_of_the_run_are_needed_and_recorded(fresh, finished, tmp_path):
    arguments = arguments_of()
    arguments.plugins = ["my_parts"]
    assert train.prepare(arguments, tmp_path / "new")[0]["PLUGINS"] == ("my_parts",)
    settings = Config()
    settings.load(finished / "config.json")
    settings.PLUGINS = ["my_parts"]
    checkpoint.save_config(settings, finished / "config.json")
    for flags in (["--resume"], ["--load", finished]):
        with pytest.raises(PluginError, match="my_parts"):
            train.prepare(arguments_of(*flags), finished if "--resume" in flags else tmp_path / "new")


@pytest.mark.parametrize(
    ("load", "backbone", "found"),
    [(None, "", None), ("a.npz", "", ("a.npz", False)), (None, "a.npz", ("a.npz", True)), ("a.npz", "a.npz", "either")],
)
def test_initial_weights_are_of_a_detector_or_a_backbone(fresh, tmp_path, load, backbone, found):
    (tmp_path / "a.npz").touch()
    fresh.BACKBONE.WEIGHTS = backbone and str(tmp_path / backbone)
    load = load and str(tmp_path / load)
    if found == "either":
        with pytest.raises(ConfigError, match="give either --load or BACKBONE.WEIGHTS"):
            train.find_weights(load)
    else:
        assert train.find_weights(load) == (found and (tmp_path / found[0], found[1]))


@pytest.mark.parametrize(
    ("is_launched", "trainer", "is_installed", "message"),
    [
        (True, "replicated", True, "horovodrun needs TRAINER=horovod"),
        (False, "horovod", False, "TRAINER=horovod needs Horovod: run `make horovod` first"),
        (True, "horovod", True, None),
        (False, "replicated", False, None),
    ],
)
def test_horovod_s_launcher_and_trainer_need_each_other(
    fresh, tmp_path, monkeypatch, is_launched, trainer, is_installed, message
):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: object() if is_installed else None)
    if is_launched:
        monkeypatch.setenv("HOROVOD_SIZE", "2")
    arguments = arguments_of("--config", f"TRAINER={trainer}")
    if message is None:
        train.prepare(arguments, tmp_path / "new")
    else:
        with pytest.raises(ConfigError, match=message):
            train.prepare(arguments, tmp_path / "new")


def test_a_process_alone_has_one_rank(fresh):
    assert type(train.join_ranks()) is Ranks


def test_data_without_objects_are_refused(fresh):
    fresh.DATA.TRAIN = ["empty"]
    asked = []

    def dataset(*counts):
        records = [SimpleNamespace(labels=[1] * count) for count in counts]
        return SimpleNamespace(records=lambda **options: asked.append(options) or records)

    with pytest.raises(ConfigError, match=r"DATA.TRAIN=.*empty.*: no image shows an object to train on"):
        train.training_records([dataset(0, 0), dataset()])
    assert [len(record.labels) for record in train.training_records([dataset(0, 2), dataset(1)])] == [0, 2, 1]
    options = {"training": True, "filter_empty": True, "masks": True, "max_dropped": 0.01}
    assert asked == [options] * 4
    fresh.update(["MODE_MASK=False", "DATA.FILTER_EMPTY_ANNOTATIONS=False", "DATA.MAX_DROPPED=0.2"])
    train.training_records([dataset(1)])
    assert asked[4] == {"training": True, "filter_empty": False, "masks": False, "max_dropped": 0.2}


def test_messages_are_kept_until_the_run_has_a_log():
    names = ("train", "config", "data", "dataset", "common")
    states = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    handler, received = train.collect_messages(), []
    try:
        for name in names:
            logging.getLogger(f"{name}.part" if name != "train" else name).info("from %s", name)
            logging.getLogger(name).debug("too fine")
        logging.getLogger("dataset").error("an error")
        assert len(handler.buffer) == len(names) + 1
        target = logging.Handler()
        target.emit = lambda record: received.append(record.getMessage())
        handler.setTarget(target)
        handler.flush()
    finally:
        for logger, level in states:
            logger.removeHandler(handler)
            logger.setLevel(level)
    assert received == [*(f"from {name}" for name in names), "an error"]


@pytest.mark.parametrize(("error", "code"), [(None, 0), (ConfigError("wrong"), 2), (DataError("gone"), 4)])
def test_the_exit_code_is_the_error_s(monkeypatch, capsys, error, code):
    def main(_):
        if error:
            raise error

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(train, "parse_arguments", lambda: None)
    assert train.run_program() == code
    assert capsys.readouterr().err == (f"train.py: {error}\n" if error else "")


def test_missing_json_is_named(basedir, tmp_path):
    (tmp_path / "shapes_train").mkdir()
    flags = ["--logdir", tmp_path / "run", "--config", *SETTINGS, f"DATA.BASEDIR={tmp_path}"]
    result = run("train.py", *flags, with_tensorflow=False)
    assert result.returncode == 2
    assert "instances_shapes_train.json" in result.stderr
