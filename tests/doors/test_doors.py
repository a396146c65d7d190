"""Other people's code: every example of docs/extending.md and docs/custom_data.md, used from a folder outside.

One training uses all of them at once; then a prediction, an evaluation and a look inside load its run.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow as tf
from helpers import evaluate, random_boxes

from common import weights
from common.checkpoint import resolve
from config import Config
from dataset import augment, shapes

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ["my_backbone", "my_loss", "my_transform", "my_formats", "my_optimizer", "my_metric", "my_logger"]
SETTINGS = """
    MODE_FPN=True BACKBONE.NAME=plain_convnext BACKBONE.WIDTH=4 BACKBONE.FREEZE_AT=1 FPN.NUM_CHANNEL=8
    FPN.FRCNN_FC_HEAD_DIM=8 MRCNN.HEAD_DIM=8 PREPROC.TRAIN_SHORT_EDGE_SIZE=64 PREPROC.TEST_SHORT_EDGE_SIZE=64
    PREPROC.MAX_SIZE=64 RPN.ANCHOR_SIZES=[8,16,32,48,64] RPN.BATCH_PER_IM=16 FRCNN.BATCH_PER_IM=16
    RPN.TRAIN_PER_LEVEL_NMS_TOPK=30 RPN.TEST_PER_LEVEL_NMS_TOPK=30 TEST.RESULT_SCORE_THRESH=0.0
    TRAIN.BATCH_SIZE_PER_GPU=2 DATA.NUM_WORKERS=1 TRAIN.LR_SCHEDULE=[4,8] TRAIN.STEPS_PER_EPOCH=8 TRAIN.WARMUP=0
    TRAIN.EVAL_PERIOD=0 MODE_MASK=False DATA.TRAIN=my_csv_train DATA.VAL=my_csv_train
    FRCNN.BOX_LOSS=diou PREPROC.TRANSFORMS=[rotate] TRAIN.OPTIMIZER=adam TEST.METRICS=[AR]
    TRAIN.LOGGERS=[tensorboard,lines]
