"""The region proposal network against loops in NumPy, written from the rules, and cases worked by hand."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import convolve, decode, encode, evaluate, greedy_nms, random_boxes, relu, variables

from common import boxes as np_boxes
from modeling import box_ops, rpn

tfv1 = tf.compat.v1

BASE_ANCHORS = np_boxes.base_anchors([16], [0.5, 1, 2])
RULES = dict(foreground_iou=0.5, background_iou=0.25, crowd_overlap=1.0)


# ----------------------------------------------------------------------------------------------------- head and anchors


@pytest.mark.parametrize("hidden_layers", [("conv0",), ("conv0", "conv1")])
def test_head_is_shared_and_ordered_by_row_column_and_kind(hidden_layers):
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(2, *size, 4)).astype(np.float32) for size in ((3, 5), (2, 2))]

    def build(*maps):
        outputs = rpn.rpn_head(maps, channels=6, num_anchors=3, num_convs=len(hidden_layers))
        trained = {variable.op.name for variable in tfv1.trainable_variables()}
        assert trained == {f"rpn/{layer}/{name}" for layer in (*hidden_layers, "class", "box") for name in "Wb"}
        return outputs, variables()

    (logits, deltas), values = evaluate(build, *maps, random_variables=rng)
    cuts = [3 * 5 * 3]
    for x, level_logits, level_deltas in zip(maps, np.split(logits, cuts, axis=1), np.split(deltas, cuts, axis=1)):
        hidden = x
        for name in hidden_layers:
            kernel, bias = values[f"rpn/{name}/W"], values[f"rpn/{name}/b"]
            hidden = relu(convolve(hidden, kernel, bias=bias, before=1, after=1))
        kinds = convolve(hidden, values["rpn/class/W"], bias=values["rpn/class/b"])
        sides = convolve(hidden, values["rpn/box/W"], bias=values["rpn/box/b"])
        places = [(row, column, kind) for row in range(x.shape[1]) for column in range(x.shape[2]) for kind in range(3)]
        expected = np.array([[kinds[(n, *place)] for place in places] for n in range(2)])
        np.testing.assert_allclose(level_logits, expected, rtol=1e-4, atol=1e-4)
        expected = np.array([[sides[n, i, j, 4 * k : 4 * k + 4] for i, j, k in places] for n in range(2)])
        np.testing.assert_allclose(level_deltas, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_convs", [1, 2, 3])
def test_head_at_some_anchors_is_the_head_and_has_its_gradient(num_convs):
    """Each anchor of three maps, corners and all, some twice and some not at all, against the head on whole maps."""
    rng = np.random.default_rng(1)
    maps = [rng.normal(size=(2, *size, 4)).astype(np.float32) for size in ((3, 5), (2, 2), (1, 1))]
    index = rng.permuted(np.tile(np.arange(60), (2, 2)), axis=1)[:, :90].astype(np.int32)
    weights = [rng.normal(size=(2, 90, *sides)).astype(np.float32) for sides in ((), (4,))]

    def build(index, *maps):
        def gradients(outputs):
            loss = tf.add_n([tf.reduce_sum(x * w) for x, w in zip(outputs, weights)])
            return [tf.convert_to_tensor(x) for x in tf.gradients(loss, [*maps, *tfv1.trainable_variables()])]

        options = dict(channels=6, num_anchors=3, num_convs=num_convs)
        whole = [tf.gather(x, index, batch_dims=1) for x in rpn.rpn_head(maps, **options)]
        picked = rpn.rpn_head_at(maps, index, **options)
        return (picked, gradients(picked)), (whole, gradients(whole))

    (picked, gradients), (whole, expected) = evaluate(build, index, *maps, random_variables=rng)
    assert len(expected) == 3 + 4 + 2 * num_convs
    for x, y in zip([*picked, *gradients], [*whole, *expected]):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def make_anchors(sizes, valid_cells, *, strides, base_anchors=BASE_ANCHORS):
    """sizes: [L, 2]. valid_cells: [N, L, 2]."""
    return rpn.Anchors(
        *evaluate(
            lambda cells, *maps: rpn.make_anchors(
                maps, cells, strides=strides, base_anchors=np.broadcast_to(base_anchors, [len(sizes), 3, 4])
            ),
            np.float32(valid_cells),
            *[np.zeros((len(valid_cells), *size, 1), np.float32) for size in sizes],
        )
    )


@pytest.mark.parametrize("strides", [[[8], [20]], [[8, 6, 8, 6], [20, 18, 20, 18]]])
def test_anchors_lie_on_the_corners_of_the_cells(strides):
    """Of two levels, with a stride for both directions or for each; the second image has padding."""
    bases = np.stack([BASE_ANCHORS, 2 * BASE_ANCHORS])
    sizes, valid_cells = [(3, 4), (1, 2)], [[(3, 4), (1, 2)], [(2, 3), (1, 1)]]
    anchors = make_anchors(sizes, valid_cells, strides=np.array(strides), base_anchors=bases)
    expected, is_valid = [], []
    for level, (height, width) in enumerate(sizes):
        x_stride, y_stride = strides[level][0], strides[level][-1 if len(strides[level]) == 1 else 1]
        for row, column in np.ndindex(height, width):
            for x1, y1, x2, y2 in bases[level]:
                x, y = x_stride * column, y_stride * row
                expected.append([x + x1, y + y1, x + x2, y + y2])
                is_valid.append([row < rows and column < columns for rows, columns in np.array(valid_cells)[:, level]])
    np.testing.assert_allclose(anchors.boxes, expected, rtol=1e-6)
    np.testing.assert_array_equal(anchors.is_valid.T, is_valid)
    assert anchors.sizes == [3 * 4 * 3, 1 * 2 * 3]


def test_identities_of_a_wide_map_differ():
    """More cells than 2^8 in a row and in a column."""
    anchors = make_anchors([[300, 2], [2, 300]], np.zeros((1, 2, 2)), strides=[[4], [8]])
    assert len(np.unique(anchors.identity)) == len(anchors.identity) == 2 * 600 * 3


def test_identity_of_an_anchor_is_its_own_whatever_the_size_of_the_map():
    small, large = (make_anchors([size] * 5, [[size] * 5], strides=np.full([5, 1], 8)) for size in ((2, 3), (4, 5)))
    assert len(np.unique(large.identity)) == len(large.identity) == 5 * 4 * 5 * 3
    boxes, identities = (x.reshape(5, 4 * 5 * 3, -1) for x in (large.boxes, large.identity))
    known = [{tuple(box): i for box, (i,) in zip(*of_level)} for of_level in zip(boxes, identities)]
    levels = np.repeat(range(5), 2 * 3 * 3)
    assert [known[level][tuple(box)] for level, box in zip(levels, small.boxes)] == small.identity.tolist()


# -------------------------------------------------------------------------------------------------------------- targets


def anchor_targets(anchors, image_shape, gt_boxes, gt_labels, *, is_valid=None, **rules):
    anchors = np.float32(anchors)
    is_valid = np.ones((len(gt_boxes), len(anchors)), bool) if is_valid is None else is_valid
    return rpn.AnchorTargets(
        *evaluate(
            lambda *arrays: rpn.anchor_targets(*arrays, **{**RULES, **rules}),
            anchors,
            is_valid,
            np.int32(image_shape),
            np.float32(gt_boxes),
            np.int64(gt_labels),
        )
    )


def slow_targets(anchors, is_valid, shape, gt_boxes, gt_labels, *, foreground_iou, background_iou, crowd_overlap):
    """One image's labels (1, 0, and -1 for neither) and matches, in the order of the reference's rules."""
    labels, match = np.full(len(anchors), -1), np.zeros(len(anchors), int)
    inside = [x1 >= 0 and y1 >= 0 and x2 <= shape[1] and y2 <= shape[0] for x1, y1, x2, y2 in anchors]
    candidates, objects = np.flatnonzero(is_valid & inside), np.flatnonzero(gt_labels > 0)
    if len(objects) == 0:
        labels[candidates] = 0
    else:
        iou = np_boxes.pairwise_iou(anchors[candidates], gt_boxes[objects])
        for of_object in iou.T:
            labels[candidates[of_object == of_object.max()]] = 1
        labels[candidates[iou.max(axis=1) >= np.float32(foreground_iou)]] = 1
        labels[candidates[iou.max(axis=1) < np.float32(background_iou)]] = 0
        match[candidates] = objects[iou.argmax(axis=1)]
    for anchor in candidates:
        for crowd in gt_boxes[gt_labels < 0]:
            corners = np.maximum(anchors[anchor, :2], crowd[:2]), np.minimum(anchors[anchor, 2:], crowd[2:])
            covered = np.prod(np.maximum(corners[1] - corners[0], 0)) / np.prod(
                anchors[anchor, 2:] - anchors[anchor, :2]
            )
            if covered > crowd_overlap:
                labels[anchor] = -1
    return labels, match


def grid_anchors(rows, columns, stride=8):
    places = np.stack(np.mgrid[:columns, :rows][::-1], axis=-1).reshape(-1, 2) * stride
    return np.concatenate([BASE_ANCHORS + np.tile(place, 2) for place in places]).astype(np.float32)


@pytest.mark.parametrize("crowd_overlap", [1.0, 0.6])
@pytest.mark.parametrize(("snap", "at_a_time"), [(1, 32), (4, 32), (4, 4)])
def test_targets_equal_the_rules(snap, at_a_time, crowd_overlap, monkeypatch):
    """Boxes on a coarse grid (`snap`) tie. The last image has no objects, the one before it nothing but crowds."""
    monkeypatch.setattr(rpn, "OBJECTS", at_a_time)
    rng = np.random.default_rng(1)
    anchors = grid_anchors(9, 11)
    images = 14
    gt_boxes = (random_boxes(rng, images, 6, high=64, size=20) / snap).round() * snap + [0, 0, snap, snap]
    gt_labels = rng.choice([1, 2, 3, 0, -1], (images, 6), p=[0.3, 0.2, 0.2, 0.2, 0.1])
    gt_labels[-2:] = [[-1] * 6, [0] * 6]
    gt_boxes[gt_labels == 0] = 0
    image_shape = rng.integers(50, 90, (images, 2))
    is_valid = rng.random((images, len(anchors))) < 0.9
    rules = {**RULES, "crowd_overlap": crowd_overlap}
    targets = anchor_targets(anchors, image_shape, gt_boxes, gt_labels, is_valid=is_valid, **rules)
    counts = np.zeros(3, int)
    for n in range(images):
        labels, match = slow_targets(
            anchors, is_valid[n], image_shape[n], gt_boxes[n].astype(np.float32), gt_labels[n], **rules
        )
        np.testing.assert_array_equal(targets.is_foreground[n], labels == 1)
        np.testing.assert_array_equal(targets.is_background[n], labels == 0)
        np.testing.assert_array_equal(targets.gt_index[n][labels == 1], match[labels == 1])
        counts += [np.sum(labels == label) for label in (1, 0, -1)]
    assert counts.min() > 50
    assert not targets.is_foreground[-2:].any() and targets.is_background[-1].any()


def labels_of(targets, image=0):
    """A letter per anchor: foreground, background, or neither."""
    return "".join(
        "FB-"[0 if f else 1 if b else 2] for f, b in zip(targets.is_foreground[image], targets.is_background[image])
    )


def test_thresholds_by_hand():
    """IoU 1, 0.5, 0.375, 0.25, 0.125: foreground from 0.5, background below 0.25."""
    anchors = [[0, 0, 8, 8], [0, 0, 8, 4], [0, 0, 8, 3], [0, 0, 8, 2], [0, 0, 8, 1]]
    assert labels_of(anchor_targets(anchors, [[50, 50]], [[[0, 0, 8, 8]]], [[1]])) == "FF--B"


def test_the_best_anchors_of_an_object_are_foreground_unless_they_are_background():
    anchors = [[0, 0, 8, 8], [4, 0, 12, 8], [8, 0, 16, 8], [30, 30, 40, 40], [36, 30, 46, 40]]
    between = [2, 0, 18, 8]  # overlaps the second and the third by 0.5 each, and 0.5 is below the threshold here
    tiny = [31, 31, 33, 33]  # overlaps the fourth by 0.04 and no other
    targets = anchor_targets(anchors, [[50, 50]], [[between, tiny]], [[1, 1]], foreground_iou=0.7)
    assert labels_of(targets) == "-FFBB"


def test_the_best_anchors_of_an_object_are_foreground_first_in_other_frameworks():
    """As Matcher of Detectron2 and torchvision with low-quality matches; nothing is the best of no overlap."""
    anchors = [[0, 0, 8, 8], [4, 0, 12, 8], [8, 0, 16, 8], [30, 30, 40, 40], [36, 30, 46, 40]]
    between, tiny, outside = [2, 0, 18, 8], [31, 31, 33, 33], [60, 60, 61, 61]
    rules = dict(foreground_iou=0.7, best_first=True)
    targets = anchor_targets(anchors, [[50, 50]], [[between, tiny, outside]], [[1, 1, 1]], **rules)
    assert labels_of(targets) == "-FFFB"
    assert targets.gt_index[0, 3] == 1


def test_anchors_across_the_border_take_part_in_other_frameworks():
    anchors = [[0, 0, 8, 8], [-4, 0, 4, 8], [46, 46, 54, 54], [60, 60, 68, 68]]
    gt_boxes, gt_labels = [[[0, 0, 8, 8]]], [[1]]
    is_valid = np.array([[True, True, True, False]])
    assert labels_of(anchor_targets(anchors, [[50, 50]], gt_boxes, gt_labels, is_valid=is_valid)) == "F---"
    targets = anchor_targets(anchors, [[50, 50]], gt_boxes, gt_labels, is_valid=is_valid, across_border=True)
    assert labels_of(targets) == "F-B-"


def test_an_anchor_goes_to_the_first_of_the_objects_that_it_overlaps_most():
    anchors = [[0, 0, 8, 8], [8, 0, 16, 8]]
    gt_boxes = [[[0, 0, 0, 0], [0, 0, 8, 6], [0, 2, 8, 8], [8, 0, 16, 7], [8, 0, 16, 8]]]
    targets = anchor_targets(anchors, [[50, 50]], gt_boxes, [[0, 1, 2, 3, 4]])
    assert targets.gt_index.tolist() == [[1, 4]]


def test_of_many_equal_objects_the_first_one_counts():
    """More than are compared at a time: the same box again, in other parts of the list."""
    count = 2 * rpn.OBJECTS + 5
    gt_boxes = np.full((1, count, 4), [50.0, 50, 60, 60])
    gt_boxes[0, [3, rpn.OBJECTS + 1, count - 1]] = [0, 0, 8, 8]
    targets = anchor_targets([[0, 0, 8, 8], [50, 50, 60, 60]], [[99, 99]], gt_boxes, np.ones((1, count)))
    assert targets.gt_index.tolist() == [[3, 0]] and targets.is_foreground.all()


def test_a_share_in_a_crowd_at_the_threshold_is_no_reason_to_ignore():
    """Half of the anchor, exactly."""
    gt_boxes, gt_labels = [[[0, 0, 4, 8], [90, 90, 99, 99]]], [[-1, 1]]
    for threshold, expected in ((0.5, "B"), (0.49, "-")):
        targets = anchor_targets([[0, 0, 8, 8]], [[99, 99]], gt_boxes, gt_labels, crowd_overlap=threshold)
        assert labels_of(targets) == expected


def test_only_anchors_entirely_inside_their_image_take_part():
    anchors = [[0, 0, 10, 8], [-0.1, 0, 9, 8], [0, -0.1, 9, 8], [0, 0, 10.1, 8], [0, 0, 9, 8.1]]
    targets = anchor_targets(anchors, [[8, 10], [50, 50]], [[[0, 0, 10, 8]]] * 2, [[1]] * 2)
    assert [labels_of(targets, image) for image in range(2)] == ["F----", "F--FF"]


def test_anchors_in_the_padding_of_the_batch_take_no_part():
    anchors = [[0, 0, 8, 8], [1, 0, 9, 8], [20, 20, 28, 28]]
    is_valid = np.array([[False, True, False]])
    assert labels_of(anchor_targets(anchors, [[50, 50]], [[[0, 0, 8, 8]]], [[1]], is_valid=is_valid)) == "-F-"


def test_crowds_take_anchors_out_only_where_the_rule_is_on():
    anchors = [[0, 0, 8, 8], [20, 0, 28, 8], [20, 3, 28, 11], [40, 40, 48, 48]]
    gt_boxes, gt_labels = [[[0, 0, 8, 8], [0, 0, 30, 8]]], [[1, -1]]
    assert labels_of(anchor_targets(anchors, [[50, 50]], gt_boxes, gt_labels)) == "FBBB"
    assert labels_of(anchor_targets(anchors, [[50, 50]], gt_boxes, gt_labels, crowd_overlap=0.7)) == "--BB"


# --------------------------------------------------------------------------------------------------------------- losses


def random_training_case(rng, images=2, count=40):
    """Logits, deltas, anchors, targets, objects and random keys of what there is to sample from."""
    kind = rng.choice(3, (images, count), p=[0.5, 0.2, 0.3])
    return [
        rng.normal(0, 3, (images, count)).astype(np.float32),
        rng.normal(0, 0.3, (images, count, 4)).astype(np.float32),
        random_boxes(rng, count),
        rpn.AnchorTargets(kind == 1, kind == 2, rng.integers(0, 3, (images, count)).astype(np.int32)),
        random_boxes(rng, images, 3),
        rng.random((images, count)).astype(np.float32),
    ]


def run_losses(case, *, batch_per_image=256, foreground_ratio=0.5):
    """The losses, their gradients by logits and deltas, and the sample."""
    logits, deltas, anchors, targets, gt_boxes, keys = case

    def build(logits, deltas, anchors, gt_boxes, keys, *targets):
        targets = rpn.AnchorTargets(*targets)
        sizes = dict(size=batch_per_image, foreground_ratio=foreground_ratio)
        picked = box_ops.sample(targets.is_foreground, targets.is_background, keys, **sizes)
        outputs = [tf.gather(x, picked.index, batch_dims=1) for x in (logits, deltas)]
        losses = rpn.rpn_losses(*outputs, anchors, targets.gt_index, gt_boxes, picked, batch_per_image=batch_per_image)
        losses = {name.split("/")[-1]: loss for name, loss in losses.items()}
        return losses, tf.gradients(sum(losses.values()), [logits, deltas]), picked

    return evaluate(build, logits, deltas, anchors, gt_boxes, keys, *targets)


def slow_losses(case, image, foreground, background, batch_per_image):
    """One image's losses on given samples."""
    logits, deltas, anchors, targets, gt_boxes, _ = case
    logits, deltas = np.float64(logits[image]), np.float64(deltas[image])
    label_loss = np.log1p(np.exp(-logits[foreground])).sum() + np.log1p(np.exp(logits[background])).sum()
    box_loss = 0
    for i in foreground:
        for error in np.abs(deltas[i] - encode(gt_boxes[image, targets.gt_index[image, i]], anchors[i])):
            box_loss += error**2 / 2 * 9 if error < 1 / 9 else error - 0.5 / 9
    return {"label_loss": label_loss / batch_per_image, "box_loss": box_loss / batch_per_image}


