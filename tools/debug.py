"""Runs the network's functions eagerly on one image, with the weights of a run, to look inside.

    python -m tools.debug train_log/rcnn street.jpg            an image file
    python -m tools.debug train_log/rcnn 139                   an image of DATA.VAL or DATA.TRAIN, by its id

`breakpoint()` and `print` anywhere in modeling/ see tensors with values; no graph is built. Inference runs first. If
the image is annotated, the losses of a training example of it (position 0 of the data order) follow.
"""

import argparse
import bdb
import contextlib
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import tensorflow as tf  # noqa: E402

import data  # noqa: E402
from common import checkpoint, weights  # noqa: E402
from common.plugins import add_option, load_plugins  # noqa: E402
from config import VERSION, ConfigError, UserError  # noqa: E402
from dataset import find_records, get_datasets  # noqa: E402
from dataset.images import load_image  # noqa: E402
from modeling import rcnn  # noqa: E402

tfv1 = tf.compat.v1


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run, TensorFlow checkpoint, or .npz")
    parser.add_argument("image", metavar="IMAGE", help="image file, or id of an image in DATA.VAL or DATA.TRAIN")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="settings other than the run's")
    add_option(parser)
    parser.add_argument("--version", action="version", version=VERSION)
    return parser.parse_args(arguments)


def main(arguments):
    """Prints the detections in the image, and the losses if it is annotated."""
    load_plugins(arguments.plugins)
    path = checkpoint.resolve(arguments.run)
    settings = checkpoint.settings_of(path, arguments.config)
    rcnn.check(settings)
    ((image_path, record),) = find_records([arguments.image], annotated_images(settings))
    print(f"image: {image_path}" + ("" if record else ", without annotations"))
    with weights_of(path):
        print_detections(settings, detect(settings, load_image(image_path)))
        if record:
            print_losses(training_losses(settings, record))


def annotated_images(settings):
    """The Records of the run's data sets, as training uses them; prints a line for each data set that is missing."""
    records = []
    for name in dict.fromkeys([*settings.DATA.VAL, *settings.DATA.TRAIN]):
        try:
            (dataset,) = get_datasets([name], settings.DATA.BASEDIR)
            records += dataset.records(training=True, filter_empty=False, masks=settings.MODE_MASK)
        except UserError as error:
            print(f"tools.debug: without the annotations of {name}: {error}", file=sys.stderr)
    return records


@contextlib.contextmanager
def weights_of(path):
    """Makes `get_variable`, within the block, return variables with a checkpoint's values, one for each name.

    Raises:
        CheckpointMismatch: the file cannot be read, or lacks a variable of the network. ConfigError: a plugin creates a
            variable without `get_variable`.
    """
    values, variables = weights.read(path), {}

    def get_variable(getter, name, shape=None, trainable=True, **unused):
        del getter, unused
        if name not in variables:
            is_wrong = name in values and shape is not None and list(values[name].shape) != list(shape)
            if name not in values or is_wrong:
                found = f"has the shape {list(values[name].shape)}" if is_wrong else "is absent"
                raise checkpoint.CheckpointMismatch(f"{path} does not fit the model: {name} {found}")
            variables[name] = tf.Variable(values[name], trainable=trainable, name=f"checkpoint/{name}")
        return variables[name]

    def refuse_others(create, **options):
        if not str(options.get("name")).startswith("checkpoint/"):
            raise ConfigError(f"a variable {options.get('name')} is created without tf.compat.v1.get_variable")
        return create(**options)

    with tfv1.variable_scope("", custom_getter=get_variable), tf.variable_creator_scope(refuse_others):
        yield


def detect(settings, image):
    """The box_head.Detections of an image, uint8 [H, W, 3] BGR; boxes in pixels of the network's input."""
    batch, image_shape = data.inference_geometry(settings).batch([image])
    return rcnn.build_inference(settings, tf.constant(batch), tf.constant(image_shape))


def training_losses(settings, record):
    """The losses of a training example of a dataset.Record: {name: float32 scalar}."""
    batch = data.training_data(settings, [record]).batch_of([0])
    losses, _ = rcnn.build_training(settings, **{name: tf.constant(array) for name, array in batch.items()})
    return losses


def print_detections(settings, found):
    """Prints a line for each detection."""
    print(f"detections: {len(found.labels)}, boxes in pixels of the network's input")
    for box, score, label in zip(found.boxes.numpy(), found.scores.numpy(), found.labels.numpy()):
        corners = ", ".join(f"{value:.1f}" for value in box)
        print(f"  {settings.DATA.CLASS_NAMES[label]} {score:.3f} at {corners}")


def print_losses(losses):
    """Prints a line for each loss."""
    print("losses of a training example, without weight decay:")
    for name, value in losses.items():
        print(f"  {name} {float(value):.6g}")


def run_program():
    """Runs the command; returns its exit code."""
    try:
        main(parse_arguments())
    except UserError as error:
        print(f"tools.debug: {error}", file=sys.stderr)
        return error.exit_code
    except bdb.BdbQuit:  # `q` in the debugger
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_program())
