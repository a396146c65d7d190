#!/usr/bin/env -S sh -c 'exec "$(dirname "$(readlink -f "$0")")/setup/python" "$0" "$@"'
"""Train a detector.

    ./train.py --config MODE_FPN=True DATA.BASEDIR=/path/to/COCO BACKBONE.WEIGHTS=ImageNet-R50-AlignPadding.npz

config.py explains every setting. The run's logs, checkpoints and configuration go to --logdir.
"""
# TensorFlow is imported only once the arguments, the data and the paths are known to be good: mistakes are answered at
# once, and the workers that load images, which run the top of this file too, stay light.

import argparse
import functools
import importlib.util
import json
import logging.handlers
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import checkpoint
import data
from config import OF_WEIGHTS, Config, ConfigError, UserError, config, lr_schedule_steps
from dataset import get_datasets
from ranks import HorovodRanks, RankLost, Ranks, is_lost
from watchdog import Watchdog

startup_logger = logging.getLogger("train")

LEFT_BY_FAILED_STARTS = ("log.log", "events.out.tfevents.")


class Run(NamedTuple):
    """What is known before TensorFlow is started."""

    records: list  # of all training sets
    val_sets: list
    weights: tuple | None  # see find_weights
    logdir: Path
    is_resumed: bool
    ranks: Ranks
    watchdog: Watchdog
    messages: logging.handlers.MemoryHandler  # see collect_messages


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="settings other than the defaults")
    parser.add_argument(
        "--logdir", default="train_log/rcnn", help="new directory for logs and checkpoints (%(default)s)"
    )
    parser.add_argument("--load", metavar="CHECKPOINT", help="detector to fine-tune: .npz, TensorFlow checkpoint, run")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --logdir; without one, begin there"
    )
    return parser.parse_args(arguments)


def main(arguments):
    messages = collect_messages()
    watchdog = Watchdog()
    ranks = join_ranks()
    logdir = Path(arguments.logdir)
    # Rank 0 decides, since the others may not see its files.
    settings, is_resumed = ranks.of_chief(prepare(arguments, logdir) if ranks.rank == 0 else None)
    config.set_tree(settings)
    train_sets, val_sets = load_datasets()
    weights = None if is_resumed or ranks.rank else find_weights(arguments.load)
    config.DATA.CLASS_NAMES = ["BG", *train_sets[0].class_names]
    config.DATA.NUM_CATEGORY = len(train_sets[0].class_names)
    config.DATA.CATEGORY_IDS = train_sets[0].category_ids
    records = training_records(train_sets)
    for checked in (records, *(dataset.records(training=False) for dataset in val_sets)):
        data.check_sizes(checked, max_share=config.DATA.MAX_DROPPED)
    config.freeze()
    train(Run(records, val_sets, weights, logdir, is_resumed, ranks, watchdog, messages))


