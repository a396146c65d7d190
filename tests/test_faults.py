"""What goes wrong in long runs, planted in real ones (see faulty_train.py): exit code, message, and what is left.

The core of it runs with every test, in test_train.py; this takes long.
"""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from processes import wait_until
from test_train import ROOT, SETTINGS

from common import checkpoint, weights
from dataset import shapes

pytestmark = pytest.mark.long

EVERY_EPOCH = ["TRAIN.CHECKPOINT_PERIOD=1", "TRAIN.EVAL_PERIOD=1"]  # an epoch has 6 steps, a run 12
STALL = "TRAIN.STALL_TIMEOUT=30"
MARK = "RCNN_TEST_RUN"


@pytest.fixture(scope="module")
def basedir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    shapes.generate(directory, train=10, val=4, size=64, seed=3)
    return directory


@pytest.fixture
def start(basedir, tmp_path):
    """A function that starts a run in tmp_path / "run", with a fault and more settings; kills what is left of it."""
    mark = f"{tmp_path.name}-{os.getpid()}"

    def start(fault="", *settings, flags=(), num_ranks=1, fault_rank=0, **options):
        launcher = [Path(sys.executable).with_name("horovodrun"), "-np", str(num_ranks)] if num_ranks > 1 else []
        if launcher:
            pytest.importorskip("horovod", reason="Horovod is not installed: make horovod")
            settings = [*settings, "TRAINER=horovod", "TRAIN.BATCH_SIZE_PER_GPU=1"]
        program = [sys.executable, ROOT / "tests" / "faulty_train.py", "--logdir", tmp_path / "run", *flags]
        return subprocess.Popen(
            [*launcher, *program, "--config", *SETTINGS, *EVERY_EPOCH, f"DATA.BASEDIR={basedir}", *settings],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "FAULT": fault, "FAULT_RANK": str(fault_rank), MARK: mark},
            **options,
        )

    start.processes = lambda: [process for process in psutil.process_iter() if is_marked(process, mark)]
    yield start
    for process in start.processes():
        process.kill()


def is_marked(process, mark):
    try:
        return process.environ().get(MARK) == mark
    except psutil.Error:
        return False


def finish(start, process):
    """(exit code, output) of a run of which no process is left a little later."""
    output, _ = process.communicate()
    wait_until(lambda: not start.processes())
    return process.returncode, output


def last_line(output):
    return output.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("fault", "settings", "code", "messages"),
    [
        # positions 0 to 23 are trained on, two in a step; checkpoints are saved at steps 6 and 12
        ("nan_in_weight=8", [], 3, ["not finite at step 8: images ", "wd_cost=nan", "good checkpoint: ", "model-6"]),
        ("nan_in_image=17", [], 3, ["not finite at step 9: images ", "gradient norm=nan", "model-6", "-rank0.npz"]),
        ("worker_raises=17", [], 4, ["ValueError: planted", "image "]),
        ("worker_raises=17", ["DATA.NUM_WORKERS=0"], 4, ["ValueError: planted", "image "]),
        ("worker_killed=17", [], 4, ["a data worker was killed (SIGKILL: out of memory?) while it prepared image "]),
        (
            "worker_sleeps=17",
            [STALL],
            6,
            ["nothing has moved for ", "no data for ", "waiting for image ", "in worker "],
        ),
        ("sleeps_in_step=8", [STALL], 6, ["nothing has moved for ", "in step 8", "the step does not end"]),
        ("killed_in_step=8", [], -signal.SIGKILL, []),
        ("sigterm_in_step=8", [], 143, ["stopped by SIGTERM; --resume continues"]),
        ("sigint_in_step=8", [], 130, ["stopped by SIGINT; --resume continues"]),
        ("sigterm_in_evaluation", [], 143, ["stopped by SIGTERM; --resume continues"]),
        ("sigterm_while_saving", [], 143, ["stopped by SIGTERM; --resume continues"]),
        ("sigterm_before_training", [], 143, ["SIGTERM: ended at once"]),
    ],
)
def test_one_process(start, tmp_path, fault, settings, code, messages):
    found_code, output = finish(start, start(fault, *settings))
    assert found_code == code, output
    assert all(message in last_line(output) for message in messages), last_line(output)
    assert "Traceback" not in output or fault.startswith("worker_raises")  # that one is the worker's
    if fault != "sigterm_before_training":
        assert checkpoint.has_checkpoint(tmp_path / "run")
        assert "Saved" in output
        assert np.isfinite(weights.newest_readable(tmp_path / "run").values["fastrcnn/fc6/W"]).all()


