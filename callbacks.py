"""What training needs beside tensorpack: the schedule, the input queue, checkpoints, guards, resuming, progress.

A *step* is one run of the training graph: `devices` times `TRAIN.BATCH_SIZE_PER_GPU` images. An *update* of the weights
is made of one step, or of several whose gradients are accumulated.
"""

import json
import math
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorpack.callbacks import (
    Callback,
    HyperParamSetter,
    JSONWriter,
    MergeAllSummaries,
    MovingAverageSummary,
    ProgressBar,
    RunUpdateOps,
    ScalarPrinter,
    TFEventWriter,
)
from tensorpack.compat import tfv1
from tensorpack.dataflow import DataFlow, DataFlowTerminated
from tensorpack.input_source import QueueInput
from tensorpack.tfutils.sessinit import SessionInit
from tensorpack.tfutils.summary import add_moving_summary
from tensorpack.utils import logger

import checkpoint
from config import ConfigError, UserError

QUEUE_SIZE = 8  # batches ready to train on; tensorpack's 50 would be gigabytes
CHECKPOINTS_OF_SPACE = 3  # that the disk must have room for at the start
DIVERGED = 100  # what a rank tells the others instead of a signal's number
RECIPE_BATCH = 8  # the total batch that BASE_LR and LR_SCHEDULE of the published recipes are written for


class Diverged(UserError):
    """Weights or losses became infinite or NaN."""

    exit_code = 3


class NotSaved(UserError):
    """The training went on, but its last checkpoint could not be written."""

    exit_code = 5


class Stopped(UserError):
    """A signal has ended the run in good order."""

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}; --resume goes on from the checkpoint")
        self.exit_code = 128 + number


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


class CheckpointSaver(Callback):
    """Saves every `period` epochs, after the last one and on demand; keeps the newest and the best checkpoints.

    A save that fails is tried again after every epoch, with a warning; training goes on. Nothing that is not finite is
    ever saved.
    """

    def __init__(self, *, period, directory, state, newest, has_data_failed):
        """
        Args:
            state: dict that goes beside every checkpoint. newest: path of the one that was resumed from, or None.
            has_data_failed: called when training ends: whether it does for want of data, which is worth a checkpoint
        """
        self._period, self._directory, self._state, self._has_data_failed = period, directory, state, has_data_failed
        self._is_due = False
        self._newest = newest  # known to be good

    def _setup_graph(self):
        variables = tfv1.global_variables()
        self._saver = tfv1.train.Saver(variables, max_to_keep=None)
        self._bytes = sum(v.shape.num_elements() * v.dtype.size for v in variables)
        real = [v for v in variables if v.dtype.base_dtype.is_floating]
        self._is_finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(v)) for v in real])

    def _before_train(self):
        needed, free = CHECKPOINTS_OF_SPACE * self._bytes, shutil.disk_usage(self._directory).free
        if free < needed:
            raise ConfigError(
                f"{self._directory}: {free / 1e6:.0f} MB are free, but {CHECKPOINTS_OF_SPACE} checkpoints of this "
                f"model need {needed / 1e6:.0f} MB: make room, or choose another --logdir"
            )

    def save(self):
        """Save the state after the newest step, unless that is done already. Whether it is on disk now: bool."""
        step = self.global_step
        if self._newest is not None and self._newest.name == f"model-{step}":
            return True
        if not self.trainer.sess.run(self._is_finite):
            raise Diverged(f"weights are not finite at step {step}, nothing was saved; {self.last_checkpoint()}")
        for _ in range(2):  # a network disk may hiccup
            try:
                self._newest = checkpoint.save(self._write, self._directory, step, self._state)
                checkpoint.prune(self._directory)
            except (OSError, tf.errors.OpError) as error:
                logger.warning(
                    f"the checkpoint of step {step} can't be written to {self._directory}: "
                    f"{' '.join(str(error).split())[:200]}; {self.last_checkpoint()}"
                )
            else:
                logger.info(f"Saved {self._newest}.")
                self._is_due = False
                return True
        self._is_due = True
        return False

    def _write(self, prefix):
        self._saver.save(self.trainer.sess, prefix, write_meta_graph=False, write_state=False)

    def last_checkpoint(self):
        """The newest good checkpoint in words."""
        return f"last good checkpoint: {self._newest}" if self._newest else "there is no checkpoint yet"

    def offer(self, metric, value):
        """After an evaluation: save the best so far.

        Args:
            metric: name. value: more is better; not finite: no candidate.
        """
        best = checkpoint.read_best(self._directory)
        is_stale = best is None or best["metric"] != metric or best["step"] >= self.global_step
        is_better = is_stale or value > best["value"]
        if math.isfinite(value) and is_better and self.save():
            checkpoint.mark_best(self._directory, step=self.global_step, metric=metric, value=value)
            logger.info(f"Best so far: {metric} = {value:.4f}.")

    def _trigger_epoch(self):
        is_last = self.epoch_num == self.trainer.max_epoch
        if is_last or self._is_due or self.epoch_num % self._period == 0:
            self.save()

    def _after_train(self):
        if self.global_step and self._has_data_failed():
            self.save()

    def raise_failure(self):
        """After training: raise if the last state is not on disk."""
        if self._is_due:
            raise NotSaved(f"the last checkpoint can't be written to {self._directory}; {self.last_checkpoint()}")


