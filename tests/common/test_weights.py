"""Reading and matching weights, and loading them into a model."""

import os
import pickle

import numpy as np
import pytest
import tensorflow as tf
from tensorpack.compat import tfv1

from common import checkpoint, weights


def test_cut_off_data_file(run):
    data_file = run / "model-500.data-00000-of-00001"
    data_file.write_bytes(data_file.read_bytes()[:10])
    with pytest.raises(checkpoint.CheckpointMismatch, match="model-500 can't be read"):
        weights.read(run / "model-500")


def test_npz_with_and_without_the_zoo_s_suffix(tmp_path):
    np.savez(tmp_path / "zoo.npz", **{"conv0/W:0": np.ones(3), "conv0/bn/gamma": np.ones(2), "global_step": np.ones(1)})
    assert sorted(weights.read(checkpoint.resolve(tmp_path / "zoo.npz"))) == ["conv0/W", "conv0/bn/gamma"]


class Payload:
    """Makes a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_npz_is_never_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "shown")))
    assert (tmp_path / "shown").exists()
    np.savez(tmp_path / "evil.npz", **{"conv0/W": np.array([Payload(tmp_path / "victim")], object)})
    with pytest.raises(checkpoint.CheckpointMismatch, match="can't be read"):
        weights.read(tmp_path / "evil.npz")
    assert not (tmp_path / "victim").exists()


def test_npz_that_is_no_archive(tmp_path):
    for content in (b"", b"hello", b"PK\x03\x04 cut off"):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(checkpoint.CheckpointMismatch, match="can't be read"):
            weights.read(checkpoint.resolve(tmp_path / "broken.npz"))


SHAPES = {"conv0/W": [2, 3], "fpn/lateral_1x1_c2/b": [4], "fastrcnn/outputs/class/W": [5, 81], "maskrcnn/conv/b": [80]}


def values(**changes):
    """A file's content: that of SHAPES, with changes (None: left out)."""
    shapes = {**SHAPES, **{name.replace("__", "/"): shape for name, shape in changes.items()}}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if shape is not None}


def test_match_and_report():
    content = values(conv0__W=[3, 2], maskrcnn__conv__b=None, linear__W=[7])
    matched = weights.match(content, SHAPES)
    assert matched == (
        ["fastrcnn/outputs/class/W", "fpn/lateral_1x1_c2/b"],
        ["conv0/W"],
        ["maskrcnn/conv/b"],
        ["linear/W"],
    )
    lines = weights.report("file.npz", content, SHAPES, matched)
    assert lines[0] == "file.npz: 2 loaded, 1 mismatched, 1 absent, 1 unused"
    assert [line.split(None, 1) for line in lines[1:]] == [
        ["conv0/W", "shape [3, 2] in the file, [2, 3] in the model"],  # same size: still never reshaped
        ["maskrcnn/conv/b", "absent in the file"],
        ["linear/W", "unused: not in the model"],
    ]


