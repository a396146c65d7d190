"""Where a run begins: which directories it may use, from which checkpoint and step it goes on."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from common import weights
from common.errors import DataError
from config import Config, ConfigError
from training import resume
from training.guards import NotSaved
from training.resume import rewind_statistics
from training.run import check_end, find_position, find_snapshot, run_state, save_config


@pytest.mark.parametrize(
    ("names", "is_free"),
    [
        ([], True),
        (["log.log", "log.log.1121-120000", "events.out.tfevents.1.host"], True),  # of a start that failed
        (["log.log", "config.json"], False),
        (["model-6.index"], False),
        (["photo.jpg"], False),
    ],
)
def test_which_directories_are_free(tmp_path, names, is_free):
    for name in names:
        (tmp_path / name).touch()
    if is_free:
        train.check_unused(tmp_path)
    else:
        with pytest.raises(ConfigError, match="exists already: choose another --logdir, or continue .* with --resume"):
            train.check_unused(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_directory_that_is_not_there_is_free_and_is_not_made(tmp_path):
    train.check_unused(tmp_path / "new" / "run")
    train.check_writable(tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["file", "file/run", "/proc/self/run"])
def test_where_nothing_can_be_written_is_refused(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't be the --logdir: "):
        train.check_unused(tmp_path / path)
        train.check_writable(tmp_path / path)


def test_rewinding_statistics_keeps_the_past(tmp_path):
    rows = [{"epoch_num": epoch, "global_step": 6 * epoch, "loss": 0.5} for epoch in (1, 2, 3)]
    (tmp_path / "stats.json").write_text(json.dumps(rows))
    assert rewind_statistics(tmp_path, 20) == {6, 12, 18}
    assert [path.name for path in tmp_path.iterdir()] == ["stats.json"]
    assert rewind_statistics(tmp_path, 12) == {6, 12}
    assert json.loads((tmp_path / "stats.json").read_text()) == rows[:2]
    assert json.loads((tmp_path / "stats-1.json").read_text()) == rows
    assert rewind_statistics(tmp_path, 0) == set()
    assert not (tmp_path / "stats.json").exists()
    assert json.loads((tmp_path / "stats-2.json").read_text()) == rows[:2]
    assert rewind_statistics(tmp_path / "nowhere", 0) == set()


SCHEDULE = SimpleNamespace(steps_per_epoch=6, images_per_step=2)


@pytest.mark.parametrize(
    ("step", "finished", "position"),
    [
        (4, [], (4, 1, 4)),  # in the first epoch
        (6, [6], (6, 2, 0)),  # at its end
        (6, [], (6, 1, 6)),  # between its last step and the end of its evaluation: no step, but the evaluation
        (8, [6], (8, 2, 2)),
        (12, [6, 12], (12, 3, 0)),
        (8, [6, 12], (8, 2, 2)),  # the statistics are ahead of the checkpoint
    ],
)
def test_where_a_run_goes_on(tmp_path, step, finished, position):
    rows = [{"epoch_num": i + 1, "global_step": number} for i, number in enumerate(finished)]
    if rows:
        (tmp_path / "stats.json").write_text(json.dumps(rows))
    snapshot = weights.Snapshot(tmp_path / f"model-{step}", step, {}, {})
    run = SimpleNamespace(logdir=tmp_path, settings=Config())
    assert find_position(run, SCHEDULE, snapshot) == position
    left = json.loads((tmp_path / "stats.json").read_text()) if rows else []
    assert [row["global_step"] for row in left] == [number for number in finished if number <= step]


def test_a_new_run_begins_at_the_configured_epoch(tmp_path):
    assert find_position(SimpleNamespace(logdir=tmp_path, settings=Config()), SCHEDULE, None) == (0, 1, 0)


def test_a_run_of_other_data_or_devices_is_refused(monkeypatch):
    run = SimpleNamespace(logdir=Path("run"), settings=Config(), ranks=SimpleNamespace(size=2), records=[None] * 10)
    state = run_state(run, SCHEDULE)
    monkeypatch.setattr(weights, "newest_readable", lambda _: weights.Snapshot(Path("run/model-6"), 6, {}, state))
    assert find_snapshot(run, SCHEDULE).step == 6
    assert state == {
        "images per step": 2,
        "TRAIN.BATCH_SIZE_PER_GPU": 1,
        "ranks": 2,
        "images of DATA.TRAIN": 10,
        "TRAIN.SEED": 0,
        "DATA.REPEAT_THRESHOLD": 0.0,
    }
    run.ranks.size = 4
    run.records.pop()
    with pytest.raises(
        ConfigError, match=r"other ranks \(2, now 4\), images of DATA.TRAIN \(10, now 9\): .*--load run"
    ):
        find_snapshot(run, SCHEDULE)


@pytest.mark.parametrize(
    ("key", "value"), [("TRAIN.BATCH_SIZE_PER_GPU", 4), ("TRAIN.SEED", 9), ("DATA.REPEAT_THRESHOLD", 0.01)]
)
def test_settings_that_change_the_order_of_the_data_belong_to_the_state(key, value):
    run = SimpleNamespace(settings=Config(), ranks=SimpleNamespace(size=1), records=[])
    run.settings.update([f"{key}={value}"])
    assert run_state(run, SCHEDULE)[key] == value


@pytest.mark.parametrize(
    ("of", "is_backbone"), [(None, None), ((Path("model-6"), False), False), ((Path("R50.npz"), True), True)]
)
def test_initial_weights_are_checked_by_their_purpose(of, is_backbone, monkeypatch):
    loaded, logged = [], []

    def load(path, session, *, check):
        loaded.append((path, session, check))
        return None, ["2 loaded", "  x absent"]

    monkeypatch.setattr(weights, "load", load)
    monkeypatch.setattr(resume.logger, "info", logged.append)
    start = resume.InitialWeights.of(of)
    if of is None:
        assert start is None
        return
    start._run_init("session")
    check = weights.check_backbone if is_backbone else weights.check_finetune
    assert loaded == [(of[0], "session", check)]
    assert logged == ["2 loaded", "  x absent"]


def test_a_resumed_run_restores_its_snapshot(monkeypatch):
    restored = []
    monkeypatch.setattr(weights, "restore", lambda *arguments: restored.append(arguments))
    snapshot = SimpleNamespace(path="run/model-6")
    resume.Resumed(snapshot)._run_init("session")
    assert restored == [(snapshot, "session")]


# ---------------------------------------------------------------- how a run ends


@pytest.mark.parametrize(
    ("position", "planned"),
    [((0, 1, 0), 30), ((6, 2, 0), 30), ((8, 2, 2), 30), ((6, 1, 6), 30), ((4, 1, 4), 30), ((30, 6, 0), 30)],
)
def test_a_run_that_made_all_its_steps_ends_well_and_another_one_does_not(position, planned):
    schedule = SimpleNamespace(epochs=5, steps_per_epoch=6)
    parts = {"batches": SimpleNamespace(raise_error=int), "saver": SimpleNamespace(raise_failure=int)}
    check_end(planned, position, schedule, **parts)
    with pytest.raises(DataError, match=f"^the data ended at step {planned - 1} of {planned}$"):
        check_end(planned - 1, position, schedule, **parts)


def test_the_first_cause_of_an_early_end_is_raised():
    def fail(error):
        raise error

    data_failed = SimpleNamespace(raise_error=lambda: fail(DataError("image 7")))
    good = SimpleNamespace(raise_error=int)
    not_saved = SimpleNamespace(raise_failure=lambda: fail(NotSaved("disk full")))
    schedule = SimpleNamespace(epochs=5, steps_per_epoch=6)
    with pytest.raises(DataError, match="image 7"):
        check_end(7, (0, 1, 0), schedule, batches=data_failed, saver=not_saved)
    with pytest.raises(NotSaved):
        check_end(7, (0, 1, 0), schedule, batches=good, saver=not_saved)


def test_settings_of_an_earlier_start_are_kept_under_another_name(tmp_path):
    first, second = Config(), Config()
    second.update(["TRAIN.SEED=5"])
    for settings in (first, first, second):
        save_config(settings, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config-1.json", "config.json"]
    assert json.loads((tmp_path / "config-1.json").read_text()) == json.loads(first.to_json())
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(second.to_json())
