"""Checkpoints of a run: what is saved and when, and what happens where the disk is full."""

import json
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from tensorpack.compat import tfv1
from tensorpack.tfutils.summary import add_moving_summary

from common import checkpoint, weights
from common.errors import DataError
from common.files import FileError
from common.ranks import Ranks
from config import Config, ConfigError
from modeling.layers import collect_variables
from training import guards
from training.guards import CheckpointSaver, Diverged, Guard, NotSaved, Stopped
from training.model import Tower, TrainingModel


class FakeTrainer:
    """What CheckpointSaver needs of a trainer."""

    def __init__(self, session):
        self.sess, self.global_step = session, 0


@pytest.fixture
def saving(tmp_path):
    """(saver, trainer, weight, directory) in a graph of one weight."""
    with tf.Graph().as_default(), tfv1.Session() as session:
        with collect_variables(weights.MODEL_VARIABLES):
            weight = tfv1.get_variable("x/W", [2], initializer=tf.zeros_initializer())
        saver = CheckpointSaver(period=1, directory=tmp_path, state={}, newest=None, has_data_failed=lambda: False)
        saver.trainer = FakeTrainer(session)
        saver._setup_graph()
        session.run(tfv1.global_variables_initializer())
        yield saver, saver.trainer, weight, tmp_path


def test_weights_that_are_not_finite_are_never_saved(saving):
    saver, trainer, weight, directory = saving
    trainer.global_step = 6
    assert saver.save()
    before = sorted(directory.iterdir())
    weight.load([1, np.nan], trainer.sess)
    trainer.global_step = 12
    with pytest.raises(Diverged, match="not finite at step 12.* last good checkpoint: .*model-6") as error:
        saver.save()
    assert error.value.exit_code == 3
    assert sorted(directory.iterdir()) == before


def count_saves(monkeypatch, *, failing):
    """A list that grows by the step of each try to write a checkpoint; the tries with these numbers fail."""
    tries, save = [], checkpoint.save

    def counted(write, directory, step, state):
        tries.append(step)
        if len(tries) in failing:
            raise OSError(5, "Input/output error")
        return save(write, directory, step, state)

    monkeypatch.setattr(checkpoint, "save", counted)
    return tries


def test_a_save_has_a_second_try_and_no_third(saving, monkeypatch):
    saver, trainer, _, directory = saving
    tries, warnings = count_saves(monkeypatch, failing=(1, 3, 4)), []
    monkeypatch.setattr(guards.logger, "warning", warnings.append)
    trainer.global_step = 6
    assert saver.save()
    assert tries == [6, 6]
    assert len(warnings) == 1
    assert f"the checkpoint of step 6 can't be written to {directory}: [Errno 5] Input/output error; " in warnings[0]
    assert warnings[0].endswith("there is no checkpoint yet")
    saver.raise_failure()
    assert saver.save()  # it is saved already
    trainer.global_step = 12
    assert not saver.save()
    assert tries == [6, 6, 12, 12]
    assert warnings[2].endswith(f"last good checkpoint: {directory / 'model-6'}")


@pytest.mark.parametrize(
    ("failing", "saved", "left"),
    [
        ((), [3, 6, 9, 10], [6, 9, 10]),  # every third epoch, and the last one
        ((1, 2), [3, 3, 4, 6, 9, 10], [6, 9, 10]),  # due again in the next epoch
        ((1, 2, 3, 4), [3, 3, 4, 4, 5, 6, 9, 10], [6, 9, 10]),
        ((4, 5), [3, 6, 9, 10, 10], [3, 6, 9]),
    ],
)
def test_in_which_epochs_a_checkpoint_is_saved(saving, monkeypatch, failing, saved, left):
    saver, trainer, _, directory = saving
    saver._period, trainer.max_epoch = 3, 10
    tries = count_saves(monkeypatch, failing=failing)
    for trainer.epoch_num in range(1, 11):
        trainer.global_step = trainer.epoch_num
        saver._trigger_epoch()
    assert tries == saved
    assert [checkpoint.step_of(prefix) for prefix in checkpoint.complete_in(directory)] == left