@pytest.mark.parametrize(
    ("check", "content", "message"),
    [
        (weights.check_complete, values(), None),
        (weights.check_complete, values(conv0__W=None), "1 absent, first conv0/W"),
        (weights.check_complete, values(conv0__W=[3, 2]), "1 other shapes"),
        (weights.check_complete, {"other/W": np.zeros(1)}, "holds no variable of this model"),
        (weights.check_complete, values(maskrcnn__conv__b=[9], conv0__W=None), "1 other shapes, 1 absent, first mask"),
        (weights.check_complete, {"conv0/W": np.zeros([2, 3])}, "BACKBONE.WEIGHTS"),
        (weights.check_finetune, values(fastrcnn__outputs__class__W=[5, 3], maskrcnn__conv__b=[2]), None),
        (weights.check_finetune, values(conv0__W=[3, 2]), "another model: 1 variables don't fit, first conv0/W"),
        (weights.check_finetune, values(maskrcnn__conv__b=None), "first maskrcnn/conv/b"),
        (weights.check_finetune, {"conv0/W": np.zeros([2, 3])}, "BACKBONE.WEIGHTS"),
        (weights.check_finetune, {"other/W": np.zeros(1)}, "holds no variable of this model"),
        (weights.check_finetune, values(other__W=[1]), None),
        (weights.check_backbone, {"conv0/W": np.zeros([2, 3]), "linear/W": np.zeros(9)}, None),
        (weights.check_backbone, {"conv0/W": np.zeros([3, 2])}, "first conv0/W"),
        (weights.check_backbone, {"conv0/W": np.zeros([2, 3]), "other/W": np.zeros(1)}, "too many, first other/W"),
        (weights.check_backbone, {"conv0/W": np.zeros([2, 3]), "linear2/W": np.zeros(9)}, "too many, first linear2/W"),
    ],
)
def test_what_fits_which_purpose(check, content, message):
    matched = weights.match(content, SHAPES)
    if message is None:
        check("file.npz", matched, {"conv0/W"})
        return
    with pytest.raises(checkpoint.CheckpointMismatch, match=message) as error:
        check("file.npz", matched, {"conv0/W"})
    assert error.value.exit_code == 5


def test_the_report_names_twenty_variables_and_counts_the_rest():
    for num_absent, num_lines in ((20, 21), (21, 22), (30, 22)):
        shapes = {f"layer{number:02}/W": [1] for number in range(num_absent)}
        lines = weights.report("file.npz", {}, shapes, weights.match({}, shapes))
        assert len(lines) == num_lines
        assert lines[20].split() == ["layer19/W", "absent", "in", "the", "file"]
        assert lines[21:] == ([f"  ... and {num_absent - 20} more"] if num_absent > 20 else [])


def test_a_model_that_is_a_backbone_alone_is_complete():
    shapes = {"conv0/W": [2, 3], "conv1/W": [4]}
    matched = weights.match({name: np.zeros(shape) for name, shape in shapes.items()}, shapes)
    weights.check_complete("file.npz", matched, set(shapes))
    weights.check_finetune("file.npz", matched, set(shapes))


@pytest.mark.parametrize(
    ("name", "depends"),
    [
        *((f"{layer}/{part}", True) for layer in ("fastrcnn/class", "fastrcnn/box") for part in "Wb"),
        *((f"{layer}/W", True) for layer in ("fastrcnn/outputs/box", "cascade_rcnn_stage3/outputs/class")),
        *(("maskrcnn/conv/W", True), ("maskrcnn/conv/b", True), ("maskrcnn/deconv/W", False), ("rpn/class/W", False)),
        *(("fastrcnn/fc6/W", False), ("my/fastrcnn/class/W", False), ("fastrcnn/class/W/x", False)),
        *(("cascade_rcnn_stage/outputs/class/W", False), ("maskrcnn/conv/gamma", False), ("rpn/conv0/W", False)),
    ],
)
def test_which_layers_may_differ_in_fine_tuning(name, depends):
    matched = weights.match({name: np.zeros(3), "other": np.zeros(1)}, {name: [4], "other": [1]})
    assert matched.mismatched == [name]
    if depends:
        weights.check_finetune("file.npz", matched, set())
    else:
        with pytest.raises(checkpoint.CheckpointMismatch, match=f"1 variables don't fit, first {name};"):
            weights.check_finetune("file.npz", matched, set())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"stem/kernel": [2, 3], "scale": [4]}, None),
        ({"stem/kernel": [2, 3], "scale": [4], "linear/b": [9]}, None),
        ({"stem/kernel": [2, 3]}, "1 backbone variables don't fit, first scale"),
        ({"scale": [4]}, "1 backbone variables don't fit, first stem/kernel"),
        ({}, "2 backbone variables don't fit, first scale"),
        ({"stem/kernel": [3, 2], "scale": [4]}, "1 backbone variables don't fit, first stem/kernel"),
        ({"stem/kernel": [2, 3], "scale": [4], "conv0/W": [2, 3]}, "holds 1 variables too many, first conv0/W"),
    ],
)
def test_a_backbone_may_have_any_names(content, message):
    shapes = {"stem/kernel": [2, 3], "scale": [4], "head/kernel": [5]}
    matched = weights.match({name: np.zeros(shape) for name, shape in content.items()}, shapes)
    if message is None:
        weights.check_backbone("file.npz", matched, {"stem/kernel", "scale"})
        return
    with pytest.raises(checkpoint.CheckpointMismatch, match=message):
        weights.check_backbone("file.npz", matched, {"stem/kernel", "scale"})


