"""RoIAlign's gradient on the CPU, complete.

TensorFlow's CPU kernel of crop_and_resize's gradient divides the RoIs among threads, which add to the same elements of
the map without a lock, and so lose a part: with two threads about 0.1 % of a gradient on maps of usual size, up to
10 % on small ones. It uses a single thread while operations must be deterministic. GPUs add atomically.
"""

import contextlib
from collections.abc import Iterator

import tensorflow as tf
from tensorflow.python.framework.config import disable_op_determinism  # TensorFlow publishes its opposite only
from tensorpack.callbacks import Callback


@contextlib.contextmanager
def complete_gradients() -> Iterator[None]:
    """Sessions compute complete gradients while the block runs. Without effect in a process that has a GPU.

    Build graphs outside the block: inside, TensorFlow composes some losses of other operations, and wants seeds.
    """
    if tf.config.list_physical_devices("GPU"):
        yield
        return
    tf.config.experimental.enable_op_determinism()
    try:
        yield
    finally:
        disable_op_determinism()


class CompleteGradients(Callback):
    """Applies `complete_gradients` to all steps of a training."""

    _chief_only = False

    def _before_train(self):
        self._block = complete_gradients()
        self._block.__enter__()

    def _after_train(self):
        self._block.__exit__(None, None, None)
