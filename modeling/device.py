"""For which kind of device a graph is built: a few parts have a form of ops that GPUs have, and one faster on CPUs."""

import contextlib
import contextvars
import re
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from config import ConfigError

_is_gpu = contextvars.ContextVar("is_gpu", default=None)


def is_gpu() -> bool:
    """Whether the graph is built for a GPU: if this process has one, unless `building_for` says otherwise."""
    chosen = _is_gpu.get()
    return _has_gpu() if chosen is None else chosen


def runs_on_gpu() -> bool:
    """Whether the graph may contain ops that only GPUs have: not under `building_for`, whose graphs run anywhere."""
    return _is_gpu.get() is None and _has_gpu()


def use_gpu(index: int) -> None:
    """Makes this process open one GPU alone, if the machine has any; to be called before a graph is built.

    Raises:
        ConfigError: there is no GPU of this index.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if index >= len(gpus) > 0:
        raise ConfigError(f"process {index + 1} of this machine needs a GPU of its own, and there are {len(gpus)}")
    if gpus:
        tf.config.set_visible_devices(gpus[index], "GPU")


def emulates_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether bfloat16 may be slower than float32 here: no GPU, and a processor without instructions for it.

    Args:
        cpuinfo: Linux's description of the processor; False without it.
    """
    if _has_gpu() or not cpuinfo.exists():
        return False
    return not re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpuinfo.read_text())


def _has_gpu():
    return bool(tf.config.list_physical_devices("GPU"))


@contextlib.contextmanager
def building_for(*, gpu: bool) -> Iterator[None]:
    """Builds the graphs of the block for a GPU or for a CPU, whatever this machine has."""
    token = _is_gpu.set(gpu)
    try:
        yield
    finally:
        _is_gpu.reset(token)
