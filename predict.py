#!/usr/bin/env -S sh -c 'exec "$(dirname "$(readlink -f "$0")")/setup/python" "$0" "$@"'
"""Find objects in images, or evaluate a model.

    ./predict.py --predict IMAGE|FOLDER|GLOB ... --load CHECKPOINT    pictures with the detections
    ./predict.py --video VIDEO ... --load CHECKPOINT                  videos with the detections
    ./predict.py --evaluate OUT.json --load CHECKPOINT                COCO results and metrics on DATA.VAL
    ./predict.py --visualize IMAGE|IMAGE_ID ... --load CHECKPOINT     proposals, raw predictions, results, ground truth
    ./predict.py --output-serving DIR --load CHECKPOINT               a SavedModel, for TensorFlow Serving

The settings are those of the config.json beside the checkpoint; --config changes them.
"""

import argparse
import difflib
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from common import checkpoint, viz
from common.files import check_unused, make_folder, write_new
from common.plugins import add_option, load_plugins
from config import VERSION, UserError, config, uses_augmentation
from dataset import class_difference, find_records, get_datasets, shapes, short_names
from dataset.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, check_sizes, find_files, load_image

# Options that only some tasks accept, and these tasks.
OPTIONS = {
    "per_class": ["evaluate"],
    "report": ["evaluate"],
    "output": ["predict", "video", "visualize"],
    "json": ["predict", "video"],
    "classes": ["predict", "video"],
    "confidence_threshold": ["predict", "video", "visualize", "output_serving", "output_pb"],
    "tensors": ["visualize"],
    "format": ["output_serving", "output_pb"],
    "check_image": ["output_serving", "output_pb"],
}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group()
    predict_help = "image files, folders of images, or patterns; picture of each: STEM-detections.png"
    task.add_argument("--predict", nargs="+", metavar="IMAGE", help=predict_help)
    task.add_argument("--video", nargs="+", metavar="VIDEO", help="video files; video of each: STEM-detections.mp4")
    evaluate_help = "new results file; with several data sets OUT-DATASET.json for each"
    visualize_help = "image files, or ids of images in DATA.VAL: draws the output of each stage beside the ground truth"
    task.add_argument("--visualize", nargs="+", metavar="IMAGE", help=visualize_help)
    task.add_argument("--evaluate", type=Path, metavar="OUT.json", help=evaluate_help)
    parser.add_argument("--per-class", action="store_true", help="with --evaluate: also print a table of the classes")
    report_help = "with --evaluate: new folder for curves, confusion matrices and numbers; DIR/DATASET for several sets"
    parser.add_argument("--report", type=Path, metavar="DIR", help=report_help)
    parser.add_argument("--output-serving", type=Path, metavar="DIR", help="export a SavedModel to a new folder")
    parser.add_argument("--output-pb", type=Path, metavar="FILE", help="export a frozen graph to a new file")
    parser.add_argument("--load", required=True, metavar="CHECKPOINT", help="run, TensorFlow checkpoint, or .npz")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="DIR", help="default: predictions")
    parser.add_argument("--json", action="store_true", help="also write results beside each picture or video")
    threshold_help = "lowest score in pictures and their results (default: TEST.RESULT_SCORE_THRESH_VIS)"
    parser.add_argument("--confidence-threshold", type=_score, metavar="SCORE", help=threshold_help)
    tensors_help = "with --visualize: tensors to describe, save (.npz) and draw; * stands for any text"
    parser.add_argument("--tensors", nargs="+", default=[], metavar="NAME", help=tensors_help)
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="show only these classes")
    format_help = "format of an export: complete (any image in, final results out), or that of tensorpack's own export"
    parser.add_argument("--format", choices=("complete", "tensorpack"), default="complete", help=format_help)
    check_help = "image on which an export is compared with this program (default: a generated one)"
    parser.add_argument("--check-image", type=Path, metavar="IMAGE", help=check_help)
    parser.add_argument("--no-show", action="store_true", help="open no window, even if there is a display")
    config_help = "settings other than the model's; @FILE reads them from a file, such as recipes/r50_fpn_mask_1x.cfg"
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help=config_help)
    add_option(parser)
    parser.add_argument("--version", action="version", version=VERSION)
    arguments = parser.parse_args(arguments)
    tasks = bool(arguments.predict or arguments.video or arguments.visualize or arguments.evaluate)
    exports = bool(arguments.output_serving or arguments.output_pb)
    if tasks == exports:
        parser.error("choose a task: --predict, --video, --visualize, --evaluate, or --output-serving and --output-pb")
    for option, of_tasks in OPTIONS.items():
        is_given = getattr(arguments, option) != parser.get_default(option)
        if is_given and not any(getattr(arguments, task) for task in of_tasks):
            names = ["--" + name.replace("_", "-") for name in (option, *of_tasks)]
            parser.error(f"{names[0]} goes with {' or '.join(names[1:])}")
    return arguments


