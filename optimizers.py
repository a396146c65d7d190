"""What training does around an optimizer: measures the gradient, scales the loss, accumulates. One wraps another."""

import tensorflow as tf
from tensorpack.compat import tfv1
from tensorpack.tfutils.optimizer import ProxyOptimizer

FIRST_SCALE, SCALE_PATIENCE = 2.0**15, 2000  # of float16's loss


class Measured(ProxyOptimizer):
    """Gives a model its `gradient_norm`, and updates with another optimizer."""

    def __init__(self, optimizer, model):
        super().__init__(optimizer, "Measured")
        self._model = model

    def apply_gradients(self, grads_and_vars, *args, **kwargs):
        if self._model.gradient_norm is None:  # of several towers, which all get the same gradient, the first
            norm = tf.linalg.global_norm([gradient for gradient, _ in grads_and_vars])
            forgives = isinstance(self._opt, LossScaled)
            self._model.gradient_norm = self._opt.forgive(norm) if forgives else norm
        return self._opt.apply_gradients(grads_and_vars, *args, **kwargs)


class LossScaled(ProxyOptimizer):
    """Keeps gradients within the range of float16 (arXiv:1710.03740 sec. 3.2): of a loss that is multiplied by a scale.

    A step whose gradient overflows is left out and halves the scale; SCALE_PATIENCE steps without any double it.
    """

    def __init__(self, optimizer):
        super().__init__(optimizer, "LossScaled")
        self._scale = self._used_scale = None

    def compute_gradients(self, loss, *args, **kwargs):
        """The gradients of `loss`, with infinities where they overflowed."""
        if self._scale is None:  # of several towers, which share it, the first
            with tf.control_dependencies(None):
                self._scale = tfv1.get_variable("loss_scale", initializer=FIRST_SCALE, trainable=False)
                self._good_steps = tfv1.get_variable("loss_scale_good_steps", initializer=0, trainable=False)
                self._is_adapted = False
        self._used_scale = scale = self._scale.read_value()
        scaled = self._opt.compute_gradients(loss * scale, *args, **kwargs)
        return [(gradient if gradient is None else gradient / scale, variable) for gradient, variable in scaled]

    def forgive(self, norm):
        """A gradient's norm, 0 where it overflowed: no divergence as long as there is a smaller scale to try."""
        return tf.where(tf.math.is_finite(norm) | (self._used_scale <= 1.0), norm, 0.0)

    def apply_gradients(self, grads_and_vars, *args, **kwargs):
        grads_and_vars = [(gradient, variable) for gradient, variable in grads_and_vars if gradient is not None]
        is_finite = tf.math.is_finite(tf.add_n([tf.reduce_sum(gradient) for gradient, _ in grads_and_vars]))
        applied = tf.cond(is_finite, lambda: self._opt.apply_gradients(grads_and_vars, *args, **kwargs), tf.no_op)
        if self._is_adapted:
            return applied
        self._is_adapted = True
        return tf.group(applied, *self._adapt(is_finite))

    def _adapt(self, is_finite):
        """The ops that set the scale for the next step; every gradient has been computed by then."""
        good_steps = tf.where(is_finite, self._good_steps + 1, 0)
        grows = tf.equal(good_steps, SCALE_PATIENCE)
        scale = self._scale * tf.where(is_finite, tf.where(grows, 2.0, 1.0), 0.5)
        with tf.control_dependencies([scale, good_steps]):
            return self._scale.assign(tf.maximum(scale, 1.0)), self._good_steps.assign(tf.where(grows, 0, good_steps))


class Accumulated(ProxyOptimizer):
    """Updates with the mean gradient of every `steps` steps.

    tensorpack's own decides on a count that it reads before or after counting the step, as it happens: some updates
    come a step early or late.
    """

    def __init__(self, optimizer, steps):
        super().__init__(optimizer, "Accumulated")
        self._steps = steps

    def apply_gradients(self, grads_and_vars, global_step=None, name=None):
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
