"""The schedule, and how data reaches the trainer."""

import contextlib
import json
import shutil
import threading

import numpy as np
import pytest
import tensorflow as tf
from tensorpack.compat import tfv1
from tensorpack.dataflow import DataFlowTerminated

import callbacks
import checkpoint
from config import ConfigError

RECIPE = dict(
    base_lr=0.01,
    lr_schedule=[120000, 160000, 180000],
    warmup_steps=1000,
    warmup_from=1e-5,
    steps_per_epoch=500,
    num_images=117266,
)


@pytest.mark.parametrize(
    ("devices", "batch", "accumulate", "learning_rate", "decays", "total"),
    [
        (8, 1, 1, 0.01, (120000, 160000), 180000),  # the published recipe
        (1, 1, 8, 0.01, (960000, 1280000), 1440000),  # accumulated to the same update
        (4, 2, 1, 0.01, (120000, 160000), 180000),
        (8, 4, 1, 0.04, (30000, 40000), 45000),  # four times the batch: rate and length follow
        (3, 1, 3, 0.01125, (320000, 426667), 480000),  # nine images per update
        (64, 1, 1, 0.08, (15000, 20000), 22500),
    ],
)
def test_schedule_follows_the_total_batch(devices, batch, accumulate, learning_rate, decays, total):
    schedule = callbacks.derive_schedule(devices=devices, batch_per_device=batch, **RECIPE)
    assert schedule.accumulate == accumulate
    assert schedule.learning_rate == pytest.approx(learning_rate)
    assert schedule.decay_steps == decays
    assert schedule.total_steps == total
    assert schedule.epochs * schedule.steps_per_epoch == total
    assert schedule.passes == pytest.approx(180000 * 8 / 117266)  # whatever the devices


def test_a_short_schedule_makes_whole_epochs():
    settings = {**RECIPE, "lr_schedule": [50, 60], "steps_per_epoch": 500}
    schedule = callbacks.derive_schedule(devices=1, batch_per_device=8, **settings)
    assert (schedule.epochs, schedule.steps_per_epoch) == (1, 60)
    settings = {**RECIPE, "lr_schedule": [1000, 1210], "steps_per_epoch": 500}
    schedule = callbacks.derive_schedule(devices=1, batch_per_device=8, **settings)
    assert (schedule.epochs, schedule.steps_per_epoch) == (2, 605)


