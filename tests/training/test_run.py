"""How a training is wired: names that nothing has registered, devices, schedule, callbacks, the log, and its end."""

import logging
import logging.handlers
from pathlib import Path
from types import SimpleNamespace

import pytest
import tensorflow as tf
from tensorpack.train import SimpleTrainer

from common.ranks import RankLost, Ranks
from config import Config, ConfigError
from modeling import backbone, rcnn
from training import run, trainers
from training.run import check_names

# Settings, and a name that the message must offer; plugins of other tests may have registered more.
OF_THE_MODEL = [
    ("CONVENTIONS=caffe2", "torchvision"),
    ("BACKBONE.NAME=resnet_50", "resnet"),
    ("FRCNN.BOX_LOSS=l3", "l1"),
    ("FPN.FRCNN_HEAD_FUNC=maskrcnn_up4conv_head", "fastrcnn_4conv1fc_head"),
    ("FPN.MRCNN_HEAD_FUNC=fastrcnn_2fc_head", "maskrcnn_up4conv_head"),
]
OF_THE_TRAINING = [
    ("TRAIN.OPTIMIZER=momentun", "momentum"),
    ("TRAIN.LOGGERS=['tensorboard','no_logger']", "tensorboard"),
    ("PREPROC.TRANSFORMS=['no_transform']", "--plugins imports modules"),
    ("TEST.METRICS=['no_metric']", "--plugins imports modules"),
]


def settings_of(*overrides):
    settings = Config()
    settings.update(["MODE_FPN=True", *overrides])
    settings.check()
    return settings


@pytest.mark.parametrize(
    ("check", "override", "known"),
    [
        *[(rcnn.check, *row) for row in OF_THE_MODEL],
        *[(check_names, *row) for row in (*OF_THE_MODEL, *OF_THE_TRAINING)],
    ],
)
def test_names_that_nothing_has_registered_are_refused(check, override, known):
    key, _, value = override.partition("=")
    name = value.strip("[]").split(",")[-1].strip("'")
    with pytest.raises(ConfigError) as error:
        check(settings_of(override))
    message = str(error.value)
    assert message.startswith(f"no {key} {name!r} (")
    assert known in message.partition("(")[2]
    assert "\n" not in message


def test_names_that_are_registered_pass():
    for name in backbone.BACKBONES:
        check_names(settings_of(f"BACKBONE.NAME={name}"))
    for conventions in rcnn.CONVENTIONS:
        check_names(settings_of(f"CONVENTIONS={conventions}"))
    check_names(Config())


def test_names_are_not_evaluated(tmp_path):
    payload = f"__import__('os').system('touch {tmp_path / 'X'}')"
    for key in ("CONVENTIONS", "BACKBONE.NAME", "FPN.FRCNN_HEAD_FUNC", "TRAIN.OPTIMIZER"):
        with pytest.raises(ConfigError, match=f"no {key} .__import__"):
            check_names(settings_of(f"{key}={payload}"))
    assert not (tmp_path / "X").exists()


def test_c4_needs_a_backbone_with_a_last_stage(monkeypatch):
    monkeypatch.delitem(backbone.BACKBONES, "pyramid_only", raising=False)  # and again at the end
    backbone.register("pyramid_only", lambda image, **options: [])
    check_names(settings_of("BACKBONE.NAME=pyramid_only"))
    with pytest.raises(ConfigError, match="BACKBONE.NAME=pyramid_only has no last stage to run on RoIs: set MODE_FPN"):
        check_names(settings_of("BACKBONE.NAME=pyramid_only", "MODE_FPN=False"))


# ---------------------------------------------------------------- devices and schedule


