"""The processes of the tests themselves: none outlives the pytest that started it."""

import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest

# Starts a shell with a child, both in a session of their own, writes their ids and is killed.
KILLED = f"""
import os, signal, subprocess, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import processes
processes.end_children_with_this_process()
assert not processes.children()
command = ["sh", "-c", "sleep 1000 & echo $$ $!; wait"]
child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
print(child.stdout.readline(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_children_and_their_children_end_with_a_killed_parent():
    done = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -9
    child, grandchild = map(int, done.stdout.split())
    processes.wait_until(lambda: not processes.is_alive(child) and not processes.is_alive(grandchild))


def test_the_tests_mark_their_processes():
    assert os.environ[processes.MARK].startswith(f"{os.getpid()}-")
