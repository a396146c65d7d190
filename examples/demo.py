"""The tour of `make demo`: generates a data set, trains a small Mask R-CNN on it, evaluates it, draws its detections.

Everything runs on the CPU in a few minutes. Each run gets a folder of its own below `demo/`.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from common import viz
from config import UserError
from dataset import get_dataset, shapes
from dataset.images import load_image

ROOT = Path(__file__).resolve().parent.parent
DATA_SET = {"train": 2000, "val": 200, "size": 128, "seed": 0}
PICTURES = 12
# A ResNet of one block per stage and a quarter of the width. With GroupNorm it can start from random weights.
SETTINGS = """
    MODE_FPN=True MODE_MASK=True
    BACKBONE.WIDTH=16 BACKBONE.RESNET_NUM_BLOCKS=[1,1,1,1] BACKBONE.NORM=GN BACKBONE.FREEZE_AT=0
    FPN.NUM_CHANNEL=64 FPN.NORM=GN FPN.FRCNN_FC_HEAD_DIM=256 MRCNN.HEAD_DIM=64
    PREPROC.TRAIN_SHORT_EDGE_SIZE=128 PREPROC.TEST_SHORT_EDGE_SIZE=128 PREPROC.MAX_SIZE=128
    RPN.ANCHOR_SIZES=[8,16,32,64,128] RPN.BATCH_PER_IM=64 FRCNN.BATCH_PER_IM=64
    RPN.TRAIN_PER_LEVEL_NMS_TOPK=200 RPN.TEST_PER_LEVEL_NMS_TOPK=100
    TRAIN.BATCH_SIZE_PER_GPU=8 TEST.BATCH_SIZE_PER_GPU=8 DATA.NUM_WORKERS=1
    TRAIN.BASE_LR=0.05 TRAIN.WARMUP=200 TRAIN.LR_SCHEDULE=[780,940,1000] TRAIN.STEPS_PER_EPOCH=250
    TRAIN.EVAL_PERIOD=0 TRAIN.CHECKPOINT_PERIOD=2
    DATA.TRAIN=shapes_train DATA.VAL=shapes_val
"""


def main():
    """Runs the tour."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "demo", help="where data and runs go (default: %(default)s)"
    )
    folder = parser.parse_args().folder
    start = time.time()
    say("1. a data set: overlapping shapes of five classes, in COCO's format")
    shapes.generate(folder / "shapes", **DATA_SET)
    run = new_folder(folder)
    say(f"2. training: about four minutes on two cores; logs and checkpoints go to {relative(run)}")
    train(run, folder / "shapes")
    say("3. pictures: predictions beside the ground truth")
    pictures = draw(run)
    box_ap50, mask_ap50 = (last_metric(run, f"shapes_val-mAP({kind})/IoU=0.5") for kind in ("bbox", "segm"))
    say(f"done in {time.time() - start:.0f} s, on {DATA_SET['val']} images that were not used for training:")
    print(f"   box AP50 {box_ap50:.3f}, mask AP50 {mask_ap50:.3f}")
    for path in pictures:
        print(f"   {relative(path)}")
    print(f"   ./predict.py --predict IMAGE --load {relative(run)}      runs it on an image of yours")


def say(text):
    """Prints the heading of a step."""
    print(f"\n== demo: {text}", flush=True)


def relative(path):
    """The path relative to the current directory, for printed commands."""
    return os.path.relpath(path)


def new_folder(folder):
    """The first of run1, run2, ... that does not exist."""
    return next(run for run in (folder / f"run{number}" for number in itertools.count(1)) if not run.exists())


def train(run, basedir):
    """Runs train.py with SETTINGS in a process of its own; raises CalledProcessError if it fails."""
    command = [sys.executable, str(ROOT / "train.py"), "--logdir", str(run), "--config", *SETTINGS.split()]
    subprocess.run([*command, f"DATA.BASEDIR={basedir}"], check=True)


def last_metric(run, name):
    """The newest value of a metric in tensorpack's stats.json."""
    return json.loads((run / "stats.json").read_text())[-1][name]


def draw(run):
    """Draws the first images of the validation set, predictions beside ground truth; returns the pictures' paths."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from inference import Predictor  # starts TensorFlow, after the training's process has ended

    predictor = Predictor(run)
    names, threshold = predictor.class_names, predictor.settings.TEST.RESULT_SCORE_THRESH_VIS
    dataset = get_dataset("shapes_val", predictor.settings.DATA.BASEDIR)
    records = dataset.records(training=False)[:PICTURES]
    images = [load_image(record.path) for record in records]
    pictures = []
    for record, image, found in zip(records, images, predictor(images)):
        left = viz.draw_detections(image, found, names, score_threshold=threshold)
        right = viz.draw_ground_truth(image, record, names)
        both = viz.side_by_side(left, right, ("predicted", "ground truth"))
        pictures.append(viz.save_picture(both, run / f"{Path(record.path).stem}.png"))
    return pictures


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"demo: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"demo: training ended with exit code {error.returncode}, see above")
