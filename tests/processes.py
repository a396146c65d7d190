"""The child processes of a test."""

import time

import psutil

# The beginning of a script: functions that `dying` wraps count their calls together; the process dies at call {number}.
DYING = """
import os
calls = 0
def dying(function):
    def counted(*args):
        global calls
        calls += 1
        if calls == {number}:
            os._exit(9)
        return function(*args)
    return counted
"""
PATIENCE = 60  # seconds, for what should take well under one


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
