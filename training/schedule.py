"""The schedule: adapts a recipe's learning rate and length to the devices and the batch.

A *step* is one run of the training graph: `devices` times `TRAIN.BATCH_SIZE_PER_GPU` images. An *update* of the weights
consists of one step, or of several whose gradients are accumulated.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from tensorpack.callbacks import HyperParamSetter

RECIPE_BATCH = 8  # the total batch for which the published recipes state BASE_LR and LR_SCHEDULE


class Schedule(NamedTuple):
    """A recipe adapted to a number of devices and a batch: see `derive_schedule`."""

    learning_rate: float  # for the mean gradient of an update, after the warm-up
    accumulate: int  # steps per update
    images_per_step: int
    warmup_from: float  # learning rate of step 0
    warmup_steps: int
    decay_steps: tuple[int, ...]  # at each the learning rate falls to a tenth
    total_steps: int  # a multiple of steps_per_epoch
    steps_per_epoch: int
    passes: float  # over the data set

    @property
    def epochs(self) -> int:
        """The number of epochs. An epoch is the unit of logs, checkpoints and evaluations, no pass over the data."""
        return self.total_steps // self.steps_per_epoch

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then constant between the decays."""
        if step < self.warmup_steps:
            return self.warmup_from + (self.learning_rate - self.warmup_from) * step / self.warmup_steps
        return self.learning_rate * 0.1 ** sum(step >= decay for decay in self.decay_steps)

    def __str__(self) -> str:
        decays = ", ".join(map(str, self.decay_steps)) or "none"
        return (
            f"{self.images_per_step} images per step, {self.accumulate} steps per update "
            f"(total batch {self.images_per_step * self.accumulate}); "
            f"learning rate {self.learning_rate:g} after {self.warmup_steps} steps of warm-up from "
            f"{self.warmup_from:g}, a tenth at steps: {decays}; {self.total_steps} steps in {self.epochs} epochs of "
            f"{self.steps_per_epoch} steps = {self.passes:.1f} passes over the data"
        )


def derive_schedule(
    *,
    devices: int,
    batch_per_device: int,
    base_lr: float,
    lr_schedule: Sequence[int],
    warmup_steps: int,
    warmup_from: float,
    steps_per_epoch: int,
    num_images: int,
) -> Schedule:
    """Adapts a recipe, stated for a total batch of 8, to a number of devices.

    Gradients are accumulated to at least that batch, and the learning rate is proportional to the batch
    (arXiv:1706.02677). The length of an epoch is adjusted so that the schedule is a whole number of epochs.

    Args:
        batch_per_device: images per device in a step. base_lr: learning rate for a total batch of 8.
        lr_schedule: [first decay, ..., end] in steps of 8 images, ascending.
        warmup_steps: in steps of any size. warmup_from: learning rate of step 0. steps_per_epoch: approximate.
        num_images: in the data set.
    """
    images_per_step = devices * batch_per_device
    accumulate = math.ceil(RECIPE_BATCH / images_per_step)
    *decays, end = (math.ceil(step * RECIPE_BATCH / images_per_step) for step in lr_schedule)
    epochs = max(1, round(end / steps_per_epoch))
    steps_per_epoch = math.ceil(end / epochs)
    total_steps = epochs * steps_per_epoch
    return Schedule(
        learning_rate=base_lr * images_per_step * accumulate / RECIPE_BATCH,
        accumulate=accumulate,
        images_per_step=images_per_step,
        warmup_from=warmup_from,
        warmup_steps=warmup_steps,
        decay_steps=tuple(decays),
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        passes=total_steps * images_per_step / num_images,
    )


class LearningRateSetter(HyperParamSetter):
    """Sets the variable `learning_rate` before each step: a function of the step alone, so a resume continues it."""

    def __init__(self, schedule):
        super().__init__("learning_rate")
        self._schedule = schedule

    def _get_value_to_set(self):
        return self._schedule.learning_rate_at(self.global_step)

    def _trigger_step(self):
        self._set_param()
