"""The processes of a run, one per device: how many there are, and what they tell each other beside the gradients.

TensorFlow is imported only where there are several.
"""

import json

from config import UserError


class RankLost(UserError):
    """Another process of the run has ended."""

    exit_code = 6

    def __init__(self, rank):
        super().__init__(f"rank {rank} has lost another rank: that one's message says why")


def is_lost(error):
    """Whether a TensorFlow error comes of another rank having ended."""
    return error.op is not None and error.op.type.startswith("Horovod")


class Ranks:
    """A run of one process, and the interface of `HorovodRanks`."""

    rank, size = 0, 1

    def gather(self, value, *, chief_only=False):
        """What every rank calls this with (anything for JSON), as a list by rank. All ranks have to call it.

        With `chief_only` all but rank 0 get None, and need not decode what is large.
        """
        return [value]

    def of_chief(self, value):
        """The `value` of rank 0, on all ranks."""
        return self.gather(value)[0]

    def share(self, number):
        """A scalar tensor of the training graph as [size], of every rank: they all run it together."""
        import tensorflow as tf

        return tf.reshape(number, [1])


class HorovodRanks(Ranks):
    """The processes that `horovodrun` started.

    `gather` has a graph of its own, so that it works before the training graph is made and after it is finalized.
    """

    def __init__(self):
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init()
        self._hvd, self.rank, self.size = hvd, hvd.rank(), hvd.size()
        with tf.Graph().as_default() as graph, tf.device("/cpu:0"):
            self._bytes = tf.compat.v1.placeholder(tf.uint8, [None])
            self._gathered = hvd.allgather(self._bytes, name="ranks_gather")
        options = tf.compat.v1.ConfigProto(device_count={"GPU": 0})
        self._session = tf.compat.v1.Session(graph=graph, config=options)

    def gather(self, value, *, chief_only=False):
        import numpy as np
        import tensorflow as tf

        line = np.frombuffer(json.dumps(value).encode() + b"\n", np.uint8)
        try:
            lines = self._session.run(self._gathered, {self._bytes: line})
        except tf.errors.OpError as error:
            raise RankLost(self.rank) from error
        if chief_only and self.rank > 0:
            return None
        return [json.loads(line) for line in lines.tobytes().splitlines()]

    def share(self, number):
        import tensorflow as tf

        with tf.device("/cpu:0"):
            return self._hvd.allgather(tf.reshape(number, [1]), name="ranks_share")
