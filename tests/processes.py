"""The child processes of a test."""

import os
import subprocess
import sys
import time

import psutil

# The beginning of a script: `die_everywhere` runs a task in a new process for each call of the functions that `dying`
# wraps, and the process dies at that call; the last one survives. The task gets the number of the call, from 1.
DYING = """
import os
calls = last = 0
def dying(function):
    def counted(*args):
        global calls
        calls += 1
        if calls == last:
            os._exit(9)
        return function(*args)
    return counted

def die_everywhere(task):
    global last
    code = 9
    while code == 9:
        last += 1
        process = os.fork()
        if not process:
            task(last)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    raise SystemExit(code)
"""
PATIENCE = 60  # seconds, for what should take well under one
MARK = "RCNN_TEST_PROCESSES"  # environment variable that the processes of one pytest share

# Waits until the process that started it has ended, then kills all processes with its mark, until none is left.
GUARDIAN = """
import os, signal, sys
if os.fork():
    os._exit(0)  # the rest runs in a process that is no child of the tests' process
sys.stdin.read()
found = True
while found:
    found = False
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/environ", "rb") as file:
                is_marked = sys.argv[1].encode() in file.read().split(b"\\0")
            if is_marked:
                os.kill(int(number), signal.SIGKILL)
        except OSError:  # it has ended, or belongs to another user
            continue
        found = found or is_marked
"""


def end_children_with_this_process():
    """Starts a guardian that kills this process's later children and theirs when this process ends, however it ends.

    The guardian reads from a pipe of which this process has the only other end. It finds the processes by a mark in
    their environment, which they inherit.
    """
    os.environ[MARK] = f"{os.getpid()}-{time.time_ns()}"
    read, _ = os.pipe()
    command = [sys.executable, "-S", "-c", GUARDIAN, f"{MARK}={os.environ[MARK]}"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run(command, stdin=read, env={}, start_new_session=True, check=True, **quiet)
    os.close(read)


def is_alive(number):
    """Whether the process with this id runs; one that has ended and that nothing has waited for does not."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def children():
    """Living child processes, without multiprocessing's own resource tracker, which ends with the parent."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(child.cmdline())
    ]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