@pytest.mark.parametrize(
    ("gpus", "wanted", "trainer", "towers"),
    [
        (0, None, SimpleTrainer, 1),
        (0, 2, trainers.TowerTrainer, 2),  # on the CPU
        (1, None, SimpleTrainer, 1),
        (2, None, trainers.TowerTrainer, 2),
        (2, 1, SimpleTrainer, 1),
        (2, 2, trainers.TowerTrainer, 2),
        (2, 3, None, 3),
    ],
)
def test_the_trainer_follows_the_gpus(monkeypatch, gpus, wanted, trainer, towers):
    infos = []
    monkeypatch.setattr(run.logger, "info", infos.append)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU"] * gpus if kind == "GPU" else ["CPU"])
    settings = settings_of(f"TRAIN.NUM_GPUS={wanted}")
    if trainer is None:
        message = "TRAIN.NUM_GPUS=3, but this machine has 2 GPUs that TensorFlow can use"
        with pytest.raises(ConfigError, match=message):
            run.make_trainer(settings, Ranks())
        return
    made, count = run.make_trainer(settings, Ranks())
    assert type(made) is trainer
    assert count == towers
    told = f"Training on {towers} GPUs." if gpus else "Training on the CPU, "
    assert any(info.startswith(told) for info in infos)


def test_horovod_trains_one_tower_in_each_process(monkeypatch):
    monkeypatch.setattr(trainers, "RankTrainer", lambda ranks: ("trainer of", ranks))
    ranks = Ranks()
    assert run.make_trainer(settings_of("TRAINER=horovod"), ranks) == (("trainer of", ranks), 1)


def test_the_schedule_is_made_of_the_settings():
    settings = settings_of(
        *("TRAIN.BATCH_SIZE_PER_GPU=2", "TRAIN.BASE_LR=0.3", "TRAIN.LR_SCHEDULE=[100,200,350]", "TRAIN.WARMUP=7"),
        *("TRAIN.WARMUP_INIT_LR=0.01", "TRAIN.STEPS_PER_EPOCH=40"),
    )
    schedule = run.make_schedule(settings, devices=3, num_images=77)
    # 6 images a step, 2 steps an update of 12 images: a rate of 12 / 8, and 8 / 6 times as many steps
    assert (schedule.images_per_step, schedule.accumulate) == (6, 2)
    assert schedule.learning_rate == pytest.approx(0.45)
    assert (schedule.warmup_from, schedule.warmup_steps) == (0.01, 7)
    assert schedule.decay_steps == (134, 267)
    assert (schedule.epochs, schedule.steps_per_epoch, schedule.total_steps) == (12, 39, 468)  # 466.7 steps
    assert schedule.passes == pytest.approx(468 * 6 / 77)


# ---------------------------------------------------------------- callbacks


@pytest.fixture
def wired(tmp_path, monkeypatch):
    """A stand-in for a Run, and what its callbacks are made with: dicts by name."""
    made = {}
    for name in ("CheckpointSaver", "Guard", "EvalCallback"):
        monkeypatch.setattr(run, name, lambda *args, name=name, **options: made.setdefault(name, (args, options)))
    settings = settings_of(
        *("TRAIN.CHECKPOINT_PERIOD=3", "TRAIN.EVAL_PERIOD=4", "TRAIN.STALL_TIMEOUT=77", "TRAIN.EVAL_PICTURES=0"),
    )
    parts = SimpleNamespace(settings=settings, logdir=tmp_path, ranks=Ranks(), watchdog="watchdog", records=[1, 2])
    parts.val_sets = ["a data set"]
    return parts, made


SCHEDULE = SimpleNamespace(images_per_step=5)


@pytest.mark.parametrize("snapshot", [None, SimpleNamespace(path=Path("run/model-6"))])
def test_the_saver_knows_the_run_and_its_snapshot(wired, snapshot):
    parts, made = wired
    run.make_saver(parts, SCHEDULE, snapshot, SimpleNamespace(has_failed="has_failed"))
    options = made["CheckpointSaver"][1]
    assert options.pop("state")["images per step"] == 5
    newest = snapshot and Path("run/model-6")
    expected = {"period": 3, "directory": parts.logdir, "newest": newest, "has_data_failed": "has_failed"}
    assert options == expected


