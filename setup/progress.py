"""Runs the long commands of the set-up: output to a log, progress on the terminal, one clear line on failure."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time

HEARTBEAT_SECONDS = 20
ERROR_LINES = 5
TAIL_LINES = 10
ERROR = re.compile(r"(^CMake Error|\berror:)")
# the lines of pip's and cmake's output that show their progress
MILESTONE = re.compile(r"(\[ *\d+%\]|Collecting|Processing|Downloading|Building|Installing) .*")


class SetupError(Exception):
    """An error that the user can fix, described in one line."""


def last_lines(path, count):
    """Returns up to `count` last non-empty lines of the text file `path`."""
    lines = path.read_text(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()][-count:]


def symptoms(path):
    """Returns the lines of the log `path` that most likely show why a command failed: its first errors, and its end."""
    lines = last_lines(path, 1_000_000)
    errors = [line for line in lines[:-TAIL_LINES] if ERROR.search(line)]
    return errors[:ERROR_LINES] + lines[-TAIL_LINES:]


def milestone(path):
    """Returns the last line of the log `path` that shows progress, or ""."""
    return next((line for line in reversed(last_lines(path, 1000)) if MILESTONE.match(line)), "")


@contextlib.contextmanager
def hold_lock(path, *, waiting):
    """Locks the file `path` against other processes; prints `waiting` if it has to wait for one of them.

    Commands that `run_logged` starts meanwhile hold the lock, too: if this process is killed, it lasts until they end.
    """
    with open(path, "w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def stop(process):
    """Ends `process` and all processes that it started: by SIGTERM, and after ten seconds by SIGKILL."""
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run_logged(command, *, log, env):
    """Runs `command` with its output in the file `log`; raises SetupError with the end of that output if it fails.

    Every HEARTBEAT_SECONDS it prints the time since the start and the last line that shows progress.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(log, "wb") as output:
        # a session of its own, so that an interrupt reaches the whole tree (pip, cmake, make, g++) through stop()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            close_fds=False,
        )
    try:
        while True:
            try:
                code = process.wait(timeout=HEARTBEAT_SECONDS)
                break
            except subprocess.TimeoutExpired:
                print(f"  {time.monotonic() - start:4.0f} s: {milestone(log)[:100]}", flush=True)
    except BaseException:
        stop(process)
        raise
    if code:
        for line in symptoms(log):
            print("  | " + line[:200], file=sys.stderr)
        raise SetupError(f"{log.stem} failed with exit code {code}: its whole output is in {log}")


def main_wrapper(main, arguments):
    """Calls `main(arguments)`; turns SetupError, OSError and signals into one line and a non-zero exit code."""

    def on_signal(number, _frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGHUP, on_signal)
    try:
        main(arguments)
    except SetupError as error:
        sys.exit(f"set-up: {error}")
    except OSError as error:
        sys.exit(f"set-up: {error}")
    except KeyboardInterrupt:
        print("set-up: interrupted; run the same make again to continue", file=sys.stderr)
        sys.exit(130)
