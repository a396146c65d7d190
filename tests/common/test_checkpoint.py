"""Finding and saving checkpoints, and the settings that they carry."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import DYING

from common import checkpoint, weights
from common.plugins import PluginError
from config import Config, ConfigError, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("spelling", ["model-500", "model-500.index", "model-500.data-00000-of-00001", "."])
def test_every_spelling_of_a_tensorflow_checkpoint(run, spelling):
    found = checkpoint.resolve(run / spelling)
    assert found == run / "model-500"
    values = weights.read(found)
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
    with pytest.raises(checkpoint.CheckpointError, match="incomplete"):
        checkpoint.resolve(run / "model-500")
    (run / "model-90.index").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="model-90 is incomplete"):
        checkpoint.resolve(run / "model-90.data-00000-of-00001")


@pytest.mark.parametrize(
    ("state", "newest"),
    [
        ('model_checkpoint_path: "model-90"\n', 90),  # the run says so, whatever the steps
        ('model_checkpoint_path: "/where/the/run/was/model-90"\n', 90),
        ('all_model_checkpoint_paths: "model-500"\nmodel_checkpoint_path: "model-90"\n', 90),
        ('# model_checkpoint_path: "model-90"\n', 500),
        ("\xff", 500),
        ("", 500),
    ],
)
def test_the_newest_checkpoint_is_the_one_that_the_state_file_names(run, state, newest):
    (run / "checkpoint").write_bytes(state.encode("latin1"))
    assert checkpoint.resolve(run) == run / f"model-{newest}"


def test_steps_are_numbers_and_other_names_come_first(run):
    for name in ("model-1000", "other", "b", "model-7-"):
        for suffix in (".index", ".data-00000-of-00001"):
            (run / f"{name}{suffix}").touch()
    (run / "model-2000.index").touch()
    names = [path.name for path in checkpoint.complete_in(run)]
    assert names == ["b", "model-7-", "other", "model-90", "model-500", "model-1000"]
    assert [checkpoint.step_of(run / name) for name in names] == [-1, -1, -1, 90, 500, 1000]


def test_which_directories_have_a_checkpoint(run, tmp_path):
    assert checkpoint.has_checkpoint(str(run))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model-3.index").touch()
    assert not checkpoint.has_checkpoint(tmp_path / "empty")
    assert not checkpoint.has_checkpoint(tmp_path / "nowhere")


def test_wrong_paths_name_what_is_beside(run):
    with pytest.raises(
        checkpoint.CheckpointError, match=r"no checkpoint at .*model-7; found there: model-90, model-500"
    ) as error:
        checkpoint.resolve(run / "model-7")
    assert error.value.exit_code == 2
    with pytest.raises(checkpoint.CheckpointError, match="nowhere does not exist"):
        checkpoint.resolve(run / "nowhere" / "model-7")
    (run / "empty").mkdir()
    message = "no checkpoint in the directory .*empty; found there: no .npz and no TensorFlow checkpoint$"
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.resolve(run / "empty")
    for letter in "bacdefgh":
        (run / f"{letter}.npz").touch()
    with pytest.raises(checkpoint.CheckpointError, match="there: model-90, model-500, a.npz, .*, e.npz, f.npz$"):
        checkpoint.resolve(run / "x.npz")  # the first eight


# ---------------------------------------------------------------- checkpoints of a run


def write_files(prefix):
    """What stands for TensorFlow writing a checkpoint."""
    for suffix in (".data-00000-of-00001", ".index"):
        Path(prefix + suffix).write_text(suffix)


def test_save_leaves_a_complete_checkpoint_and_its_state(tmp_path):
    (tmp_path / checkpoint.SCRATCH).mkdir()  # left by a killed run
    (tmp_path / checkpoint.SCRATCH / "model-11.index").touch()
    assert checkpoint.save(write_files, tmp_path, 12, {"seed": 3}) == tmp_path / "model-12"
    assert json.loads((tmp_path / "model-12.json").read_text()) == {"seed": 3}
    assert checkpoint.resolve(tmp_path) == tmp_path / "model-12"
    names = {f"model-12{suffix}" for suffix in (".data-00000-of-00001", ".index", ".json")}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "checkpoint"}
    assert (tmp_path / "checkpoint").read_text() == 'model_checkpoint_path: "model-12"\n'


def test_what_a_save_writes_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    events, replace = [], os.replace
    monkeypatch.setattr(checkpoint, "flush", lambda path: events.append(f"flush {Path(path).name}"))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(f"name {Path(new).name}"), replace(old, new)))
    checkpoint.save(write_files, tmp_path, 12, {})
    data, index, state = ("model-12.data-00000-of-00001", "model-12.index", "model-12.json")
    assert set(events[:3]) == {f"flush {name}" for name in (data, index, state)}
    assert set(events[3:5]) == {f"name {data}", f"name {state}"}
    assert events[5:] == [f"name {index}", "name checkpoint", f"flush {tmp_path.name}"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    def write_half(prefix):
        Path(prefix + ".data-00000-of-00001").write_text("half")
        raise OSError("No space left on device")

    checkpoint.save(write_files, tmp_path, 6, {})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(write_half, tmp_path, 12, {})
    assert sorted(tmp_path.iterdir()) == before


KILLED_SAVE = (
    DYING
    + """
