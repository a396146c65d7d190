"""The box branch against loops in NumPy, written from the rules, and cases worked by hand."""

import math

import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    batch_norm,
    convolve,
    decode,
    encode,
    evaluate,
    greedy_nms,
    group_norm,
    random_boxes,
    relu,
    stored_norm,
    variables,
)

from common import boxes as np_boxes
from modeling import box_head, device, rpn

tfv1 = tf.compat.v1

# ---------------------------------------------------------------------------------------------------- labels and sample


def slow_labels(box, is_valid, gt_boxes, gt_labels, foreground_iou):
    """(label, matched ground truth) of one RoI."""
    objects = np.flatnonzero(gt_labels > 0)
    if is_valid and len(objects):
        iou = np_boxes.pairwise_iou(box, gt_boxes[objects])[0]
        if iou.max() >= np.float32(foreground_iou):
            return gt_labels[objects[iou.argmax()]], objects[iou.argmax()]
    return 0, None


def training_images(rng, *, images=3, proposals=30, objects=6):
    """Proposals near the ground truth of each image, which has padding rows and crowds; the last one has no object."""
    gt_boxes = random_boxes(rng, images, objects)
    gt_labels = rng.choice([1, 2, 3, 0, -1], (images, objects), p=[0.3, 0.2, 0.2, 0.15, 0.15])
    gt_labels[-1] = [-1] + [0] * (objects - 1)
    near = gt_boxes[:, rng.integers(0, objects, proposals)]
    boxes = (near + rng.normal(0, 4, near.shape)).astype(np.float32)
    boxes[..., 2:] = np.maximum(boxes[..., 2:], boxes[..., :2] + 1)
    gt_boxes[gt_labels == 0] = 0
    return boxes, rng.random((images, proposals)) < 0.9, gt_boxes, gt_labels


def test_labels_equal_the_rules():
    images = training_images(np.random.default_rng(0), images=6)
    rois = evaluate(lambda *arrays: box_head.label_rois(*arrays, foreground_iou=0.5), *images)
    for n, i in np.ndindex(6, 30):
        label, match = slow_labels(images[0][n, i], images[1][n, i], images[2][n], images[3][n], 0.5)
        assert rois.labels[n, i] == label
        assert match is None or rois.gt_index[n, i] == match
    assert np.bincount(rois.labels[:-1].ravel(), minlength=4).min() > 5 and not rois.labels[-1].any()


def test_labels_by_hand():
    """IoU 1, 0.5, 0.25 with label 7; equal with labels 7 and 8; covered by a crowd and by padding; not valid."""
    gt_boxes = [[[0, 0, 8, 8], [20, 0, 28, 8], [20, 0, 28, 8], [40, 0, 48, 8], [0, 0, 0, 0]]]
    gt_labels = [[7, 7, 8, -1, 0]]
    boxes = [[[0, 0, 8, 8], [0, 0, 8, 4], [0, 0, 8, 2], [20, 0, 28, 8], [40, 0, 48, 8], [0, 0, 0, 0], [0, 0, 8, 8]]]
    is_valid = [[True] * 6 + [False]]

    def build(*arrays):
        rois = box_head.label_rois(*arrays, foreground_iou=0.5)
        assert tf.gradients(rois.boxes, arrays[0]) == [None]
        return rois, rois.is_foreground

    rois, is_foreground = evaluate(build, np.float32(boxes), is_valid, np.float32(gt_boxes), np.int64(gt_labels))
    assert rois.labels.tolist() == [[7, 7, 0, 7, 0, 0, 0]]
    assert is_foreground.tolist() == [[True, True, False, True, False, False, False]]
    assert rois.gt_index[0, [0, 1, 3]].tolist() == [0, 0, 1]
    np.testing.assert_array_equal(rois.boxes, boxes)


