"""Finding, reading and matching checkpoints."""

import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorpack.compat import tfv1

import checkpoint
from checkpoint import CheckpointError, CheckpointMismatch
from config import Config, ConfigError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path):
    """A run's directory with two TensorFlow checkpoints, the weights being their steps."""
    with tf.Graph().as_default(), tfv1.Session() as session:
        weight = tfv1.get_variable("conv0/W", [2, 3], initializer=tf.zeros_initializer())
        tfv1.get_variable("conv0/W/Momentum", [2, 3], initializer=tf.zeros_initializer())
        tfv1.get_variable("learning_rate", [], initializer=tf.zeros_initializer())
        session.run(tfv1.global_variables_initializer())
        saver = tfv1.train.Saver()
        for step in (90, 500):
            weight.load(np.full([2, 3], step, np.float32), session)
            saver.save(session, str(tmp_path / "model"), global_step=step)
    return tmp_path


@pytest.mark.parametrize("spelling", ["model-500", "model-500.index", "model-500.data-00000-of-00001", "."])
def test_every_spelling_of_a_tensorflow_checkpoint(run, spelling):
    found = checkpoint.resolve(run / spelling)
    assert found == run / "model-500"
    values = checkpoint.read(found)
    assert list(values) == ["conv0/W"]  # no slots of the optimizer
    np.testing.assert_array_equal(values["conv0/W"], np.full([2, 3], 500))


def test_directory_whose_state_file_is_gone_or_names_what_is_gone(run):
    (run / "checkpoint").write_text('model_checkpoint_path: "model-777"\n')
    assert checkpoint.resolve(run) == run / "model-500"
    (run / "checkpoint").unlink()
    assert checkpoint.resolve(run) == run / "model-500"


def test_directory_whose_newest_checkpoint_is_incomplete(run):
    (run / "model-500.data-00000-of-00001").unlink()
    assert checkpoint.resolve(run) == run / "model-90"
    with pytest.raises(CheckpointError, match="incomplete"):
        checkpoint.resolve(run / "model-500")


def test_wrong_paths_name_what_is_beside(run):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*model-7; found there: model-90, model-500") as error:
        checkpoint.resolve(run / "model-7")
    assert error.value.exit_code == 2
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        checkpoint.resolve(run / "nowhere" / "model-7")
    (run / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in the directory"):
        checkpoint.resolve(run / "empty")


def test_cut_off_data_file(run):
    data_file = run / "model-500.data-00000-of-00001"
    data_file.write_bytes(data_file.read_bytes()[:10])
    with pytest.raises(CheckpointMismatch, match="model-500 can't be read"):
        checkpoint.read(run / "model-500")


def test_npz_with_and_without_the_zoo_s_suffix(tmp_path):
    np.savez(tmp_path / "zoo.npz", **{"conv0/W:0": np.ones(3), "conv0/bn/gamma": np.ones(2), "global_step": np.ones(1)})
    assert sorted(checkpoint.read(checkpoint.resolve(tmp_path / "zoo.npz"))) == ["conv0/W", "conv0/bn/gamma"]


class Payload:
    """Makes a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_npz_is_never_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "shown")))
    assert (tmp_path / "shown").exists()
    np.savez(tmp_path / "evil.npz", **{"conv0/W": np.array([Payload(tmp_path / "victim")], object)})
    with pytest.raises(CheckpointMismatch, match="can't be read"):
        checkpoint.read(tmp_path / "evil.npz")
    assert not (tmp_path / "victim").exists()


def test_npz_that_is_no_archive(tmp_path):
    for content in (b"", b"hello", b"PK\x03\x04 cut off"):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(CheckpointMismatch, match="can't be read"):
            checkpoint.read(checkpoint.resolve(tmp_path / "broken.npz"))


SHAPES = {"conv0/W": [2, 3], "fpn/lateral_1x1_c2/b": [4], "fastrcnn/outputs/class/W": [5, 81], "maskrcnn/conv/b": [80]}


def values(**changes):
    """A file's content: that of SHAPES, with changes (None: left out)."""
    shapes = {**SHAPES, **{name.replace("__", "/"): shape for name, shape in changes.items()}}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if shape is not None}


