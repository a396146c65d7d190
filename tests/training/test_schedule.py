"""The schedule that fits a recipe to the devices."""

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from tensorpack import ModelDesc, SimpleTrainer, TrainConfig, launch_train_with_config
from tensorpack.callbacks import Callback
from tensorpack.compat import tfv1
from tensorpack.dataflow import DataFromList

from training.resume import AfterFirstStep, FirstEpochFrom
from training.schedule import LearningRateSetter, derive_schedule

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
    schedule = derive_schedule(devices=devices, batch_per_device=batch, **RECIPE)
    assert schedule.accumulate == accumulate
    assert schedule.learning_rate == pytest.approx(learning_rate)
    assert schedule.decay_steps == decays
    assert schedule.total_steps == total
    assert schedule.epochs * schedule.steps_per_epoch == total
    assert schedule.passes == pytest.approx(180000 * 8 / 117266)  # whatever the devices


def test_a_short_schedule_makes_whole_epochs():
    settings = {**RECIPE, "lr_schedule": [50, 60], "steps_per_epoch": 500}
    schedule = derive_schedule(devices=1, batch_per_device=8, **settings)
    assert (schedule.epochs, schedule.steps_per_epoch) == (1, 60)
    settings = {**RECIPE, "lr_schedule": [1000, 1210], "steps_per_epoch": 500}
    schedule = derive_schedule(devices=1, batch_per_device=8, **settings)
    assert (schedule.epochs, schedule.steps_per_epoch) == (2, 605)


def test_learning_rate_at_each_step():
    schedule = derive_schedule(devices=8, batch_per_device=1, **RECIPE)
    steps = [0, 500, 999, 1000, 119999, 120000, 159999, 160000, 179999]
    expected = [1e-5, (1e-5 + 0.01) / 2, 0.00999001, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    np.testing.assert_allclose([schedule.learning_rate_at(step) for step in steps], expected, rtol=1e-6)


def test_no_warmup():
    schedule = derive_schedule(devices=8, batch_per_device=1, **{**RECIPE, "warmup_steps": 0})
    assert schedule.learning_rate_at(0) == 0.01


def test_a_length_in_passes_over_the_data():
    """Large-scale jitter for 100 epochs, batch 64: 184,375 updates of 118,000 images, tenths at 8/9 and 26/27."""
    options = dict(RECIPE, base_lr=0.0125, warmup_steps=500, num_images=118000, epochs=100.0, decay_at=[8 / 9, 26 / 27])
    schedule = derive_schedule(devices=8, batch_per_device=8, warmup_factor=0.067, **options)
    assert schedule.decay_steps == (163889, 177546)
    assert (schedule.learning_rate, schedule.accumulate) == (pytest.approx(0.1), 1)
    assert 184375 <= schedule.total_steps < 184375 + schedule.epochs
    assert schedule.passes == pytest.approx(100, rel=3e-3)
    np.testing.assert_allclose([schedule.learning_rate_at(x) for x in (0, 250, 500)], [0.0067, 0.05335, 0.1])
    schedule = derive_schedule(devices=1, batch_per_device=2, **dict(options, num_images=5, epochs=1.0, decay_at=[]))
    assert (schedule.accumulate, schedule.total_steps) == (4, 3)


@pytest.mark.parametrize("warmup", [0, 40])
def test_the_rate_falls_along_a_line_or_a_cosine(warmup):
    """From the end of the warm-up to 0 at the end of the run, as LinearLR and CosineAnnealingLR of PyTorch."""
    options = dict(RECIPE, warmup_steps=warmup, lr_schedule=[100, 240], steps_per_epoch=240)
    steps = np.arange(warmup, 240)
    progress = (steps - warmup) / (240 - warmup)
    for policy, share in (("linear", 1 - progress), ("cosine", 0.5 + 0.5 * np.cos(np.pi * progress))):
        schedule = derive_schedule(devices=8, batch_per_device=1, policy=policy, **options)
        np.testing.assert_allclose([schedule.learning_rate_at(s) for s in steps.tolist()], 0.01 * share, atol=1e-12)
        assert schedule.learning_rate_at(1000) == pytest.approx(0, abs=1e-12)
        assert schedule.learning_rate_at(warmup // 2) == pytest.approx(0.01 if not warmup else (1e-5 + 0.01) / 2)
        assert f"falling {'evenly to 0' if policy == 'linear' else 'to 0 along a cosine'}; 240 steps" in str(schedule)


def test_a_schedule_reads_as_a_sentence():
    schedule = derive_schedule(devices=3, batch_per_device=1, **RECIPE)
    assert str(schedule) == (
        "3 images per step, 3 steps per update (total batch 9); learning rate 0.01125 after 1000 steps of warm-up from "
        "1e-05, a tenth at steps: 320000, 426667; 480000 steps in 960 epochs of 500 steps = 12.3 passes over the data"
    )
    schedule = derive_schedule(devices=8, batch_per_device=1, **{**RECIPE, "lr_schedule": [600]})
    assert "a tenth at steps: none; 600 steps in 1 epochs of 600 steps" in str(schedule)


def test_the_learning_rate_of_each_step_is_the_schedule_s():
    """A training of five steps, whose gradients are powers of 16: the weight shows which rate each step had."""
    rates = {0: 1.0, 1: 3.0, 2: 2.0, 3: 5.0, 4: 7.0}

    class OneWeight(ModelDesc):
        def inputs(self):
            return [tf.TensorSpec([], tf.float32, "x")]

        def build_graph(self, x):
            return tf.reduce_sum(tfv1.get_variable("w", [], initializer=tf.zeros_initializer()) * x)

        def optimizer(self):
            rate = tfv1.get_variable("learning_rate", initializer=0.0, trainable=False)
            return tfv1.train.GradientDescentOptimizer(rate)

    class Weight(Callback):
        def _setup_graph(self):
            (self._weight,) = tfv1.trainable_variables()

        def _trigger_step(self):
            seen.append(float(self.trainer.sess.run(self._weight)))

        def _trigger_epoch(self):
            epochs[self.epoch_num] = len(seen)

    seen, called, epochs = [], [], {}
    settings = TrainConfig(
        model=OneWeight(),
        dataflow=DataFromList([[np.float32(16**number)] for number in range(5)], shuffle=False),
        callbacks=[
            LearningRateSetter(SimpleNamespace(learning_rate_at=rates.get)),
            FirstEpochFrom(1),
            AfterFirstStep(lambda: called.append(len(seen))),
            Weight(),
        ],
        extra_callbacks=[],
        steps_per_epoch=3,
        starting_epoch=2,
        max_epoch=3,
    )
    with tf.Graph().as_default():
        launch_train_with_config(settings, SimpleTrainer())
    expected = -np.cumsum([rates[step] * 16**step for step in range(5)])  # 2 steps of epoch 2, and 3 of epoch 3
    assert seen == expected.tolist()
    assert called == [0]
    assert epochs == {2: 2, 3: 5}
