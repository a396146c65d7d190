"""Names, layouts and settings of other frameworks' models, without a network: against hand-worked cases."""

import numpy as np
import pytest

from zoo import coco, detectron2, keras, mapping, torchvision
from zoo.mapping import LINEAR, SAME, MappingError, Model, Pair


def test_names_of_backbones_by_their_first_3x3_convolution():
    """ResNeXt-32x4d has 32 groups of 4 channels in its first stage, 32x8d of 8, 64x4d 64 of 4."""
    for channels, width, name in (
        (64, 64, "resnet"),
        (128, 4, "resnext_32x4d"),
        (256, 8, "resnext_32x8d"),
        (256, 4, "resnext_64x4d"),
    ):
        assert mapping.bottleneck_name(64, (channels, width, 3, 3)) == name
    assert mapping.bottleneck_name(16, (32, 1, 3, 3)) == "resnext_32x4d"  # a quarter as wide
    assert mapping.bottleneck_name(64, (128, 128, 3, 3)) != "resnet"  # a wide ResNet is another network


def test_classes_in_another_order_and_without_counterpart():
    """Ours: background without a counterpart, then their classes 2 and 0; two outputs for each."""
    layout = mapping.per_class([-1, 2, 0], size=2, num_theirs=3, inner=SAME, empty=-100.0)
    ours = layout.to_ours(np.float32([1, 2, 3, 4, 5, 6]))
    assert ours.tolist() == [-100, -100, 5, 6, 1, 2]
    assert layout.to_theirs(np.float32([7, 7, 5, 6, 1, 2])).tolist() == [1, 2, -100, -100, 5, 6]
    kernel = np.arange(12, dtype=np.float32).reshape(6, 2)  # their outputs first
    found = mapping.per_class([-1, 2, 0], size=2, num_theirs=3).to_ours(kernel)
    assert found.tolist() == [[0, 0, 8, 10, 0, 2], [0, 0, 9, 11, 1, 3]]


def small_model(**options):
    return Model("a model", [Pair("a/W", "x.weight", LINEAR), Pair("a/b", "x.bias", SAME)], {}, **options)


THEIRS = {"x.weight": np.float64([[1, 2, 3], [4, 5, 6]]), "x.bias": np.float64([7, 8])}


def test_conversion_takes_what_it_needs_and_names_the_rest():
    extra = {"n": np.zeros(1), "z": np.zeros(1), "y": np.zeros(1)}
    model = small_model(ignored=frozenset(["n"]), added={"c": np.float32([9])})
    with pytest.raises(MappingError, match="but 2 arrays are left over, first y; --allow-leftover"):
        mapping.from_theirs(model, {**THEIRS, **extra})
    values, leftover = mapping.from_theirs(model, {**THEIRS, **extra}, allow_leftover=True)
    assert leftover == ["y", "z"]
    assert {name: (x.tolist(), x.dtype) for name, x in values.items()} == {
        "c": ([9], np.float32),
        "a/W": ([[1, 4], [2, 5], [3, 6]], np.float32),
        "a/b": ([7, 8], np.float32),
    }
    again = mapping.to_theirs(model, values)
    assert {name: x.tolist() for name, x in again.items()} == {name: x.tolist() for name, x in THEIRS.items()}


def test_what_is_missing_or_of_another_shape_is_named():
    with pytest.raises(MappingError, match="lacks 1 arrays, first x.bias"):
        mapping.from_theirs(small_model(), {"x.weight": THEIRS["x.weight"]})
    with pytest.raises(MappingError, match="lacks 1 variables, first a/b"):
        mapping.to_theirs(small_model(), {"a/W": np.zeros((3, 2))})
    with pytest.raises(MappingError, match="has no place for 1 variables, first b/W"):
        mapping.to_theirs(small_model(), {"a/W": np.zeros((3, 2)), "a/b": np.zeros(2), "b/W": np.zeros(2)})
    model = Model("a model", [Pair("a/W", "x.weight", mapping.per_class([0, 1], num_theirs=2))], {})
    with pytest.raises(MappingError, match=r"but x.weight has the shape \[3, 2\]"):
        mapping.from_theirs(model, {"x.weight": np.zeros((3, 2))})