def test_huber_by_hand():
    x = [0, 0.1, -0.1, 0.5, 2, -3]
    np.testing.assert_allclose(
        evaluate(lambda x: rpn.huber(x, 0.5), x), [0, 0.005, 0.005, 0.125, 0.875, 1.375], rtol=1e-6
    )


def test_losses_of_all_candidates_are_sums_over_the_setting():
    """The sample is larger than what there is: everything counts, divided by the setting. A batch is the mean."""
    case = random_training_case(np.random.default_rng(2))
    targets = case[3]
    losses, _, picked = run_losses(case)
    expected = [
        slow_losses(case, n, np.flatnonzero(targets.is_foreground[n]), np.flatnonzero(targets.is_background[n]), 256)
        for n in range(2)
    ]
    assert picked.index.shape == (2, 40)
    for name, loss in losses.items():
        np.testing.assert_allclose(loss, np.mean([of_image[name] for of_image in expected]), rtol=1e-4)


def test_losses_of_a_sample():
    case = random_training_case(np.random.default_rng(3))
    losses, (by_logits, by_deltas), picked = run_losses(case, batch_per_image=10, foreground_ratio=0.4)
    expected, touched = [], np.zeros((2, 40), bool)
    for n in range(2):
        index, is_foreground = picked.index[n], picked.is_foreground[n]
        assert (is_foreground.sum(), picked.is_valid[n].sum()) == (4, 10)
        expected.append(slow_losses(case, n, index[is_foreground], index[~is_foreground], 10))
        touched[n, index] = True
    for name, loss in losses.items():
        np.testing.assert_allclose(loss, np.mean([of_image[name] for of_image in expected]), rtol=1e-4)
    np.testing.assert_array_equal(by_logits != 0, touched)
    np.testing.assert_array_equal(by_deltas.any(axis=2), touched & case[3].is_foreground)