def sample_rois(boxes, is_valid, gt_boxes, gt_labels, **options):
    """RoIs, of images whose sample keys are (1, 0), (1, 1), ..."""

    def build(boxes, is_valid, gt_boxes, gt_labels, keys):
        proposals = rpn.Proposals(boxes, None, is_valid)
        options_with_defaults = {**dict(foreground_iou=0.5, batch_per_image=512, foreground_ratio=0.25), **options}
        return box_head.sample_rois(proposals, gt_boxes, gt_labels, keys, **options_with_defaults)

    keys = np.stack([np.ones(len(boxes)), np.arange(len(boxes))], axis=1).astype(np.int32)
    rois = evaluate(build, np.float32(boxes), is_valid, np.float32(gt_boxes), np.int64(gt_labels), keys)
    return box_head.RoIs(*rois)


def image_of(images, n):
    return [x[n : n + 1] for x in images]


def picks(rois, n):
    """The picked boxes of an image as a set."""
    return {tuple(box) for box in rois.boxes[n][rois.is_valid[n]]}


def test_a_sample_larger_than_what_there_is_holds_everything_that_counts():
    """All valid proposals and all objects; no padding, no crowd, foreground first."""
    images = training_images(np.random.default_rng(1))
    boxes, is_valid, gt_boxes, gt_labels = images
    rois = sample_rois(*images, foreground_ratio=1.0)
    assert rois.boxes.shape == (3, 36, 4)
    for n in range(3):
        objects = gt_boxes[n][gt_labels[n] > 0]
        expected = {tuple(box) for box in [*boxes[n][is_valid[n]], *objects]}
        assert rois.is_valid[n].sum() == len(expected) == is_valid[n].sum() + len(objects)
        assert picks(rois, n) == expected
        foreground = rois.is_foreground[n]
        assert foreground.tolist() == sorted(foreground, reverse=True)
        for i in np.flatnonzero(rois.is_valid[n]):
            label, match = slow_labels(rois.boxes[n, i], True, gt_boxes[n], gt_labels[n], 0.5)
            assert (rois.labels[n, i], foreground[i]) == (label, label > 0)
            assert match is None or rois.gt_index[n, i] == match


def test_a_sample_keeps_its_limits():
    images = training_images(np.random.default_rng(2))
    rois = sample_rois(*images, batch_per_image=12, foreground_ratio=0.3)
    assert rois.is_foreground.sum(axis=1).tolist() == [3, 3, 0]
    assert rois.is_valid.sum(axis=1).tolist() == [12, 12, 12]
    assert all(len(picks(rois, n)) == 12 for n in range(3))


def test_objects_are_sampled_as_often_as_proposals():
    """One object and three proposals that equal it but for a hair, one place for foreground, many images."""
    images = 2000
    gt_boxes = np.tile(np.float32([[0, 0, 10, 10]]), (images, 1, 1))
    boxes = gt_boxes + np.float32([[0, 0, 0, 0.125], [0, 0, 0, 0.25], [0, 0, 0, 0.375]])
    rois = sample_rois(
        boxes, np.ones((images, 3), bool), gt_boxes, np.ones((images, 1)), batch_per_image=2, foreground_ratio=0.5
    )
    counts = np.unique(rois.boxes[:, 0, 3][rois.is_foreground[:, 0]], return_counts=True)[1]
    assert counts.sum() == images
    assert np.all(np.abs(counts - images / 4) < 4.5 * np.sqrt(images * 3 / 16))


def test_a_sample_does_not_depend_on_the_padding_of_the_batch():
    images = training_images(np.random.default_rng(3))
    options = dict(batch_per_image=10, foreground_ratio=0.4)
    one = sample_rois(*images, **options)
    boxes, is_valid, gt_boxes, gt_labels = (np.pad(x, [(0, 0), (0, 9)] + [(0, 0)] * (x.ndim - 2)) for x in images)
    other = sample_rois(boxes, is_valid, gt_boxes, gt_labels, **options)
    for n in range(3):
        assert picks(one, n) == picks(other, n)
    assert picks(sample_rois(*image_of(images, 0), **options), 0) == picks(one, 0)


def test_image_index_repeats_each_image_for_its_slots():
    assert evaluate(box_head.image_index, np.zeros((3, 2, 4), np.float32)).tolist() == [0, 0, 1, 1, 2, 2]


# ---------------------------------------------------------------------------------------------------------------- heads


def run_head(name, x, rng, **options):
    head, norm = box_head.HEADS[name]
    shape = [None, *x.shape[1:]]

    def build(x):
        return head(tf.ensure_shape(x, shape), conv_channels=6, fc_channels=5, norm=norm, **options), variables()

    return evaluate(build, x, random_variables=rng)


