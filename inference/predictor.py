"""Applies a trained model to images: `from inference import Predictor`.

Shapes: N images of a batch; R detections; H, W height and width of an image; M side of a predicted mask. `network` is
a function of a batch, as `load_network` returns it: see inference/graph.py.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tensorpack.compat import tfv1 as tf
from tensorpack.utils import logger

import data
from common import boxes as np_boxes
from common import checkpoint, weights
from common.rle import paste_masks
from config import Config, padding_multiple, uses_augmentation
from dataset.images import Geometry
from evaluation.metrics import NonFiniteError
from inference.graph import Inference, keep_freed_memory, session_config, warn_of_precision
from inference.tta import augmented
from modeling.box_head import Detections


class ImageDetections(NamedTuple):
    """The detections of one image, best first."""

    boxes_xyxy: np.ndarray  # float32 [R, 4], pixels of the original image, clipped to it
    scores: np.ndarray  # float32 [R], in [0, 1]
    labels: np.ndarray  # int64 [R], 1..C
    masks: np.ndarray | None  # bool [R, H, W] at the image's size; None for a model without masks

    def select(self, keep: np.ndarray) -> "ImageDetections":
        """The detections that `keep` selects: bool [R], or int [K] indices."""
        masks = None if self.masks is None else self.masks[keep]
        return ImageDetections(self.boxes_xyxy[keep], self.scores[keep], self.labels[keep], masks)


class Predictor:
    """A trained model as a function of images, for use in other programs.

        predictor = Predictor("train_log/run")
        for image, found in zip(images, predictor(images)):
            for box, score, label in zip(found.boxes_xyxy, found.scores, found.labels):
                print(predictor.class_names[label - 1], score, box)

    Several threads may call one Predictor at the same time: a call is one run of the graph, and shares nothing else.
    Each Predictor has settings of its own, so models of different settings can share a process. The process keeps the
    memory that it frees: see `keep_freed_memory`.

    Attributes:
        settings: config.Config.
        class_names: tuple of C str.
        category_ids: tuple of C int, those of the training data, or 1..C if they are unknown.
        geometry: the size to which images are resized and padded for the network.
        network: see the module's docstring.
    """

    settings: Config
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    geometry: Geometry
    network: Callable

    def __init__(self, checkpoint_path: str | Path, *, settings: Config | Iterable[str] = ()):
        """
        Args:
            checkpoint_path: a run's folder, a TensorFlow checkpoint or a .npz.
            settings: texts "KEY=VALUE", as after --config, which change the settings beside the checkpoint; or a Config
                that holds all settings, class names included.

        Raises:
            CheckpointError: the checkpoint is missing, unreadable or of another model.
            ConfigError: a setting is unknown or contradicts the checkpoint. UserError: the class names are unknown.
        """
        path = checkpoint.resolve(checkpoint_path)
        if not isinstance(settings, Config):
            settings = checkpoint.settings_of(path, overrides=settings)
        self.settings = settings
        self.class_names = tuple(settings.DATA.CLASS_NAMES[1:])
        self.category_ids = settings.DATA.CATEGORY_IDS or tuple(range(1, len(self.class_names) + 1))
        self.geometry = data.inference_geometry(settings)
        self.network = load_network(settings, path)

    def __call__(self, images: Sequence[np.ndarray]) -> list[ImageDetections]:
        """The detections of each image, in order: see `predict_images`.

        Args:
            images: uint8 [H, W, 3] BGR each, as cv2.imread returns them, of any sizes; together they form one batch.
        Raises:
            ValueError: an image of another dtype or shape. NonFiniteError: the network returned NaN or infinity.
        """
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f"images must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
        return predict_images(self.network, images, geometry=self.geometry)


def load_network(settings: Config, checkpoint_path: Path) -> Callable:
    """The network of the settings with a checkpoint's weights, with test-time augmentation if that is configured.

    The session lives as long as the returned function. The process keeps the memory that it frees after this call.

    Args:
        checkpoint_path: as returned by `checkpoint.resolve`.
    Raises:
        CheckpointError: the checkpoint is unreadable or of another model. ConfigError: a setting names nothing that is
            registered.
    """
    keep_freed_memory()
    warn_of_precision(settings.TEST.PRECISION)
    with tf.Graph().as_default():
        inference = Inference(settings)
        session = tf.Session(config=session_config())
        _, lines = weights.load(checkpoint_path, session, check=weights.check_complete)
    logger.info("\n".join(lines))
    return with_augmentation(settings, inference.bind(session))


def with_augmentation(settings: Config, network: Callable) -> Callable:
    """Returns `network`, wrapped in test-time augmentation if the settings configure it."""
    if not uses_augmentation(settings):
        return network
    return augmented(
        network,
        scales=settings.TEST.TTA_SCALES,
        flip=settings.TEST.TTA_FLIP,
        multiple=padding_multiple(settings),
        iou_threshold=settings.TEST.FRCNN_NMS_THRESH,
        max_per_image=settings.TEST.RESULTS_PER_IM,
        antialias=settings.PREPROC.ANTIALIAS,
    )


def predict_images(network: Callable, images: Sequence[np.ndarray], *, geometry: Geometry) -> list[ImageDetections]:
    """The detections of each image, in order.

    Boxes are scaled back by one factor for x and one for y: they differ, because the resized edges are whole pixels.

    Args:
        images: uint8 [H, W, 3] BGR of any sizes. They go through the network as one batch of this `geometry`.
    Raises:
        NonFiniteError: the network returned NaN or infinity.
    """
    if not images:
        return []
    batch, image_shape = geometry.batch(images)
    found = network(batch, image_shape)
    detections = []
    for index, image in enumerate(images):
        height, width = image.shape[:2]
        name = f"image {index + 1} of {len(images)}"
        one, masks = of_image(found, index, image_shape=image_shape[index], height=height, width=width, name=name)
        if masks is not None:
            one = one._replace(masks=paste_masks(masks, one.boxes_xyxy, height, width))
        detections.append(one)
    return detections


def of_image(
    found: Detections, index: int, *, image_shape: Sequence[int], height: int, width: int, name: str
) -> tuple[ImageDetections, np.ndarray | None]:
    """The detections of one image of a batch.

    Args:
        found: Detections of NumPy arrays, of the whole batch. index: of the image in the batch.
        image_shape: (height, width) of the image in the batch. height, width: of the original image.
        name: of the image, for messages.
    Returns:
        ImageDetections without masks, boxes in original pixels; and the masks within the boxes, float32 [R, M, M], or
        None for a model without masks
    Raises:
        NonFiniteError: a box or score is not finite.
    """
    rows = np.flatnonzero(np.asarray(found.image_index) == index)
    rows = rows[np.argsort(-found.scores[rows], kind="stable")]
    boxes_xyxy, scores = found.boxes[rows], found.scores[rows]
    check_finite(name, boxes_xyxy, scores)
    scaled_xyxy = np_boxes.scale(boxes_xyxy, width / image_shape[1], height / image_shape[0])
    detections = ImageDetections(np_boxes.clip(scaled_xyxy, height, width), scores, found.labels[rows], None)
    return detections, None if found.masks is None else found.masks[rows]


def check_finite(name: str, *arrays: np.ndarray) -> None:
    """Raises NonFiniteError if an array that the network returned holds NaN or infinity. `name`: of the image."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise NonFiniteError(
            f"{name}: the network's numbers are not finite: its weights have diverged, or overflow (in float16)"
        )
