"""The training graph for tensorpack's trainers: sums the network's losses, adds weight decay and the optimizer."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorpack import ModelDesc
from tensorpack.compat import tfv1
from tensorpack.tfutils.tower import get_current_tower_context

from config import Config
from modeling import rcnn
from training import ema, optimizers
from training.averages import add_moving_averages


class Tower(NamedTuple):
    """The tensors of one tower that a training step reports, or their values."""

    cost: tf.Tensor  # float32 scalar, the sum of the losses
    losses: dict[str, tf.Tensor]  # float32 scalars
    image_id: tf.Tensor  # int64 [N]
    sample_key: tf.Tensor  # int32 [N, 2]

    def pack(self) -> tf.Tensor:
        """All tensors in one: float64 [1 + L + 3 N] for L losses. A GPU's step is fetched at the cost of one copy."""
        numbers = tf.cast(tf.stack([self.cost, *self.losses.values()]), tf.float64)
        integers = tf.concat([self.image_id, tf.reshape(tf.cast(self.sample_key, tf.int64), [-1])], axis=0)
        return tf.concat([numbers, tf.bitcast(integers, tf.float64)], axis=0)  # the same bits

    def unpack(self, packed: np.ndarray) -> "Tower":
        """The Tower of NumPy arrays in the value of `pack`."""
        numbers, integers = np.split(packed, [1 + len(self.losses)])
        image_id, sample_key = np.split(integers.view(np.int64), [len(integers) // 3])
        losses = dict(zip(self.losses, numbers[1:].astype(np.float32)))
        return Tower(np.float32(numbers[0]), losses, image_id, sample_key.reshape(-1, 2).astype(np.int32))


class TrainingModel(ModelDesc):
    """The training graph of modeling/rcnn.py's network.

    Attributes:
        towers: a Tower for each training tower, once the graph is built.
        gradient_norm: float32 scalar tensor, of the mean gradient over all towers and ranks in a step; None before the
            optimizer is built.
        averaged: ema.Averaged, whose averages are evaluated; None without TRAIN.EMA_DECAY, and before the optimizer is
            built.
    """

    towers: list[Tower]
    gradient_norm: tf.Tensor | None
    averaged: ema.Averaged | None

    def __init__(self, settings: Config, *, learning_rate: float, accumulate: int = 1):
        """
        Args:
            learning_rate: for the mean gradient of an update. accumulate: number of steps in an update.
        """
        self._settings, self._learning_rate, self._accumulate = settings, learning_rate, accumulate
        self.towers, self.gradient_norm, self.averaged = [], None, None

    def inputs(self) -> list[tf.TensorSpec]:
        """The arrays of a batch: see `rcnn.input_signature`."""
        return rcnn.input_signature(self._settings, training=True)

    def build_graph(self, *inputs: tf.Tensor) -> tf.Tensor:
        """Builds the graph of one tower; returns its cost, float32 scalar: the sum of losses and weight decay.

        The gradient of weight decay is not in this graph: the optimizer adds it.
        """
        batch = dict(zip((spec.name for spec in self.inputs()), inputs))
        losses, metrics = rcnn.build_training(self._settings, **batch)
        decay = self._settings.TRAIN.WEIGHT_DECAY
        variables = get_current_tower_context().get_collection_in_tower(tfv1.GraphKeys.TRAINABLE_VARIABLES)
        weights = [tf.convert_to_tensor(v) for v in variables if optimizers.is_decayed(v)]
        losses["wd_cost"] = tf.stop_gradient(decay / 2 * optimizers.sum_of_squares(weights))  # see Decayed
        losses = {name: tf.identity(loss, name) for name, loss in losses.items()}
        for loss in losses.values():
            tfv1.add_to_collection(tfv1.GraphKeys.LOSSES, loss)
        total_cost = tf.add_n(list(losses.values()), name="total_cost")
        self.towers.append(Tower(total_cost, losses, batch["image_id"], batch["sample_key"]))
        named = [tf.identity(metric, name) for name, metric in metrics.items()]
        add_moving_averages([total_cost, *losses.values(), *named])
        return total_cost

    def optimizer(self) -> tfv1.train.Optimizer:
        """The optimizer of the settings. Its variable `learning_rate` follows the schedule.

        Raises:
            ConfigError: TRAIN.OPTIMIZER names nothing that is registered.
        """
        learning_rate = tfv1.get_variable("learning_rate", initializer=self._learning_rate, trainable=False)
        tfv1.summary.scalar("learning_rate-summary", learning_rate)
        made = optimizers.make(self._settings, learning_rate, accumulate=self._accumulate)
        self.averaged = made.averaged
        return optimizers.Measured(made.optimizer, self, forgive=made.forgive)
