"""Weights: finding a checkpoint, reading it, and loading it into the model with a report of what matched.

A checkpoint is a `.npz` of the tensorpack model zoo or a TensorFlow checkpoint. Nothing is ever reshaped to fit, and
nothing is unpickled. `resolve` needs no TensorFlow, so that a wrong path is answered at once.
"""

import itertools
import json
import logging
import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import UserError

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"  # the configuration, beside the checkpoints of a run
CARRIED = "config"  # the entry of a converted .npz with the settings that its weights need, as JSON
NEWEST = "checkpoint"  # TensorFlow's text file that names the newest checkpoint of a directory
BACKBONE = re.compile(r"^(conv0|group\d+/block\d+)/")
CLASSIFIER = re.compile(r"^linear/")  # of a backbone trained on ImageNet
DEPENDS_ON_CLASSES = re.compile(r"^((fastrcnn|cascade_rcnn_stage\d)(/outputs)?/(class|box)|maskrcnn/conv)/[Wb]$")
BEST_FILE = "best.json"  # which checkpoint of a run has the best metric, and its value
SCRATCH = ".saving"  # directory beside the checkpoints in which the next one is written
MAX_TO_KEEP = 3  # newest checkpoints, beside the best: if one is damaged, the one before it serves
MODEL_VARIABLE = re.compile(r"/(W|b|gamma|beta|mean/EMA|variance/EMA)$")


class CheckpointError(UserError):
    """A checkpoint that does not exist, can't be read, or does not fit the model."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint of another model."""

    exit_code = 5


# ------------------------------------------------------------------------------------------------------ finding


