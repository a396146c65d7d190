"""What training needs beside tensorpack: the schedule, the input queue, checkpoints and initial weights, progress.

A *step* is one run of the training graph: `devices` times `TRAIN.BATCH_SIZE_PER_GPU` images. An *update* of the weights
is made of one step, or of several whose gradients are accumulated.
"""

import math
import re
import time
from collections import Counter
from typing import NamedTuple

import tensorflow as tf
from tensorpack.callbacks import (
    HyperParamSetter,
    MergeAllSummaries,
    ModelSaver,
    MovingAverageSummary,
    ProgressBar,
    RunUpdateOps,
)
from tensorpack.compat import tfv1
from tensorpack.dataflow import DataFlow, DataFlowTerminated
from tensorpack.input_source import QueueInput
from tensorpack.tfutils.sessinit import SessionInit
from tensorpack.tfutils.summary import add_moving_summary
from tensorpack.utils import logger

import checkpoint
from config import UserError

QUEUE_SIZE = 8  # batches ready to train on; tensorpack's 50 would be gigabytes
RECIPE_BATCH = 8  # the total batch that BASE_LR and LR_SCHEDULE of the published recipes are written for


class Diverged(UserError):
    """Weights or losses became infinite or NaN."""

    exit_code = 3


class Schedule(NamedTuple):
    """What follows from the recipe, the number of devices and the batch: see `derive_schedule`."""

    learning_rate: float  # for the mean gradient of an update
    accumulate: int  # steps per update
    images_per_step: int
    warmup_from: float  # learning rate of step 0
    warmup_steps: int
    decay_steps: tuple  # the learning rate falls to a tenth at each
    total_steps: int  # a multiple of steps_per_epoch
    steps_per_epoch: int
    passes: float  # over the data set

    @property
    def epochs(self):
        """Of `steps_per_epoch`: the rhythm of logs, checkpoints and evaluations, not passes over the data."""
        return self.total_steps // self.steps_per_epoch

    def learning_rate_at(self, step):
        """Linear warm-up, then constant between the decays."""
        if step < self.warmup_steps:
            return self.warmup_from + (self.learning_rate - self.warmup_from) * step / self.warmup_steps
        return self.learning_rate * 0.1 ** sum(step >= decay for decay in self.decay_steps)

    def __str__(self):
        decays = ", ".join(map(str, self.decay_steps)) or "none"
        return (
            f"{self.images_per_step} images per step, {self.accumulate} steps per update "
            f"(total batch {self.images_per_step * self.accumulate}); "
            f"learning rate {self.learning_rate:g} after {self.warmup_steps} steps of warm-up from "
            f"{self.warmup_from:g}, a tenth at steps: {decays}; {self.total_steps} steps in {self.epochs} epochs of "
            f"{self.steps_per_epoch} steps = {self.passes:.1f} passes over the data"
        )


