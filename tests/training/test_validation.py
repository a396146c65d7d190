"""Evaluation during training."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from full_disk import full_disk
from rectangles import make_dataset, make_settings, perfect
from tensorpack import ModelDesc, SimpleTrainer, TrainConfig, launch_train_with_config
from tensorpack.callbacks import MonitorBase
from tensorpack.dataflow import DataFromList
from tensorpack.utils import logger

import eval
from common.errors import DataError
from common.files import FileError
from common.ranks import Ranks
from evaluation.metrics import EvaluationError, NonFiniteError
from training.validation import EvalCallback


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path)


class OneVariable(ModelDesc):
    """The least that a trainer takes."""

    def inputs(self):
        return [tf.TensorSpec([1], tf.float32, "x")]

    def build_graph(self, x):
        return tf.reduce_sum(tf.get_variable("w/W", [1]) * x)

    def optimizer(self):
        return tf.train.GradientDescentOptimizer(0.1)


class Inference:
    """Stands in for the graph of the model: `bind` gives a perfect network. It counts the updates of its weights."""

    updates = 0

    def __init__(self, dataset):
        assert tf.get_default_graph().get_collection(tf.GraphKeys.GLOBAL_VARIABLES)  # made beside the training's
        self._dataset = dataset

    def update(self, session):
        assert session is not None
        self.updates += 1

    def bind(self, session):
        (variable,) = session.graph.get_collection(tf.GraphKeys.TRAINABLE_VARIABLES)
        assert session.run(variable).shape == (1,)
        return perfect(self._dataset)


class Recorder(MonitorBase):
    """Keeps what the callback reports."""

    def __init__(self):
        self.scalars = []

    def process_scalar(self, name, value):
        self.scalars.append((self.global_step, name, value))


@pytest.mark.parametrize(("period", "steps"), [(2, [8, 16, 20]), (0, [20]), (5, [20])])
def test_callback(dataset, tmp_path, period, steps):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "rectangles-8.json").write_text("of the run before")
    batches, offers = [], []
    callback = EvalCallback(
        make_settings(),
        lambda: Inference(dataset),
        [dataset],
        period_epochs=period,
        output_dir=folder,
        ranks=Ranks(),
        num_parallel=2,
        before_batch=lambda: batches.append(1),
        offer=lambda *offer: offers.append(offer),
    )
    recorder = Recorder()
    settings = TrainConfig(
        model=OneVariable(),
        dataflow=DataFromList([[np.ones(1, np.float32)]] * 100),
        callbacks=[callback],
        extra_callbacks=[],
        monitors=[recorder],
        steps_per_epoch=4,
        max_epoch=5,
    )
    with tf.Graph().as_default():
        launch_train_with_config(settings, SimpleTrainer())
    written = {"rectangles-8-1.json" if step == 8 and period == 2 else f"rectangles-{step}.json" for step in steps}
    assert {path.name for path in folder.iterdir()} == {"rectangles-8.json", *written}
    assert (folder / "rectangles-8.json").read_text() == "of the run before"
    ap = [(step, value) for step, name, value in recorder.scalars if name == "rectangles-mAP(segm)/IoU=0.5:0.95"]
    assert ap == [(step, pytest.approx(1)) for step in steps]
    assert offers == [("rectangles-mAP(segm)/IoU=0.5:0.95", pytest.approx(1))] * len(steps)
    assert len(batches) >= len(steps)
    assert callback._inference.updates == len(steps)
    # There are no medium or large objects: nothing is reported of them.
    assert len(recorder.scalars) == 8 * len(steps) and not any(math.isnan(value) for _, _, value in recorder.scalars)


class FakeTrainer:
    """What the callback needs of a trainer."""

    sess = None

    def __init__(self):
        self.global_step, self.max_epoch = 12, 3
        self.epoch_num = 3
        self.monitors = Recorder()
        self.monitors.put_scalar = lambda name, value: self.monitors.scalars.append((name, value))


@pytest.fixture
def callback(dataset, tmp_path, monkeypatch):
    """A callback after the last epoch; what it offers stands in its attribute `offers`."""
    offers = []
    callback = EvalCallback(
        make_settings(),
        None,
        [dataset],
        period_epochs=0,
        output_dir=str(tmp_path / "run"),
        ranks=Ranks(),
        num_parallel=1,
        before_batch=None,
        offer=lambda *offer: offers.append(offer),
    )
    callback.trainer, callback.offers, callback._network = FakeTrainer(), offers, perfect(dataset)
    callback._inference = SimpleNamespace(update=lambda session: None)
    return callback


def caused_by(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        FileError("cannot write 12.json: No space left on device"),
        OSError(28, "No space left on device"),
        caused_by(EvaluationError("cannot read the annotations"), OSError(5, "Input/output error")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_disk_that_fails_does_not_end_the_training(callback, monkeypatch, error):
    warnings = []
    monkeypatch.setattr(logger, "warning", warnings.append)
    monkeypatch.setattr(eval, "evaluate_dataset", raising(error))
    callback._trigger_epoch()
    assert [f"rectangles could not be evaluated: {error}"] == warnings
    assert callback.offers == callback.trainer.monitors.scalars == []


@pytest.mark.parametrize("error", [EvaluationError("class 4"), NonFiniteError("diverged"), DataError("no image")])
def test_other_errors_of_an_evaluation_end_the_training(callback, monkeypatch, error):
    monkeypatch.setattr(eval, "evaluate_dataset", raising(error))
    with pytest.raises(type(error), match=str(error)):
        callback._trigger_epoch()


def raising(error):
    def function(*_, **__):
        raise error

    return function


def test_a_full_disk_does_not_end_the_training(callback, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logger, "warning", warnings.append)
    with full_disk(100):
        callback._trigger_epoch()
    assert re.fullmatch(r"rectangles could not be evaluated: cannot write .*rectangles-12\.json: .*", warnings[0])
    assert list((tmp_path / "run").iterdir()) == []
    callback._trigger_epoch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["rectangles-12.json"]
    assert callback.offers == [("rectangles-mAP(segm)/IoU=0.5:0.95", pytest.approx(1))]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_draws_and_only_the_first_data_set_is_offered(callback, monkeypatch, rank):
    """On other ranks the evaluation has no values."""
    metrics = {"mAP(segm)/IoU=0.5:0.95": 0.25, "mAP(bbox)/IoU=0.5:0.95": 0.5, "large": math.nan}
    asked, pictures = [], []

    def evaluate(settings, network, dataset, *, output, ranks, num_parallel, before_batch):
        asked.append((network, dataset.name, output.name, ranks.rank, num_parallel, before_batch))
        return metrics if rank == 0 else None

    monkeypatch.setattr(eval, "evaluate_dataset", evaluate)
    callback._datasets = [SimpleNamespace(name=name) for name in ("one", "two")]
    callback._options["ranks"].rank = rank
    callback._draw = lambda network, dataset: [(f"{dataset.name}/1", (network, dataset.name))]
    callback.trainer.monitors.put_image = lambda *picture: pictures.append(picture)
    network = callback._network
    callback._trigger_epoch()
    assert asked == [(network, name, f"{name}-12.json", rank, 1, None) for name in ("one", "two")]
    reported = [(f"{name}-{key}", value) for name in ("one", "two") for key, value in list(metrics.items())[:2]]
    assert callback.trainer.monitors.scalars == (reported if rank == 0 else [])
    assert callback.offers == ([("one-mAP(segm)/IoU=0.5:0.95", 0.25)] if rank == 0 else [])
    drawn = [(f"{name}/1", (network, name)) for name in ("one", "two")]
    assert pictures == (drawn if rank == 0 else [])
    callback._settings.MODE_MASK = False
    callback._trigger_epoch()
    assert callback.offers[1:] == ([("one-mAP(bbox)/IoU=0.5:0.95", 0.5)] if rank == 0 else [])


def test_without_data_sets_nothing_is_evaluated(callback):
    callback._datasets = []
    callback._trigger_epoch()
    assert callback.offers == callback.trainer.monitors.scalars == []
