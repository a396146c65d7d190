"""Sums over towers and ranks, for the statistics of synchronised batch normalisation (MegDet, arXiv:1711.07240)."""

import re
import sys
import zlib

import tensorflow as tf
from tensorpack.tfutils.tower import get_current_tower_context

tfv1 = tf.compat.v1


def joined_moments(mean, variance, count, shift):
    """Combines the mean and variance of each replica into those of all replicas' values.

    Args:
        mean, variance: float32 [C], of this replica's `count` (float32) values per channel
        shift: float32 [C], near the mean and equal on all replicas; sums of squares about it avoid cancellation
    Returns:
        mean, variance: float32 [C]; and the number of values, which may be 0: then the others are `shift` and 0
    """
    towers, ranks = _num_towers(), _num_ranks()
    if towers * ranks == 1:
        return mean, variance, count
    offset = mean - shift
    sums = tf.concat([count * offset, count * (variance + tf.square(offset)), [count]], axis=0)
    sums = _sum_over_ranks(sums) if ranks > 1 else _sum_over_towers(sums, towers)
    total = sums[-1]
    offset, squares = tf.split(sums[:-1] / tf.maximum(total, 1.0), 2)
    return shift + offset, tf.maximum(squares - tf.square(offset), 0.0), total


def _num_towers():
    """Returns the number of towers of this process that are trained together."""
    context = get_current_tower_context()
    return context.total if context is not None and context.is_training else 1


def _num_ranks():
    """Returns the number of processes that are trained together: Horovod's size if it was started, else 1."""
    hvd = sys.modules.get("horovod.tensorflow")
    return hvd.size() if hvd is not None and hvd.is_initialized() else 1


def _sum_over_ranks(x):
    """Sums a tensor over all ranks; the gradient is the sum of the ranks' gradients."""
    return sys.modules["horovod.tensorflow"].allreduce(x, op=sys.modules["horovod.tensorflow"].Sum)


def _sum_over_towers(x, towers):
    """Sums a tensor over all towers; the gradient is the sum of the towers' gradients.

    Every tower must call it in a name scope that differs from the others in the first part only ("tower0", ...): the
    ops of different towers are matched by the rest of the scope. Without GPUs, the session needs a CPU device for each
    tower.
    """
    tower, _, scope = tfv1.get_default_graph().get_name_scope().partition("/")
    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"

    def reduce(x, name):
        return tf.raw_ops.CollectiveReduce(
            input=x,
            group_size=towers,
            group_key=1,
            instance_key=zlib.crc32(name.encode()) & 0x7FFFFFFF,
            merge_op="Add",
            final_op="Id",
            subdiv_offsets=[0],
            communication_hint="ring",  # NCCL has returned wrong sums: tensorflow#41539
        )

    @tf.custom_gradient
    def summed(x):
        return reduce(x, scope), lambda gradient: reduce(gradient, f"{scope}/gradient")

    # Gradients are placed with the op that they are of: with the one that tf.custom_gradient adds after the sum.
    with tf.device(f"/{kind}:{re.sub('[^0-9]', '', tower)}"):
        return summed(x)
