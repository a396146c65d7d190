"""The progress bar, and the loggers that receive the values of a run."""

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf
from tensorpack.callbacks import (
    Callback,
    JSONWriter,
    MergeAllSummaries,
    MonitorBase,
    MovingAverageSummary,
    ProgressBar,
    RunUpdateOps,
    ScalarPrinter,
    TFEventWriter,
)
from tensorpack.compat import tfv1
from tensorpack.utils import logger

from common.registry import Registry
from config import Config


def is_worth_logging(record):
    """Filters tensorpack's log: drops its malformed message on a failed training, which the programs report better."""
    return not str(record.msg).startswith("Training failed at global_step=")


class Progress(ProgressBar):
    """The bar of an epoch with its ETA: losses by part of the model, their sum, and the seconds waited for data.

    Their means over the epoch go to the monitors as `epoch/...`, with the time of a step, `epoch/step_s`.
    """

    def _before_train(self):
        names = [loss.op.name for loss in tfv1.get_collection(tfv1.GraphKeys.LOSSES)]
        losses = [name for name in names if not re.match(r"tower[1-9]", name)]  # those of the first tower
        self._names = ["total_cost:0", "data_time:0", *(f"{name}:0" for name in losses)]
        short = (re.sub(r"^tower0/|_loss(es)?|_cost", "", name).split("/")[0] for name in losses)
        self._parts = ["cost", "data_s", *short]
        super()._before_train()

    def _before_epoch(self):
        self._total = self.trainer.steps_per_epoch  # fewer in an epoch that began before a resume
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
    """tensorpack's writer for TensorBoard; after a failed write it logs a warning and stops, and training continues."""

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


LOGGERS = Registry("TRAIN.LOGGERS")


def register_logger(name: str, make: Callable[[Config, Path], MonitorBase]) -> Callable[[Config, Path], MonitorBase]:
    """Registers a logger for TRAIN.LOGGERS=[`name`]; returns `make`.

    Args:
        make: function (settings, logdir) -> tensorpack.callbacks.MonitorBase. The logger's `process_scalar` receives
            every value of the run by name, its `process_image` every picture. Only the first rank has loggers. They are
            made before the weights are loaded, which may fail: open files and connections in `_before_train`.
    Raises:
        ConfigError: the name is taken.
    """
    return LOGGERS.register(name, make)


register_logger("tensorboard", lambda settings, logdir: EventWriter())


def make_monitors(settings: Config, logdir: Path) -> list[MonitorBase]:
    """The loggers of TRAIN.LOGGERS, then those of stats.json, which a resume needs, and of the log.

    Raises:
        ConfigError: TRAIN.LOGGERS names nothing that is registered.
    """
    loggers = [make(settings, logdir) for make in LOGGERS.find_all(settings.TRAIN.LOGGERS)]
    return [*loggers, JSONWriter(), ScalarPrinter()]


def default_callbacks() -> list[Callback]:
    """tensorpack's default callbacks, with this project's progress bar."""
    return [MovingAverageSummary(), Progress(), MergeAllSummaries(), RunUpdateOps()]
