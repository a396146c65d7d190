"""Several towers and several ranks: the sums over them, and that training with them is training on the joined batch."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from tensorpack.compat import tfv1
from tensorpack.tfutils.tower import TrainTowerContext
from test_train import run

from modeling.layers import EMA_DECAY, NORM_EPSILON, batch_norm
from training import trainers

ROOT = Path(__file__).resolve().parents[2]


def joined_batch_norm(parts, gamma, beta, weights):
    """Batch norm over all values of several batches, in NumPy and float64.

    Returns:
        lists of outputs and of gradients of sum(output * weight) by the inputs; gradients by gamma and beta; mean and
        variance
    """
    channels = parts[0].shape[-1]
    x, w = (
        np.concatenate([part.reshape(-1, channels) for part in many]).astype(np.float64) for many in (parts, weights)
    )
    mean, variance = x.mean(axis=0), x.var(axis=0)
    deviation = np.sqrt(variance + NORM_EPSILON)
    normalised = (x - mean) / deviation
    gradient = gamma / deviation * (w - w.mean(axis=0) - normalised * (w * normalised).mean(axis=0))
    ends = np.cumsum([part.size // channels for part in parts])[:-1]

    def split(values):
        return [piece.reshape(part.shape) for piece, part in zip(np.split(values, ends), parts)]

    outputs = split(normalised * gamma + beta)
    return outputs, split(gradient), (w * normalised).sum(axis=0), w.sum(axis=0), mean, variance


def random_batches(seed=0):
    """Two batches of different sizes and means, and weights for their losses."""
    rng = np.random.default_rng(seed)
    shapes = [(2, 5, 7, 4), (1, 6, 3, 4)]
    parts = [(rng.normal(size=shape) * 2 + 5 * i).astype(np.float32) for i, shape in enumerate(shapes)]
    return parts, [rng.normal(size=shape).astype(np.float32) for shape in shapes]


GAMMA, BETA = np.array([0.5, 1, 2, 3], np.float32), np.array([0, 1, -1, 2], np.float32)


@pytest.mark.parametrize("valid", [None, ([True, False], [True]), ([False, False], [True])])
def test_sync_bn_over_towers_is_batch_norm_over_the_joined_batch(valid):
    """Of all items, or of those that are valid, of which a tower may have none."""
    parts, weights = random_batches()
    masks = [np.array(mask) for mask in valid] if valid else [np.ones(len(part), bool) for part in parts]
    outputs, gradients, averages, updates = [], [], [], []
    options = tfv1.ConfigProto(device_count={"CPU": 2}, allow_soft_placement=True)
    with tf.Graph().as_default(), tfv1.Session(config=options) as session:
        for i, (part, weight) in enumerate(zip(parts, weights)):
            context = TrainTowerContext(f"tower{i}", vs_name=f"tower{i}" if i else "", index=i, total=2)
            with tf.device(f"/gpu:{i}"), context:  # as tensorpack builds towers, also where there is no GPU
                x = tf.constant(part)
                y = batch_norm("bn", x, is_valid=tf.constant(masks[i]) if valid else None)
                variables = [v for v in tfv1.global_variables() if v.op.name.startswith("tower1/") == (i == 1)]
                outputs.append(y)
                gamma, beta = variables[:2]
                loss = tf.reduce_sum(tf.boolean_mask(y * weight, masks[i]))
                gradients.append(tfv1.gradients(loss, [x, gamma, beta], colocate_gradients_with_ops=True))
                averages.append(variables[2:])
        updates = tfv1.get_collection(tfv1.GraphKeys.UPDATE_OPS)
        session.run(tfv1.global_variables_initializer())
        for variable in tfv1.trainable_variables():
            variable.load(GAMMA if "gamma" in variable.op.name else BETA, session)
        found_outputs, found_gradients = session.run([outputs, gradients])
        session.run(updates)
        found_averages = session.run(averages)
    used = [[part[mask] for part, mask in zip(many, masks)] for many in (parts, weights)]
    expected = joined_batch_norm(used[0], GAMMA, BETA, used[1])
    for mask, (dx, *_) in zip(masks, found_gradients):
        assert not dx[~mask].any()
    outputs = [y[mask] for y, mask in zip(found_outputs, masks)]
    gradients = [[dx[mask], *affine] for (dx, *affine), mask in zip(found_gradients, masks)]
    check_sync_bn(expected, outputs, gradients, found_averages)


def check_sync_bn(expected, outputs, gradients, averages):
    """Compare what replicas found with what the joined batch gives; gradients of gamma and beta add up."""
    for i in range(2):
        np.testing.assert_allclose(outputs[i], expected[0][i], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(gradients[i][0], expected[1][i], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(averages[i][0], (1 - EMA_DECAY) * expected[4], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(averages[i][1], EMA_DECAY + (1 - EMA_DECAY) * expected[5], rtol=1e-4, atol=1e-5)
    for k in (1, 2):
        np.testing.assert_allclose(gradients[0][k] + gradients[1][k], expected[1 + k], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("reduced", "is_right"),
    [
        (lambda a, b: (a + b) / 2, True),
        (lambda a, b: a, False),  # only one replica's
        (lambda a, b: a + b, False),  # the sum
        (lambda a, b: (a + b) / 2 + 0.02 * np.abs(a).mean() * np.ones_like(a), False),
        (lambda a, b: np.full_like(a, np.inf), False),
        (lambda a, b: np.full_like(a, np.nan), False),
    ],
)
def test_gradient_check_sees_a_wrong_mean(reduced, is_right):
    rng = np.random.default_rng(0)
    replicas_gradients = [
        [rng.normal(size=shape).astype(np.float32) for shape in ((3000, 100), (7,), ())] for _ in "ab"
    ]
    with tf.Graph().as_default(), tfv1.Session() as session:
        local = [[(tf.constant(gradient), None) for gradient in gradients] for gradients in replicas_gradients]
        means = [(tf.constant(reduced(a, b)), None) for a, b in zip(*replicas_gradients)]
        projections = tf.stack([trainers._projections(gradients) for gradients in local])
        error = session.run(trainers._reduction_error(projections, means))
    assert not error.any() if is_right else error[0] > 0.01


def test_gradient_check_waits_while_a_replica_s_own_gradient_is_not_finite():
    with tf.Graph().as_default(), tfv1.Session() as session:
        local = [[(tf.constant([1.0, own]), None)] for own in (2.0, np.inf)]
        projections = tf.stack([trainers._projections(gradients) for gradients in local])
        error = session.run(trainers._reduction_error(projections, [(tf.constant([1.0, np.inf]), None)]))
    assert np.isnan(error).all()


def test_the_error_of_a_reduced_gradient_is_in_units_of_the_mean_norm(monkeypatch):
    """Two replicas, whose projections have a mean of 1 and whose norms one of 10: up to 0.1 is rounding."""
    reduced = [1.0, 1.09, 0.91, 1.2, 0.8, 6.0]
    monkeypatch.setattr(trainers, "_projections", lambda _: tf.constant([reduced, [5.0] * 6]))
    projections = np.float32([[[3.0] * 6, [4.0] * 6], [[-1.0] * 6, [16.0] * 6]])
    with tf.Graph().as_default(), tfv1.Session() as session:
        error = session.run(trainers._reduction_error(projections, None))
    np.testing.assert_allclose(error, [0, 0, 0, 0.02, 0.02, 0.5], rtol=1e-5)


def test_projections_are_linear_and_differ_by_variable():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50)).astype(np.float32)
    with tf.Graph().as_default(), tfv1.Session() as session:
        of_a, of_b, of_sum = session.run(
            [trainers._projections([(tf.constant(x), None), (tf.constant(x), None)]) for x in (a, b, 2 * a + b)]
        )
    np.testing.assert_allclose(of_sum[0], 2 * of_a[0] + of_b[0], rtol=1e-4)
    np.testing.assert_allclose(of_a[1], [np.linalg.norm(a)] * 2, rtol=1e-5)
    assert of_a[0, 0] != of_a[0, 1]  # else a swap of two equal shapes would go unnoticed


def test_the_gradient_check_ends_with_the_first_finite_step(monkeypatch):
    infos = []
    monkeypatch.setattr(trainers.logger, "info", infos.append)
    check = trainers.GradientCheck("error", ["a", "b", "c"])
    assert check._before_run(None).fetches == "error"
    check._after_run(None, SimpleNamespace(results=np.array([0, np.nan, 0.5])))
    assert check._before_run(None).fetches == "error"  # compared in the next step
    check._after_run(None, SimpleNamespace(results=np.zeros(3)))
    assert infos == ["The reduced gradients equal the mean of the replicas' gradients."]
    assert check._before_run(None) is None
    check._after_run(None, SimpleNamespace(results=None))
    check = trainers.GradientCheck("error", ["a", "b", "c"])
    message = r"is not the mean over the replicas, of 2 variables, first b \(off by 0.25 of its norm\)"
    with pytest.raises(trainers.ReplicaError, match=message) as error:
        check._after_run(None, SimpleNamespace(results=np.array([0, 0.25, 0.5])))
    assert error.value.exit_code == 1


def test_towers_that_start_from_different_weights_are_refused():
    with tf.Graph().as_default(), tfv1.Session() as session:
        for name in ("conv0/W", "conv1/W", "tower_of_babel/W"):
            tfv1.get_variable(name, initializer=[1.0, 2.0])
        own = tfv1.GraphKeys.LOCAL_VARIABLES
        of_tower = {
            name: tfv1.get_variable(name, initializer=[1.0, 2.0], collections=[own], trainable=False)
            for name in ("tower1/conv0/W", "tower1/conv1/W", "tower1/counter", "other/conv0/W")
        }
        check = trainers._EqualTowers()
        check.trainer = SimpleNamespace(sess=session)
        check._setup_graph()
        session.run([tfv1.global_variables_initializer(), tfv1.local_variables_initializer()])
        for name in ("tower1/counter", "other/conv0/W"):  # of no tower, or in none but this one
            of_tower[name].load([5.0, 5.0], session)
        check._before_train()
        of_tower["tower1/conv1/W"].load([1.0, 3.0], session)
        message = "towers start from different weights: 1 variables, first tower1/conv1/W"
        with pytest.raises(trainers.ReplicaError, match=message):
            check._before_train()


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_of_different_weights_or_models_are_refused(rank, monkeypatch):
    infos = []
    monkeypatch.setattr(trainers.logger, "info", infos.append)
    with tf.Graph().as_default(), tfv1.Session() as session:
        for name in "cab":
            tfv1.get_variable(name, initializer=np.ones([2, 2], np.float32))
        session.run(tfv1.global_variables_initializer())
        ranks = SimpleNamespace(rank=rank, size=2)
        check = trainers._EqualRanks(ranks)
        check.trainer = SimpleNamespace(sess=session)

        def gathered(change):
            ranks.gather = lambda own: [own, change(own)] if rank == 0 else [change(own), own]
            check._before_train()

        gathered(list)
        assert infos == ["All 2 ranks start from the same weights."]
        other, command = 1 - rank, "start all ranks with the same command"
        for change, count in ((lambda own: own[:-1], 2), (lambda own: [*own, "more"], 4)):
            message = f"ranks {rank} and {other} have models of 3 and {count} variables: {command}"
            with pytest.raises(trainers.ReplicaError, match=message):
                gathered(change)
        message = f"ranks {rank} and {other} start from different weights: 2 variables, first b"
        with pytest.raises(trainers.ReplicaError, match=message):
            gathered(lambda own: [own[0], "x", "y"])


# ---------------------------------------------------------------- two ranks of Horovod


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks of rank_checks.py have found: a dict of arrays each."""
    directory = tmp_path_factory.mktemp("ranks")
    result = run("tests/training/rank_checks.py", directory, num_ranks=2)
    assert result.returncode == 0, result.stderr
    return [dict(np.load(directory / f"rank-{rank}.npz")) for rank in range(2)]


@pytest.mark.slow
class TestTwoRanks:
    def test_sync_bn_is_batch_norm_over_the_joined_batch(self, ranks):
        parts, weights = random_batches()
        check_sync_bn(
            joined_batch_norm(parts, GAMMA, BETA, weights),
            [rank["y"] for rank in ranks],
            [[rank["dx"], rank["dgamma"], rank["dbeta"]] for rank in ranks],
            [[rank["mean"], rank["variance"]] for rank in ranks],
        )

    def test_tell_each_other(self, ranks):
        for rank in ranks:
            assert rank["gathered"].tolist() == [3, 100003]
            assert rank["to_chief"].tolist() == ([0, 1] if rank is ranks[0] else [])
            assert rank["of_chief"].tolist() == ["0", "é\n"]
            assert rank["shared"].tolist() == [7, 8]

    def test_unequal_weights_are_noticed(self, ranks):
        for rank in ranks:
            assert str(rank["equal"]) == ""
            assert "start from different weights: 1 variables, first weight" in str(rank["unequal"])