class Guard(Callback):
    """Looks at every step, on all ranks together, and ends the run if need be.

    A signal ends it with a checkpoint; a loss or gradient that is not finite any more at once, and without one.
    """

    _chief_only = False

    def __init__(self, *, model, schedule, watchdog, ranks, saver, make_batch, directory, stall_timeout, explain_stall):
        """
        Args:
            model: RCNN. schedule: Schedule. watchdog: Watchdog. ranks: Ranks. saver: the run's CheckpointSaver.
            make_batch: see `data.TrainingData.batch_of`. directory: Path, for a batch that made the run diverge.
            stall_timeout, explain_stall: `timeout` and `explain` of Watchdog.start.
        """
        self._model, self._schedule, self._watchdog, self._ranks = model, schedule, watchdog, ranks
        self._saver, self._make_batch, self._directory = saver, make_batch, directory
        self._patience = {"timeout": stall_timeout, "explain": explain_stall}

    def _before_train(self):
        self._watchdog.start(**self._patience)

    def _setup_graph(self):
        self._signal = tfv1.placeholder(tf.int32, [], "guard/signal")
        numbers = tf.stack([*(tower.cost for tower in self._model.towers), self._model.gradient_norm])
        code = tf.where(tf.reduce_all(tf.math.is_finite(numbers)), self._signal, DIVERGED)
        self._fetches = {"codes": self._ranks.share(code), "norm": self._model.gradient_norm}
        self._fetches["towers"] = [tower._asdict() for tower in self._model.towers]

    def _before_run(self, _):
        return tfv1.train.SessionRunArgs(self._fetches, {self._signal: self._watchdog.signal})

    def _after_run(self, _, run_values):
        seen = run_values.results
        self._codes = seen["codes"]
        if (self._codes == DIVERGED).any():
            message = self._divergence(seen)
            last_checkpoint = self._ranks.of_chief(self._saver.last_checkpoint())  # ranks wait here for each other
            self._end(Diverged(f"{message}; {last_checkpoint}; try a lower TRAIN.BASE_LR"))

    def _trigger_step(self):
        self._watchdog.finished_step(self.global_step)
        # What the step was given may be older than a signal, but several ranks must see the same.
        self._stop_for(self._watchdog.signal if self._ranks.size == 1 else int(self._codes.max()))

    def check(self):
        """Between the batches of an evaluation, on all ranks together: end the run if a signal has come."""
        self._watchdog.moved("evaluating")
        self._stop_for(max(self._ranks.gather(self._watchdog.signal)))

    def _stop_for(self, number):
        if not number:
            return
        self._watchdog.moved("saving the last checkpoint")
        is_saved = self._saver.save() if self.trainer.is_chief else True
        if not all(self._ranks.gather(is_saved)):  # no rank ends before this: the launcher would end the saving one
            name = signal.Signals(number).name
            self._end(NotSaved(f"stopped by {name}, but the checkpoint could not be written"))
        self._end(Stopped(number))

    def _end(self, error):
        (logger.info if isinstance(error, Stopped) else logger.error)(error)
        self._watchdog.stop(error.exit_code)
        raise error

    def _divergence(self, seen):
        """The message; saves the batch."""
        step = self.global_step
        if self._codes[self._ranks.rank] != DIVERGED:
            ranks = ", ".join(map(str, np.flatnonzero(self._codes == DIVERGED)))
            return f"the loss or gradient of rank {ranks} is not finite at step {step}: see its message"
        towers = seen["towers"]
        images = ", ".join(str(image_id) for tower in towers for image_id in tower["image_id"])
        terms = ", ".join(f"{name}={value:.3g}" for tower in towers for name, value in tower["losses"].items())
        rate = self._schedule.learning_rate_at(step - 1)
        return (
            f"the loss or its gradient is not finite at step {step}: images {images}; {terms}, "
            f"gradient norm={seen['norm']:.3g}, learning rate {rate:g}; {self._save_batch(towers, step)}"
        )

    def _save_batch(self, towers, step):
        """Write what the step was given to a file; where it is, in words."""
        path = self._directory / f"diverged-{step}-rank{self._ranks.rank}.npz"
        try:
            batches = [self._make_batch(tower["sample_key"][:, 1].tolist()) for tower in towers]
            self._directory.mkdir(parents=True, exist_ok=True)
            np.savez(path, **{f"tower{i}/{name}": x for i, batch in enumerate(batches) for name, x in batch.items()})
        except (OSError, UserError) as error:
            return f"the batch could not be saved ({error})"
        return f"the batch is in {path}"