@pytest.mark.parametrize("check", [weights.check_complete, weights.check_finetune])
def test_a_backbone_of_any_names_is_no_detector(check):
    matched = weights.match({"scale": np.zeros(4)}, {"scale": [4], "head/kernel": [5]})
    with pytest.raises(checkpoint.CheckpointMismatch, match=r"a backbone, no detector.*BACKBONE\.WEIGHTS"):
        check("file.npz", matched, {"scale"})


def model_variable(name, shape, *collections):
    """A variable of zeros that belongs to the network, and to other collections of the graph."""
    collections = [tfv1.GraphKeys.GLOBAL_VARIABLES, weights.MODEL_VARIABLES, *collections]
    return tfv1.get_variable(name, shape, initializer=tf.zeros_initializer(), collections=collections)


def test_load_gives_the_variables_their_values(tmp_path):
    np.savez(tmp_path / "zoo.npz", **{"conv0/W:0": np.arange(6, dtype=np.float64).reshape(2, 3)})
    with tf.Graph().as_default(), tfv1.Session() as session:
        weight = model_variable("conv0/W", [2, 3])
        other = tfv1.get_variable("conv0/W/Momentum", [2, 3], initializer=tf.zeros_initializer())
        session.run(tfv1.global_variables_initializer())
        matched, lines = weights.load(tmp_path / "zoo.npz", session, check=weights.check_complete)
        np.testing.assert_array_equal(session.run(weight), np.arange(6).reshape(2, 3))
        assert not session.run(other).any()
    assert matched.loaded == ["conv0/W"]
    assert len(lines) == 1


def test_resuming_takes_the_newest_checkpoint(resumable):
    snapshot = weights.newest_readable(resumable)
    assert (snapshot.path, snapshot.step, snapshot.state) == (resumable / "model-500", 500, {"step": 500})
    assert sorted(snapshot.values) == ["conv0/W", "conv0/W/Momentum", "learning_rate"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "no index", "no state"])
def test_resuming_falls_back_to_the_checkpoint_before(resumable, damage, caplog):
    data_file = resumable / "model-500.data-00000-of-00001"
    content = data_file.read_bytes()
    if damage == "cut":
        data_file.write_bytes(content[:-1])
    elif damage == "flipped":
        data_file.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])
    else:
        (resumable / f"model-500.{'index' if damage == 'no index' else 'json'}").unlink()
    assert weights.newest_readable(resumable).step == 90
    if damage != "no index":
        assert "model-500 can't be read" in caplog.text


def test_resuming_from_nothing_but_damaged_checkpoints_is_an_error(resumable):
    for path in resumable.glob("*.data-*"):
        path.write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointMismatch, match="no checkpoint in .* can be read"):
        weights.newest_readable(resumable)


def test_restore_gives_all_variables_their_values_and_types(tmp_path):
    values = {"conv0/W": np.ones([2, 3], np.float32), "global_step": np.int64(2**40)}
    snapshot = weights.Snapshot(tmp_path / "model-7", 7, values, {})
    with tf.Graph().as_default(), tfv1.Session() as session:
        weight = tfv1.get_variable("conv0/W", [2, 3], initializer=tf.zeros_initializer())
        step = tfv1.get_variable("global_step", [], tf.int64, initializer=tf.zeros_initializer())
        weights.restore(snapshot, session)
        np.testing.assert_array_equal(session.run(weight), values["conv0/W"])
        assert session.run(step) == 2**40
        tfv1.get_variable("conv0/W/Momentum", [2, 3], initializer=tf.zeros_initializer())
        with pytest.raises(checkpoint.CheckpointMismatch, match="1 variables don't fit, first conv0/W/Momentum"):
            weights.restore(snapshot, session)


