"""How data reaches the trainer."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import tensorflow as tf
from processes import PATIENCE
from tensorpack.compat import tfv1
from tensorpack.dataflow import DataFlowTerminated
from tensorpack.input_source import StagingInput
from tensorpack.tfutils.tower import TrainTowerContext

from modeling import device
from training import input
from training.input import Batches, TimedQueueInput, make_input


def test_batches_keep_the_error_that_ended_them():
    def stream():
        yield {"b": 2, "a": 1}
        raise ValueError("broken image 7")

    batches = Batches(stream(), ["a", "b"])
    iterator = iter(batches)
    assert next(iterator) == [1, 2]
    batches.raise_error()  # nothing yet
    assert not batches.has_failed()
    with pytest.raises(DataFlowTerminated):
        next(iterator)
    assert batches.has_failed()
    with pytest.raises(ValueError, match="broken image 7"):
        batches.raise_error()


def test_closing_a_stream_that_is_waited_for_is_no_error():
    waited, closed = threading.Event(), threading.Event()

    class Slow:
        def __iter__(self):
            yield {"a": 1}
            waited.set()
            closed.wait(PATIENCE)
            raise RuntimeError("the stream of training data has been closed")

        def close(self):
            closed.set()

    batches = Batches(Slow(), ["a"])
    thread = threading.Thread(target=drain, args=[batches])
    thread.start()
    assert waited.wait(PATIENCE)
    batches.close()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    batches.raise_error()


def drain(batches):
    with contextlib.suppress(DataFlowTerminated):
        for _ in batches:
            pass


def test_a_stall_is_explained_by_the_data_only_while_the_queue_waits_for_them(monkeypatch):
    """The clock moves by 5 s while a batch is made, and by 100 s between two of them."""
    now, seen = [1000.0], []
    monkeypatch.setattr(input, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Stream:
        def __iter__(self):
            for _ in range(2):
                now[0] += 5
                seen.append(batches.explain_stall())
                yield {"a": 1}

        def awaited(self):
            return "image 7, in worker 12"

    batches = Batches(Stream(), ["a"])
    assert batches.explain_stall().startswith("data is available")
    for _ in batches:
        seen.append(batches.explain_stall())
        now[0] += 100
    waits = "no data for 5 s, waiting for image 7, in worker 12"
    hangs = "data is available, but the step does not end: this device or another rank hangs"
    assert seen == [waits, hangs, waits, hangs]


def test_the_queue_holds_eight_batches_and_measures_the_wait():
    signature = [tf.TensorSpec([None], tf.float32, "a"), tf.TensorSpec([], tf.int32, "b")]
    options = tfv1.ConfigProto(device_count={"CPU": 1})
    with tf.Graph().as_default(), tfv1.Session(config=options) as session:
        with TrainTowerContext(""):
            source = TimedQueueInput(Batches([], ["a", "b"]), signature)
            source.setup(signature)
            tensors = source.get_input_tensors()
        full = tfv1.placeholder(tf.int32, [])
        put, size = source.queue.enqueue([tf.fill([3], tf.cast(full, tf.float32)), full]), source.queue.size()
        for number in range(8):
            session.run(put, {full: number})
        with pytest.raises(tf.errors.DeadlineExceededError):
            session.run(put, {full: 8}, options=tfv1.RunOptions(timeout_in_ms=50))
        assert session.run(size) == 8
        (a, b), waited = session.run([tensors, "data_time:0"])
        assert (a.tolist(), b) == ([0, 0, 0], 0)
        assert 0 <= waited < 1e6
        assert "input_wanted" in [op.name for op in tensors[0].op.control_inputs]
        there = session.graph.get_operation_by_name("input_there")
        assert {op.name for op in there.control_inputs} >= {tensor.op.name for tensor in tensors}


def test_a_gpu_gets_its_batch_ahead():
    signature = [tf.TensorSpec([None], tf.float32, "a")]
    for gpu in (False, True):
        with tf.Graph().as_default(), device.building_for(gpu=gpu):
            assert isinstance(make_input(Batches([], ["a"]), signature), StagingInput) == gpu