def test_match_and_report():
    content = values(conv0__W=[3, 2], maskrcnn__conv__b=None, linear__W=[7])
    matched = checkpoint.match(content, SHAPES)
    assert matched == (
        ["fastrcnn/outputs/class/W", "fpn/lateral_1x1_c2/b"],
        ["conv0/W"],
        ["maskrcnn/conv/b"],
        ["linear/W"],
    )
    lines = checkpoint.report("file.npz", content, SHAPES, matched)
    assert lines[0] == "file.npz: 2 loaded, 1 mismatched, 1 absent, 1 unused"
    assert [line.split(None, 1) for line in lines[1:]] == [
        ["conv0/W", "shape [3, 2] in the file, [2, 3] in the model"],  # same size: still never reshaped
        ["maskrcnn/conv/b", "absent in the file"],
        ["linear/W", "unused: not in the model"],
    ]


@pytest.mark.parametrize(
    ("check", "content", "message"),
    [
        (checkpoint.check_complete, values(), None),
        (checkpoint.check_complete, values(conv0__W=None), "1 absent, first conv0/W"),
        (checkpoint.check_complete, values(conv0__W=[3, 2]), "1 other shapes"),
        (checkpoint.check_complete, {"other/W": np.zeros(1)}, "holds no variable of this model"),
        (checkpoint.check_complete, {"conv0/W": np.zeros([2, 3])}, "BACKBONE.WEIGHTS"),
        (checkpoint.check_finetune, values(fastrcnn__outputs__class__W=[5, 3], maskrcnn__conv__b=[2]), None),
        (checkpoint.check_finetune, values(conv0__W=[3, 2]), "another model: 1 variables don't fit, first conv0/W"),
        (checkpoint.check_finetune, values(maskrcnn__conv__b=None), "first maskrcnn/conv/b"),
        (checkpoint.check_finetune, {"conv0/W": np.zeros([2, 3])}, "BACKBONE.WEIGHTS"),
        (checkpoint.check_backbone, {"conv0/W": np.zeros([2, 3]), "linear/W": np.zeros(9)}, None),
        (checkpoint.check_backbone, {"conv0/W": np.zeros([3, 2])}, "first conv0/W"),
        (checkpoint.check_backbone, {"conv0/W": np.zeros([2, 3]), "other/W": np.zeros(1)}, "too many, first other/W"),
    ],
)
def test_what_fits_which_purpose(check, content, message):
    matched = checkpoint.match(content, SHAPES)
    if message is None:
        check("file.npz", matched)
        return
    with pytest.raises(CheckpointMismatch, match=message) as error:
        check("file.npz", matched)
    assert error.value.exit_code == 5


def test_load_gives_the_variables_their_values(tmp_path):
    np.savez(tmp_path / "zoo.npz", **{"conv0/W:0": np.arange(6, dtype=np.float64).reshape(2, 3)})
    with tf.Graph().as_default(), tfv1.Session() as session:
        weight = tfv1.get_variable("conv0/W", [2, 3], initializer=tf.zeros_initializer())
        other = tfv1.get_variable("conv0/W/Momentum", [2, 3], initializer=tf.zeros_initializer())
        session.run(tfv1.global_variables_initializer())
        matched, lines = checkpoint.load(tmp_path / "zoo.npz", session, check=checkpoint.check_complete)
        np.testing.assert_array_equal(session.run(weight), np.arange(6).reshape(2, 3))
        assert not session.run(other).any()
    assert matched.loaded == ["conv0/W"]
    assert len(lines) == 1


# ---------------------------------------------------------------- checkpoints of a run


def write_files(prefix):
    """What stands for TensorFlow writing a checkpoint."""
    for suffix in (".data-00000-of-00001", ".index"):
        Path(prefix + suffix).write_text(suffix)


