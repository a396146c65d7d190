"""Checkpoints, and the guard that stops a run on a signal or a non-finite value."""

import math
import shutil
import signal

import numpy as np
import tensorflow as tf
from tensorpack.callbacks import Callback
from tensorpack.compat import tfv1
from tensorpack.utils import logger

from common import checkpoint, weights
from common.files import FileError, Whole, unused_path, writing
from config import ConfigError, UserError

CHECKPOINTS_OF_SPACE = 3  # the disk must have room for this many at the start
DIVERGED = 100  # code that a rank shares in place of a signal's number


class Diverged(UserError):
    """A loss, a gradient or a weight is infinite or NaN."""

    exit_code = 3


class NotSaved(UserError):
    """The run ended, but its last checkpoint could not be written."""

    exit_code = 5


class Stopped(UserError):
    """A signal ended the run, after it saved a checkpoint."""

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}; --resume continues from the checkpoint")
        self.exit_code = 128 + number


class CheckpointSaver(Callback):
    """Saves every `period` epochs, after the last one and on demand; keeps the newest and the best checkpoints.

    A failed save logs a warning and is repeated after each epoch; training continues. Non-finite weights are never
    saved.
    """

    def __init__(self, *, period, directory, state, newest, has_data_failed):
        """
        Args:
            period: int, epochs. directory: Path.
            state: JSON-serialisable dict, written beside each checkpoint. newest: Path of the checkpoint that the run
                resumed from, or None.
            has_data_failed: called when training ends; True if an error in the data ended it, which is worth a save.
        """
        self._period, self._directory, self._state, self._has_data_failed = period, directory, state, has_data_failed
        self._is_due = False
        self._newest = newest  # known to be good

    def _setup_graph(self):
        variables = tfv1.global_variables()
        self._state = {**self._state, weights.STATE_KEY: sorted(weights.model_variables())}
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
        """Saves the state after the newest step, unless it is saved already; returns whether it is on disk.

        Raises:
            Diverged: a variable is not finite.
        """
        step = self.global_step
        if self._newest is not None and self._newest.name == f"model-{step}":
            return True
        if not self.trainer.sess.run(self._is_finite):
            raise Diverged(f"weights are not finite at step {step}, nothing was saved; {self.last_checkpoint()}")
        for _ in range(2):  # a network disk may hiccup
            try:
                self._newest = checkpoint.save(self._write, self._directory, step, self._state)
                checkpoint.prune(self._directory)
            except (OSError, FileError, tf.errors.OpError) as error:
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
        """A text that names the newest good checkpoint."""
        return f"last good checkpoint: {self._newest}" if self._newest else "there is no checkpoint yet"

    def offer(self, metric, value):
        """Saves and marks a checkpoint if its evaluation is the best so far.

        Args:
            metric: name. value: float, higher is better; a non-finite one is ignored.
        """
        best = checkpoint.read_best(self._directory)
        is_stale = best is None or best["metric"] != metric or best["step"] >= self.global_step
        is_better = is_stale or value > best["value"]
        if math.isfinite(value) and is_better and self.save():
            try:
                checkpoint.mark_best(self._directory, step=self.global_step, metric=metric, value=value)
            except FileError as error:  # a full disk: the training continues, as after a failed save
                logger.warning(f"the best checkpoint is not recorded: {error}")
            else:
                logger.info(f"Best so far: {metric} = {value:.4f}.")

    def _trigger_epoch(self):
        is_last = self.epoch_num == self.trainer.max_epoch
        if is_last or self._is_due or self.epoch_num % self._period == 0:
            self.save()

    def _after_train(self):
        if self.global_step and self._has_data_failed():
            self.save()

    def raise_failure(self):
        """Raises NotSaved if the last state is not on disk; for use after training."""
        if self._is_due:
            raise NotSaved(f"the last checkpoint can't be written to {self._directory}; {self.last_checkpoint()}")


