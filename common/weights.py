"""Reads a checkpoint's variables and loads them into the model, with a report of the matches.

Arrays are never reshaped to fit, and no code contained in a weights file is executed.
"""

import json
import logging
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from common.checkpoint import CARRIED, CONFIG_FILE, CheckpointMismatch, complete_in, step_of

tfv1 = tf.compat.v1
logger = logging.getLogger(__name__)

# Graph collections: the variables of the network, which checkpoints contain, and those of its backbone.
MODEL_VARIABLES, BACKBONE_VARIABLES = tfv1.GraphKeys.MODEL_VARIABLES, "backbone_variables"
STATE_KEY = "model variables"  # entry of the json beside a run's checkpoint: names of the network's variables
# Training state in files without such a list; the slots of optimizers belong to it, too.
TRAINING_STATE = re.compile(r"^(global_step|learning_rate|loss_scale(_good_steps)?|accumulated_steps)$|^EMA/")
AVERAGED = "EMA/"  # before a weight's name: its moving average, which takes its place wherever a run's weights are read
CLASSIFIER = re.compile(r"^linear/")  # of a backbone trained on ImageNet
DEPENDS_ON_CLASSES = re.compile(r"^((fastrcnn|cascade_rcnn_stage\d)(/outputs)?/(class|box)|maskrcnn/conv)/[Wb]$")


# ------------------------------------------------------------------------------------------------------ reading


def read(path: str | Path, *, network: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Reads the network's variables from a checkpoint: {name (without ":0"): array}, in the file's dtype.

    A run lists its network's variables beside its checkpoints. From other files everything is read that does not look
    like training state. If a run averaged its weights, the averages are read in their place.

    Args:
        path: from `checkpoint.resolve`. network: names that belong to the network in any case.
    Raises:
        CheckpointMismatch: the file cannot be read.
    """
    try:
        if Path(path).suffix == ".npz":
            return _read_npz(path, network)
        recorded = _names_beside(path)
        if recorded is None:
            return _read_tensorflow(path, select=lambda shapes: _of_network(shapes, network))
        return _read_tensorflow(path, select={*recorded, *network}.intersection)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointMismatch(f"checkpoint {path} can't be read: {' '.join(str(error).split())[:200]}") from error


def _read_npz(path, network):
    if not zipfile.is_zipfile(path):
        raise OSError("it is no .npz archive")
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name.removesuffix(":0"): archive[name] for name in archive.files if name != CARRIED}
    return {name: arrays[name] for name in _of_network({name: list(x.shape) for name, x in arrays.items()}, network)}


def _read_tensorflow(path, *, select, averaged=True):
    """Reads arrays by name.

    Args:
        select: function from {name: shape} of the file to the names to read. averaged: averages in place of weights.
    """
    try:
        reader = tf.train.load_checkpoint(str(path))
        shapes = reader.get_variable_to_shape_map()
        places = {name: AVERAGED + name if averaged and AVERAGED + name in shapes else name for name in select(shapes)}
        return {name: reader.get_tensor(place) for name, place in places.items()}
    except (tf.errors.OpError, RuntimeError, IndexError) as error:  # the reader's own errors have no common base
        raise OSError(str(error)) from error


def _names_beside(path):
    """Returns the names of the network's variables that a run recorded beside its checkpoint; None without a record."""
    try:
        return json.loads(Path(f"{path}.json").read_text())[STATE_KEY]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of_network(shapes, network):
    """Returns the names in {name: shape} that are in `network`, or no training state: no counter, no optimizer's slot.

    A slot is named VARIABLE/SLOT and has the shape of its variable.
    """

    def is_slot(name):
        return shapes.get(name.rpartition("/")[0]) == shapes[name]

    return [name for name in shapes if name in network or not (TRAINING_STATE.search(name) or is_slot(name))]


# ------------------------------------------------------------------------------------------------------ matching


class Match(NamedTuple):
    """The names of variables in a file and in a model, compared."""

    loaded: list[str]  # in both, with equal shapes
    mismatched: list[str]  # in both, with different shapes
    absent: list[str]  # in the model, not in the file
    unused: list[str]  # in the file, not in the model


def match(values: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]]) -> Match:
    """Compares a file's variables with a model's.

    Args:
        values: {name: array} of the file. shapes: {name: list of int} of the model.
    Returns:
        Match, each list sorted by name
    """
    common = sorted(set(values) & set(shapes))
    fits = {name: tuple(values[name].shape) == tuple(shapes[name]) for name in common}
    return Match(
        loaded=[name for name in common if fits[name]],
        mismatched=[name for name in common if not fits[name]],
        absent=sorted(set(shapes) - set(values)),
        unused=sorted(set(values) - set(shapes)),
    )


