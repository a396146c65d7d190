"""The whole graph: batches, images without objects, precision, gradients, fusion, and where each setting goes."""

import re

import helpers
import numpy as np
import pytest
import tensorflow as tf
from golden.synthetic import synthetic_image
from graphs import (
    SMALL,
    InferenceGraph,
    TrainingGraph,
    configure,
    free_graphs,
    pad,
    small_inference_graph,
    small_training_graph,
    training_batch,
)
from tensorpack.compat import tfv1
from tensorpack.tfutils.tower import TowerContext

from modeling import rcnn

DETECTRON2 = "CONVENTIONS=detectron2"  # its RoIAlign is a loop of what is one op elsewhere


@pytest.fixture(scope="module", autouse=True)
def shared_graphs():
    """Frees the shared graphs after the last test of this file."""
    yield
    free_graphs()


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("overrides", [["FPN.CASCADE=True"], ["MODE_FPN=False"], ["BACKBONE.NORM=GN", "FPN.NORM=GN"]])
def test_a_batch_loses_the_mean_of_its_images(overrides):
    """Random samples included: the picks belong to the image, not to the batch that it is in."""
    specs = [[96, 128, 3, 1], [96, 128, 5, 2]]
    graph = small_training_graph(*overrides)
    together = graph.run(graph.losses, training_batch(specs, multiple=32))
    alone = [graph.run(graph.losses, training_batch([spec], multiple=32)) for spec in specs]
    for name, value in together.items():
        np.testing.assert_allclose(value, np.mean([losses[name] for losses in alone]), rtol=1e-5, err_msg=name)


