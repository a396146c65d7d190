"""The training run: `train` wires graph, trainer and callbacks, in order."""

import functools
import json
import logging.handlers
import os
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf
from tensorpack import TrainConfig, launch_train_with_config
from tensorpack.callbacks import EstimatedTimeLeft
from tensorpack.compat import tfv1
from tensorpack.tfutils.sesscreate import NewSessionCreator
from tensorpack.train import SimpleTrainer, Trainer
from tensorpack.utils import logger

import data
from common import checkpoint, weights
from common.errors import DataError
from common.files import unused_path
from common.ranks import RankLost, Ranks, is_lost
from config import Config, ConfigError, lr_schedule_steps
from dataset import Dataset, Record
from dataset.augment import TRANSFORMS
from evaluation import metrics
from inference import stages
from inference.graph import Inference, TowerInference, session_config, warn_of_precision
from modeling import rcnn
from training import monitors, optimizers, trainers
from training.ema import StartAverages
from training.exactness import CompleteGradients
from training.guards import CheckpointSaver, Guard
from training.input import Batches, make_input
from training.model import TrainingModel
from training.resume import AfterFirstStep, FirstEpochFrom, InitialWeights, Resumed, rewind_statistics
from training.schedule import LearningRateSetter, Schedule, derive_schedule
from training.validation import EvalCallback
from training.watchdog import Watchdog


class Run(NamedTuple):
    """The inputs of a training, complete before TensorFlow starts."""

    settings: Config  # frozen
    records: list[Record]  # of all training sets
    val_sets: list[Dataset]
    weights: tuple[Path, bool] | None  # initial weights: (path, whether they are a backbone alone), or None
    logdir: Path
    is_resumed: bool  # whether the run continues from a checkpoint in `logdir`
    ranks: Ranks
    watchdog: Watchdog
    messages: logging.handlers.MemoryHandler  # buffered log messages of the start


def train(run: Run) -> None:
    """Builds the graph and runs the schedule.

    Raises:
        ConfigError: a setting names nothing that is registered, or contradicts the checkpoint to resume from; or the
            machine lacks GPUs or disk space. CheckpointMismatch: the weights do not fit the model.
        ReplicaError: devices disagree. Diverged, Stopped, NotSaved, DataError, RankLost: the run ended early.
    """
    settings, ranks = run.settings, run.ranks
    tfv1.disable_eager_execution()
    check_names(settings)
    trainer, towers = make_trainer(settings, ranks)
    start_log(run, is_chief=trainer.is_chief)
    warn_of_precision(settings.TRAIN.PRECISION)
    schedule = make_schedule(settings, devices=towers * ranks.size, num_images=len(run.records))
    logger.info(f"Schedule: {schedule}")
    snapshot = find_snapshot(run, schedule) if run.is_resumed and trainer.is_chief else None
    position = ranks.of_chief(find_position(run, schedule, snapshot) if trainer.is_chief else None)
    step, epoch, _ = position
    stream = data.training_data(
        settings, run.records, start=step * towers, shard_index=ranks.rank, num_shards=ranks.size
    )
    signature = rcnn.input_signature(settings, training=True)
    batches = Batches(stream, [spec.name for spec in signature])
    model = TrainingModel(settings, learning_rate=schedule.learning_rate, accumulate=schedule.accumulate)
    saver = make_saver(run, schedule, snapshot, batches)
    guard = make_guard(run, schedule, saver, model=model, stream=stream, batches=batches)
    tfv1.set_random_seed(settings.TRAIN.SEED)
    session_creator = NewSessionCreator()
    session_creator.config = session_config(towers=towers)  # tensorpack warns if the constructor gets it
    try:
        launch_train_with_config(
            TrainConfig(
                model=model,
                data=make_input(batches, signature),
                callbacks=make_callbacks(run, position, schedule, guard, saver, model=model, towers=towers),
                extra_callbacks=monitors.default_callbacks(),
                monitors=monitors.make_monitors(settings, run.logdir) if trainer.is_chief else [],
                session_creator=session_creator,
                session_init=Resumed(snapshot) if snapshot else InitialWeights.of(run.weights),
                steps_per_epoch=schedule.steps_per_epoch,
                starting_epoch=epoch,
                max_epoch=schedule.epochs,
            ),
            trainer,
        )
    except tfv1.errors.OpError as error:
        if is_lost(error):
            raise RankLost(ranks.rank) from error
        raise
    finally:
        batches.close()
        run.watchdog.stop()
    check_end(trainer.global_step, position, schedule, batches=batches, saver=saver)


