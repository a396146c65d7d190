"""Exports a model as SavedModel or frozen graph, for programs that have nothing but TensorFlow.

The complete format does everything inside the graph: resizing, inference, scaling boxes back and pasting masks. It
takes images by one of two signatures:

    serving_default   image uint8 [N, H, W, 3] BGR, padded at the bottom and right; image_shape int32 [N, 2], height and
                      width of the part that is image
    encoded           image_bytes string [N], JPEG, PNG, WebP or BMP files; JPEGs are rotated by their EXIF

and returns K detections for each image, best first. K is the largest number among the images; unused slots hold 0:

    num_detections int32 [N]; boxes float32 [N, K, 4], x1 y1 x2 y2 in pixels of the image; scores float32 [N, K];
    labels int64 [N, K], 1..C; class_names string [N, K]; and for a model with masks
    masks uint8 [N, K, H, W] of 0 and 1 (serving_default), mask_bytes string [N, K], PNG files of 0 and 255 (encoded)

A detection with score NaN means that the network overflowed on that image. If only a mask overflowed, its own
detection has this score; otherwise a detection with this score, label 1 and an empty box follows the image's others.

The tensorpack format is that of tensorpack's own export: one image, resized by the caller, with boxes and masks as the
network returns them.

The names in a frozen graph are those of the inputs above, and `output/boxes` and so on for the outputs.
"""

import contextlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from common import weights
from common.files import Whole, writing
from config import UserError, round_up, uses_augmentation
from dataset.images import MIN_EDGE
from inference import tf_images
from inference.graph import session_config
from inference.predictor import Predictor, check_finite
from modeling import device, parameters, rcnn

tfv1 = tf.compat.v1
SERVE = "serve"  # the tag of a SavedModel's graph for serving
MAX_BOX_DIFFERENCE, MAX_SCORE_DIFFERENCE, MIN_MASK_IOU = 0.05, 1e-4, 0.99  # pixels, score, IoU: tolerances of `compare`


class ExportError(UserError):
    """The exported model returns other detections than the program."""

    exit_code = 1


# ---------------------------------------------------------------- formats


class Compared(NamedTuple):
    """The detections of one image, by the program or by an export, as `compare` takes them."""

    boxes_xyxy: np.ndarray  # float32 [R, 4]
    scores: np.ndarray  # float32 [R]
    labels: np.ndarray  # int64 [R], 1..C
    masks: np.ndarray | None  # bool [R, H, W] in the image (complete) or [R, M, M] within the box (tensorpack)


