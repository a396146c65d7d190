"""tools/benchmark.py as a program, on a tiny model: what it prints and writes, and what it does without torchvision."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tools import benchmark, multiply_adds

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    *("BACKBONE.WIDTH=8", "BACKBONE.RESNET_NUM_BLOCKS=[1,1,1,1]", "FPN.NUM_CHANNEL=16", "FPN.FRCNN_FC_HEAD_DIM=16"),
    *("MRCNN.HEAD_DIM=8", "RPN.ANCHOR_SIZES=[8,16,32,64,128]", "FRCNN.BATCH_PER_IM=16", "TEST.RESULTS_PER_IM=7"),
    *("RPN.TEST_PER_LEVEL_NMS_TOPK=40", "RPN.BATCH_PER_IM=32"),
    *("FPN.CASCADE=True", "DATA.MAX_DROPPED=0.5"),
)
EDGE = "128x128"


def run(*arguments, **options):
    """`python -m tools.benchmark`: the finished process."""
    command = [sys.executable, "-m", "tools.benchmark", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, **options)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(what was printed, the results by part) of all parts, batch 2, in float32."""
    path = tmp_path_factory.mktemp("benchmark") / "results.json"
    done = run("--size", EDGE, "--batch", 2, "--repeat", 3, "--json", path, "--config", *TINY)
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    assert written["multiply-adds per second"]["float32"] > 1e8
    assert written["multiply-adds"]["training"] > written["multiply-adds"]["inference"] > 1e6
    return done.stdout, {result["part"]: result for result in written["results"]}


@pytest.mark.slow
def test_every_part_is_measured(measured):
    printed, results = measured
    assert set(results) == set(benchmark.PREPARE)
    for part, result in results.items():
        assert 0 < result["lowest"] <= result["s/img"] <= result["highest"]
        assert result["img/s"] == pytest.approx(1 / result["s/img"])
        assert result["peak MiB"] > 20
        (line,) = [line.split() for line in printed.splitlines() if line.startswith(f"{part} ")]
        assert line[:5] == [part, "CPU", "float32", "2", "this"]
        assert float(line[5]) == pytest.approx(result["s/img"], abs=1e-4)


@pytest.mark.slow
def test_the_work_is_what_the_settings_say(measured):
    _, results = measured
    assert results["training"]["work"] == {"num_rois": 16, "num_foreground": 4}  # a quarter
    assert results["inference"]["work"]["num_detections"] == 7
    assert results["paste"]["work"] == {"num_detections": 100}
    assert results["data"]["work"] == {"num_images": 8}  # generated


@pytest.mark.slow
def test_shares_of_stages_are_told_for_graphs(measured):
    printed, results = measured
    parts = {"conv0", "group0", "group3", "fpn", "rpn", "cascade_rcnn_stage3", "maskrcnn", benchmark.OTHER}
    for part, expected in (("training", parts | {"Momentum"}), ("inference", parts)):
        stages = results[part]["stages"]
        assert expected <= {stage for stage, _, _ in stages}
        assert sum(share for _, _, share in stages) == pytest.approx(1)
        assert [seconds for _, seconds, _ in stages] == sorted((seconds for _, seconds, _ in stages), reverse=True)
        assert f"{stages[0][0]} {stages[0][2]:.1%}, {stages[1][0]} " in printed
    assert results["data"]["stages"] == results["paste"]["stages"] == []


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("inference/rpn_1/conv0/Relu", "rpn"),
        ("gradients/group2/block0/conv1/Conv2D_grad/Conv2DBackpropFilter", "group2"),
        ("conv0/Relu", "conv0"),
        ("inference/cascade_rcnn_stage2/head/fc6/Relu", "cascade_rcnn_stage2"),
        ("Momentum/update_fpn/posthoc_3x3_p2/W/ResourceApplyMomentum", "Momentum"),
        ("inference/AvgPool2D_4", benchmark.OTHER),
        ("combined_non_max_suppression/CombinedNonMaxSuppression", benchmark.OTHER),
    ],
)
def test_ops_belong_to_stages(name, stage):
    assert benchmark.stage_of(name) == stage


def test_multiply_adds_are_counted_forward_and_backward():
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x, size = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3]), (2, 9, 11, 3)
        kernel, weights, of_images = tf.ones([3, 3, 3, 5]), tf.ones([5, 7]), tf.ones([2, 7, 6])
        y = tf.reshape(tf.nn.conv2d(x, kernel, 2, "VALID"), [-1, 5]) @ weights
        z = tf.matmul(of_images, tf.reshape(y, [2, 20, 7]), transpose_a=True, transpose_b=True)
        tf.nn.conv2d(x, kernel, 1, "SAME")  # not fetched, not counted
        gradients = tf.gradients(z, [x, kernel, weights, of_images])
        forward, both = (multiply_adds.count(session, f, {x: np.ones(size)}) for f in ([z], [z, *gradients]))
    pixels = 2 * 4 * 5
    assert forward == pixels * (27 * 5 + 5 * 7 + 7 * 6)
    assert both == 3 * forward


def test_there_is_no_ratio_of_different_work(capsys):
    one = dict.fromkeys(("part", "device", "precision", "batch", "s/img", "lowest", "highest", "img/s", "peak MiB"), 1)
    one |= {"side": "this", "stages": [], "work": {"num_rois": 1000.0}}
    other = one | {"side": "torchvision", "s/img": 3}
    benchmark.print_group([one, other])
    benchmark.print_group([one, other | {"work": {"num_rois": 748.0}}])
    ratios = [line.strip() for line in capsys.readouterr().out.splitlines() if "ratio" in line]
    assert ratios == ["ratio 3.00: torchvision's time over ours", "no ratio: they didn't do the same work"]


@pytest.mark.slow
def test_without_torchvision_it_says_what_installs_it(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    done = run("--vs", "torchvision", "--parts", "inference", "--size", "64x64", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "benchmark: --vs torchvision: No module named 'torch': `make bench` installs what it needs"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "800"], "--size 800: give HEIGHTxWIDTH in pixels, 32 at least"),
        (["--size", "800x-5"], "--size 800x-5: give HEIGHTxWIDTH in pixels, 32 at least"),
        (["--size", "31x64"], "--size 31x64: give HEIGHTxWIDTH in pixels, 32 at least"),
        (["--json", "README.md"], "README.md: give a new file in a folder that can be written to"),
        (["--json", "none/of/these.json"], "these.json: give a new file in a folder that can be written to"),
        (["--batch", "2", "0"], "--batch and --repeat: 1 at least"),
        (["--repeat", "0"], "--batch and --repeat: 1 at least"),
        (["--vs", "torchvision", "--config", "MODE_MASK=False"], "--vs torchvision: its side is R50-FPN Mask R-CNN"),
    ],
)
def test_bad_options_are_refused(arguments, message):
    with pytest.raises(benchmark.UserError, match=message):
        benchmark.main(benchmark.parse_arguments(arguments))