def test_losses_of_a_batch_are_the_mean_of_its_images_losses():
    case = random_training_case(np.random.default_rng(4), images=3)
    together, _, _ = run_losses(case, batch_per_image=10)
    alone = []
    for n in range(3):
        logits, deltas, anchors, targets, gt_boxes, keys = case
        one = slice(n, n + 1)
        image = [
            logits[one],
            deltas[one],
            anchors,
            rpn.AnchorTargets(*(x[one] for x in targets)),
            gt_boxes[one],
            keys[one],
        ]
        alone.append(run_losses(image, batch_per_image=10)[0])
    for name, loss in together.items():
        np.testing.assert_allclose(loss, np.mean([losses[name] for losses in alone]), rtol=1e-5)


@pytest.mark.parametrize("background", [True, False])
def test_losses_without_foreground_are_finite(background):
    """Also where the boxes that stand in are padding, all zero."""
    case = random_training_case(np.random.default_rng(5))
    none = np.zeros((2, 40), bool)
    case[3] = case[3]._replace(is_foreground=none, is_background=none | background)
    case[4] = np.zeros((2, 3, 4), np.float32)
    losses, gradients, _ = run_losses(case)
    assert losses["box_loss"] == 0 and (losses["label_loss"] > 0) == background
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[1].any() and gradients[0].any() == background