def test_save_leaves_a_complete_checkpoint_and_its_state(tmp_path):
    assert checkpoint.save(write_files, tmp_path, 12, {"seed": 3}) == tmp_path / "model-12"
    assert json.loads((tmp_path / "model-12.json").read_text()) == {"seed": 3}
    assert checkpoint.resolve(tmp_path) == tmp_path / "model-12"
    assert not (tmp_path / checkpoint.SCRATCH).exists()


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    def write_half(prefix):
        Path(prefix + ".data-00000-of-00001").write_text("half")
        raise OSError("No space left on device")

    checkpoint.save(write_files, tmp_path, 6, {})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(write_half, tmp_path, 12, {})
    assert sorted(tmp_path.iterdir()) == before


KILLED_SAVE = """
import os, sys
sys.path.insert(0, {root!r})
import checkpoint
from pathlib import Path
{write_files}
calls = 0
def count(function):
    def counted(*args):
        global calls
        calls += 1
        if calls == {number}:
            os._exit(9)
        return function(*args)
    return counted
os.replace, os.open, os.fsync, os.close = map(count, (os.replace, os.open, os.fsync, os.close))
checkpoint.save(write_files, {directory!r}, 12, {{}})
"""


def test_killed_at_any_moment_of_a_save_the_newest_complete_checkpoint_is_whole(tmp_path):
    number, is_killed = 0, True
    while is_killed:
        number += 1
        directory = tmp_path / str(number)
        directory.mkdir()
        checkpoint.save(write_files, directory, 6, {})
        function = inspect.getsource(write_files)  # to import this file would import TensorFlow
        script = KILLED_SAVE.format(root=str(ROOT), directory=str(directory), number=number, write_files=function)
        code = subprocess.run([sys.executable, "-c", script], timeout=60).returncode
        is_killed = code == 9
        assert code in (0, 9)
        newest = checkpoint.resolve(directory)
        assert newest.name in ("model-6", "model-12")
        for suffix in (".data-00000-of-00001", ".index"):
            assert Path(f"{newest}{suffix}").read_text() == suffix
        assert Path(f"{newest}.json").read_text() == "{}"
    assert newest.name == "model-12"
    assert number > 10


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 6, 8, 10):
        checkpoint.save(write_files, tmp_path, step, {})
    (tmp_path / "model-1.index").write_text("not ours: no state beside it")
    (tmp_path / "model-1.data-00000-of-00001").write_text("")
    checkpoint.mark_best(tmp_path, step=4, metric="AP", value=0.5)
    checkpoint.prune(tmp_path)
    left = sorted(path.name for path in tmp_path.glob("model-*.index"))
    assert left == ["model-1.index", "model-10.index", "model-4.index", "model-6.index", "model-8.index"]
    assert not (tmp_path / "model-2.json").exists()
    assert checkpoint.read_best(tmp_path)["checkpoint"] == "model-4"


@pytest.fixture
def resumable(run):
    """The run of above with a state beside each checkpoint."""
    for step in (90, 500):
        (run / f"model-{step}.json").write_text(json.dumps({"step": step}))
    return run


def test_resuming_takes_the_newest_checkpoint(resumable):
    snapshot = checkpoint.newest_readable(resumable)
    assert (snapshot.path, snapshot.step, snapshot.state) == (resumable / "model-500", 500, {"step": 500})
    assert sorted(snapshot.values) == ["conv0/W", "conv0/W/Momentum", "learning_rate"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "no index", "no state"])
def test_resuming_falls_back_to_the_checkpoint_before(resumable, damage, caplog):
    data_file = resumable / "model-500.data-00000-of-00001"
    content = data_file.read_bytes()
    if damage == "cut":
        data_file.write_bytes(content[:-1])
    elif damage == "flipped":
        data_file.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])
    else:
        (resumable / f"model-500.{'index' if damage == 'no index' else 'json'}").unlink()
    assert checkpoint.newest_readable(resumable).step == 90
    if damage != "no index":
        assert "model-500 can't be read" in caplog.text


