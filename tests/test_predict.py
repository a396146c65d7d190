"""predict.py: mistakes answered at once, pictures, results files, and whole runs with a window on a virtual display."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from virtual_display import VirtualDisplay, needs_display

import eval
import predict
from common import viz
from common.checkpoint import save_config
from config import Config, UserError
from dataset.images import Geometry
from inference import ImageDetections, predictor

ROOT = Path(__file__).resolve().parent.parent

# Fails where TensorFlow is imported: what is answered without it is answered at once.
WITHOUT_TENSORFLOW = """
import sys
sys.modules.update({"tensorflow": None, "tensorpack": None})
import runpy
runpy.run_path("predict.py", run_name="__main__")
"""


def run_without_tensorflow(*arguments):
    """Exit code and lines on stderr."""
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines(), done.stdout


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint that is only found, never read; no config.json beside it."""
    folder = tmp_path / "run"
    folder.mkdir()
    for suffix in ("index", "data-00000-of-00001"):
        (folder / f"model-500.{suffix}").touch()
    return folder


def write_config(folder, *settings):
    config = Config()
    config.update(list(settings))
    save_config(config, folder / "config.json")


def write_data_set(folder, *, names=("disc", "box")):
    """A data set in COCO's layout that is both coco_val2017 and coco_val2014."""
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    content = {"images": [], "annotations": [], "categories": categories}
    (folder / "annotations").mkdir(exist_ok=True, parents=True)
    for year in (2014, 2017):
        (folder / f"val{year}").mkdir(exist_ok=True)
        (folder / f"val{year}" / "1.png").write_bytes(
            cv2.imencode(".png", np.zeros((20, 30, 3), np.uint8))[1].tobytes()
        )
        content["images"] = [{"id": 1, "height": 20, "width": 30, "file_name": "1.png"}]
        (folder / "annotations" / f"instances_val{year}.json").write_text(json.dumps(content))
    return f"DATA.BASEDIR={folder}"


# ---------------------------------------------------------------- mistakes


def test_help_needs_no_tensorflow():
    code, _, output = run_without_tensorflow("--help")
    assert code == 0
    assert all(
        option in output for option in ("--predict", "--evaluate", "--load", "--config", "--output", "--no-show")
    )


@pytest.mark.parametrize(
    "arguments", [[], ["--load", "x"], ["--predict", "a.jpg"], ["--predict", "a", "--evaluate", "b", "--load", "c"]]
)
def test_missing_and_contradictory_arguments(arguments):
    code, errors, _ = run_without_tensorflow(*arguments)
    assert code == 2
    assert errors[0].startswith("usage: ")


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--evaluate", "a.json", "--classes", "box"], "--classes goes with --predict or --video"),
        (["--predict", "a.jpg", "--report", "r"], "--report goes with --evaluate"),
        (["--visualize", "1", "--format", "tensorpack"], "--format goes with --output-serving or --output-pb"),
    ],
)
def test_options_of_another_task(arguments, names, capsys):
    with pytest.raises(SystemExit) as stop:
        predict.parse_arguments([*arguments, "--load", "x"])
    assert stop.value.code == 2 and names in capsys.readouterr().err


def test_checkpoint_that_does_not_exist(tmp_path):
    code, errors, _ = run_without_tensorflow("--predict", "a.jpg", "--load", tmp_path / "nothing" / "model-7")
    assert code == 2
    assert len(errors) == 1 and re.match("predict.py: .*nothing/model-7", errors[0])


def test_settings_that_do_not_exist(checkpoint):
    write_config(checkpoint)
    code, errors, _ = run_without_tensorflow(
        "--predict", "a.jpg", "--load", checkpoint, "--config", "TEST.RESULT_PER_IM=3"
    )
    assert code == 2
    assert len(errors) == 1 and "TEST.RESULT_PER_IM" in errors[0] and "TEST.RESULTS_PER_IM" in errors[0]


def test_unknown_class_names(checkpoint, tmp_path):
    code, errors, _ = run_without_tensorflow(
        "--predict", "a.jpg", "--load", checkpoint, "--config", f"DATA.BASEDIR={tmp_path / 'none'}"
    )
    assert code == 2
    assert len(errors) == 2 and "no config.json beside" in errors[0]
    assert "class names are unknown" in errors[1] and str(tmp_path / "none") in errors[1]


