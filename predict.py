#!/usr/bin/env -S sh -c 'exec "$(dirname "$(readlink -f "$0")")/setup/python" "$0" "$@"'
"""Find objects in images, or evaluate a model.

    ./predict.py --predict IMAGE ... --load CHECKPOINT        pictures of what was found
    ./predict.py --evaluate OUT.json --load CHECKPOINT        COCO results and metrics on the data sets of DATA.VAL

The settings are those of the config.json beside the checkpoint; --config changes them.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

import checkpoint
import data
import viz
from config import UserError, config
from dataset import get_dataset


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--predict", nargs="+", metavar="IMAGE", help="image files; picture of each: STEM-detections.png")
    evaluate_help = "results file, which must not exist; with several data sets OUT-DATASET.json for each"
    task.add_argument("--evaluate", type=Path, metavar="OUT.json", help=evaluate_help)
    parser.add_argument("--load", required=True, metavar="CHECKPOINT", help="run, TensorFlow checkpoint, or .npz")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="DIR", help="default: predictions")
    parser.add_argument("--no-show", action="store_true", help="open no window, even where there is a display")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="settings other than the model's")
    return parser.parse_args(arguments)


def main(arguments):
    """Returns the exit code."""
    # TensorFlow is imported only once all arguments are known to be good: mistakes are answered at once.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    checkpoint_path = checkpoint.resolve(arguments.load)
    load_config(checkpoint_path, arguments.config)
    if arguments.evaluate:
        return evaluate(arguments.evaluate, checkpoint_path)
    return predict(arguments.predict, checkpoint_path, arguments.output, with_window=not arguments.no_show)


def load_config(checkpoint_path, overrides):
    """The settings beside the checkpoint, then those of the command line."""
    if config_file := checkpoint.find_config(checkpoint_path):
        config.load(config_file)
    else:
        report(f"no {checkpoint.CONFIG_FILE} beside {checkpoint_path}: the settings are the defaults and --config")
    config.update(overrides)


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
    return [get_dataset(name, config.DATA.BASEDIR) for name in config.DATA.VAL]


def freeze_config(names):
    config.DATA.NUM_CATEGORY = len(names)
    config.DATA.CLASS_NAMES = ["BG", *names]
    config.check()
    config.freeze()


def predict(paths, checkpoint_path, output_dir, *, with_window):
    """Writes a picture of each image. Bad files are reported and passed over; then the exit code is 1."""
    config.TEST.RESULT_SCORE_THRESH = config.TEST.RESULT_SCORE_THRESH_VIS
    freeze_config(class_names())
    missing = [path for path in paths if not Path(path).is_file()]
    for path in missing:
        report(f"{path}: no such file")
    if len(missing) == len(paths):
        return 1
    from eval import load_predictor, predict_images

    network = load_predictor(checkpoint_path)
    written = []
    for path in (path for path in paths if path not in missing):
        try:
            image = data.load_image(path)
        except data.ImageError as error:
            report(error)
            continue
        (detections,) = predict_images(network, [image])
        written.append(save(image, detections, output_dir / f"{Path(path).stem}-detections.png"))
    if written and with_window and viz.has_display():
        viz.show((path.name, data.load_image(path)) for path in written)
    return 0 if len(written) == len(paths) else 1


def save(image, detections, path):
    names = config.DATA.CLASS_NAMES[1:]
    picture = viz.draw_detections(image, detections, names, score_threshold=config.TEST.RESULT_SCORE_THRESH)
    path = viz.save_picture(picture, path)
    counts = Counter(names[label - 1] for label in detections.labels)
    print(f"{path}: {', '.join(f'{n} {name}' for name, n in counts.most_common()) or 'nothing found'}", flush=True)
    return path


def evaluate(output, checkpoint_path):
    """Evaluates on each data set of DATA.VAL, once it is sure that all can be used and no results are in the way."""
    names = config.DATA.VAL
    outputs = [output if len(names) == 1 else output.with_name(f"{output.stem}-{n}{output.suffix}") for n in names]
    for path in filter(Path.exists, outputs):
        raise UserError(f"{path} exists already: name another file, or move it away")
    datasets, known = load_datasets(), class_names()
    for dataset in datasets:
        if tuple(dataset.class_names) != tuple(known):
            raise UserError(f"the classes of {dataset.name} are not those of the model, in the same order")
    freeze_config(known)
    from eval import evaluate_dataset, load_predictor

    network = load_predictor(checkpoint_path)
    for dataset, path in zip(datasets, outputs):
        evaluate_dataset(network, dataset, output=path)
    return 0


def report(problem):
    print(f"predict.py: {problem}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(parse_arguments()))
    except UserError as error:
        report(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