def test_metrics_by_hand():
    """Picked: 1 of 2 foreground found, 1 of 2 background right; and a slot that is unused. The other image has none."""
    logits = [[2, -1, 3, -4, 9.0], [1, 1, 1, 1, 1.0]]
    index = np.zeros((2, 5))
    is_foreground = [[True, True, False, False, False], [False] * 5]
    is_valid = [[True, True, True, True, False], [False] * 5]
    metrics = evaluate(
        lambda logits, *sample: rpn.rpn_metrics(logits, box_ops.Sample(*sample)),
        logits,
        np.int32(index),
        is_foreground,
        is_valid,
    )
    assert metrics == {"rpn/num_foreground": 1, "rpn/accuracy": 0.5, "rpn/recall": 0.5}


# ------------------------------------------------------------------------------------------------------------ proposals


OPTIONS = dict(pre_nms_topk=20, post_nms_topk=20, nms_threshold=0.5, min_size=0.0, max_log_size=2.0)


def propose(logits, deltas, boxes, is_valid, image_shape, **options):
    """Of groups: each argument but the last is a list of arrays."""
    groups = [x.shape[1] for x in logits]

    def build(image_shape, logits, deltas, boxes, is_valid):
        anchors = rpn.Anchors(boxes, None, is_valid, groups)
        return rpn.propose(logits, deltas, anchors, image_shape, groups=groups, **{**OPTIONS, **options})

    joined = [np.concatenate(x, axis=axis) for x, axis in zip((logits, deltas, boxes, is_valid), (1, 1, 0, 1))]
    return evaluate(build, np.int32(image_shape), *joined)