def test_the_checkpoint_that_a_run_resumed_from_is_not_written_again(saving, monkeypatch):
    saver, trainer, _, directory = saving
    saver._newest = directory / "model-6"
    tries = count_saves(monkeypatch, failing=())
    for trainer.global_step in (6, 60):
        assert saver.save()
    assert tries == [60]


@pytest.mark.parametrize(("step", "has_failed", "saved"), [(6, True, [6]), (6, False, []), (0, True, [])])
def test_after_an_error_in_the_data_the_steps_before_it_are_saved(saving, monkeypatch, step, has_failed, saved):
    saver, trainer, *_ = saving
    saver._has_data_failed = lambda: has_failed
    tries = count_saves(monkeypatch, failing=())
    trainer.global_step = step
    saver._after_train()
    assert tries == saved


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), FileError("cannot write checkpoint")])
def test_a_save_that_fails_is_tried_again_and_told_at_the_end(saving, monkeypatch, error):
    saver, trainer, _, directory = saving
    trainer.global_step = 6
    assert saver.save()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", raising(error))
        trainer.global_step = 12
        assert not saver.save()
        with pytest.raises(NotSaved, match="last good checkpoint: .*model-6") as error:
            saver.raise_failure()
        assert error.value.exit_code == 5
    trainer.global_step = 13
    assert saver.save()
    saver.raise_failure()
    assert checkpoint.resolve(directory).name == "model-13"


def test_a_disk_without_room_is_refused_at_the_start(saving, monkeypatch):
    saver, *_ = saving
    saver._before_train()
    monkeypatch.setattr(guards.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 76, 24))
    saver._before_train()
    monkeypatch.setattr(guards.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 77, 23))
    with pytest.raises(ConfigError, match="0 MB are free, but 3 checkpoints of this model need 0 MB"):
        saver._before_train()  # 3 checkpoints of 2 floats: 24 bytes


def test_the_best_checkpoint_is_the_one_with_the_highest_value(saving):
    saver, trainer, _, directory = saving
    for value in (np.nan, np.inf, -np.inf):
        trainer.global_step = 3
        saver.offer("AP", value)
        assert checkpoint.read_best(directory) is None
    for step, value, best in [(6, 0.3, 6), (12, 0.2, 6), (18, np.nan, 6), (24, 0.4, 24), (30, 0.4, 24)]:
        trainer.global_step = step
        saver.offer("AP", value)
        assert checkpoint.read_best(directory)["step"] == best
    assert (directory / "model-24.index").exists()
    trainer.global_step = 24  # resumed from there, and evaluated again
    saver.offer("AP", 0.4)
    assert checkpoint.read_best(directory)["value"] == 0.4
    saver.offer("AP", 0.35)  # the same step: its new value counts
    assert checkpoint.read_best(directory)["value"] == 0.35
    for step, metric, value in [(30, "mask AP", 0.1), (20, "mask AP", 0.05)]:
        trainer.global_step = step  # another metric, and a resume from before the best step, begin anew
        saver.offer(metric, value)
        expected = {"checkpoint": f"model-{step}", "step": step, "metric": metric, "value": value}
        assert checkpoint.read_best(directory) == expected


def test_a_checkpoint_that_is_not_on_disk_is_not_the_best(saving, monkeypatch):
    saver, trainer, _, directory = saving
    count_saves(monkeypatch, failing=(1, 2))
    trainer.global_step = 6
    saver.offer("AP", 0.3)
    assert checkpoint.read_best(directory) is None


def test_a_best_checkpoint_that_cannot_be_recorded_does_not_end_the_training(saving, monkeypatch):
    saver, trainer, _, directory = saving
    warnings = []
    monkeypatch.setattr(guards.logger, "warning", warnings.append)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "mark_best", raising(FileError("cannot write best.json: No space left on device")))
        trainer.global_step = 6
        saver.offer("AP", 0.3)
    assert len(warnings) == 1 and "cannot write best.json: No space left on device" in warnings[0]
    assert checkpoint.resolve(directory).name == "model-6"
    trainer.global_step = 12
    saver.offer("AP", 0.2)
    assert checkpoint.read_best(directory)["step"] == 12  # the best that is recorded