class FirstEpochFrom(Callback):
    """After a resume in the middle of an epoch: its first `steps_done` steps are not run again."""

    _chief_only = False

    def __init__(self, steps_done):
        self._steps_done = steps_done

    def _before_train(self):
        self._whole = self.trainer.steps_per_epoch

    def _before_epoch(self):
        is_first = self.epoch_num == self.trainer.loop.starting_epoch
        self.trainer.loop.steps_per_epoch = self._whole - self._steps_done * is_first


class AfterFirstStep(Callback):
    """Calls a function once, when the run has made its first step."""

    def __init__(self, function):
        self._function = function

    def _trigger_step(self):
        if self._function is not None:
            self._function()
        self._function = None


class Resumed(SessionInit):
    """Starts where a checkpoint of the same run was saved."""

    def __init__(self, snapshot):
        """
        Args:
            snapshot: checkpoint.Snapshot
        """
        self._snapshot = snapshot

    def _run_init(self, sess):
        checkpoint.restore(self._snapshot, sess)
        logger.info(f"Resumed from {self._snapshot.path}.")


def rewind_statistics(directory, step):
    """Take from a run's stats.json what lies after a step, and return the steps that stand there still: a set.

    A row is written at the very end of an epoch, after its evaluation. The old file gets another name.
    """
    path = Path(directory) / JSONWriter.FILENAME
    if not path.is_file():
        return set()
    rows = json.loads(path.read_text())
    kept = [row for row in rows if row["global_step"] <= step]
    if len(kept) < len(rows):
        path.rename(checkpoint.unused_path(path))
        if kept:
            checkpoint.write_whole(path, json.dumps(kept))
    return {row["global_step"] for row in kept}


def is_worth_logging(record):
    """A filter for tensorpack's log: its message of a failed training is wrongly formatted, and we have our own."""
    return not str(record.msg).startswith("Training failed at global_step=")


class InitialWeights(SessionInit):
    """Starts the model from a checkpoint, and logs what was loaded."""

    def __init__(self, path, check):
        """
        Args:
            path, check: see `checkpoint.load`
        """
        self._path, self._check = path, check

    @classmethod
    def of(cls, weights):
        """From (path, check), or from random numbers where `weights` is None."""
        return cls(*weights) if weights else None

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
        self._asked_at = None  # while the next batch is waited for

    def __iter__(self):
        try:
            self._asked_at = time.monotonic()
            for batch in self._batches:
                self._asked_at = None
                yield [batch[name] for name in self._names]
                self._asked_at = time.monotonic()
        except Exception as error:
            if not self._is_closed:
                self._error = error
            raise DataFlowTerminated from error  # what the queue's thread takes without a traceback

    def close(self):
        """End the stream. The queue's thread may be waiting for its next batch: that ends, too, and is no error."""
        self._is_closed = True
        self._batches.close()

    def explain_stall(self):
        """Why nothing moves: whether the data is waited for, and which image."""
        if self._asked_at is None:
            return "data is there, but the step does not end; this device or another rank hangs"
        return f"no data for {time.monotonic() - self._asked_at:.0f} s, waiting for {self._batches.awaited()}"

    def has_failed(self):
        """Whether an error has ended the stream."""
        return self._error is not None

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
        self._total = self.trainer.steps_per_epoch  # fewer in an epoch that was begun before a resume
        super()._before_epoch()
        self._totals, self._epoch_start = Counter(), time.time()

    def _before_run(self, _):
        return self._fetches

    def _after_run(self, context, run_values):
        shown = Counter()
        for part, value in zip(self._parts, run_values.results):
            shown[part] += float(value)
        self._totals.update(shown)
        self._bar.set_postfix({part: f"{value:.3g}" for part, value in shown.items()}, refresh=False)

    def _after_epoch(self):
        super()._after_epoch()
        self._totals["step_s"] = time.time() - self._epoch_start

    def _trigger_epoch(self):
        if self._total:
            for part, total in self._totals.items():
                self.trainer.monitors.put_scalar(f"epoch/{part}", total / self._total)


class EventWriter(TFEventWriter):
    """tensorpack's writer for TensorBoard, which gives up with a warning where it can't write: training goes on."""

    _has_failed = False

    def process_summary(self, summary):
        self._try(super().process_summary, summary)

    def process_event(self, evt):
        self._try(super().process_event, evt)

    def _write_graph(self):
        self._try(super()._write_graph)

    def _trigger(self):
        self._try(super()._trigger)

    def _after_train(self):
        self._try(super()._after_train)

    def _try(self, method, *arguments):
        if self._has_failed:
            return
        try:
            method(*arguments)
        except (OSError, LookupError, RuntimeError, tf.errors.OpError) as error:  # a full disk is an IndexError
            self._has_failed = True
            logger.warning(f"no more events for TensorBoard: {' '.join(str(error).split())[:200]}")


def default_monitors():
    """tensorpack's own defaults, with our writer of events."""
    return [EventWriter(), JSONWriter(), ScalarPrinter()]


def default_callbacks():
    """tensorpack's own defaults, with our progress bar."""
    return [MovingAverageSummary(), Progress(), MergeAllSummaries(), RunUpdateOps()]