def fully_connected(x, values, name):
    return relu(x @ values[f"{name}/W"] + values[f"{name}/b"])


def test_head_of_two_fully_connected_layers():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(3, 2, 2, 4)).astype(np.float32)
    y, values = run_head("fastrcnn_2fc_head", x, rng)
    flat = x.transpose(0, 3, 1, 2).reshape(3, -1)
    expected = fully_connected(fully_connected(flat, values, "fc6"), values, "fc7")
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name, normalised", [("fastrcnn_4conv1fc_head", False), ("fastrcnn_4conv1fc_gn_head", True)])
def test_head_of_four_convolutions(name, normalised, norm_first):
    """Nothing comes after the normalisation, unless it comes before the ReLU."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(2, 3, 3, 4)).astype(np.float32)
    y, values = run_head(name, x, rng, norm_first=norm_first)
    expected = x
    for i in range(4):
        expected = convolve(expected, values[f"conv{i}/W"], bias=values[f"conv{i}/b"], before=1, after=1)
        expected = expected if normalised and norm_first else relu(expected)
        if normalised:
            expected = group_norm(expected, values[f"gn{i}/gamma"], values[f"gn{i}/beta"], groups=3)
        expected = relu(expected) if norm_first else expected
    expected = fully_connected(expected.transpose(0, 3, 1, 2).reshape(2, -1), values, "fc")
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["FreezeBN", "SyncBN"])
def test_head_of_four_convolutions_with_batch_norm(norm):
    """The norm comes before the ReLU, in place of the bias; RoIs that are not valid have no part in its statistics."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(4, 3, 3, 4)).astype(np.float32)
    is_valid = [True, False, True, True]

    def build(x):
        options = dict(conv_channels=6, fc_channels=5, norm=norm, is_valid=tf.constant(is_valid))
        return box_head.fastrcnn_4conv1fc_head(tf.ensure_shape(x, [None, 3, 3, 4]), **options), variables()

    y, values = evaluate(build, x, random_variables=rng)
    assert len(values) == 4 * 5 + 2
    expected = x
    for i in range(4):
        expected = convolve(expected, values[f"conv{i}/W"], before=1, after=1)
        if norm == "FreezeBN":
            expected = stored_norm(expected, values, f"conv{i}/bn")
        else:
            gamma, beta = (values[f"conv{i}/bn/{x}"] for x in ("gamma", "beta"))
            expected = batch_norm(expected, gamma, beta, is_valid=is_valid)
        expected = relu(expected)
    expected = fully_connected(expected.transpose(0, 3, 1, 2).reshape(4, -1), values, "fc")
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)


def test_giou_equals_the_definition_and_moves_distant_boxes():
    """Box by box, arXiv:1902.09630 algorithm 1: overlapping, distant and equal boxes; its gradient is finite."""
    rng = np.random.default_rng(8)
    boxes = random_boxes(rng, 2, 20)
    truth = np.concatenate(
        [boxes[:, :10] + rng.normal(0, 4, (2, 10, 4)), random_boxes(rng, 2, 10, low=300, high=400)], axis=1
    )
    truth = np.float32(np.concatenate([np.minimum(truth[..., :2], truth[..., 2:] - 1), truth[..., 2:]], axis=-1))
    truth[:, 0], deltas = boxes[:, 0], rng.normal(size=(2, 20, 4)).astype(np.float32)
    deltas[:, 0] = 0

    def build(deltas, boxes, truth):
        losses = box_head.giou_loss(deltas, boxes, truth, WEIGHTS)
        return losses, tf.gradients(losses, deltas)[0]

    losses, gradients = evaluate(build, deltas, boxes, truth)
    for place in np.ndindex(2, 20):
        a = decode(deltas[place] / WEIGHTS, boxes[place], max_log_size=math.log(1000 / 16))
        b = np.float64(truth[place])
        shared = np.prod([max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)])
        hull = np.prod([max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1)])
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
        assert losses[place] == pytest.approx(1 - shared / union + (hull - union) / hull, rel=1e-4, abs=1e-5)
    assert np.isfinite(gradients).all() and np.abs(gradients[:, 10:]).max(axis=-1).min() > 0
    np.testing.assert_allclose(losses[:, 0], 0, atol=1e-6)


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_outputs_are_float32_and_grouped_by_class(class_agnostic, dtype):
    rng = np.random.default_rng(6)
    features = rng.normal(size=(3, 7)).astype(np.float32)

    def build(x):
        x = tf.cast(tf.ensure_shape(x, [None, 7]), dtype)
        return box_head.box_outputs(x, num_classes=4, class_agnostic=class_agnostic), variables()

    (class_logits, deltas), values = evaluate(build, features, random_variables=rng)
    assert class_logits.dtype == deltas.dtype == np.float32
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == tf.float32 else dict(atol=0.1)
    np.testing.assert_allclose(class_logits, features @ values["class/W"] + values["class/b"], **tolerance)
    flat = features @ values["box/W"] + values["box/b"]
    expected = [[roi[4 * k : 4 * k + 4] for k in range(1 if class_agnostic else 5)] for roi in flat]
    np.testing.assert_allclose(deltas, expected, **tolerance)