def raising(error):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize("is_noted", [True, False])
def test_the_network_s_variables_are_told_from_the_training_s_own(tmp_path, is_noted):
    """Whatever their names, beside all that a training makes; noted in the json, and without it."""
    with tf.Graph().as_default(), tfv1.Session() as session:
        with collect_variables(weights.MODEL_VARIABLES):
            kernel = tfv1.get_variable("stem/kernel", [2, 3], initializer=tf.ones_initializer())
            scale = tfv1.get_variable("scale", [3], initializer=tf.ones_initializer())
        model = TrainingModel(Config(), learning_rate=0.1, accumulate=2)
        model._settings.TRAIN.PRECISION = "float16"  # for the state of loss scaling
        loss = tf.reduce_sum(kernel * scale, name="total_cost")
        step = tfv1.train.get_or_create_global_step()
        update = model.optimizer().minimize(loss, global_step=step)
        update = tf.group(update, *add_moving_summary(loss))
        saver = CheckpointSaver(period=1, directory=tmp_path, state={}, newest=None, has_data_failed=lambda: False)
        saver.trainer = FakeTrainer(session)
        saver._setup_graph()
        session.run([tfv1.global_variables_initializer(), tfv1.local_variables_initializer()])
        for _ in range(2):
            session.run(update)
        saver.trainer.global_step = 2
        assert saver.save()
        in_graph = {variable.op.name for variable in tfv1.global_variables()}
        expected = dict(zip(("stem/kernel", "scale"), session.run([kernel, scale])))
    assert len(in_graph) >= 11
    assert set(weights._read_tensorflow(tmp_path / "model-2", select=list)) == in_graph
    note = tmp_path / "model-2.json"
    assert json.loads(note.read_text())[weights.STATE_KEY] == ["scale", "stem/kernel"]
    if not is_noted:
        note.unlink()
    found = weights.read(tmp_path / "model-2")
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (x != 1).all()
        np.testing.assert_array_equal(found[name], x)


# ---------------------------------------------------------------- the guard


class FakeWatchdog:
    """Records what the guard reports to it."""

    def __init__(self):
        self.signal, self.calls = 0, []

    def start(self, **options):
        self.calls.append(("start", options))

    def moved(self, doing):
        self.calls.append(("moved", doing))

    def finished_step(self, step):
        self.calls.append(("finished", step))

    def stop(self, code):
        self.calls.append(("stop", code))


class FakeRanks(Ranks):
    """Rank `rank` of two; the other one shares and gathers the same values as this one, but for `other`."""

    size = 2

    def __init__(self, rank, other):
        self.rank, self.other = rank, other

    def gather(self, value, *, chief_only=False):
        return [value, self.other] if self.rank == 0 else [self.other, value]

    def of_chief(self, value):
        return value if self.rank == 0 else "what the chief says"

    def share(self, number):
        return tf.stack([number, self.other] if self.rank == 0 else [self.other, number])


