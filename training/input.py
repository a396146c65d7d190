"""Feeds batches to the training graph through tensorpack's queue; measures the wait and keeps errors."""

import time

import tensorflow as tf
from tensorpack.compat import tfv1
from tensorpack.dataflow import DataFlow, DataFlowTerminated
from tensorpack.input_source import InputSource, QueueInput, StagingInput
from tensorpack.tfutils.summary import add_moving_summary

from modeling import device

QUEUE_SIZE = 8  # batches ready to train on; tensorpack's 50 would take gigabytes


class Batches(DataFlow):
    """Adapts `data.TrainingData` to tensorpack's queue: a dataflow of lists of arrays, in the order of `names`.

    The queue's thread swallows exceptions and ends the data, which the trainer treats as a normal end of training. This
    class therefore keeps the exception; call `raise_error` after training.
    """

    def __init__(self, batches, names):
        """
        Args:
            batches: TrainingData. names: list of str, the arrays in the order of the model's inputs.
        """
        self._batches, self._names = batches, names
        self._error = None
        self._is_closed = False
        self._asked_at = None  # time.monotonic() at which the queue asked for the batch that it waits for

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
            raise DataFlowTerminated from error  # the queue's thread prints no traceback for this one

    def close(self):
        """Ends the stream. If the queue's thread waits for a batch, its wait ends without an error."""
        self._is_closed = True
        self._batches.close()

    def explain_stall(self):
        """A text on why the run stalls: it waits for data, with the image, or a step does not end."""
        if self._asked_at is None:
            return "data is available, but the step does not end: this device or another rank hangs"
        return f"no data for {time.monotonic() - self._asked_at:.0f} s, waiting for {self._batches.awaited()}"

    def has_failed(self):
        """Whether an error has ended the stream."""
        return self._error is not None

    def raise_error(self):
        """Raises the error that ended the stream, if there is one."""
        if self._error is not None:
            raise self._error


def make_input(batches: "Batches", signature: list[tf.TensorSpec]) -> InputSource:
    """The input of a training. A GPU gets its next batch while it computes: tensorpack does this for several only."""
    source = TimedQueueInput(batches, signature)
    return StagingInput(source) if device.is_gpu() else source


class TimedQueueInput(QueueInput):
    """A short queue that measures how long a step waits for its batch (`data_time`, seconds)."""

    def __init__(self, batches, signature):
        """
        Args:
            batches: Batches. signature: list of tf.TensorSpec, in the order of the batches' arrays.
        """
        super().__init__(
            batches, queue=tfv1.FIFOQueue(QUEUE_SIZE, [spec.dtype for spec in signature], name="input_queue")
        )

    def _get_input_tensors(self):
        with tf.device("/cpu:0"):
            start = _now("input_wanted")
            with tf.control_dependencies([start]):
                tensors = super()._get_input_tensors()
            with tf.control_dependencies(tensors):
                data_time = tf.subtract(_now("input_there"), start)
            add_moving_summary(tf.cast(data_time, tf.float32, name="data_time"))
        return tensors


def _now(name):
    """Returns the seconds of a monotonic clock, float64 scalar. `tf.timestamp` fails while ops are deterministic."""
    now = tf.numpy_function(time.monotonic, [], tf.float64, name=name)
    now.set_shape([])
    return now
