"""What runs where on a GPU: the count of a small graph by hand, and the whole training and inference graphs."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tensorflow as tf
from tensorpack.compat import tfv1

from tools import placement

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["BACKBONE.WIDTH=8", "FPN.NUM_CHANNEL=16"]
SMALL += ["FRCNN.BATCH_PER_IM=8", "RPN.TRAIN_POST_NMS_TOPK=50", "RPN.TEST_POST_NMS_TOPK=50"]
SMALL += [
    "PREPROC.TRAIN_SHORT_EDGE_SIZE=64",
    "FPN.FRCNN_FC_HEAD_DIM=32",
    "FPN.FRCNN_CONV_HEAD_DIM=16",
    "RPN.HEAD_DIM=16",
    "MRCNN.HEAD_DIM=16",
    "TRAIN.PRECISION=bfloat16",
    "TEST.PRECISION=bfloat16",
]
TABLE = {
    "Mul": [({"T": {"float32"}}, set()), ({"T": {"int32"}}, {"x", "y", "z"})],
    "Cast": [({}, set())],
    "Reshape": [({"T": {"float32"}}, {"shape"})],
    "TopKV2": [({"T": {"float32"}}, {"k"})],
}


def count(build):
    with tf.Graph().as_default() as graph:
        build()
    nodes = list(graph.as_graph_def().node)
    on_host = frozenset(op.name for op in graph.get_operations() if op.device)
    return placement.count(placement.Trace(nodes, Counter(node.name for node in nodes), {}, {}, on_host), TABLE)


def test_the_host_computes_in_int32_and_waits_for_what_the_device_has_made():
    def build():
        x = tfv1.placeholder(tf.float32, [4], "x")
        index = tf.math.top_k(tf.multiply(x, x, name="square"), 2, name="best").indices
        twice = tf.multiply(index, index, name="twice")
        tf.cast(twice, tf.float32, name="back")

    counted = count(build)
    assert counted.device == ["square", "best", "back"]
    assert counted.host == ["twice"]
    assert [crossing.tensor for crossing in counted.crossings] == ["best:1"]
    assert counted.without_kernel == {}


def test_ops_without_a_kernel_run_on_the_host_and_wait_for_their_inputs():
    def build():
        x = tfv1.placeholder(tf.float32, [2, 3], "x")
        tf.nn.relu(tf.multiply(x, x, name="square"), name="relu")
        tf.multiply(tfv1.placeholder(tf.float64, []), 2.0, name="double")

    counted = count(build)
    assert counted.without_kernel == {"Relu(float32)": ["relu"], "Mul(float64)": ["double"]}
    assert [crossing.tensor for crossing in counted.crossings] == ["square"]


def test_what_the_program_puts_on_the_host_needs_no_kernel_but_waits():
    def build():
        x = tfv1.placeholder(tf.float32, [2, 3], "x")
        y = tf.multiply(x, x, name="square")
        with tf.device("/cpu:0"):
            z = tf.nn.relu(y, name="relu")
        tf.multiply(z, z, name="again")

    counted = count(build)
    assert counted.without_kernel == {} and counted.host == ["relu"]
    assert [crossing.tensor for crossing in counted.crossings] == ["square"]


def test_shapes_may_stay_on_the_host():
    def build():
        x = tfv1.placeholder(tf.float32, [None, 4], "x")
        y = tf.multiply(x, x, name="square")
        tf.reshape(y, [tf.shape(x)[0] * 4], name="flat")

    assert count(build).crossings == []


def test_the_table_is_that_of_a_tensorflow_with_gpu_support():
    table = placement.read_table()
    assert table.keys() >= {"Conv2D", "CropAndResize", "Stage", "TopKV2"}
    assert "CombinedNonMaxSuppression" not in table
    assert all(isinstance(json.dumps(sorted(host)), str) for kernels in table.values() for _, host in kernels)


def test_a_tensorflow_without_gpu_support_renews_nothing(tmp_path):
    with pytest.raises(placement.UserError, match="no kernels for GPUs"):
        placement.renew(tmp_path / "table.json")
    assert not list(tmp_path.iterdir())


FPN, GN = ["MODE_FPN=True"], ["BACKBONE.NORM=GN", "FPN.NORM=GN"]
GN += ["FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_gn_head", "FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_gn_head"]
BN = ["BACKBONE.NORM=SyncBN", "FPN.NORM=SyncBN"]
BN += ["FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_bn_head", "FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_bn_head"]
RESNEXT = ["BACKBONE.NAME=resnext_32x4d", "BACKBONE.WIDTH=64"]
# A CPU has no gradient of grouped convolutions, and takes minutes for steps in float16 of larger images.
FLOAT16 = [
    "PREPROC.TRAIN_SHORT_EDGE_SIZE=32",
    "TRAIN.PRECISION=float16",
    "TEST.PRECISION=float16",
]
MODELS = {
    "C4": ["MODE_FPN=False"],
    "Cascade, GroupNorm, float16": [*FPN, "FPN.CASCADE=True", *GN, *FLOAT16],
    "SyncBN, torchvision": [*FPN, *BN, "RPN.NUM_CONVS=2", "CONVENTIONS=torchvision"],
    "Detectron2": [*FPN, "CONVENTIONS=detectron2"],
}


def placement_of(mode, settings):
    """What the program prints of the graph."""
    command = [sys.executable, "-m", "tools.placement", mode, *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout[done.stdout.find("\nnodes:") :] if "\nnodes:" in done.stdout else done.stdout


def numbers(printed, start):
    (line,) = [line for line in printed.splitlines() if line.startswith(start)]
    return [int(word) for word in re.findall(r"\d+", line)]


def check(mode, settings, *, waits=0):
    """Between batch and results wait the looks of NMS, the guard, float16's scale, and `waits` more."""
    printed = placement_of(mode, settings)
    assert numbers(printed, "without a kernel for GPUs:") == [0], printed
    crossings, octets = numbers(printed, "tensors that cross to the host:")
    assert crossings <= (8 if mode == "training" else 4) + waits and octets < 65536, printed
    return printed


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("model", MODELS)
def test_nothing_of_the_graph_needs_the_host(model, mode):
    """Detectron2's RoIAlign waits once for the boxes and once for the masks: for how many samples its RoIs take."""
    blocks = ["BACKBONE.RESNET_NUM_BLOCKS=[1,1,1,1]"]
    check(mode, [*SMALL, *blocks, *MODELS[model]], waits=2 if model == "Detectron2" else 0)


@pytest.mark.slow
def test_nothing_of_a_resnext_needs_the_host():
    check("inference", [*SMALL, *FPN, *RESNEXT])


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "most"), [("training", 2500), ("inference", 1000)])
def test_launches_of_r50_fpn(mode, most):
    """Of a Mask R-CNN of all layers, of few channels."""
    printed = check(mode, [*SMALL, *FPN])
    assert numbers(printed, "nodes:")[0] <= most and numbers(printed, "launches on the device:")[0] <= most, printed


@pytest.mark.long
@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("model", MODELS)
def test_nothing_of_the_published_widths_needs_the_host(model, mode):
    batch = ["TRAIN.BATCH_SIZE_PER_GPU=2"]
    check(mode, [*batch, *MODELS[model]], waits=2 if model == "Detectron2" else 0)