class Guarded:
    """A guard of two towers: `step` runs one step with these costs and norm."""

    def __init__(self, folder, session, ranks):
        self.watchdog, self.saves, self.saved, self.asked = FakeWatchdog(), [], True, []
        self._session, self._fed = session, [tfv1.placeholder(tf.float32, []) for _ in range(3)]
        towers = [
            Tower(
                cost=self._fed[number],
                losses={"rpn/box_loss": self._fed[number] / 2, "wd_cost": tf.constant(0.25)},
                image_id=tf.constant([7 + number, 70 + number], tf.int64),
                sample_key=tf.constant([[5, 20 + number], [6, 30 + number]]),
            )
            for number in range(2)
        ]
        saver = SimpleNamespace(save=self.save, last_checkpoint=lambda: "last good checkpoint: run/model-6")
        self.guard = Guard(
            model=SimpleNamespace(towers=towers, gradient_norm=self._fed[2]),
            schedule=SimpleNamespace(learning_rate_at=lambda step: step / 100),
            watchdog=self.watchdog,
            ranks=ranks,
            saver=saver,
            make_batch=self.make_batch,
            directory=folder,
            stall_timeout=60,
            explain_stall=len,
        )
        self.guard.trainer = SimpleNamespace(global_step=8, is_chief=ranks.rank == 0)
        self.guard._setup_graph()

    def save(self):
        self.saves.append(self.guard.global_step)
        return self.saved

    def make_batch(self, positions):
        self.asked.append(positions)
        return {"image": np.array(positions), "gt_boxes": np.ones([2, 4])}

    def step(self, first=1.0, second=2.0, norm=3.0, signal_in_step=0):
        arguments = self.guard._before_run(None)
        fed = {**arguments.feed_dict, **dict(zip(self._fed, (first, second, norm)))}
        results = self._session.run(arguments.fetches, fed)
        self.watchdog.signal = self.watchdog.signal or signal_in_step
        self.guard._after_run(None, SimpleNamespace(results=results))
        self.guard._trigger_step()


@pytest.fixture
def guarded(tmp_path):
    """A function that makes a Guarded for some ranks."""
    with tf.Graph().as_default(), tfv1.Session() as session:
        yield lambda ranks=None: Guarded(tmp_path, session, ranks or Ranks())


def test_a_good_step_is_reported_and_nothing_else(guarded):
    guarded = guarded()
    guarded.guard._before_train()
    guarded.step()
    assert guarded.watchdog.calls == [("start", {"timeout": 60, "explain": len}), ("finished", 8)]
    assert guarded.saves == guarded.asked == []


@pytest.mark.parametrize(
    "numbers", [{"first": np.nan}, {"second": np.inf}, {"norm": np.nan}, {"norm": np.inf}, {"second": -np.inf}]
)
def test_a_step_that_is_not_finite_ends_the_run_with_its_numbers_and_its_batch(guarded, tmp_path, numbers):
    guarded, numbers = guarded(), {"first": 1.0, "second": 2.0, "norm": 3.0} | numbers
    with pytest.raises(Diverged) as error:
        guarded.step(**numbers)
    first, second = f"{numbers['first'] / 2:.3g}", f"{numbers['second'] / 2:.3g}"
    assert str(error.value) == (
        "the loss or its gradient is not finite at step 8: images 7, 70, 8, 71; "
        f"rpn/box_loss={first}, wd_cost=0.25, rpn/box_loss={second}, wd_cost=0.25, "
        f"gradient norm={numbers['norm']:.3g}, learning rate 0.07; "
        f"the batch is in {tmp_path / 'diverged-8-rank0.npz'}; "
        "last good checkpoint: run/model-6; try a lower TRAIN.BASE_LR"
    )
    assert guarded.watchdog.calls == [("stop", 3)]
    assert guarded.asked == [[20, 30], [21, 31]]
    with np.load(tmp_path / "diverged-8-rank0.npz") as file:
        assert {name: file[name].tolist() for name in file.files if "image" in name} == {
            "tower0/image": [20, 30],
            "tower1/image": [21, 31],
        }
        assert file["tower1/gt_boxes"].shape == (2, 4)
    assert guarded.saves == []