@pytest.mark.parametrize(
    ("fault", "settings", "messages"),
    [
        ("raises_in_step=8", [], ["[1]<stderr>:ValueError: planted", "Process 1 exit with status code 1"]),
        ("killed_in_step=8", [], ["[0]<stderr>:train.py: rank 0 has lost another rank", "Exit code: 137"]),
        ("sleeps_in_step=8", [STALL], ["nothing has moved for "]),
        ("worker_raises=17", [], ["[1]<stderr>:train.py: image ", "ValueError: planted"]),
        ("nan_in_weight=8", [], ["[1]<stderr>:train.py: ", "[0]<stderr>:train.py: ", "Exit code: 3", "-rank1.npz"]),
        ("sigterm_in_step=8", [], ["[0]<stderr>:train.py: stopped by SIGTERM", "Exit code: 143"]),
        ("sigterm_in_evaluation", [], ["[0]<stderr>:train.py: stopped by", "[1]<stderr>:train.py: stopped by"]),
    ],
)
def test_second_rank_of_two(start, tmp_path, fault, settings, messages):
    code, output = finish(start, start(fault, *settings, num_ranks=2, fault_rank=1))
    assert code != 0
    assert all(message in output for message in messages), output[-3000:]
    newest = weights.newest_readable(tmp_path / "run").path
    # A signal that comes during a step is told to the others in the next.
    assert newest.name == ("model-9" if fault.startswith("sigterm_in_step") else "model-6")


def test_a_signal_to_the_launcher_reaches_the_ranks_in_time_to_save(start, tmp_path):
    process = start("", "TRAIN.LR_SCHEDULE=[1000]", "TRAIN.EVAL_PERIOD=0", num_ranks=2)
    line = next(line for line in process.stdout if "Saved" in line)
    periodic = int(re.search(r"model-(\d+)", line)[1])
    process.send_signal(signal.SIGTERM)
    _, output = finish(start, process)
    assert "[0]<stderr>:train.py: stopped by SIGTERM" in output
    assert weights.newest_readable(tmp_path / "run").step > periodic


def test_killed_at_random_moments_it_goes_on_from_where_it_was(start, tmp_path):
    """Kills a run that saves after every step, 20 times; steps are lost only between a save and the kill."""
    every_step = ["TRAIN.STEPS_PER_EPOCH=1", "TRAIN.LR_SCHEDULE=[1000]", "TRAIN.EVAL_PERIOD=0"]
    rng, last, lost = random.Random(0), 0, []
    for _ in range(20):
        process = start("", *every_step, flags=["--resume"])
        for line in process.stdout:
            if "Saved" in line:
                break
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        output = process.stdout.read()
        started = [int(word) for word in re.findall(r"Start Epoch (\d+)", output)]
        assert finish(start, process)[0] == -signal.SIGKILL
        step = weights.newest_readable(tmp_path / "run").step
        assert step > last
        lost.append(max([*started, step]) - step)
        last = step
    print(f"steps lost per kill: {lost}")
    assert max(lost) <= 1


def limit_files():
    """No file may grow above 1 MB: a checkpoint of the tiny model has 2.2 MB. What stands for a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))


def test_full_disk(start, tmp_path):
    code, output = finish(start, start("", preexec_fn=limit_files))
    assert code == 5, output[-2000:]
    assert "the last checkpoint can't be written" in last_line(output)
    assert output.count("can't be written to") >= 3  # at each epoch, and at the end
    assert not checkpoint.has_checkpoint(tmp_path / "run")
    assert output.count("no more events for TensorBoard") == 1
    assert json.loads((tmp_path / "run" / "stats.json").read_text())[-1]["global_step"] == 12


def test_memory_does_not_grow(start):
    """From step 1,000 to 3,000 of the tiny model, its process and the data worker grow by less than 2 KB per step.

    A leak grows all the time: the one largest growth of 250 steps is left out, as the allocator takes 8 MB at a time.
    """
    process = start("", "TRAIN.LR_SCHEDULE=[813]", "TRAIN.STEPS_PER_EPOCH=250", "TRAIN.EVAL_PERIOD=0")
    sizes = []
    for line in process.stdout:
        if "Start Epoch" in line:
            sizes.append(sum(each.memory_info().rss for each in start.processes()))
    assert finish(start, process)[0] == 0
    growth = np.diff(sizes[4:13])  # epochs of 250 steps, as they begin
    assert len(growth) == 8
    slope = (growth.sum() - growth.max()) / (7 * 250)
    print(f"memory in MB at every 250 steps: {[size // 10**6 for size in sizes]}; {slope:.0f} bytes per step")
    assert slope < 2000
