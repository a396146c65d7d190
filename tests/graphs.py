"""Whole graphs of the model with synthetic weights (golden/synthetic.py), shared by tests of the same settings."""

import contextlib
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from golden.synthetic import synthetic_image, synthetic_weights
from tensorpack.compat import tfv1
from tensorpack.tfutils.tower import TowerContext

from common import weights
from config import Config
from inference.graph import Inference, session_config
from modeling import device, rcnn
from training import optimizers
from training.exactness import complete_gradients
from training.model import TrainingModel

RECIPES = json.loads((Path(__file__).parent / "golden" / "recipes.json").read_text())
SMALL = (
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
)


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


def pack(masks):
    """Masks [..., W] of 0 and 1 as bits, in whole words of 32 pixels: uint8 [..., 4 * ceil(W / 32)]."""
    fill = [(0, 0)] * (masks.ndim - 1) + [(0, -masks.shape[-1] % 32)]
    return np.packbits(np.pad(masks, fill), axis=-1)


def make_batch(examples, *, seeds, multiple, with_masks=True, num_gt=None):
    """A batch of examples (image, boxes, labels, masks): dict by name, as in rcnn.input_signature."""
    image, image_shape = pad([example[0] for example in examples], multiple)
    count = num_gt or max(len(example[1]) for example in examples)
    batch = {
        "image": image,
        "image_shape": image_shape,
        "gt_boxes": np.zeros((len(examples), count, 4), np.float32),
        "gt_labels": np.zeros((len(examples), count), np.int64),
        "image_id": np.arange(len(examples)),
        "sample_key": np.array([[0, seed] for seed in seeds], np.int32),
    }
    masks = np.zeros((len(examples), count, *image.shape[1:3]), np.uint8)
    for i, (_, boxes, labels, gt_masks) in enumerate(examples):
        batch["gt_boxes"][i, : len(boxes)] = boxes
        batch["gt_labels"][i, : len(labels)] = labels
        masks[i, : len(boxes), : gt_masks.shape[1], : gt_masks.shape[2]] = gt_masks
    if with_masks:
        batch["gt_masks"] = pack(masks)
    return batch


def training_batch(specs, **options):
    """`make_batch` of synthetic images; specs: (height, width, number of objects, seed)."""
    return make_batch([synthetic_image(*spec) for spec in specs], seeds=[spec[3] for spec in specs], **options)


def _assign(session, variables, values):
    """Gives variables, by name, the arrays of `values`. Feeds their initial values, so the graph stays as it is."""
    initial = {variables[name].initializer.inputs[1]: value for name, value in values.items()}
    session.run([variables[name].initializer for name in values], initial)


def load_synthetic(session):
    """Gives every model variable of the default graph its synthetic value."""
    variables = weights.model_variables()
    values = synthetic_weights({name: tuple(variable.shape) for name, variable in variables.items()})
    _assign(session, variables, values)


class Graph:
    """A graph with synthetic weights, and its proposals. No graph needs to be the default one when it runs."""

    def __init__(self, build):
        """build: makes the graph; returns the dict of its inputs by name."""
        propose, made = rcnn._propose, []

        def spy(*args, **kwargs):
            made.append(propose(*args, **kwargs))
            return made[-1]

        self.graph = tfv1.get_default_graph()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rcnn, "_propose", spy)
            self.inputs = build()
        self.proposals = made[-1]  # a GPU's graph is built twice
        self.session = tfv1.Session(config=session_config())
        self.session.run(tfv1.global_variables_initializer())
        load_synthetic(self.session)
        self.variables = weights.model_variables()

    def feed(self, batch):
        return {self.inputs[name]: value for name, value in batch.items()}

    def run(self, fetches, batch, feed=None):
        with complete_gradients():
            return self.session.run(fetches, self.feed(batch) | (feed or {}))

    @contextlib.contextmanager
    def weights(self, values):
        """Other values of some variables, by name, while the block runs."""
        before = self.session.run({name: self.variables[name] for name in values})
        self._set(values)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, values):
        _assign(self.session, self.variables, values)


class TrainingGraph(Graph):
    """The training graph: losses by name; the gradients of their sum and their norms, by the variable's name."""

    def __init__(self, settings):
        super().__init__(lambda: self._build(settings))

    def _build(self, settings):
        specs = rcnn.input_signature(settings, training=True)
        inputs = {s.name: tfv1.placeholder(s.dtype, s.shape, s.name) for s in specs}
        with TowerContext("", is_training=True):
            self.cost = TrainingModel(settings, learning_rate=0.01).build_graph(*inputs.values())
        losses = tfv1.get_collection(tfv1.GraphKeys.LOSSES)
        self.losses = {loss.op.name: loss for loss in losses} | {"total_cost": self.cost}
        self.trainable = {variable.op.name: variable for variable in tfv1.trainable_variables()}
        optimizer = optimizers.Decayed(tfv1.train.GradientDescentOptimizer(0.1), settings.TRAIN.WEIGHT_DECAY)
        pairs = optimizer.compute_gradients(self.cost, list(self.trainable.values()))
        self.gradients = {variable.op.name: gradient for gradient, variable in pairs}
        self.norms = {name: tf.norm(gradient) for name, gradient in self.gradients.items() if gradient is not None}
        return inputs


class InferenceGraph(Graph):
    """The inference graph."""

    def __init__(self, settings):
        super().__init__(lambda: self._build(settings))
        self.predict = self.inference.bind(self.session)

    def _build(self, settings):
        self.inference = Inference(settings)
        return dict(zip(("image", "image_shape"), self.inference.inputs))

    def _set(self, values):
        super()._set(values)
        self.inference.update(self.session)


def _building_for(gpu):
    return contextlib.nullcontext() if gpu is None else device.building_for(gpu=gpu)


@functools.cache
def small_training_graph(*overrides, gpu=False):
    """The TrainingGraph of SMALL with further settings, in the form for CPUs, for GPUs, or (None) for this machine."""
    with tf.Graph().as_default(), _building_for(gpu):
        return TrainingGraph(configure(*SMALL, *overrides))


@functools.cache
def small_inference_graph(*overrides, gpu=False):
    """The InferenceGraph of SMALL with further settings; `gpu`: as in `small_training_graph`."""
    with tf.Graph().as_default(), _building_for(gpu):
        return InferenceGraph(configure(*SMALL, *overrides))


def free_graphs():
    """To be called after the last test of a file."""
    small_training_graph.cache_clear()
    small_inference_graph.cache_clear()
