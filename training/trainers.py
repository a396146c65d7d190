"""tensorpack's trainers for several devices, with two checks: before the first step all devices hold identical weights;
in the first step the reduced gradient is the mean of the local gradients.

A replica is a tower, one of several in a process, or a rank, a process of its own.
"""

import hashlib

import numpy as np
import tensorflow as tf
from tensorpack.callbacks import Callback, RunOp
from tensorpack.compat import tfv1
from tensorpack.train import HorovodTrainer, SyncMultiGPUTrainerReplicated
from tensorpack.utils import logger

from config import UserError
from modeling import device

GRADIENT_TOLERANCE = 0.01  # in units of the gradient's norm; the error of a wrong sum is of the order of 1


class ReplicaError(UserError):
    """Devices hold different weights, or their reduced gradient is wrong."""

    exit_code = 1


# ------------------------------------------------------------------------------------------------------ trainers


class TowerTrainer(SyncMultiGPUTrainerReplicated):
    """tensorpack's trainer for several towers in one process; checks its gradients in the first step.

    Without GPUs all towers share the CPU.
    """

    def _setup_graph(self, input, get_cost_fn, get_opt_fn):
        tower_fn = self._make_get_grad_fn(input, get_cost_fn, get_opt_fn)
        local = self._builder.call_for_each_tower(tower_fn)
        self.train_op, sync = self._builder.build(local, get_opt_fn)
        projections = [_projections(gradients) for gradients in local]
        error = _reduction_error(tf.stack(projections), self._builder.grads[0])
        names = [variable.op.name for _, variable in local[0]]
        return [RunOp(sync, run_before=True, run_as_trigger=True), GradientCheck(error, names), _EqualTowers()]


class RankTrainer(HorovodTrainer):
    """tensorpack's trainer for Horovod; checks its gradients in the first step."""

    def __init__(self, ranks):
        super().__init__(average=True)
        device.use_gpu(self.hvd.local_rank())
        self._ranks = ranks

    def allreduce(self, grads):
        """Averages the (gradient, variable) pairs over the ranks, and adds the check of this mean to the graph."""
        with tf.name_scope("AllReduce"):
            reduced = [(self.hvd.allreduce(gradient, op=self.hvd.Average), variable) for gradient, variable in grads]
        projections = self.hvd.allgather(_projections(grads)[None], name="gradient_projections")
        self._check = GradientCheck(_reduction_error(projections, reduced), [v.op.name for _, v in grads])
        return reduced

    def initialize(self, session_creator, session_init):
        """Replaces tensorpack's method, which calls functions that TensorFlow has removed."""
        self._num_global_variables = len(tfv1.global_variables())
        self._broadcast_op = self.hvd.broadcast_global_variables(0)
        options = session_creator.config
        # The GPU of `device.use_gpu`: TensorFlow refuses sessions that number the GPUs otherwise.
        options.gpu_options.visible_device_list = str(self.hvd.local_rank())
        options.intra_op_parallelism_threads = max(1, options.intra_op_parallelism_threads // self.hvd.local_size())
        super(HorovodTrainer, self).initialize(session_creator, session_init)
        self.sess.run(self._broadcast_op)

    def _setup_graph(self, input, get_cost_fn, get_opt_fn):
        callbacks = super()._setup_graph(input, get_cost_fn, get_opt_fn)
        return [*callbacks, self._check, _EqualRanks(self._ranks)]


# ------------------------------------------------------------------------------------------------------ checks


def _projections(grads_and_vars):
    """The dot product of each gradient with a fixed random vector, and the gradient's norm: float32 [2, V].

    The dot product is linear in the gradient, and one number: replicas exchange it apart from the gradients, to verify
    the mean of those.
    """
    products, norms = [], []
    for index, (gradient, _) in enumerate(grads_and_vars):
        noise = tf.random.stateless_normal(tf.shape(gradient), seed=[7, index])
        products.append(tf.reduce_sum(gradient * noise))
        norms.append(tf.norm(gradient))
    return tf.stack([products, norms])


def _reduction_error(projections, reduced):
    """The error of each reduced gradient, in units of the local gradients' mean norm: float32 [V], 0 within tolerance.

    NaN where a local gradient is not finite, which leaves nothing to compare with; infinite where only the reduced
    gradient is not finite.

    Args:
        projections: float32 [replicas, 2, V], of each replica's local gradients. reduced: list of (gradient, variable).
    """
    expected, scale = tf.unstack(tf.reduce_mean(projections, axis=0))
    difference = tf.abs(_projections(reduced)[0] - expected)
    error = tf.where(difference <= GRADIENT_TOLERANCE * scale, tf.zeros_like(scale), difference / scale)
    error = tf.where(tf.math.is_nan(difference), np.inf, error)
    return tf.where(tf.math.is_finite(scale), error, np.nan)


class GradientCheck(Callback):
    """Compares the reduced gradient with the local ones, in the first step in which these are finite."""

    _chief_only = False

    def __init__(self, error, names):
        self._error, self._names = error, names

    def _before_run(self, _):
        return None if self._error is None else tfv1.train.SessionRunArgs(self._error)

    def _after_run(self, _, run_values):
        if self._error is None:
            return
        if np.isnan(run_values.results).any():
            return  # a local gradient is not finite: compare in the next step
        self._error = None
        wrong = np.flatnonzero(run_values.results > 0)
        if len(wrong):
            raise ReplicaError(
                f"the reduced gradient is not the mean over the replicas, of {len(wrong)} variables, first "
                f"{self._names[wrong[0]]} (off by {run_values.results[wrong[0]]:.2g} of its norm): the communication "
                "library computes wrong sums on this machine"
            )
        logger.info("The reduced gradients equal the mean of the replicas' gradients.")


class _EqualTowers(Callback):
    """Verifies before training that the variables of all towers are equal."""

    def _setup_graph(self):
        of_main = {v.op.name: v for v in tfv1.global_variables()}
        self._differs = {}
        for variable in tfv1.local_variables():
            tower, _, name = variable.op.name.partition("/")
            if tower.startswith("tower") and name in of_main:
                equal = tf.reduce_all(tf.equal(variable, of_main[name]))
                self._differs[variable.op.name] = tf.logical_not(equal)

    def _before_train(self):
        differs = [name for name, value in self.trainer.sess.run(self._differs).items() if value]
        if differs:
            raise ReplicaError(f"towers start from different weights: {len(differs)} variables, first {differs[0]}")


class _EqualRanks(Callback):
    """Verifies before training that the variables of all ranks are equal."""

    _chief_only = False

    def __init__(self, ranks):
        self._ranks = ranks

    def _before_train(self):
        variables = sorted(tfv1.global_variables(), key=lambda v: v.op.name)
        values = self.trainer.sess.run(variables)
        digests = [hashlib.sha1(np.ascontiguousarray(value)).hexdigest() for value in values]
        for rank, other in enumerate(self._ranks.gather(digests)):
            differs = [v.op.name for v, one, two in zip(variables, digests, other) if one != two]
            if len(other) != len(digests):
                raise ReplicaError(
                    f"ranks {self._ranks.rank} and {rank} have models of {len(digests)} and {len(other)} variables: "
                    "start all ranks with the same command"
                )
            if differs:
                raise ReplicaError(
                    f"ranks {self._ranks.rank} and {rank} start from different weights: {len(differs)} variables, "
                    f"first {differs[0]}"
                )
        logger.info(f"All {self._ranks.size} ranks start from the same weights.")