def test_padded_ground_truth_changes_nothing():
    graph = small_training_graph()
    few = graph.run(graph.losses, training_batch([[96, 128, 3, 1]], multiple=32))
    more = graph.run(graph.losses, training_batch([[96, 128, 3, 1]], multiple=32, num_gt=9))
    for name, value in few.items():
        np.testing.assert_allclose(more[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("overrides", [[], ["FPN.CASCADE=True"], ["MODE_FPN=False"], ["FPN.CASCADE=True", DETECTRON2]])
def test_images_without_objects_train(overrides):
    batch = training_batch([[96, 128, 3, 1], [96, 128, 5, 2]], multiple=32)
    batch["gt_labels"][:] = 0
    batch["gt_boxes"][:] = 0
    graph = small_training_graph(*overrides)
    losses, norms = graph.run((graph.losses, graph.norms), batch)
    for name, value in losses.items():
        assert np.isfinite(value), name
        if "box_loss" in name or "mask" in name:
            assert value == 0, name
    for name, value in norms.items():
        assert np.isfinite(value), name


def as_rows(detections, image):
    """(boxes, scores, labels) of one image of the batch, and its masks."""
    rows = detections.image_index == image
    return (detections.boxes[rows], detections.scores[rows], detections.labels[rows]), detections.masks[rows]


@pytest.mark.parametrize(
    "overrides", [[], ["FPN.CASCADE=True"], ["MODE_FPN=False"], ["CONVENTIONS=torchvision"], [DETECTRON2]]
)
def test_a_batch_is_predicted_as_its_images_alone(overrides):
    """Images of one padded size, here of two sizes that are padded to the same."""
    sizes = [(96, 128), (96, 128)] if "MODE_FPN=False" in overrides else [(96, 128), (90, 125)]
    images = [synthetic_image(*size, 4, seed)[0] for seed, size in enumerate(sizes)]
    graph = small_inference_graph(*overrides)
    together = graph.predict(*pad(images, 32))
    for i, image in enumerate(images):
        alone, alone_masks = as_rows(graph.predict(*pad([image], 32)), 0)
        found, masks = as_rows(together, i)
        assert len(alone[0]) == len(found[0]) > 10
        for one, other in zip(alone, found):
            np.testing.assert_allclose(one, other, atol=1e-3)
        np.testing.assert_allclose(alone_masks, masks, atol=1e-3)


@pytest.mark.parametrize(
    ("overrides", "mask_side"),
    [([], 28), (["FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_gn_head", "MRCNN.HEAD_DIM=8"], 28), (["MODE_FPN=False"], 14)],
)
def test_nothing_detected(overrides, mask_side):
    """oneDNN makes wrong shapes of convolutions of an empty batch."""
    graph = small_inference_graph(*overrides)
    (bias,) = [name for name in graph.variables if re.fullmatch(r"fastrcnn/(outputs/)?class/b", name)]
    with graph.weights({bias: np.eye(81)[0] * 100}):  # all background
        found = graph.predict(*pad([synthetic_image(96, 128, 4, 0)[0]], 32))
    assert found.boxes.shape == (0, 4)
    assert found.masks.shape == (0, mask_side, mask_side)


def test_padding_of_the_batch_has_no_anchors():
    """A small image beside a large one: its proposals stay within it."""
    images = pad([synthetic_image(64, 64, 2, 1)[0], synthetic_image(160, 192, 4, 2)[0]], 32)
    graph = small_inference_graph()
    proposals = graph.run(graph.proposals, dict(zip(("image", "image_shape"), images)))
    small = proposals.boxes[0][proposals.is_valid[0]]
    assert len(small) > 10
    assert small.max() <= 64
    assert proposals.boxes[1].max() > 64


# ---------------------------------------------------------------- parts


def test_pixels_are_normalised_in_bgr_and_padding_is_zero():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((5, 7), (6, 4))]
    settings = configure("PREPROC.PIXEL_MEAN=[100.,110.,120.]", "PREPROC.PIXEL_STD=[50.,60.,70.]")  # R, G, B
    batch, shapes = pad(images, 8)
    batch[batch == 0] = 9  # padding of any value
    found = helpers.evaluate(lambda *x: rcnn._normalise(settings, *x), batch, shapes)
    for x, (height, width), pixels in zip(found, shapes, batch):
        expected = np.zeros((8, 8, 3))
        expected[:height, :width] = (pixels[:height, :width].astype(float) - [120, 110, 100]) / [70, 60, 50]
        np.testing.assert_allclose(x, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("side", "level"),
    [(8, 2), (111, 2), (113, 3), (223, 3), (225, 4), (447, 4), (449, 5), (895, 5), (900, 5), (2000, 5)],
)
def test_rois_are_pooled_from_p2_to_p5(side, level):
    """Each level's map holds its number: p6 serves no RoI, however large (arXiv:1612.03144 eq. 1)."""

    def pool(boxes):
        maps = [tf.fill([1, 2 ** (12 - i), 2 ** (12 - i), 1], float(i)) for i in range(2, 7)]
        features = rcnn._RoIFeatures(configure("MODE_FPN=True"), maps, (4, 8, 16, 32, 64), training=False)
        return features.for_boxes(boxes, tf.constant([0])), features.for_masks(boxes, tf.constant([0]))

    box_features, mask_features = helpers.evaluate(pool, np.array([[16.0, 16.0, 16.0 + side, 16.0 + side]]))
    np.testing.assert_allclose(box_features, np.full((1, 7, 7, 1), level), rtol=1e-6)
    np.testing.assert_allclose(mask_features, np.full((1, 14, 14, 1), level), rtol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "stride", "cells"),
    [
        (["MODE_FPN=True"], 4, [[24, 32], [8, 8]]),  # padded to multiples of 32
        (["MODE_FPN=True"], 64, [[2, 2], [1, 1]]),  # p6 takes every second cell of p5, the first one included
        (["MODE_FPN=False"], 16, [[5, 7], [1, 2]]),  # not padded: each layer of stride 2 loses an odd row or column
    ],
)
def test_cells_that_an_image_has_alone(overrides, stride, cells):
    shapes = np.array([[90, 125], [31, 32]], np.int32)
    found = helpers.evaluate(lambda x: rcnn._valid_cells(configure(*overrides), x, [1024, stride])[:, 1], shapes)
    np.testing.assert_array_equal(found, cells)


# ---------------------------------------------------------------- precision


def test_bfloat16_is_close_to_float32():
    images = pad([synthetic_image(96, 128, 4, 0)[0]], 32)
    boxes = []
    for overrides in ([], ["TEST.PRECISION=bfloat16"]):
        found = small_inference_graph(*overrides).predict(*images)
        assert found.masks.dtype == found.boxes.dtype == np.float32
        boxes.append(found.boxes[:5])
    distance = np.abs(boxes[0][:, None] - boxes[1][None]).max(axis=2).min(axis=1)
    assert np.median(distance) < 3.0
    assert distance.max() > 0  # it was computed otherwise


