"""Starts a run from weights, or continues it from its newest checkpoint."""

import json
from pathlib import Path

from tensorpack.callbacks import Callback, JSONWriter
from tensorpack.tfutils.sessinit import SessionInit
from tensorpack.utils import logger

from common import weights
from common.files import unused_path, write_whole


class FirstEpochFrom(Callback):
    """Shortens the first epoch after a resume by the `steps_done` steps of it that the run has made before."""

    _chief_only = False

    def __init__(self, steps_done):
        self._steps_done = steps_done

    def _before_train(self):
        self._whole = self.trainer.steps_per_epoch

    def _before_epoch(self):
        is_first = self.epoch_num == self.trainer.loop.starting_epoch
        self.trainer.loop.steps_per_epoch = self._whole - self._steps_done * is_first


class AfterFirstStep(Callback):
    """Calls a function once, after the first step of the run."""

    def __init__(self, function):
        self._function = function

    def _trigger_step(self):
        if self._function is not None:
            self._function()
        self._function = None


class Resumed(SessionInit):
    """Restores all variables from a checkpoint of the same run."""

    def __init__(self, snapshot):
        """
        Args:
            snapshot: weights.Snapshot
        """
        self._snapshot = snapshot

    def _run_init(self, sess):
        weights.restore(self._snapshot, sess)
        logger.info(f"Resumed from {self._snapshot.path}.")


def rewind_statistics(directory, step):
    """Removes the rows after a step from a run's stats.json; returns the steps of the remaining rows, a set of int.

    The run writes a row at the end of an epoch, after its evaluation. The file with the removed rows is kept under
    another name.
    """
    path = Path(directory) / JSONWriter.FILENAME
    if not path.is_file():
        return set()
    rows = json.loads(path.read_text())
    kept = [row for row in rows if row["global_step"] <= step]
    if len(kept) < len(rows):
        path.rename(unused_path(path))
        if kept:
            write_whole(path, json.dumps(kept))
    return {row["global_step"] for row in kept}


class InitialWeights(SessionInit):
    """Loads the model's initial weights from a checkpoint, and logs which variables were loaded."""

    def __init__(self, path, *, is_backbone):
        """
        Args:
            path: as returned by `checkpoint.resolve`. is_backbone: whether the file holds a backbone alone.
        """
        self._path = path
        self._check = weights.check_backbone if is_backbone else weights.check_finetune

    @classmethod
    def of(cls, start):
        """The InitialWeights of (path, is_backbone); None, which leaves random values, of None."""
        return cls(start[0], is_backbone=start[1]) if start else None

    def _run_init(self, sess):
        _, lines = weights.load(self._path, sess, check=self._check)
        for line in lines:
            logger.info(line)
