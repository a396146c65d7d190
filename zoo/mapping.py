"""Maps the variables of another framework's model to ours: pairs of names, and the conversion of the arrays."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from config import Config, UserError

IMAGENET_PIXELS = {"PREPROC.PIXEL_MEAN": [123.675, 116.28, 103.53], "PREPROC.PIXEL_STD": [58.395, 57.12, 57.375]}


class MappingError(UserError):
    """Weights of an unknown model, or with missing or surplus arrays."""

    exit_code = 5


class Layout(NamedTuple):
    """Converts their array to ours, and back; without loss, except of class slots that the other side lacks."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray] | None  # None: no conversion back exists


class Pair(NamedTuple):
    """A variable of ours, and the array of theirs that becomes it."""

    ours: str  # name
    theirs: str  # name
    layout: Layout


class Model(NamedTuple):
    """The model of a file, and its mapping to ours."""

    name: str  # for messages
    pairs: list[Pair]  # the file must contain all of them
    settings: dict[str, object]  # {key: value} that the weights need
    ignored: frozenset[str] = frozenset()  # names in the file that are no weights
    added: dict[str, np.ndarray] = {}  # variables of ours without a counterpart, by name
    constants: dict[str, np.ndarray] = {}  # arrays of theirs without a counterpart, by name
    notes: tuple[str, ...] = ()  # lines on assumptions and differences


SAME = Layout(lambda x: x, lambda x: x)
# [O, I, kh, kw] <-> [kh, kw, I, O]; also of transposed convolutions, [I, O, kh, kw] <-> [kh, kw, O, I].
CONVOLUTION = Layout(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))
# The first layer's, from red, green, blue to our blue, green, red.
CONVOLUTION_OF_RGB = Layout(
    lambda w: w.transpose(2, 3, 1, 0)[:, :, ::-1], lambda w: w[:, :, ::-1].transpose(3, 2, 0, 1)
)
LINEAR = Layout(lambda w: w.T, lambda w: w.T)  # [outputs, inputs] <-> [inputs, outputs]; a bias stays as it is


def per_class(
    slots: Sequence[int], *, size: int = 1, num_theirs: int, inner: Layout = LINEAR, empty: float = 0.0
) -> Layout:
    """The layout of a last layer whose classes differ from theirs, or have another order.

    Args:
        slots: for each of our classes the index of theirs, or -1 without a counterpart. size: outputs per class.
        num_theirs: number of their classes. inner: the layout of the layer apart from its classes; these are the last
            axis of ours.
        empty: the value for classes that the other side lacks.
    """
    slots = np.asarray(slots)

    def to_ours(theirs):
        x = inner.to_ours(theirs)
        x = x.reshape(*x.shape[:-1], num_theirs, size)
        ours = np.where((slots < 0)[:, None], np.float32(empty), x[..., slots, :])
        return ours.reshape(*x.shape[:-2], -1)

    def to_theirs(ours):
        x = ours.reshape(*ours.shape[:-1], len(slots), size)
        theirs = np.full((*x.shape[:-2], num_theirs, size), empty, np.float32)
        theirs[..., slots[slots >= 0], :] = x[..., slots >= 0, :]
        return inner.to_theirs(theirs.reshape(*x.shape[:-2], -1))

    return Layout(to_ours, to_theirs)


def layer(
    ours: str,
    theirs: str,
    layout: Layout = LINEAR,
    bias_layout: Layout = SAME,
    *,
    weight: str = "weight",
    bias: str = "bias",
) -> list[Pair]:
    """The pairs of a layer with a bias. `ours`, `theirs`: names of the layer; `weight`, `bias`: of their arrays."""
    return [Pair(f"{ours}/W", f"{theirs}.{weight}", layout), Pair(f"{ours}/b", f"{theirs}.{bias}", bias_layout)]


def bottleneck_name(stem_channels: int, kernel_shape: Sequence[int]) -> str:
    """The BACKBONE.NAME of a network of bottleneck blocks.

    Args:
        stem_channels: 64 in all published ones. kernel_shape: [O, I, 3, 3] of the 3x3 convolution in its first block.
    """
    outputs, group_width, _, _ = kernel_shape
    if outputs == group_width == stem_channels:
        return "resnet"
    return f"resnext_{outputs // group_width}x{group_width * 64 // stem_channels}d"


def from_theirs(
    model: Model, arrays: dict[str, np.ndarray], *, allow_leftover: bool = False
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Converts their arrays to our variables.

    Returns:
        {name: float32 array}, and the names of theirs that are left over
    Raises:
        MappingError: an array is missing or has another shape; or one is left over, unless that is allowed.
    """
    missing = [pair.theirs for pair in model.pairs if pair.theirs not in arrays]
    if missing:
        raise MappingError(f"recognised as {model.name}, but it lacks {len(missing)} arrays, first {missing[0]}")
    leftover = sorted(set(arrays) - {pair.theirs for pair in model.pairs} - model.ignored)
    if leftover and not allow_leftover:
        raise MappingError(
            f"recognised as {model.name}, but {len(leftover)} arrays are left over, first {leftover[0]}; "
            "--allow-leftover converts without them"
        )
    values = dict(model.added)
    for pair in model.pairs:
        try:
            values[pair.ours] = np.ascontiguousarray(pair.layout.to_ours(arrays[pair.theirs]), np.float32)
        except (ValueError, IndexError) as error:
            shape = list(arrays[pair.theirs].shape)
            raise MappingError(f"recognised as {model.name}, but {pair.theirs} has the shape {shape}") from error
    return values, leftover


def check_counterpart(framework: str, settings: Config, needed: dict[str, object]) -> None:
    """Verifies that a model of ours has a counterpart, which needs the settings {key: value}.

    Raises:
        MappingError: a setting does not fit.
    """
    other = {key: settings.value(key) for key, value in needed.items() if not settings.fits(key, value)}
    if other:
        shown = ", ".join(f"{key}={value}" for key, value in other.items())
        raise MappingError(f"{framework} has no counterpart of models with {shown}")


def to_theirs(model: Model, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts our variables to their arrays, float32, and adds their constants: the inverse of `from_theirs`.

    Raises:
        MappingError: a variable is missing, or has no counterpart.
    """
    missing = [pair.ours for pair in model.pairs if pair.ours not in values]
    if missing:
        raise MappingError(f"recognised as {model.name}, but it lacks {len(missing)} variables, first {missing[0]}")
    leftover = sorted(set(values) - {pair.ours for pair in model.pairs} - set(model.added))
    if leftover:
        raise MappingError(f"{model.name} has no place for {len(leftover)} variables, first {leftover[0]}")
    arrays = {p.theirs: np.ascontiguousarray(p.layout.to_theirs(values[p.ours]), np.float32) for p in model.pairs}
    return {**arrays, **model.constants}