# --------------------------------------------------------------------------------------------------------------- losses

WEIGHTS = (10.0, 9.0, 5.0, 4.0)


def random_loss_case(rng, *, images=2, slots=12, class_agnostic=False):
    """class_logits, deltas, RoIs and gt_boxes; the images have different numbers of valid slots."""
    is_valid = np.arange(slots) < rng.integers(slots // 2, slots + 1, (images, 1))
    rois = box_head.RoIs(
        random_boxes(rng, images, slots),
        rng.choice(4, (images, slots), p=[0.4, 0.2, 0.2, 0.2]) * is_valid,
        rng.integers(0, 5, (images, slots)).astype(np.int32),
        is_valid,
    )
    count = images * slots
    logits = rng.normal(0, 2, (count, 4)).astype(np.float32)
    deltas = rng.normal(0, 2, (count, 1 if class_agnostic else 4, 4)).astype(np.float32)
    return logits, deltas, rois, random_boxes(rng, images, 5)


def run_losses(class_logits, deltas, rois, gt_boxes):
    """The losses, and their gradients by logits and deltas."""

    num_boxes = deltas.shape[1]

    def build(class_logits, deltas, gt_boxes, *rois):
        deltas.set_shape([None, num_boxes, 4])
        losses = box_head.box_losses(class_logits, deltas, box_head.RoIs(*rois), gt_boxes, weights=WEIGHTS)
        return losses, tf.gradients(sum(losses.values()), [class_logits, deltas])

    return evaluate(build, class_logits, deltas, gt_boxes, *rois)


def slow_losses(class_logits, deltas, rois, gt_boxes):
    """The mean over images of what each image's valid RoIs have on average."""
    images, slots = rois.labels.shape
    label_loss, box_loss = np.zeros(images), np.zeros(images)
    for n in range(images):
        valid = np.flatnonzero(rois.is_valid[n])
        for i in valid:
            logits, label = np.float64(class_logits[n * slots + i]), rois.labels[n, i]
            label_loss[n] -= np.log(np.exp(logits[label]) / np.exp(logits).sum()) / len(valid)
            if label > 0:
                target = encode(gt_boxes[n, rois.gt_index[n, i]], rois.boxes[n, i]) * WEIGHTS
                predicted = deltas[n * slots + i, label if deltas.shape[1] > 1 else 0]
                box_loss[n] += np.abs(predicted - target).sum() / len(valid)
    return {"label_loss": label_loss.mean(), "box_loss": box_loss.mean()}


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_losses_equal_the_definition(class_agnostic):
    case = random_loss_case(np.random.default_rng(7), class_agnostic=class_agnostic)
    losses, (by_logits, by_deltas) = run_losses(*case)
    for name, expected in slow_losses(*case).items():
        np.testing.assert_allclose(losses[name], expected, rtol=1e-4)
    rois = case[2]
    np.testing.assert_array_equal(by_logits.any(axis=1), rois.is_valid.ravel())
    of_label = np.zeros(by_deltas.shape[:2], bool)
    foreground = np.flatnonzero(rois.is_foreground)
    of_label[foreground, 0 if class_agnostic else rois.labels.ravel()[foreground]] = True
    np.testing.assert_array_equal(by_deltas.any(axis=2), of_label)


def test_losses_of_a_batch_are_the_mean_of_its_images_losses():
    logits, deltas, rois, gt_boxes = random_loss_case(np.random.default_rng(8), images=3)
    together, _ = run_losses(logits, deltas, rois, gt_boxes)
    alone = []
    for n in range(3):
        rows, image = slice(12 * n, 12 * n + 12), slice(n, n + 1)
        alone.append(
            run_losses(logits[rows], deltas[rows], box_head.RoIs(*(x[image] for x in rois)), gt_boxes[image])[0]
        )
    for name, loss in together.items():
        np.testing.assert_allclose(loss, np.mean([losses[name] for losses in alone]), rtol=1e-5)


@pytest.mark.parametrize("any_valid", [True, False])
def test_losses_without_foreground_are_finite(any_valid):
    """Also where the RoIs and the ground truth are empty boxes."""
    logits, deltas, rois, gt_boxes = random_loss_case(np.random.default_rng(9))
    rois = rois._replace(
        boxes=np.zeros_like(rois.boxes), labels=np.zeros_like(rois.labels), is_valid=rois.is_valid & any_valid
    )
    losses, gradients = run_losses(logits, deltas, rois, np.zeros_like(gt_boxes))
    assert losses["box_loss"] == 0 and (losses["label_loss"] > 0) == any_valid
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[1].any() and gradients[0].any() == any_valid


def test_metrics_by_hand():
    """Labels 1 1 2 0 in one image and 0 and an unused slot in the other; predicted 1 0 1 0 and 2 2."""
    predicted = [1, 0, 1, 0, 2, 2, 0, 0]
    labels = [[1, 1, 2, 0], [0, 0, 0, 0]]
    is_valid = [[True] * 4, [True, False, False, False]]
    metrics = evaluate(
        lambda logits, labels, is_valid: box_head.box_metrics(logits, box_head.RoIs(None, labels, None, is_valid)),
        np.eye(3)[predicted],
        np.int64(labels),
        is_valid,
    )
    expected = {
        "num_rois": 2.5,
        "num_foreground": 1.5,
        "accuracy": 2 / 5,
        "foreground_accuracy": 1 / 3,
        "missed": 1 / 3,
    }
    assert metrics == pytest.approx(expected)


# ----------------------------------------------------------------------------------------------------------- detections


def detect(probabilities, boxes, is_valid, image_shape, **options):
    """(boxes, scores, labels, image_index)"""
    options = {**dict(score_threshold=0.05, nms_threshold=0.5, max_per_image=100), **options}
    return evaluate(
        lambda *arrays: box_head.detect(*arrays, **options)[:4],
        np.float32(probabilities),
        np.float32(boxes),
        is_valid,
        np.int32(image_shape),
    )


def slow_detections(probabilities, boxes, is_valid, shape, *, score_threshold, nms_threshold, max_per_image):
    """One image's (score, label, box), best first: class by class."""
    found = []
    for label in range(1, probabilities.shape[1]):
        clipped = np_boxes.clip(boxes[:, min(label, boxes.shape[1]) - 1], *shape)
        scores = probabilities[:, label]
        large = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
        rows = np.flatnonzero(is_valid & large & (scores > np.float32(score_threshold)))
        found += [
            (scores[rows[i]], label, clipped[rows[i]]) for i in greedy_nms(clipped[rows], scores[rows], nms_threshold)
        ]
    return sorted(found, key=lambda detection: -detection[0])[:max_per_image]


@pytest.mark.parametrize("options", [{}, {"max_per_image": 7}, {"score_threshold": 0.4, "nms_threshold": 0.2}])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_detections_equal_a_loop_over_classes(class_agnostic, options):
    """The last image has nothing valid; some boxes lie outside their image."""
    rng = np.random.default_rng(10)
    logits = rng.normal(0, 2, (3, 40, 4))
    probabilities = (np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)).astype(np.float32)
    boxes = random_boxes(rng, 3, 40, 1 if class_agnostic else 3, low=-30, high=80)
    is_valid = rng.random((3, 40)) < [[0.9], [0.5], [0]]
    shapes = [[60, 70], [50, 90], [80, 80]]
    found = detect(probabilities, boxes, is_valid, shapes, **options)
    options = {**dict(score_threshold=0.05, nms_threshold=0.5, max_per_image=100), **options}
    expected = [slow_detections(*x, **options) for x in zip(probabilities, boxes, is_valid, shapes)]
    assert len(expected[0]) > 5 and not expected[2]
    assert found[3].tolist() == [n for n in range(3) for _ in expected[n]]
    flat = [detection for of_image in expected for detection in of_image]
    np.testing.assert_array_equal(found[1], [score for score, _, _ in flat])
    assert found[2].tolist() == [label for _, label, _ in flat]
    np.testing.assert_array_equal(found[0], [box for _, _, box in flat])


