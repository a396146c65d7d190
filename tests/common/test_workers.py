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
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import psutil
import pytest
from processes import PATIENCE, children, wait_until

from common import workers
from common.errors import DataError
from common.workers import OrderedMap, map_ahead
from config import UserError

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


def refuse(task):
    raise (KeyboardInterrupt if task == 2 else UserError)(f"no {task}\n  please")


@pytest.mark.parametrize(
    ("first", "raised", "message"), [(1, UserError, "^no 1\n  please$"), (2, KeyboardInterrupt, "^no 2\n  please$")]
)
def test_errors_for_the_user_and_interrupts_are_raised_unchanged_and_close_the_stream(caplog, first, raised, message):
    results = OrderedMap(refuse, itertools.count(first), num_workers=0)
    with pytest.raises(raised, match=message) as error:
        next(results)
    assert error.type is raised
    assert not caplog.records
    with pytest.raises(DataError, match="the stream of training data has been closed"):
        next(results)


def test_without_workers_each_result_is_computed_on_request():
    tasks = itertools.count()
    results = OrderedMap(abs, tasks, num_workers=0)
    assert [next(results), next(results)] == [0, 1]
    assert next(tasks) == 2
    assert results.awaited() == ""
    busy = [SimpleNamespace(process=SimpleNamespace(pid=pid)) for pid in (11, 12, 13)]
    results._num_given = 4
    results._busy = {0: (busy[0], 6, "g"), 1: (busy[1], 4, "e"), 2: (busy[2], 5, "f")}
    assert results.awaited() == "e, in worker 12"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "ended with exit code 0"),
        (3, "ended with exit code 3"),
        (-signal.SIGKILL, "was killed (SIGKILL: out of memory?)"),
        (-signal.SIGSEGV, "was killed (SIGSEGV)"),
    ],
)
def test_how_a_worker_ended_is_told(code, text):
    assert workers._cause_of_death(SimpleNamespace(exitcode=code)) == text
    assert DataError.exit_code == 4


def about_the_worker(task):
    if task == 40:
        os._exit(3)
    return os.getpid(), cv2.getNumThreads(), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.slow
def test_workers_use_one_thread_ignore_signals_and_compute_three_results_ahead_each():
    taken = []
    results = OrderedMap(about_the_worker, (taken.append(task) or task for task in itertools.count()), num_workers=2)
    found = [next(results)]
    results._exchange(timeout=0)
    while results._busy:
        results._exchange(timeout=None)
    assert taken == list(range(1 + 2 * 3))
    found += [next(results) for _ in range(8)]
    assert [each[1:] for each in found] == [(1, [signal.SIG_IGN, signal.SIG_IGN])] * 9
    assert os.getpid() not in {each[0] for each in found}
    with pytest.raises(DataError, match="^a data worker ended with exit code 3 while it prepared 40$"):
        for _ in range(40):
            next(results)  # those before it may be lost


@pytest.mark.parametrize("early", [False, True])
def test_map_ahead_keeps_the_order_and_takes_no_more_items_than_it_may(early):
    taken, inside, largest = [], [], []

    def items():
        for item in range(20):
            taken.append(item)
            yield item

    def function(item):
        inside.append(item)
        largest.append(len(inside))
        inside.remove(item)
        return -item

    results = map_ahead(function, items(), num_threads=2, num_ahead=3, early=early)
    for number, result in enumerate(results):
        assert result == -number
        assert len(taken) <= min(20, number + 4)
        assert early or len(taken) == min(20, number + 4)
    assert number == 19
    assert max(largest) <= 2


def test_map_ahead_gives_a_result_early_only_where_asked_to():
    """The items end in an error: with `early` the first result is given before it, as its computation is done."""

    def items():
        yield 1
        yield 2
        raise DataError("no more items")

    done = SimpleNamespace(submit=lambda function, item: finished(function(item)), shutdown=lambda **_: None)
    for early, expected in ((True, [-1, -2]), (False, [])):
        found = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workers, "ThreadPoolExecutor", lambda _: done)
            with pytest.raises(DataError, match="no more items"):
                found.extend(map_ahead_into(found, items(), early))
        assert found == expected


def finished(result):
    future = Future()
    future.set_result(result)
    return future


def map_ahead_into(found, items, early):
    for result in map_ahead(lambda item: -item, items, num_threads=1, num_ahead=5, early=early):
        found.append(result)
    return []


def test_map_ahead_raises_an_error_in_its_turn_and_drops_the_rest(monkeypatch):
    started, ends = [], []

    class Recorded(ThreadPoolExecutor):
        def shutdown(self, **options):
            ends.append(options)
            super().shutdown(**options)

    monkeypatch.setattr(workers, "ThreadPoolExecutor", Recorded)

    def function(item):
        started.append(item)
        return 6 // (2 - item)

    results = map_ahead(function, range(1000), num_threads=1, num_ahead=5)
    assert [next(results), next(results)] == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(started) <= 8
    assert ends == [{"cancel_futures": True}]


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
def test_close_from_another_thread_ends_a_stuck_stream(monkeypatch):
    results = OrderedMap(stuck_after_4, itertools.count(), num_workers=2)
    pids = {next(results) for _ in range(4)}
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)  # Workers outlive it: the parent may want to finish its step.
    raised = []

    def consume():
        try:
            next(results)
        except DataError as error:
            raised.append(str(error))

    waits = threading.Event()

    def announced(pipes, timeout):
        if timeout is None:
            waits.set()
        return wait(pipes, timeout)

    monkeypatch.setattr(workers, "wait", announced)
    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    assert waits.wait(PATIENCE)
    assert len(children()) == 2
    assert results.awaited() in [f"4, in worker {pid}" for pid in pids]
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
