"""A thread that receives signals, and ends a stalled run, while the main thread is inside TensorFlow.

Python runs its signal handlers in the main thread, between two of its own instructions: during a step that hangs,
never. Here a signal wakes a thread, which also knows when the run last made progress. This file imports no TensorFlow,
because the watchdog starts before everything else.
"""

import collections
import contextlib
import faulthandler
import os
import select
import signal
import statistics
import sys
import threading
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STALLED = 6  # exit code
STEPS_OF_PATIENCE = 20  # a run of long steps may take this many times the median step
REMEMBERED_STEPS = 101  # of which the median is taken
POLL_SECONDS = 0.5


class Watchdog:
    """Receives SIGINT and SIGTERM, and ends the process if it stalls; one for each process.

    Before `start` there is nothing to save: a signal ends the process. After it, the first signal only sets `signal`,
    which the training reads after each step; a second ends the process at once. The exit code is 128 + the signal.

    The process ends without Python's clean-up, which would wait for the threads that hang. Data workers notice the end
    of their parent by themselves.

    Attributes:
        signal: int, the first signal that arrived after `start`, or 0.
    """

    def __init__(self, name="train.py"):
        self.signal = 0
        self._exit_code = None  # set by `stop`: how the run ends
        self._name = name
        self._is_running = False
        self._moved, self._doing = time.monotonic(), "starting"
        self._timeout = 0.0
        self._steps = collections.deque(maxlen=REMEMBERED_STEPS)
        self._explain = lambda: ""
        self._wake, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def start(self, *, timeout, explain=lambda: ""):
        """Leaves the first signal to the training, and requires progress of it.

        Args:
            timeout: seconds without progress after which the process ends; see `patience` for long steps.
            explain: called then; returns a text on the cause, or "".
        """
        self._timeout, self._explain, self._is_running = timeout, explain, True
        self.moved("before the first step")

    def moved(self, doing):
        """Reports progress. `doing`: the next activity, for the message if that never ends."""
        self._doing, self._moved = doing, time.monotonic()

    def finished_step(self, step):
        """Reports the end of the training step `step`."""
        self._steps.append(time.monotonic() - self._moved)
        self.moved(f"in step {step + 1}")

    def stop(self, exit_code=None):
        """Ends the watch: no more progress is required, and a signal ends the process.

        Its exit code is then `exit_code` where that is given, because the launcher of several ranks sends signals to
        the others as soon as the first has ended.
        """
        self._is_running = False
        self._exit_code = exit_code if self._exit_code is None else self._exit_code

    def patience(self):
        """The seconds without progress that are allowed."""
        return max(self._timeout, STEPS_OF_PATIENCE * statistics.median(self._steps or [0.0]))

    def _watch(self):
        while True:
            if select.select([self._wake], [], [], POLL_SECONDS)[0]:
                for number in os.read(self._wake, 64):
                    if number in SIGNALS:
                        self._on_signal(number)
            if self._is_running and time.monotonic() - self._moved > self.patience():
                self._on_stall()

    def _on_signal(self, number):
        name = signal.Signals(number).name
        if self._is_running and not self.signal:
            self._print(f"{name}: finishing the step, then saving; a second signal ends it at once")
            self.signal = number
            return
        if self._exit_code is not None:
            os._exit(self._exit_code)
        self._exit(128 + number, f"{name}: ended at once" + (", without saving" if self._is_running else ""))

    def _on_stall(self):
        seconds = time.monotonic() - self._moved
        cause = "unknown"
        with contextlib.suppress(Exception):
            cause = self._explain() or cause
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._exit(STALLED, f"nothing has moved for {seconds:.0f} s ({self._doing}): {cause}; the stacks are above")

    def _print(self, message):
        # Not through sys.stderr: the thread that hangs may hold its lock.
        with contextlib.suppress(OSError):
            os.write(2, f"{self._name}: {message}\n".encode())

    def _exit(self, code, message):
        self._print(message)
        os._exit(code)
