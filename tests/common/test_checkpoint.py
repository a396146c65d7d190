"""Finding and saving checkpoints, and the settings that they carry."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import DYING

from common import checkpoint, weights
from config import Config, ConfigError

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


def test_wrong_paths_name_what_is_beside(run):
    with pytest.raises(
        checkpoint.CheckpointError, match=r"no checkpoint at .*model-7; found there: model-90, model-500"
    ) as error:
        checkpoint.resolve(run / "model-7")
    assert error.value.exit_code == 2
    with pytest.raises(checkpoint.CheckpointError, match="nowhere does not exist"):
        checkpoint.resolve(run / "nowhere" / "model-7")
    (run / "empty").mkdir()
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in the directory"):
        checkpoint.resolve(run / "empty")


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


KILLED_SAVE = (
    DYING
    + """
import sys
sys.path.insert(0, {root!r})
from common import checkpoint
from pathlib import Path
{write_files}
os.replace, os.open, os.fsync, os.close = map(dying, (os.replace, os.open, os.fsync, os.close))
checkpoint.save(write_files, {directory!r}, 12, {{}})
"""
)


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
