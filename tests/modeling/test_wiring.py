"""Which setting reaches which part: settings that all differ, and the arguments that the parts get from them."""

import collections
import functools
import math
import re

import helpers
import numpy as np
import pytest
import tensorflow as tf
from graphs import SMALL, configure
from tensorpack.compat import tfv1
from tensorpack.tfutils.tower import TowerContext

from modeling import box_head, box_ops, cascade, mask_head, rcnn, roi_align, rpn

DISTINCT = [
    *("RPN.POSITIVE_ANCHOR_THRESH=0.71", "RPN.NEGATIVE_ANCHOR_THRESH=0.31", "RPN.CROWD_OVERLAP_THRESH=0.91"),
    *(
        "RPN.BATCH_PER_IM=61",
        "RPN.FG_RATIO=0.41",
        "RPN.PROPOSAL_NMS_THRESH=0.66",
        "RPN.MIN_SIZE=0.6",
        "RPN.HEAD_DIM=24",
    ),
    *("RPN.TRAIN_PER_LEVEL_NMS_TOPK=62", "RPN.TEST_PER_LEVEL_NMS_TOPK=52"),
    *(
        "RPN.TRAIN_PRE_NMS_TOPK=73",
        "RPN.TRAIN_POST_NMS_TOPK=63",
        "RPN.TEST_PRE_NMS_TOPK=74",
        "RPN.TEST_POST_NMS_TOPK=64",
    ),
    *("FRCNN.FG_THRESH=0.55", "FRCNN.BATCH_PER_IM=33", "FRCNN.FG_RATIO=0.3", "FRCNN.BBOX_REG_WEIGHTS=[9.,9.,4.,4.]"),
    *("CASCADE.IOUS=[0.51,0.62,0.73]", "CASCADE.BBOX_REG_WEIGHTS=[[1.,1.,1.,1.],[2.,2.,2.,2.],[3.,3.,3.,3.]]"),
    *("TEST.RESULT_SCORE_THRESH=0.07", "TEST.FRCNN_NMS_THRESH=0.44", "TEST.RESULTS_PER_IM=17"),
    *("TEST.SOFT_NMS=linear", "TEST.SOFT_NMS_SIGMA=0.35", "PREPROC.MAX_SIZE=1001"),
]
PARTS = {
    rpn: ["rpn_head", "rpn_head_at", "make_anchors", "anchor_targets", "rpn_losses", "propose"],
    box_ops: ["sample", "decode"],
    roi_align: ["roi_align"],
    box_head: ["sample_rois", "label_rois", "box_losses", "detect", "box_outputs"],
    cascade: ["cascade", "scale_gradient"],
    mask_head: ["mask_head"],
}


@functools.cache
def build(*overrides, training):
    """Builds a graph of DISTINCT with further settings: what the parts were called with, (args, options) by name."""
    calls = collections.defaultdict(list)
    mode = () if "MODE_FPN=False" in overrides else ("MODE_FPN=True",)
    settings = configure(*SMALL, *DISTINCT, *mode, *overrides, num_category=5)
    specs = rcnn.input_signature(settings, training=training)
    with pytest.MonkeyPatch.context() as patch:
        for module, names in PARTS.items():
            for name in names:
                patch.setattr(module, name, _spy(getattr(module, name), calls[name]))
        with tf.Graph().as_default(), TowerContext("", is_training=training):
            inputs = {s.name: tfv1.placeholder(s.dtype, s.shape, s.name) for s in specs}
            (rcnn.build_training if training else rcnn.build_inference)(settings, **inputs)
    return calls


def _spy(function, calls):
    def called(*args, **options):
        calls.append((args, options))
        return function(*args, **options)

    return called


def options_of(calls, name, *keywords):
    """The values of keywords in each call of a part."""
    return [tuple(options[keyword] for keyword in keywords) for _, options in calls[name]]


def test_settings_of_the_rpn():
    calls = build(training=True)
    overlaps = options_of(calls, "anchor_targets", "foreground_iou", "background_iou", "crowd_overlap")
    assert overlaps == [(0.71, 0.31, 0.91)]
    assert (61, 0.41) in options_of(calls, "sample", "size", "foreground_ratio")
    assert options_of(calls, "rpn_losses", "batch_per_image") == [(61,)]
    assert options_of(calls, "rpn_head", "channels", "num_anchors")[0] == (16, 3)
    assert options_of(calls, "rpn_head_at", "channels", "num_anchors") == [(16, 3)]
    ((strides,),) = options_of(calls, "make_anchors", "strides")
    assert strides.tolist() == [[4], [8], [16], [32], [64]]


