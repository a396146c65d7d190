"""Checkpoints that several test files read."""

import json

import numpy as np
import pytest
import tensorflow as tf
from tensorpack.compat import tfv1


@pytest.fixture
def run(tmp_path):
    """A run's directory with two TensorFlow checkpoints, the weights being their steps."""
    with tf.Graph().as_default(), tfv1.Session() as session:
        weight = tfv1.get_variable("conv0/W", [2, 3], initializer=tf.zeros_initializer())
        tfv1.get_variable("conv0/W/Momentum", [2, 3], initializer=tf.zeros_initializer())
        tfv1.get_variable("learning_rate", [], initializer=tf.zeros_initializer())
        session.run(tfv1.global_variables_initializer())
        saver = tfv1.train.Saver()
        for step in (90, 500):
            weight.load(np.full([2, 3], step, np.float32), session)
            saver.save(session, str(tmp_path / "model"), global_step=step)
    return tmp_path


@pytest.fixture
def resumable(run):
    """The run of above with a state beside each checkpoint."""
    for step in (90, 500):
        (run / f"model-{step}.json").write_text(json.dumps({"step": step}))
    return run
