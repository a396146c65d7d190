"""The ranks of a run that `horovodrun` started. Importing this module starts TensorFlow and requires Horovod."""

import json
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from common.ranks import RankLost, Ranks


class HorovodRanks(Ranks):
    """The processes that `horovodrun` started; the interface is that of `Ranks`.

    `gather` uses its own graph and session, so it works before the training graph is built and after it is finalized.

    Raises (from `gather`):
        RankLost: another rank has ended.
    """

    def __init__(self):
        hvd.init()
        self.rank, self.size = hvd.rank(), hvd.size()
        with tf.Graph().as_default() as graph, tf.device("/cpu:0"):
            self._bytes = tf.compat.v1.placeholder(tf.uint8, [None])
            self._gathered = hvd.allgather(self._bytes, name="ranks_gather")
        options = tf.compat.v1.ConfigProto(device_count={"GPU": 0})
        self._session = tf.compat.v1.Session(graph=graph, config=options)

    def gather(self, value: Any, *, chief_only: bool = False) -> list | None:
        line = np.frombuffer(json.dumps(value).encode() + b"\n", np.uint8)
        try:
            lines = self._session.run(self._gathered, {self._bytes: line})
        except tf.errors.OpError as error:
            raise RankLost(self.rank) from error
        if chief_only and self.rank > 0:
            return None
        return [json.loads(line) for line in lines.tobytes().splitlines()]

    def share(self, number: tf.Tensor) -> tf.Tensor:
        with tf.device("/cpu:0"):
            return hvd.allgather(tf.reshape(number, [1]), name="ranks_share")
