"""Where a run begins: which directories it may use, from which checkpoint and step it goes on."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from common import weights
from config import Config, ConfigError
from training.resume import rewind_statistics
from training.run import find_position, find_snapshot, run_state


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
    assert rewind_statistics(tmp_path, 12) == {6, 12}
    assert json.loads((tmp_path / "stats.json").read_text()) == rows[:2]
    assert json.loads((tmp_path / "stats-1.json").read_text()) == rows
    assert rewind_statistics(tmp_path, 0) == set()
    assert not (tmp_path / "stats.json").exists()
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
    run.ranks.size = 4
    run.records.pop()
    with pytest.raises(
        ConfigError, match=r"other ranks \(2, now 4\), images of DATA.TRAIN \(10, now 9\): .*--load run"
    ):
        find_snapshot(run, SCHEDULE)