def test_no_image_is_there(checkpoint):
    write_config(checkpoint, "DATA.NUM_CATEGORY=1", "DATA.CLASS_NAMES=('BG','disc')")
    code, errors, _ = run_without_tensorflow("--predict", "a.jpg", checkpoint, "--load", checkpoint)
    assert code == 1
    assert errors[0] == "predict.py: a.jpg: no such file"
    assert len(errors) == 2 and errors[1].startswith(f"predict.py: {checkpoint}: no file with one of the suffixes ")


@pytest.mark.parametrize("score", ["-0.1", "1", "half"])
def test_threshold_that_is_no_score(score):
    code, errors, _ = run_without_tensorflow("--predict", "a", "--load", "b", f"--confidence-threshold={score}")
    assert code == 2 and "--confidence-threshold" in errors[-1]


def test_class_that_the_model_does_not_know(checkpoint, tmp_path):
    write_config(checkpoint, "DATA.NUM_CATEGORY=2", "DATA.CLASS_NAMES=('BG','disc','box')")
    code, errors, _ = run_without_tensorflow("--predict", "a.jpg", "--load", checkpoint, "--classes", "box", "discs")
    assert code == 2
    assert errors == ["predict.py: the model knows no class 'discs': --classes takes disc"]


@pytest.mark.parametrize(
    ("names", "existing"), [("coco_val2017", "out"), ("['coco_val2014','coco_val2017']", "out-coco_val2017")]
)
def test_existing_results_are_refused(checkpoint, tmp_path, names, existing):
    write_config(checkpoint, write_data_set(tmp_path / "data"), f"DATA.VAL={names}")
    (tmp_path / f"{existing}.json").write_text("mine")
    code, errors, _ = run_without_tensorflow("--evaluate", tmp_path / "out.json", "--load", checkpoint)
    assert code == 2
    assert len(errors) == 1 and f"{existing}.json exists already" in errors[0]
    assert (tmp_path / f"{existing}.json").read_text() == "mine"


def test_data_set_that_is_not_there(checkpoint, tmp_path):
    write_config(checkpoint, f"DATA.BASEDIR={tmp_path}")
    code, errors, _ = run_without_tensorflow("--evaluate", tmp_path / "out.json", "--load", checkpoint)
    assert code == 2
    assert len(errors) == 1 and "coco_val2017" in errors[0]


def test_data_set_of_other_classes(checkpoint, tmp_path):
    write_config(
        checkpoint, write_data_set(tmp_path / "data"), "DATA.NUM_CATEGORY=2", "DATA.CLASS_NAMES=['BG','box','disc']"
    )
    code, errors, _ = run_without_tensorflow("--evaluate", tmp_path / "out.json", "--load", checkpoint)
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith("predict.py: the classes of coco_val2017 are not those of the model: their ids put")


# ---------------------------------------------------------------- with a stand-in for the network


class StandIn:
    """A Predictor that finds one disc and two boxes in every image, and notes the sizes of its batches."""

    class_names = ("disc", "box")
    category_ids = (3, 41)
    geometry = Geometry(short_edge=64, max_size=128, multiple=32)

    def __init__(self):
        self.batches = []

    def __call__(self, images):
        self.batches.append([image.shape[:2] for image in images])
        boxes_xyxy = np.float32([[1, 1, 9, 9], [3, 3, 20, 20], [5, 5, 30, 30]])
        masks = np.zeros((3, *images[0].shape[:2]), bool)
        masks[:, 5:9, 5:9] = True
        found = ImageDetections(boxes_xyxy, np.float32([0.9, 0.8, 0.7]), np.array([2, 1, 2]), masks)
        return [found] * len(images)


@pytest.fixture
def network(monkeypatch):
    """Puts stand-ins in place of the model; notes what it is asked for."""
    monkeypatch.setattr(predict, "config", Config())
    monkeypatch.setattr(viz, "has_display", lambda: False)
    calls = SimpleNamespace(loaded=[], evaluated=[], config=predict.config, predictor=StandIn())

    def load(path, *, settings):
        assert settings is predict.config
        calls.loaded.append(str(path))
        return calls.predictor

    def load_network(settings, path):
        assert settings is predict.config and path.name == "model-500"
        return "function"

    def evaluate_dataset(settings, function, dataset, *, output, **report_options):
        assert settings is predict.config
        calls.evaluated.append((function, dataset.name, str(output), report_options))

    monkeypatch.setattr(predictor, "Predictor", load)
    monkeypatch.setattr(predictor, "load_network", load_network)
    monkeypatch.setattr(eval, "evaluate_dataset", evaluate_dataset)
    return calls


