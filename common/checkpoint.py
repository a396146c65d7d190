"""Checkpoint files: finds and writes them, and reads the settings of their models.

A checkpoint is a `.npz` of the tensorpack model zoo or a TensorFlow checkpoint; common/weights.py reads the variables.
This file does not import TensorFlow, so programs reject a wrong path before the slow start of TensorFlow.
"""

import json
import logging
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.files import flush, write_whole
from common.plugins import check_plugins
from config import Config, UserError

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"  # the settings of a run, beside its checkpoints
CARRIED = "config"  # entry of a converted .npz: the settings that its weights require, as JSON
NEWEST = "checkpoint"  # TensorFlow's text file that names the newest checkpoint in a directory
BEST_FILE = "best.json"  # names the checkpoint of a run with the best metric, and the value
SCRATCH = ".saving"  # directory beside the checkpoints where the next one is written
MAX_TO_KEEP = 3  # newest checkpoints, in addition to the best; spares for one that is damaged


class CheckpointError(UserError):
    """A checkpoint that does not exist, cannot be read, or does not fit the model."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint that cannot be read, or that belongs to another model."""

    exit_code = 5


# ------------------------------------------------------------------------------------------------------ finding


def resolve(path: str | Path) -> Path:
    """Finds the checkpoint that a user's path refers to.

    Args:
        path: a `.npz`; a run's directory, for its newest checkpoint; a prefix `model-500`; or one of the files
            `model-500.index`, `model-500.data-00000-of-00001`
    Returns:
        path of the `.npz`, or the prefix of a TensorFlow checkpoint
    Raises:
        CheckpointError: there is no checkpoint, or it lacks a file.
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
    raise CheckpointError(f"no checkpoint at {path}; {_list_checkpoints(path.parent)}")


def _data_files(prefix):
    return list(prefix.parent.glob(f"{prefix.name}.data-*")) if prefix.parent.is_dir() else []


def complete_in(directory: Path) -> list[Path]:
    """Returns the prefixes of the complete TensorFlow checkpoints in a directory, in the order of their steps."""
    prefixes = [path.with_suffix("") for path in directory.glob("*.index")]
    return sorted((p for p in prefixes if _data_files(p)), key=lambda p: (step_of(p), p.name))


def step_of(prefix: Path) -> int:
    """Returns the step in the name of a checkpoint prefix, `model-STEP`; -1 if the name has none."""
    number = re.search(r"-(\d+)$", prefix.name)
    return int(number.group(1)) if number else -1


def _newest_in(directory):
    complete = complete_in(directory)
    state = directory / NEWEST
    if state.is_file():
        named = re.search(r'^model_checkpoint_path: "(.*)"$', state.read_text(errors="replace"), re.MULTILINE)
        prefix = directory / Path(named.group(1)).name if named else None
        if prefix in complete:
            return prefix
    if not complete:
        raise CheckpointError(f"no checkpoint in the directory {directory}; {_list_checkpoints(directory)}")
    return complete[-1]


def _list_checkpoints(directory):
    if not directory.is_dir():
        return f"the directory {directory} does not exist"
    found = [p.name for p in complete_in(directory)] + sorted(p.name for p in directory.glob("*.npz"))
    return "found there: " + (", ".join(found[:8]) if found else "no .npz and no TensorFlow checkpoint")


def has_checkpoint(directory: str | Path) -> bool:
    """Returns whether a run's directory contains a complete checkpoint."""
    return bool(complete_in(Path(directory)))


def find_config(path: str | Path) -> Path | None:
    """Returns the path of the configuration beside the checkpoint of `resolve`, or None."""
    candidate = Path(path).parent / CONFIG_FILE
    return candidate if candidate.is_file() else None


def save_config(settings: Config, path: str | Path) -> None:
    """Writes all settings as JSON.

    Raises:
        FileError: the file cannot be written.
    """
    write_whole(path, settings.to_json())


def load_config(path: str | Path, settings: Config, overrides: Iterable[str] = ()) -> None:
    """Sets the keys of a Config to the settings of the model's training; logs a warning if these are not available.

    Args:
        path: from `resolve`. settings: Config to set. overrides: the user's "KEY=VALUE" texts, which take precedence.
    Raises:
        ConfigError: an override contradicts a setting that converted weights require.
        PluginError: the run requires plugins that were not imported.
    """
    carried = carried_settings(path)
    config_file = None if carried else find_config(path)  # a file beside converted weights may not belong to them
    if config_file:
        settings.load(config_file)
        check_plugins(settings.PLUGINS, path)
    elif not carried:
        logger.warning(f"no {CONFIG_FILE} beside {path}: using the defaults and the settings given here")
    settings.update(overrides)
    settings.adopt(carried, source=path)


