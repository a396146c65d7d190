"""Looking inside the model: the stages hang together, tensors are found by name, pictures show what they should."""

import collections
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import make_model

from common import viz
from config import Config, UserError
from dataset import shapes
from inference import stages
from inference.predictor import ImageDetections, Predictor


@pytest.fixture(scope="module", params=["fpn", "cascade"])
def model(request, tmp_path_factory):
    """(Inspector, Predictor) of one model of random weights."""
    folder = make_model(tmp_path_factory.mktemp("run"), request.param)
    settings = Config()
    settings.load(folder / "config.json")
    settings.TEST.PRECISION = "bfloat16" if request.param == "cascade" else "float32"
    inspector = stages.Inspector(settings, folder / "model-1")
    return inspector, Predictor(folder, settings=settings)


@pytest.fixture
def image():
    return shapes.draw_image(np.random.default_rng(5), 200)[0][:120]


@pytest.mark.slow
def test_detections_come_from_the_raw_predictions_of_the_proposals(model, image):
    inspector, predictor = model
    made = inspector.stages(image)
    (expected,) = predictor([image])
    np.testing.assert_allclose(made.detections.boxes_xyxy, expected.boxes_xyxy, atol=1e-3)
    np.testing.assert_array_equal(made.detections.labels, expected.labels)
    # Of the best detections' scores, the raw ones know those that are the best class of their proposal.
    raw = collections.defaultdict(list)
    for box, label, score in zip(*made[1:4]):
        raw[label, round(float(score), 5)].append(box)  # several proposals may have the same score
    found = zip(expected.labels, expected.scores, expected.boxes_xyxy)
    shared = [(raw[key], box) for label, score, box in found if (key := (label, round(float(score), 5))) in raw]
    assert len(shared) >= 3
    for raw_boxes, box in shared:
        assert np.abs(np.array(raw_boxes) - box).max(axis=1).min() <= 1e-3
    assert (np.diff(made.scores) <= 0).all() and len(made.proposals_xyxy) == len(made.scores)
    assert (made.proposals_xyxy >= 0).all() and (made.proposals_xyxy <= [200, 120, 200, 120]).all()


@pytest.mark.slow
def test_any_tensor_by_name(model, image):
    inspector, _ = model
    assert inspector.names(["proposals/*"]) == ["proposals/boxes", "proposals/logits"]
    (convolution,) = inspector.names(["conv0/Relu"])
    values = inspector.fetch(image, [convolution, "proposals/logits"])
    assert values[convolution].dtype == np.float32  # also of the model in bfloat16, of which NumPy knows nothing
    assert values[convolution].shape[0] == 1 and values[convolution].shape[3] == 4 and values[convolution].min() == 0
    assert (np.diff(values["proposals/logits"][0]) <= 0).all()
    with pytest.raises(UserError, match="no tensor is called proposals/boxs: near are proposals/boxes"):
        inspector.names(["proposals/boxs"])


def test_description():
    assert stages.describe("a", np.float32([[1, 3]])) == "a: float32 [1, 2], 1 to 3, mean 2"
    assert stages.describe("a", np.float32([np.nan, 3, np.inf])) == "a: float32 [3], 3 to 3, mean 3, 2 NOT FINITE"
    assert stages.describe("a", np.zeros((0, 4))) == "a: float64 [0, 4]"
    assert stages.describe("a", np.array([True])) == "a: bool [1]"


def test_map_lies_on_its_image():
    value = np.zeros((1, 6, 8, 3), np.float32)
    value[0, :3, :, 0] = -5
    picture = stages.draw_map(np.zeros((60, 80, 3), np.uint8), value)
    assert (picture[:30, :, 2] > picture[:30, :, 0]).all()  # strong: red
    assert (picture[30:, :, 0] > picture[30:, :, 2]).all()  # weak: blue
    assert stages.is_map(value)
    assert not any(map(stages.is_map, (value[0], value.astype(int), value[:, :1], np.zeros((2, 6, 8, 3)))))


def test_four_pictures(monkeypatch):
    """The best proposal is on top; raw predictions below the threshold are left out; the record's objects are there."""
    image = np.full((500, 600, 3), 100, np.uint8)
    nothing = ImageDetections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), None)
    boxes_xyxy = np.float32([[100, 100, 200, 200], [300, 300, 400, 400]])
    made = stages.Stages(boxes_xyxy, boxes_xyxy, np.array([1, 2]), np.array([0.9, 0.3]), nothing)
    record = SimpleNamespace(
        boxes_xyxy=boxes_xyxy[1:], labels=np.array([1]), is_crowd=np.array([False]), segmentations=(None,)
    )
    titles = []
    with_title = viz._with_title
    monkeypatch.setattr(viz, "_with_title", lambda *args: titles.append(args[1]) or with_title(*args))
    picture = stages.draw_stages(image, made, ["disc", "box"], score_threshold=0.5, record=record)
    assert titles == [
        "the 2 best proposals (yellow: best)",
        "1 raw predictions, before suppression",
        "detections",
        "ground truth",
    ]
    half = len(picture) // 2
    (upper_left, upper_right), (lower_left, lower_right) = (
        (rows[-500:, :600], rows[-500:, -600:]) for rows in (picture[:half], picture[half:])
    )
    assert (upper_left[150, 100] != 100).any() and (upper_left[350, 300] != 100).any()
    assert tuple(upper_right[150, 100]) == viz.class_colour(1) and (upper_right[250:] == 100).all()
    assert (lower_left == 100).all()
    assert tuple(lower_right[350, 300]) == viz.class_colour(1) and (lower_right[:250] == 100).all()
