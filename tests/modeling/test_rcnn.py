"""The whole graph: equality with the reference's golden outputs, batches, images without objects, precision.

The golden files come from the reference itself, on synthetic weights and images (tests/golden/synthetic.py).
"""

import functools
import json
import re
from pathlib import Path

import helpers
import numpy as np
import pytest
import tensorflow as tf
from golden.synthetic import synthetic_image, synthetic_weights
from tensorpack.compat import tfv1
from tensorpack.tfutils.tower import TowerContext

from common import weights
from config import Config
from inference.graph import Inference, session_config
from modeling import box_head, layers, rcnn
from training.model import TrainingModel

GOLDEN = Path(__file__).parents[1] / "golden"
EVERY_RUN = ["R50-FPN-mask", "R50-FPN-Cascade-mask", "R50-C4-mask"]
LONG = sorted({p.name.removesuffix("-infer.npz") for p in GOLDEN.glob("*-infer.npz")} - set(EVERY_RUN))
# Recipes whose hundredth detection stands amid others of the very same score (1/3, one stage being certain): which of
# those make the cut is rounding's choice, so more of ours are admitted; the scores must be the same nevertheless.
CUT_AMID_EQUALS = {"R101-FPN-Cascade-mask": ["TEST.RESULTS_PER_IM=300"]}
# Of two proposals that overlap, logits 1.1711510 (this one, by level and anchor) and 1.1711429, the reference keeps the
# other: in hundreds of layers rounding decides. The nudge of a logit makes its decision ours.
NUDGES = {"R101-FPN-GN-Cascade-mask": (2, 1470, {"image0": -1e-5})}
RECIPES = EVERY_RUN + [pytest.param(recipe, marks=pytest.mark.long) for recipe in LONG]

SMALL = [
    "MODE_FPN=True",
    "BACKBONE.WIDTH=8",
    "BACKBONE.RESNET_NUM_BLOCKS=[1,1,1,1]",
    "FPN.NUM_CHANNEL=16",
    "FPN.FRCNN_FC_HEAD_DIM=32",
    "MRCNN.HEAD_DIM=16",
    "RPN.ANCHOR_SIZES=[16,32,64,128,256]",
    "RPN.TRAIN_PER_LEVEL_NMS_TOPK=60",
    "RPN.TEST_PER_LEVEL_NMS_TOPK=60",
    "RPN.BATCH_PER_IM=64",
    "FRCNN.BATCH_PER_IM=32",
    "TEST.RESULT_SCORE_THRESH=0.01",
]


def configure(*overrides, num_category=80):
    """Settings of texts KEY=VALUE."""
    settings = Config()
    settings.update(overrides)
    settings.DATA.NUM_CATEGORY = num_category
    settings.freeze()
    return settings


