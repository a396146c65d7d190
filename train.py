#!/usr/bin/env -S sh -c 'exec "$(dirname "$(readlink -f "$0")")/setup/python" "$0" "$@"'
"""Train a detector.

    ./train.py --config MODE_FPN=True DATA.BASEDIR=/path/to/COCO BACKBONE.WEIGHTS=ImageNet-R50-AlignPadding.npz

config.py explains every setting. The run's logs, checkpoints and configuration go to --logdir.
"""
# `main` imports TensorFlow only after it has checked arguments, paths and data: mistakes are reported at once, and the
# worker processes that load images, which import this file too, stay small.

import argparse
import importlib.util
import logging.handlers
import os
import sys
import tempfile
from pathlib import Path

from common import checkpoint
from common.plugins import add_option, check_plugins, load_plugins
from common.ranks import Ranks
from config import OF_WEIGHTS, VERSION, Config, ConfigError, UserError, config
from dataset import get_datasets
from dataset.images import check_sizes
from training.watchdog import Watchdog

startup_logger = logging.getLogger("train")

LEFT_BY_FAILED_STARTS = ("log.log", "events.out.tfevents.")  # beginnings of file names


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config_help = "settings other than the defaults; @FILE reads them from a file, such as recipes/r50_fpn_mask_1x.cfg"
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help=config_help)
    parser.add_argument(
        "--logdir", default="train_log/rcnn", help="new directory for logs and checkpoints (%(default)s)"
    )
    load_help = "detector to fine-tune: a .npz, a TensorFlow checkpoint, or a run's folder"
    parser.add_argument("--load", metavar="CHECKPOINT", help=load_help)
    resume_help = "continue from the newest checkpoint in --logdir; start a new run there if it has none"
    parser.add_argument("--resume", action="store_true", help=resume_help)
    add_option(parser)
    parser.add_argument("--version", action="version", version=VERSION)
    return parser.parse_args(arguments)


def main(arguments):
    """Checks arguments, settings, data and paths, in this order; then starts TensorFlow and trains."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    messages = collect_messages()
    watchdog = Watchdog()
    load_plugins(arguments.plugins)
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
        check_sizes(checked, max_dropped=config.DATA.MAX_DROPPED)
    config.freeze()

    from training.run import Run, train  # starts TensorFlow

    train(Run(config, records, val_sets, weights, logdir, is_resumed, ranks, watchdog, messages))


def collect_messages():
    """Returns a logging.Handler that buffers the messages of all packages until the run opens its log."""
    handler = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL)
    for name in ("train", "config", "data", "dataset", "common"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(handler)
    return handler


def join_ranks():
    """Returns the Ranks of the run: the processes that `horovodrun` started, or this process alone."""
    if "HOROVOD_SIZE" not in os.environ:
        return Ranks()
    from common.horovod_ranks import HorovodRanks  # Horovod is optional, and starts TensorFlow

    return HorovodRanks()


def prepare(arguments, logdir):
    """Determines the settings and checks them and the log directory, before any data is read.

    Returns:
        the settings as a nested dict, and whether the run resumes from a checkpoint
    Raises:
        ConfigError: a setting or `logdir` cannot be used. CheckpointError: --load or BACKBONE.WEIGHTS cannot be used.
            PluginError: the run to resume or to load needs other plugins.
    """
    resume = arguments.resume and checkpoint.has_checkpoint(logdir)
    if resume:
        config.load(logdir / checkpoint.CONFIG_FILE)
        check_plugins(config.PLUGINS, logdir)
    config.update(arguments.config)
    config.PLUGINS = arguments.plugins
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
    """Sets the keys that the initial weights require: all that a converted file carries, or OF_WEIGHTS of a run.

    Args:
        weights: as `find_weights` returns them.
    """
    if not weights:
        if config.BACKBONE.FREEZE_AT > 0:
            startup_logger.warning(
                f"BACKBONE.FREEZE_AT={config.BACKBONE.FREEZE_AT} freezes the first layers at random values: give "
                "BACKBONE.WEIGHTS or --load, or train from scratch with BACKBONE.FREEZE_AT=0 BACKBONE.NORM=GN"
            )
        return
    path, _ = weights
    needed = checkpoint.carried_settings(path)
    if not needed and (config_file := checkpoint.find_config(path)):
        of_run = Config()
        of_run.load(config_file)
        check_plugins(of_run.PLUGINS, path)
        needed = {key: of_run.value(key) for key in OF_WEIGHTS}
    config.adopt(needed, source=path)


def check_unused(logdir):
    """Raises ConfigError if a run has used the folder. Logs of a run that failed before its first step don't count."""
    try:
        names = [path.name for path in logdir.iterdir()] if logdir.exists() else []
    except OSError as error:
        raise ConfigError(f"{logdir} can't be the --logdir: {error.strerror}") from error
    if not all(name.startswith(LEFT_BY_FAILED_STARTS) for name in names):
        raise ConfigError(f"{logdir} exists already: choose another --logdir, or continue that run with --resume")


def check_writable(logdir):
    """Raises ConfigError if the folder, or the nearest existing one above it, cannot be written to."""
    try:
        with tempfile.TemporaryFile(dir=next(path for path in (logdir, *logdir.absolute().parents) if path.exists())):
            pass
    except OSError as error:
        raise ConfigError(f"{logdir} can't be the --logdir: {error.strerror}") from error


def load_datasets():
    """Returns the Datasets of DATA.TRAIN and those of DATA.VAL; raises DatasetError if their classes differ."""
    datasets = get_datasets([*config.DATA.TRAIN, *config.DATA.VAL], config.DATA.BASEDIR)
    return datasets[: len(config.DATA.TRAIN)], datasets[len(config.DATA.TRAIN) :]


def training_records(datasets):
    """Returns the Records of all data sets in one list, without the images and objects that training cannot use."""
    filter_empty, max_dropped = config.DATA.FILTER_EMPTY_ANNOTATIONS, config.DATA.MAX_DROPPED
    options = {"filter_empty": filter_empty, "masks": config.MODE_MASK, "max_dropped": max_dropped}
    records = [record for dataset in datasets for record in dataset.records(training=True, **options)]
    if not any(len(record.labels) for record in records):
        raise ConfigError(f"DATA.TRAIN={config.DATA.TRAIN}: no image shows an object to train on")
    return records


def find_weights(load):
    """Returns the initial weights as (path, whether they are BACKBONE.WEIGHTS), or None without any."""
    if load and config.BACKBONE.WEIGHTS:
        raise ConfigError("give either --load or BACKBONE.WEIGHTS: a detector's checkpoint holds its backbone")
    if load:
        return checkpoint.resolve(load), False
    if config.BACKBONE.WEIGHTS:
        return checkpoint.resolve(config.BACKBONE.WEIGHTS), True
    return None


def run_program():
    """Runs the command; returns its exit code."""
    try:
        main(parse_arguments())
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(run_program())