def test_a_score_at_the_threshold_is_no_detection():
    boxes = [[[[0, 0, 5, 5]], [[10, 0, 15, 5]], [[20, 0, 25, 5]]]]
    probabilities = [[[0.5, 0.5], [0.4999, 0.5001], [0.75, 0.25]]]
    found = detect(probabilities, boxes, np.ones((1, 3), bool), [[50, 50]], score_threshold=0.5)
    assert found[0].tolist() == [[10, 0, 15, 5]]


def test_the_limit_counts_all_classes_together():
    """Two boxes of each of two classes; the best three are kept, whatever their class. The same box may be both."""
    boxes = [[[[0, 0, 5, 5]], [[10, 0, 15, 5]]]]
    probabilities = [[[0.1, 0.5, 0.4], [0.65, 0.05, 0.3]]]
    found = detect(probabilities, boxes, np.ones((1, 2), bool), [[50, 50]], score_threshold=0.01, max_per_image=3)
    assert found[2].tolist() == [1, 2, 2]
    assert found[0][:, 0].tolist() == [0, 0, 10]


def test_background_and_empty_boxes_are_no_detections():
    boxes = [[[[0, 0, 5, 5]], [[60, 0, 65, 5]], [[7, 7, 7, 9]]]]
    probabilities = [[[0.99, 0.01], [0.1, 0.9], [0.1, 0.9]]]
    found = detect(probabilities, boxes, np.ones((1, 3), bool), [[50, 50]])
    assert [x.shape for x in found] == [(0, 4), (0,), (0,), (0,)]
    assert [x.dtype for x in found] == [np.float32, np.float32, np.int64, np.int32]