class Guard(Callback):
    """Checks each step on all ranks and stops the run on a signal or a non-finite value.

    After a signal the run ends with a checkpoint; after a non-finite loss or gradient it ends at once, without one.
    """

    _chief_only = False

    def __init__(self, *, model, schedule, watchdog, ranks, saver, make_batch, directory, stall_timeout, explain_stall):
        """
        Args:
            model: TrainingModel. schedule: Schedule. watchdog: Watchdog. ranks: Ranks. saver: CheckpointSaver.
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
        self._fetches["towers"] = [tower.pack() for tower in self._model.towers]

    def _before_run(self, _):
        return tfv1.train.SessionRunArgs(self._fetches, {self._signal: self._watchdog.signal})

    def _after_run(self, _, run_values):
        results = run_values.results
        self._codes = results["codes"]
        if (self._codes == DIVERGED).any():
            message = self._divergence(results)
            last_checkpoint = self._ranks.of_chief(self._saver.last_checkpoint())  # ranks wait here for each other
            self._end(Diverged(f"{message}; {last_checkpoint}; try a lower TRAIN.BASE_LR"))

    def _trigger_step(self):
        self._watchdog.finished_step(self.global_step)
        # A signal may arrive after the step has begun. A single rank reacts at once; several must all act on the codes
        # that they shared in the step.
        self._stop_for(self._watchdog.signal if self._ranks.size == 1 else int(self._codes.max()))

    def check(self):
        """Ends the run if a signal has arrived. All ranks call this together, before each batch of an evaluation.

        Raises:
            Stopped: a signal arrived on one of the ranks. NotSaved: and its checkpoint could not be written.
        """
        self._watchdog.moved("evaluating")
        self._stop_for(max(self._ranks.gather(self._watchdog.signal)))

    def _stop_for(self, number):
        if not number:
            return
        self._watchdog.moved("saving the last checkpoint")
        is_saved = self._saver.save() if self.trainer.is_chief else True
        if not all(self._ranks.gather(is_saved)):  # wait: the launcher ends the saving rank once another has ended
            name = signal.Signals(number).name
            self._end(NotSaved(f"stopped by {name}, but the checkpoint could not be written"))
        self._end(Stopped(number))

    def _end(self, error):
        (logger.info if isinstance(error, Stopped) else logger.error)(error)
        self._watchdog.stop(error.exit_code)
        raise error

    def _divergence(self, results):
        """Saves the batch; returns the message."""
        step = self.global_step
        if self._codes[self._ranks.rank] != DIVERGED:
            ranks = ", ".join(map(str, np.flatnonzero(self._codes == DIVERGED)))
            return f"the loss or gradient of rank {ranks} is not finite at step {step}: see its message"
        towers = [tower.unpack(packed) for tower, packed in zip(self._model.towers, results["towers"])]
        images = ", ".join(str(image_id) for tower in towers for image_id in tower.image_id)
        terms = ", ".join(f"{name}={value:.3g}" for tower in towers for name, value in tower.losses.items())
        rate = self._schedule.learning_rate_at(step - 1)
        return (
            f"the loss or its gradient is not finite at step {step}: images {images}; {terms}, "
            f"gradient norm={results['norm']:.3g}, learning rate {rate:g}; {self._save_batch(towers, step)}"
        )

    def _save_batch(self, towers, step):
        """Writes the batches of the step to a file; returns a text that names it, or why there is none."""
        path = self._directory / f"diverged-{step}-rank{self._ranks.rank}.npz"
        try:
            batches = [self._make_batch(tower.sample_key[:, 1].tolist()) for tower in towers]
            arrays = {f"tower{i}/{name}": x for i, batch in enumerate(batches) for name, x in batch.items()}
            with Whole(unused_path(path)) as file, writing(path):
                np.savez(file.part, **arrays)
        except UserError as error:
            return f"the batch could not be saved ({error})"
        return f"the batch is in {file.path}"