def test_resuming_from_nothing_but_damaged_checkpoints_is_an_error(resumable):
    for path in resumable.glob("*.data-*"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointMismatch, match="no checkpoint in .* can be read"):
        checkpoint.newest_readable(resumable)


def test_restore_gives_all_variables_their_values_and_types(tmp_path):
    values = {"conv0/W": np.ones([2, 3], np.float32), "global_step": np.int64(2**40)}
    snapshot = checkpoint.Snapshot(tmp_path / "model-7", 7, values, {})
    with tf.Graph().as_default(), tfv1.Session() as session:
        weight = tfv1.get_variable("conv0/W", [2, 3], initializer=tf.zeros_initializer())
        step = tfv1.get_variable("global_step", [], tf.int64, initializer=tf.zeros_initializer())
        checkpoint.restore(snapshot, session)
        np.testing.assert_array_equal(session.run(weight), values["conv0/W"])
        assert session.run(step) == 2**40
        tfv1.get_variable("conv0/W/Momentum", [2, 3], initializer=tf.zeros_initializer())
        with pytest.raises(CheckpointMismatch, match="1 variables don't fit, first conv0/W/Momentum"):
            checkpoint.restore(snapshot, session)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", **{"conv0/W:0": np.full([2, 3], np.nan)})
    with tf.Graph().as_default(), tfv1.Session() as session:
        tfv1.get_variable("conv0/W", [2, 3], initializer=tf.zeros_initializer())
        with pytest.raises(CheckpointMismatch, match="not finite: 1 variables, first conv0/W"):
            checkpoint.load(tmp_path / "bad.npz", session, check=checkpoint.check_complete)


# ------------------------------------------------------------------------------------------- settings in the file


def test_settings_travel_in_the_file(tmp_path):
    settings = {"MODE_FPN": True, "PREPROC.PIXEL_STD": [1.0, 1.0, 1.0]}
    with open(tmp_path / "converted.npz", "wb") as file:
        checkpoint.write_npz(file, {"conv0/W": np.ones(3)}, settings)
    assert checkpoint.carried_settings(tmp_path / "converted.npz") == settings
    assert list(checkpoint.read(tmp_path / "converted.npz")) == ["conv0/W"]


def test_other_files_carry_no_settings(run):
    np.savez(run / "zoo.npz", **{"conv0/W": np.ones(3)})
    assert checkpoint.carried_settings(run / "zoo.npz") == {}
    assert checkpoint.carried_settings(run / "model-500") == {}


@pytest.mark.parametrize("content", ["no JSON", "[1, 2]", "3"])
def test_settings_that_are_none(content, tmp_path):
    np.savez(tmp_path / "odd.npz", config=np.array(content))
    with pytest.raises(CheckpointMismatch, match="odd.npz can't be read"):
        checkpoint.carried_settings(tmp_path / "odd.npz")


def test_settings_in_a_file_that_is_no_archive(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK cut off")
    with pytest.raises(CheckpointMismatch, match="broken.npz can't be read"):
        checkpoint.carried_settings(tmp_path / "broken.npz")


def test_the_settings_in_the_file_are_loaded_and_flags_checked(tmp_path, caplog):
    with open(tmp_path / "converted.npz", "wb") as file:
        checkpoint.write_npz(file, {}, {"MODE_FPN": True, "BACKBONE.STRIDE_1X1": True})
    loaded = Config()
    checkpoint.load_config(tmp_path / "converted.npz", loaded, overrides=["MODE_MASK=False"])
    assert (loaded.MODE_FPN, loaded.MODE_MASK, loaded.BACKBONE.STRIDE_1X1) == (True, False, True)
    assert not caplog.records  # the settings are known
    with pytest.raises(ConfigError, match="was trained otherwise than with BACKBONE.STRIDE_1X1=False"):
        checkpoint.load_config(tmp_path / "converted.npz", Config(), overrides=["BACKBONE.STRIDE_1X1=False"])
