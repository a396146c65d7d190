"""Accumulated gradients, and dynamic loss scaling, alone and with accumulation, momentum and several towers."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from tensorpack.compat import tfv1

from common import weights
from config import Config
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


NAMES = (
    *("conv0/W", "group1/block1/W", "group2/block3/conv1/W", "group3/block0/bn/gamma"),
    *("norm_c2/gamma", "fastrcnn/fc6/W", "fastrcnn/fc6/b"),
)


def settings_of(*overrides):
    settings = Config()
    settings.update(overrides)
    return settings


def run_updates(overrides, gradients, *, accumulate=1, names=NAMES, rates=None):
    """The weights and their averages after each step: {name: [...]}; they start at 1 and -2.

    Args:
        gradients: [steps, variables, 2]. rates: of each step; 0.1 without.
    """
    with tf.Graph().as_default(), tfv1.Session() as session:
        learning_rate = tfv1.get_variable("learning_rate", initializer=0.1, trainable=False)
        variables = {name: tfv1.get_variable(name, initializer=[1.0, -2.0]) for name in names}
        for name, variable in variables.items():
            tfv1.add_to_collection(weights.MODEL_VARIABLES, variable)
            if not name.startswith("fastrcnn"):
                tfv1.add_to_collection(weights.BACKBONE_VARIABLES, variable)
        fed = [tfv1.placeholder(tf.float32, [2]) for _ in names]
        loss = tf.add_n([tf.reduce_sum(v * g) for v, g in zip(variables.values(), fed)])
        made = optimizers.make(settings_of(*overrides), learning_rate, accumulate=accumulate)
        step = made.optimizer.apply_gradients(made.optimizer.compute_gradients(loss, list(variables.values())))
        averages = made.averaged.averages if made.averaged else {}
        start = made.averaged.start() if made.averaged else tf.no_op()
        session.run(tfv1.global_variables_initializer())
        session.run(start)
        found = {name: [] for name in [*variables, *(f"EMA/{name}" for name in averages)]}
        for number, values in enumerate(gradients):
            learning_rate.load(rates[number] if rates is not None else 0.1, session)
            session.run(step, dict(zip(fed, values)))
            named = {**variables, **{f"EMA/{name}": average for name, average in averages.items()}}
            for name, value in session.run(named).items():
                found[name].append(value)
        assert all(v.op.name == f"EMA/{name}" for name, v in averages.items())
    return found


def random_gradients(steps=20, scale=1.0):
    return (scale * np.random.default_rng(3).normal(size=(steps, len(NAMES), 2))).astype(np.float32)


def slow_adamw(gradients, rates, *, betas, decay, epsilon=1e-8):
    """torch.optim.AdamW's update of one variable, in float64."""
    weight, mean, square, found = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2), []
    for t, (gradient, rate) in enumerate(zip(np.float64(gradients), rates), 1):
        weight = weight * (1 - rate * decay)
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        corrected = np.sqrt(square) / np.sqrt(1 - betas[1] ** t) + epsilon
        weight = weight - rate / (1 - betas[0] ** t) * mean / corrected
        found.append(weight)
    return found


@pytest.mark.parametrize("scale", [1.0, 1e-7])
def test_adamw_decays_kernels_apart_from_the_moments(scale):
    """Also where the gradients are as small as the epsilon."""
    gradients, rates = random_gradients(scale=scale), np.linspace(0.01, 0.1, 20)
    overrides = ["TRAIN.OPTIMIZER=adamw", "TRAIN.WEIGHT_DECAY=0.05", "TRAIN.ADAM_BETAS=[0.8,0.99]"]
    found = run_updates(overrides, gradients, rates=rates)
    for i, name in enumerate(NAMES):
        decay = 0.05 if name.endswith("/W") else 0.0
        expected = slow_adamw(gradients[:, i], rates, betas=(0.8, 0.99), decay=decay)
        np.testing.assert_allclose(found[name], expected, atol=2e-6, err_msg=name)


# Of a ResNet-50, whose third stage has six blocks: stem, stages, and two groups of the third; then the heads.
GROUPS = dict(zip(NAMES, (0, 2, 4, 5, 6, 6, 6)))