def _score(text):
    score = float(text)
    if not 0 <= score < 1:
        raise argparse.ArgumentTypeError(f"{text}: a score lies between 0 and 1")
    return score


def main(arguments):
    """Runs the task that the arguments choose; returns the exit code."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    load_plugins(arguments.plugins)
    checkpoint_path = checkpoint.resolve(arguments.load)
    checkpoint.load_config(checkpoint_path, config, overrides=arguments.config)
    if arguments.evaluate:
        return evaluate(arguments, checkpoint_path)
    if arguments.visualize:
        return visualize(arguments, checkpoint_path)
    if arguments.output_serving or arguments.output_pb:
        return export_model(arguments, checkpoint_path)
    return predict(arguments, checkpoint_path)


def start_tensorflow():
    """Imports the modules that need TensorFlow, and returns them as attributes.

    Each task calls this after it has checked its arguments, so that mistakes are reported at once.
    """
    import eval
    from inference import export, media, predictor, stages

    return SimpleNamespace(eval=eval, export=export, media=media, predictor=predictor, stages=stages)


def class_names():
    """The names of the classes 1..C: those of the settings, or else those of the first data set of DATA.VAL."""
    if config.DATA.CLASS_NAMES:
        return config.DATA.CLASS_NAMES[1:]
    try:
        return load_datasets()[0].class_names
    except UserError as error:
        raise UserError(
            f"the model's class names are unknown: put its {checkpoint.CONFIG_FILE} beside the checkpoint, "
            f"or name its data set with --config DATA.BASEDIR=DIR DATA.VAL=NAME ({error})"
        ) from error


def load_datasets():
    """The Datasets of DATA.VAL; raises UserError if it names none, DatasetError if one cannot be used."""
    if not config.DATA.VAL:
        raise UserError("DATA.VAL names no data set: give --config DATA.VAL=NAME")
    return get_datasets(config.DATA.VAL, config.DATA.BASEDIR)


def freeze_config(names):
    """Sets the class names, without background; checks the settings and makes them immutable."""
    config.DATA.NUM_CATEGORY = len(names)
    config.DATA.CLASS_NAMES = ["BG", *names]
    config.check()
    config.freeze()


def predict(arguments, checkpoint_path):
    """Writes a picture or video of each input; returns the exit code, 1 if a file was skipped as unusable."""
    threshold = arguments.confidence_threshold
    if threshold is None:
        threshold = config.TEST.RESULT_SCORE_THRESH_VIS
    if not uses_augmentation(config):  # which merges the views before it compares scores with a threshold
        config.TEST.RESULT_SCORE_THRESH = threshold  # detections that are not shown are not computed
    freeze_config(class_names())
    labels = labels_of(arguments.classes)
    suffixes = VIDEO_SUFFIXES if arguments.video else IMAGE_SUFFIXES
    paths, problems = find_files(arguments.video or arguments.predict, suffixes)
    for problem in problems:
        report(problem)
    if not paths:
        return 1
    modules = start_tensorflow()
    predictor = modules.predictor.Predictor(checkpoint_path, settings=config)
    style = modules.media.Style(predictor.class_names, predictor.category_ids, threshold, labels, arguments.json)
    run = modules.media.predict_videos if arguments.video else modules.media.predict_files
    options = dict(batch_size=config.TEST.BATCH_SIZE_PER_GPU, report=report)
    written = []
    for result in run(predictor, paths, style, arguments.output, **options):
        say(result)
        written.append(result.path)
    if arguments.predict and not arguments.no_show and written and viz.has_display():
        viz.show((path.name, load_image(path)) for path in written)
    return 0 if len(written) == len(paths) and not problems else 1


def labels_of(names):
    """The labels (1..C) of these class names as a frozenset; None for None."""
    if names is None:
        return None
    known = config.DATA.CLASS_NAMES[1:]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or known[:10]
            raise UserError(f"the model knows no class {name!r}: --classes takes {', '.join(near)}")
    return frozenset(known.index(name) + 1 for name in names)


def evaluate(arguments, checkpoint_path):
    """Evaluates each data set of DATA.VAL; before the first, checks all of them and that no output exists yet."""
    output, folder = arguments.evaluate, arguments.report
    outputs, folders = [output], [folder]
    if len(config.DATA.VAL) > 1:
        names = short_names(config.DATA.VAL)
        outputs = [output.with_name(f"{output.stem}-{name}{output.suffix}") for name in names]
        folders = [folder and folder / name for name in names]
    for path in outputs:
        check_unused(path)
    datasets, known = load_datasets(), class_names()
    for dataset in datasets:
        if difference := class_difference(known, dataset.class_names):
            raise UserError(f"the classes of {dataset.name} are not those of the model: {difference}")
        check_sizes(dataset.records(training=False), max_dropped=config.DATA.MAX_DROPPED)
    freeze_config(known)
    for each in filter(None, folders):
        make_folder(each)
    modules = start_tensorflow()
    network = modules.predictor.load_network(config, checkpoint_path)
    for dataset, path, report_folder in zip(datasets, outputs, folders):
        options = dict(output=path, per_class=arguments.per_class, report_folder=report_folder)
        modules.eval.evaluate_dataset(config, network, dataset, **options)
    return 0


def say(line):
    """Prints a line above the progress bar, if there is one."""
    tqdm.write(str(line))
    sys.stdout.flush()


def visualize(arguments, checkpoint_path):
    """Draws the output of each stage of the model for images; describes, saves and draws tensors."""
    threshold = arguments.confidence_threshold
    if threshold is None:
        threshold = config.TEST.RESULT_SCORE_THRESH_VIS
    if uses_augmentation(config):
        raise UserError("--visualize shows the stages of one view: give TEST.TTA_FLIP=False and TEST.TTA_SCALES=[1.0]")
    names = class_names()
    inputs = find_visualized(arguments.visualize)
    freeze_config(names)
    stages = start_tensorflow().stages
    inspector = stages.Inspector(config, checkpoint_path)
    tensors = inspector.names(arguments.tensors)
    for path, record in inputs:
        image = load_image(path)
        if tensors:  # first: they show non-finite values, at which `stages` raises an error
            values = inspector.fetch(image, tensors)
            save_tensors(stages, image, values, arguments.output / f"{path.stem}-tensors.npz")
        outputs = inspector.stages(image)
        picture = stages.draw_stages(image, outputs, names, score_threshold=threshold, record=record)
        say(viz.save_picture(picture, arguments.output / f"{path.stem}-stages.png"))
    return 0


def find_visualized(texts):
    """The images that `texts` name, files or ids of DATA.VAL: a list of (Path, dataset.Record or None)."""
    try:
        records = [record for dataset in load_datasets() for record in dataset.records(training=False)]
    except UserError as error:
        report(f"without ground truth: {error}")
        records = []
    return find_records(texts, records)


def save_tensors(stages, image, values, path):
    """Writes tensors to a new .npz file and draws the feature maps among them beside it; prints a line for each.

    Args:
        stages: the module inference.stages. values: {name: array}.
    """
    content = io.BytesIO()
    np.savez_compressed(content, **values)
    path = write_new(path, {".npz": content.getvalue()})
    for name, value in values.items():
        say(f"  {stages.describe(name, value)}")
        if stages.is_map(value):
            viz.save_picture(stages.draw_map(image, value), path.with_name(f"{path.stem}-{name.replace('/', '.')}.png"))
    say(path)


def export_model(arguments, checkpoint_path):
    """Writes the SavedModel and the frozen graph; prints how far their results differ from the program's."""
    for path in filter(None, (arguments.output_serving, arguments.output_pb)):
        check_unused(path)
    if arguments.confidence_threshold is not None:
        config.TEST.RESULT_SCORE_THRESH = arguments.confidence_threshold
    freeze_config(class_names())
    if arguments.check_image:
        image = load_image(arguments.check_image)
    else:
        image, _ = shapes.draw_image(np.random.default_rng(0), size=config.PREPROC.TEST_SHORT_EDGE_SIZE)
    modules = start_tensorflow()
    lines = modules.export.export(
        modules.predictor.Predictor(checkpoint_path, settings=config),
        checkpoint_path,
        image,
        format_name=arguments.format,
        saved_model=arguments.output_serving,
        frozen_graph=arguments.output_pb,
    )
    for line in lines:
        say(line)
    return 0


def report(problem):
    """Prints a line with a problem on standard error, above the progress bar, if there is one."""
    tqdm.write(f"predict.py: {problem}", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main(parse_arguments()))
    except UserError as error:
        report(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
