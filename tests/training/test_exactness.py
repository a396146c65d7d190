"""RoIAlign's gradient: nothing is lost between threads."""

import numpy as np
import pytest
import tensorflow as tf
from tensorpack.compat import tfv1

from training.exactness import CompleteGradients, complete_gradients


def is_deterministic():
    from tensorflow.python.framework.config import is_op_determinism_enabled

    return is_op_determinism_enabled()


def test_the_gradient_of_overlapping_rois_is_complete():
    """Samples within the map spread weights of 1 over its cells: both sums are equal. Threads lost 10 % of this one."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0.1, 0.6, (32, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.05, 0.35, (32, 2))], axis=1).astype(np.float32)
    grads = rng.normal(1, 0.1, (32, 28, 28, 64)).astype(np.float32)
    with tf.Graph().as_default(), tfv1.Session() as session:
        inputs = [tfv1.placeholder(tf.float32, x.shape) for x in (grads, boxes)]
        gradient = tf.raw_ops.CropAndResizeGradImage(
            grads=inputs[0], boxes=inputs[1], box_ind=np.zeros(32, np.int32), image_size=[1, 6, 8, 64], T=tf.float32
        )
        with complete_gradients():
            for _ in range(5):
                found = session.run(gradient, dict(zip(inputs, (grads, boxes))))
                assert found.sum(dtype=float) == pytest.approx(grads.sum(dtype=float), rel=1e-5)


def test_graphs_can_be_built_after_the_block_even_if_it_fails():
    with pytest.raises(ValueError), complete_gradients():
        assert is_deterministic()
        raise ValueError
    assert not is_deterministic()


def test_the_block_is_the_training():
    callback = CompleteGradients()
    callback.before_train()
    assert is_deterministic()
    callback.after_train()
    assert not is_deterministic()
    assert not callback.chief_only


def test_nothing_changes_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU:0"] if kind == "GPU" else ["CPU:0"])
    with complete_gradients():
        assert not is_deterministic()