def test_bfloat16_trains_with_close_losses():
    batch = training_batch([[96, 128, 3, 1]], multiple=32)
    losses = []
    for overrides in ([], ["TRAIN.PRECISION=bfloat16"]):
        graph = small_training_graph(*overrides)
        assert {v.dtype.base_dtype for v in graph.trainable.values()} == {tf.float32}
        losses.append(graph.run((graph.losses, graph.norms), batch)[0])
    for name, value in losses[0].items():
        np.testing.assert_allclose(losses[1][name], value, rtol=0.1, atol=0.01, err_msg=name)
    assert losses[0]["total_cost"] != losses[1]["total_cost"]


TINY = ("FPN.NUM_CHANNEL=4", "MRCNN.HEAD_DIM=4", "FRCNN.BATCH_PER_IM=8", "RPN.TRAIN_PER_LEVEL_NMS_TOPK=8")


def test_float16_trains_with_close_losses():
    """Tiny: the CPU's gradients of float16 convolutions take hundreds of times as long."""
    losses = []
    for precision in ("float32", "float16"):
        graph = small_training_graph(*TINY, f"TRAIN.PRECISION={precision}")
        losses.append(graph.run((graph.losses, graph.norms), training_batch([[64, 64, 2, 1]], multiple=32))[0])
    for name, value in losses[0].items():
        np.testing.assert_allclose(losses[1][name], value, rtol=0.1, atol=0.01, err_msg=name)
    assert losses[0]["total_cost"] != losses[1]["total_cost"]


def test_float16_that_overflows_in_the_maps_alone_is_marked():
    """The heads' weights are zero, so they are finite whatever the maps hold; a channel of p3 exceeds 65504."""
    graph = small_inference_graph(*TINY, "TEST.PRECISION=float16", "MODE_MASK=False")
    heads = [name for name in graph.variables if name.startswith(("rpn/", "fastrcnn/"))]
    zero = {name: np.zeros(graph.variables[name].shape) for name in heads}
    images = pad([synthetic_image(64, 64, 2, 1)[0]], 32)
    with graph.weights(zero):
        assert not np.isnan(graph.predict(*images).scores).any()
    for bias in (7e4, -7e4):
        with graph.weights(zero | {"fpn/posthoc_3x3_p3/b": np.array([0, bias, 0, 0])}):
            assert np.isnan(graph.predict(*images).scores).sum() == 1


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("conventions", [[], [DETECTRON2]])
def test_every_trainable_variable_has_a_gradient_and_boxes_have_none(conventions):
    """In what runs, loops included: crop_and_resize's gradient of boxes has no kernel for what training feeds it."""
    graph = small_training_graph("FPN.CASCADE=True", *conventions)
    assert all(gradient is not None for gradient in graph.gradients.values())
    batch = training_batch([[96, 128, 3, 1]], multiple=32)
    nodes, ran = helpers.run_traced(graph.session, graph.norms, graph.feed(batch))
    kinds = {nodes[name].op for name in ran if name in nodes}
    assert "CropAndResizeGradImage" in kinds
    assert "CropAndResizeGradBoxes" not in kinds


@pytest.mark.parametrize("overrides", [[], ["MODE_FPN=False"]])
def test_gradients_equal_central_differences(overrides):
    """Of each trainable variable, along its gradient times noise: a wrong sign, scale or order of elements shows.

    Proposals have no gradient, so they are fed. A step changes the cost by about 0.001, or the variable by 2 %.
    """
    graph, rng = small_training_graph(*overrides), np.random.default_rng(0)
    batch = training_batch([[96, 128, 3, 1]], multiple=32)
    gradients, values, *proposals = graph.run((graph.gradients, graph.trainable, *graph.proposals), batch)
    fixed, compared = dict(zip(graph.proposals, proposals)), 0
    for name, gradient in gradients.items():
        along = gradient * rng.uniform(0, 2, gradient.shape)
        along /= np.linalg.norm(along) or 1
        expected, size = (gradient * along).sum(), np.linalg.norm(values[name])
        if expected * size < 2e-3:  # rounding hides it: p4 and p5 serve few RoIs here
            continue
        step = np.clip(1e-3 / expected, 5e-4 * size, 0.02 * size)
        costs = []
        for sign in (1, -1):
            with graph.weights({name: values[name] + sign * step * along}):
                costs.append(float(graph.run(graph.cost, batch, fixed)))
        assert (costs[0] - costs[1]) / (2 * step) == pytest.approx(expected, rel=0.05), name
        compared += 1
    assert compared >= len(gradients) - 4


