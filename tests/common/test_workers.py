"""Worker processes that fail, are killed or get stuck."""

import itertools
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import psutil
import pytest
from processes import PATIENCE, children, wait_until

from common.errors import DataError
from common.workers import OrderedMap

ROOT = Path(__file__).resolve().parents[2]


def numbers_but_13(task):
    if task == 13:
        raise ValueError("unlucky\nnumber")
    return task


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_failure_travels_with_its_task_and_traceback(caplog, num_workers):
    results = OrderedMap(numbers_but_13, itertools.count(5), num_workers=num_workers)
    assert next(results) == 5
    with caplog.at_level(logging.ERROR), pytest.raises(DataError, match="^13: ValueError: unlucky number$"):
        for _ in results:
            pass
    assert "numbers_but_13" in caplog.text and "Traceback" in caplog.text
    assert not children()
    with pytest.raises(DataError, match="closed"):
        next(results)


def megabytes(task):
    return os.getpid(), np.full(2**24, task, np.uint8)


@pytest.mark.slow
def test_a_worker_killed_while_it_sends_is_noticed():
    results = OrderedMap(megabytes, itertools.count(), num_workers=1)
    pid, _ = next(results)
    # The next result has begun to arrive and does not fit into the pipe: nobody reads, so the worker is still sending.
    wait_until(lambda: wait(results._busy, 0))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a data worker was killed \(SIGKILL: out of memory\?\) .* 1$"):
        next(results)
    assert not children()


def stuck_after_4(task):
    if task >= 4:
        time.sleep(5 * PATIENCE)
    return os.getpid()


@pytest.mark.slow
def test_close_from_another_thread_ends_a_stuck_stream():
    results = OrderedMap(stuck_after_4, itertools.count(), num_workers=2)
    pids = {next(results) for _ in range(4)}
    for pid in pids:
        os.kill(pid, signal.SIGTERM)  # Workers outlive it: the parent may want to finish its step.
    raised = []

    def consume():
        try:
            next(results)
        except DataError as error:
            raised.append(str(error))

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    consumer.join(0.5)
    assert consumer.is_alive() and len(children()) == 2
    results.close()
    consumer.join(PATIENCE)
    assert raised == ["the stream of training data has been closed"]
    assert not children()


PROGRAM = """
    import itertools, sys, threading, time
    sys.path[:0] = {paths!r}
    import test_workers
    from common.workers import OrderedMap

    def consume(results, all_given):
        for number, pid in enumerate(results, 1):
            print(pid, flush=True)
            if number == 4:
                all_given.set()

    if __name__ == "__main__":
        results = OrderedMap(test_workers.stuck_after_4, itertools.count(), num_workers=2)
        all_given = threading.Event()
        threading.Thread(target=consume, args=(results, all_given), daemon=True).start()
        all_given.wait()
        {end}
"""


def start_program(tmp_path, end):
    """A program whose thread waits for stuck workers: its process, and the ids of the workers'."""
    path = tmp_path / "program.py"
    path.write_text(
        textwrap.dedent(PROGRAM).format(paths=[str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "common")], end=end)
    )
    program = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)
    return program, {int(program.stdout.readline()) for _ in range(4)}


@pytest.mark.slow
def test_stuck_workers_do_not_hold_up_the_end_of_the_program(tmp_path):
    program, pids = start_program(tmp_path, end="sys.exit(5)")
    program.communicate(timeout=PATIENCE)
    assert program.returncode == 5
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.slow
def test_stuck_workers_end_when_the_parent_is_killed(tmp_path):
    program, pids = start_program(tmp_path, end="time.sleep(1e3)")
    program.kill()
    program.communicate(timeout=PATIENCE)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
