"""Converts weights of other frameworks to this project's `.npz`, and back to torchvision's and Detectron2's format.

    python -m tools.convert resnet50-0676ba61.pth ImageNet-R50.npz        torchvision, Detectron2 or Keras to ours
    python -m tools.convert train_log/rcnn detector.pth --to torchvision  ours to a state dict of torchvision

A file is recognised by its content, not its name. The `.npz` carries the settings that the weights need; train.py and
predict.py apply them. PyTorch, Detectron2 and Keras are not needed, and no code in a weights file is ever executed.
"""

import argparse
import hashlib
import os
import re
import sys
from pathlib import Path

from tabulate import tabulate

from common import checkpoint
from common.files import Whole, check_unused, writing
from config import Config, UserError, as_overrides
from zoo import convnext, detectron2, files, keras, mapping, torchvision

SYSTEMS = (torchvision, detectron2, keras, convnext)
SYSTEMS_OF_EXPORT = {"torchvision": torchvision, "detectron2": detectron2}
PREFIXES = ("module.", "model.")  # that wrappers of a whole model put before each name
# Settings that follow from the shapes of our variables: key, pattern of the variable's name, axis.
SIZES = (
    ("BACKBONE.WIDTH", r"conv0/W", 3),
    ("FPN.NUM_CHANNEL", r"fpn/lateral_1x1_c2/W", 3),
    ("FPN.FRCNN_FC_HEAD_DIM", r"(fastrcnn|cascade_rcnn_stage1/head)/(fc6|fc)/W", 1),
    ("FPN.FRCNN_CONV_HEAD_DIM", r"(fastrcnn|cascade_rcnn_stage1/head)/conv0/W", 3),
    ("MRCNN.HEAD_DIM", r"maskrcnn/deconv/W", 2),
)


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        prog="tools.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help=".pth, .pkl, .safetensors, .h5 or .keras; with --to our checkpoint")
    parser.add_argument("output", type=Path, help="new file")
    parser.add_argument(
        "--allow-leftover", action="store_true", help="convert a file that holds more arrays than the model needs"
    )
    parser.add_argument("--to", choices=SYSTEMS_OF_EXPORT, help="write a state dict of this framework")
    parser.add_argument("--all-slots", action="store_true", help="keep class slots that no class of COCO uses")
    set_help = "settings to carry in place of those that the tool assumes"
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help=set_help)
    return parser.parse_args(arguments)


def main(arguments):
    """Converts in the direction that the arguments choose."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    check_unused(arguments.output)
    if arguments.to:
        export_weights(arguments)
    else:
        import_weights(arguments)


def export_weights(arguments):
    """Converts our weights to those of another framework."""
    from common import weights  # starts TensorFlow, which the other direction does not need

    path = checkpoint.resolve(arguments.source)
    values, settings = weights.read(path), Config()
    if config_file := checkpoint.find_config(path):
        settings.load(config_file)
    settings.adopt(checkpoint.carried_settings(path), source=path)
    settings.update(arguments.set)
    system = SYSTEMS_OF_EXPORT[arguments.to]
    if arguments.to == "torchvision" and settings.BACKBONE.NAME == "convnext":
        system = convnext
    model = system.counterpart(values, settings)
    arrays = mapping.to_theirs(model, values)
    print(f"{path}: {model.name}" + (f", SHA-256 {_sha256(path)}" if path.is_file() else ""))
    print_table(arrays, model, values)
    _write(arguments.output, lambda file: files.write_torch(file, arrays))
    print(f"{arguments.output}: {len(arrays)} arrays, SHA-256 {_sha256(arguments.output)}")


def print_table(arrays, model, values):
    """Prints the pairs of arrays and variables, and the notes of the model."""
    rows = [(p.theirs, list(arrays[p.theirs].shape), p.ours, list(values[p.ours].shape)) for p in model.pairs]
    rows += [("(none)", "", name, list(value.shape)) for name, value in model.added.items()]
    print(tabulate(rows, headers=("theirs", "shape", "ours", "shape")))
    for note in model.notes:
        print(f"Note: {note}")


def import_weights(arguments):
    """Converts weights of another framework to ours."""
    if arguments.output.suffix != ".npz":
        raise UserError(f"{arguments.output}: the output must be a .npz")
    arrays = _without_wrapping(files.read(arguments.source))
    sha256 = _sha256(arguments.source)
    try:
        model = recognise(arrays, sha256=sha256, all_slots=arguments.all_slots)
        values, leftover = mapping.from_theirs(model, arrays, allow_leftover=arguments.allow_leftover)
    except mapping.MappingError as error:
        raise mapping.MappingError(f"{arguments.source}: {error}") from error
    settings = _with_overrides({**model.settings, **_sizes(values)}, arguments.set)
    print(f"{arguments.source}: {model.name}, SHA-256 {sha256}")
    print_table(arrays, model, values)
    print(f"Left over: {', '.join(leftover) or 'nothing'}; no weights, or folded: {len(model.ignored)}")
    _write(arguments.output, lambda file: checkpoint.write_npz(file, values, settings))
    print(f"{arguments.output}: {len(values)} variables, SHA-256 {_sha256(arguments.output)}")
    line = as_overrides({key: value for key, value in settings.items() if key != "DATA.CLASS_NAMES"})
    names = f" and the names of {settings['DATA.NUM_CATEGORY']} classes" if "DATA.CLASS_NAMES" in settings else ""
    print(f"It carries the settings that it needs{names}:\n  --config {line}")


def recognise(arrays, **options):
    """The mapping.Model of the first framework that knows the names of the arrays.

    Args:
        options: keywords of the frameworks' `recognise`.
    Raises:
        MappingError: no framework knows the names, or their shapes fit no model.
    """
    for system in SYSTEMS:
        try:
            model = system.recognise(arrays, **options)
        except (ValueError, IndexError, TypeError) as error:  # raised on shapes that no model has
            raise mapping.MappingError(f"it has names of a known model, but other shapes: {error}") from error
        if model:
            return model
    raise mapping.MappingError(f"it is no model that is known here; it holds {', '.join(list(arrays)[:3])} ...")


def _without_wrapping(arrays):
    """The arrays of the model alone, without the folder and the optimizer's state of a training checkpoint, nor a
    prefix that all names have.
    """
    for folder in ("model/", "state_dict/", "blobs/"):
        inner = {name.removeprefix(folder): x for name, x in arrays.items() if name.startswith(folder)}
        if inner:
            arrays = inner
            break
    for prefix in PREFIXES * 2:  # in either order
        if all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): x for name, x in arrays.items()}
    return arrays


def _sizes(values):
    """The settings of SIZES that differ from the defaults."""
    found = {
        key: x.shape[axis] for key, pattern, axis in SIZES for name, x in values.items() if re.fullmatch(pattern, name)
    }
    if "FPN.NUM_CHANNEL" not in found and "rpn/conv0/W" in values:
        found["RPN.HEAD_DIM"] = values["rpn/conv0/W"].shape[3]
    return {key: size for key, size in found.items() if size != Config().value(key)}


def _with_overrides(settings, overrides):
    """The settings with those of --set, all checked."""
    checked = Config()
    checked.adopt(settings, source="the converter")
    checked.update(overrides)
    set_keys = {text.partition("=")[0].strip() for text in overrides}
    return {key: checked.value(key) for key in [*settings, *sorted(set_keys - set(settings))]}


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _write(path, write):
    """Writes a new file, whole or not at all. write: function of an open binary file."""
    with Whole(path) as whole, writing(path), open(whole.part, "wb") as file:
        write(file)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except UserError as error:
        print(f"tools.convert: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