def test_settings_of_the_heads_in_training():
    calls = build(training=True)
    rois = options_of(calls, "sample_rois", "foreground_iou", "batch_per_image", "foreground_ratio")
    assert rois == [(0.55, 33, 0.3)]
    assert (33, 0.3) in options_of(calls, "sample", "size", "foreground_ratio")
    assert options_of(calls, "box_losses", "weights") == [((9, 9, 4, 4),)]
    assert options_of(calls, "box_outputs", "num_classes", "class_agnostic") == [(5, False)]
    masks = options_of(calls, "mask_head", "num_convs", "channels", "num_classes", "norm")
    assert masks == [(4, 16, 5, "None")]
    assert options_of(calls, "roi_align", "resolution") == [(7,)] * 4 + [(14,)] * 4  # each on four levels


LEVEL, JOINT, C4 = [], ["FPN.PROPOSAL_MODE=Joint"], ["MODE_FPN=False"]


@pytest.mark.parametrize(
    ("overrides", "training", "groups", "before", "after"),
    [
        *[(LEVEL, True, 5, 62, 62), (LEVEL, False, 5, 52, 52)],
        *[(JOINT, True, 1, 73, 63), (JOINT, False, 1, 74, 64)],
        *[(C4, True, 1, 73, 63), (C4, False, 1, 74, 64)],
    ],
)
def test_settings_of_the_proposals(overrides, training, groups, before, after):
    calls = build(*overrides, training=training)
    keywords = "pre_nms_topk", "post_nms_topk", "nms_threshold", "min_size"
    assert options_of(calls, "propose", *keywords) == [(before, after, 0.66, 0.6)]
    ((_, options),) = calls["propose"]
    assert len(options["groups"]) == groups


@pytest.mark.parametrize(
    ("overrides", "largest"),
    [([], 1024), (["MODE_FPN=False"], 1001), (["CONVENTIONS=torchvision"], 1000), (["CONVENTIONS=detectron2"], 1000)],
)
def test_boxes_grow_to_the_largest_image_at_most(overrides, largest):
    """FPN pads images to multiples of 32; torchvision and Detectron2 have a limit of their own (`BBOX_XFORM_CLIP`)."""
    calls = build(*overrides, training=False)
    assert options_of(calls, "propose", "max_log_size") == [(pytest.approx(math.log(largest / 16)),)]
    own = [options for _, options in calls["decode"] if "weights" in options]
    assert [(x["weights"], x["max_log_size"]) for x in own] == [((9, 9, 4, 4), pytest.approx(math.log(largest / 16)))]


def test_settings_of_detections():
    calls = build(training=False)
    keywords = "score_threshold", "nms_threshold", "max_per_image", "soft_nms", "soft_nms_sigma"
    assert options_of(calls, "detect", *keywords) == [(0.07, 0.44, 17, "linear", 0.35)]


def test_settings_of_a_cascade():
    calls = build("FPN.CASCADE=True", training=True)
    assert options_of(calls, "label_rois", "foreground_iou") == [(0.55,), (0.62,), (0.73,)]  # first the sampled ones
    weights = tuple((stage,) * 4 for stage in (1.0, 2.0, 3.0))
    assert options_of(calls, "cascade", "weights", "max_log_size") == [(weights, pytest.approx(math.log(64)))]
    assert [options["weights"] for _, options in calls["box_losses"]] == list(weights)
    assert options_of(calls, "box_outputs", "num_classes", "class_agnostic") == [(5, True)] * 3
    assert [args[1] for args, _ in calls["scale_gradient"]] == [pytest.approx(1 / 3)] * 3


def test_a_cascade_samples_its_first_stage_at_the_threshold_of_a_single_one():
    assert options_of(build("FPN.CASCADE=True", training=True), "sample_rois", "foreground_iou") == [(0.55,)]


def test_settings_of_c4():
    calls = build("MODE_FPN=False", training=True)
    assert options_of(calls, "rpn_head_at", "channels", "num_anchors") == [(24, 15)]
    ((strides,),) = options_of(calls, "make_anchors", "strides")
    assert strides.tolist() == [[16]]
    assert options_of(calls, "roi_align", "resolution") == [(14,)]
    assert options_of(calls, "mask_head", "num_convs", "norm") == [(0, "None")]


