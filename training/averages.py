"""Moving averages of a step's scalars, for summaries: one update for all of them."""

import re

import tensorflow as tf
from tensorpack.compat import tfv1
from tensorpack.tfutils.tower import get_current_tower_context
from tensorpack.utils.naming import MOVING_SUMMARY_OPS_KEY

DECAY = 0.95  # as in tensorpack's add_moving_summary, which has an update for each scalar


def add_moving_averages(scalars: list[tf.Tensor]) -> None:
    """Averages float32 scalars over the steps, and adds a summary NAME-summary for each; first tower only.

    The average of T steps is that of arXiv:1412.6980 section 3, without a bias towards its start:
    sum_t DECAY^(T - t) x_t / sum_t DECAY^(T - t). It is updated by tensorpack's callback MovingAverageSummary.
    """
    context = get_current_tower_context()
    if context is not None and not context.is_main_training_tower:
        return
    names = [re.sub(r"tower\d+/", "", x.op.name) for x in scalars]
    with tfv1.name_scope(None):
        # The last entry averages ones: it sums the weights.
        total = tfv1.Variable(
            tf.zeros([len(scalars) + 1]),
            trainable=False,
            collections=[tfv1.GraphKeys.LOCAL_VARIABLES],
            use_resource=True,
            name="EMA/scalars",
        )
        updated = total.assign_sub((1 - DECAY) * (total - tf.stack([*scalars, 1.0])))
        tfv1.add_to_collection(MOVING_SUMMARY_OPS_KEY, updated)
        averages = tf.unstack(updated[:-1] / updated[-1])
        for name, average in zip(names, averages):
            tfv1.summary.scalar(f"{name}-summary", average)
