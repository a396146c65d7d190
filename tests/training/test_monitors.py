"""What receives the values of a run."""

import logging
from types import SimpleNamespace

import pytest
import tensorflow as tf
from tensorpack.callbacks import JSONWriter, ScalarPrinter
from tensorpack.compat import tfv1

from config import Config, ConfigError
from training import monitors


def test_a_full_disk_ends_the_events_and_not_the_training(tmp_path, monkeypatch):
    warnings, calls = [], []
    monkeypatch.setattr(monitors.logger, "warning", warnings.append)

    def no_space(*_):
        calls.append(1)
        raise IndexError("events.out.tfevents: No space left on device")  # as TensorFlow says it

    for name in ("process_summary", "process_event", "_write_graph", "_trigger", "_after_train"):
        monkeypatch.setattr(monitors.TFEventWriter, name, no_space)
    writer = monitors.EventWriter(str(tmp_path))
    writer.process_summary(None)
    writer.process_event(None)
    writer._write_graph()
    writer._trigger()
    writer._after_train()
    assert len(calls) == len(warnings) == 1
    assert "No space left on device" in warnings[0]


@pytest.mark.parametrize(
    "error",
    [OSError("x"), LookupError("x"), RuntimeError("x"), tf.errors.InternalError(None, None, "x"), TypeError("x")],
)
def test_which_errors_of_a_write_end_the_events(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    warnings = []
    monkeypatch.setattr(monitors.logger, "warning", warnings.append)
    monkeypatch.setattr(monitors.TFEventWriter, "process_event", fail)
    writer = monitors.EventWriter(str(tmp_path))
    if isinstance(error, TypeError):  # a mistake of the program, no full disk
        with pytest.raises(TypeError):
            writer.process_event(None)
    else:
        writer.process_event(None)
    assert len(warnings) == (not isinstance(error, TypeError))


def test_events_are_written_with_their_arguments(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(monitors.TFEventWriter, "process_summary", lambda _, summary: written.append(summary))
    monitors.EventWriter(str(tmp_path)).process_summary("summary")
    assert written == ["summary"]


def test_only_the_log_of_tensorpack_s_own_failure_message_is_dropped():
    def record(message):
        return logging.LogRecord("tensorpack", logging.ERROR, "", 0, message, None, None)

    assert not monitors.is_worth_logging(record("Training failed at global_step=7"))
    assert monitors.is_worth_logging(record("Saved model-7. Training failed at global_step=7"))
    assert monitors.is_worth_logging(record(ValueError("an object")))


def test_loggers_of_the_settings_come_before_those_of_every_run(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(monitors.logger, "LOG_DIR", str(tmp_path), raising=False)  # else files are not written
    monkeypatch.setitem(monitors.LOGGERS, "mine", lambda *arguments: made.append(arguments) or "my logger")
    settings = Config()
    settings.TRAIN.LOGGERS = ["mine"]
    first, *others = monitors.make_monitors(settings, tmp_path)
    assert (first, made) == ("my logger", [(settings, tmp_path)])
    assert list(map(type, others)) == [JSONWriter, ScalarPrinter]
    settings.TRAIN.LOGGERS = []
    assert len(monitors.make_monitors(settings, tmp_path)) == 2
    settings.TRAIN.LOGGERS = ["nobody_s"]
    with pytest.raises(ConfigError, match="nobody_s"):
        monitors.make_monitors(settings, tmp_path)
    events, *_ = monitors.make_monitors(Config(), tmp_path)
    assert type(events) is monitors.EventWriter


def test_tensorpack_s_defaults_have_this_project_s_bar():
    names = [type(callback).__name__.partition("_")[0] for callback in monitors.default_callbacks()]
    assert names == ["MovingAverageSummary", "Progress", "MergeAllSummaries", "RunUpdateOps"]


def test_the_bar_shows_a_step_s_values_and_reports_their_means(monkeypatch):
    """Three parts of the losses in two towers; an epoch of 4 steps, of which a resume leaves 2."""
    clock, scalars, shown = [100.0], {}, []
    monkeypatch.setattr(monitors, "time", SimpleNamespace(time=lambda: clock[0]))
    with tf.Graph().as_default() as graph, tfv1.Session(graph=graph) as session:
        names = ("rpn_losses/label_loss", "rpn_losses/box_loss", "maskrcnn_loss/maskrcnn_loss", "wd_cost")
        for tower in ("tower0", "tower1"):
            for number, name in enumerate(names, 1):
                loss = tf.constant(float(number), name=f"{tower}/{name}")
                tfv1.add_to_collection(tfv1.GraphKeys.LOSSES, loss)
        tf.constant(10.0, name="total_cost")
        tf.constant(0.5, name="data_time")
        bar = monitors.Progress()
        bar.get_tensors_maybe_in_tower = lambda names: [graph.get_tensor_by_name(name) for name in names]
        receiver = SimpleNamespace(put_scalar=scalars.__setitem__)
        bar.trainer = SimpleNamespace(steps_per_epoch=4, local_step=0, monitors=receiver)
        bar._before_train()
        bar.trainer.steps_per_epoch = 2
        bar._before_epoch()
        assert bar._bar.total == 2
        monkeypatch.setattr(bar._bar, "set_postfix", lambda values, refresh: shown.append((values, refresh)))
        for factor in (1, 3):
            fetched = session.run(bar._before_run(None).fetches)
            bar._after_run(None, SimpleNamespace(results=[factor * value for value in fetched]))
        clock[0] += 8.0
        bar._after_epoch()
        bar._trigger_epoch()
    first = {"cost": "10", "data_s": "0.5", "rpn": "3", "maskrcnn": "3", "wd": "4"}
    second = {"cost": "30", "data_s": "1.5", "rpn": "9", "maskrcnn": "9", "wd": "12"}
    assert shown == [(first, False), (second, False)]
    means = {"cost": 20.0, "data_s": 1.0, "rpn": 6.0, "maskrcnn": 6.0, "wd": 8.0, "step_s": 4.0}
    assert scalars == {f"epoch/{part}": value for part, value in means.items()}
    bar.trainer.steps_per_epoch = 0  # a resume after the last step of an epoch: no mean of nothing
    scalars.clear()
    bar._before_epoch()
    bar._after_epoch()
    bar._trigger_epoch()
    assert scalars == {}
