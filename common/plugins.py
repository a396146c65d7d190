"""Imports the user's modules that `--plugins` names; they register backbones, losses, formats and more by name.

A name in a file never causes an import: a run records its plugins, and loading the run requires `--plugins` again.
"""

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from config import UserError

logger = logging.getLogger(__name__)


class PluginError(UserError):
    """A plugin that cannot be imported, or that a run requires and that was not given."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--plugins` to an argparse parser."""
    help_text = "your modules to import first; they register backbones, losses, transforms, formats, loggers, ..."
    parser.add_argument("--plugins", nargs="+", action="extend", default=[], metavar="MODULE", help=help_text)


def load_plugins(names: Sequence[str]) -> None:
    """Imports modules by name; the current directory is searched after sys.path. Logs the file of each.

    Raises:
        PluginError: a module cannot be imported, or another one of its name was; the message gives the place.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise PluginError(f"--plugins {name}: {reason}{_place(error)}") from error
        file = getattr(module, "__file__", None)
        if file is None:
            raise PluginError(f"--plugins {name}: a folder without __init__.py, not a module")
        beside = os.path.join(os.getcwd(), *name.split(".")) + ".py"
        if os.path.isfile(beside) and not os.path.samefile(beside, file):
            raise PluginError(f"--plugins {name}: Python found {file} first: rename {beside}")
        logger.info(f"--plugins {name}: {file}")


def _place(error):
    """Returns " (FILE:LINE)", where an import failed, or "" if that is not in a module's own code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""


def check_plugins(names: Sequence[str], path: str | Path) -> None:
    """Verifies that the plugins of a run have been imported.

    Args:
        names: of modules, as in the setting PLUGINS. path: of the run, for the message.
    Raises:
        PluginError: a plugin is missing.
    """
    missing = [name for name in names if name not in sys.modules]
    if missing:
        raise PluginError(f"{path} was trained with plugins: add --plugins {' '.join(missing)}, or import them first")