def slow_proposals(
    logits, deltas, boxes, is_valid, shape, *, pre_nms_topk, post_nms_topk, nms_threshold, min_size, max_log_size
):
    """One image's (logit, box), best first, over all groups."""
    found = []
    for group_logits, group_deltas, anchors, valid in zip(logits, deltas, boxes, is_valid):
        order = [i for i in np.argsort(-group_logits) if valid[i]][:pre_nms_topk]
        decoded = [decode(group_deltas[i], anchors[i], max_log_size=max_log_size) for i in order]
        clipped = np_boxes.clip(np.float32(decoded), *shape)
        sides = clipped[:, 2:] - clipped[:, :2]
        large = np.flatnonzero((sides > min_size).all(axis=1))
        kept = greedy_nms(clipped[large], group_logits[order][large], nms_threshold)[:post_nms_topk]
        found += [(group_logits[order][large][i], clipped[large][i]) for i in kept]
    return sorted(found, key=lambda proposal: -proposal[0])[:post_nms_topk]


def random_proposal_case(rng, sizes, *, mean_logit):
    image_shape = [[70, 90], [50, 100]]
    logits = [rng.normal(mean_logit, 3, (2, size)).astype(np.float32) for size in sizes]
    deltas = [rng.normal(0, 0.7, (2, size, 4)).astype(np.float32) for size in sizes]
    boxes = [random_boxes(rng, size, low=-20, high=90) for size in sizes]
    is_valid = [rng.random((2, size)) < 0.9 for size in sizes]
    return logits, deltas, boxes, is_valid, image_shape