@pytest.mark.parametrize("changed", [{"conv0/W": np.ones([3, 2], np.float32)}, {"conv0/b": np.ones(2, np.float32)}])
def test_restore_refuses_other_shapes_and_excess_variables(tmp_path, changed):
    snapshot = weights.Snapshot(tmp_path / "model-7", 7, {"conv0/W": np.ones([2, 3], np.float32)} | changed, {})
    with tf.Graph().as_default(), tfv1.Session() as session:
        tfv1.get_variable("conv0/W", [2, 3], initializer=tf.zeros_initializer())
        message = f"model-7 is of another model or optimizer: 1 variables don't fit, first {next(iter(changed))}"
        with pytest.raises(checkpoint.CheckpointMismatch, match=message) as error:
            weights.restore(snapshot, session)
    assert error.value.exit_code == 5


def test_variables_made_of_one_tensor_get_values_of_their_own(tmp_path):
    np.savez(tmp_path / "zoo.npz", a=np.full(2, 1.0), b=np.full(2, 2.0), c=np.full(2, 3.0))
    with tf.Graph().as_default(), tfv1.Session() as session:
        zeros = tf.zeros([2])
        variables = {name: tfv1.get_variable(name, initializer=zeros) for name in "abc"}
        for variable in variables.values():
            tfv1.add_to_collection(weights.MODEL_VARIABLES, variable)
        weights.load(tmp_path / "zoo.npz", session, check=weights.check_complete)
        found = session.run(variables)
    assert {name: value.tolist() for name, value in found.items()} == {"a": [1, 1], "b": [2, 2], "c": [3, 3]}


def test_a_model_s_own_names_are_read_from_any_file(tmp_path):
    """Without the list that a run writes: a name that looks like training state, but is a variable of this model."""
    values = {"EMA/thing": np.ones(2), "conv": np.ones(3), "conv/gain": np.ones(3), "global_step": np.ones(())}
    np.savez(tmp_path / "zoo.npz", **values)
    with tf.Graph().as_default(), tfv1.Session() as session:
        for name in ("EMA/thing", "conv", "conv/gain"):
            model_variable(name, list(values[name].shape))
        matched, _ = weights.load(tmp_path / "zoo.npz", session, check=weights.check_complete)
    assert matched == (["EMA/thing", "conv", "conv/gain"], [], [], [])


def test_weights_that_are_not_finite_are_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", **{"conv0/W:0": np.full([2, 3], np.nan)})
    with tf.Graph().as_default(), tfv1.Session() as session:
        model_variable("conv0/W", [2, 3])
        with pytest.raises(checkpoint.CheckpointMismatch, match="not finite: 1 variables, first conv0/W"):
            weights.load(tmp_path / "bad.npz", session, check=weights.check_complete)
        np.savez(tmp_path / "good.npz", **{"conv0/W": np.ones([2, 3]), "unused": np.full(3, np.inf)})
        weights.load(tmp_path / "good.npz", session, check=weights.check_complete)


# ---------------------------------------------------------------- variables of any name

MODEL = {"stem/kernel": [2, 3], "scale": [4], "scale/inner": [1]}  # the last one is no slot: it has another shape
TRAINING_STATE = (
    *("global_step", "learning_rate", "loss_scale", "loss_scale_good_steps", "accumulated_steps", "EMA/total_cost"),
    *("stem/kernel/Momentum", "stem/kernel/Accumulated", "scale/Momentum", "scale/Accumulated"),
)


def training_state(name):
    """A value of the shape of the variable that it belongs to, or a scalar."""
    return np.full(MODEL.get(name.rpartition("/")[0], []), 7, np.float32)


