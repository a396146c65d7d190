"""Computes results ahead of their use: in threads, or in worker processes whose death is always detected."""

import atexit
import contextlib
import fcntl
import logging
import multiprocessing
import os
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import cv2

from common.errors import DataError
from config import UserError

logger = logging.getLogger(__name__)

# Results per worker that may be computed ahead of their turn; bounds the memory.
LOOKAHEAD_PER_WORKER = 3
# Linux's default limit for unprivileged users (fs.pipe-max-size).
PIPE_BYTES = 2**20


def map_ahead(
    function: Callable, items: Iterable, *, num_threads: int, num_ahead: int, early: bool = False
) -> Iterator:
    """Yields `function(item)` for each item, in order; threads compute up to `num_ahead` results in advance.

    Meant for functions that release the interpreter's lock. Exceptions of `function` are raised here, in the result's
    turn.

    Args:
        early: yield a result as soon as it is done; by default, first take items until `num_ahead` are in advance.
    """
    executor, pending = ThreadPoolExecutor(num_threads), deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > num_ahead or (early and pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


class OrderedMap:
    """Iterator over `function(task)` for an endless stream of tasks, in order, computed ahead by spawned processes.

    `function` and tasks must be picklable. With `num_workers=0`, the calling process computes each result on request.

    Iteration ends with an exception only: a UserError of `function` is raised unchanged; any other exception becomes a
    DataError that names the task, with its traceback in the log; the death of a worker and a call of `close` raise
    DataError.

    Each worker has its own pipes, so that its death is always detected and its task is known. (The workers of
    concurrent.futures share one pipe: if a worker is killed while it writes megabytes, the reader waits for the rest
    for ever.)
    """

    def __init__(self, function: Callable[[Any], Any], tasks: Iterable, *, num_workers: int):
        self._function, self._tasks = function, iter(tasks)
        self._num_sent = self._num_given = 0
        self._done = {}  # number of the task: outcome
        self._busy = {}  # pipe of a worker's results: (worker, number, task)
        self._free = [_start_worker(function) for _ in range(num_workers)]
        self._num_ahead = LOOKAHEAD_PER_WORKER * num_workers
        self._stop = weakref.finalize(self, _stop_workers, [worker.process for worker in self._free])
        # Registered last, it runs before multiprocessing's own exit handler, which would look like the workers' death.
        self._stop.atexit = False
        atexit.register(self._stop)

    def __iter__(self):
        return self

    def __next__(self):
        try:
            self._check_open()
            outcome = self._receive_next() if self._num_ahead else _try(self._function, next(self._tasks))
            return _unwrap(*outcome)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the iteration and kills the workers, even in the middle of a task. May be called from any thread."""
        atexit.unregister(self._stop)
        self._stop()

    def awaited(self) -> str:
        """Returns a description of the task that the next result waits for, and its worker; "" if there is none."""
        for worker, number, task in list(self._busy.values()):
            if number == self._num_given:
                return f"{task}, in worker {worker.process.pid}"
        return ""

    def _receive_next(self):
        self._exchange(timeout=0)
        while self._num_given not in self._done:
            self._exchange(timeout=None)
        self._num_given += 1
        return self._done.pop(self._num_given - 1)

    def _exchange(self, timeout):
        """Receives finished results (with timeout None, waits for one), then gives every free worker a task."""
        for results in wait(self._busy, timeout):
            worker, number, task = self._busy.pop(results)
            with self._detecting_death(worker, task):
                self._done[number] = results.recv()
            self._free.append(worker)
        while self._free and self._num_sent < self._num_given + self._num_ahead:
            worker, task = self._free.pop(), next(self._tasks)
            self._busy[worker.results] = worker, self._num_sent, task
            self._num_sent += 1
            with self._detecting_death(worker, task):
                worker.tasks.send(task)

    @contextlib.contextmanager
    def _detecting_death(self, worker, task):
        try:
            yield
        except (EOFError, OSError):
            self._check_open()
            worker.process.join()
            raise DataError(f"a data worker {_cause_of_death(worker.process)} while it prepared {task}") from None

    def _check_open(self):
        if not self._stop.alive:
            raise DataError("the stream of training data has been closed")


class Worker(NamedTuple):
    """A worker process and this process's ends of its two pipes."""

    process: multiprocessing.Process
    tasks: Connection  # to the worker
    results: Connection  # from the worker: tuples of `_try`


def _start_worker(function):
    context = multiprocessing.get_context("spawn")
    (their_tasks, tasks), (results, their_results) = context.Pipe(duplex=False), context.Pipe(duplex=False)
    # An image fills Linux's default of 64 KiB dozens of times. The request fails if the user's pipes exceed a limit.
    with contextlib.suppress(AttributeError, OSError):
        fcntl.fcntl(their_results.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    process = context.Process(target=_work, args=(function, their_tasks, their_results), daemon=True)
    process.start()
    # The worker now has the only copies of these ends, so its death closes the pipes.
    their_tasks.close()
    their_results.close()
    return Worker(process, tasks, results)


def _stop_workers(processes):
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _cause_of_death(process):
    if process.exitcode >= 0:
        return f"ended with exit code {process.exitcode}"
    hint = ": out of memory?" if process.exitcode == -signal.SIGKILL else ""
    return f"was killed ({signal.Signals(-process.exitcode).name}{hint})"


def _work(function, tasks, results):
    """Runs a worker process until its parent ends."""
    for interruption in (signal.SIGINT, signal.SIGTERM):
        # A terminal or scheduler often signals all processes at once; the parent still needs data to finish its step.
        signal.signal(interruption, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    cv2.setNumThreads(1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            results.send(_try(function, tasks.recv()))


def _exit_with_parent():
    """Ends the process when its parent ends, even in the middle of a task."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _try(function, task):
    """Returns (result, None, None); after a failure (None, UserError to raise, traceback of any other exception)."""
    try:
        return function(task), None, None
    except UserError as error:
        return None, error, None
    except Exception as error:
        message = f"{task}: {type(error).__name__}: {' '.join(str(error).split())}"
        return None, DataError(message), traceback.format_exc()


def _unwrap(result, error, trace):
    """Returns the result of `_try`, or logs its traceback and raises its error."""
    if trace:
        logger.error("%s\n%s", error, trace)
    if error:
        raise error
    return result
