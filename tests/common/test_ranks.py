"""The ranks of a run: one process alone, and several whose Horovod is replaced by a stand-in for two ranks."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from common.ranks import RankLost, Ranks, is_lost

tfv1 = tf.compat.v1


def test_one_process_is_its_own_chief():
    ranks = Ranks()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.gather({"a": 1}) == [{"a": 1}] == ranks.gather({"a": 1}, chief_only=True)
    assert ranks.of_chief("x") == "x"
    assert ranks.share(np.float32(7)).tolist() == [7]


def test_a_lost_rank_is_told_from_other_errors():
    def error(kind):
        return SimpleNamespace(op=kind and SimpleNamespace(type=kind))

    assert is_lost(error("HorovodAllreduce"))
    assert not is_lost(error("Conv2D"))
    assert not is_lost(error(None))
    assert RankLost(3).exit_code == 6
    assert str(RankLost(3)) == "rank 3 has lost another rank: see the error message of that rank"


@pytest.fixture(params=[0, 1])
def ranks(request, monkeypatch):
    """The HorovodRanks of one of two ranks; the other one sends the text "other"."""
    own = request.param

    def allgather(tensor, name):
        other = tf.constant(np.frombuffer(b'"other"\n', np.uint8)) if tensor.dtype == tf.uint8 else tf.constant([70])
        return tf.concat([tensor, other] if own == 0 else [other, tensor], axis=0)

    stand_in = SimpleNamespace(init=lambda: None, rank=lambda: own, size=lambda: 2, allgather=allgather)
    monkeypatch.setitem(sys.modules, "horovod", SimpleNamespace(tensorflow=stand_in))
    monkeypatch.setitem(sys.modules, "horovod.tensorflow", stand_in)
    monkeypatch.delitem(sys.modules, "common.horovod_ranks", raising=False)
    yield importlib.import_module("common.horovod_ranks").HorovodRanks()
    sys.modules.pop("common.horovod_ranks", None)


def test_ranks_gather_values_in_their_order(ranks):
    own = ["é\n", {"a": [1, None]}]
    assert (ranks.rank, ranks.size) in ((0, 2), (1, 2))
    assert ranks.gather(own) == ([own, "other"] if ranks.rank == 0 else ["other", own])
    assert ranks.gather(own, chief_only=True) == ([own, "other"] if ranks.rank == 0 else None)
    assert ranks.of_chief(own) == (own if ranks.rank == 0 else "other")
    with tf.Graph().as_default(), tfv1.Session() as session:
        shared = session.run(ranks.share(tf.constant(5)))
    assert shared.tolist() == ([5, 70] if ranks.rank == 0 else [70, 5])


def test_the_end_of_another_rank_is_an_error(ranks, monkeypatch):
    def fail(*_):
        raise tf.errors.UnknownError(None, None, "Horovod has been shut down")

    ranks._session = SimpleNamespace(run=fail)
    with pytest.raises(RankLost, match=f"rank {ranks.rank} has lost another rank"):
        ranks.gather(1)
