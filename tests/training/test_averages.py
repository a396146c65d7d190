"""The moving averages of a step's scalars, against their definition."""

import numpy as np
import tensorflow as tf
from tensorpack.compat import tfv1
from tensorpack.tfutils.tower import TrainTowerContext
from tensorpack.utils.naming import MOVING_SUMMARY_OPS_KEY

from training.averages import add_moving_averages


def test_averages_weigh_recent_steps_and_have_no_bias_towards_zero():
    steps = np.float32([[1, 10], [3, -20], [2, 5]])
    with tf.Graph().as_default(), tfv1.Session() as session:
        fed = tfv1.placeholder(tf.float32, [2])
        scalars = [tf.identity(fed[0], "rpn/loss"), tf.identity(fed[1], "tower0/cost")]
        add_moving_averages(scalars)
        (update,) = tfv1.get_collection(MOVING_SUMMARY_OPS_KEY)
        summaries = tfv1.summary.merge(tfv1.get_collection(tfv1.GraphKeys.SUMMARIES))
        assert not tfv1.global_variables()  # checkpoints have none of it
        session.run(tfv1.local_variables_initializer())
        for count, values in enumerate(steps, 1):
            text, _ = session.run([summaries, update.op], {fed: values})
            found = {v.tag: v.simple_value for v in tfv1.Summary.FromString(text).value}
            weights = 0.95 ** np.arange(count)[::-1]
            expected = weights @ steps[:count] / weights.sum()
            assert found.keys() == {"rpn/loss-summary", "cost-summary"}
            np.testing.assert_allclose(list(found.values()), expected, rtol=1e-4)


def test_the_first_tower_has_them_alone():
    with tf.Graph().as_default():
        for index in range(2):
            with TrainTowerContext(
                f"tower{index}", index=index, total=2, vs_name="" if index == 0 else f"tower{index}"
            ):
                add_moving_averages([tf.constant(1.0)])
        assert len(tfv1.get_collection(MOVING_SUMMARY_OPS_KEY)) == len(tfv1.local_variables()) == 1