def report(
    path: str | Path, values: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]], matched: Match
) -> list[str]:
    """Formats a Match as lines: the counts, and one line for each (of up to 20) variable that was not simply loaded."""
    counts = ", ".join(f"{len(names)} {part}" for part, names in matched._asdict().items())
    lines = [f"{path}: {counts}"]
    rows = [
        (name, f"shape {list(values[name].shape)} in the file, {list(shapes[name])} in the model")
        for name in matched.mismatched
    ]
    rows += [(name, "absent in the file") for name in matched.absent]
    rows += [(name, "unused: not in the model") for name in matched.unused]
    width = max((len(name) for name, _ in rows[:20]), default=0)
    lines += [f"  {name:<{width}}  {reason}" for name, reason in rows[:20]]
    if len(rows) > 20:
        lines.append(f"  ... and {len(rows) - 20} more")
    return lines


def check_complete(path: str | Path, matched: Match, backbone: set[str]) -> None:
    """Verifies a Match for prediction: every variable of the model must be in the file.

    Args (of all checks):
        path: of the file. matched: Match. backbone: names of the backbone's variables.
    Raises (all checks):
        CheckpointMismatch: the file is unsuitable.
    """
    if not matched.loaded:
        raise CheckpointMismatch(f"{path} holds no variable of this model: use the settings of its training")
    _refuse_backbone(path, matched, backbone)
    if matched.absent or matched.mismatched:
        first = (matched.mismatched + matched.absent)[0]
        raise CheckpointMismatch(
            f"{path} does not fit the model: {len(matched.mismatched)} other shapes, {len(matched.absent)} absent, "
            f"first {first}; use the settings of its training"
        )


def check_finetune(path: str | Path, matched: Match, backbone: set[str]) -> None:
    """Verifies a Match for `train.py --load`: only layers that depend on the classes may keep their initial values."""
    if not matched.loaded:
        raise CheckpointMismatch(f"{path} holds no variable of this model")
    _refuse_backbone(path, matched, backbone)
    wrong = [name for name in matched.mismatched if not DEPENDS_ON_CLASSES.match(name)] + matched.absent
    if wrong:
        raise CheckpointMismatch(
            f"{path} is of another model: {len(wrong)} variables don't fit, first {wrong[0]}; "
            f"give the settings of its training ({CONFIG_FILE} has them) after --config"
        )


def _refuse_backbone(path, matched, backbone):
    """Raises CheckpointMismatch if the file contains variables of the backbone only."""
    if matched.absent and backbone.issuperset(matched.loaded):
        raise CheckpointMismatch(f"{path} holds a backbone, no detector: give it to train.py as BACKBONE.WEIGHTS")


def check_backbone(path: str | Path, matched: Match, backbone: set[str]) -> None:
    """Verifies a Match for BACKBONE.WEIGHTS: the file must contain the whole backbone and at most a classifier more."""
    wrong = [name for name in matched.mismatched + matched.absent if name in backbone]
    if wrong:
        raise CheckpointMismatch(
            f"BACKBONE.WEIGHTS {path}: {len(wrong)} backbone variables don't fit, first {wrong[0]}"
        )
    excess = [name for name in matched.unused if not CLASSIFIER.match(name)]
    if excess:
        raise CheckpointMismatch(f"BACKBONE.WEIGHTS {path} holds {len(excess)} variables too many, first {excess[0]}")