def check_names(settings):
    """Raises ConfigError if a setting that training uses names nothing that is registered."""
    rcnn.check(settings)
    optimizers.OPTIMIZERS.find(settings.TRAIN.OPTIMIZER)
    metrics.OTHER_METRICS.find_all(settings.TEST.METRICS)
    TRANSFORMS.find_all(settings.PREPROC.TRANSFORMS)
    monitors.LOGGERS.find_all(settings.TRAIN.LOGGERS)


def start_log(run, *, is_chief):
    """Opens tensorpack's log in the run's folder, and writes the buffered messages to it."""
    logger.addFilter(monitors.is_worth_logging)
    if is_chief:
        logger.set_logger_dir(str(run.logdir), "k")
    run.messages.setTarget(RunLog())
    run.messages.flush()
    run.messages.flushLevel = logging.NOTSET
    logger.info(f"Settings other than the defaults: {run.settings.changes()}")


class RunLog(logging.Handler):
    """Forwards messages to tensorpack's log."""

    def emit(self, record):
        getattr(logger, record.levelname.lower())(record.getMessage())


def make_trainer(settings: Config, ranks: Ranks) -> tuple[Trainer, int]:
    """The tensorpack trainer for the available devices, and the number of towers in this process.

    Raises:
        ConfigError: TRAIN.NUM_GPUS exceeds the GPUs of the machine.
    """
    if settings.TRAINER == "horovod":
        logger.info(f"Training with Horovod: rank {ranks.rank} of {ranks.size}.")
        return trainers.RankTrainer(ranks), 1
    gpus = len(tf.config.list_physical_devices("GPU"))
    towers = settings.TRAIN.NUM_GPUS or max(gpus, 1)
    if gpus and towers > gpus:
        raise ConfigError(f"TRAIN.NUM_GPUS={towers}, but this machine has {gpus} GPUs that TensorFlow can use")
    cores = len(os.sched_getaffinity(0))
    logger.info(f"Training on {towers} GPUs." if gpus else f"Training on the CPU, {cores} cores: no GPU found.")
    return (SimpleTrainer() if towers == 1 else trainers.TowerTrainer(towers, average=True)), towers


def make_schedule(settings: Config, *, devices: int, num_images: int) -> Schedule:
    """The Schedule of the configured recipe on this number of devices."""
    return derive_schedule(
        devices=devices,
        batch_per_device=settings.TRAIN.BATCH_SIZE_PER_GPU,
        base_lr=settings.TRAIN.BASE_LR,
        lr_schedule=lr_schedule_steps(settings.TRAIN.LR_SCHEDULE),
        epochs=settings.TRAIN.EPOCHS,
        decay_at=settings.TRAIN.DECAY_AT,
        policy=settings.TRAIN.LR_POLICY,
        warmup_steps=settings.TRAIN.WARMUP,
        warmup_from=settings.TRAIN.WARMUP_INIT_LR,
        warmup_factor=settings.TRAIN.WARMUP_FACTOR,
        steps_per_epoch=settings.TRAIN.STEPS_PER_EPOCH,
        num_images=num_images,
    )


# ------------------------------------------------------------------------------------------------- resuming


def run_state(run, schedule):
    """The values that determine the order of the data and the size of a step, a dict; a resumed run needs the same."""
    settings = run.settings
    return {
        "images per step": schedule.images_per_step,
        "TRAIN.BATCH_SIZE_PER_GPU": settings.TRAIN.BATCH_SIZE_PER_GPU,
        "ranks": run.ranks.size,
        "images of DATA.TRAIN": len(run.records),
        "TRAIN.SEED": settings.TRAIN.SEED,
        "DATA.REPEAT_THRESHOLD": settings.DATA.REPEAT_THRESHOLD,
    }