def pad(images, multiple):
    """uint8 images -> the batch's image and image_shape."""
    shapes = np.array([image.shape[:2] for image in images], np.int32)
    height, width = (-(-shapes.max(axis=0) // multiple) * multiple).tolist()
    batch = np.zeros((len(images), height, width, 3), np.uint8)
    for slot, image in zip(batch, images):
        slot[: image.shape[0], : image.shape[1]] = image
    return batch, shapes


def training_batch(specs, *, multiple, with_masks=True, num_gt=None):
    """A batch of synthetic images: dict by name, as in rcnn.input_signature."""
    examples = [synthetic_image(*spec) for spec in specs]
    image, image_shape = pad([example[0] for example in examples], multiple)
    count = num_gt or max(len(example[1]) for example in examples)
    batch = {
        "image": image,
        "image_shape": image_shape,
        "gt_boxes": np.zeros((len(specs), count, 4), np.float32),
        "gt_labels": np.zeros((len(specs), count), np.int64),
        "image_id": np.arange(len(specs)),
        "sample_key": np.array([[0, spec[3]] for spec in specs], np.int32),
    }
    masks = np.zeros((len(specs), count, *image.shape[1:3]), np.uint8)
    for i, (_, boxes, labels, gt_masks) in enumerate(examples):
        batch["gt_boxes"][i, : len(boxes)] = boxes
        batch["gt_labels"][i, : len(labels)] = labels
        masks[i, : len(boxes), : gt_masks.shape[1], : gt_masks.shape[2]] = gt_masks
    if with_masks:
        batch["gt_masks"] = np.packbits(masks, axis=-1)
    return batch


def load_synthetic(session):
    """Give every model variable its synthetic value; returns {name: shape}."""
    variables = weights.model_variables()
    values = synthetic_weights({name: variable.shape for name, variable in variables.items()})
    weights.assign(session, {variable: values[name] for name, variable in variables.items()})
    return {name: tuple(variable.shape) for name, variable in variables.items()}


class TrainingGraph:
    """The training graph with synthetic weights: losses and gradient norms by name."""

    def __init__(self, settings):
        self._inputs = {
            s.name: tfv1.placeholder(s.dtype, s.shape, s.name) for s in rcnn.input_signature(settings, training=True)
        }
        with TowerContext("", is_training=True):
            cost = TrainingModel(settings, learning_rate=0.01).build_graph(*self._inputs.values())
        losses = tfv1.get_collection(tfv1.GraphKeys.LOSSES)
        self.losses = {loss.op.name: loss for loss in losses} | {"total_cost": cost}
        self.variables = tfv1.trainable_variables()
        self.gradients = dict(zip((v.op.name for v in self.variables), tf.gradients(cost, self.variables)))
        self._norms = {name: tf.norm(gradient) for name, gradient in self.gradients.items() if gradient is not None}
        self._session = tfv1.Session(config=session_config())
        self._session.run(tfv1.global_variables_initializer())
        self.shapes = load_synthetic(self._session)
        self.trainable = set(self.gradients)

    def run(self, batch, feed=None):
        feed = {self._inputs[name]: value for name, value in batch.items()} | (feed or {})
        return self._session.run((self.losses, self._norms), feed)


class InferenceGraph:
    """The inference graph with synthetic weights."""

    def __init__(self, settings, monkeypatch):
        propose, made = rcnn._propose, []

        def spy(*args, **kwargs):
            made.append(propose(*args, **kwargs))
            return made[-1]

        monkeypatch.setattr(rcnn, "_propose", spy)
        self.inference = inference = Inference(settings)
        self._session = tfv1.Session(config=session_config())
        self.shapes = load_synthetic(self._session)
        self.predict = inference.bind(self._session)
        self._proposals, self._inputs = made[0], inference.inputs

    def proposals(self, image, image_shape):
        return self._session.run(self._proposals, dict(zip(self._inputs, (image, image_shape))))


@functools.cache
def small_training_graph(*overrides):
    """The TrainingGraph of SMALL with further settings: tests of the same settings share it."""
    with tf.Graph().as_default():
        return TrainingGraph(configure(*SMALL, *overrides))


@functools.cache
def small_inference_graph(*overrides):
    """The InferenceGraph of SMALL with further settings: tests of the same settings share it."""
    with tf.Graph().as_default(), pytest.MonkeyPatch.context() as patch:
        return InferenceGraph(configure(*SMALL, *overrides), patch)


@pytest.fixture(scope="module", autouse=True)
def shared_graphs():
    """Frees the shared graphs after the last test of this file."""
    yield
    small_training_graph.cache_clear()
    small_inference_graph.cache_clear()


def share_matched(found, expected, *, tolerance):
    """Share of the expected (boxes, scores, labels) that have a found one of the same label, box and score."""
    hits = 0
    for box, score, label in zip(*expected):
        close = (np.abs(found[0] - box).max(axis=1) < 0.05) & (np.abs(found[1] - score) < tolerance)
        hits += (close & (found[2] == label)).any()
    return hits / len(expected[0])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_inference_equals_the_reference(recipe, monkeypatch):
    golden = np.load(GOLDEN / f"{recipe}-infer.npz", allow_pickle=False)
    settings = configure(*golden["overrides"].tolist(), *CUT_AMID_EQUALS.get(recipe, []))
    with tf.Graph().as_default():
        graph = InferenceGraph(settings, monkeypatch)
        for k in ("image0", "image1"):
            image = synthetic_image(*golden[k])[0]
            inputs = pad([image], 32 if settings.MODE_FPN else 1)
            proposals = graph.proposals(*inputs)
            no_labels = np.zeros(len(proposals.boxes[0]))
            expected = golden[f"{k}/proposal_boxes"], golden[f"{k}/proposal_logits"], np.zeros(100)
            found = proposals.boxes[0], proposals.logits[0], no_labels
            assert share_matched(found, expected, tolerance=1e-3) >= 0.99
            boxes, scores, labels = (golden[f"{k}/{name}"] for name in ("boxes", "scores", "labels"))
            kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
            detections = graph.predict(*inputs)
            found = detections.boxes, detections.scores, detections.labels
            assert share_matched(found, (boxes[kept], scores[kept], labels[kept]), tolerance=1e-3) >= 0.98
            np.testing.assert_allclose(detections.scores[: len(scores)], scores, atol=1e-3)
            if settings.MODE_MASK:
                check_masks(detections, boxes, labels, golden[f"{k}/masks_top10"])


def check_masks(detections, boxes, labels, masks):
    compared = 0
    for box, label, mask in zip(boxes, labels, masks.astype(np.float32)):
        same = (np.abs(detections.boxes - box).max(axis=1) < 0.05) & (detections.labels == label)
        for i in np.flatnonzero(same)[:1]:
            np.testing.assert_allclose(detections.masks[i], mask, atol=2e-3)
            compared += 1
    assert compared >= 9


def nudge_logit(monkeypatch, level, anchor):
    """Let proposals be made as though one anchor's logit were higher by the scalar that is returned, 0 unless fed."""
    propose, amount = rcnn._propose, tfv1.placeholder_with_default(0.0, [])

    def nudged(settings, logits, *args, **kwargs):
        nudge = amount * tf.one_hot(anchor, tf.shape(logits[level])[1])
        return propose(settings, [x + nudge if i == level else x for i, x in enumerate(logits)], *args, **kwargs)

    monkeypatch.setattr(rcnn, "_propose", nudged)
    return amount


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_equals_the_reference(recipe, monkeypatch):
    golden = np.load(GOLDEN / f"{recipe}-train.npz", allow_pickle=False)
    settings = configure(*golden["overrides"].tolist())
    level, anchor, nudges = NUDGES.get(recipe, (0, 0, {}))
    with tf.Graph().as_default():
        nudge = nudge_logit(monkeypatch, level, anchor)
        graph = TrainingGraph(settings)
        for k in ("image0", "image1"):
            spec = golden[k].tolist()
            batch = training_batch([spec], multiple=32 if settings.MODE_FPN else 1, with_masks=settings.MODE_MASK)
            losses, norms = graph.run(batch, {nudge: nudges.get(k, 0.0)})
            expected = dict(zip(golden[f"{k}/loss_names"].tolist(), golden[f"{k}/loss_values"]))
            assert losses.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_allclose(losses[name], value, rtol=1e-4, err_msg=name)
            expected = dict(zip(golden[f"{k}/grad_names"].tolist(), golden[f"{k}/grad_norms"]))
            assert graph.trainable == expected.keys()
            for name, value in expected.items():
                np.testing.assert_allclose(norms.get(name, 0.0), value, rtol=1e-2, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("recipe", [path.stem for path in sorted((GOLDEN / "variables").glob("*.json"))])
def test_variables_are_the_published_ones(recipe):
    expected = json.loads((GOLDEN / "variables" / f"{recipe}.json").read_text())
    recipes = json.loads((GOLDEN / "recipes.json").read_text())
    settings = configure(*recipes[recipe])
    with tf.Graph().as_default():
        inputs = {
            s.name: tfv1.placeholder(s.dtype, s.shape, s.name) for s in rcnn.input_signature(settings, training=True)
        }
        with TowerContext("", is_training=True):
            rcnn.build_training(settings, **inputs)
        trainable = {v.op.name for v in tfv1.trainable_variables()}
        found = {
            v.op.name: {"shape": v.shape.as_list(), "trainable": v.op.name in trainable}
            for v in tfv1.global_variables()
        }
    assert found == expected


@pytest.mark.parametrize("overrides", [["FPN.CASCADE=True"], ["MODE_FPN=False"], ["BACKBONE.NORM=GN", "FPN.NORM=GN"]])
def test_a_batch_loses_the_mean_of_its_images(overrides):
    """Random samples included: the picks belong to the image, not to the batch that it is in."""
    specs = [[96, 128, 3, 1], [96, 128, 5, 2]]
    graph = small_training_graph(*overrides)
    together, _ = graph.run(training_batch(specs, multiple=32))
    alone = [graph.run(training_batch([spec], multiple=32))[0] for spec in specs]
    for name, value in together.items():
        np.testing.assert_allclose(value, np.mean([losses[name] for losses in alone]), rtol=1e-5, err_msg=name)


def test_padded_ground_truth_changes_nothing():
    graph = small_training_graph()
    few, _ = graph.run(training_batch([[96, 128, 3, 1]], multiple=32))
    more, _ = graph.run(training_batch([[96, 128, 3, 1]], multiple=32, num_gt=9))
    for name, value in few.items():
        np.testing.assert_allclose(more[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("overrides", [[], ["FPN.CASCADE=True"], ["MODE_FPN=False"], ["CONVENTIONS=detectron2"]])
def test_images_without_objects_train(overrides):
    batch = training_batch([[96, 128, 3, 1], [96, 128, 5, 2]], multiple=32)
    batch["gt_labels"][:] = 0
    batch["gt_boxes"][:] = 0
    losses, norms = small_training_graph(*overrides).run(batch)
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
    "overrides",
    [[], ["FPN.CASCADE=True"], ["MODE_FPN=False"], ["CONVENTIONS=torchvision"], ["CONVENTIONS=detectron2"]],
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
def test_nothing_detected(overrides, mask_side, monkeypatch):
    """oneDNN makes wrong shapes of convolutions of an empty batch."""
    settings = configure(*SMALL, "TEST.RESULT_SCORE_THRESH=0.9999", *overrides)
    with tf.Graph().as_default():
        found = InferenceGraph(settings, monkeypatch).predict(*pad([synthetic_image(96, 128, 4, 0)[0]], 32))
    assert found.boxes.shape == (0, 4)
    assert found.masks.shape == (0, mask_side, mask_side)


def test_padding_of_the_batch_has_no_anchors():
    """A small image beside a large one: its proposals stay within it."""
    images = [synthetic_image(64, 64, 2, 1)[0], synthetic_image(160, 192, 4, 2)[0]]
    proposals = small_inference_graph().proposals(*pad(images, 32))
    small = proposals.boxes[0][proposals.is_valid[0]]
    assert len(small) > 10
    assert small.max() <= 64
    assert proposals.boxes[1].max() > 64


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


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["R50-FPN-mask", pytest.param("R101-FPN-GN-Cascade-mask", marks=pytest.mark.long)])
def test_bfloat16_features_are_close_to_float32(recipe, monkeypatch):
    """c2 to c5 and p2 to p6 on the images of the golden files: relative L2 distance of at most 3e-2."""
    golden = np.load(GOLDEN / f"{recipe}-infer.npz", allow_pickle=False)
    images = [pad([synthetic_image(*golden[k])[0]], 32) for k in ("image0", "image1")]
    pyramid, backbone_features, features = rcnn.fpn, [], []
    monkeypatch.setattr(rcnn, "fpn", lambda maps, **kwargs: backbone_features.append(maps) or pyramid(maps, **kwargs))
    for precision in ("float32", "bfloat16"):
        settings = configure(*golden["overrides"].tolist(), f"TEST.PRECISION={precision}")
        with tf.Graph().as_default(), tfv1.Session(config=session_config()) as session:
            inputs = [tfv1.placeholder(tf.uint8, [None, None, None, 3]), tfv1.placeholder(tf.int32, [None, 2])]
            with TowerContext("", is_training=False), layers.collect_variables(weights.MODEL_VARIABLES):
                pyramid_features, _ = rcnn._features(settings, *inputs, training=False)
            session.run(tfv1.global_variables_initializer())
            load_synthetic(session)
            maps = [*backbone_features[-1], *pyramid_features]
            assert {x.dtype.name for x in maps} == {precision}
            maps = [tf.cast(x, tf.float32) for x in maps]
            features.append([x for image in images for x in session.run(maps, dict(zip(inputs, image)))])
    assert len(features[0]) == 18
    for exact, rounded in zip(*features):
        assert 0 < np.linalg.norm(rounded - exact) <= 3e-2 * np.linalg.norm(exact)


def test_bfloat16_trains_with_close_losses():
    batch = training_batch([[96, 128, 3, 1]], multiple=32)
    losses = []
    for overrides in ([], ["TRAIN.PRECISION=bfloat16"]):
        graph = small_training_graph(*overrides)
        assert {v.dtype.base_dtype for v in graph.variables} == {tf.float32}
        losses.append(graph.run(batch)[0])
    for name, value in losses[0].items():
        np.testing.assert_allclose(losses[1][name], value, rtol=0.1, atol=0.01, err_msg=name)
    assert losses[0]["total_cost"] != losses[1]["total_cost"]


@pytest.mark.parametrize("conventions", [[], ["CONVENTIONS=detectron2"]])  # one box op, or a loop of them
def test_every_trainable_variable_has_a_gradient_and_boxes_have_none(conventions):
    gradients = small_training_graph("FPN.CASCADE=True", *conventions).gradients
    assert all(gradient is not None for gradient in gradients.values())
    names = [gradient.op.name for gradient in gradients.values()]
    (graph,) = {gradient.graph for gradient in gradients.values()}
    run = tfv1.graph_util.extract_sub_graph(graph.as_graph_def(), names)
    kinds = {node.op for node in run.node}
    of_loops = {node.op for function in run.library.function for node in function.node_def}
    assert "CropAndResizeGradImage" in kinds | of_loops
    assert "CropAndResizeGradBoxes" not in kinds


TWO_BLOCKS = ["BACKBONE.RESNET_NUM_BLOCKS=[2,2,2,2]"]  # the second one of a stage has no convolution as shortcut


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_inference_is_fused_and_runs_as_many_ops_for_more_images(precision, monkeypatch):
    settings = configure(*SMALL, *TWO_BLOCKS, f"TEST.PRECISION={precision}")
    ran = []
    monkeypatch.setitem(globals(), "session_config", lambda: tfv1.ConfigProto(inter_op_parallelism_threads=1))
    with tf.Graph().as_default():
        graph = InferenceGraph(settings, monkeypatch)
    for count in (1, 3):
        inputs = pad([synthetic_image(96, 128, 4, seed)[0] for seed in range(count)], 32)
        feed = dict(zip(graph.inference.inputs, inputs))
        nodes, ran_now = helpers.run_traced(graph._session, list(graph.inference.detections), feed)
        ran.append(ran_now)
    # Where a stage begins, two convolutions meet in the addition: TensorFlow fuses one with it, but not the ReLU.
    assert helpers.not_fused(nodes) == [f"inference/group{stage}/block0/Relu" for stage in (1, 2, 3)]
    assert len([node for node in nodes.values() if "Fused" in node.op]) > 40
    assert ran[0] == ran[1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_is_fused_forward_and_runs_as_many_ops_for_more_images(precision):
    settings = configure(*SMALL, *TWO_BLOCKS, f"TRAIN.PRECISION={precision}")
    ran = []
    with tf.Graph().as_default():
        graph = TrainingGraph(settings)
    for count in (1, 3):
        batch = training_batch([[96, 128, 3, seed] for seed in range(count)], multiple=32)
        feed = {graph._inputs[name]: x for name, x in batch.items()}
        nodes, ran_now = helpers.run_traced(graph._session, [graph.losses, graph._norms], feed)
        ran.append(ran_now)
    assert helpers.not_fused(nodes) == [f"group{stage}/block0/Relu" for stage in (1, 2, 3)]
    # Eigen's gradients of convolutions, in place of oneDNN's, take up to ten times as long.
    assert not [name for name, node in nodes.items() if node.op.startswith("Conv2DBackprop")]
    assert ran[0] == ran[1]


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


def test_an_image_with_numbers_that_are_not_finite_gets_a_score_of_nan():
    found = (np.ones((3, 4)), np.array([0.9, 0.8, 0.7]), np.array([5, 6, 7]), np.array([0, 0, 2], np.int32))
    maps, logits = np.zeros((4, 2, 3)), np.zeros((4, 5))
    maps[1, 1, 2], logits[3, 0] = np.inf, np.nan
    boxes, scores, labels, image_index = helpers.evaluate(
        lambda *x: rcnn._mark_non_finite(box_head.Detections(*x[2:]), x[:2])[:4], maps, logits, *found
    )
    np.testing.assert_array_equal(image_index, [0, 0, 1, 2, 3])  # by image, best first
    np.testing.assert_array_equal(scores, np.float32([0.9, 0.8, np.nan, 0.7, np.nan]))
    np.testing.assert_array_equal(labels, [5, 6, 1, 7, 1])
    np.testing.assert_array_equal(boxes[[0, 2]], [[1, 1, 1, 1], [0, 0, 0, 0]])


def test_no_gradient_is_sparse():
    """With a sparse one, optimizers leave alone the momentum of what a step doesn't use; the others come to no harm."""
    gradients = small_training_graph().gradients
    assert [name for name, gradient in gradients.items() if isinstance(gradient, tf.IndexedSlices)] == []


def test_float16_trains_with_close_losses():
    """Tiny: the CPU's gradients of float16 convolutions take hundreds of times as long."""
    losses = []
    tiny = [*SMALL, "FPN.NUM_CHANNEL=4", "MRCNN.HEAD_DIM=4", "FRCNN.BATCH_PER_IM=8", "RPN.TRAIN_PER_LEVEL_NMS_TOPK=8"]
    for precision in ("float32", "float16"):
        settings = configure(*tiny, f"TRAIN.PRECISION={precision}")
        with tf.Graph().as_default():
            losses.append(TrainingGraph(settings).run(training_batch([[64, 64, 2, 1]], multiple=32))[0])
    for name, value in losses[0].items():
        np.testing.assert_allclose(losses[1][name], value, rtol=0.1, atol=0.01, err_msg=name)
    assert losses[0]["total_cost"] != losses[1]["total_cost"]
