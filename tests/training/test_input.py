"""How data reaches the trainer."""

import contextlib
import threading

import pytest
from tensorpack.dataflow import DataFlowTerminated

from training.input import Batches


def test_batches_keep_the_error_that_ended_them():
    def stream():
        yield {"b": 2, "a": 1}
        raise ValueError("broken image 7")

    batches = Batches(stream(), ["a", "b"])
    iterator = iter(batches)
    assert next(iterator) == [1, 2]
    batches.raise_error()  # nothing yet
    with pytest.raises(DataFlowTerminated):
        next(iterator)
    with pytest.raises(ValueError, match="broken image 7"):
        batches.raise_error()


def test_closing_a_stream_that_is_waited_for_is_no_error():
    waited, closed = threading.Event(), threading.Event()

    class Slow:
        def __iter__(self):
            yield {"a": 1}
            waited.set()
            closed.wait(10)
            raise RuntimeError("the stream of training data has been closed")

        def close(self):
            closed.set()

    batches = Batches(Slow(), ["a"])
    thread = threading.Thread(target=drain, args=[batches])
    thread.start()
    assert waited.wait(10)
    batches.close()
    thread.join(10)
    batches.raise_error()


def drain(batches):
    with contextlib.suppress(DataFlowTerminated):
        for _ in batches:
            pass