"""


def examples():
    """{file name: code} of the pages."""
    page = (ROOT / "docs" / "extending.md").read_text()
    found = dict(re.findall(r"^`(my_\w+\.py)`:\n\n```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    (code,) = re.findall(r"```python\n(import csv.*?)```", (ROOT / "docs" / "custom_data.md").read_text(), re.DOTALL)
    return {**found, "my_formats.py": code}


def run(folder, program, *arguments, **variables):
    """Runs a program of the project in a folder, as a user outside the repository does."""
    command = [sys.executable, *([str(ROOT / program)] if program.endswith(".py") else ["-m", program]), *arguments]
    environment = {**os.environ, **({} if program.endswith(".py") else {"PYTHONPATH": str(ROOT)}), **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder with the modules of the pages, and data in CSV."""
    folder = tmp_path_factory.mktemp("outside")
    for name, code in examples().items():
        (folder / name).write_text(code)
    shapes.generate(folder / "shapes", train=12, val=1, size=64)
    content = json.loads((folder / "shapes" / "annotations" / "instances_shapes_train.json").read_text())
    images = {image["id"]: image for image in content["images"]}
    classes = {category["id"]: category["name"] for category in content["categories"]}
    rows = [
        (images[each["image_id"]]["file_name"], 64, 64, classes[each["category_id"]], *each["bbox"])
        for each in content["annotations"]
    ]
    data = folder / "data"
    data.mkdir()
    (data / "train.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    (folder / "shapes" / "shapes_train").rename(data / "images")
    return folder


@pytest.fixture(scope="module")
def trained(outside):
    """The run that used them all."""
    config = ["--config", *SETTINGS.split(), f"DATA.BASEDIR={outside / 'data'}"]
    result = run(outside, "train.py", "--logdir", "run", "--plugins", *PLUGINS, *config)
    assert result.returncode == 0, result.stderr[-3000:]
    return outside / "run"


@pytest.fixture
def plugin(outside, monkeypatch):
    """Imports a module of the page, and forgets it with its registrations afterwards."""
    monkeypatch.syspath_prepend(str(outside))
    from evaluation.metrics import OTHER_METRICS
    from modeling.box_head import BOX_LOSSES

    tables = (augment.TRANSFORMS, OTHER_METRICS, BOX_LOSSES)
    before = [dict(table) for table in tables]
    yield __import__
    for name in PLUGINS:
        sys.modules.pop(name, None)
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


def test_every_door_has_an_example():
    assert sorted(examples()) == sorted(f"{name}.py" for name in PLUGINS)


@pytest.mark.slow
def test_the_run_notes_its_plugins(trained):
    assert json.loads((trained / "config.json").read_text())["PLUGINS"] == PLUGINS


@pytest.mark.slow
def test_backbone_of_other_names_is_saved_whole(trained):
    values = weights.read(resolve(trained))
    names = {name for name in values if name.startswith("stage")}
    assert len(names) == 4 * 8
    assert {"stage0/downsample/kernel", "stage3/depthwise", "stage2/layer_scale", "stage1/narrow/shift"} <= names
    assert not any("Adam" in name or name in ("global_step", "learning_rate") for name in values)


@pytest.mark.slow
def test_frozen_stage_keeps_its_weights_and_others_move(trained):
    values = weights.read(resolve(trained))
    np.testing.assert_array_equal(values["stage0/layer_scale"], np.full(4, 1e-6, np.float32))
    assert np.abs(values["stage1/layer_scale"] - 1e-6).max() > 0


@pytest.mark.slow
def test_optimizer_has_its_slots(trained):
    reader = tf.train.load_checkpoint(str(resolve(trained)))
    names = reader.get_variable_to_shape_map()
    assert "stage1/depthwise/Adam" in names and "stage0/depthwise/Adam" not in names
    assert not any(name.endswith("/Momentum") for name in names)


@pytest.mark.slow
def test_metric_and_logger_receive_values(trained):
    rows = [json.loads(line) for line in (trained / "values.jsonl").read_text().splitlines()]
    logged = {name: value for row in rows for name, value in row.items()}
    stats = json.loads((trained / "stats.json").read_text())[-1]
    name = "my_csv_train-AR(bbox)"
    assert logged[name] == pytest.approx(stats[name]) and 0 <= stats[name] <= 1
    assert "total_cost" in logged and list(trained.glob("events.out.tfevents.*"))


@pytest.mark.slow
@pytest.mark.parametrize("program", ["predict.py", "tools.debug", "train.py"])
def test_a_program_that_loads_the_run_asks_for_the_plugins(program, trained, outside):
    image = str(outside / "data" / "images" / "1.jpg")
    if not Path(image).exists():
        image = str(next((outside / "data" / "images").glob("*.jpg")))
    arguments = {
        "predict.py": ["--predict", image, "--load", "run", "--no-show"],
        "tools.debug": ["run", image],
        "train.py": ["--load", "run", "--logdir", "new", "--config", "DATA.TRAIN=shapes_train"],
    }[program]
    result = run(outside, program, *arguments)
    assert result.returncode == 2
    line = result.stderr.strip().splitlines()[-1]
    assert "run" in line and f"--plugins {' '.join(PLUGINS)}" in line
    assert "Traceback" not in result.stderr and not (outside / "new").exists()


@pytest.mark.slow
def test_the_run_predicts_with_its_plugins(trained, outside):
    image = next((outside / "data" / "images").glob("*.jpg"))
    arguments = ["--predict", str(image), "--load", "run", "--no-show", "--output", "pictures"]
    result = run(outside, "predict.py", *arguments, "--plugins", *PLUGINS, "--confidence-threshold", "0")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "0 absent" in result.stderr + result.stdout
    assert cv2.imread(str(outside / "pictures" / f"{image.stem}-detections.png")) is not None


@pytest.mark.slow
def test_a_backbone_lacking_an_array_is_refused(trained, outside):
    values = {name: value for name, value in weights.read(resolve(trained)).items() if name.startswith("stage")}
    np.savez(outside / "missing.npz", **{name: x for name, x in values.items() if name != "stage2/layer_scale"})
    config = ["--config", *SETTINGS.split(), f"DATA.BASEDIR={outside / 'data'}", "BACKBONE.WEIGHTS=missing.npz"]
    result = run(outside, "train.py", "--logdir", "from-missing", "--plugins", *PLUGINS, *config)
    assert result.returncode == 5, result.stderr[-2000:]
    assert "1 backbone variables don't fit, first stage2/layer_scale" in result.stderr


@pytest.mark.slow
def test_a_breakpoint_in_a_model_sees_numbers(trained, outside):
    """`breakpoint()` in the backbone calls a hook that prints a tensor of the caller."""
    code = (
        (outside / "my_backbone.py")
        .read_text()
        .replace("        maps.append(x)\n", "        breakpoint()\n        maps.append(x)\n")
    )
    (outside / "stopped").mkdir(exist_ok=True)
    (outside / "stopped" / "my_backbone.py").write_text(code)
    hook = """
        import sys
        def stop():
            print("STOPPED", float(sys._getframe(1).f_locals["x"].numpy().std()) > 0)
    """
    (outside / "stopped" / "hook.py").write_text(textwrap.dedent(hook))
    image = next((outside / "data" / "images").glob("*.jpg"))
    arguments = [str(trained), str(image), "--plugins", *PLUGINS]
    path = os.pathsep.join([str(ROOT), str(outside)])
    result = run(outside / "stopped", "tools.debug", *arguments, PYTHONPATH=path, PYTHONBREAKPOINT="hook.stop")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("STOPPED True") == 8  # four stages, in inference and for the losses
    losses = dict(re.findall(r"^  (\S+_loss) (\S+)$", result.stdout, re.MULTILINE))
    assert {name.rpartition("/")[2] for name in losses} == {"label_loss", "box_loss"} and len(losses) == 4


def test_losses_of_the_page_equal_numpy(plugin):
    """DIoU of decoded boxes, arXiv:1911.08287 eq. 7, box by box."""
    loss = plugin("my_loss").diou_loss
    rng = np.random.default_rng(0)
    boxes, truth = random_boxes(rng, 2, 5), random_boxes(rng, 2, 5)
    deltas = rng.normal(size=(2, 5, 4)).astype(np.float32)
    found = evaluate(lambda *x: loss(*x, (10.0, 10.0, 5.0, 5.0)), deltas, boxes, truth)
    for place in np.ndindex(2, 5):
        x1, y1, x2, y2 = np.float64(boxes[place])
        dx, dy, dw, dh = np.float64(deltas[place]) / (10, 10, 5, 5)
        x, y, w, h = (
            (x1 + x2) / 2 + dx * (x2 - x1),
            (y1 + y2) / 2 + dy * (y2 - y1),
            np.exp(dw) * (x2 - x1),
            np.exp(dh) * (y2 - y1),
        )
        a, b = (x - w / 2, y - h / 2, x + w / 2, y + h / 2), np.float64(truth[place])
        sides = [max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
        diagonal = sum((max(a[i + 2], b[i + 2]) - min(a[i], b[i])) ** 2 for i in (0, 1))
        distance = (x - (b[0] + b[2]) / 2) ** 2 + (y - (b[1] + b[3]) / 2) ** 2
        union = w * h + (b[2] - b[0]) * (b[3] - b[1]) - np.prod(sides)
        assert found[place] == pytest.approx(1 - np.prod(sides) / union + distance / diagonal, rel=1e-4)


def test_rotation_moves_image_boxes_and_masks_together(plugin):
    """A bright square, rotated: its mask covers its pixels, and its box is the mask's."""
    rotate = plugin("my_transform").rotate
    image = np.zeros((60, 80, 3), np.uint8)
    image[20:40, 50:62] = 255
    masks = (image[None, :, :, 0] > 0).copy()
    example = augment.Example(image, np.array([[50, 20, 62, 40]], np.float32), masks)
    turned = rotate(example, np.random.default_rng(1))
    angle = np.radians(np.random.default_rng(1).uniform(-15, 15))
    (mask,), ((x1, y1, x2, y2),) = turned.masks, turned.boxes_xyxy
    assert np.array_equal(mask, turned.image[:, :, 0] > 127) and mask.sum() == pytest.approx(240, abs=12)
    rows, columns = np.nonzero(mask)
    assert (x1, y1, x2, y2) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    offset = np.array([56 - 40, 30 - 30])
    expected = np.array([40, 30]) + [offset[0] * np.cos(angle), offset[0] * np.sin(angle)]
    np.testing.assert_allclose([columns.mean() + 0.5, rows.mean() + 0.5], expected, atol=0.3)


def test_transforms_are_applied_in_order_and_drop_what_leaves_the_image(monkeypatch, tmp_path):
    import data
    from dataset import Record

    monkeypatch.setattr(augment, "TRANSFORMS", augment.Registry("PREPROC.TRANSFORMS"))
    monkeypatch.setattr(data, "TRANSFORMS", augment.TRANSFORMS)
    augment.register_transform("right", lambda e, rng: augment.warp_affine(e, np.array([[1, 0, 30], [0, 1, 0]])))
    augment.register_transform("double", lambda e, rng: augment.warp_affine(e, np.array([[2, 0, 0], [0, 2, 0]])))
    image = np.zeros((64, 64, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    boxes = np.array([[4, 4, 12, 20], [40, 4, 60, 20]], np.float32)
    polygons = tuple([np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float32)] for x1, y1, x2, y2 in boxes)
    record = Record(1, str(tmp_path / "a.png"), 64, 64, boxes, np.array([1, 2]), np.zeros(2, bool), polygons)
    settings = Config()
    settings.update(["PREPROC.TRAIN_SHORT_EDGE_SIZE=64", "PREPROC.MAX_SIZE=64", "DATA.NUM_WORKERS=0"])
    found = {}
    for names in (["right"], ["double", "right"]):
        settings.PREPROC.TRANSFORMS = names
        stream = data.training_data(settings, [record])
        batches = [stream.batch_of([position]) for position in range(8)]
        found[tuple(names)] = next(
            batch for batch in batches if 1 in batch["gt_labels"] and batch["gt_boxes"][0, 0, 0] < 45
        )
    (unmirrored,) = [found[("right",)]]
    assert unmirrored["gt_labels"].tolist() == [[1]]  # the other object has left the image
    np.testing.assert_allclose(unmirrored["gt_boxes"][0, 0], [34, 4, 42, 20])
    mask = np.unpackbits(unmirrored["gt_masks"][0, 0], axis=-1)
    assert mask[4:20, 34:42].all() and mask.sum() == 16 * 8
    np.testing.assert_allclose(found[("double", "right")]["gt_boxes"][0, 0], [38, 8, 54, 40])


def test_average_recall_of_the_page(plugin, tmp_path):
    """Two objects; one is found exactly, one with an IoU of 0.72: recall is 1 up to 0.7, and 1/2 above."""
    average_recall = plugin("my_metric").average_recall
    from evaluation import metrics

    annotations = [
        {"id": k, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for k, box in enumerate([[0, 0, 100, 100], [200, 0, 100, 100]], start=1)
    ]
    truth = {
        "images": [{"id": 1, "height": 400, "width": 400}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    results = [
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 100], "score": 0.9},
        {"image_id": 1, "category_id": 1, "bbox": [200, 0, 100, 72], "score": 0.8},
    ]
    (evaluation,) = metrics.evaluate(tmp_path / "truth.json", results, kinds=("bbox",))
    assert average_recall(evaluation) == pytest.approx((5 * 1 + 5 * 0.5) / 10)


@pytest.mark.slow
def test_eval_computes_a_plugin_s_metric(outside, tmp_path):
    truth = {
        "images": [{"id": 1, "height": 40, "width": 40}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    result = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.9}]
    (tmp_path / "results.json").write_text(json.dumps(result))
    files = [str(tmp_path / "results.json"), str(tmp_path / "truth.json")]
    found = run(outside, "eval.py", *files, "--plugins", "my_metric", "--metrics", "AR")
    assert (
        found.returncode == 0
        and "AR(bbox) on" in found.stdout + found.stderr
        and "1.000" in found.stdout + found.stderr
    )
    unknown = run(outside, "eval.py", *files, "--metrics", "AR")
    assert unknown.returncode == 2 and "no TEST.METRICS 'AR'" in unknown.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin_name", "setting", "message"),
    [
        ("missing", "", "--plugins missing: ModuleNotFoundError"),
        ("broken", "", "--plugins broken: ZeroDivisionError: division by zero"),
        ("twice", "", "BACKBONE.NAME 'resnet' is registered already"),
        ("my_metric", "BACKBONE.NAME=resnett", "no BACKBONE.NAME 'resnett' (near: resnet"),
        ("my_metric", "FRCNN.BOX_LOSS=diou", "no FRCNN.BOX_LOSS 'diou'"),
        ("my_metric", "PREPROC.TRANSFORMS=[rotate]", "no PREPROC.TRANSFORMS 'rotate'"),
        ("my_metric", "TRAIN.OPTIMIZER=adam", "no TRAIN.OPTIMIZER 'adam'"),
        ("my_metric", "TRAIN.LOGGERS=[wandb]", "no TRAIN.LOGGERS 'wandb'"),
        ("my_metric", "TEST.METRICS=[AP]", "no TEST.METRICS 'AP'"),
        ("my_metric", "CONVENTIONS=mmdet", "no CONVENTIONS 'mmdet'"),
        (
            "my_backbone",
            "MODE_FPN=False BACKBONE.NAME=plain_convnext",
            "convnext has no last stage to run on RoIs: set MODE_FPN=True",
        ),
    ],
)
def test_mistakes_are_one_line(plugin_name, setting, message, outside, tmp_path):
    (outside / "broken.py").write_text("1 / 0\n")
    (outside / "twice.py").write_text("from modeling import backbone\nbackbone.register('resnet', print)\n")
    config = ["MODE_FPN=True", "BACKBONE.FREEZE_AT=0", f"DATA.BASEDIR={outside / 'data'}", "DATA.TRAIN=my_csv_train"]
    config += ["DATA.VAL=my_csv_train", "MODE_MASK=False", *setting.split()]
    plugins = ["--plugins", plugin_name, "my_formats"]
    result = run(outside, "train.py", "--logdir", str(tmp_path / "run"), *plugins, "--config", *config)
    assert result.returncode == 2, result.stderr[-2000:]
    assert message in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_variables_that_inference_cannot_share_are_refused(monkeypatch):
    """A tf.Variable is another one in the inference graph of a training: evaluations would use random numbers."""
    from tensorpack.compat import tfv1
    from tensorpack.tfutils.tower import TowerContext

    from config import ConfigError
    from inference.graph import Inference
    from modeling import backbone
    from training.model import TrainingModel

    def leaky(image, **options):
        maps = backbone.resnet(image, **options)
        return [maps[0] * tf.Variable(1.0, name="scale"), *maps[1:]]

    monkeypatch.setattr(backbone, "BACKBONES", backbone.BACKBONES.copy())
    monkeypatch.setitem(backbone.BACKBONES, "leaky", backbone.Backbone(leaky, None))
    from modeling import rcnn

    registry = augment.Registry("BACKBONE.NAME")
    registry.update(backbone.BACKBONES)
    monkeypatch.setattr(rcnn, "BACKBONES", registry)
    settings = Config()
    small = ["MODE_FPN=True", "BACKBONE.WIDTH=4", "BACKBONE.RESNET_NUM_BLOCKS=[1,1,1,1]", "FPN.NUM_CHANNEL=4"]
    settings.update([*small, "BACKBONE.NAME=leaky", "DATA.NUM_CATEGORY=2", "FPN.FRCNN_FC_HEAD_DIM=4"])
    with tf.Graph().as_default(), TowerContext("", is_training=True):
        model = TrainingModel(settings, learning_rate=0.1)
        model.build_graph(*[tfv1.placeholder(spec.dtype, spec.shape, spec.name) for spec in model.inputs()])
        with pytest.raises(ConfigError, match="creates inference/scale anew .*: create variables by .*get_variable"):
            Inference(settings)


def test_a_transform_that_workers_cannot_import_is_refused(monkeypatch):
    import data
    from config import ConfigError

    registry = augment.Registry("PREPROC.TRANSFORMS")
    registry.register("lambda", lambda example, rng: example)
    monkeypatch.setattr(data, "TRANSFORMS", registry)
    settings = Config()
    settings.update(["PREPROC.TRANSFORMS=lambda", "DATA.NUM_WORKERS=1"])
    with pytest.raises(ConfigError, match="PREPROC.TRANSFORMS 'lambda': workers can't import it"):
        data.training_data(settings, [])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "must return an Example, not NoneType"),
        (augment.Example(np.zeros((8, 8, 3)), np.zeros((2, 4)), None), "must return a uint8 image and 2 boxes"),
        (
            augment.Example(np.zeros((8, 8, 3), np.uint8), np.zeros((1, 4)), None),
            "must return a uint8 image and 2 boxes",
        ),
        (augment.Example(np.zeros((8, 8, 3), np.uint8), np.zeros((2, 4)), None), r"masks of shape \[2, 8, 8\]"),
    ],
)
def test_results_of_transforms_are_checked(result, message):
    with pytest.raises(TypeError, match=message):
        augment._checked(result, test_results_of_transforms_are_checked, 2, with_masks=True)


def test_plugins_are_no_setting_of_the_command_line():
    from config import ConfigError

    with pytest.raises(ConfigError, match="PLUGINS records the option --plugins"):
        Config().update(["PLUGINS=[a]"])


def test_the_pages_command_is_what_is_tested():
    """The settings that docs/custom_data.md gives for CSV files are those of the training here."""
    page = (ROOT / "docs" / "custom_data.md").read_text()
    (command,) = re.findall(r"train\.py --plugins my_formats \\\n *--config (.*) \.\.\.", page)
    words = [word for word in command.split() if not word.startswith("DATA.BASEDIR=")]
    assert len(words) == 3 and set(words) <= set(SETTINGS.split())
