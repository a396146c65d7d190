"""Optimizers by the names of TRAIN.OPTIMIZER, and their wrappers: gradient norm, loss scaling, accumulation."""

import re
from collections.abc import Callable

import tensorflow as tf
from tensorpack.compat import tfv1
from tensorpack.tfutils.optimizer import ProxyOptimizer

from common.registry import Registry
from modeling import device
from modeling.parameters import join, map_packed

OPTIMIZERS = Registry("TRAIN.OPTIMIZER")
FIRST_SCALE, SCALE_PATIENCE = 2.0**15, 2000  # of float16's loss; steps without an overflow that double the scale


def register_optimizer(
    name: str, make: Callable[[tf.Variable], tfv1.train.Optimizer]
) -> Callable[[tf.Variable], tfv1.train.Optimizer]:
    """Registers an optimizer for TRAIN.OPTIMIZER=`name`; returns `make`.

    Args:
        make: function (learning_rate, a float32 variable that follows the schedule) -> tf.compat.v1.train.Optimizer.
            The gradients contain weight decay already (TRAIN.WEIGHT_DECAY).
    Raises:
        ConfigError: the name is taken.
    """
    return OPTIMIZERS.register(name, make)


register_optimizer("momentum", lambda learning_rate: tfv1.train.MomentumOptimizer(learning_rate, 0.9))


def is_decayed(variable: tf.Variable) -> bool:
    """Whether weight decay applies to a variable: to the kernels of all layers, not to biases and norms."""
    return re.search(r"(^|/)W$", variable.op.name) is not None


def sum_of_squares(tensors):
    """The sum of the squares of all elements of a list of tensors, float32 scalar."""
    if device.is_gpu():
        tensors = [join(tensors)]
    return 2.0 * tf.add_n([tf.nn.l2_loss(x) for x in tensors])


class Decayed(ProxyOptimizer):
    """Wraps an optimizer: adds the gradient of weight decay, `decay` / 2 times the sum of the weights' squares."""

    def __init__(self, optimizer, decay):
        super().__init__(optimizer, "Decayed")
        self._decay = decay

    def compute_gradients(self, *args, **kwargs):
        """The gradients of the loss and of weight decay as a list of (gradient, variable)."""
        pairs = self._opt.compute_gradients(*args, **kwargs)
        decayed = [(gradient, v) for gradient, v in pairs if gradient is not None and is_decayed(v)]
        if not decayed:
            return pairs
        gradients, variables = zip(*decayed)
        weights = [tf.convert_to_tensor(v) for v in variables]
        sums = iter(map_packed(lambda gradient, weight: gradient + self._decay * weight, gradients, weights))
        return [(next(sums) if g is not None and is_decayed(v) else g, v) for g, v in pairs]


class Measured(ProxyOptimizer):
    """Wraps an optimizer: sets the `gradient_norm` of a TrainingModel."""

    def __init__(self, optimizer, model, *, forgive=tf.identity):
        """
        Args:
            forgive: function of the norm, see LossScaled.forgive
        """
        super().__init__(optimizer, "Measured")
        self._model, self._forgive = model, forgive

    def apply_gradients(self, grads_and_vars, *args, **kwargs):
        """Measures the global norm of the gradients, float32 scalar, and applies them."""
        if self._model.gradient_norm is None:  # once: all towers get the same gradient
            norm = tf.sqrt(sum_of_squares([gradient for gradient, _ in grads_and_vars if gradient is not None]))
            self._model.gradient_norm = self._forgive(norm)
        return self._opt.apply_gradients(grads_and_vars, *args, **kwargs)


class LossScaled(ProxyOptimizer):
    """Wraps an optimizer: multiplies the loss by a scale, to keep gradients in float16's range (arXiv:1710.03740 3.2).

    An overflowing gradient skips its update and halves the scale; SCALE_PATIENCE steps without an overflow double it.
    """

    def __init__(self, optimizer):
        super().__init__(optimizer, "LossScaled")
        self._scale = self._used_scale = None

    def compute_gradients(self, loss, *args, **kwargs):
        """The gradients of `loss` as a list of (gradient, variable), infinite where they overflowed."""
        if self._scale is None:  # once: all towers share it
            with tf.control_dependencies(None):
                self._scale = tfv1.get_variable("loss_scale", initializer=FIRST_SCALE, trainable=False)
                self._good_steps = tfv1.get_variable("loss_scale_good_steps", initializer=0, trainable=False)
                self._is_adapted = False
        self._used_scale = scale = self._scale.read_value()
        scaled = self._opt.compute_gradients(loss * scale, *args, **kwargs)
        gradients = [gradient for gradient, _ in scaled if gradient is not None]
        unscaled = iter(map_packed(lambda gradient: gradient / scale, gradients))
        return [(gradient if gradient is None else next(unscaled), variable) for gradient, variable in scaled]

    def forgive(self, norm):
        """The gradient's norm, but 0 after an overflow that a smaller scale may avoid, which is no divergence."""
        return tf.where(tf.math.is_finite(norm) | (self._used_scale <= 1.0), norm, 0.0)

    def apply_gradients(self, grads_and_vars, *args, **kwargs):
        """Applies the gradients if all are finite, and adapts the scale."""
        grads_and_vars = [(gradient, variable) for gradient, variable in grads_and_vars if gradient is not None]
        is_finite = tf.math.is_finite(sum_of_squares([gradient for gradient, _ in grads_and_vars]))
        applied = tf.cond(is_finite, lambda: self._opt.apply_gradients(grads_and_vars, *args, **kwargs), tf.no_op)
        if self._is_adapted:
            return applied
        self._is_adapted = True
        return tf.group(applied, *self._adapt(is_finite))

    def _adapt(self, is_finite):
        """The ops that set the scale for the next step; they run after all gradients are computed."""
        good_steps = tf.where(is_finite, self._good_steps + 1, 0)
        grows = tf.equal(good_steps, SCALE_PATIENCE)
        scale = self._scale * tf.where(is_finite, tf.where(grows, 2.0, 1.0), 0.5)
        with tf.control_dependencies([scale, good_steps]):
            return self._scale.assign(tf.maximum(scale, 1.0)), self._good_steps.assign(tf.where(grows, 0, good_steps))


class Accumulated(ProxyOptimizer):
    """Wraps an optimizer: updates once in `steps` steps, with their mean gradient.

    tensorpack's AccumGradOptimizer reads its counter of steps before or after it is incremented, at random, so some of
    its updates come a step early or late.
    """

    def __init__(self, optimizer, steps):
        super().__init__(optimizer, "Accumulated")
        self._steps = steps

    def apply_gradients(self, grads_and_vars, global_step=None, name=None):
        """Adds the gradients to their sums; in every `steps`-th step applies the means and clears the sums."""
        gradients, variables = zip(*[(g, v) for g, v in grads_and_vars if g is not None])
        with tf.control_dependencies(None):
            sums = [self._zeros_slot(variable, "accum", self._name) for variable in variables]
            counter = tfv1.Variable(0, name="accumulated_steps", trainable=False)
        count = tf.identity(counter.assign_add(1))
        added = [total.assign_add(gradient) for total, gradient in zip(sums, gradients)]

        def update():
            means = [total.read_value() / self._steps for total in sums]
            applied = self._opt.apply_gradients(list(zip(means, variables)))
            with tf.control_dependencies([applied]):
                return tf.group(*[total.assign(tf.zeros_like(total)) for total in sums])

        with tf.control_dependencies([count, *added]):
            done = tf.cond(tf.equal(count % self._steps, 0), update, tf.no_op)
        return tf.group(done, name=name)