import sys
sys.path.insert(0, {root!r})
from common import checkpoint
from pathlib import Path
{write_files}
os.replace, os.open, os.fsync, os.close, os.unlink = map(dying, (os.replace, os.open, os.fsync, os.close, os.unlink))
die_everywhere(lambda number: checkpoint.save(write_files, {folder!r} + str(number), 12, {{}}))
"""
)
SUFFIXES = (".data-00000-of-00001", ".index", ".json")


@pytest.mark.parametrize("is_damaged_one_there", [False, True])
def test_killed_at_any_moment_of_a_save_the_newest_complete_checkpoint_is_whole(tmp_path, is_damaged_one_there):
    """Also where a damaged checkpoint of the same step is there: its files and the new ones never mix."""
    for number in range(1, 61):
        (tmp_path / str(number)).mkdir()
        checkpoint.save(write_files, tmp_path / str(number), 6, {})
        for suffix in SUFFIXES * is_damaged_one_there:
            (tmp_path / str(number) / f"model-12{suffix}").write_text("damaged")
    function = inspect.getsource(write_files)  # to import this file would import TensorFlow
    script = KILLED_SAVE.format(root=str(ROOT), folder=f"{tmp_path}/", write_files=function)
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    found = []
    for number in range(1, 61):
        newest = checkpoint.resolve(tmp_path / str(number))
        found.append(newest.name)
        assert [Path(f"{newest}{suffix}").read_text() for suffix in SUFFIXES] == [*SUFFIXES[:2], "{}"]
        complete = [prefix.name for prefix in checkpoint.complete_in(tmp_path / str(number))]
        if "model-12" in complete:
            of_12 = [(tmp_path / str(number) / f"model-12{suffix}").read_text() for suffix in SUFFIXES]
            assert of_12 in ([*SUFFIXES[:2], "{}"], ["damaged"] * 3)
    num_moments = found.index("model-12")
    assert num_moments > 10
    assert set(found[:num_moments]) == {"model-6"}


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 6, 8, 10):
        checkpoint.save(write_files, tmp_path, step, {})
    (tmp_path / "model-1.index").write_text("not ours: no state beside it")
    (tmp_path / "model-1.data-00000-of-00001").write_text("")
    write_files(str(tmp_path / "my-model-3"))  # not ours: another name
    (tmp_path / "my-model-3.json").write_text("{}")
    (tmp_path / "model-2.data-00001-of-00002").write_text("")
    checkpoint.mark_best(tmp_path, step=4, metric="AP", value=0.5)
    checkpoint.prune(tmp_path)
    left = sorted(path.name for path in tmp_path.glob("*.index"))
    ours = ["model-1.index", "model-10.index", "model-4.index", "model-6.index", "model-8.index"]
    assert left == [*ours, "my-model-3.index"]
    assert not list(tmp_path.glob("model-2.*"))
    assert checkpoint.read_best(tmp_path) == {"checkpoint": "model-4", "step": 4, "metric": "AP", "value": 0.5}


@pytest.mark.parametrize("best", [None, "cut off {"])
def test_prune_without_a_best_checkpoint_keeps_the_newest_three(tmp_path, best):
    for step in (8, 10, 12, 14):
        checkpoint.save(write_files, tmp_path, step, {})
    if best:
        (tmp_path / "best.json").write_text(best)
    assert checkpoint.read_best(tmp_path) is None
    checkpoint.prune(str(tmp_path))
    assert [path.name for path in checkpoint.complete_in(tmp_path)] == ["model-10", "model-12", "model-14"]


# ------------------------------------------------------------------------------------------- settings in the file


def test_settings_travel_in_the_file(tmp_path):
    settings = {"MODE_FPN": True, "PREPROC.PIXEL_STD": [1.0, 1.0, 1.0]}
    with open(tmp_path / "converted.npz", "wb") as file:
        checkpoint.write_npz(file, {"conv0/W": np.ones(3)}, settings)
    assert checkpoint.carried_settings(tmp_path / "converted.npz") == settings
    assert list(weights.read(tmp_path / "converted.npz")) == ["conv0/W"]


def test_other_files_carry_no_settings(run):
    np.savez(run / "zoo.npz", **{"conv0/W": np.ones(3)})
    assert checkpoint.carried_settings(run / "zoo.npz") == {}
    assert checkpoint.carried_settings(run / "model-500") == {}


@pytest.mark.parametrize("content", ["no JSON", "[1, 2]", "3"])
def test_settings_that_are_none(content, tmp_path):
    np.savez(tmp_path / "odd.npz", config=np.array(content))
    with pytest.raises(checkpoint.CheckpointMismatch, match="odd.npz can't be read"):
        checkpoint.carried_settings(tmp_path / "odd.npz")


def test_settings_in_a_file_that_is_no_archive(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK cut off")
    with pytest.raises(checkpoint.CheckpointMismatch, match="broken.npz can't be read"):
        checkpoint.carried_settings(tmp_path / "broken.npz")


def test_the_settings_in_the_file_are_loaded_and_flags_checked(tmp_path, caplog):
    with open(tmp_path / "converted.npz", "wb") as file:
        checkpoint.write_npz(file, {}, {"MODE_FPN": True, "BACKBONE.STRIDE_1X1": True})
    loaded = Config()
    checkpoint.load_config(tmp_path / "converted.npz", loaded, overrides=["MODE_MASK=False"])
    assert (loaded.MODE_FPN, loaded.MODE_MASK, loaded.BACKBONE.STRIDE_1X1) == (True, False, True)
    assert not caplog.records  # the settings are known
    with pytest.raises(ConfigError, match="but --config sets BACKBONE.STRIDE_1X1=False"):
        checkpoint.load_config(tmp_path / "converted.npz", Config(), overrides=["BACKBONE.STRIDE_1X1=False"])


def test_settings_come_from_the_file_beside_a_checkpoint_and_flags_win(run, caplog):
    assert checkpoint.find_config(run / "model-500") is None
    checkpoint.load_config(run / "model-500", loaded := Config(), overrides=["TEST.RESULTS_PER_IM=9"])
    assert loaded.TEST.RESULTS_PER_IM == 9
    assert f"no config.json beside {run / 'model-500'}" in caplog.text
    caplog.clear()
    settings = Config()
    settings.update(["MODE_MASK=False", "TEST.RESULTS_PER_IM=7"])
    checkpoint.save_config(settings, run / "config.json")
    assert checkpoint.find_config(str(run / "model-500")) == run / "config.json"
    checkpoint.load_config(run / "model-500", loaded := Config(), overrides=["TEST.RESULTS_PER_IM=9"])
    assert (loaded.MODE_MASK, loaded.TEST.RESULTS_PER_IM) == (False, 9)
    with open(run / "converted.npz", "wb") as file:  # the file beside it may belong to other weights
        checkpoint.write_npz(file, {}, {"MODE_FPN": True})
    checkpoint.load_config(run / "converted.npz", loaded := Config())
    assert (loaded.MODE_FPN, loaded.MODE_MASK, loaded.TEST.RESULTS_PER_IM) == (True, True, 100)
    assert not caplog.records


def test_a_run_with_plugins_needs_them(run):
    settings = Config()
    settings.PLUGINS = ["my_parts"]
    checkpoint.save_config(settings, run / "config.json")
    with pytest.raises(PluginError, match="my_parts"):
        checkpoint.load_config(run / "model-500", Config())


def test_settings_of_a_model_name_its_classes_and_are_checked_and_frozen(run):
    with pytest.raises(UserError, match=r"DATA.CLASS_NAMES is not set: no config.json beside .*model-500 names"):
        checkpoint.settings_of(run / "model-500")
    settings = checkpoint.settings_of(run / "model-500", ["DATA.CLASS_NAMES=['BG','cat','dog']"])
    assert settings.DATA.NUM_CATEGORY == 2
    with pytest.raises(ConfigError, match="frozen"):
        settings.MODE_FPN = True
    with pytest.raises(ConfigError):
        checkpoint.settings_of(run / "model-500", ["DATA.CLASS_NAMES=['BG','cat']", "TEST.RESULTS_PER_IM=0"])