def test_rates_fall_with_the_depth_of_the_backbone():
    """By 0.9 a group: of AdamW all of the update, of momentum the gradient with its decay."""
    gradients, rates = random_gradients(), np.full(20, 0.1)
    common = ["TRAIN.BACKBONE_RATE_DECAY=0.9", "TRAIN.WEIGHT_DECAY=0.05"]
    adamw = run_updates([*common, "TRAIN.OPTIMIZER=adamw"], gradients, rates=rates)
    momentum = run_updates([*common, "TRAIN.MOMENTUM=0.8"], gradients, rates=rates)
    for i, name in enumerate(NAMES):
        share, decay = 0.9 ** (6 - GROUPS[name]), 0.05 if name.endswith("/W") else 0.0
        expected = slow_adamw(gradients[:, i], share * rates, betas=(0.9, 0.999), decay=decay)
        np.testing.assert_allclose(adamw[name], expected, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(
            momentum[name], slow_momentum(gradients[:, i], share * rates, momentum=0.8, decay=decay), atol=2e-6
        )


def slow_momentum(gradients, rates, *, momentum=0.9, decay=0.0):
    weight, velocity, found = np.array([1.0, -2.0]), np.zeros(2), []
    for gradient, rate in zip(np.float64(gradients), rates):
        velocity = momentum * velocity + gradient + decay * weight
        weight = weight - rate * velocity
        found.append(weight)
    return found


def test_gradients_are_shortened_to_a_norm_without_their_decay():
    """As torch.nn.utils.clip_grad_norm_ before torch.optim.SGD: some of the gradients, others are short enough."""
    gradients = random_gradients()
    norms = np.linalg.norm(gradients.reshape(20, -1), axis=1)
    limit = float(np.median(norms))
    found = run_updates([f"TRAIN.CLIP_NORM={limit}", "TRAIN.WEIGHT_DECAY=0.05"], gradients)
    clipped = gradients * np.minimum(1, limit / norms)[:, None, None]
    for i, name in enumerate(NAMES):
        decay = 0.05 if name.endswith("/W") else 0.0
        expected = slow_momentum(clipped[:, i], np.full(20, 0.1), decay=decay)
        np.testing.assert_allclose(found[name], expected, atol=2e-6, err_msg=name)


def test_weights_are_averaged_after_each_update():
    """From the initial weights on; with accumulation once in an update, and not in a step that float16 skips."""
    gradients = random_gradients()
    found = run_updates(["TRAIN.EMA_DECAY=0.9"], gradients)
    assert {name for name in found if name.startswith("EMA/")} == {f"EMA/{name}" for name in NAMES}
    for name in NAMES:
        average, expected = np.array([1.0, -2.0]), []
        for weight in found[name]:
            average = 0.9 * average + 0.1 * weight
            expected.append(average)
        np.testing.assert_allclose(found[f"EMA/{name}"], expected, atol=1e-6)
    skipped = gradients.copy()
    skipped[8:10] = np.inf
    found = run_updates(["TRAIN.EMA_DECAY=0.9", "TRAIN.PRECISION=float16"], skipped, accumulate=2)
    averages = np.array(found["EMA/conv0/W"])
    assert (averages[0] == [1, -2]).all() and (averages[1] != averages[0]).all()
    changes = (averages[1:] != averages[:-1]).all(axis=1)
    assert (averages[9] == averages[7]).all() and changes.sum() == 9  # twenty steps, of which two counted for nothing


def test_only_float16_scales_the_loss():
    for precision, is_scaled in (("float32", False), ("bfloat16", False), ("float16", True)):
        with tf.Graph().as_default():
            made = optimizers.make(settings_of(f"TRAIN.PRECISION={precision}"), tf.constant(0.1), accumulate=1)
            assert (made.forgive is not tf.identity) == is_scaled


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_towers_of_one_optimizer_stay_equal(optimizer):
    """Each has its own moments and count, and only the first has averages."""
    gradients = random_gradients()
    overrides = [f"TRAIN.OPTIMIZER={optimizer}", "TRAIN.EMA_DECAY=0.5", "TRAIN.CLIP_NORM=1.0"]
    overrides += ["TRAIN.BACKBONE_RATE_DECAY=0.8"]
    alone = run_updates(overrides, gradients)
    with tf.Graph().as_default(), tfv1.Session() as session:
        learning_rate = tfv1.get_variable("learning_rate", initializer=0.1, trainable=False)
        made = optimizers.make(settings_of(*overrides), learning_rate, accumulate=1)
        fed, steps, towers = [tfv1.placeholder(tf.float32, [2]) for _ in NAMES], [], []
        for tower in ("", "tower1/"):
            variables = [tfv1.get_variable(f"{tower}{name}", initializer=[1.0, -2.0]) for name in NAMES]
            for variable in variables if not tower else ():
                tfv1.add_to_collection(weights.MODEL_VARIABLES, variable)
                if not variable.op.name.startswith("fastrcnn"):
                    tfv1.add_to_collection(weights.BACKBONE_VARIABLES, variable)
            steps.append(made.optimizer.apply_gradients(list(zip(fed, variables))))
            towers.append(variables)
        session.run(tfv1.global_variables_initializer())
        session.run(made.averaged.start())
        for values in gradients:
            session.run(steps, dict(zip(fed, values)))
        found = session.run(towers)
        averages = session.run(made.averaged.averages)
    for tower in found:
        np.testing.assert_allclose(tower, [alone[name][-1] for name in NAMES], atol=1e-6)
    for name in NAMES:
        np.testing.assert_allclose(averages[name], alone[f"EMA/{name}"][-1], atol=1e-6)


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
        names = ("conv0/W", "tower1/fc/W", "conv0/b", "conv0/bn/gamma", "W", "conv0/Wide", "conv0/VW", "unused/W")
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
        "conv0/VW",
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