@pytest.mark.parametrize("mean_logit", [9, -9])
@pytest.mark.parametrize(
    "sizes, options, count",
    [
        ([60, 24, 6], {}, 20),
        ([60, 24, 6], {"min_size": 12.0}, 20),
        ([60], {"pre_nms_topk": 40, "post_nms_topk": 10}, 10),
        ([12, 5], {"pre_nms_topk": 100, "post_nms_topk": 100}, 24),
    ],
)
def test_proposals_equal_a_loop(sizes, options, count, mean_logit):
    rng = np.random.default_rng(6)
    case = random_proposal_case(rng, sizes, mean_logit=mean_logit)
    boxes, logits, is_valid = propose(*case, **options)
    assert boxes.shape == (2, count, 4) and logits.shape == is_valid.shape == (2, count)
    *per_group, anchors, valid, image_shape = case
    for n in range(2):
        expected = slow_proposals(
            *[[group[n] for group in groups] for groups in per_group],
            anchors,
            [group[n] for group in valid],
            image_shape[n],
            **{**OPTIONS, **options},
        )
        assert is_valid[n].tolist() == [i < len(expected) for i in range(count)]
        np.testing.assert_array_equal(logits[n][is_valid[n]], [logit for logit, _ in expected])
        np.testing.assert_allclose(boxes[n][is_valid[n]], [box for _, box in expected], rtol=1e-4, atol=1e-3)
        assert not boxes[n][~is_valid[n]].any()


