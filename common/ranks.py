"""The processes (ranks) of a run, one per device, and the values that they exchange besides gradients."""

from typing import Any

from config import UserError


class RankLost(UserError):
    """Another process of the run has ended."""

    exit_code = 6

    def __init__(self, rank: int):
        super().__init__(f"rank {rank} has lost another rank: see the error message of that rank")


def is_lost(error: Exception) -> bool:
    """Returns whether a TensorFlow error was caused by the end of another rank."""
    return error.op is not None and error.op.type.startswith("Horovod")


class Ranks:
    """A run of one process, and the interface of `HorovodRanks`."""

    rank: int = 0  # of this process
    size: int = 1  # number of processes

    def gather(self, value: Any, *, chief_only: bool = False) -> list | None:
        """Gathers one JSON-serialisable value per rank; returns them ordered by rank. All ranks must call it.

        With `chief_only`, all ranks except 0 get None and decode nothing.
        """
        return [value]

    def of_chief(self, value: Any) -> Any:
        """Returns the `value` of rank 0 on all ranks. All ranks must call it."""
        return self.gather(value)[0]

    def share(self, number: Any) -> Any:
        """Gathers a scalar tensor of the training graph over the ranks, to [size]. All ranks must run it together."""
        return number[None]
