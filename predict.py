#!/usr/bin/env -S sh -c 'exec "$(dirname "$(readlink -f "$0")")/setup/python" "$0" "$@"'
"""Find objects in images, or evaluate a model.

    ./predict.py --predict IMAGE|FOLDER|GLOB ... --load CHECKPOINT    pictures of what was found
    ./predict.py --video VIDEO ... --load CHECKPOINT                  videos of it
    ./predict.py --evaluate OUT.json --load CHECKPOINT                COCO results and metrics on DATA.VAL

The settings are those of the config.json beside the checkpoint; --config changes them.
"""

import argparse
import difflib
import os
import sys
from pathlib import Path

from tqdm import tqdm

import checkpoint
import data
import viz
from config import UserError, config
from dataset import class_difference, get_datasets, short_names


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    predict_help = "image files, folders of images, or patterns; picture of each: STEM-detections.png"
    task.add_argument("--predict", nargs="+", metavar="IMAGE", help=predict_help)
    task.add_argument("--video", nargs="+", metavar="VIDEO", help="video files; video of each: STEM-detections.mp4")
    evaluate_help = "results file, which must not exist; with several data sets OUT-DATASET.json for each"
    task.add_argument("--evaluate", type=Path, metavar="OUT.json", help=evaluate_help)
    parser.add_argument("--per-class", action="store_true", help="with --evaluate: a table of the classes, too")
    report_help = "with --evaluate: new folder for curves, confusion matrices and numbers; DIR/DATASET for several sets"
    parser.add_argument("--report", type=Path, metavar="DIR", help=report_help)
    parser.add_argument("--load", required=True, metavar="CHECKPOINT", help="run, TensorFlow checkpoint, or .npz")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="DIR", help="default: predictions")
    parser.add_argument("--json", action="store_true", help="write results beside each picture or video, too")
    threshold_help = "lowest score in pictures and their results (default: TEST.RESULT_SCORE_THRESH_VIS)"
    parser.add_argument("--confidence-threshold", type=_score, metavar="SCORE", help=threshold_help)
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="show only these classes")
    parser.add_argument("--no-show", action="store_true", help="open no window, even where there is a display")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="settings other than the model's")
    return parser.parse_args(arguments)


def _score(text):
    score = float(text)
    if not 0 <= score < 1:
        raise argparse.ArgumentTypeError(f"{text}: a score lies between 0 and 1")
    return score


def main(arguments):
    """Returns the exit code."""
    # TensorFlow is imported only once all arguments are known to be good: mistakes are answered at once.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    checkpoint_path = checkpoint.resolve(arguments.load)
    checkpoint.load_config(checkpoint_path, config, overrides=arguments.config)
    if arguments.evaluate:
        return evaluate(arguments, checkpoint_path)
    return predict(arguments, checkpoint_path)


def class_names():
    """Without background: the configuration's, or else those of the first data set of DATA.VAL."""
    if config.DATA.CLASS_NAMES:
        return config.DATA.CLASS_NAMES[1:]
    try:
        return load_datasets()[0].class_names
    except UserError as error:
        raise UserError(
            f"the model's class names are unknown: put its {checkpoint.CONFIG_FILE} beside the checkpoint, "
            f"or say which data set it knows with --config DATA.BASEDIR=DIR DATA.VAL=NAME ({error})"
        ) from error


def load_datasets():
    if not config.DATA.VAL:
        raise UserError("DATA.VAL names no data set: say --config DATA.VAL=NAME")
    return get_datasets(config.DATA.VAL, config.DATA.BASEDIR)


def freeze_config(names):
    config.DATA.NUM_CATEGORY = len(names)
    config.DATA.CLASS_NAMES = ["BG", *names]
    config.check()
    config.freeze()


def predict(arguments, checkpoint_path):
    """Writes a picture or video of each input. Bad files are reported and passed over; then the exit code is 1."""
    threshold = arguments.confidence_threshold
    if threshold is None:
        threshold = config.TEST.RESULT_SCORE_THRESH_VIS
    config.TEST.RESULT_SCORE_THRESH = threshold  # nothing is computed that will not be shown
    freeze_config(class_names())
    labels = labels_of(arguments.classes)
    suffixes = data.VIDEO_SUFFIXES if arguments.video else data.IMAGE_SUFFIXES
    paths, problems = data.find_files(arguments.video or arguments.predict, suffixes)
    for problem in problems:
        report(problem)
    if not paths:
        return 1
    import media
    from eval import Predictor

    predictor = Predictor.configured(checkpoint_path)
    style = media.Style(predictor.class_names, threshold, labels, arguments.json)
    run = media.predict_videos if arguments.video else media.predict_files
    options = dict(batch_size=config.TEST.BATCH_SIZE_PER_GPU, report=report)
    written = []
    for result in run(predictor, paths, style, arguments.output, **options):
        say(result)
        written.append(result.path)
    if arguments.predict and not arguments.no_show and written and viz.has_display():
        viz.show((path.name, data.load_image(path)) for path in written)
    return 0 if len(written) == len(paths) and not problems else 1


def labels_of(names):
    """The labels of the classes of these names, or None for None."""
    if names is None:
        return None
    known = config.DATA.CLASS_NAMES[1:]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or known[:10]
            raise UserError(f"the model knows no class {name!r}: --classes takes {', '.join(near)}")
    return frozenset(known.index(name) + 1 for name in names)


def evaluate(arguments, checkpoint_path):
    """Evaluates on each data set of DATA.VAL, once it is sure that all can be used and no results are in the way."""
    output, folder = arguments.evaluate, arguments.report
    outputs, folders = [output], [folder]
    if len(config.DATA.VAL) > 1:
        names = short_names(config.DATA.VAL)
        outputs = [output.with_name(f"{output.stem}-{name}{output.suffix}") for name in names]
        folders = [folder and folder / name for name in names]
    for path in [*outputs, folder]:
        if path and path.exists():
            raise UserError(f"{path} exists already: name another place, or move it away")
    datasets, known = load_datasets(), class_names()
    for dataset in datasets:
        if difference := class_difference(known, dataset.class_names):
            raise UserError(f"the classes of {dataset.name} are not those of the model: {difference}")
    freeze_config(known)
    from eval import evaluate_dataset, load_predictor

    network = load_predictor(checkpoint_path)
    for dataset, path, report_folder in zip(datasets, outputs, folders):
        evaluate_dataset(network, dataset, output=path, per_class=arguments.per_class, report_folder=report_folder)
    return 0


def say(line):
    """A line on standard output, above the progress bar if there is one."""
    tqdm.write(str(line))
    sys.stdout.flush()


def report(problem):
    tqdm.write(f"predict.py: {problem}", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main(parse_arguments()))
    except UserError as error:
        report(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
