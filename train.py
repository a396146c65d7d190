#!/usr/bin/env -S sh -c 'exec "$(dirname "$(readlink -f "$0")")/setup/python" "$0" "$@"'
"""Train a detector.

    ./train.py --config MODE_FPN=True DATA.BASEDIR=/path/to/COCO BACKBONE.WEIGHTS=ImageNet-R50-AlignPadding.npz

config.py explains every setting. The run's logs, checkpoints and configuration go to --logdir.
"""
# TensorFlow is imported only once the arguments, the data and the paths are known to be good: mistakes are answered at
# once, and the workers that load images, which run the top of this file too, stay light.

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import checkpoint
from config import ConfigError, UserError, config, lr_schedule_steps
from dataset import get_dataset


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="settings other than the defaults")
    parser.add_argument(
        "--logdir", default="train_log/rcnn", help="new directory for logs and checkpoints (%(default)s)"
    )
    parser.add_argument("--load", metavar="CHECKPOINT", help="detector to fine-tune: .npz, TensorFlow checkpoint, run")
    return parser.parse_args(arguments)


def main(arguments):
    # ------------------------------------------------------------------------------------------- refuse early
    config.update(arguments.config)
    weights = find_weights(arguments.load)
    if weights:
        config.adopt(checkpoint.carried_settings(weights[0]), source=weights[0])
    config.check()
    logdir = new_directory(arguments.logdir)
    train_sets, val_sets = load_datasets()
    config.DATA.CLASS_NAMES = ["BG", *train_sets[0].class_names]
    config.DATA.NUM_CATEGORY = len(train_sets[0].class_names)
    records = [
        record
        for dataset in train_sets
        for record in dataset.records(
            training=True, filter_empty=config.DATA.FILTER_EMPTY_ANNOTATIONS, masks=config.MODE_MASK
        )
    ]
    if not records:
        raise ConfigError(f"DATA.TRAIN={config.DATA.TRAIN} holds no image to train on")
    config.freeze()
    train(records, val_sets, weights, logdir)


def new_directory(logdir):
    """A run never touches what another run has written."""
    logdir = Path(logdir)
    try:
        if logdir.exists() and (not logdir.is_dir() or any(logdir.iterdir())):
            raise ConfigError(f"{logdir} exists already: choose another --logdir")
    except OSError as error:
        raise ConfigError(f"{logdir} can't be the --logdir: {error.strerror}") from error
    return logdir


def load_datasets():
    """The data sets of DATA.TRAIN and DATA.VAL, which must have the same classes."""
    train_sets, val_sets = (
        [get_dataset(name, config.DATA.BASEDIR) for name in ([names] if isinstance(names, str) else names)]
        for names in (config.DATA.TRAIN, config.DATA.VAL)
    )
    for other in train_sets[1:] + val_sets:
        if other.class_names != train_sets[0].class_names:
            raise ConfigError(f"the classes of {other.name} are not those of {train_sets[0].name}, in the same order")
    return train_sets, val_sets


def find_weights(load):
    """(path, check) of the weights to start from, or None."""
    if load and config.BACKBONE.WEIGHTS:
        raise ConfigError("give either --load or BACKBONE.WEIGHTS: a detector's checkpoint holds its backbone")
    if load:
        return checkpoint.resolve(load), checkpoint.check_finetune
    if config.BACKBONE.WEIGHTS:
        return checkpoint.resolve(config.BACKBONE.WEIGHTS), checkpoint.check_backbone
    return None