def test_proposals_compete_only_within_their_group():
    """Two equal boxes: one is suppressed within a group, both stay in two groups."""
    logits, deltas, boxes = np.float32([[2, 1]]), np.zeros((1, 2, 4), np.float32), np.float32([[5, 5, 15, 15]] * 2)
    valid = np.ones((1, 2), bool)
    together = propose([logits], [deltas], [boxes], [valid], [[50, 50]])
    halves = [np.split(x, 2, axis=-1) for x in (logits, valid)]
    apart = propose(halves[0], np.split(deltas, 2, axis=1), np.split(boxes, 2), halves[1], [[50, 50]])
    assert together[2].tolist() == [[True, False]]
    assert (apart[1].tolist(), apart[2].tolist()) == ([[2, 1]], [[True, True]])


def test_what_is_not_finite_is_not_proposed():
    deltas = np.zeros((1, 4, 4), np.float32)
    deltas[0, 0, 2] = deltas[0, 1, 0] = np.nan
    deltas[0, 2, 1] = np.inf
    logits, boxes = np.float32([[4, 3, 2, 1]]), np.float32([[5, 5, 15, 15]] * 4)
    proposals = propose([logits], [deltas], [boxes], [np.ones((1, 4), bool)], [[50, 50]])
    assert proposals[2].tolist() == [[True, False, False, False]]
    assert proposals[1][0, 0] == 1 and np.isfinite(proposals[0]).all()


def test_no_valid_anchor_makes_no_proposal():
    logits, deltas, boxes, is_valid, image_shape = random_proposal_case(np.random.default_rng(7), [9, 4], mean_logit=0)
    proposals = propose(logits, deltas, boxes, [valid & False for valid in is_valid], image_shape)
    assert not proposals[2].any() and not proposals[0].any()


def test_proposals_carry_no_gradient():
    def build(logits, deltas, boxes):
        anchors = rpn.Anchors(boxes, None, tf.ones_like(logits, tf.bool), [1])
        proposals = rpn.propose(logits, deltas, anchors, tf.constant([[50, 50]]), groups=[1], **OPTIONS)
        assert tf.gradients([proposals.boxes, proposals.logits], [logits, deltas]) == [None, None]
        return proposals.is_valid

    assert evaluate(build, [[1.0]], np.zeros((1, 1, 4)), [[5, 5, 15, 15.0]]).all()


def test_proposals_of_low_logits_keep_their_rank():
    """Nearly all logits of a trained RPN are far below 0, where TensorFlow's op takes boxes for empty places."""
    boxes = np.array([[[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [40, 40, 50, 50]]], np.float32)
    logits = np.array([[-5, -6, -7, -200]], np.float32)
    found_boxes, found_logits, is_valid = evaluate(
        lambda boxes, logits: rpn._suppress_and_rank(boxes, logits, groups=1, nms_threshold=0.5, keep=4, strips=2),
        boxes,
        logits,
    )
    assert found_boxes.tolist() == [[[0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50], [0, 0, 0, 0]]]
    assert found_logits[0, :3].tolist() == [-5, -7, -200]
    assert is_valid.tolist() == [[True, True, True, False]]
