"""Optimizers by the names of TRAIN.OPTIMIZER, and their wrappers: decay, clipping, loss scaling, accumulation."""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf
from tensorpack.compat import tfv1
from tensorpack.tfutils.optimizer import ProxyOptimizer

from common.registry import Registry
from common.weights import BACKBONE_VARIABLES
from config import Config
from modeling import device
from modeling.parameters import join, map_packed
from training import ema

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


def momentum(learning_rate: tf.Variable, settings: Config | None = None) -> tfv1.train.Optimizer:
    """Stochastic gradient descent with TRAIN.MOMENTUM: v = momentum * v + gradient, w = w - rate * v."""
    options = settings.TRAIN if settings else Config().TRAIN
    optimizer = tfv1.train.MomentumOptimizer(learning_rate, options.MOMENTUM)
    if options.BACKBONE_RATE_DECAY == 1:
        return optimizer
    return Scaled(optimizer, functools.partial(rate_share, settings=settings))


def adamw(learning_rate: tf.Variable, settings: Config | None = None) -> tfv1.train.Optimizer:
    """AdamW (see there) with TRAIN.ADAM_BETAS, TRAIN.WEIGHT_DECAY and TRAIN.BACKBONE_RATE_DECAY."""
    settings = settings or Config()
    share = functools.partial(rate_share, settings=settings)
    return AdamW(
        learning_rate, betas=settings.TRAIN.ADAM_BETAS, weight_decay=settings.TRAIN.WEIGHT_DECAY, rate_share=share
    )


register_optimizer("momentum", momentum)
register_optimizer("adamw", adamw)


class Made(NamedTuple):
    """The optimizer of the settings, and the parts of it that others need."""

    optimizer: tfv1.train.Optimizer
    averaged: ema.Averaged | None  # None without TRAIN.EMA_DECAY
    forgive: Callable[[tf.Tensor], tf.Tensor]  # see `LossScaled.forgive`


def make(settings: Config, learning_rate: tf.Variable, *, accumulate: int) -> Made:
    """The optimizer of the settings, which updates once in `accumulate` steps.

    Raises:
        ConfigError: TRAIN.OPTIMIZER names nothing that is registered.
    """
    train, of_name = settings.TRAIN, OPTIMIZERS.find(settings.TRAIN.OPTIMIZER)
    is_ours = of_name in (momentum, adamw)
    optimizer = of_name(learning_rate, settings) if is_ours else of_name(learning_rate)
    averaged, forgive = None, tf.identity
    decay = 0.0 if of_name is adamw else train.WEIGHT_DECAY  # AdamW's does not pass through the moments
    if train.EMA_DECAY:
        optimizer = averaged = ema.Averaged(optimizer, train.EMA_DECAY)
    if train.CLIP_NORM:
        optimizer = Clipped(optimizer, train.CLIP_NORM, weight_decay=decay)
    if accumulate > 1:
        optimizer = Accumulated(optimizer, accumulate)
    if train.PRECISION == "float16":
        optimizer = LossScaled(optimizer)
        forgive = optimizer.forgive
    if decay and not train.CLIP_NORM:
        optimizer = Decayed(optimizer, decay)
    return Made(optimizer, averaged, forgive)