def test_no_gradient_is_sparse():
    """With a sparse one, optimizers leave alone the momentum of what a step doesn't use; the others come to no harm."""
    gradients = small_training_graph().gradients
    assert [name for name, gradient in gradients.items() if isinstance(gradient, tf.IndexedSlices)] == []


# ---------------------------------------------------------------- fusion


TWO_BLOCKS = "BACKBONE.RESNET_NUM_BLOCKS=[2,2,2,2]"  # the second one of a stage has no convolution as shortcut


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_inference_is_fused_and_runs_as_many_ops_for_more_images(precision):
    ran = []
    with tf.Graph().as_default():
        graph = InferenceGraph(configure(*SMALL, TWO_BLOCKS, f"TEST.PRECISION={precision}"))
    for count in (1, 3):
        inputs = pad([synthetic_image(96, 128, 4, seed)[0] for seed in range(count)], 32)
        feed = dict(zip(graph.inference.inputs, inputs))
        nodes, ran_now = helpers.run_traced(graph.session, list(graph.inference.detections), feed)
        ran.append(ran_now)
    # Where a stage begins, two convolutions meet in the addition: TensorFlow fuses one with it, but not the ReLU.
    assert helpers.not_fused(nodes) == [f"inference/group{stage}/block0/conv3/Relu" for stage in (1, 2, 3)]
    assert len([node for node in nodes.values() if "Fused" in node.op]) > 40
    assert len(ran[0]) == len(ran[1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_is_fused_forward_and_runs_as_many_ops_for_more_images(precision):
    ran = []
    with tf.Graph().as_default():
        graph = TrainingGraph(configure(*SMALL, TWO_BLOCKS, f"TRAIN.PRECISION={precision}"))
    for count in (1, 3):
        batch = training_batch([[96, 128, 3, seed] for seed in range(count)], multiple=32)
        nodes, ran_now = helpers.run_traced(graph.session, [graph.losses, graph.norms], graph.feed(batch))
        ran.append(ran_now)
    assert helpers.not_fused(nodes) == [f"group{stage}/block0/conv3/Relu" for stage in (1, 2, 3)]
    # Eigen's gradients of convolutions, in place of oneDNN's, take up to ten times as long.
    assert not [name for name, node in nodes.items() if node.op.startswith("Conv2DBackprop")]
    assert len(ran[0]) == len(ran[1])


NORMALISING = {"Mul", "Sub", "RealDiv", "Rsqrt", "SquaredDifference", "FusedBatchNormV3"}


@pytest.mark.parametrize(
    ("norm", "training", "is_folded"),
    [("FreezeBN", True, True), ("SyncBN", True, False), ("GN", True, False), ("SyncBN", False, True)],
)
def test_frozen_batch_norm_leaves_no_op_on_maps(norm, training, is_folded):
    settings = configure(*SMALL, f"BACKBONE.NORM={norm}")
    with tf.Graph().as_default() as graph, TowerContext("", is_training=training):
        inputs = {
            s.name: tfv1.placeholder(s.dtype, s.shape, s.name)
            for s in rcnn.input_signature(settings, training=training)
        }
        (rcnn.build_training if training else rcnn.build_inference)(settings, **inputs)
    ops = [op for op in graph.get_operations() if re.match(r"(conv0|group\d)/", op.name)]
    on_maps = {op.type for op in ops for x in op.outputs if x.shape.rank in (4, 5) and x.shape[0] is None}
    assert {"Conv2D", "Relu"} <= on_maps
    assert bool(on_maps & NORMALISING) is not is_folded
