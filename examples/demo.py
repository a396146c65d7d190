"""The tour of `make demo`: make a data set, train a small Mask R-CNN on it, measure it, and look at what it finds.

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

import checkpoint
import data
import viz
from config import UserError, config
from dataset import get_dataset, shapes

ROOT = Path(__file__).resolve().parent.parent
DATA_SET = {"train": 2000, "val": 200, "size": 128, "seed": 0}
PICTURES = 12
# A ResNet of one block per stage and a quarter of the width, with GroupNorm: it starts from random weights.
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
    say(f"done in {time.time() - start:.0f} s, on {DATA_SET['val']} images that the training has not seen:")
    print(f"   box AP50 {box_ap50:.3f}, mask AP50 {mask_ap50:.3f}")
    for path in pictures:
        print(f"   {relative(path)}")
    print(f"   ./predict.py --predict IMAGE --load {relative(run)}      tries it on an image of yours")


def say(text):
    print(f"\n== demo: {text}", flush=True)


def relative(path):
    """As short as it can be typed from here."""
    return os.path.relpath(path)


def new_folder(folder):
    """run1, run2, ...: the first that does not exist."""
    return next(run for run in (folder / f"run{number}" for number in itertools.count(1)) if not run.exists())


def train(run, basedir):
    command = [sys.executable, str(ROOT / "train.py"), "--logdir", str(run), "--config", *SETTINGS.split()]
    subprocess.run([*command, f"DATA.BASEDIR={basedir}"], check=True)


def last_metric(run, name):
    """The newest value of a metric in tensorpack's stats.json."""
    return json.loads((run / "stats.json").read_text())[-1][name]


def draw(run):
    """Pictures of the first images of the validation set: predictions on the left, ground truth on the right."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from eval import load_predictor, predict_images  # imports TensorFlow, which the training has used until now

    newest = checkpoint.resolve(run)
    config.load(checkpoint.find_config(newest))
    config.freeze()
    dataset = get_dataset("shapes_val", config.DATA.BASEDIR)
    records = dataset.records(training=False)[:PICTURES]
    images = [data.load_image(record.path) for record in records]
    pictures = []
    for record, image, found in zip(records, images, predict_images(load_predictor(newest), images)):
        names = dataset.class_names
        left = viz.draw_detections(image, found, names, score_threshold=config.TEST.RESULT_SCORE_THRESH_VIS)
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
