"""Signals and stalls, in processes of their own: what they do to a main thread that never returns to Python."""

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from training.watchdog import STALLED

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 20  # seconds, from when a process is ready, for what should take well under one
# hashlib's C code holds the main thread for minutes without looking at signals, as a TensorFlow step does.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
PROGRAM = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from training import watchdog
dog = watchdog.Watchdog("test")
"""
# The watchdog's clock stands still; `advance` moves it, and returns after the watchdog has looked at the new time.
CLOCK = f"""
import select, signal, sys, time, types
sys.path.insert(0, {str(ROOT)!r})
from training import watchdog
now, looks = 1000.0, 0

def look(*arguments):
    global looks
    looks += 1
    return select.select(*arguments[:3], 0.001)

def advance(seconds):
    global now
    now += seconds
    enough = looks + 2  # the watchdog may have looked at the clock already since it last called `look`
    deadline = time.monotonic() + {PATIENCE}
    while looks < enough:
        time.sleep(0.001)
        if time.monotonic() > deadline:
            sys.exit("the watchdog no longer looks at the clock")

watchdog.time = types.SimpleNamespace(monotonic=lambda: now)
watchdog.select = types.SimpleNamespace(select=look)
dog = watchdog.Watchdog("test")
"""


@contextlib.contextmanager
def running(program, beginning=PROGRAM):
    """A process that has printed "ready"; it is killed at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", beginning + program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(process):
    """(exit code, what it wrote to stderr)"""
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


def run_to_the_end(program):
    """(exit code, lines on stdout, what it wrote to stderr) of a program with the clock that stands still."""
    done = subprocess.run([sys.executable, "-c", CLOCK + program], capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_before_training_a_signal_ends_the_process(number, code):
    with running(f"print('ready', flush=True); {BUSY}") as process:
        process.send_signal(number)
        returncode, errors = finish(process)
    assert returncode == code
    assert errors == f"test: {number.name}: ended at once\n"


def test_in_training_the_first_signal_is_noted_and_the_second_ends_the_process():
    with running(f"dog.start(timeout=1e9); print('ready', flush=True); {BUSY}") as process:
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline().startswith("test: SIGTERM: finishing the step, then saving")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        returncode, errors = finish(process)
    assert returncode == 130
    assert errors == "test: SIGINT: ended at once, without saving\n"


def test_a_noted_signal_can_be_read():
    program = (
        "dog.start(timeout=1e9); print('ready', flush=True)\n"
        "while not dog.signal: time.sleep(0.01)\n"
        "sys.exit(dog.signal)"
    )
    with running(program) as process:
        process.send_signal(signal.SIGTERM)
        assert finish(process)[0] == signal.SIGTERM


def test_other_signals_are_left_to_their_own_handlers():
    code, lines, errors = run_to_the_end(
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))\n"
        "signal.raise_signal(signal.SIGUSR1)\n"
        "advance(0)\n"
        "dog.start(timeout=10)\n"
        "signal.raise_signal(signal.SIGUSR1)\n"
        "advance(0)\n"
        "print(dog.signal)"
    )
    assert (code, lines, errors) == (0, ["handled", "handled", "0"], "")


@pytest.mark.parametrize(
    ("explain", "cause"), [("lambda: 'no data'", "no data"), ("lambda: ''", "unknown"), ("lambda: 1 / 0", "unknown")]
)
def test_a_run_that_hangs_is_ended_with_its_cause_and_stacks(explain, cause):
    code, _, errors = run_to_the_end(
        "def hanging_function():\n"
        f"    dog.start(timeout=10, explain={explain})\n"
        "    advance(12)\n"
        "advance(10**6)\n"  # before the start no progress is expected
        "hanging_function()"
    )
    assert code == STALLED == 6
    assert "in hanging_function" in errors
    message = f"test: nothing has moved for 12 s (before the first step): {cause}; the stacks are above"
    assert errors.splitlines()[-1] == message


def test_a_stall_is_noticed_by_the_real_clock_too():
    with running(f"print('ready', flush=True); dog.start(timeout=0.01); {BUSY}") as process:
        returncode, errors = finish(process)
    assert returncode == STALLED
    assert "test: nothing has moved for " in errors.splitlines()[-1]


def test_a_run_that_moves_is_left_alone():
    code, lines, errors = run_to_the_end(
        "dog.start(timeout=10)\n"
        "for number in range(30):\n"
        "    advance(9); dog.moved(f'in part {number}')\n"
        "advance(10)\n"
        "print('alive', flush=True)\n"
        "advance(1)\n"
        "print('still alive', flush=True)"
    )
    assert (code, lines) == (STALLED, ["alive"])
    assert errors.splitlines()[-1].startswith("test: nothing has moved for 11 s (in part 29): unknown")


def test_after_training_standing_still_is_allowed():
    code, lines, errors = run_to_the_end("dog.start(timeout=10); dog.stop(); advance(10**6); print('alive')")
    assert (code, lines, errors) == (0, ["alive"], "")


def test_once_it_is_known_how_a_run_ends_a_signal_does_not_change_it():
    program = f"dog.start(timeout=1e9); dog.stop(3); dog.stop(4); dog.stop(); print('ready', flush=True); {BUSY}"
    with running(program) as process:
        process.send_signal(signal.SIGTERM)
        assert finish(process) == (3, "")


def test_a_signal_after_training_ends_the_process_and_saves_nothing_more():
    with running(f"dog.start(timeout=1e9); dog.stop(); print('ready', flush=True); {BUSY}") as process:
        process.send_signal(signal.SIGTERM)
        assert finish(process) == (143, "test: SIGTERM: ended at once\n")


def test_slow_steps_get_more_patience():
    code, lines, errors = run_to_the_end(
        "print(dog.patience())\n"
        "dog.start(timeout=50)\n"
        "print(dog.patience())\n"
        "for number, seconds in enumerate([1, 4, 49], 1):\n"
        "    advance(seconds); dog.finished_step(number)\n"
        "print(dog.patience())\n"  # 20 times the median, 4
        "advance(80)\n"
        "print('alive', flush=True)\n"
        "advance(1)\n"
        "print('still alive', flush=True)"
    )
    assert (code, lines) == (STALLED, ["0.0", "50", "80.0", "alive"])
    assert errors.splitlines()[-1].startswith("test: nothing has moved for 81 s (in step 4): unknown")


def test_the_last_101_steps_count():
    code, lines, _ = run_to_the_end(
        "def steps(count, seconds):\n"
        "    global now\n"
        "    for number in range(count):\n"
        "        now += seconds; dog.finished_step(number)\n"
        "    print(dog.patience())\n"
        "steps(51, 9)\n"
        "steps(50, 1)\n"  # 51 of 9 s and 50 of 1 s
        "steps(1, 1)"  # the first one is forgotten
    )
    assert (code, lines) == (0, ["180.0", "180.0", "20.0"])