# ------------------------------------------------------------------------------------------------------ loading


def model_variables() -> dict[str, tf.Variable]:
    """Returns the model's variables in the default graph, which checkpoints contain: {name: tf.Variable}."""
    return {variable.op.name: variable for variable in tfv1.get_collection(MODEL_VARIABLES)}


def assign(session: tfv1.Session, values: Mapping[tf.Variable, np.ndarray]) -> None:
    """Assigns {variable: array} in as few session runs as possible; one run per variable would take about a minute.

    A run feeds initial values. Variables that were created from one tensor are assigned in different runs.
    """
    runs = []
    for variable, value in values.items():
        initial = variable.initializer.inputs[1]
        run = next((run for run in runs if initial.ref() not in run), None)
        if run is None:
            runs.append(run := {})
        run[initial.ref()] = variable, value.astype(initial.dtype.as_numpy_dtype)
    for run in runs:
        fed = {reference.deref(): value for reference, (_, value) in run.items()}
        session.run([variable.initializer for variable, _ in run.values()], fed)


def load(
    path: str | Path, session: tfv1.Session, *, check: Callable[[str | Path, Match, set[str]], None]
) -> tuple[Match, list[str]]:
    """Loads a checkpoint into the model in the default graph.

    Args:
        path: from `checkpoint.resolve`. check: `check_complete`, `check_finetune` or `check_backbone`.
    Returns:
        Match, and the lines of `report`
    Raises:
        CheckpointMismatch: the file cannot be read, fails the check, or contains non-finite values.
    """
    variables = model_variables()
    shapes = {name: variable.shape.as_list() for name, variable in variables.items()}
    values = read(path, network=shapes)
    matched = match(values, shapes)
    check(path, matched, {variable.op.name for variable in tfv1.get_collection(BACKBONE_VARIABLES)})
    broken = [name for name in matched.loaded if not np.isfinite(values[name]).all()]
    if broken:
        raise CheckpointMismatch(f"{path} holds values that are not finite: {len(broken)} variables, first {broken[0]}")
    assign(session, {variables[name]: values[name] for name in matched.loaded})
    return matched, report(path, values, shapes, matched)


# ------------------------------------------------------------------------------------------------------ runs


class Snapshot(NamedTuple):
    """A checkpoint of a run, completely read."""

    path: Path  # prefix of the checkpoint
    step: int
    values: dict[str, np.ndarray]  # of all variables: weights, optimizer slots, counters
    state: dict[str, Any]  # as given to `checkpoint.save`


def newest_readable(directory: str | Path) -> Snapshot:
    """Returns the Snapshot to resume a run from: the newest checkpoint that is complete and undamaged.

    Raises:
        CheckpointMismatch: no checkpoint can be read.
    """
    for prefix in reversed(complete_in(Path(directory))):
        try:
            state = json.loads(Path(f"{prefix}.json").read_text())
            return Snapshot(prefix, step_of(prefix), _read_tensorflow(prefix, select=list, averaged=False), state)
        except (OSError, ValueError) as error:
            logger.warning(f"checkpoint {prefix} can't be read: {' '.join(str(error).split())[:200]}")
    raise CheckpointMismatch(f"no checkpoint in {directory} can be read: start again with another --logdir")


def restore(snapshot: Snapshot, session: tfv1.Session) -> None:
    """Assigns the values of a Snapshot to all variables of the default graph.

    Raises:
        CheckpointMismatch: graph and Snapshot have different variables.
    """
    variables = {variable.op.name: variable for variable in tfv1.global_variables()}
    matched = match(snapshot.values, {name: variable.shape.as_list() for name, variable in variables.items()})
    wrong = matched.mismatched + matched.absent + matched.unused
    if wrong:
        raise CheckpointMismatch(
            f"{snapshot.path} is of another model or optimizer: {len(wrong)} variables don't fit, first {wrong[0]}"
        )
    assign(session, {variables[name]: value for name, value in snapshot.values.items()})
