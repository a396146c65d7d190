"""Exports as they are used: made by predict.py, loaded and served by processes that have nothing but TensorFlow."""

import base64
import contextlib
import io
import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock

import cv2
import helpers
import numpy as np
import pytest
import tensorflow as tf
from tiny_models import MODELS, make_model

import predict
from common import checkpoint, weights
from config import Config, UserError
from dataset import shapes
from evaluation.metrics import NonFiniteError
from inference import export
from inference.predictor import Predictor

ROOT = Path(__file__).resolve().parents[2]
# A process in which importing anything that is not TensorFlow's own fails.
TENSORFLOW_ONLY = """
import sys
sys.modules.update(dict.fromkeys(["tensorpack", "cv2", "pycocotools", "PIL", "modeling", "config"]))
"""
LOAD = (
    TENSORFLOW_ONLY
    + """
import numpy as np, tensorflow as tf
folder, *files = sys.argv[1:]
signature = tf.saved_model.load(folder).signatures["serving_default"]
for file in files:
    image = np.load(file)
    outputs = signature(image=tf.constant(image[None]), image_shape=tf.constant([image.shape[:2]]))
    arrays = {name: value.numpy() for name, value in outputs.items()}
    np.savez(file + ".npz", **{**arrays, "class_names": arrays["class_names"].astype("S")})
"""
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Makes models of random weights by name, each once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make_model(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


def run_predict(*arguments):
    """What predict.py prints, in this process: that saves the time in which another one imports TensorFlow."""
    output = io.StringIO()
    with mock.patch.object(predict, "config", Config()), contextlib.redirect_stdout(output):
        assert predict.main(predict.parse_arguments(list(map(str, arguments)))) == 0
    return output.getvalue()


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """Exports a model as a SavedModel and a frozen graph, each once; returns (run, folder, what was printed)."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("export")
            paths = ["--output-serving", folder / "new" / "1", "--output-pb", folder / "m.pb"]
            made[name] = models(name), folder, run_predict(*paths, "--load", models(name))
        return made[name]

    return get


def images():
    """Two pictures of different sizes, neither of which the network sees as it is."""
    large, _ = shapes.draw_image(np.random.default_rng(5), 200)
    return [large[:120], large[:, :97]]


# ---------------------------------------------------------------- whole exports


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n == "boxes" else ()) for n in MODELS])
def test_a_process_with_tensorflow_alone_gets_the_program_s_results(exported, tmp_path, name):
    run, folder, output = exported(name)
    first, second = output.splitlines()[-2:]
    assert first.startswith(f"{folder / 'new' / '1'}: largest difference in 12 objects: boxes ")
    assert second.startswith(f"{folder / 'm.pb'}: largest difference in 12 objects: boxes ")
    predictor, files = Predictor(run), [tmp_path / "0.npy", tmp_path / "1.npy"]
    for file, image in zip(files, images()):
        np.save(file, image)
    command = [sys.executable, "-c", LOAD, folder / "new" / "1", *files]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    for file, image in zip(files, images()):
        (expected,), found = predictor([image]), dict(np.load(f"{file}.npz"))
        assert found["num_detections"] == [12] == [len(expected.labels)]
        np.testing.assert_array_equal(found["labels"][0], expected.labels)
        np.testing.assert_allclose(found["boxes"][0], expected.boxes_xyxy, rtol=0, atol=0.05)
        np.testing.assert_allclose(found["scores"][0], expected.scores, rtol=0, atol=1e-4)
        names = [text.decode() for text in found["class_names"][0]]
        assert names == [predictor.class_names[label - 1] for label in expected.labels]
        if name == "boxes":
            assert "masks" not in found
            continue
        assert found["masks"].shape[2:] == image.shape[:2]
        for mask, true in zip(found["masks"][0] > 0, expected.masks, strict=True):
            assert (mask & true).sum() >= 0.99 * (mask | true).sum()
        assert sum(mask.any() for mask in expected.masks) > 6


@pytest.mark.slow
def test_what_an_export_does_around_the_network_equals_numpy(exported):
    """Resizing and padding before it; boxes by a factor for x and one for y, clipping and pasting after it."""
    run, folder, _ = exported("fpn")
    network, (image, _) = Predictor(run).network, images()
    height, width = image.shape[:2]  # 120 x 200: the short edge becomes 90, the long edge 150, the largest allowed
    batch = np.zeros((1, 96, 160, 3), np.uint8)
    batch[0, :90, :150] = cv2.resize(image, (150, 90), interpolation=cv2.INTER_LINEAR)
    raw = network(batch, np.array([[90, 150]], np.int32))
    boxes = raw.boxes.astype(np.float64) * [200 / 150, 120 / 90, 200 / 150, 120 / 90]
    boxes = np.clip(boxes, 0, [width, height, width, height])
    with tf.Graph().as_default() as graph, tf.compat.v1.Session() as session:
        tf.import_graph_def(tf.compat.v1.GraphDef.FromString((folder / "m.pb").read_bytes()), name="")
        names = [f"output/{name}:0" for name in ("boxes", "scores", "labels", "masks")]
        feed = {"image:0": image[None], "image_shape:0": [image.shape[:2]]}
        found_boxes, scores, labels, masks = (x[0] for x in session.run(names, feed))
        assert graph is session.graph
    np.testing.assert_allclose(found_boxes, boxes, atol=1e-2)
    np.testing.assert_allclose(scores, raw.scores, atol=1e-4)
    np.testing.assert_array_equal(labels, raw.labels)
    for mask, probabilities, box in list(zip(masks, raw.masks, boxes))[:4]:
        values = helpers.paste_by_definition(probabilities, box, height, width)
        decided = np.abs(values - 0.5) > 2e-3
        np.testing.assert_array_equal(mask[decided] > 0, values[decided] >= 0.5)
        assert decided.mean() > 0.9


@pytest.mark.slow
def test_served_over_http_by_a_process_with_tensorflow_alone(exported):
    run, folder, _ = exported("fpn")
    server = (ROOT / "examples" / "serve.py").read_text()
    process = subprocess.Popen(
        [sys.executable, "-c", TENSORFLOW_ONLY + server, folder / "new" / "1", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    try:
        url = process.stdout.readline().split(" at ")[1].strip()
        files = [cv2.imencode(".png", image)[1].tobytes() for image in images()]
        contents = [{"b64": base64.b64encode(file).decode()} for file in files]
        code, answer = post(url, {"signature_name": "encoded", "inputs": {"image_bytes": contents}})
        assert code == 200
        assert post(url, {"inputs": {"image_bytes": ["a"]}})[0] == 400
        code, message = post(url, {"signature_name": "encoded", "inputs": {"image_bytes": [{"b64": "aaaa"}]}})
        assert code == 400 and "error" in message
    finally:
        process.kill()
        process.wait()
    found = answer["outputs"]
    for index, expected in enumerate(Predictor(run)(images())):  # as one batch, like the request
        np.testing.assert_array_equal(found["labels"][index], expected.labels)
        np.testing.assert_allclose(found["boxes"][index], expected.boxes_xyxy, rtol=0, atol=0.05)
        np.testing.assert_allclose(found["scores"][index], expected.scores, rtol=0, atol=1e-4)
        for content, true in zip(found["mask_bytes"][index], expected.masks, strict=True):
            file = np.frombuffer(base64.b64decode(content["b64"]), np.uint8)
            mask = cv2.imdecode(file, cv2.IMREAD_GRAYSCALE)
            assert mask.shape == true.shape and set(np.unique(mask)) <= {0, 255}
            assert ((mask > 0) & true).sum() >= 0.99 * ((mask > 0) | true).sum()
        assert set(found["class_names"][index]) <= {"disc", "box", "häuschen"}


def post(url, request):
    """The status and the decoded answer."""
    try:
        with urllib.request.urlopen(url, json.dumps(request).encode(), timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


TENSORPACK = (
    TENSORFLOW_ONLY
    + """
import numpy as np, tensorflow as tf
tf = tf.compat.v1
folder, source, target = sys.argv[1:]
with tf.Session(graph=tf.Graph()) as session:
    signature = tf.saved_model.load(session, ["serve"], folder).signature_def["prediction_pipeline"]
    names = ["output/boxes:0", "output/scores:0", "output/labels:0", "output/masks:0"]
    assert sorted(signature.outputs) == sorted(names) and list(signature.inputs) == ["image:0"], signature
    found = session.run(names, {"image:0": np.load(source)["image"]})
np.savez(target, **dict(zip(["boxes", "scores", "labels", "masks"], found)))
"""
)


@pytest.mark.slow
def test_format_of_tensorpack(models, tmp_path):
    run, folder = models("fpn"), tmp_path / "model"
    command = [sys.executable, "predict.py", "--output-serving", folder, "--format", "tensorpack", "--load", run]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{folder}: largest difference in 12 objects" in done.stdout
    predictor, image = Predictor(run), images()[0]
    batch, shape = predictor.geometry.batch([image])
    np.savez(tmp_path / "in.npz", image=batch[0, : shape[0, 0], : shape[0, 1]].astype(np.float32))
    command = [sys.executable, "-c", TENSORPACK, folder, tmp_path / "in.npz", tmp_path / "out.npz"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    found, expected = dict(np.load(tmp_path / "out.npz")), predictor.network(batch, shape)
    for part in ("boxes", "scores", "labels", "masks"):
        np.testing.assert_allclose(found[part], getattr(expected, part), rtol=1e-5, atol=1e-4, err_msg=part)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_frozen_graph_is_fused(tmp_path, precision):
    """With biases: without them there would be nothing to fuse."""
    run, rng = make_model(tmp_path, "fpn", "BACKBONE.RESNET_NUM_BLOCKS=[2,2,2,2]"), np.random.default_rng(0)
    values = weights.read(checkpoint.resolve(run))
    biases = {name: rng.normal(0, 0.01, x.shape) for name, x in values.items() if name.endswith(("/b", "/beta"))}
    np.savez(tmp_path / "m.npz", **values | biases)
    options = ["--load", tmp_path / "m.npz", "--config", f"TEST.PRECISION={precision}"]
    run_predict("--output-pb", tmp_path / "m.pb", *options)
    definition, image = tf.compat.v1.GraphDef.FromString((tmp_path / "m.pb").read_bytes()), images()[0]
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(definition, name="")
        feed = {"image:0": image[None], "image_shape:0": [image.shape[:2]]}
        nodes, _ = helpers.run_traced(session, ["output/boxes:0", "output/masks:0"], feed)
    assert "VarHandleOp" not in {node.op for node in definition.node}
    assert helpers.not_fused(nodes) == [f"group{stage}/block0/conv3/Relu" for stage in (1, 2, 3)]


@pytest.mark.slow
def test_export_that_is_there_already_is_refused(exported):
    run, folder, _ = exported("fpn")
    with pytest.raises(UserError, match="m.pb exists already"):
        run_predict("--output-pb", folder / "m.pb", "--load", run)


@pytest.mark.slow
def test_nothing_found_is_an_answer(models, tmp_path):
    """No detection in any image, and in one of two: every output of both signatures has its shape."""
    overrides = ["TEST.RESULT_SCORE_THRESH=0.9999"]
    predictor = Predictor(models("fpn"), settings=overrides)
    image = np.zeros((40, 60, 3), np.uint8)
    run, path = models("fpn"), tmp_path / "model"
    options = dict(format_name="complete", saved_model=path, frozen_graph=tmp_path / "model.pb")
    lines = export.export(predictor, checkpoint.resolve(run), image, **options)
    assert len(lines) == 2 and all("nothing to compare" in line for line in lines)
    content = cv2.imencode(".png", image)[1].tobytes()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        signatures = tf.compat.v1.saved_model.load(session, ["serve"], str(path)).signature_def
        feeds = {
            "serving_default": {"image": np.stack([image, image]), "image_shape": [[40, 60], [40, 60]]},
            "encoded": {"image_bytes": [content, content]},
        }
        for name, feed in feeds.items():
            inputs = {signatures[name].inputs[key].name: value for key, value in feed.items()}
            outputs = {key: info.name for key, info in signatures[name].outputs.items()}
            found = session.run(outputs, inputs)
            assert found["num_detections"].tolist() == [0, 0]
            assert found["boxes"].shape == (2, 0, 4) and found["scores"].shape == (2, 0)
            masks = found.get("masks", found.get("mask_bytes"))
            assert masks.shape == ((2, 0, 40, 60) if "masks" in found else (2, 0))


@pytest.mark.slow
def test_augmentation_is_not_exported(models, tmp_path):
    with pytest.raises(UserError, match="augmentation is not exported"):
        run_predict("--output-pb", tmp_path / "m.pb", "--load", models("fpn"), "--config", "TEST.TTA_FLIP=True")


# ---------------------------------------------------------------- comparing


def detections(**changes):
    """Two objects as export.Compared."""
    masks = np.zeros((2, 40, 50), bool)
    masks[0, 5:25, 5:25] = masks[1, 10:30, 10:40] = True
    boxes_xyxy = np.float32([[5, 5, 25, 25], [10, 10, 40, 30]])
    parts = {"boxes_xyxy": boxes_xyxy, "scores": np.float32([0.9, 0.5]), "labels": np.array([1, 2]), "masks": masks}
    return export.Compared(**{**parts, **changes})


def select(found, indices):
    return export.Compared(*[part[indices] for part in found])


def test_equal_results_pass_in_any_order():
    assert export.compare(detections(), select(detections(), [1, 0])) == (
        "largest difference in 2 objects: boxes 0 pixels, scores 0, masks IoU 1.00000"
    )
    assert "nothing" in export.compare(select(detections(), []), select(detections(), []))


@pytest.mark.parametrize(
    "changes",
    [
        {"boxes_xyxy": np.float32([[5, 5, 25, 25.06], [10, 10, 40, 30]])},
        {"scores": np.float32([0.9, 0.5002])},
        {"scores": np.float32([0.9, np.nan])},
        {"labels": np.array([1, 1])},
        {"masks": detections().masks[::-1]},
    ],
)
def test_differences_beyond_tolerance_are_errors(changes):
    with pytest.raises(export.ExportError):
        export.compare(detections(), detections(**changes))


def test_an_object_is_the_partner_of_one_object_only():
    """The export has one of two near objects, and another one far off: not the same one twice."""
    near = detections(boxes_xyxy=np.float32([[5, 5, 25, 25], [5, 5, 25, 25.02]]), labels=np.array([1, 1]), masks=None)
    far = near._replace(boxes_xyxy=np.float32([[5, 5, 25, 25], [60, 60, 80, 80]]))
    far = far._replace(scores=near.scores)
    with pytest.raises(export.ExportError, match="boxes 55"):
        export.compare(near._replace(scores=np.float32([0.9, 0.9])), far._replace(scores=np.float32([0.9, 0.9])))


def test_program_that_overflows_has_nothing_to_compare_with():
    overflowed = detections(scores=np.float32([0.9, np.nan]))
    with pytest.raises(NonFiniteError, match="not finite"):
        export.compare(overflowed, overflowed)


def test_missing_object_is_an_error():
    with pytest.raises(export.ExportError, match="finds 1 objects, the program 2"):
        export.compare(detections(), select(detections(), [0]))


@pytest.mark.slow
def test_failed_export_leaves_nothing(models, tmp_path, monkeypatch):
    """Neither the folder nor the file, which are both written before the first is compared."""

    def differs(*_):
        assert len(list((tmp_path / "a").iterdir())) == 2  # hidden ones
        raise export.ExportError("differs")

    monkeypatch.setattr(export, "compare", differs)
    paths = ["--output-serving", tmp_path / "a" / "model", "--output-pb", tmp_path / "a" / "m.pb"]
    with pytest.raises(export.ExportError, match="differs"):
        run_predict(*paths, "--load", models("fpn"))
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.slow
def test_full_disk_under_an_export_is_named_and_leaves_nothing(models, tmp_path):
    """In a process of its own, whose log a limit on the size of files would cut off, too."""
    command = [sys.executable, "predict.py", "--output-pb", tmp_path / "m.pb", "--load", models("boxes")]
    limit = ["bash", "-c", 'ulimit -S -f 8; exec "$@"', "bash"]  # blocks of 1024 bytes
    done = subprocess.run([*limit, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert f"predict.py: cannot write {tmp_path / 'm.pb'}: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