def test_the_batch_of_a_divergence_replaces_no_file_and_may_fail_to_be_saved(guarded, tmp_path):
    guarded = guarded()
    (tmp_path / "diverged-8-rank0.npz").touch()
    with pytest.raises(Diverged, match=r"the batch is in .*diverged-8-rank0-1\.npz; last"):
        guarded.step(first=np.nan)
    assert (tmp_path / "diverged-8-rank0.npz").read_bytes() == b""
    guarded.guard._make_batch = raising(DataError("image 7 is gone"))
    with pytest.raises(Diverged, match=r"0.07; the batch could not be saved \(image 7 is gone\); last good"):
        guarded.step(first=np.nan)
    guarded.guard._make_batch, guarded.guard._directory = guarded.make_batch, tmp_path / "diverged-8-rank0.npz"
    with pytest.raises(Diverged, match=r"the batch could not be saved \(cannot write .*\); last good"):
        guarded.step(first=np.nan)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_rank_s_divergence_is_told_as_such(guarded, rank, tmp_path):
    guarded = guarded(FakeRanks(rank, guards.DIVERGED))
    with pytest.raises(Diverged) as error:
        guarded.step()
    last = "last good checkpoint: run/model-6" if rank == 0 else "what the chief says"
    assert str(error.value) == (
        f"the loss or gradient of rank {1 - rank} is not finite at step 8: see its message; {last}; "
        "try a lower TRAIN.BASE_LR"
    )
    assert not list(tmp_path.iterdir())
    with pytest.raises(Diverged, match=f"the batch is in .*diverged-8-rank{rank}.npz"):
        guarded.step(norm=np.inf)


@pytest.mark.parametrize("is_early", [True, False])
def test_a_single_process_stops_in_the_step_of_the_signal(guarded, is_early):
    guarded = guarded()
    guarded.watchdog.signal = signal.SIGTERM if is_early else 0
    with pytest.raises(Stopped, match="^stopped by SIGTERM; --resume continues from the checkpoint$") as error:
        guarded.step(signal_in_step=signal.SIGTERM)
    assert error.value.exit_code == 143
    assert guarded.saves == [8]
    assert guarded.watchdog.calls == [("finished", 8), ("moved", "saving the last checkpoint"), ("stop", 143)]


def test_several_ranks_stop_for_the_signals_that_they_shared_in_the_step(guarded):
    guarded = guarded(FakeRanks(0, 0))
    guarded.guard._ranks.gather = lambda value: [value, True]
    guarded.step(signal_in_step=signal.SIGINT)  # too late to be shared
    assert guarded.saves == []
    with pytest.raises(Stopped) as error:
        guarded.step()
    assert error.value.exit_code == 130
    assert guarded.saves == [8]


def test_the_signal_of_another_rank_stops_this_one_which_does_not_save(guarded):
    guarded = guarded(FakeRanks(1, int(signal.SIGTERM)))
    with pytest.raises(Stopped) as error:
        guarded.step()
    assert error.value.exit_code == 143
    assert guarded.saves == []


@pytest.mark.parametrize("is_chief", [True, False])
def test_a_run_that_cannot_save_its_last_checkpoint_says_so_on_all_ranks(guarded, is_chief):
    guarded = guarded(Ranks() if is_chief else FakeRanks(1, int(signal.SIGTERM)))
    if not is_chief:
        guarded.guard._ranks.gather = lambda value: [False, value]
    guarded.saved = False
    with pytest.raises(NotSaved, match="^stopped by SIGTERM, but the checkpoint could not be written$") as error:
        guarded.step(signal_in_step=signal.SIGTERM)
    assert error.value.exit_code == 5
    assert guarded.watchdog.calls[-1] == ("stop", 5)


def test_an_evaluation_stops_for_a_signal_of_any_rank(guarded):
    guarded = guarded(FakeRanks(0, 0))
    guarded.guard.check()
    assert guarded.watchdog.calls == [("moved", "evaluating")]
    guarded.guard._ranks.other = int(signal.SIGTERM)
    with pytest.raises(Stopped) as error:
        guarded.guard.check()
    assert error.value.exit_code == 143


def test_a_stop_is_logged_as_information_and_a_failure_as_an_error(guarded, monkeypatch):
    logged = []
    monkeypatch.setattr(guards.logger, "info", lambda error: logged.append(("info", type(error))))
    monkeypatch.setattr(guards.logger, "error", lambda error: logged.append(("error", type(error))))
    guarded = guarded()
    with pytest.raises(Stopped):
        guarded.step(signal_in_step=signal.SIGTERM)
    guarded.saved = False
    with pytest.raises(NotSaved):
        guarded.step()
    assert logged == [("info", Stopped), ("error", NotSaved)]
