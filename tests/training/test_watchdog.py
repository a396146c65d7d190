"""Signals and stalls, in processes of their own: what they do to a main thread that never returns to Python."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from training.watchdog import STALLED

ROOT = Path(__file__).resolve().parents[2]
# hashlib's C code holds the main thread for minutes without looking at signals, as a TensorFlow step does.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
PROGRAM = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from training.watchdog import Watchdog
dog = Watchdog("test")
"""


def start(program):
    """A process that has printed "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM + program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process, timeout=20):
    """(exit code, what it wrote to stderr)"""
    try:
        _, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_before_training_a_signal_ends_the_process(number, code):
    process = start(f"print('ready', flush=True); {BUSY}")
    process.send_signal(number)
    returncode, errors = finish(process)
    assert returncode == code
    assert errors == f"test: {number.name}: ended at once\n"


def test_in_training_the_first_signal_is_noted_and_the_second_ends_the_process():
    process = start(f"dog.start(timeout=60); print('ready', flush=True); {BUSY}")
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("test: SIGTERM: finishing the step, then saving")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    returncode, errors = finish(process)
    assert returncode == 130
    assert errors == "test: SIGINT: ended at once, without saving\n"


def test_a_noted_signal_can_be_read():
    process = start("dog.start(timeout=60); print('ready', flush=True)\nwhile not dog.signal: time.sleep(0.01)")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 0


def test_a_run_that_hangs_is_ended_with_its_cause_and_stacks():
    process = start(
        "def hanging_function(): time.sleep(600)\n"
        "dog.start(timeout=0.5, explain=lambda: 'no data'); print('ready', flush=True); hanging_function()"
    )
    returncode, errors = finish(process)
    assert returncode == STALLED
    assert "in hanging_function" in errors
    last = errors.splitlines()[-1]
    assert last.startswith("test: nothing has moved for ")
    assert last.endswith(" s (before the first step): no data; the stacks are above")


def test_a_run_that_moves_is_left_alone():
    process = start(
        "dog.start(timeout=1.5); print('ready', flush=True)\nfor i in range(30): time.sleep(0.1); dog.finished_step(i)"
    )
    assert finish(process)[0] == 0


def test_after_training_standing_still_is_allowed():
    process = start("dog.start(timeout=0.2); dog.stop(); print('ready', flush=True); time.sleep(2)")
    assert finish(process)[0] == 0


def test_once_it_is_known_how_a_run_ends_a_signal_does_not_change_it():
    process = start(f"dog.start(timeout=60); dog.stop(3); dog.stop(); print('ready', flush=True); {BUSY}")
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (3, "")


def test_slow_steps_get_more_patience():
    script = PROGRAM + "\n".join(
        [
            "import itertools\nfrom training import watchdog",
            "clock = itertools.count(step=30.0)",
            "watchdog.time.monotonic = lambda: next(clock)",
            "before = dog.patience()",
            "dog._timeout = 100.0",
            "for i in range(5): dog.finished_step(i)",
            "print(before, dog.patience())",
        ]
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)
    before, after = map(float, result.stdout.split())
    assert before == 0
    assert after >= 20 * 30  # the clock moves by 30 s with each look at it