# ------------------------------------------------------------------------------------------------- COCO's classes


def test_coco_has_80_classes_with_ids_up_to_90():
    """Pairs of name and id from the annotation files of COCO."""
    ids = dict(zip(coco.NAMES, coco.IDS))
    assert len(ids) == len(coco.NAMES) == len(coco.IDS) == 80
    known = {"person": 1, "fire hydrant": 11, "stop sign": 13, "umbrella": 28, "handbag": 31, "bottle": 44}
    known |= {"wine glass": 46, "potted plant": 64, "bed": 65, "dining table": 67, "toilet": 70, "tv": 72, "book": 84}
    known |= {"refrigerator": 82, "zebra": 24, "backpack": 27, "toothbrush": 90}
    assert {name: ids[name] for name in known} == known


def test_only_detectors_of_80_classes_get_cocos_names():
    assert coco.settings(80) == {"DATA.NUM_CATEGORY": 80, "DATA.CLASS_NAMES": ["BG", *coco.NAMES]}
    assert coco.settings(79) == {"DATA.NUM_CATEGORY": 79} and coco.settings(81) == {"DATA.NUM_CATEGORY": 81}


def test_slots_of_torchvisions_classes():
    assert torchvision.class_slots(91) == (0, *coco.IDS)
    assert torchvision.class_slots(91, all_slots=True) == tuple(range(91))
    assert torchvision.class_slots(90) == tuple(range(90)) and torchvision.class_slots(2) == (0, 1)


# --------------------------------------------------------------------------------------- what differs by the origin


@pytest.mark.parametrize(
    ("arrays", "backbone", "stride_1x1", "std", "is_rgb"),
    [
        ({"stem.conv1.norm.weight": 0, "res2_0_branch2a_w": 0}, "resnet", True, [1, 1, 1], False),
        ({"res2_0_branch2a_w": 0, "conv1_gn_s": 0}, "resnet", False, [1, 1, 1], False),
        ({"stem.conv1.norm.running_mean": 0}, "resnet", False, [58.395, 57.12, 57.375], True),
        ({"stem.conv1.norm.running_mean": 0}, "resnext_32x8d", False, [58.395, 57.12, 57.375], False),
    ],
)
def test_pixels_and_stride_of_detectron2s_zoo(arrays, backbone, stride_1x1, std, is_rgb):
    """As the model zoo's configurations have them."""
    settings, found_rgb, _ = detectron2._pixels(detectron2._Names(arrays, is_c4=None), backbone)
    assert settings == {
        "BACKBONE.STRIDE_1X1": stride_1x1,
        "PREPROC.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "PREPROC.PIXEL_STD": std,
    }
    assert found_rgb == is_rgb


def test_anchors_of_detectron2():
    assert detectron2._anchors({}) == {
        "RPN.ANCHOR_SIZES": [32, 64, 128, 256, 512],
        "RPN.ANCHOR_RATIOS": [0.5, 1.0, 2.0],
    }
    cells = np.float32([[-8, -4, 8, 4], [-4, -8, 4, 8]])  # width 16, height 8; and the other way round
    found = detectron2._anchors({"proposal_generator.anchor_generator.cell_anchors.0": cells})
    assert found == {"RPN.ANCHOR_SIZES": [11.314], "RPN.ANCHOR_RATIOS": [0.5, 2.0]}


def test_weights_of_detectron2s_boxes():
    assert detectron2._box_weights(False) == {"FRCNN.BBOX_REG_WEIGHTS": [10, 10, 5, 5]}
    expected = [[10, 10, 5, 5], [20, 20, 10, 10], [30, 30, 15, 15]]
    assert detectron2._box_weights(True) == {"CASCADE.BBOX_REG_WEIGHTS": expected}


