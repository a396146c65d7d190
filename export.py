"""The model as a TensorFlow SavedModel or frozen graph, for programs that have nothing but TensorFlow.

The complete format does everything inside the graph: resizing, inference, scaling boxes back and pasting masks. It
takes images in one of two ways (signatures):

    serving_default   image uint8 [N, H, W, 3] BGR, padded at the bottom and right; image_shape int32 [N, 2], height and
                      width of the part that is image
    encoded           image_bytes string [N], JPEG, PNG, WebP or BMP files; JPEGs are turned upright as their EXIF says

and returns for each image its K detections, best first, K that of the image with the most; others are filled up with 0:

    num_detections int32 [N]; boxes float32 [N, K, 4], x1 y1 x2 y2 in pixels of the image; scores float32 [N, K];
    labels int64 [N, K], 1..C; class_names string [N, K]; and for a model with masks
    masks uint8 [N, K, H, W] of 0 and 1 (serving_default), mask_bytes string [N, K], PNG files of 0 and 255 (encoded)

A score of NaN tells that numbers in the network overflowed: that of a detection whose mask did, or else of one with
label 1 and an empty box after an image's others.

The tensorpack format is that of tensorpack's own export: one image, resized by the caller, and boxes and masks as the
network returns them.

Names in a frozen graph: inputs as above, outputs `output/boxes` and so on.
"""

import contextlib
import os
import shutil

import numpy as np
import tensorflow as tf

import checkpoint
import data
import image_ops
import sessions
from config import UserError, config, uses_augmentation
from eval import ImageDetections, check_finite
from modeling import rcnn

tfv1 = tf.compat.v1
SERVE = "serve"  # the tag of a SavedModel that is made for serving
MAX_BOX_DIFFERENCE, MAX_SCORE_DIFFERENCE, MIN_MASK_IOU = 0.05, 1e-4, 0.99  # pixels, score, IoU


class ExportError(UserError):
    """The exported model does not return what the program itself returns."""

    exit_code = 1


# ---------------------------------------------------------------- formats