def test_the_guard_knows_where_data_and_time_out_come_from(wired):
    parts, made = wired
    stream, batches = SimpleNamespace(batch_of="batch_of"), SimpleNamespace(explain_stall="explain")
    run.make_guard(parts, SCHEDULE, "saver", model="model", stream=stream, batches=batches)
    assert made["Guard"][1] == {
        "model": "model",
        "schedule": SCHEDULE,
        "watchdog": "watchdog",
        "ranks": parts.ranks,
        "saver": "saver",
        "make_batch": "batch_of",
        "directory": parts.logdir,
        "stall_timeout": 77,
        "explain_stall": "explain",
    }


@pytest.mark.parametrize(("decay", "step", "expected"), [(0.0, 0, False), (0.9, 0, True), (0.9, 8, False)])
def test_averages_start_with_a_new_run(wired, decay, step, expected):
    parts, _ = wired
    parts.settings.TRAIN.EMA_DECAY = decay
    model, guard = SimpleNamespace(averaged=None), SimpleNamespace(check="check")
    saver = SimpleNamespace(offer="offer")
    callbacks = run.make_callbacks(parts, (step, 1, 0), SCHEDULE, guard, saver, model=model, towers=1)
    assert (type(callbacks[0]).__name__ == "StartAverages") == expected


@pytest.mark.parametrize(("towers", "pictures", "averaged"), [(1, 0, None), (2, 3, SimpleNamespace(get="get"))])
def test_the_evaluation_uses_the_towers_of_the_training(wired, monkeypatch, towers, pictures, averaged):
    parts, made = wired
    calls = []
    for name in ("Inference", "TowerInference"):
        monkeypatch.setattr(run, name, lambda *args, getter, name=name: calls.append((name, *args, getter)))
    monkeypatch.setattr(run.stages, "compare_with_truth", lambda *args, **options: calls.append((args, options)))
    parts.settings.TRAIN.EVAL_PICTURES = pictures
    saver, guard = SimpleNamespace(offer="offer"), SimpleNamespace(check="check")
    model = SimpleNamespace(averaged=averaged)
    callbacks = run.make_callbacks(parts, (8, 2, 2), SCHEDULE, guard, saver, model=model, towers=towers)
    kinds = [type(callback).__name__ for callback in callbacks[:3]]
    assert kinds == ["LearningRateSetter", "FirstEpochFrom", "AfterFirstStep"]
    assert callbacks[3:5] == [guard, saver]
    assert [type(callback).__name__ for callback in callbacks[6:]] == ["EstimatedTimeLeft", "CompleteGradients"]
    (settings, build, val_sets), options = made["EvalCallback"]
    assert (settings, val_sets) == (parts.settings, ["a data set"])
    draw = options.pop("draw")
    assert options == {
        "period_epochs": 4,
        "output_dir": parts.logdir,
        "ranks": parts.ranks,
        "num_parallel": towers,
        "before_batch": "check",
        "offer": "offer",
    }
    build()
    assert calls == [("Inference", settings, None) if towers == 1 else ("TowerInference", settings, 2, "get")]
    assert (draw is None) == (pictures == 0)
    if draw:
        draw("network", "data set")
        assert calls[1:] == [((settings, "network", "data set"), {"count": 3})]
    assert not (parts.logdir / "config.json").exists()
    callbacks[2]._trigger_step()
    assert (parts.logdir / "config.json").exists()


# ---------------------------------------------------------------- log and end