def test_arrays_of_detectron2_that_are_no_weights():
    no_weights = ["pixel_mean", "pixel_std", "conv1_b", "a.num_batches_tracked", "conv1_w_momentum", "optimizer/lr"]
    no_weights += ["scheduler/step", "proposal_generator.anchor_generator.cell_anchors.0"]
    weights = ["conv1_w", "stem.conv1.norm.bias", "fc1000_b"]
    assert detectron2._no_weights(dict.fromkeys(no_weights + weights)) == set(no_weights)


def test_names_of_detectron():
    """As in ImageNetPretrained/MSRA/R-50.pkl and FAIR's with GroupNorm."""
    names = detectron2._Names({"res2_0_branch2a_w": 0}, is_c4=None)
    group = detectron2._Names({"res2_0_branch2a_w": 0, "res2_0_branch2a_gn_s": 0}, is_c4=None)
    for found, expected in (
        (names.in_file("stem.conv1.weight"), "conv1_w"),
        (names.in_file("stem.conv1.norm.weight"), "res_conv1_bn_s"),
        (group.in_file("stem.conv1.norm.bias"), "conv1_gn_b"),
        (names.in_file("res2.0.conv1.norm.bias"), "res2_0_branch2a_bn_b"),
        (names.in_file("res5.2.conv3.weight"), "res5_2_branch2c_w"),
        (group.in_file("res3.1.conv2.norm.weight"), "res3_1_branch2b_gn_s"),
        (names.in_file("res4.0.shortcut.weight"), "res4_0_branch1_w"),
        (names.in_file("res4.0.shortcut.norm.weight"), "res4_0_branch1_bn_s"),
    ):
        assert found == expected


def test_names_of_keras():
    for name, expected in (
        ("conv1_bn/0", ("conv1_bn", "gamma")),
        ("conv1_bn/3", ("conv1_bn", "moving_variance")),
        ("conv1_conv/1", ("conv1_conv", "bias")),
        ("conv1_conv/2", ("conv1_conv", "2")),
        ("model_weights/conv1_bn/conv1_bn/beta", ("conv1_bn", "beta")),
    ):
        assert keras._layer_and_leaf(name) == expected


def test_settings_of_torchvisions_detectors():
    """Defaults of torchvision: anchors, box weights, ImageNet's statistics on a scale of 255."""
    heads = torchvision.Heads.of(lambda ours, theirs: False)
    settings = torchvision.detector_settings("resnet", [3, 4, 6, 3], heads, epsilon=0.0)
    statistics = {"PREPROC.PIXEL_MEAN": (0.485, 0.456, 0.406), "PREPROC.PIXEL_STD": (0.229, 0.224, 0.225)}
    for key, values in statistics.items():
        np.testing.assert_allclose(settings.pop(key), 255 * np.array(values), rtol=1e-9)
    assert settings == {
        "CONVENTIONS": "torchvision",
        "PREPROC.ANTIALIAS": False,
        "MODE_FPN": True,
        "MODE_MASK": False,
        "FPN.CASCADE": False,
        "FPN.NORM": "None",
        "FPN.FRCNN_HEAD_FUNC": "fastrcnn_2fc_head",
        "FPN.MRCNN_HEAD_FUNC": "maskrcnn_up4conv_head",
        "RPN.NUM_CONVS": 1,
        "BACKBONE.NAME": "resnet",
        "BACKBONE.RESNET_NUM_BLOCKS": [3, 4, 6, 3],
        "BACKBONE.STRIDE_1X1": False,
        "BACKBONE.TF_PAD_MODE": False,
        "BACKBONE.NORM_EPSILON": 0.0,
        "RPN.ANCHOR_SIZES": [32, 64, 128, 256, 512],
        "RPN.ANCHOR_RATIOS": [0.5, 1.0, 2.0],
        "FRCNN.BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0],
    }
