"""Exponential moving average of the weights, evaluated and exported in their place (TRAIN.EMA_DECAY)."""

import re
from collections.abc import Callable

import tensorflow as tf
from tensorpack.callbacks import Callback
from tensorpack.compat import tfv1
from tensorpack.tfutils.optimizer import ProxyOptimizer

from common.weights import AVERAGED, model_variables
from modeling.parameters import map_packed


class Averaged(ProxyOptimizer):
    """Wraps an optimizer: after each update, average = decay * average + (1 - decay) * weight, at first the weights.

    Covers the variables that the optimizer changes; the statistics of batch norm are averages already. There is one set
    of averages, that of the first tower.

    Attributes:
        averages: dict of the averages' variables by the names of the weights, complete once the graph is built.
    """

    averages: dict[str, tf.Variable]

    def __init__(self, optimizer: tfv1.train.Optimizer, decay: float):
        super().__init__(optimizer, "Averaged")
        self._decay, self.averages, self._weights = decay, {}, {}

    def apply_gradients(self, grads_and_vars, global_step=None, name=None):
        """Applies the gradients, and updates the averages of the first tower's weights."""
        grads_and_vars = list(grads_and_vars)
        applied = self._opt.apply_gradients(grads_and_vars, global_step, name)
        known = model_variables()
        weights = [v for gradient, v in grads_and_vars if gradient is not None and known.get(v.op.name) is v]
        if not weights:
            return applied
        averages = [self._average_of(weight) for weight in weights]
        with tf.control_dependencies([applied]):
            values = [[v.read_value() for v in variables] for variables in (averages, weights)]
            changed = map_packed(lambda average, weight: average - (1 - self._decay) * (average - weight), *values)
            return tf.group(*[average.assign(value) for average, value in zip(averages, changed)])

    def _average_of(self, weight):
        name = weight.op.name
        if name not in self.averages:
            with tf.init_scope(), tfv1.name_scope(None):
                self.averages[name] = tfv1.Variable(
                    lambda: tf.zeros(weight.shape), trainable=False, use_resource=True, name=AVERAGED + name
                )
            self._weights[name] = weight
        return self.averages[name]

    def start(self) -> tf.Operation:
        """The op that sets the averages to the weights."""
        return tf.group(*[average.assign(self._weights[name]) for name, average in self.averages.items()])

    def get(self, getter: Callable, name: str, *args, **kwargs) -> tf.Variable:
        """A `custom_getter` of tf.compat.v1.variable_scope that returns averages in place of weights."""
        variable = getter(name, *args, **kwargs)
        return self.averages.get(re.sub(r"^tower\d+/", "", name), variable)


class StartAverages(Callback):
    """Sets the averages to the initial weights, before the first step of a run that does not continue another."""

    _chief_only = False

    def __init__(self, model):
        """
        Args:
            model: TrainingModel, whose `averaged` exists once the graph is built.
        """
        self._model = model

    def _setup_graph(self):
        self._start = self._model.averaged.start()

    def _before_train(self):
        self.trainer.sess.run(self._start)