def train(records, val_sets, weights, logdir):
    """Build the graph and run the schedule."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from tensorpack import TrainConfig, launch_train_with_config
    from tensorpack.compat import tfv1
    from tensorpack.tfutils.sesscreate import NewSessionCreator
    from tensorpack.utils import logger

    import callbacks
    import data
    from modeling import rcnn

    tfv1.disable_eager_execution()
    trainer, devices, rank = make_trainer()
    if devices > 1 and config.BACKBONE.NORM == "SyncBN":
        raise ConfigError("BACKBONE.NORM=SyncBN works on one device only so far: use GN or FreezeBN on several")
    if trainer.is_chief:
        logger.set_logger_dir(str(logdir), "k")
        config.save(logdir / checkpoint.CONFIG_FILE)
    schedule = callbacks.derive_schedule(
        devices=devices,
        batch_per_device=config.TRAIN.BATCH_SIZE_PER_GPU,
        base_lr=config.TRAIN.BASE_LR,
        lr_schedule=lr_schedule_steps(config.TRAIN.LR_SCHEDULE),
        warmup_steps=config.TRAIN.WARMUP,
        warmup_from=config.TRAIN.WARMUP_INIT_LR,
        steps_per_epoch=config.TRAIN.STEPS_PER_EPOCH,
        num_images=len(records),
    )
    logger.info(f"Settings other than the defaults: {config.changes()}")
    logger.info(f"Schedule: {schedule}")
    signature = rcnn.input_signature(training=True)
    shards = devices if config.TRAINER == "horovod" else 1
    stream = data.training_data(records, shard_index=rank, num_shards=shards)
    batches = callbacks.Batches(stream, [spec.name for spec in signature])
    tfv1.set_random_seed(config.TRAIN.SEED)
    session_creator = NewSessionCreator()
    session_creator.config = rcnn.session_config()  # given to the constructor it would be warned about
    launch_train_with_config(
        TrainConfig(
            model=rcnn.RCNN(learning_rate=schedule.learning_rate, accumulate=schedule.accumulate),
            data=callbacks.TimedQueueInput(batches, signature),
            callbacks=make_callbacks(schedule, val_sets, logdir),
            extra_callbacks=callbacks.default_callbacks(),
            session_creator=session_creator,
            session_init=callbacks.InitialWeights(*weights) if weights else None,
            steps_per_epoch=schedule.steps_per_epoch,
            starting_epoch=config.TRAIN.STARTING_EPOCH,
            max_epoch=schedule.epochs,
        ),
        trainer,
    )
    batches.close()
    batches.raise_error()


def make_trainer():
    """The tensorpack trainer for the devices at hand, their number, and the rank of this process."""
    import tensorflow as tf
    from tensorpack.train import HorovodTrainer, SimpleTrainer, SyncMultiGPUTrainerReplicated
    from tensorpack.utils import logger

    if config.TRAINER == "horovod":
        if importlib.util.find_spec("horovod") is None:
            raise ConfigError("TRAINER=horovod needs Horovod: run `make horovod` first")
        trainer = HorovodTrainer(average=True)
        logger.info(f"Training with Horovod: rank {trainer.hvd.rank()} of {trainer.hvd.size()}.")
        return trainer, trainer.hvd.size(), trainer.hvd.rank()
    gpus = len(tf.config.list_physical_devices("GPU"))
    towers = config.TRAIN.NUM_GPUS or max(gpus, 1)
    if towers > max(gpus, 1):
        raise ConfigError(f"TRAIN.NUM_GPUS={towers}, but this machine has {gpus} GPUs that TensorFlow can use")
    logger.info(
        f"Training on {towers} GPUs." if gpus else f"Training on the CPU, {os.cpu_count()} cores: no GPU found."
    )
    if towers == 1:
        return SimpleTrainer(), 1, 0
    return SyncMultiGPUTrainerReplicated(towers, average=True), towers, 0


def make_callbacks(schedule, val_sets, logdir):
    """What happens beside the steps."""
    from tensorpack.callbacks import EstimatedTimeLeft

    import callbacks
    from eval import EvalCallback
    from modeling.rcnn import Inference

    return [
        callbacks.LearningRateSetter(schedule),
        callbacks.CheckpointSaver(period=config.TRAIN.CHECKPOINT_PERIOD, directory=logdir),
        EvalCallback(Inference, val_sets, period_epochs=config.TRAIN.EVAL_PERIOD, output_dir=logdir),
        EstimatedTimeLeft(),
    ]


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