def test_learning_rate_at_each_step():
    schedule = callbacks.derive_schedule(devices=8, batch_per_device=1, **RECIPE)
    steps = [0, 500, 999, 1000, 119999, 120000, 159999, 160000, 179999]
    expected = [1e-5, (1e-5 + 0.01) / 2, 0.00999001, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    np.testing.assert_allclose([schedule.learning_rate_at(step) for step in steps], expected, rtol=1e-6)


def test_no_warmup():
    schedule = callbacks.derive_schedule(devices=8, batch_per_device=1, **{**RECIPE, "warmup_steps": 0})
    assert schedule.learning_rate_at(0) == 0.01


def test_batches_keep_the_error_that_ended_them():
    def stream():
        yield {"b": 2, "a": 1}
        raise ValueError("broken image 7")

    batches = callbacks.Batches(stream(), ["a", "b"])
    iterator = iter(batches)
    assert next(iterator) == [1, 2]
    batches.raise_error()  # nothing yet
    with pytest.raises(DataFlowTerminated):
        next(iterator)
    with pytest.raises(ValueError, match="broken image 7"):
        batches.raise_error()


def test_closing_a_stream_that_is_waited_for_is_no_error():
    waited, closed = threading.Event(), threading.Event()

    class Slow:
        def __iter__(self):
            yield {"a": 1}
            waited.set()
            closed.wait(10)
            raise RuntimeError("the stream of training data has been closed")

        def close(self):
            closed.set()

    batches = callbacks.Batches(Slow(), ["a"])
    thread = threading.Thread(target=drain, args=[batches])
    thread.start()
    assert waited.wait(10)
    batches.close()
    thread.join(10)
    batches.raise_error()


def drain(batches):
    with contextlib.suppress(DataFlowTerminated):
        for _ in batches:
            pass


def test_rewinding_statistics_keeps_the_past(tmp_path):
    rows = [{"epoch_num": epoch, "global_step": 6 * epoch, "loss": 0.5} for epoch in (1, 2, 3)]
    (tmp_path / "stats.json").write_text(json.dumps(rows))
    assert callbacks.rewind_statistics(tmp_path, 20) == {6, 12, 18}
    assert callbacks.rewind_statistics(tmp_path, 12) == {6, 12}
    assert json.loads((tmp_path / "stats.json").read_text()) == rows[:2]
    assert json.loads((tmp_path / "stats-1.json").read_text()) == rows
    assert callbacks.rewind_statistics(tmp_path, 0) == set()
    assert not (tmp_path / "stats.json").exists()
    assert callbacks.rewind_statistics(tmp_path / "nowhere", 0) == set()


class FakeTrainer:
    """What CheckpointSaver needs of a trainer."""

    def __init__(self, session):
        self.sess, self.global_step = session, 0


@pytest.fixture
def saving(tmp_path):
    """(saver, trainer, weight, directory) in a graph of one weight."""
    with tf.Graph().as_default(), tfv1.Session() as session:
        weight = tfv1.get_variable("x/W", [2], initializer=tf.zeros_initializer())
        saver = callbacks.CheckpointSaver(
            period=1, directory=tmp_path, state={}, newest=None, has_data_failed=lambda: False
        )
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
    with pytest.raises(callbacks.Diverged, match="not finite at step 12.* last good checkpoint: .*model-6") as error:
        saver.save()
    assert error.value.exit_code == 3
    assert sorted(directory.iterdir()) == before


def test_a_save_that_fails_is_tried_again_and_told_at_the_end(saving, monkeypatch):
    saver, trainer, _, directory = saving
    trainer.global_step = 6
    assert saver.save()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        trainer.global_step = 12
        assert not saver.save()
        with pytest.raises(callbacks.NotSaved, match="last good checkpoint: .*model-6") as error:
            saver.raise_failure()
        assert error.value.exit_code == 5
    trainer.global_step = 13
    assert saver.save()
    saver.raise_failure()
    assert checkpoint.resolve(directory).name == "model-13"


def test_a_disk_without_room_is_refused_at_the_start(saving, monkeypatch):
    saver, *_ = saving
    saver._before_train()
    monkeypatch.setattr(callbacks.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 77, 23))
    with pytest.raises(ConfigError, match="0 MB are free, but 3 checkpoints of this model need 0 MB"):
        saver._before_train()  # 3 checkpoints of 2 floats: 24 bytes


def test_the_best_checkpoint_is_the_one_with_the_highest_value(saving):
    saver, trainer, _, directory = saving
    for step, value, best in [(6, 0.3, 6), (12, 0.2, 6), (18, np.nan, 6), (24, 0.4, 24), (30, 0.4, 24)]:
        trainer.global_step = step
        saver.offer("AP", value)
        assert checkpoint.read_best(directory)["step"] == best
    assert (directory / "model-24.index").exists()
    trainer.global_step = 24  # resumed from there, and evaluated again
    saver.offer("AP", 0.4)
    assert checkpoint.read_best(directory)["value"] == 0.4


def test_a_full_disk_ends_the_events_and_not_the_training(tmp_path, monkeypatch):
    warnings, calls = [], []
    monkeypatch.setattr(callbacks.logger, "warning", warnings.append)

    def no_space(*_):
        calls.append(1)
        raise IndexError("events.out.tfevents: No space left on device")  # as TensorFlow says it

    for name in ("process_summary", "process_event", "_write_graph", "_trigger", "_after_train"):
        monkeypatch.setattr(callbacks.TFEventWriter, name, no_space)
    writer = callbacks.EventWriter(str(tmp_path))
    writer.process_summary(None)
    writer.process_event(None)
    writer._write_graph()
    writer._trigger()
    writer._after_train()
    assert len(calls) == len(warnings) == 1
    assert "No space left on device" in warnings[0]
