"""Counts the multiply-adds of a graph, and measures how many a processor does in a second: together, a lower bound."""

import statistics
import time

import numpy as np
import tensorflow as tf

from inference.graph import session_config

tfv1 = tf.compat.v1
MULTIPLYING = {"Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter", "MatMul", "BatchMatMulV2"}


def count(session, fetches, feed):
    """The multiply-adds of all convolutions and matrix products that `fetches`, tensors or ops, require."""
    graph = session.graph
    fetched = [fetch.name.partition(":")[0] for fetch in fetches]
    needed = {node.name for node in tfv1.graph_util.extract_sub_graph(graph.as_graph_def(), fetched).node}
    with graph.as_default():
        factors = [_factors(op) for op in graph.get_operations() if op.name in needed and op.type in MULTIPLYING]
    return sum(int(np.prod(np.concatenate(pair), dtype=np.int64)) for pair in session.run(factors, feed))


def _factors(op):
    """The multiply-adds of an op of a type in MULTIPLYING, as factors: the numbers of two int32 vectors."""
    if op.type == "Conv2D":  # each output takes one for each weight of its channel
        return tf.shape(op.outputs[0]), tf.shape(op.inputs[1])[:3]
    if op.type == "Conv2DBackpropInput":
        return tf.shape(op.inputs[2]), tf.shape(op.inputs[1])[:3]
    if op.type == "Conv2DBackpropFilter":
        return tf.shape(op.inputs[2]), op.inputs[1][:3]
    axis = -2 if op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x") else -1
    return tf.shape(op.outputs[0]), tf.shape(op.inputs[0])[axis, None]


def rate(precision, *, repeat=5):
    """The multiply-adds per second of a large 3x3 convolution, 256 channels on a map of 200x304."""
    shape, channels = (1, 200, 304, 256), 256
    with tf.Graph().as_default(), tfv1.Session(config=session_config()) as session:
        dtype = tf.as_dtype(precision)
        x = tfv1.Variable(tf.cast(tf.ones(shape), dtype))
        kernel = tfv1.Variable(tf.cast(tf.ones((3, 3, channels, channels)), dtype))
        run = tf.nn.conv2d(x, kernel, 1, "SAME").op
        session.run(tfv1.global_variables_initializer())
        session.run(run)
        seconds = []
        for _ in range(repeat):
            start = time.perf_counter()
            session.run(run)
            seconds.append(time.perf_counter() - start)
    return shape[1] * shape[2] * 9 * channels * channels / statistics.median(seconds)
