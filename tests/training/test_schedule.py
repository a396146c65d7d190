"""The schedule that fits a recipe to the devices."""

import numpy as np
import pytest

from training.schedule import derive_schedule

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