@pytest.fixture(params=["noted beside", "not noted"])
def trained(request, tmp_path):
    """The checkpoint of a run with a network of MODEL, each of its variables full of its number of dimensions."""

    def write(prefix):
        with tf.Graph().as_default(), tfv1.Session() as session:
            for name, shape in MODEL.items():
                tfv1.get_variable(name, initializer=np.full(shape, len(shape), np.float32))
            for name in TRAINING_STATE:
                tfv1.get_variable(name, initializer=training_state(name))
            session.run(tfv1.global_variables_initializer())
            tfv1.train.Saver().save(session, prefix, write_meta_graph=False, write_state=False)

    state = {weights.STATE_KEY: list(MODEL)} if request.param == "noted beside" else {}
    return checkpoint.save(write, tmp_path, 12, state)


def test_of_a_run_the_network_s_variables_are_read_whatever_their_names(trained):
    values = weights.read(trained)
    assert sorted(values) == sorted(MODEL)
    np.testing.assert_array_equal(values["scale"], np.ones(4))
    np.testing.assert_array_equal(values["stem/kernel"], np.full([2, 3], 2))


def test_variables_of_any_name_are_loaded_and_a_training_s_own_are_not(trained):
    with tf.Graph().as_default(), tfv1.Session() as session:
        of_model = [model_variable(name, shape) for name, shape in MODEL.items()]
        slot = tfv1.get_variable("scale/Momentum", [4], initializer=tf.zeros_initializer())
        session.run(tfv1.global_variables_initializer())
        matched, lines = weights.load(trained, session, check=weights.check_complete)
        kernel, scale, _, momentum = session.run([*of_model, slot])
    assert matched == (["scale", "scale/inner", "stem/kernel"], [], [], [])
    assert lines == [f"{trained}: 3 loaded, 0 mismatched, 0 absent, 0 unused"]
    assert (kernel == 2).all()
    assert (scale == 1).all()
    assert (momentum == 0).all()


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (weights.check_complete, "0 other shapes, 1 absent, first offset"),
        (weights.check_finetune, "1 variables don't fit, first offset"),
        (weights.check_backbone, "1 backbone variables don't fit, first offset"),
    ],
)
def test_a_variable_of_any_name_that_the_file_lacks_is_missed(trained, check, message):
    with tf.Graph().as_default(), tfv1.Session() as session:
        for name, shape in {**MODEL, "offset": [4]}.items():
            model_variable(name, shape, weights.BACKBONE_VARIABLES)
        model_variable("head/kernel", [5])
        np.savez(trained.parent / "head.npz", **weights.read(trained), **{"head/kernel": np.zeros(5)})
        path = trained if check is weights.check_backbone else trained.parent / "head.npz"
        with pytest.raises(checkpoint.CheckpointMismatch, match=message):
            weights.load(path, session, check=check)


def test_a_training_s_own_variables_are_left_out_of_an_npz_too(tmp_path):
    values = {name: np.zeros(shape) for name, shape in MODEL.items()}
    np.savez(
        tmp_path / "run.npz",
        **{f"{name}:0": x for name, x in values.items()},
        **{x: training_state(x) for x in TRAINING_STATE},
    )
    assert sorted(weights.read(tmp_path / "run.npz")) == sorted(MODEL)


def test_a_network_may_call_a_variable_like_a_training_s_own_where_the_run_notes_it(tmp_path):
    def write(prefix):
        with tf.Graph().as_default(), tfv1.Session() as session:
            for name in ("learning_rate", "scale", "scale/Momentum"):
                tfv1.get_variable(name, initializer=7.0)
            session.run(tfv1.global_variables_initializer())
            tfv1.train.Saver().save(session, prefix, write_meta_graph=False, write_state=False)

    path = checkpoint.save(write, tmp_path, 12, {weights.STATE_KEY: ["learning_rate", "scale"]})
    assert sorted(weights.read(path)) == ["learning_rate", "scale"]