def test_no_proposals_make_no_detections():
    found = detect(np.zeros((2, 0, 3)), np.zeros((2, 0, 2, 4)), np.zeros((2, 0), bool), [[50, 50]] * 2)
    assert [x.shape for x in found] == [(0, 4), (0,), (0,), (0,)]


@pytest.mark.parametrize("gpu", [False, True])
def test_an_image_with_numbers_that_are_not_finite_gets_a_score_of_nan(gpu):
    """After its detections, with label 1 and an empty box: not the look of an image without objects."""
    boxes = np.float32([[[[0, 0, 10, 10]], [[20, 20, 40, 40]]]] * 4)
    probabilities = np.float32([[[0.1, 0.2, 0.7], [0.1, 0.8, 0.1]], [[1, 0, 0]] * 2, [[1, 0, 0]] * 2, [[1, 0, 0]] * 2])
    options = dict(score_threshold=0.15, nms_threshold=0.5, max_per_image=5)
    arrays = (
        probabilities,
        boxes,
        np.ones((4, 2), bool),
        np.int32([[50, 50]] * 4),
        np.array([False, True, False, True]),
    )
    with device.building_for(gpu=gpu):
        boxes, scores, labels, image_index = evaluate(
            lambda *x: box_head.detect(*x[:4], is_finite=x[4], **options)[:4], *arrays
        )
    np.testing.assert_array_equal(image_index, [0, 0, 0, 0, 2])
    np.testing.assert_array_equal(scores, np.float32([0.8, 0.7, 0.2, np.nan, np.nan]))
    np.testing.assert_array_equal(labels, [1, 2, 1, 1, 1])
    np.testing.assert_array_equal(boxes[3:], np.zeros((2, 4)))
