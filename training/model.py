"""The training graph for tensorpack's trainers: sums the network's losses, adds weight decay and the optimizer."""

from typing import NamedTuple

import tensorflow as tf
from tensorpack import ModelDesc
from tensorpack.compat import tfv1
from tensorpack.models import regularize_cost
from tensorpack.tfutils.summary import add_moving_summary

from config import Config
from modeling import rcnn
from training import optimizers


class Tower(NamedTuple):
    """The tensors of one tower that a training step reports."""

    cost: tf.Tensor  # float32 scalar, the sum of the losses
    losses: dict[str, tf.Tensor]  # float32 scalars
    image_id: tf.Tensor  # int64 [N]
    sample_key: tf.Tensor  # int32 [N, 2]


class TrainingModel(ModelDesc):
    """The training graph of modeling/rcnn.py's network.

    Attributes:
        towers: a Tower for each training tower, once the graph is built.
        gradient_norm: float32 scalar tensor, of the mean gradient over all towers and ranks in a step; None before the
            optimizer is built.
    """

    towers: list[Tower]
    gradient_norm: tf.Tensor | None

    def __init__(self, settings: Config, *, learning_rate: float, accumulate: int = 1):
        """
        Args:
            learning_rate: for the mean gradient of an update. accumulate: number of steps in an update.
        """
        self._settings, self._learning_rate, self._accumulate = settings, learning_rate, accumulate
        self.towers, self.gradient_norm = [], None

    def inputs(self) -> list[tf.TensorSpec]:
        """The arrays of a batch: see `rcnn.input_signature`."""
        return rcnn.input_signature(self._settings, training=True)

    def build_graph(self, *inputs: tf.Tensor) -> tf.Tensor:
        """Builds the graph of one tower; returns its cost, float32 scalar: the sum of losses and weight decay."""
        batch = dict(zip((spec.name for spec in self.inputs()), inputs))
        losses, metrics = rcnn.build_training(self._settings, **batch)
        decay = self._settings.TRAIN.WEIGHT_DECAY
        losses["wd_cost"] = regularize_cost("(^|/)W$", lambda w: decay * tf.nn.l2_loss(w), name="wd_cost_sum")
        losses = {name: tf.identity(loss, name) for name, loss in losses.items()}
        for loss in losses.values():
            tfv1.add_to_collection(tfv1.GraphKeys.LOSSES, loss)
        total_cost = tf.add_n(list(losses.values()), name="total_cost")
        self.towers.append(Tower(total_cost, losses, batch["image_id"], batch["sample_key"]))
        add_moving_summary(total_cost, *losses.values())
        add_moving_summary(*[tf.identity(metric, name) for name, metric in metrics.items()])
        return total_cost

    def optimizer(self) -> tfv1.train.Optimizer:
        """The optimizer of the settings. Its variable `learning_rate` follows the schedule.

        Raises:
            ConfigError: TRAIN.OPTIMIZER names nothing that is registered.
        """
        learning_rate = tfv1.get_variable("learning_rate", initializer=self._learning_rate, trainable=False)
        tfv1.summary.scalar("learning_rate-summary", learning_rate)
        optimizer = optimizers.OPTIMIZERS.find(self._settings.TRAIN.OPTIMIZER)(learning_rate)
        if self._accumulate > 1:
            optimizer = optimizers.Accumulated(optimizer, self._accumulate)
        if self._settings.TRAIN.PRECISION == "float16":
            optimizer = optimizers.LossScaled(optimizer)
        return optimizers.Measured(optimizer, self)