def rate_share(variable: tf.Variable, *, settings: Config) -> float:
    """The share of the learning rate that a variable gets: TRAIN.BACKBONE_RATE_DECAY to the power of its distance from
    the heads, in groups of layers (arXiv:2201.03545 appendix A.2).

    The stem is the first group, each stage a group, but of the third stage every three blocks.
    """
    decay, third = settings.TRAIN.BACKBONE_RATE_DECAY, settings.BACKBONE.RESNET_NUM_BLOCKS[2]
    name = re.sub(r"^tower\d+/", "", variable.op.name)
    backbone = {v.op.name for v in tfv1.get_collection(BACKBONE_VARIABLES)}
    found = re.match(r"(?:conv0|ln0|group(\d)(?:/block(\d+))?)/", name)
    if name not in backbone or not found:  # the heads, norms of the backbone's outputs, other people's backbones
        return 1.0
    stage, block = found[1], int(found[2] or 0)
    last = 3 + math.ceil(third / 3)  # the fourth stage's
    group = {None: 0, "0": 1, "1": 2, "2": 3 + block // 3, "3": last}[stage]
    return decay ** (last + 1 - group)


def is_decayed(variable: tf.Variable) -> bool:
    """Whether weight decay applies to a variable: to the kernels of all layers, not to biases and norms."""
    return re.search(r"(^|/)W$", variable.op.name) is not None


def sum_of_squares(tensors):
    """The sum of the squares of all elements of a list of tensors, float32 scalar."""
    if device.is_gpu():
        tensors = [join(tensors)]
    return 2.0 * tf.add_n([tf.nn.l2_loss(x) for x in tensors])


class AdamW(tfv1.train.Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101, algorithm 2), of the kernels alone (`is_decayed`).

    Each tower counts its own updates: TensorFlow's Adam has powers of the betas that advance once per tower.
    """

    def __init__(self, learning_rate, *, betas, weight_decay, rate_share=lambda variable: 1.0, epsilon=1e-8):
        """
        Args:
            learning_rate: float32 scalar. betas: forgetting of the mean and of the mean square of the gradients.
            rate_share: function of a variable: the share of the learning rate that it gets.
        """
        super().__init__(use_locking=False, name="AdamW")
        self._rate, self._betas, self._weight_decay = learning_rate, betas, weight_decay
        self._rate_share, self._epsilon = rate_share, epsilon

    def apply_gradients(self, grads_and_vars, global_step=None, name=None):
        """Updates the variables; `global_step` is not used."""
        del global_step
        pairs = [(gradient, variable) for gradient, variable in grads_and_vars if gradient is not None]
        with tf.init_scope():
            count = self._get_or_make_slot(pairs[0][1], tf.zeros([]), "updates", self._name)
            moments = [[self._zeros_slot(v, name, self._name) for name in ("mean", "square")] for _, v in pairs]
        count = tf.identity(count.assign_add(1.0))
        powers = [beta**count for beta in self._betas]
        updates = []
        for (gradient, variable), (mean, square) in zip(pairs, moments):
            rate = self._rate * self._rate_share(variable)
            decayed = []
            if self._weight_decay and is_decayed(variable):
                decayed = [variable.assign_sub(rate * self._weight_decay * variable)]
            with tf.control_dependencies(decayed):
                updates.append(
                    tf.raw_ops.ResourceApplyAdam(
                        var=variable.handle,
                        m=mean.handle,
                        v=square.handle,
                        beta1_power=powers[0],
                        beta2_power=powers[1],
                        lr=rate,
                        beta1=self._betas[0],
                        beta2=self._betas[1],
                        epsilon=self._epsilon * tf.sqrt(1.0 - powers[1]),  # the op adds it before the correction
                        grad=gradient,
                    )
                )
        return tf.group(*updates, name=name)


def add_decay(pairs, decay):
    """Adds the gradient of weight decay, `decay` / 2 times the sum of the weights' squares, to (gradient, variable)."""
    decayed = [(gradient, v) for gradient, v in pairs if gradient is not None and is_decayed(v)]
    if not decayed:
        return pairs
    gradients, variables = zip(*decayed)
    weights = [tf.convert_to_tensor(v) for v in variables]
    sums = iter(map_packed(lambda gradient, weight: gradient + decay * weight, gradients, weights))
    return [(next(sums) if g is not None and is_decayed(v) else g, v) for g, v in pairs]


class Decayed(ProxyOptimizer):
    """Wraps an optimizer: adds weight decay to the gradients, see `add_decay`."""

    def __init__(self, optimizer, decay):
        super().__init__(optimizer, "Decayed")
        self._decay = decay

    def compute_gradients(self, *args, **kwargs):
        """The gradients of the loss and of weight decay as a list of (gradient, variable)."""
        return add_decay(self._opt.compute_gradients(*args, **kwargs), self._decay)


class Clipped(ProxyOptimizer):
    """Wraps an optimizer: shortens the gradient to a global norm, then adds weight decay, which is not clipped."""

    def __init__(self, optimizer, norm, *, weight_decay=0.0):
        super().__init__(optimizer, "Clipped")
        self._norm, self._weight_decay = norm, weight_decay

    def apply_gradients(self, grads_and_vars, *args, **kwargs):
        """Applies the gradients times min(1, norm / their global norm)."""
        pairs = [(gradient, variable) for gradient, variable in grads_and_vars if gradient is not None]
        gradients, variables = zip(*pairs)
        share = self._norm / tf.maximum(tf.sqrt(sum_of_squares(gradients)), self._norm)
        pairs = list(zip(map_packed(lambda gradient: gradient * share, gradients), variables))
        return self._opt.apply_gradients(add_decay(pairs, self._weight_decay), *args, **kwargs)


class Scaled(ProxyOptimizer):
    """Wraps an optimizer whose update is proportional to the gradient: scales the learning rate of each variable."""

    def __init__(self, optimizer, rate_share):
        """
        Args:
            rate_share: function of a variable: the share of the learning rate that it gets
        """
        super().__init__(optimizer, "Scaled")
        self._rate_share = rate_share

    def apply_gradients(self, grads_and_vars, *args, **kwargs):
        """Applies the gradients times the shares."""
        scaled = [(g if g is None else g * self._rate_share(v), v) for g, v in grads_and_vars]
        return self._opt.apply_gradients(scaled, *args, **kwargs)


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