class CompleteFormat:
    """Images of any size in, final results out: see top."""

    signature = "serving_default"
    keys_are_names = False  # whether a SavedModel calls inputs and outputs by their tensors' names

    def __init__(self, geometry, class_names):
        """
        Args:
            geometry: data.Geometry. class_names: of the labels 1..C.
        """
        self._geometry, self._class_names = geometry, class_names

    def build(self):
        """Makes the graph. Returns {signature: (inputs, outputs)}, both dicts from name to tensor."""
        contents = tfv1.placeholder(tf.string, [None], "image_bytes")
        decoded, decoded_shape = image_ops.decode_images(contents)
        # Whoever feeds these skips the decoding.
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
        outputs["class_names"] = tf.gather(tf.constant(["", *self._class_names]), outputs["labels"])
        batch, encoded = dict(outputs), dict(outputs)
        if found.masks is not None:
            masks = image_ops.paste_masks(found.masks, found.boxes, tf.shape(image)[1:3])
            batch["masks"] = slots.scatter(masks)
            files = image_ops.encode_masks(masks, tf.gather(image_shape, found.image_index))
            encoded["mask_bytes"] = slots.scatter_text(files)
        return {
            self.signature: ({"image": image, "image_shape": image_shape}, batch),
            "encoded": ({"image_bytes": contents}, encoded),
        }

    def _detect(self, image, image_shape):
        """box_head.Detections with boxes in pixels of the images."""
        short_edge, max_size, multiple = self._geometry
        new_shape = image_ops.resized_shape(
            image_shape, short_edge=short_edge, max_size=max_size, min_edge=data.MIN_EDGE
        )
        size = -(-tf.reduce_max(new_shape, axis=0) // multiple) * multiple
        found = rcnn.build_inference(image_ops.resize(image, image_shape, new_shape, size), new_shape)
        factors = tf.cast(image_shape / new_shape, tf.float32)
        limits = tf.cast(image_shape, tf.float32)
        factors, limits = (tf.gather(tf.tile(x[:, ::-1], [1, 2]), found.image_index) for x in (factors, limits))
        return found._replace(boxes=tf.clip_by_value(found.boxes * factors, 0.0, limits))

    def feed(self, image):
        """One image, uint8 [H, W, 3] BGR, as the inputs of `signature`."""
        return {"image": image[None], "image_shape": np.array([image.shape[:2]], np.int32)}

    def read(self, outputs):
        """The outputs of `signature` for one image as ImageDetections."""
        masks = outputs["masks"][0].astype(bool) if "masks" in outputs else None
        return ImageDetections(outputs["boxes"][0], outputs["scores"][0], outputs["labels"][0], masks)

    def expected(self, predictor, image):
        """What the program itself finds, as ImageDetections."""
        return predictor([image])[0]


class TensorpackFormat:
    """The graph that tensorpack's own example exports, with its names and its signature `prediction_pipeline`.

    Input: `image` float32 [H, W, 3] BGR, resized. Outputs, in pixels of the input: output/boxes [R, 4],
    output/scores [R], output/labels [R], and output/masks [R, M, M], probabilities within the box.
    """

    signature = "prediction_pipeline"
    keys_are_names = True

    def __init__(self, geometry, class_names):
        """Arguments as for CompleteFormat."""
        del class_names
        self._geometry = geometry

    def build(self):
        """See CompleteFormat.build."""
        image = tfv1.placeholder(tf.float32, [None, None, 3], "image")
        shape = tf.shape(image)[:2]
        fill = -shape % self._geometry.multiple
        batch = tf.pad(image, [[0, fill[0]], [0, fill[1]], [0, 0]])[None]
        found = rcnn.build_inference(batch, shape[None])
        return {self.signature: ({"image": image}, _present(found))}

    def feed(self, image):
        """See CompleteFormat.feed."""
        return {"image": self._resized(image).astype(np.float32)}

    def _resized(self, image):
        return data.resize_image(image, short_edge=self._geometry.short_edge, max_size=self._geometry.max_size)

    def read(self, outputs):
        """See CompleteFormat.read; masks are those within the boxes."""
        masks = outputs["masks"] > 0.5 if "masks" in outputs else None
        return ImageDetections(outputs["boxes"], outputs["scores"], outputs["labels"], masks)

    def expected(self, predictor, image):
        """See CompleteFormat.expected."""
        return self.read(_present(predictor.network(*self._geometry.batch([image]))))


FORMATS = {"complete": CompleteFormat, "tensorpack": TensorpackFormat}


def _present(detections):
    """The fields of box_head.Detections that there are for one image: dict."""
    fields = detections._asdict()
    return {name: value for name, value in fields.items() if value is not None and name != "image_index"}


class _Slots:
    """Where the detections of N images, by image, best first, go in arrays [N, K, ...]."""

    def __init__(self, image_index, num_images):
        self.counts = tf.math.bincount(image_index, minlength=num_images, maxlength=num_images)  # int32 [N]
        first = tf.cumsum(self.counts, exclusive=True)
        place = tf.range(tf.shape(image_index)[0]) - tf.gather(first, image_index)
        self._indices = tf.stack([image_index, place], axis=1)
        self._shape = tf.stack([num_images, tf.reduce_max(self.counts)])

    def scatter(self, values):
        """[R, ...] to [N, K, ...], filled up with zeros."""
        return tf.scatter_nd(self._indices, values, tf.concat([self._shape, tf.shape(values)[1:]], axis=0))

    def scatter_text(self, values):
        """string [R] to [N, K], filled up with empty ones."""
        return tf.tensor_scatter_nd_update(tf.fill(self._shape, ""), self._indices, values)


# ---------------------------------------------------------------- writing


def export(predictor, checkpoint_path, image, *, format_name, saved_model=None, frozen_graph=None):
    """Exports the configured model, and compares what the result finds in an image with what the program finds.

    Files get their names when they have passed; nothing is overwritten.

    Args:
        predictor: the eval.Predictor of the same checkpoint. checkpoint_path: as `checkpoint.resolve` returns it.
        image: uint8 [H, W, 3] BGR. format_name: one of FORMATS.
        saved_model: path of the folder, or None. frozen_graph: path of the file, or None.
    Returns:
        a line for each of the two that was made, with the differences

    Raises:
        ExportError: the results differ by more than the tolerances. UserError: a path exists or cannot be written, or
            test-time augmentation is configured, which is not part of the graph.
    """
    if uses_augmentation(config):
        raise UserError("test-time augmentation is not exported: set TEST.TTA_FLIP=False and TEST.TTA_SCALES=[1.0]")
    kind = FORMATS[format_name](predictor.geometry, predictor.class_names)
    expected, lines = kind.expected(predictor, image), []
    with _new_path(saved_model) as folder, _new_path(frozen_graph) as file:
        names = _write(kind, checkpoint_path, folder, file)
        for path, part, load in ((saved_model, folder, _load_saved_model), (frozen_graph, file, _load_frozen_graph)):
            if path:
                difference = compare(expected, kind.read(_run(part, load, *names, kind.feed(image))))
                lines.append(f"{path}: {difference}")
    return lines


@contextlib.contextmanager
def _new_path(path):
    """A temporary path beside `path`, which gets that name if all goes well and else disappears; None for None."""
    if path is None:
        yield None
        return
    if path.exists():
        raise UserError(f"{path} exists already: name another place, or move it away")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.rename(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):
            part.unlink()


def _write(kind, checkpoint_path, folder, file):
    """Writes the model to both paths, None excepted.

    Returns:
        the tensors' names of the format's main signature: of its inputs and of its outputs, two dicts
    """
    with tf.Graph().as_default() as graph, tfv1.Session(config=sessions.session_config()) as session:
        signatures = _with_output_names(kind.build())
        checkpoint.load(checkpoint_path, session, check=checkpoint.check_complete)
        if folder:
            _write_saved_model(folder, session, signatures, keys_are_names=kind.keys_are_names)
        if file:
            nodes = sorted({value.op.name for _, outputs in signatures.values() for value in outputs.values()})
            frozen = tfv1.graph_util.convert_variables_to_constants(session, graph.as_graph_def(), nodes)
            file.write_bytes(frozen.SerializeToString())
    return tuple({key: value.name for key, value in tensors.items()} for tensors in signatures[kind.signature])


def _with_output_names(signatures):
    named = {}
    for _, outputs in signatures.values():
        for key, value in outputs.items():
            named.setdefault(key, tf.identity(value, f"output/{key}"))
    return {name: (inputs, {key: named[key] for key in outputs}) for name, (inputs, outputs) in signatures.items()}


def _write_saved_model(folder, session, signatures, *, keys_are_names):
    def described(tensors):
        keys = {value.name if keys_are_names else key: value for key, value in tensors.items()}
        return {key: tfv1.saved_model.build_tensor_info(value) for key, value in keys.items()}

    definitions = {
        name: tfv1.saved_model.build_signature_def(
            described(inputs), described(outputs), tfv1.saved_model.signature_constants.PREDICT_METHOD_NAME
        )
        for name, (inputs, outputs) in signatures.items()
    }
    builder = tfv1.saved_model.Builder(str(folder))
    builder.add_meta_graph_and_variables(session, [SERVE], definitions, clear_devices=True)
    builder.save()


# ---------------------------------------------------------------- checking


def _run(path, load, input_names, output_names, feed):
    """What an exported model returns: `load` brings it into the session's graph."""
    with tf.Graph().as_default() as graph, tfv1.Session(graph=graph, config=sessions.session_config()) as session:
        load(session, path)
        return session.run(output_names, {input_names[key]: value for key, value in feed.items()})


def _load_saved_model(session, folder):
    tfv1.saved_model.load(session, [SERVE], str(folder))


def _load_frozen_graph(session, file):
    del session
    tf.import_graph_def(tfv1.GraphDef.FromString(file.read_bytes()), name="")


def compare(expected, found):
    """Says in a few words how far the detections in one image differ, both ImageDetections.

    Raises:
        ExportError: by more than the tolerances; or there are others. NonFiniteError: the program overflowed.
    """
    if sorted(expected.labels) != sorted(found.labels):
        numbers = f"{len(found.labels)} objects, the program {len(expected.labels)}"
        raise ExportError(f"the exported model finds {numbers}, or objects of other classes")
    if not len(expected.labels):
        return "nothing to compare: nothing was found in the image; name another with --check-image"
    check_finite("the image to compare with", expected.scores)
    found = found.select(_partners(expected, found))
    boxes = float(np.abs(expected.boxes_xyxy - found.boxes_xyxy).max())
    scores = float(np.abs(expected.scores - found.scores).max())
    overlap = 1.0 if expected.masks is None else min(map(_mask_iou, expected.masks, found.masks))
    text = f"boxes {boxes:.2g} pixels, scores {scores:.2g}, masks IoU {overlap:.5f}"
    if not (boxes <= MAX_BOX_DIFFERENCE and scores <= MAX_SCORE_DIFFERENCE and overlap >= MIN_MASK_IOU):  # NaN: differs
        raise ExportError(f"the exported model differs from the program by {text}, in {len(expected.labels)} objects")
    return f"largest difference in {len(expected.labels)} objects: {text}"


def _partners(expected, found):
    """For each expected detection the index of the found one of its class whose box is nearest, each once: int [R]."""
    free, partners = set(range(len(found.labels))), []
    for label, box in zip(expected.labels, expected.boxes_xyxy):
        distance = {j: np.abs(found.boxes_xyxy[j] - box).max() for j in free if found.labels[j] == label}
        partners.append(min(distance, key=distance.get))
        free.remove(partners[-1])
    return np.array(partners)


def _mask_iou(a, b):
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0