@pytest.mark.parametrize("is_chief", [True, False])
def test_messages_of_the_start_go_to_the_log_and_later_ones_at_once(monkeypatch, tmp_path, is_chief):
    logged, folders = [], []
    for level in ("info", "warning", "error"):
        monkeypatch.setattr(run.logger, level, lambda message, level=level: logged.append((level, message)))
    monkeypatch.setattr(run.logger, "set_logger_dir", lambda *args: folders.append(args))
    monkeypatch.setattr(run.logger, "addFilter", folders.append)
    messages = logging.handlers.MemoryHandler(100, flushLevel=logging.CRITICAL)
    source = logging.Logger("a test of the log")
    source.addHandler(messages)
    source.warning("%d images left out", 3)
    settings = settings_of("TRAIN.SEED=5")
    run.start_log(SimpleNamespace(logdir=tmp_path, messages=messages, settings=settings), is_chief=is_chief)
    assert folders == [run.monitors.is_worth_logging, *([(str(tmp_path), "k")] if is_chief else [])]
    assert logged[0] == ("warning", "3 images left out")
    assert logged[1][1] == f"Settings other than the defaults: {settings.changes()}"
    source.error("later")
    assert logged[2:] == [("error", "later")]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (tf.errors.UnknownError(None, SimpleNamespace(type="HorovodAllreduce"), "shut down"), RankLost),
        (tf.errors.ResourceExhaustedError(None, None, "out of memory"), tf.errors.ResourceExhaustedError),
        (None, None),
    ],
)
def test_a_training_closes_its_data_and_ends_the_watch(monkeypatch, tmp_path, error, raised):
    """However it ends. Two towers: data begin at twice the step to resume from."""
    events, streams, configs = [], [], []
    for name in ("disable_eager_execution", "set_random_seed"):  # they would change other tests
        monkeypatch.setattr(run.tfv1, name, lambda *_: None)
    stream = SimpleNamespace(close=lambda: events.append("close"), batch_of=None, awaited=None)
    monkeypatch.setattr(run.data, "training_data", lambda *args, **options: streams.append((args, options)) or stream)
    trainer = SimpleNamespace(is_chief=True, global_step=12)
    monkeypatch.setattr(run, "make_trainer", lambda *_: (trainer, 2))
    monkeypatch.setattr(run, "start_log", lambda *_, **__: None)
    snapshot = SimpleNamespace(step=4, path=tmp_path / "model-4")
    monkeypatch.setattr(run, "find_snapshot", lambda *_: snapshot)
    monkeypatch.setattr(run, "TrainConfig", lambda **options: configs.append(options))
    monkeypatch.setattr(run, "check_end", lambda *args, **_: events.append(args[:2]))
    monkeypatch.setattr(run, "make_input", lambda *_: None)

    def launch(*_):
        if error:
            raise error

    monkeypatch.setattr(run, "launch_train_with_config", launch)
    settings = settings_of("TRAIN.LR_SCHEDULE=[3]", "TRAIN.STEPS_PER_EPOCH=6", "DATA.NUM_WORKERS=0")
    settings.DATA.NUM_CATEGORY = 1
    parts = run.Run(
        settings=settings,
        records=[None] * 10,
        val_sets=[],
        weights=None,
        logdir=tmp_path,
        is_resumed=True,
        ranks=Ranks(),
        watchdog=SimpleNamespace(stop=lambda: events.append("stop")),
        messages=None,
    )
    if raised:
        with pytest.raises(raised):
            run.train(parts)
    else:
        run.train(parts)
    position = (4, 1, 4)
    assert events == ["close", "stop", *([] if error else [(12, position)])]
    assert streams == [((settings, parts.records), {"start": 8, "shard_index": 0, "num_shards": 1})]
    (options,) = configs
    # 2 images a step, 8 an update: 3 steps of 8 images are 12 steps
    assert [options[name] for name in ("steps_per_epoch", "starting_epoch", "max_epoch")] == [6, 1, 2]
    assert options["session_init"]._snapshot is snapshot
    assert options["model"]._accumulate == 4
    assert options["model"]._learning_rate == pytest.approx(settings.TRAIN.BASE_LR)
