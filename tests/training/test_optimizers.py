"""Accumulated gradients, and dynamic loss scaling, alone and with accumulation, momentum and several towers."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from tensorpack.compat import tfv1

from modeling import device
from training import optimizers


def test_momentum_is_a_tenth_s_forgetting_without_nesterov():
    """Momentum 0.9, as all published recipes have it: v = 0.9 v + g, w = w - rate v."""
    rates, gradients = [0.1, 0.1, 0.01, 0.01], [1.0, -2.0, 3.0, 0.5]
    weight, velocity, expected = 0.0, 0.0, []
    for rate, gradient in zip(rates, gradients):
        velocity = 0.9 * velocity + gradient
        weight -= rate * velocity
        expected.append(weight)
    with tf.Graph().as_default(), tfv1.Session() as session:
        learning_rate = tfv1.get_variable("learning_rate", initializer=0.0, trainable=False)
        variable = tfv1.get_variable("x", initializer=0.0)
        gradient = tfv1.placeholder(tf.float32, [])
        step = optimizers.OPTIMIZERS.find("momentum")(learning_rate).apply_gradients([(gradient, variable)])
        session.run(tfv1.global_variables_initializer())
        found = []
        for rate, value in zip(rates, gradients):
            learning_rate.load(rate, session)
            session.run(step, {gradient: value})
            found.append(session.run(variable))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_constants_of_loss_scaling_are_keras_s():
    standard = inspect.signature(tf.keras.mixed_precision.LossScaleOptimizer).parameters
    assert standard["initial_scale"].default == optimizers.FIRST_SCALE
    assert standard["dynamic_growth_steps"].default == optimizers.SCALE_PATIENCE


@pytest.mark.parametrize("gpu", [False, True])
def test_squares_of_many_tensors_are_summed(gpu):
    with tf.Graph().as_default(), tfv1.Session() as session, device.building_for(gpu=gpu):
        total = session.run(optimizers.sum_of_squares([tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant([5.0])]))
    assert total == 55


def test_weight_decay_adds_its_share_of_each_kernel_alone():
    """The gradients of 0.1 / 2 times the sum of the squares of the kernels W; those of biases and norms have none."""
    with tf.Graph().as_default(), tfv1.Session() as session:
        names = ("conv0/W", "tower1/fc/W", "conv0/b", "conv0/bn/gamma", "W", "conv0/Wide", "unused/W")
        variables = {name: tfv1.get_variable(name, initializer=[2.0, -4.0]) for name in names}
        loss = tf.reduce_sum(3.0 * tf.add_n(list(variables.values())[:-1]))
        optimizer = optimizers.Decayed(tfv1.train.GradientDescentOptimizer(1.0), 0.1)
        pairs = optimizer.compute_gradients(loss, list(variables.values()))
        session.run(tfv1.global_variables_initializer())
        found = {v.op.name: None if g is None else session.run(g).round(5).tolist() for g, v in pairs}
    plain, decayed = [3.0, 3.0], [3.2, 2.6]
    assert found["unused/W"] is None
    assert {name for name, gradient in found.items() if gradient == plain} == {
        "conv0/b",
        "conv0/bn/gamma",
        "conv0/Wide",
    }
    assert all(np.allclose(found[name], decayed) for name in ("conv0/W", "tower1/fc/W", "W"))


@pytest.mark.parametrize("is_scaled", [False, True])
def test_the_gradient_s_norm_is_measured_once_over_all_variables(is_scaled):
    with tf.Graph().as_default(), tfv1.Session() as session:
        variables = [tfv1.get_variable(f"tower{i}/x", [2], initializer=tf.zeros_initializer()) for i in range(2)]
        fed = [tfv1.placeholder(tf.float32, [2]) for _ in range(2)]
        model = SimpleNamespace(gradient_norm=None)
        optimizer, forgive = tfv1.train.GradientDescentOptimizer(1.0), tf.identity
        if is_scaled:
            optimizer = optimizers.LossScaled(optimizer)
            forgive = optimizer.forgive
        optimizer = optimizers.Measured(optimizer, model, forgive=forgive)
        loss = tf.reduce_sum(variables[0] * fed[0]) + tf.reduce_sum(variables[1] * fed[1])
        gradients = optimizer.compute_gradients(loss, var_list=[*variables])
        step = optimizer.apply_gradients(gradients)
        norm = model.gradient_norm
        optimizer.apply_gradients(gradients[:1])  # of another tower
        assert model.gradient_norm is norm
        session.run(tfv1.global_variables_initializer())
        assert session.run(norm, dict(zip(fed, ([1, 2], [4, 10])))) == 11  # 1 + 4 + 16 + 100 = 121
        overflowed = session.run(norm, dict(zip(fed, ([1, 2], [np.inf, 10]))))
        assert overflowed == (0 if is_scaled else np.inf)
        session.run(step, dict(zip(fed, ([1, 2], [4, 10]))))
        np.testing.assert_array_equal(session.run(variables), [[-1, -2], [-4, -10]])


def test_variables_without_a_gradient_are_left_alone():
    with tf.Graph().as_default(), tfv1.Session() as session:
        used, unused = (tfv1.get_variable(name, initializer=1.0) for name in ("used", "unused"))
        optimizer = tfv1.train.GradientDescentOptimizer(1.0)
        optimizer = optimizers.LossScaled(optimizers.Accumulated(optimizer, 1))
        gradients = optimizer.compute_gradients(3 * used, var_list=[unused, used])
        assert gradients[0] == (None, unused)
        step = optimizer.apply_gradients(gradients)
        session.run(tfv1.global_variables_initializer())
        session.run(step)
        assert session.run([used, unused]) == [-2, 1]


def test_accumulated_updates_are_momentum_steps_on_means():
    steps, rate = 3, 0.1
    gradients = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    weight, momentum, expected = np.zeros(2), np.zeros(2), []
    for i in range(len(gradients)):
        if i % steps == steps - 1:
            momentum = 0.9 * momentum + gradients[i - steps + 1 : i + 1].mean(axis=0)
            weight = weight - rate * momentum
        expected.append(weight)
    with tf.Graph().as_default(), tfv1.Session() as session:
        variable = tfv1.get_variable("x", [2], initializer=tf.zeros_initializer())
        gradient = tfv1.placeholder(tf.float32, [2])
        optimizer = optimizers.Accumulated(tfv1.train.MomentumOptimizer(rate, 0.9), steps)
        step = optimizer.apply_gradients([(gradient, variable)])
        session.run(tfv1.global_variables_initializer())
        found = []
        for value in gradients:
            session.run(step, {gradient: value})
            found.append(session.run(variable))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class TestLossScaled:
    """Plain gradient descent with a rate of 1 on loss = x w, whose gradient is x, computed in float16."""

    @pytest.fixture
    def descend(self, monkeypatch):
        monkeypatch.setattr(optimizers, "FIRST_SCALE", 2.0**14)
        monkeypatch.setattr(optimizers, "SCALE_PATIENCE", 3)
        with tf.Graph().as_default(), tfv1.Session() as session:
            x = tfv1.placeholder(tf.float32, [])
            w = tfv1.get_variable("w", initializer=0.0)
            optimizer = optimizers.LossScaled(tfv1.train.GradientDescentOptimizer(1.0))
            loss = tf.cast(tf.cast(w, tf.float16) * tf.cast(x, tf.float16), tf.float32)
            gradients = optimizer.compute_gradients(loss)
            step = optimizer.apply_gradients(gradients)
            norm = optimizer.forgive(tf.linalg.global_norm([g for g, _ in gradients]))
            session.run(tfv1.global_variables_initializer())

            def run(value):
                seen = session.run(norm, {x: value})
                session.run(step, {x: value})
                return seen, *session.run([w, optimizer._scale])

            yield run

    def test_gradients_too_small_for_float16_arrive(self, descend):
        tiny = 2.0**-20  # times a scale of 2^14; the smallest float16 is 2^-24, but inexact from 2^-14 on
        norm, w, scale = descend(tiny)
        assert (norm, w, scale) == (tiny, -tiny, 2.0**14)

    def test_a_step_that_overflows_is_left_out_and_halves_the_scale(self, descend):
        assert descend(2.0**3) == (0.0, 0.0, 2.0**13)  # 2^17 is beyond float16
        assert descend(2.0**3) == (0.0, 0.0, 2.0**12)
        assert descend(2.0**3) == (8.0, -8.0, 2.0**12)

    def test_good_steps_double_the_scale(self, descend):
        scales = [descend(1.0)[2] for _ in range(7)]
        assert np.log2(scales).tolist() == [14, 14, 15, 15, 15, 16, 15]  # 2^16 is beyond float16

    def test_an_overflow_starts_the_count_of_good_steps_again(self, descend):
        scales = [descend(value)[2] for value in (1.0, 1.0, 8.0, 1.0, 1.0, 1.0)]  # 8 times 2^14 is beyond float16
        assert np.log2(scales).tolist() == [14, 14, 13, 13, 13, 14]

    def test_an_infinite_gradient_at_the_lowest_scale_is_seen(self, descend):
        for _ in range(14):
            assert descend(np.inf)[0] == 0.0
        norm, w, scale = descend(np.inf)
        assert not np.isfinite(norm)
        assert (w, scale) == (0.0, 1.0)

    @pytest.mark.parametrize("num_towers", [1, 2])
    def test_accumulation_momentum_and_towers(self, num_towers, monkeypatch):
        """Two gradients a step, the mean of the towers' each; one step overflows, and neither counts nor adds."""
        monkeypatch.setattr(optimizers, "FIRST_SCALE", 2.0**14)
        with tf.Graph().as_default(), tfv1.Session() as session:
            values = tfv1.placeholder(tf.float32, [num_towers])
            momentum = tfv1.train.MomentumOptimizer(1.0, 0.9)
            optimizer = optimizers.LossScaled(optimizers.Accumulated(momentum, 2))
            weights = [tfv1.get_variable(f"tower{i}/w", initializer=0.0) for i in range(num_towers)]
            products = [tf.cast(w, tf.float16) * tf.cast(values[i], tf.float16) for i, w in enumerate(weights)]
            losses = [tf.cast(product, tf.float32) for product in products]
            towers = [optimizer.compute_gradients(loss, var_list=[w])[0][0] for loss, w in zip(losses, weights)]
            mean = tf.add_n(towers) / num_towers
            steps = [optimizer.apply_gradients([(mean, w)]) for w in weights]
            session.run(tfv1.global_variables_initializer())
            found = []
            for value in (0.5, 1.5, 8.0, 2.0, 1.0, 0.5):  # 8 times 2^14 is beyond float16
                fed = value * np.arange(1, num_towers + 1) / np.mean(np.arange(1, num_towers + 1))
                session.run(steps, {values: fed})
                found.append(session.run(weights))
            assert session.run(optimizer._scale) == 2.0**13
        first, second = -1.0, -1.0 - 0.9 - 1.5
        expected = [0, first, first, first, second, second]
        np.testing.assert_allclose(found, np.repeat(expected, num_towers).reshape(6, -1), rtol=1e-3)
