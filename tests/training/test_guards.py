"""Checkpoints of a run: what is saved and when, and what happens where the disk is full."""

import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
from tensorpack.compat import tfv1
from tensorpack.tfutils.summary import add_moving_summary

from common import checkpoint, weights
from common.files import FileError
from config import Config, ConfigError
from modeling.layers import collect_variables
from training import guards
from training.guards import CheckpointSaver, Diverged, NotSaved
from training.model import TrainingModel


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
    monkeypatch.setattr(guards.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 77, 23))
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