@pytest.mark.parametrize(
    ("conventions", "half_pixel", "adaptive", "norm_first"),
    [("tensorpack", True, False, False), ("torchvision", False, False, True), ("detectron2", True, True, True)],
)
def test_conventions_of_targets(conventions, half_pixel, adaptive, norm_first):
    calls = build(f"CONVENTIONS={conventions}", training=True)
    is_other = conventions != "tensorpack"
    assert options_of(calls, "anchor_targets", "best_first", "across_border") == [(is_other, is_other)]


@pytest.mark.parametrize(
    ("conventions", "half_pixel", "adaptive", "norm_first"),
    [("tensorpack", True, False, False), ("torchvision", False, False, True), ("detectron2", True, True, True)],
)
def test_conventions(conventions, half_pixel, adaptive, norm_first):
    calls = build(f"CONVENTIONS={conventions}", training=False)
    assert set(options_of(calls, "roi_align", "half_pixel", "adaptive")) == {(half_pixel, adaptive)}
    assert options_of(calls, "mask_head", "norm_first") == [(norm_first,)]
    bases = [options["base_anchors"] for _, options in calls["make_anchors"]]
    is_rounded = all((base == np.round(base)).all() for base in bases)
    assert is_rounded is (conventions == "torchvision")


def test_fitted_anchors_share_the_image_among_the_cells():
    """torchvision's AnchorGenerator: the padded image's height and width, each divided by the map's."""
    maps = [np.zeros((1, *size, 1)) for size in ((24, 40), (12, 20), (6, 10), (3, 5), (2, 3))]
    found = helpers.evaluate(lambda *x: rcnn._fitted_distances(x, (4, 8, 16, 32, 64)), *maps)
    expected = [[160 // w, 96 // h, 160 // w, 96 // h] for h, w in ((24, 40), (12, 20), (6, 10), (3, 5), (2, 3))]
    np.testing.assert_array_equal(found, expected)


def _he_fan_out(*shape):
    return math.sqrt(2 / math.prod((*shape[:-2], shape[-1])))


def _fan_in(*shape):
    return math.sqrt(1 / math.prod(shape[:-1]))


BATCH_NORM = (
    *("MODE_FPN=True", "BACKBONE.NORM=SyncBN", "FPN.NORM=SyncBN", "RPN.NUM_CONVS=2"),
    *("FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_bn_head", "FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_bn_head"),
)

DEVIATIONS = {
    r"(conv0|group\d/.*)/W": _he_fan_out,
    r"fpn/.*/W": _fan_in,
    r"rpn/(conv\d|class|box)/W": lambda *_: 0.01,
    r"(fast|cascade_)rcnn.*/conv\d/W": _he_fan_out,
    r"(fast|cascade_)rcnn.*/fc\d?/W": _fan_in,
    r"(fast|cascade_)rcnn.*/class/W": lambda *_: 0.01,
    r"(fast|cascade_)rcnn.*/box/W": lambda *_: 0.001,
    r"maskrcnn/(fcn\d|deconv)/W": _he_fan_out,
    r"maskrcnn/conv/W": lambda *_: 0.001,
    r"group.*/conv3/bn/gamma": lambda *_: 0.0,  # a block starts as its shortcut
}


@pytest.mark.parametrize(
    "overrides",
    [
        ("MODE_FPN=True",),
        ("MODE_FPN=True", "FPN.CASCADE=True", "FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_head"),
        ("MODE_FPN=False", "RPN.ANCHOR_SIZES=[16,32,64]"),
        BATCH_NORM,
    ],
)
def test_spread_of_the_initial_kernels_of_each_part(overrides):
    settings = configure(*SMALL, "BACKBONE.WIDTH=16", "FPN.NUM_CHANNEL=64", "MRCNN.HEAD_DIM=64", *overrides)
    specs = rcnn.input_signature(settings, training=True)
    with tf.Graph().as_default(), tfv1.Session() as session, TowerContext("", is_training=True):
        tfv1.set_random_seed(5)
        rcnn.build_training(settings, **{s.name: tfv1.placeholder(s.dtype, s.shape) for s in specs})
        session.run(tfv1.global_variables_initializer())
        values = session.run({v.op.name: v for v in tfv1.global_variables()})
    kernels = {name: value for name, value in values.items() if re.search(r"/W$|group.*conv3/bn/gamma$", name)}
    assert len(kernels) > 20
    for name, value in kernels.items():
        (expected,) = {f(*value.shape) for pattern, f in DEVIATIONS.items() if re.fullmatch(pattern, name)}
        assert np.sqrt(np.mean(value.astype(float) ** 2)) == pytest.approx(expected, rel=0.2), name
