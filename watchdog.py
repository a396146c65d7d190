"""Signals, and a run that stands still: a thread that answers while the main thread is deep inside TensorFlow.

Python runs its signal handlers in the main thread between two of its own instructions, so during a step that hangs
never. Here the arrival of a signal wakes a thread, which also knows when the run last moved. Imports no TensorFlow: it
is started before anything else.
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
STEPS_OF_PATIENCE = 20  # a run of long steps is given this many times the median step
REMEMBERED_STEPS = 101
POLL_SECONDS = 0.5


class Watchdog:
    """Takes SIGINT and SIGTERM, and ends the process when it stops moving; one for each process.

    Before `start` there is nothing to save: a signal ends the process. After it, the first signal only sets `signal`,
    which the training looks at after each step; a second ends the process at once. The exit code is 128 + the signal.

    A process ends without Python's clean-up, which would wait for the very threads that hang. Data workers notice the
    death of their parent by themselves.
    """

    def __init__(self, name="train.py"):
        self.signal = 0  # the first signal that arrived after `start`, or 0
        self._exit_code = None  # once it is known how the run ends
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
        """From now on signals are left to the training, and it must move.

        Args:
            timeout: seconds without a sign of life after which the process ends; longer where steps are long.
            explain: called then; returns what is known of the cause, or "".
        """
        self._timeout, self._explain, self._is_running = timeout, explain, True
        self.moved("before the first step")

    def moved(self, doing):
        """A sign of life; `doing` says in a few words what comes next, for the message if it never ends."""
        self._doing, self._moved = doing, time.monotonic()

    def finished_step(self, step):
        """A sign of life after the training step `step`."""
        self._steps.append(time.monotonic() - self._moved)
        self.moved(f"in step {step + 1}")

    def stop(self, exit_code=None):
        """The training is over: standing still is allowed again, and a signal ends the process.

        With the exit code that is given: the launcher of several ranks sends signals as soon as the first has ended.
        """
        self._is_running = False
        self._exit_code = exit_code if self._exit_code is None else self._exit_code

    def patience(self):
        """Seconds without a sign of life that are allowed."""
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
            self._say(f"{name}: finishing the step, then saving; a second signal ends it at once")
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

    def _say(self, message):
        # Not through sys.stderr: its lock may be held by the thread that hangs.
        with contextlib.suppress(OSError):
            os.write(2, f"{self._name}: {message}\n".encode())

    def _exit(self, code, message):
        self._say(message)
        os._exit(code)
