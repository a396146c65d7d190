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
    decay_steps: tuple[int, ...]  # at each the learning rate falls to a tenth, in the policy "steps"
    total_steps: int  # a multiple of steps_per_epoch
    steps_per_epoch: int
    passes: float  # over the data set
    policy: str = "steps"  # how the learning rate falls after the warm-up: see `share_at`

    @property
    def epochs(self) -> int:
        """The number of epochs. An epoch is the unit of logs, checkpoints and evaluations, no pass over the data."""
        return self.total_steps // self.steps_per_epoch

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then a share of the whole."""
        if step < self.warmup_steps:
            return self.warmup_from + (self.learning_rate - self.warmup_from) * step / self.warmup_steps
        return self.learning_rate * self.share_at(step)

    def share_at(self, step: int) -> float:
        """The share of the learning rate after the warm-up, 1 to 0.

        Policies: "steps", a tenth at each of `decay_steps`; "linear", down to 0 at the end; "cosine", half a wave
        (arXiv:1608.03983 eq. 5, without restarts).
        """
        if self.policy == "steps":
            return 0.1 ** sum(step >= decay for decay in self.decay_steps)
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return 1.0 - progress if self.policy == "linear" else (1.0 + math.cos(math.pi * progress)) / 2

    def __str__(self) -> str:
        decays = f"a tenth at steps: {', '.join(map(str, self.decay_steps)) or 'none'}"
        falls = {"steps": decays, "linear": "falling evenly to 0", "cosine": "falling to 0 along a cosine"}[self.policy]
        return (
            f"{self.images_per_step} images per step, {self.accumulate} steps per update "
            f"(total batch {self.images_per_step * self.accumulate}); "
            f"learning rate {self.learning_rate:g} after {self.warmup_steps} steps of warm-up from "
            f"{self.warmup_from:g}, {falls}; {self.total_steps} steps in {self.epochs} epochs of "
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
    epochs: float = 0.0,
    decay_at: Sequence[float] = (),
    policy: str = "steps",
    warmup_factor: float = 0.0,
) -> Schedule:
    """Adapts a recipe, stated for a total batch of 8 or in passes over the data, to a number of devices.

    Gradients are accumulated to at least that batch, and the learning rate is proportional to the batch
    (arXiv:1706.02677). The length of an epoch is adjusted so that the schedule is a whole number of epochs.

    Args:
        batch_per_device: images per device in a step. base_lr: learning rate for a total batch of 8.
        lr_schedule: [first decay, ..., end] in steps of 8 images, ascending.
        warmup_steps: in steps of any size. warmup_from: learning rate of step 0. steps_per_epoch: approximate.
        num_images: in the data set.
        epochs: above 0: the length in passes over the data, in place of `lr_schedule`. decay_at: the decays then, as
            shares of the length, ascending.
        policy: see Schedule.share_at. warmup_factor: above 0: step 0 has this share of the learning rate.
    """
    images_per_step = devices * batch_per_device
    accumulate = math.ceil(RECIPE_BATCH / images_per_step)
    learning_rate = base_lr * images_per_step * accumulate / RECIPE_BATCH
    if epochs:
        end = max(1, math.ceil(epochs * num_images / images_per_step))
        decays = [round(share * end) for share in decay_at]
    else:
        *decays, end = (math.ceil(step * RECIPE_BATCH / images_per_step) for step in lr_schedule)
    num_epochs = max(1, round(end / steps_per_epoch))
    steps_per_epoch = math.ceil(end / num_epochs)
    total_steps = num_epochs * steps_per_epoch
    return Schedule(
        learning_rate=learning_rate,
        accumulate=accumulate,
        images_per_step=images_per_step,
        warmup_from=learning_rate * warmup_factor if warmup_factor else warmup_from,
        warmup_steps=warmup_steps,
        decay_steps=tuple(decays),
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        passes=total_steps * images_per_step / num_images,
        policy=policy,
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