def run(*arguments):
    return predict.main(predict.parse_arguments([str(argument) for argument in arguments]))


def write_image(path, height=60, width=80):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((height, width, 3), 90, np.uint8))
    return path


def test_pictures(network, checkpoint, tmp_path, capsys, monkeypatch):
    write_config(checkpoint, "DATA.NUM_CATEGORY=2", "DATA.CLASS_NAMES=['BG','disc','box']")
    images = [
        write_image(tmp_path / "a" / "1.jpg"),
        write_image(tmp_path / "b" / "1.png"),
        write_image(tmp_path / "c.d.jpg"),
    ]
    assert run("--predict", *images, "--load", checkpoint, "--output", tmp_path / "out") == 0
    names = ["1-detections.png", "1-detections-1.png", "c.d-detections.png"]
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path / 'out' / name}: 2 box, 1 disc" for name in names]
    for name in names:
        picture = cv2.imread(str(tmp_path / "out" / name))
        assert (picture == viz.class_colour(2)).all(axis=2).any()
    assert network.loaded == [str(checkpoint / "model-500")]
    # Once more: nothing is written over.
    before = (tmp_path / "out" / names[0]).read_bytes()
    monkeypatch.setattr(predict, "config", Config())
    assert run("--predict", images[0], "--load", checkpoint, "--output", tmp_path / "out") == 0
    assert (tmp_path / "out" / "1-detections-2.png").exists()
    assert (tmp_path / "out" / names[0]).read_bytes() == before


def test_folders_patterns_and_batches(network, checkpoint, tmp_path, capsys):
    """Of each size of network input as many images together as TEST.BATCH_SIZE_PER_GPU says."""
    write_config(checkpoint, "DATA.NUM_CATEGORY=2", "DATA.CLASS_NAMES=['BG','disc','box']")
    for number in range(5):
        write_image(tmp_path / "folder" / f"{number}.PNG", 60, 80)
    write_image(tmp_path / "folder" / "tall.jpg", 80, 60)
    (tmp_path / "folder" / "notes.txt").touch()
    write_image(tmp_path / "deep" / "er" / "6.png")
    inputs = [tmp_path / "folder", tmp_path / "deep" / "**" / "*", tmp_path / "folder" / "0.PNG"]
    output = tmp_path / "out"
    settings = ["--output", output, "--config", "TEST.BATCH_SIZE_PER_GPU=3"]
    assert run("--predict", *inputs, "--load", checkpoint, *settings) == 0
    assert network.predictor.batches == [[(60, 80)] * 3, [(60, 80)] * 3, [(80, 60)]]
    stems = ["0", "1", "2", "3", "4", "6", "tall"]
    assert sorted(path.name for path in output.iterdir()) == [f"{stem}-detections.png" for stem in stems]
    assert len(capsys.readouterr().out.splitlines()) == 7


def test_json_beside_the_picture(network, checkpoint, tmp_path):
    write_config(checkpoint, "DATA.NUM_CATEGORY=2", "DATA.CLASS_NAMES=['BG','disc','box']")
    image = write_image(tmp_path / "a.jpg", 60, 80)
    (tmp_path / "a-detections.json").write_text("mine")
    options = ["--json", "--output", tmp_path, "--classes", "box", "--confidence-threshold", 0.75]
    assert run("--predict", image, "--load", checkpoint, *options) == 0
    assert (tmp_path / "a-detections.json").read_text() == "mine"
    assert (tmp_path / "a-detections-1.png").exists() and not (tmp_path / "a-detections.png").exists()
    (result,) = json.loads((tmp_path / "a-detections-1.json").read_text())
    mask = mask_util.decode(result.pop("segmentation"))
    assert mask.shape == (60, 80) and mask.sum() == 16 and mask[5:9, 5:9].all()
    assert result == {
        "image_id": str(image),
        "category_id": 41,
        "category_name": "box",
        "bbox": [1.0, 1.0, 8.0, 8.0],
        "score": 0.9,
    }