def settings_of(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Returns the settings of a trained model as a checked and frozen Config; arguments as in `load_config`.

    Raises:
        UserError: the class names are unknown. ConfigError, PluginError: see `load_config` and `Config.check`.
    """
    settings = Config()
    load_config(path, settings, overrides=overrides)
    if not settings.DATA.CLASS_NAMES:
        raise UserError(f"DATA.CLASS_NAMES is not set: no {CONFIG_FILE} beside {path} names classes")
    settings.DATA.NUM_CATEGORY = len(settings.DATA.CLASS_NAMES) - 1
    settings.check()
    settings.freeze()
    return settings


# ------------------------------------------------------------------------------------------------------ settings


def carried_settings(path: str | Path) -> dict[str, Any]:
    """Returns the settings that a checkpoint converted by tools/convert.py requires, {key: value}; {} for others.

    Args:
        path: from `resolve`
    Raises:
        CheckpointMismatch: the file cannot be read.
    """
    if Path(path).suffix != ".npz":
        return {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            settings = json.loads(str(archive[CARRIED])) if CARRIED in archive.files else {}
            return dict(settings)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointMismatch(f"checkpoint {path} can't be read: {' '.join(str(error).split())[:200]}") from error


def write_npz(file: BinaryIO, values: dict[str, np.ndarray], settings: dict[str, Any]) -> None:
    """Writes variables {name: array} and the settings that they require, {key: value}, to an open binary file."""
    np.savez(file, **{CARRIED: np.array(json.dumps(settings))}, **values)


def save(write: Callable[[str], object], directory: str | Path, step: int, state: dict[str, Any]) -> Path:
    """Writes the checkpoint `model-STEP` of a run atomically: at every moment it exists completely or not at all.

    Args:
        write: function of a path (str) that writes a TensorFlow checkpoint with this prefix
        state: JSON-serialisable values that resuming needs beside the variables; written to `model-STEP.json`
    Returns:
        prefix of the checkpoint
    Raises:
        OSError, FileError, tf.errors.OpError: the disk is full, disconnected, read-only, ...
    """
    directory = Path(directory)
    scratch, prefix = directory / SCRATCH, directory / f"model-{step}"
    shutil.rmtree(scratch, ignore_errors=True)  # left behind by a killed run
    scratch.mkdir()
    try:
        write(str(scratch / prefix.name))
        (scratch / f"{prefix.name}.json").write_text(json.dumps(state))
        files = sorted(scratch.iterdir(), key=lambda path: path.suffix == ".index")  # last: it completes the checkpoint
        for path in files:
            flush(path)
        Path(f"{prefix}.index").unlink(missing_ok=True)  # left by a damaged checkpoint of this step
        for path in files:
            os.replace(path, directory / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write_whole(directory / NEWEST, f'model_checkpoint_path: "{prefix.name}"\n')
    flush(directory)
    return prefix


def prune(directory: str | Path) -> None:
    """Deletes a run's checkpoints except for the newest MAX_TO_KEEP and the best."""
    best = read_best(directory)
    for prefix in complete_in(Path(directory))[:-MAX_TO_KEEP]:
        is_ours = re.fullmatch(r"model-\d+", prefix.name) and Path(f"{prefix}.json").exists()
        if is_ours and (best is None or best["checkpoint"] != prefix.name):
            for path in [Path(f"{prefix}.index"), *_data_files(prefix), Path(f"{prefix}.json")]:
                path.unlink(missing_ok=True)


def read_best(directory: str | Path) -> dict[str, Any] | None:
    """Reads BEST_FILE: a dict of checkpoint (name), step, metric (name) and value; None if it is missing or damaged."""
    try:
        return json.loads((Path(directory) / BEST_FILE).read_text())
    except (OSError, ValueError):
        return None


def mark_best(directory: str | Path, *, step: int, metric: str, value: float) -> None:
    """Writes BEST_FILE."""
    best = {"checkpoint": f"model-{step}", "step": step, "metric": metric, "value": value}
    write_whole(Path(directory) / BEST_FILE, json.dumps(best) + "\n")