class CompleteFormat:
    """The complete format: takes images of any size, returns final results. The module's docstring describes it.

    Attributes:
        signature: the name of its main signature.
        keys_are_names: whether a SavedModel names inputs and outputs after their tensors.
    """

    signature = "serving_default"
    keys_are_names = False

    def __init__(self, predictor: Predictor):
        """
        Args:
            predictor: its model is exported.
        """
        self._predictor = predictor

    def build(self) -> dict[str, tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]]:
        """Builds the graph in the default graph; returns {signature: (inputs by name, outputs by name)}."""
        contents = tfv1.placeholder(tf.string, [None], "image_bytes")
        decoded, decoded_shape = tf_images.decode_images(contents)
        # Feeding these skips the decoding.
        image = tfv1.placeholder_with_default(decoded, [None, None, None, 3], "image")
        image_shape = tfv1.placeholder_with_default(decoded_shape, [None, 2], "image_shape")
        found = self._detect(image, image_shape)
        slots = _Slots(found.image_index, tf.shape(image)[0])
        outputs = {
            "num_detections": slots.counts,
            "boxes": slots.scatter(found.boxes),
            "scores": slots.scatter(found.scores),
            "labels": slots.scatter(found.labels),
        }
        outputs["class_names"] = tf.gather(tf.constant(["", *self._predictor.class_names]), outputs["labels"])
        batch, encoded = dict(outputs), dict(outputs)
        if found.masks is not None:
            masks = tf_images.paste_masks(found.masks, found.boxes, tf.shape(image)[1:3])
            batch["masks"] = slots.scatter(masks)
            files = tf_images.encode_masks(masks, tf.gather(image_shape, found.image_index))
            encoded["mask_bytes"] = slots.scatter_text(files)
        return {
            self.signature: ({"image": image, "image_shape": image_shape}, batch),
            "encoded": ({"image_bytes": contents}, encoded),
        }

    def _detect(self, image, image_shape):
        """box_head.Detections with boxes in pixels of the images."""
        short_edge, max_size, multiple, antialias = self._predictor.geometry
        new_shape = tf_images.resized_shape(image_shape, short_edge=short_edge, max_size=max_size, min_edge=MIN_EDGE)
        size = round_up(tf.reduce_max(new_shape, axis=0), multiple)
        resized = tf_images.resize(image, image_shape, new_shape, size, antialias=antialias)
        found = rcnn.build_inference(self._predictor.settings, resized, new_shape)
        factors = tf.cast(image_shape / new_shape, tf.float32)
        limits = tf.cast(image_shape, tf.float32)
        factors, limits = (tf.gather(tf.tile(x[:, ::-1], [1, 2]), found.image_index) for x in (factors, limits))
        return found._replace(boxes=tf.clip_by_value(found.boxes * factors, 0.0, limits))

    def feed(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """The inputs of `signature` for one image, uint8 [H, W, 3] BGR."""
        return {"image": image[None], "image_shape": np.array([image.shape[:2]], np.int32)}

    def read(self, outputs: dict[str, np.ndarray]) -> Compared:
        """The detections in the outputs of `signature` for one image."""
        masks = outputs["masks"][0].astype(bool) if "masks" in outputs else None
        return Compared(outputs["boxes"][0], outputs["scores"][0], outputs["labels"][0], masks)

    def expected(self, image: np.ndarray) -> Compared:
        """The program's own detections in an image, uint8 [H, W, 3] BGR."""
        return Compared(*self._predictor([image])[0])


class TensorpackFormat:
    """The format of tensorpack's own example, with its names and its signature `prediction_pipeline`.

    Input: `image` float32 [H, W, 3] BGR, resized. Outputs, in pixels of the input: output/boxes float32 [R, 4],
    output/scores float32 [R], output/labels int64 [R], 1..C, and output/masks float32 [R, M, M], probabilities within
    the box.
    """

    signature = "prediction_pipeline"
    keys_are_names = True

    def __init__(self, predictor: Predictor):
        """See CompleteFormat."""
        self._predictor = predictor

    def build(self) -> dict[str, tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]]:
        """See CompleteFormat.build."""
        image = tfv1.placeholder(tf.float32, [None, None, 3], "image")
        shape = tf.shape(image)[:2]
        fill = -shape % self._predictor.geometry.multiple
        batch = tf.pad(image, [[0, fill[0]], [0, fill[1]], [0, 0]])[None]
        found = rcnn.build_inference(self._predictor.settings, batch, shape[None])
        return {self.signature: ({"image": image}, _present(found))}

    def feed(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """See CompleteFormat.feed."""
        geometry = self._predictor.geometry
        resized = geometry.resize(image)
        return {"image": resized.astype(np.float32)}

    def read(self, outputs: dict[str, np.ndarray]) -> Compared:
        """See CompleteFormat.read; masks are those within the boxes."""
        masks = outputs["masks"] > 0.5 if "masks" in outputs else None
        return Compared(outputs["boxes"], outputs["scores"], outputs["labels"], masks)

    def expected(self, image: np.ndarray) -> Compared:
        """See CompleteFormat.expected."""
        return self.read(_present(self._predictor.network(*self._predictor.geometry.batch([image]))))


FORMATS = {"complete": CompleteFormat, "tensorpack": TensorpackFormat}


def _present(detections):
    """The fields of one image's box_head.Detections that are not None, without the image index: a dict."""
    fields = detections._asdict()
    return {name: value for name, value in fields.items() if value is not None and name != "image_index"}


class _Slots:
    """Scatters detections, sorted by image and score, to arrays [N, K, ...]: K slots for each of N images."""

    def __init__(self, image_index, num_images):
        self.counts = tf.math.bincount(image_index, minlength=num_images, maxlength=num_images)  # int32 [N]
        first = tf.cumsum(self.counts, exclusive=True)
        place = tf.range(tf.shape(image_index)[0]) - tf.gather(first, image_index)
        self._indices = tf.stack([image_index, place], axis=1)
        self._shape = tf.stack([num_images, tf.reduce_max(self.counts)])

    def scatter(self, values):
        """Scatters [R, ...] to [N, K, ...]; unused slots are 0."""
        return tf.scatter_nd(self._indices, values, tf.concat([self._shape, tf.shape(values)[1:]], axis=0))

    def scatter_text(self, values):
        """Scatters string [R] to [N, K]; unused slots are empty."""
        return tf.tensor_scatter_nd_update(tf.fill(self._shape, ""), self._indices, values)


# ---------------------------------------------------------------- writing


def export(
    predictor: Predictor,
    checkpoint_path: Path,
    image: np.ndarray,
    *,
    format_name: str,
    saved_model: Path | None = None,
    frozen_graph: Path | None = None,
) -> list[str]:
    """Exports a Predictor's model, and compares the detections of the export with the program's on one image.

    An export gets its name only if the detections agree; nothing is overwritten.

    Args:
        predictor: made from the same checkpoint. checkpoint_path: as `checkpoint.resolve` returns it.
        image: uint8 [H, W, 3] BGR. format_name: one of FORMATS.
        saved_model: path of the folder, or None. frozen_graph: path of the file, or None.
    Returns:
        a line with the differences for each export that was written

    Raises:
        ExportError: the results differ by more than the tolerances. FileError: a path exists or cannot be written.
        NonFiniteError: the network overflows on the image. CheckpointMismatch: the checkpoint does not fit the model.
        UserError: test-time augmentation is configured, which is not part of the graph.
    """
    if uses_augmentation(predictor.settings):
        raise UserError("test-time augmentation is not exported: set TEST.TTA_FLIP=False and TEST.TTA_SCALES=[1.0]")
    kind = FORMATS[format_name](predictor)
    expected, lines = kind.expected(image), []
    with contextlib.ExitStack() as stack:
        folder, file = (stack.enter_context(Whole(path)) if path else None for path in (saved_model, frozen_graph))
        names = _write(kind, checkpoint_path, folder, file)
        for written, load in ((folder, _load_saved_model), (file, _load_frozen_graph)):
            if written:
                difference = compare(expected, kind.read(_run(written.part, load, *names, kind.feed(image))))
                lines.append(f"{written.path}: {difference}")
    return lines


def _write(kind, checkpoint_path, folder, file):
    """Writes the SavedModel to `folder` and the frozen graph to `file`; each is a files.Whole, or None.

    Returns:
        two dicts of tensor names by key, of the inputs and of the outputs of the format's main signature
    """
    with tf.Graph().as_default() as graph, tfv1.Session(config=session_config()) as session:
        with device.building_for(gpu=True), parameters.stored() as updates:  # of ops that every device has
            signatures = _with_output_names(kind.build())
        weights.load(checkpoint_path, session, check=weights.check_complete)
        session.run(updates)
        if folder:
            with writing(folder.path):
                _write_saved_model(folder.part, session, signatures, keys_are_names=kind.keys_are_names)
        if file:
            nodes = sorted({value.op.name for _, outputs in signatures.values() for value in outputs.values()})
            frozen = tfv1.graph_util.convert_variables_to_constants(session, graph.as_graph_def(), nodes)
            with writing(file.path):
                file.part.write_bytes(frozen.SerializeToString())
    return tuple({key: value.name for key, value in tensors.items()} for tensors in signatures[kind.signature])


def _with_output_names(signatures):
    """The signatures with their outputs renamed to output/KEY; signatures that share a key share its tensor."""
    named = {}
    for _, outputs in signatures.values():
        for key, value in outputs.items():
            named.setdefault(key, tf.identity(value, f"output/{key}"))
    return {name: (inputs, {key: named[key] for key in outputs}) for name, (inputs, outputs) in signatures.items()}


def _write_saved_model(folder, session, signatures, *, keys_are_names):
    def tensor_infos(tensors):
        keys = {value.name if keys_are_names else key: value for key, value in tensors.items()}
        return {key: tfv1.saved_model.build_tensor_info(value) for key, value in keys.items()}

    definitions = {
        name: tfv1.saved_model.build_signature_def(
            tensor_infos(inputs), tensor_infos(outputs), tfv1.saved_model.signature_constants.PREDICT_METHOD_NAME
        )
        for name, (inputs, outputs) in signatures.items()
    }
    builder = tfv1.saved_model.Builder(str(folder))
    saver = tfv1.train.Saver(_used_variables(session.graph, signatures))
    builder.add_meta_graph_and_variables(session, [SERVE], definitions, clear_devices=True, saver=saver)
    builder.save()


def _used_variables(graph, signatures):
    """The variables that the outputs need: not those that are folded into others."""
    nodes = [value.op.name for _, outputs in signatures.values() for value in outputs.values()]
    used = {node.name for node in tfv1.graph_util.extract_sub_graph(graph.as_graph_def(), nodes).node}
    return [v for v in (*tfv1.global_variables(), *tfv1.get_collection(parameters.STORED)) if v.op.name in used]


# ---------------------------------------------------------------- checking


def _run(path, load, input_names, output_names, feed):
    """The outputs of an exported model, by key. `load`: function (session, path) that imports it into the graph."""
    with tf.Graph().as_default() as graph, tfv1.Session(graph=graph, config=session_config()) as session:
        load(session, path)
        return session.run(output_names, {input_names[key]: value for key, value in feed.items()})


def _load_saved_model(session, folder):
    tfv1.saved_model.load(session, [SERVE], str(folder))


def _load_frozen_graph(session, file):
    del session
    tf.import_graph_def(tfv1.GraphDef.FromString(file.read_bytes()), name="")


def compare(expected: Compared, found: Compared) -> str:
    """Returns a text on how far the detections of the program and of an export differ in one image.

    Raises:
        ExportError: they differ by more than the tolerances, or in number or class. NonFiniteError: the program's
            scores are not finite.
    """
    if sorted(expected.labels) != sorted(found.labels):
        numbers = f"{len(found.labels)} objects, the program {len(expected.labels)}"
        raise ExportError(f"the exported model finds {numbers}, or objects of other classes")
    if not len(expected.labels):
        return "nothing to compare: nothing was found in the image; name another with --check-image"
    check_finite("the image to compare with", expected.scores)
    partners = _partners(expected, found)
    found = Compared(*[None if part is None else part[partners] for part in found])
    boxes = float(np.abs(expected.boxes_xyxy - found.boxes_xyxy).max())
    scores = float(np.abs(expected.scores - found.scores).max())
    overlap = 1.0 if expected.masks is None else min(map(_mask_iou, expected.masks, found.masks))
    text = f"boxes {boxes:.2g} pixels, scores {scores:.2g}, masks IoU {overlap:.5f}"
    if not (boxes <= MAX_BOX_DIFFERENCE and scores <= MAX_SCORE_DIFFERENCE and overlap >= MIN_MASK_IOU):  # NaN: differs
        raise ExportError(f"the exported model differs from the program by {text}, in {len(expected.labels)} objects")
    return f"largest difference in {len(expected.labels)} objects: {text}"


def _partners(expected, found):
    """Pairs the detections: for each expected one the index of the nearest unpaired one of its class, int [R]."""
    free, partners = set(range(len(found.labels))), []
    for label, box in zip(expected.labels, expected.boxes_xyxy):
        distance = {j: np.abs(found.boxes_xyxy[j] - box).max() for j in free if found.labels[j] == label}
        partners.append(min(distance, key=distance.get))
        free.remove(partners[-1])
    return np.array(partners)


def _mask_iou(a, b):
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0