def test_video(network, checkpoint, tmp_path, capsys):
    write_config(checkpoint, "DATA.NUM_CATEGORY=2", "DATA.CLASS_NAMES=['BG','disc','box']")
    (tmp_path / "bad.mp4").write_text("no video")
    writer = cv2.VideoWriter(str(tmp_path / "in.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (500, 400))
    for grey in range(0, 250, 50):
        writer.write(np.full((400, 500, 3), grey, np.uint8))
    writer.release()
    options = ["--json", "--output", tmp_path / "out", "--config", "TEST.BATCH_SIZE_PER_GPU=2"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "in-detections.json").write_text("mine")
    code = run("--video", tmp_path / "in.mp4", tmp_path / "bad.mp4", "--load", checkpoint, *options)
    captured = capsys.readouterr()
    assert code == 1 and captured.err == f"predict.py: {tmp_path / 'bad.mp4'}: not readable as a video\n"
    assert captured.out == f"{tmp_path / 'out' / 'in-detections-1.mp4'}: 10 box, 5 disc\n"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["in-detections-1.json", "in-detections-1.mp4", "in-detections.json"]
    assert network.predictor.batches == [[(400, 500)] * 2, [(400, 500)] * 2, [(400, 500)]]
    video = cv2.VideoCapture(str(tmp_path / "out" / "in-detections-1.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == 10
    pictures = [video.read()[1] for _ in range(5)]
    assert not video.read()[0]
    assert [abs(int(picture[390, 490, 0]) - grey) < 8 for picture, grey in zip(pictures, range(0, 250, 50))]
    assert all(np.abs(picture[:40, :40].astype(int) - picture[390, 490]).max() > 60 for picture in pictures)  # drawn on
    results = json.loads((tmp_path / "out" / "in-detections-1.json").read_text())
    assert [result["image_id"] for result in results] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


def test_a_video_whose_name_is_taken_meanwhile_gets_the_next(network, checkpoint, tmp_path, capsys):
    write_config(checkpoint, "DATA.NUM_CATEGORY=2", "DATA.CLASS_NAMES=['BG','disc','box']")
    writer = cv2.VideoWriter(str(tmp_path / "in.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (100, 80))
    writer.write(np.zeros((80, 100, 3), np.uint8))
    writer.release()
    find = network.predictor

    def slow(images):
        (tmp_path / "out" / "in-detections.mp4").write_text("another's")
        return find(images)

    network.predictor = slow
    slow.class_names, slow.category_ids, slow.geometry = find.class_names, find.category_ids, find.geometry
    assert run("--video", tmp_path / "in.mp4", "--load", checkpoint, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'in-detections-1.mp4'}: 2 box, 1 disc\n"
    assert (tmp_path / "out" / "in-detections.mp4").read_text() == "another's"
    assert cv2.VideoCapture(str(tmp_path / "out" / "in-detections-1.mp4")).read()[0]


def test_bad_files_are_reported_and_the_rest_goes_on(network, checkpoint, tmp_path, capsys):
    write_config(checkpoint, "DATA.NUM_CATEGORY=2", "DATA.CLASS_NAMES=['BG','disc','box']")
    (tmp_path / "bad.jpg").write_text("no image")
    files = [tmp_path / "bad.jpg", tmp_path / "missing.jpg", write_image(tmp_path / "good.jpg")]
    assert run("--predict", *files, "--load", checkpoint, "--output", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good-detections.png"]
    errors = captured.err.splitlines()
    assert len(errors) == 2 and all(error.startswith("predict.py: ") for error in errors)
    assert "missing.jpg: no such file" in errors[0] and "bad.jpg" in errors[1]


def test_output_that_cannot_be_written(network, checkpoint, tmp_path):
    write_config(checkpoint, "DATA.NUM_CATEGORY=2", "DATA.CLASS_NAMES=['BG','disc','box']")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file"):
        run("--predict", write_image(tmp_path / "a.jpg"), "--load", checkpoint, "--output", tmp_path / "file")


def test_settings_come_from_the_run_and_flags_win(network, checkpoint, tmp_path):
    write_config(
        checkpoint,
        *("DATA.NUM_CATEGORY=2", "DATA.CLASS_NAMES=['BG','disc','box']", "MODE_FPN=True", "TEST.RESULTS_PER_IM=7"),
        *("FPN.NUM_CHANNEL=32", "TEST.RESULT_SCORE_THRESH_VIS=0.3"),
    )
    image = write_image(tmp_path / "a.jpg")
    run("--predict", image, "--load", checkpoint, "--output", tmp_path / "out", "--config", "TEST.RESULTS_PER_IM=9")
    config = network.config
    assert config.MODE_FPN is True and config.FPN.NUM_CHANNEL == 32 and config.DATA.NUM_CATEGORY == 2
    assert config.TEST.RESULTS_PER_IM == 9
    assert config.TEST.RESULT_SCORE_THRESH == 0.3  # nothing is computed that will not be drawn
    with pytest.raises(UserError, match="frozen"):
        config.MODE_FPN = False


def test_class_names_of_the_data_set_where_the_run_has_none(network, checkpoint, tmp_path, capsys):
    settings = write_data_set(tmp_path / "data")
    image = write_image(tmp_path / "a.jpg")
    assert run("--predict", image, "--load", checkpoint, "--output", tmp_path, "--config", settings) == 0
    assert network.config.DATA.CLASS_NAMES == ("BG", "disc", "box") and network.config.DATA.NUM_CATEGORY == 2
    assert "2 box, 1 disc" in capsys.readouterr().out


def test_pictures_are_shown_where_there_is_a_display(network, checkpoint, tmp_path, monkeypatch):
    write_config(checkpoint, "DATA.NUM_CATEGORY=2", "DATA.CLASS_NAMES=['BG','disc','box']")
    shown = []
    monkeypatch.setattr(viz, "has_display", lambda: True)
    monkeypatch.setattr(
        viz, "show", lambda pictures: shown.extend((title, picture.shape) for title, picture in pictures)
    )
    arguments = ["--predict", write_image(tmp_path / "a.jpg"), "--load", checkpoint, "--output", tmp_path / "out"]
    run(*arguments)
    assert shown == [("a-detections.png", (360, 480, 3))]
    monkeypatch.setattr(predict, "config", Config())
    run(*arguments, "--no-show")
    assert len(shown) == 1


@pytest.mark.parametrize("names", [["coco_val2017"], ["coco_val2017", "coco_val2014"]])
def test_evaluation_writes_a_file_per_data_set(network, checkpoint, tmp_path, names):
    write_config(checkpoint, write_data_set(tmp_path / "data"), f"DATA.VAL={names}")
    assert run("--evaluate", tmp_path / "new" / "out.json", "--load", checkpoint / "model-500.index") == 0
    files = ["out.json"] if len(names) == 1 else [f"out-{name}.json" for name in names]
    options = {"per_class": False, "report_folder": None}
    assert network.evaluated == [("function", n, str(tmp_path / "new" / f), options) for n, f in zip(names, files)]


@pytest.mark.parametrize("names", [["coco_val2017"], ["coco_val2017", "coco_val2014"]])
def test_reports_go_to_a_new_folder_for_each_data_set(network, checkpoint, tmp_path, names):
    write_config(checkpoint, write_data_set(tmp_path / "data"), f"DATA.VAL={names}")
    arguments = ["--evaluate", tmp_path / "out.json", "--load", checkpoint, "--per-class", "--report", tmp_path / "r"]
    assert run(*arguments) == 0
    folders = [tmp_path / "r"] if len(names) == 1 else [tmp_path / "r" / name for name in names]
    assert [call[3] for call in network.evaluated] == [{"per_class": True, "report_folder": f} for f in folders]
    assert all(folder.is_dir() for folder in folders)
    assert network.config.TEST.RESULT_SCORE_THRESH == 0.05
    assert network.config.DATA.CLASS_NAMES == ("BG", "disc", "box")


def test_report_that_cannot_be_written(network, checkpoint, tmp_path, monkeypatch):
    write_config(checkpoint, write_data_set(tmp_path / "data"), "DATA.VAL=coco_val2017")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    arguments = ["--evaluate", tmp_path / "out.json", "--load", checkpoint, "--report"]
    for place, problem in (("used", "used exists already"), ("used/file/r", "cannot write .*used/file/r: Not a dir")):
        monkeypatch.setattr(predict, "config", Config())
        with pytest.raises(UserError, match=problem):
            run(*arguments, tmp_path / place)
    assert not network.evaluated


# ---------------------------------------------------------------- whole runs

TINY = (
    *("MODE_FPN=True", "BACKBONE.WIDTH=4", "BACKBONE.RESNET_NUM_BLOCKS=[1,1,1,1]", "FPN.NUM_CHANNEL=8"),
    *("FPN.FRCNN_FC_HEAD_DIM=8", "MRCNN.HEAD_DIM=8", "PREPROC.TEST_SHORT_EDGE_SIZE=64", "PREPROC.MAX_SIZE=128"),
    *("DATA.NUM_CATEGORY=2", "DATA.CLASS_NAMES=['BG','disc','box']", "DATA.NUM_WORKERS=0"),
    *("TEST.RESULT_SCORE_THRESH=0", "TEST.RESULT_SCORE_THRESH_VIS=0", "TEST.RESULTS_PER_IM=3"),
)

SAVE_RANDOM_WEIGHTS = """
import sys
from config import Config
settings = Config()
settings.load(sys.argv[1] + "/config.json")
from tensorpack.compat import tfv1 as tf
from inference.graph import Inference
with tf.Graph().as_default(), tf.Session() as session:
    Inference(settings)
    session.run(tf.global_variables_initializer())
    tf.train.Saver().save(session, sys.argv[1] + "/model-1")
"""


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """The directory of a run whose model has random weights."""
    folder = tmp_path_factory.mktemp("run")
    write_config(folder, *TINY, write_data_set(folder / "data"))
    subprocess.run([sys.executable, "-c", SAVE_RANDOM_WEIGHTS, folder], cwd=ROOT, check=True)
    return folder


@pytest.mark.slow
@needs_display
def test_whole_prediction_with_a_window(random_model, tmp_path):
    image = write_image(tmp_path / "a.jpg", 120, 200)
    arguments = ["--predict", image, tmp_path / "none.jpg", "--load", random_model, "--output", tmp_path / "out"]
    with VirtualDisplay(tmp_path) as display:
        process = subprocess.Popen(
            [sys.executable, "predict.py", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "DISPLAY": display.name},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            path = tmp_path / "out" / "a-detections.png"

            def shows_picture(screen):
                if not path.exists():
                    return False
                picture = cv2.imread(str(path))
                return picture is not None and (screen[: picture.shape[0], : picture.shape[1]] == picture).mean() > 0.99

            assert display.wait_for(process, shows_picture, remap="a-detections")
            display.wait_for(process, lambda screen: False, press=("a-detections", "q"))
            output, errors = process.communicate()
        finally:
            process.kill()
    assert process.returncode == 1  # none.jpg
    assert f"{path}: " in output
    assert "none.jpg: no such file" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_whole_evaluation(random_model, tmp_path):
    command = [sys.executable, "predict.py", "--evaluate", tmp_path / "out.json", "--load", random_model]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert len(results) == 3 and all(result["image_id"] == 1 for result in results)
    assert results[0]["segmentation"]["size"] == [20, 30]
    assert "n/a, the ground truth has no objects" in done.stdout + done.stderr
    assert "box AP on coco_val2017 (1 images)" in done.stdout + done.stderr


@pytest.mark.slow
def test_whole_visualisation(random_model, tmp_path):
    """Image 1 of the data set by its id, and a file that is not in it."""
    other = write_image(tmp_path / "other.png", 480, 640)
    command = [
        "--visualize",
        "1",
        other,
        "--tensors",
        "proposals/*",
        "group0/block0/conv3/Relu",
        "--load",
        random_model,
    ]
    done = subprocess.run(
        [sys.executable, "predict.py", *map(str, command), "--output", tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    names = ["stages.png", "tensors-group0.block0.conv3.Relu.png", "tensors.npz"]
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [f"{stem}-{name}" for stem in ("1", "other") for name in names]
    height, width = cv2.imread(str(tmp_path / "out" / "other-stages.png")).shape[:2]
    assert 2 * 480 < height < 1.2 * 2 * 480 and 2 * 640 < width < 1.2 * 2 * 640
    tensors = np.load(tmp_path / "out" / "other-tensors.npz")
    assert tensors["proposals/boxes"].shape[::2] == (1, 4)
    assert "  proposals/boxes: float32 [1, " in done.stdout


def test_nothing_to_visualize(checkpoint):
    write_config(checkpoint, "DATA.NUM_CATEGORY=1", "DATA.CLASS_NAMES=('BG','disc')", "DATA.BASEDIR=/none")
    code, errors, _ = run_without_tensorflow("--visualize", "139", "--load", checkpoint)
    assert code == 2
    assert "without ground truth: " in errors[0] and errors[1].startswith("predict.py: 139: no such file, and no id")


def test_starts_as_a_command_of_its_own_environment(tmp_path):
    """The shell reads the first two lines: they find setup/python beside the script, whatever the folder's name."""
    folder = tmp_path / "a folder"
    (folder / "setup").mkdir(parents=True)
    (folder / "predict.py").write_text((ROOT / "predict.py").read_text())
    (folder / "setup" / "python").write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    for path in (folder / "predict.py", folder / "setup" / "python"):
        path.chmod(0o755)
    assert os.access(ROOT / "predict.py", os.X_OK)
    done = subprocess.run([folder / "predict.py", "--predict", "an image.jpg"], capture_output=True, text=True, cwd="/")
    assert done.stdout == f"{folder}/predict.py|--predict|an image.jpg|"
