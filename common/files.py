"""Writes files and folders completely or not at all, and never over an existing path unless asked to."""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from config import UserError

_COUNTER = itertools.count()  # two threads may write at one path


class FileError(UserError):
    """A file or folder that exists already or cannot be written; the message names its path."""


def check_unused(path: str | Path) -> None:
    """Raises FileError if the path exists."""
    if os.path.lexists(path):
        raise FileError(f"{path} exists already: choose another path, or move it away")


def make_folder(path: str | Path) -> None:
    """Creates a folder and the folders above it; accepts an existing folder if it is empty.

    Raises:
        FileError: the folder is not empty, the path is not a folder, or it cannot be created.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        check_unused(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Converts an OSError of the block into a FileError that names `path`."""
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


class Whole:
    """A new file or folder that gets its name only when it is complete.

        with Whole("results.json") as file:
            file.part.write_text("[]")

    The block writes to `part`, a hidden path beside `path`, preferably within `writing(path)`. At the end of the block,
    `part` is flushed to disk and renamed to `path`; after an exception it is removed. At every moment `path` is absent,
    the old file, or the complete new one.
    """

    path: Path
    part: Path

    def __init__(self, path: str | Path, *, overwrite: bool = False, numbered: bool = False, durable: bool = True):
        """
        Args:
            path: missing folders above it are created. overwrite: replace an existing file.
            numbered: if `path` comes to exist while the block runs, use the next name of `unused_path`.
            durable: wait until a file is on the disk; without it, a crash of the machine may still lose it.
        Raises (at the start or end of the block):
            FileError: the path exists already, or it cannot be written.
        """
        self.path = Path(path)
        unique = f"{os.getpid()}-{next(_COUNTER)}"
        self.part = self.path.with_name(f".{self.path.stem}.{unique}.part{self.path.suffix}")
        self._overwrite, self._numbered, self._durable = overwrite, numbered, durable

    def __enter__(self):
        if not self._overwrite:
            check_unused(self.path)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, exception_type, exception, traceback):
        try:
            if exception_type is None:
                with writing(self.path):
                    self._finish()
        finally:
            remove(self.part)

    def _finish(self):
        is_folder = self.part.is_dir()
        if not is_folder and self._durable:
            flush(self.part)
        if self._numbered:
            self.path = unused_path(self.path)
        if self._overwrite or is_folder:  # os.replace refuses to put a folder over a file or a non-empty folder
            os.replace(self.part, self.path)
            return
        try:
            os.link(self.part, self.path)  # unlike renaming, fails if the file was created meanwhile
        except OSError:  # the path exists, or the file system has no hard links
            check_unused(self.path)
            os.replace(self.part, self.path)


def write_whole(path: str | Path, content: str | bytes, *, overwrite: bool = True, durable: bool = True) -> None:
    """Writes text or bytes to a file, completely or not at all: see `Whole`.

    Raises:
        FileError: the file exists, without `overwrite`, or it cannot be written.
    """
    with Whole(path, overwrite=overwrite, durable=durable) as file, writing(path):
        file.part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_new(path: str | Path, contents: dict[str, bytes]) -> Path:
    """Writes {suffix: bytes} as files of one name, the first unused one of `unused_path`. For pictures, of which there
    may be thousands: it does not wait for the disk.

    Returns:
        path of the first file
    Raises:
        FileError: a file cannot be written.
    """
    while True:
        free = unused_path(path, suffixes=contents)
        paths, written = [free.with_suffix(suffix) for suffix in contents], []
        try:
            for each, content in zip(paths, contents.values()):
                write_whole(each, content, overwrite=False, durable=False)
                written.append(each)
            return paths[0]
        except FileError:
            is_taken = any(os.path.lexists(each) for each in paths if each not in written)
            for each in written:
                remove(each)
            if not is_taken:
                raise  # otherwise another process has just taken the name: try the next


def unused_path(path: str | Path, *, suffixes: Iterable[str] = ()) -> Path:
    """Returns the first of `path`, NAME-1.EXT, NAME-2.EXT, ... that does not exist, nor with one of `suffixes`."""
    path = Path(path)
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    candidates = ([each, *map(each.with_suffix, suffixes)] for each in itertools.chain([path], numbered))
    return next(each for each, *others in candidates if not any(map(os.path.lexists, [each, *others])))


def flush(path: str | Path) -> None:
    """Flushes a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: str | Path) -> None:
    """Removes a file or folder that this program created, if it exists."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.unlink(path)
