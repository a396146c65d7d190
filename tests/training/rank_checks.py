"""What two ranks of `horovodrun` do for test_trainers.py: each writes what it found to DIRECTORY/rank-N.npz."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import tensorflow as tf
from tensorpack.compat import tfv1
from tensorpack.tfutils.tower import TrainTowerContext
from test_trainers import BETA, GAMMA, random_batches

from common.horovod_ranks import HorovodRanks
from modeling.layers import batch_norm
from training import trainers


class Trainer:
    def __init__(self, session):
        self.sess = session


def sync_bn(rank):
    """Output, gradients and moving averages of SyncBN on this rank's batch."""
    parts, weights = random_batches()
    with tf.Graph().as_default(), tfv1.Session() as session:
        with TrainTowerContext(""):
            x = tf.constant(parts[rank])
            y = batch_norm("bn", x)
        gamma, beta, *averages = tfv1.global_variables()
        gradients = tf.gradients(tf.reduce_sum(y * weights[rank]), [x, gamma, beta])
        session.run(tfv1.global_variables_initializer())
        gamma.load(GAMMA, session)
        beta.load(BETA, session)
        found = session.run([y, *gradients])
        session.run(tfv1.get_collection(tfv1.GraphKeys.UPDATE_OPS))
        return dict(zip(("y", "dx", "dgamma", "dbeta", "mean", "variance"), [*found, *session.run(averages)]))


def unequal_weights(ranks, value):
    """The complaint about a weight that is `value` on this rank."""
    with tf.Graph().as_default(), tfv1.Session() as session:
        tfv1.get_variable("equal", initializer=1.0)
        tfv1.get_variable("weight", initializer=float(value))
        session.run(tfv1.global_variables_initializer())
        check = trainers._EqualRanks(ranks)
        check.trainer = Trainer(session)
        try:
            check._before_train()
        except trainers.ReplicaError as error:
            return str(error)
        return ""


def shared(ranks, number):
    with tf.Graph().as_default(), tfv1.Session() as session:
        return session.run(ranks.share(tf.constant(number)))


def main(directory):
    ranks = HorovodRanks()
    found = sync_bn(ranks.rank)
    found["gathered"] = np.array([len(text) for text in ranks.gather("x" * (ranks.rank * 100000 + 3))])
    found["to_chief"] = np.array(ranks.gather(ranks.rank, chief_only=True) or [])
    found["of_chief"] = np.array(ranks.of_chief([ranks.rank, "é\n"]))
    found["shared"] = shared(ranks, ranks.rank + 7)
    found["equal"] = np.array(unequal_weights(ranks, 5))
    found["unequal"] = np.array(unequal_weights(ranks, ranks.rank))
    np.savez(Path(directory) / f"rank-{ranks.rank}.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1])