def find_snapshot(run: Run, schedule: Schedule) -> weights.Snapshot:
    """The checkpoint to resume from.

    Raises:
        ConfigError: its run had other data or devices. CheckpointMismatch: no checkpoint can be read.
    """
    snapshot = weights.newest_readable(run.logdir)
    state = run_state(run, schedule)
    old = snapshot.state
    differs = [f"{key} ({old.get(key)}, now {value})" for key, value in state.items() if old.get(key) != value]
    if differs:
        raise ConfigError(
            f"can't resume {run.logdir} with other {', '.join(differs)}: "
            f"start another run from its weights with --load {run.logdir}"
        )
    return snapshot


def find_position(run: Run, schedule: Schedule, snapshot: weights.Snapshot | None) -> tuple[int, int, int]:
    """Where the schedule continues: (step, epoch to begin with, steps of that epoch that are done)."""
    step = snapshot.step if snapshot else 0
    finished_steps = rewind_statistics(run.logdir, step)
    if not step:
        return 0, run.settings.TRAIN.STARTING_EPOCH, 0
    epoch, steps_done = divmod(step, schedule.steps_per_epoch)
    if not steps_done and step not in finished_steps:  # interrupted between the epoch's last step and its end
        return step, epoch, schedule.steps_per_epoch
    return step, epoch + 1, steps_done


# ------------------------------------------------------------------------------------------------- callbacks


def make_saver(run, schedule, snapshot, batches):
    """The CheckpointSaver of the run."""
    return CheckpointSaver(
        period=run.settings.TRAIN.CHECKPOINT_PERIOD,
        directory=run.logdir,
        state=run_state(run, schedule),
        newest=snapshot.path if snapshot else None,
        has_data_failed=batches.has_failed,
    )


def make_guard(run, schedule, saver, *, model, stream, batches):
    """The Guard of the run."""
    return Guard(
        model=model,
        schedule=schedule,
        watchdog=run.watchdog,
        ranks=run.ranks,
        saver=saver,
        make_batch=stream.batch_of,
        directory=run.logdir,
        stall_timeout=run.settings.TRAIN.STALL_TIMEOUT,
        explain_stall=batches.explain_stall,
    )


def make_callbacks(run, position, schedule, guard, saver, *, model, towers):
    """The callbacks of the run, a list."""
    settings, (step, _, steps_done) = run.settings, position
    draw = functools.partial(stages.compare_with_truth, settings, count=settings.TRAIN.EVAL_PICTURES)
    return [
        *([StartAverages(model)] if settings.TRAIN.EMA_DECAY and step == 0 else []),
        LearningRateSetter(schedule),
        FirstEpochFrom(steps_done),
        AfterFirstStep(lambda: save_config(settings, run.logdir)),
        guard,
        saver,
        EvalCallback(
            settings,
            lambda: build_inference(settings, model, towers),
            run.val_sets,
            period_epochs=settings.TRAIN.EVAL_PERIOD,
            output_dir=run.logdir,
            ranks=run.ranks,
            num_parallel=towers,
            before_batch=guard.check,
            offer=saver.offer,
            draw=draw if settings.TRAIN.EVAL_PICTURES else None,
        ),
        EstimatedTimeLeft(),
        CompleteGradients(),
    ]


def build_inference(settings, model, towers):
    """The inference graph on the weights of the training, or on their averages where there are any."""
    getter = model.averaged.get if model.averaged else None
    return Inference(settings, getter=getter) if towers == 1 else TowerInference(settings, towers, getter=getter)


def save_config(settings, logdir):
    """Writes the settings beside the checkpoints. Only after the first step: until then the folder counts as unused."""
    path = logdir / checkpoint.CONFIG_FILE
    if path.exists() and json.loads(path.read_text()) != json.loads(settings.to_json()):
        path.rename(unused_path(path))  # written before a resume with other settings
    checkpoint.save_config(settings, path)


def check_end(last_step, position, schedule, *, batches, saver):
    """Raises the error that ended the data, NotSaved without a last checkpoint, or DataError if steps are missing."""
    batches.raise_error()
    saver.raise_failure()
    step, epoch, steps_done = position
    planned = step + (schedule.epochs + 1 - epoch) * schedule.steps_per_epoch - steps_done
    if last_step < planned:
        raise DataError(f"the data ended at step {last_step} of {planned}")
