"""train.py with a fault planted: the fault's name and number stand in $FAULT, as in "sigterm_in_step=4".

Data workers run the top of this file, too.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from common import checkpoint
from dataset.augment import ExampleMaker

FAULT, _, NUMBER = os.environ.get("FAULT", "").partition("=")
NUMBER = int(NUMBER or 0)
IS_THIS_RANK = os.environ.get("FAULT_RANK", "0") == os.environ.get("HOROVOD_RANK", "0")
WATCHDOGS = []
PATIENCE = 60  # seconds, for what should take well under one


def send(number):
    """Send this process a signal, and wait until it has been noticed."""
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + PATIENCE
    while not WATCHDOGS[0].signal:
        if time.monotonic() > deadline:
            sys.exit("the signal was not noticed")
        time.sleep(0.01)


# ---------------------------------------------------------------- in the data


def plant_in_examples(fault):
    """Do something else than making the example of position NUMBER."""
    make = ExampleMaker.__call__

    def faulty(self, task):
        if task.position == NUMBER:
            fault()
        return make(self, task)

    ExampleMaker.__call__ = faulty


def fail():
    raise ValueError("planted")


# ---------------------------------------------------------------- in the training


def plant_in_step(fault):
    """Do something right before step NUMBER."""
    from training import run

    make_callbacks = run.make_callbacks

    def with_fault(*args, **options):
        from tensorpack.callbacks import CallbackFactory

        class Fault(CallbackFactory):
            _chief_only = False

            def _before_run(self, _):
                if self.global_step + 1 == NUMBER:
                    fault(self.trainer)

        return [*make_callbacks(*args, **options), Fault()]

    run.make_callbacks = with_fault


def plant_before_first_call(module, name, fault):
    """Do something before a function is called for the first time."""
    function, calls = getattr(module, name), []

    def faulty(*args, **options):
        if not calls:
            calls.append(1)
            fault()
        return function(*args, **options)

    setattr(module, name, faulty)


def plant_in_weight(trainer):
    """NaN in a weight that training changes."""
    from tensorpack.compat import tfv1

    variable = next(v for v in tfv1.global_variables() if v.op.name == "fastrcnn/fc6/W")
    variable.load(trainer.sess.run(variable) * float("nan"), trainer.sess)


def plant_in_image():
    """NaN in the pixels of the image at position NUMBER."""
    import tensorflow as tf

    from modeling import rcnn

    build_training, normalise = rcnn.build_training, rcnn._normalise

    def build(settings, **batch):
        is_poisoned = tf.equal(batch["sample_key"][:, 1], NUMBER)
        poison = tf.where(is_poisoned, float("nan"), 0.0)[:, None, None, None]
        rcnn._normalise = lambda *args: normalise(*args) + poison
        try:
            return build_training(settings, **batch)
        finally:
            rcnn._normalise = normalise

    rcnn.build_training = build


def plant():
    """Plant $FAULT."""
    train.Watchdog.__init__ = remember(train.Watchdog.__init__)
    if FAULT.startswith("worker_"):
        faults = {
            "worker_raises": fail,
            "worker_killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "worker_sleeps": lambda: time.sleep(3600),
        }
        plant_in_examples(faults[FAULT])
    elif FAULT in ("sigterm_in_step", "sigint_in_step"):
        plant_in_step(lambda _: send(signal.SIGTERM if FAULT.startswith("sigterm") else signal.SIGINT))
    elif FAULT == "raises_in_step":
        plant_in_step(lambda _: fail())
    elif FAULT == "killed_in_step":
        plant_in_step(lambda _: os.kill(os.getpid(), signal.SIGKILL))
    elif FAULT == "sleeps_in_step":
        plant_in_step(lambda _: time.sleep(3600))
    elif FAULT == "nan_in_weight":
        plant_in_step(plant_in_weight)
    elif FAULT == "sigterm_while_saving":
        plant_before_first_call(checkpoint, "flush", lambda: send(signal.SIGTERM))
    elif FAULT == "sigterm_before_training":
        plant_before_first_call(train, "find_weights", lambda: send(signal.SIGTERM))
    elif FAULT in ("sigterm_in_evaluation", "sigint_in_evaluation"):
        from training.guards import Guard

        number = signal.SIGTERM if FAULT.startswith("sigterm") else signal.SIGINT
        plant_before_first_call(Guard, "check", lambda: send(number))
    elif FAULT == "nan_in_image":
        plant_in_image()
    elif FAULT:
        sys.exit(f"no such fault: {FAULT}")


def remember(function):
    def remembered(self, *args):
        WATCHDOGS.append(self)
        function(self, *args)

    return remembered


if IS_THIS_RANK and (__name__ == "__main__" or FAULT.startswith("worker_")):
    plant()
if __name__ == "__main__":
    sys.exit(train.run_program())
