"""Shows the inside of a model: the output of each stage for an image, beside the ground truth, and any tensor by name.

Shape shorthand: P proposals; C classes; H, W height and width of an image.
"""

import difflib
import fnmatch
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tensorpack.compat import tfv1 as tf

import data
from common import boxes as np_boxes
from common import viz, weights
from common.errors import ImageError
from config import Config, UserError
from dataset import Dataset, Record
from dataset.images import load_record_image
from inference.graph import Inference, session_config
from inference.predictor import ImageDetections, predict_images
from modeling import rcnn

SCOPE = "inference/"  # of the tensors that `Inspector.names` finds
SHOWN_PROPOSALS = 50


class Stages(NamedTuple):
    """The output of each stage for one image, in pixels of the image, best first."""

    proposals_xyxy: np.ndarray  # float32 [P, 4]
    boxes_xyxy: np.ndarray  # float32 [P, 4], the refined box of the best class of each proposal, before suppression
    labels: np.ndarray  # int64 [P], 1..C, that class
    scores: np.ndarray  # float32 [P], in [0, 1], its probability
    detections: ImageDetections


class Inspector:
    """A model with a checkpoint's weights, which returns the tensors of its graph by name."""

    def __init__(self, settings: Config, checkpoint_path: Path):
        """
        Args:
            checkpoint_path: as `checkpoint.resolve` returns it.
        Raises:
            CheckpointError: the checkpoint is unreadable or of another model. ConfigError: a setting names nothing that
                is registered.
        """
        self._graph = tf.Graph()
        with self._graph.as_default():
            self._inference = Inference(settings)
            self._session = tf.Session(config=session_config())
            weights.load(checkpoint_path, self._session, check=weights.check_complete)
            self._network = self._inference.bind(self._session)
        self._graph.finalize()
        self._geometry = data.inference_geometry(settings)

    def names(self, patterns: Sequence[str]) -> list[str]:
        """The names of the tensors that match, without SCOPE and ":0", in the graph's order.

        Args:
            patterns: names, in which * stands for any text.
        Raises:
            UserError: a pattern matches no tensor.
        """
        operations = (op for op in self._graph.get_operations() if op.name.startswith(SCOPE) and op.outputs)
        known = [op.name.removeprefix(SCOPE) for op in operations]
        for pattern in patterns:
            if not fnmatch.filter(known, pattern):
                near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3)
                raise UserError(f"no tensor is called {pattern}: near are {', '.join(near) or 'none'}; * is any text")
        return [name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]

    def fetch(self, image: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The values of tensors for one image, by name; bfloat16 becomes float32.

        Args:
            image: uint8 [H, W, 3] BGR. names: as the method `names` returns them.
        """
        inputs = dict(zip(self._inference.inputs, self._geometry.batch([image])))
        tensors = {name: self._graph.get_tensor_by_name(f"{SCOPE}{name}:0") for name in names}
        values = self._session.run(tensors, inputs)
        # bfloat16 is no type of NumPy's own: a .npz would lose it.
        return {n: x.astype(np.float32) if x.dtype == tf.bfloat16.as_numpy_dtype else x for n, x in values.items()}

    def stages(self, image: np.ndarray) -> Stages:
        """The output of each stage for one image, uint8 [H, W, 3] BGR.

        Raises:
            NonFiniteError: the network returned NaN or infinity.
        """
        found = self.fetch(image, rcnn.STAGE_TENSORS)
        proposals, logits, probabilities, refined = (found[name][0] for name in rcnn.STAGE_TENSORS)
        labels = probabilities[:, 1:].argmax(axis=1)
        scores = np.take_along_axis(probabilities[:, 1:], labels[:, None], axis=1)[:, 0]
        refined = refined[np.arange(len(labels)), np.minimum(labels, refined.shape[1] - 1)]
        height, width = image.shape[:2]
        _, [[new_height, new_width]] = self._geometry.batch([image])
        to_image = (width / new_width, height / new_height)
        is_real, best = (proposals[:, 2:] > proposals[:, :2]).all(axis=1), np.argsort(-scores, kind="stable")
        best = best[is_real[best]]
        (detections,) = predict_images(self._network, [image], geometry=self._geometry)
        return Stages(
            np_boxes.scale(proposals[is_real], *to_image),
            np_boxes.clip(np_boxes.scale(refined[best], *to_image), height, width),
            labels[best] + 1,
            scores[best],
            detections,
        )


def draw_stages(
    image: np.ndarray,
    stages: Stages,
    class_names: Sequence[str],
    *,
    score_threshold: float,
    record: Record | None = None,
) -> np.ndarray:
    """Four pictures in one, uint8 BGR: proposals, raw predictions, detections and, if `record` is given, the truth.

    Args:
        image: uint8 [H, W, 3] BGR. class_names: of the labels 1..C. score_threshold: in [0, 1], of predictions and
            detections.
    """
    proposals = stages.proposals_xyxy[:SHOWN_PROPOSALS]
    strength = np.linspace(255, 0, len(proposals), dtype=np.uint8)
    colours = cv2.applyColorMap(strength[:, None], cv2.COLORMAP_VIRIDIS)[:, 0].tolist()
    is_raw = stages.scores >= score_threshold
    raw = zip(stages.boxes_xyxy[is_raw], map(viz.class_colour, stages.labels[is_raw]))
    detections = viz.draw_detections(image, stages.detections, class_names, score_threshold=score_threshold)
    truth = viz.draw_items(image, []) if record is None else viz.draw_ground_truth(image, record, class_names)
    upper = viz.side_by_side(
        viz.draw_boxes(image, zip(reversed(proposals), reversed(colours))),
        viz.draw_boxes(image, raw),
        (f"the {len(proposals)} best proposals (yellow: best)", f"{is_raw.sum()} raw predictions, before suppression"),
    )
    truth_title = "ground truth" if record else "ground truth: not known"
    return np.vstack([upper, viz.side_by_side(detections, truth, ("detections", truth_title))])


def describe(name: str, value: np.ndarray) -> str:
    """A line on a tensor: its name, dtype and shape, and the range of its finite values."""
    text = f"{name}: {value.dtype} {list(value.shape)}"
    if value.dtype.kind not in "fiu" or not value.size:
        return text
    value = value.astype(np.float64)
    finite = value[np.isfinite(value)]
    if finite.size:
        text += f", {finite.min():.4g} to {finite.max():.4g}, mean {finite.mean():.4g}"
    return text + (f", {value.size - finite.size} NOT FINITE" if finite.size < value.size else "")


def is_map(value: np.ndarray) -> bool:
    """Whether an array is a feature map of one image: float [1, h, w, C], h and w more than 1."""
    return value.ndim == 4 and value.shape[0] == 1 and min(value.shape[1:3]) > 1 and value.dtype.kind == "f"


def draw_map(image: np.ndarray, value: np.ndarray) -> np.ndarray:
    """A feature map on its image, uint8 [H, W, 3] BGR: the mean magnitude over channels, dark blue to red.

    Args:
        image: uint8 [H, W, 3] BGR. value: float [1, h, w, C], of the image and its padding.
    """
    strength = np.nan_to_num(np.abs(value[0].astype(np.float32)).mean(axis=2))
    strength = cv2.normalize(strength, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    heat = cv2.applyColorMap(
        cv2.resize(strength, image.shape[1::-1], interpolation=cv2.INTER_NEAREST), cv2.COLORMAP_JET
    )
    return cv2.addWeighted(image, 0.4, heat, 0.6, 0)


def compare_with_truth(
    settings: Config, network: Callable, dataset: Dataset, *, count: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, picture uint8 [H, W, 3] RGB) of the first `count` images: detections beside the ground truth.

    Args:
        network: see inference/graph.py.
    Raises:
        NonFiniteError: the network returned NaN or infinity.
    """
    for record in itertools.islice(dataset.records(training=False), count):
        try:
            image = load_record_image(record)
        except ImageError:
            continue  # the evaluation has logged it
        (found,) = predict_images(network, [image], geometry=data.inference_geometry(settings))
        threshold = settings.TEST.RESULT_SCORE_THRESH_VIS
        left = viz.draw_detections(image, found, dataset.class_names, score_threshold=threshold)
        right = viz.draw_ground_truth(image, record, dataset.class_names)
        picture = viz.side_by_side(left, right, ("detections", "ground truth"))
        yield f"{dataset.name}/{record.image_id}", picture[:, :, ::-1]