def resolve(path):
    """Find the checkpoint that a user means.

    Args:
        path: a `.npz`, a run's directory (its newest checkpoint), `model-500`, or one of its files
            `model-500.index`, `model-500.data-00000-of-00001`
    Returns:
        Path of the `.npz`, or the prefix of a TensorFlow checkpoint
    """
    path = Path(path)
    if path.is_dir():
        return _newest_in(path)
    if path.suffix == ".npz" and path.is_file():
        return path
    prefix = Path(re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", str(path)))
    if Path(f"{prefix}.index").is_file() and _data_files(prefix):
        return prefix
    if Path(f"{prefix}.index").is_file() or _data_files(prefix):
        raise CheckpointError(f"checkpoint {prefix} is incomplete: it needs an .index and a .data file")
    raise CheckpointError(f"no checkpoint at {path}; {_what_is_beside(path.parent)}")


def _data_files(prefix):
    return list(prefix.parent.glob(f"{prefix.name}.data-*")) if prefix.parent.is_dir() else []


def _complete_in(directory):
    """Prefixes of the complete TensorFlow checkpoints in a directory, by step."""
    prefixes = [path.with_suffix("") for path in directory.glob("*.index")]
    return sorted((p for p in prefixes if _data_files(p)), key=lambda p: (_step(p), p.name))


def _step(prefix):
    number = re.search(r"-(\d+)$", prefix.name)
    return int(number.group(1)) if number else -1


def _newest_in(directory):
    complete = _complete_in(directory)
    state = directory / NEWEST
    if state.is_file():
        named = re.search(r'^model_checkpoint_path: "(.*)"$', state.read_text(errors="replace"), re.MULTILINE)
        prefix = directory / Path(named.group(1)).name if named else None
        if prefix in complete:
            return prefix
    if not complete:
        raise CheckpointError(f"no checkpoint in the directory {directory}; {_what_is_beside(directory)}")
    return complete[-1]


def _what_is_beside(directory):
    if not directory.is_dir():
        return f"the directory {directory} does not exist"
    found = [p.name for p in _complete_in(directory)] + sorted(p.name for p in directory.glob("*.npz"))
    return "found there: " + (", ".join(found[:8]) if found else "no .npz and no TensorFlow checkpoint")


def has_checkpoint(directory):
    """Whether a run's directory holds a complete checkpoint."""
    return bool(_complete_in(Path(directory)))


def find_config(path):
    """The configuration written beside the checkpoint of `resolve`, or None."""
    candidate = Path(path).parent / CONFIG_FILE
    return candidate if candidate.is_file() else None


def load_config(path, config, overrides=()):
    """Set the keys of a Config to those of the model's training, if they are known; else say so in a warning.

    Args:
        path: as returned by `resolve`. overrides: texts "KEY=VALUE" of the user, which win.
    Raises:
        ConfigError: they contradict what a converted checkpoint says that its weights need
    """
    carried = carried_settings(path)
    config_file = None if carried else find_config(path)  # a file that happens to lie beside converted weights
    if config_file:
        config.load(config_file)
    elif not carried:
        logger.warning(f"no {CONFIG_FILE} beside {path}: the settings are the defaults and those given here")
    config.update(overrides)
    config.adopt(carried, source=path)


# ------------------------------------------------------------------------------------------------------ reading


def read(path):
    """All model variables of a checkpoint: dict from name (without ":0") to array, in the file's dtype.

    Args:
        path: as returned by `resolve`
    """
    reader = _read_npz if Path(path).suffix == ".npz" else _read_tensorflow
    try:
        values = reader(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointMismatch(f"checkpoint {path} can't be read: {' '.join(str(error).split())[:200]}") from error
    return {name: value for name, value in values.items() if MODEL_VARIABLE.search(name)}


def _read_npz(path):
    if not zipfile.is_zipfile(path):
        raise OSError("it is no .npz archive")
    with np.load(path, allow_pickle=False) as archive:
        return {name.removesuffix(":0"): archive[name] for name in archive.files}


def _read_tensorflow(path, names=MODEL_VARIABLE):
    import tensorflow as tf  # not at the top: `resolve` has to answer without it

    try:
        reader = tf.train.load_checkpoint(str(path))
        return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map() if names.search(name)}
    except (tf.errors.OpError, RuntimeError, IndexError) as error:  # the reader's own errors have no common base
        raise OSError(str(error)) from error


# ------------------------------------------------------------------------------------------------------ settings


def carried_settings(path):
    """The settings that a converted checkpoint (tools/convert.py) needs: dict from key to value; none of others.

    Args:
        path: as returned by `resolve`
    """
    if Path(path).suffix != ".npz":
        return {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            settings = json.loads(str(archive[CARRIED])) if CARRIED in archive.files else {}
            return dict(settings)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointMismatch(f"checkpoint {path} can't be read: {' '.join(str(error).split())[:200]}") from error


def write_npz(file, values, settings):
    """Write variables (name -> array) and the settings that they need to an open file."""
    np.savez(file, **{CARRIED: np.array(json.dumps(settings))}, **values)


# ------------------------------------------------------------------------------------------------------ matching


class Match(NamedTuple):
    """How a file's variables and a model's meet. All are lists of names."""

    loaded: list
    mismatched: list  # other shapes
    absent: list  # in the model, not in the file
    unused: list  # in the file, not in the model


def match(values, shapes):
    """Compare a file with a model.

    Args:
        values: name -> array, of the file. shapes: name -> list, of the model.
    Returns:
        Match, each part sorted by name
    """
    common = sorted(set(values) & set(shapes))
    fits = {name: tuple(values[name].shape) == tuple(shapes[name]) for name in common}
    return Match(
        loaded=[name for name in common if fits[name]],
        mismatched=[name for name in common if not fits[name]],
        absent=sorted(set(shapes) - set(values)),
        unused=sorted(set(values) - set(shapes)),
    )


def report(path, values, shapes, matched):
    """The match as lines to print: one of counts, and one per variable that was not simply loaded."""
    counts = ", ".join(f"{len(names)} {part}" for part, names in matched._asdict().items())
    lines = [f"{path}: {counts}"]
    rows = [
        (name, f"shape {list(values[name].shape)} in the file, {list(shapes[name])} in the model")
        for name in matched.mismatched
    ]
    rows += [(name, "absent in the file") for name in matched.absent]
    rows += [(name, "unused: not in the model") for name in matched.unused]
    width = max((len(name) for name, _ in rows[:20]), default=0)
    lines += [f"  {name:<{width}}  {what}" for name, what in rows[:20]]
    if len(rows) > 20:
        lines.append(f"  ... and {len(rows) - 20} more")
    return lines


def check_complete(path, matched):
    """For prediction: every variable of the model must have been loaded."""
    if not matched.loaded:
        raise CheckpointMismatch(f"{path} holds no variable of this model: was it trained with another configuration?")
    if matched.absent and all(BACKBONE.match(name) for name in matched.loaded):
        raise CheckpointMismatch(f"{path} holds a backbone, no detector: give it to training as BACKBONE.WEIGHTS")
    if matched.absent or matched.mismatched:
        worst = (matched.mismatched + matched.absent)[0]
        raise CheckpointMismatch(
            f"{path} does not fit the model: {len(matched.mismatched)} other shapes, {len(matched.absent)} absent, "
            f"first {worst}; use the configuration of its training"
        )


def check_finetune(path, matched):
    """For `train.py --load`: only what depends on the number of classes may start fresh."""
    if not matched.loaded:
        raise CheckpointMismatch(f"{path} holds no variable of this model")
    if matched.absent and all(BACKBONE.match(name) for name in matched.loaded):
        raise CheckpointMismatch(f"{path} holds a backbone, no detector: give it as BACKBONE.WEIGHTS")
    wrong = [name for name in matched.mismatched if not DEPENDS_ON_CLASSES.match(name)] + matched.absent
    if wrong:
        raise CheckpointMismatch(
            f"{path} is of another model: {len(wrong)} variables don't fit, first {wrong[0]}; "
            f"give the settings of its training ({CONFIG_FILE} has them) after --config"
        )


def check_backbone(path, matched):
    """For BACKBONE.WEIGHTS: the whole backbone, and nothing left over but its classifier."""
    wrong = [name for name in matched.mismatched + matched.absent if BACKBONE.match(name)]
    if wrong:
        raise CheckpointMismatch(
            f"BACKBONE.WEIGHTS {path}: {len(wrong)} backbone variables don't fit, first {wrong[0]}"
        )
    left = [name for name in matched.unused if not CLASSIFIER.match(name)]
    if left:
        raise CheckpointMismatch(f"BACKBONE.WEIGHTS {path} holds {len(left)} variables too many, first {left[0]}")


# ------------------------------------------------------------------------------------------------------ loading


def model_variables():
    """The variables of the default graph that a checkpoint of the model holds: name -> variable."""
    import tensorflow as tf

    found = tf.compat.v1.global_variables()
    return {v.op.name: v for v in found if MODEL_VARIABLE.search(v.op.name)}


def assign(session, values):
    """Give variables their values (variable -> array) in one run: with one each, preparing the runs takes a minute."""
    inputs = {variable: variable.initializer.inputs[1] for variable in values}
    fed = {inputs[variable]: value.astype(inputs[variable].dtype.as_numpy_dtype) for variable, value in values.items()}
    session.run([variable.initializer for variable in values], fed)


def load(path, session, *, check):
    """Load a checkpoint into the model of the default graph.

    Args:
        path: as returned by `resolve`. check: `check_complete`, `check_finetune` or `check_backbone`.
    Returns:
        Match, and the lines of `report`
    """
    variables = model_variables()
    shapes = {name: variable.shape.as_list() for name, variable in variables.items()}
    values = read(path)
    matched = match(values, shapes)
    check(path, matched)
    broken = [name for name in matched.loaded if not np.isfinite(values[name]).all()]
    if broken:
        raise CheckpointMismatch(f"{path} holds values that are not finite: {len(broken)} variables, first {broken[0]}")
    assign(session, {variables[name]: values[name] for name in matched.loaded})
    return matched, report(path, values, shapes, matched)


# ------------------------------------------------------------------------------------------------------ runs


class Snapshot(NamedTuple):
    """A checkpoint of a run, read whole."""

    path: Path
    step: int
    values: dict  # name -> array, of all variables: weights, the optimizer's, counters
    state: dict  # what `save` was given


def newest_readable(directory):
    """The Snapshot to resume a run from: the newest that is complete and undamaged.

    Raises:
        CheckpointMismatch: there are checkpoints, and none can be read.
    """
    for prefix in reversed(_complete_in(Path(directory))):
        try:
            state = json.loads(Path(f"{prefix}.json").read_text())
            return Snapshot(prefix, _step(prefix), _read_tensorflow(prefix, names=re.compile("")), state)
        except (OSError, ValueError) as error:
            logger.warning(f"checkpoint {prefix} can't be read: {' '.join(str(error).split())[:200]}")
    raise CheckpointMismatch(f"no checkpoint in {directory} can be read: start anew in another --logdir")


def restore(snapshot, session):
    """Give all variables of the default graph the values of a Snapshot; those of the one must be those of the other."""
    import tensorflow as tf

    variables = {variable.op.name: variable for variable in tf.compat.v1.global_variables()}
    matched = match(snapshot.values, {name: variable.shape.as_list() for name, variable in variables.items()})
    wrong = matched.mismatched + matched.absent + matched.unused
    if wrong:
        raise CheckpointMismatch(
            f"{snapshot.path} is of another model or optimizer: {len(wrong)} variables don't fit, first {wrong[0]}"
        )
    assign(session, {variables[name]: value for name, value in snapshot.values.items()})


def save(write, directory, step, state):
    """Write a checkpoint `model-STEP` of a run: at every moment all of it is there under its name, or nothing.

    Args:
        write: function of a path (str) that writes a TensorFlow checkpoint under this prefix
        state: what else is needed to go on, as JSON can hold it; goes to `model-STEP.json`
    Returns:
        Path, its prefix

    Raises:
        OSError, tf.errors.OpError: the disk is full, gone, read-only, ...
    """
    directory = Path(directory)
    scratch, prefix = directory / SCRATCH, directory / f"model-{step}"
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed run left
    scratch.mkdir()
    try:
        write(str(scratch / prefix.name))
        (scratch / f"{prefix.name}.json").write_text(json.dumps(state))
        files = sorted(scratch.iterdir(), key=lambda path: path.suffix == ".index")  # last: it makes it complete
        for path in files:
            _flush(path)
        Path(f"{prefix}.index").unlink(missing_ok=True)  # of a damaged checkpoint of this step
        for path in files:
            os.replace(path, directory / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write_whole(directory / NEWEST, f'model_checkpoint_path: "{prefix.name}"\n')
    _flush(directory)
    return prefix


def unused_path(path, *, suffixes=()):
    """The path, or the first of NAME-1.EXT, NAME-2.EXT, ... that does not exist, nor do those of these suffixes."""
    path = Path(path)
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    candidates = ([each, *map(each.with_suffix, suffixes)] for each in itertools.chain([path], numbered))
    return next(each for each, *others in candidates if not any(map(Path.exists, [each, *others])))


def write_whole(path, text):
    """Write a file: at every moment it is the old one or the whole new one."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text)
    _flush(temporary)
    os.replace(temporary, path)


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(directory):
    """Delete a run's checkpoints but the newest MAX_TO_KEEP and the best."""
    best = read_best(directory)
    for prefix in _complete_in(Path(directory))[:-MAX_TO_KEEP]:
        is_ours = re.fullmatch(r"model-\d+", prefix.name) and Path(f"{prefix}.json").exists()
        if is_ours and (best is None or best["checkpoint"] != prefix.name):
            for path in [Path(f"{prefix}.index"), *_data_files(prefix), Path(f"{prefix}.json")]:
                path.unlink(missing_ok=True)


def read_best(directory):
    """What BEST_FILE says: a dict of checkpoint (name), step, metric (name), value; None if there is none."""
    try:
        return json.loads((Path(directory) / BEST_FILE).read_text())
    except (OSError, ValueError):
        return None


def mark_best(directory, *, step, metric, value):
    """Write BEST_FILE."""
    best = {"checkpoint": f"model-{step}", "step": step, "metric": metric, "value": value}
    write_whole(Path(directory) / BEST_FILE, json.dumps(best) + "\n")