def collect_messages():
    """A logging.Handler that keeps what config, data and dataset say until the run has a log for it."""
    handler = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL)
    for name in ("train", "config", "data", "dataset"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(handler)
    return handler


def pass_on(messages):
    """From now on what `collect_messages` keeps goes to tensorpack's log, where it is and at once."""
    messages.setTarget(RunLog())
    messages.flush()
    messages.flushLevel = logging.NOTSET


class RunLog(logging.Handler):
    """Passes messages on to tensorpack's log."""

    def emit(self, record):
        from tensorpack.utils import logger

        getattr(logger, record.levelname.lower())(record.getMessage())


def join_ranks():
    """The processes that train together: those of `horovodrun`, or this one alone."""
    return HorovodRanks() if "HOROVOD_SIZE" in os.environ else Ranks()


def prepare(arguments, logdir):
    """The settings as a tree, and whether there is a checkpoint to resume from; refuses what makes no sense."""
    resume = arguments.resume and checkpoint.has_checkpoint(logdir)
    if resume:
        config.load(logdir / checkpoint.CONFIG_FILE)
    config.update(arguments.config)
    if not resume:
        adopt_settings(find_weights(arguments.load))
    config.check()
    if "HOROVOD_SIZE" in os.environ and config.TRAINER != "horovod":
        raise ConfigError("horovodrun needs TRAINER=horovod: without it, every process would train for itself")
    if config.TRAINER == "horovod" and importlib.util.find_spec("horovod") is None:
        raise ConfigError("TRAINER=horovod needs Horovod: run `make horovod` first")
    if not arguments.resume:
        check_unused(logdir)
    check_writable(logdir)
    return config.to_dict(), resume


def adopt_settings(weights):
    """Set what the weights to start from need: of converted ones all, of a run's what would go wrong in silence.

    Args:
        weights: of `find_weights`
    """
    if not weights:
        if config.BACKBONE.FREEZE_AT > 0:
            startup_logger.warning(
                f"BACKBONE.FREEZE_AT={config.BACKBONE.FREEZE_AT} keeps the first layers as they are, and they "
                "are random: give BACKBONE.WEIGHTS or --load, or train from scratch by BACKBONE.FREEZE_AT=0 "
                "BACKBONE.NORM=GN"
            )
        return
    path, _ = weights
    needed = checkpoint.carried_settings(path)
    if not needed and (config_file := checkpoint.find_config(path)):
        of_run = Config()
        of_run.load(config_file)
        needed = {key: of_run.value(key) for key in OF_WEIGHTS}
    config.adopt(needed, source=path)


def check_unused(logdir):
    """A run never touches what another run has written. What a run leaves that failed before its first step is free."""
    try:
        names = [path.name for path in logdir.iterdir()] if logdir.exists() else []
    except OSError as error:
        raise ConfigError(f"{logdir} can't be the --logdir: {error.strerror}") from error
    if not all(name.startswith(LEFT_BY_FAILED_STARTS) for name in names):
        raise ConfigError(f"{logdir} exists already: choose another --logdir, or go on with that run by --resume")


def check_writable(logdir):
    """Try to write where the directory is, or will be made."""
    try:
        with tempfile.TemporaryFile(dir=next(path for path in (logdir, *logdir.absolute().parents) if path.exists())):
            pass
    except OSError as error:
        raise ConfigError(f"{logdir} can't be the --logdir: {error.strerror}") from error


def load_datasets():
    """The data sets of DATA.TRAIN and DATA.VAL, which must have the same classes."""
    datasets = get_datasets([*config.DATA.TRAIN, *config.DATA.VAL], config.DATA.BASEDIR)
    return datasets[: len(config.DATA.TRAIN)], datasets[len(config.DATA.TRAIN) :]


def training_records(datasets):
    """The records of all data sets together, without what cannot be trained on."""
    filter_empty, max_dropped = config.DATA.FILTER_EMPTY_ANNOTATIONS, config.DATA.MAX_DROPPED
    options = {"filter_empty": filter_empty, "masks": config.MODE_MASK, "max_dropped": max_dropped}
    records = [record for dataset in datasets for record in dataset.records(training=True, **options)]
    if not any(len(record.labels) for record in records):
        raise ConfigError(f"DATA.TRAIN={config.DATA.TRAIN}: no image shows an object to train on")
    return records


def find_weights(load):
    """(path, check) of the weights to start from, or None."""
    if load and config.BACKBONE.WEIGHTS:
        raise ConfigError("give either --load or BACKBONE.WEIGHTS: a detector's checkpoint holds its backbone")
    if load:
        return checkpoint.resolve(load), checkpoint.check_finetune
    if config.BACKBONE.WEIGHTS:
        return checkpoint.resolve(config.BACKBONE.WEIGHTS), checkpoint.check_backbone
    return None


def train(run):
    """Build the graph and run the schedule."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from tensorpack import TrainConfig, launch_train_with_config
    from tensorpack.compat import tfv1
    from tensorpack.tfutils.sesscreate import NewSessionCreator
    from tensorpack.utils import logger

    import callbacks
    import sessions
    from modeling import rcnn

    tfv1.disable_eager_execution()
    logger.addFilter(callbacks.is_worth_logging)
    trainer, towers = make_trainer(run.ranks)
    if trainer.is_chief:
        logger.set_logger_dir(str(run.logdir), "k")
    pass_on(run.messages)
    schedule = make_schedule(towers * run.ranks.size, len(run.records))
    logger.info(f"Settings other than the defaults: {config.changes()}")
    logger.info(f"Schedule: {schedule}")
    snapshot = find_snapshot(run, schedule) if run.is_resumed and trainer.is_chief else None
    step, epoch, steps_done = run.ranks.of_chief(find_position(run, schedule, snapshot) if trainer.is_chief else None)
    signature = rcnn.input_signature(training=True)
    stream = data.training_data(run.records, start=step * towers, shard_index=run.ranks.rank, num_shards=run.ranks.size)
    batches = callbacks.Batches(stream, [spec.name for spec in signature])
    model = rcnn.RCNN(learning_rate=schedule.learning_rate, accumulate=schedule.accumulate)
    saver, guard = make_guards(run, schedule, snapshot, model=model, stream=stream, batches=batches)
    tfv1.set_random_seed(config.TRAIN.SEED)
    session_creator = NewSessionCreator()
    session_creator.config = sessions.session_config(towers=towers)  # given to the constructor it would be warned about
    try:
        launch_train_with_config(
            TrainConfig(
                model=model,
                data=callbacks.TimedQueueInput(batches, signature),
                callbacks=make_callbacks(run, schedule, guard, saver, towers=towers, steps_done=steps_done),
                extra_callbacks=callbacks.default_callbacks(),
                monitors=callbacks.default_monitors(),
                session_creator=session_creator,
                session_init=callbacks.Resumed(snapshot) if snapshot else callbacks.InitialWeights.of(run.weights),
                steps_per_epoch=schedule.steps_per_epoch,
                starting_epoch=epoch,
                max_epoch=schedule.epochs,
            ),
            trainer,
        )
    except tfv1.errors.OpError as error:
        if is_lost(error):
            raise RankLost(run.ranks.rank) from error
        raise
    finally:
        batches.close()
        run.watchdog.stop()
    batches.raise_error()
    saver.raise_failure()
    last_step = step + (schedule.epochs + 1 - epoch) * schedule.steps_per_epoch - steps_done
    if trainer.global_step < last_step:
        raise data.DataError(f"the data ended at step {trainer.global_step} of {last_step}")


def make_schedule(devices, num_images):
    """callbacks.Schedule of the configured recipe."""
    import callbacks

    return callbacks.derive_schedule(
        devices=devices,
        batch_per_device=config.TRAIN.BATCH_SIZE_PER_GPU,
        base_lr=config.TRAIN.BASE_LR,
        lr_schedule=lr_schedule_steps(config.TRAIN.LR_SCHEDULE),
        warmup_steps=config.TRAIN.WARMUP,
        warmup_from=config.TRAIN.WARMUP_INIT_LR,
        steps_per_epoch=config.TRAIN.STEPS_PER_EPOCH,
        num_images=num_images,
    )


def make_trainer(ranks):
    """The tensorpack trainer for the devices at hand, and the number of towers in this process."""
    import tensorflow as tf
    from tensorpack.train import SimpleTrainer
    from tensorpack.utils import logger

    import replicas

    if config.TRAINER == "horovod":
        logger.info(f"Training with Horovod: rank {ranks.rank} of {ranks.size}.")
        return replicas.RankTrainer(ranks), 1
    gpus = len(tf.config.list_physical_devices("GPU"))
    towers = config.TRAIN.NUM_GPUS or max(gpus, 1)
    if gpus and towers > gpus:
        raise ConfigError(f"TRAIN.NUM_GPUS={towers}, but this machine has {gpus} GPUs that TensorFlow can use")
    cores = len(os.sched_getaffinity(0))
    logger.info(f"Training on {towers} GPUs." if gpus else f"Training on the CPU, {cores} cores: no GPU found.")
    return (SimpleTrainer() if towers == 1 else replicas.TowerTrainer(towers, average=True)), towers


# ------------------------------------------------------------------------------------------------- going on


def run_state(run, schedule):
    """What the order of the data and the meaning of a step depend on: the same before and after a resume."""
    return {
        "images per step": schedule.images_per_step,
        "TRAIN.BATCH_SIZE_PER_GPU": config.TRAIN.BATCH_SIZE_PER_GPU,
        "ranks": run.ranks.size,
        "images of DATA.TRAIN": len(run.records),
        "TRAIN.SEED": config.TRAIN.SEED,
        "DATA.REPEAT_THRESHOLD": config.DATA.REPEAT_THRESHOLD,
    }


def find_snapshot(run, schedule):
    """The checkpoint to go on from; refuses one of other data or devices."""
    snapshot = checkpoint.newest_readable(run.logdir)
    state = run_state(run, schedule)
    old = snapshot.state
    differs = [f"{key} ({old.get(key)}, now {value})" for key, value in state.items() if old.get(key) != value]
    if differs:
        raise ConfigError(
            f"can't go on with {run.logdir} with other {', '.join(differs)}: "
            f"begin another run from its weights by --load {run.logdir}"
        )
    return snapshot


def find_position(run, schedule, snapshot):
    """(step, epoch to begin with, steps of it that are done) of the schedule."""
    import callbacks

    step = snapshot.step if snapshot else 0
    finished_steps = callbacks.rewind_statistics(run.logdir, step)
    if not step:
        return 0, config.TRAIN.STARTING_EPOCH, 0
    epoch, steps_done = divmod(step, schedule.steps_per_epoch)
    if not steps_done and step not in finished_steps:  # it was interrupted between the epoch's last step and its end
        return step, epoch, schedule.steps_per_epoch
    return step, epoch + 1, steps_done


def make_guards(run, schedule, snapshot, *, model, stream, batches):
    """What saves the run, and what watches over it."""
    import callbacks

    saver = callbacks.CheckpointSaver(
        period=config.TRAIN.CHECKPOINT_PERIOD,
        directory=run.logdir,
        state=run_state(run, schedule),
        newest=snapshot.path if snapshot else None,
        has_data_failed=batches.has_failed,
    )
    guard = callbacks.Guard(
        model=model,
        schedule=schedule,
        watchdog=run.watchdog,
        ranks=run.ranks,
        saver=saver,
        make_batch=stream.batch_of,
        directory=run.logdir,
        stall_timeout=config.TRAIN.STALL_TIMEOUT,
        explain_stall=batches.explain_stall,
    )
    return saver, guard


def make_callbacks(run, schedule, guard, saver, *, towers, steps_done):
    """What happens beside the steps."""
    from tensorpack.callbacks import EstimatedTimeLeft

    import callbacks
    import inspection
    from eval import EvalCallback
    from sessions import Inference, TowerInference

    pictures = functools.partial(inspection.compare_with_truth, count=config.TRAIN.EVAL_PICTURES)
    return [
        callbacks.LearningRateSetter(schedule),
        callbacks.FirstEpochFrom(steps_done),
        callbacks.AfterFirstStep(lambda: save_config(run.logdir)),
        guard,
        saver,
        EvalCallback(
            Inference if towers == 1 else lambda: TowerInference(towers),
            run.val_sets,
            period_epochs=config.TRAIN.EVAL_PERIOD,
            output_dir=run.logdir,
            ranks=run.ranks,
            num_parallel=towers,
            before_batch=guard.check,
            offer=saver.offer,
            draw=pictures if config.TRAIN.EVAL_PICTURES else None,
        ),
        EstimatedTimeLeft(),
    ]


def save_config(logdir):
    """The settings beside the checkpoints. Not before the first step: until then the directory is free."""
    path = logdir / checkpoint.CONFIG_FILE
    if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(config.to_dict())):
        path.rename(checkpoint.unused_path(path))  # of before a resume with other settings
    config.save(path)


def run_program():
    """What the command does: returns its exit code."""
    try:
        main(parse_arguments())
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(run_program())