def derive_schedule(
    *, devices, batch_per_device, base_lr, lr_schedule, warmup_steps, warmup_from, steps_per_epoch, num_images
):
    """Fit a recipe, written for a total batch of 8, to the devices at hand.

    Gradients are accumulated to at least that batch, and the learning rate follows the batch in proportion
    (arXiv:1706.02677). Epochs get the length that makes a whole number of them.

    Args:
        lr_schedule: [first decay, ..., end] in steps of 8 images, ascending
    Returns:
        Schedule
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
    """Sets the variable `learning_rate` before every step: a function of the step alone, so it survives a resume."""

    def __init__(self, schedule):
        super().__init__("learning_rate")
        self._schedule = schedule

    def _get_value_to_set(self):
        return self._schedule.learning_rate_at(self.global_step)

    def _trigger_step(self):
        self._set_param()


class CheckpointSaver(ModelSaver):
    """Saves every `period` epochs and after the last one; no meta graph, since graphs are built from code."""

    def __init__(self, *, period, directory):
        super().__init__(max_to_keep=3, checkpoint_dir=str(directory))
        self._period = period

    def _before_train(self):
        pass

    def _trigger_epoch(self):
        if self.epoch_num % self._period == 0 or self.epoch_num == self.trainer.max_epoch:
            self._trigger()


class InitialWeights(SessionInit):
    """Starts the model from a checkpoint, and logs what was loaded."""

    def __init__(self, path, check):
        """
        Args:
            path, check: see `checkpoint.load`
        """
        self._path, self._check = path, check

    def _run_init(self, sess):
        _, lines = checkpoint.load(self._path, sess, check=self._check)
        for line in lines:
            logger.info(line)


class Batches(DataFlow):
    """`data.TrainingData` as tensorpack's queue wants it: a dataflow of lists, in the order of `names`.

    The queue's thread swallows exceptions and tells the trainer that the data has ended, which it takes for a normal
    end of training; so the exception is kept here and `raise_error` has to be called after training.
    """

    def __init__(self, batches, names):
        """
        Args:
            batches: iterable of dicts, with a `close`. names: of the arrays, in the order of the model's inputs.
        """
        self._batches, self._names = batches, names
        self._error = None
        self._is_closed = False

    def __iter__(self):
        try:
            for batch in self._batches:
                yield [batch[name] for name in self._names]
        except Exception as error:
            if not self._is_closed:
                self._error = error
            raise DataFlowTerminated from error  # what the queue's thread takes without a traceback

    def close(self):
        """End the stream. The queue's thread may be waiting for its next batch: that ends, too, and is no error."""
        self._is_closed = True
        self._batches.close()

    def __len__(self):
        raise NotImplementedError("the stream has no end")

    def raise_error(self):
        """Raise what ended the stream, if anything did."""
        if self._error is not None:
            raise self._error


class TimedQueueInput(QueueInput):
    """A short queue that measures how long a step waits for its batch (`data_time`, seconds)."""

    def __init__(self, batches, signature):
        super().__init__(
            batches, queue=tfv1.FIFOQueue(QUEUE_SIZE, [spec.dtype for spec in signature], name="input_queue")
        )

    def _get_input_tensors(self):
        with tf.device("/cpu:0"):
            start = tf.timestamp(name="input_wanted")
            with tf.control_dependencies([start]):
                tensors = super()._get_input_tensors()
            with tf.control_dependencies(tensors):
                data_time = tf.subtract(tf.timestamp(name="input_there"), start)
            add_moving_summary(tf.cast(data_time, tf.float32, name="data_time"))
        return tensors


class Progress(ProgressBar):
    """The bar of an epoch with its ETA: losses by part of the model, their sum, and the seconds waited for data.

    Their means over the epoch go to the monitors as `epoch/...`, with the time of a step, `epoch/step_s`.
    """

    def _before_train(self):
        names = [loss.op.name for loss in tfv1.get_collection(tfv1.GraphKeys.LOSSES)]
        losses = [name for name in names if not re.match(r"tower[1-9]", name)]  # of several towers, the first
        self._names = ["total_cost:0", "data_time:0", *(f"{name}:0" for name in losses)]
        short = (re.sub(r"^tower0/|_loss(es)?|_cost", "", name).split("/")[0] for name in losses)
        self._parts = ["cost", "data_s", *short]
        super()._before_train()

    def _before_epoch(self):
        super()._before_epoch()
        self._totals, self._epoch_start = Counter(), time.time()

    def _before_run(self, _):
        return self._fetches

    def _after_run(self, context, run_values):
        shown = Counter()
        for part, value in zip(self._parts, run_values.results):
            shown[part] += float(value)
        if not math.isfinite(shown["cost"]):
            terms = ", ".join(f"{part}={value:.3g}" for part, value in shown.items())
            raise Diverged(f"the loss is not finite at step {self.global_step}: {terms}; try a lower TRAIN.BASE_LR")
        self._totals.update(shown)
        self._bar.set_postfix({part: f"{value:.3g}" for part, value in shown.items()}, refresh=False)

    def _after_epoch(self):
        super()._after_epoch()
        self._totals["step_s"] = time.time() - self._epoch_start

    def _trigger_epoch(self):
        for part, total in self._totals.items():
            self.trainer.monitors.put_scalar(f"epoch/{part}", total / self.trainer.steps_per_epoch)


def default_callbacks():
    """tensorpack's own defaults, with our progress bar."""
    return [MovingAverageSummary(), Progress(), MergeAllSummaries(), RunUpdateOps()]
