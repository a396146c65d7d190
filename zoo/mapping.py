"""How the variables of another system's model map to ours: pairs of names, and what happens to the numbers between."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from config import UserError


class MappingError(UserError):
    """Weights of a model that is not known, or that lack something or have something left over."""

    exit_code = 5


class Layout(NamedTuple):
    """What turns their array into ours, and back; lossless, but for slots that the other side has no place for."""

    to_ours: Callable
    to_theirs: Callable


class Pair(NamedTuple):
    """One variable."""

    ours: str
    theirs: str
    layout: Layout


class Model(NamedTuple):
    """A model that a file holds."""

    name: str  # for messages
    pairs: list  # of Pair: all of them must be in the file
    settings: dict  # configuration key -> value, that the weights need
    ignored: frozenset = frozenset()  # names in the file that carry no weights
    added: dict = {}  # variables of ours that the other system has no counterpart of, by name
    notes: tuple = ()  # lines: what was assumed, what differs


SAME = Layout(lambda x: x, lambda x: x)
# [O, I, kh, kw] <-> [kh, kw, I, O]; also of transposed convolutions, [I, O, kh, kw] <-> [kh, kw, O, I].
CONVOLUTION = Layout(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))
# Of the first layer, from red, green, blue to our blue, green, red.
CONVOLUTION_OF_RGB = Layout(
    lambda w: w.transpose(2, 3, 1, 0)[:, :, ::-1], lambda w: w[:, :, ::-1].transpose(3, 2, 0, 1)
)
LINEAR = Layout(lambda w: w.T, lambda w: w.T)  # [outputs, inputs] <-> [inputs, outputs]; a bias stays as it is


def per_class(slots, *, size=1, num_theirs, inner=LINEAR, empty=0.0):
    """The layout of a last layer, of which ours has other classes than theirs, or in another order.

    Args:
        slots: for each of our classes theirs, or -1 where they have none. size: outputs per class.
        num_theirs: how many classes they have. inner: the layout of all but the classes, which are last in ours.
        empty: what those of their classes get that we don't have, and those of ours that they don't have
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


def layer(ours, theirs, layout=LINEAR, bias_layout=SAME, *, weight="weight", bias="bias"):
    """The pairs of a layer with bias."""
    return [Pair(f"{ours}/W", f"{theirs}.{weight}", layout), Pair(f"{ours}/b", f"{theirs}.{bias}", bias_layout)]


def bottleneck_name(stem_channels, kernel_shape):
    """BACKBONE.NAME of a network of bottleneck blocks.

    Args:
        stem_channels: 64 in all published ones. kernel_shape: [O, I, 3, 3] of its first block's 3x3 convolution.
    """
    outputs, group_width, _, _ = kernel_shape
    if outputs == group_width == stem_channels:
        return "resnet"
    return f"resnext_{outputs // group_width}x{group_width * 64 // stem_channels}d"


def from_theirs(model, arrays, *, allow_leftover=False):
    """Our variables from their arrays.

    Args:
        model: Model. arrays: name -> array.
    Returns:
        dict name -> float32 array, and the names of theirs that are left over
    Raises:
        MappingError: a name is missing; or left over, unless allowed
    """
    missing = [pair.theirs for pair in model.pairs if pair.theirs not in arrays]
    if missing:
        raise MappingError(f"taken for {model.name}, but it lacks {len(missing)} arrays, first {missing[0]}")
    leftover = sorted(set(arrays) - {pair.theirs for pair in model.pairs} - model.ignored)
    if leftover and not allow_leftover:
        raise MappingError(
            f"taken for {model.name}, but {len(leftover)} arrays are left over, first {leftover[0]}; "
            "--allow-leftover converts without them"
        )
    values = dict(model.added)
    for pair in model.pairs:
        try:
            values[pair.ours] = np.ascontiguousarray(pair.layout.to_ours(arrays[pair.theirs]), np.float32)
        except (ValueError, IndexError) as error:
            shape = list(arrays[pair.theirs].shape)
            raise MappingError(f"taken for {model.name}, but {pair.theirs} has the shape {shape}") from error
    return values, leftover


def to_theirs(model, values):
    """Their arrays from our variables: the inverse of `from_theirs`."""
    missing = [pair.ours for pair in model.pairs if pair.ours not in values]
    if missing:
        raise MappingError(f"taken for {model.name}, but it lacks {len(missing)} variables, first {missing[0]}")
    leftover = sorted(set(values) - {pair.ours for pair in model.pairs} - set(model.added))
    if leftover:
        raise MappingError(f"{model.name} has no place for {len(leftover)} variables, first {leftover[0]}")
    return {p.theirs: np.ascontiguousarray(p.layout.to_theirs(values[p.ours]), np.float32) for p in model.pairs}
