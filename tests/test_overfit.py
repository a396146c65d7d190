"""A small model learns real images by heart: data, targets, losses, optimizer and evaluation fit together.

The pictures of its detections beside the ground truth go to RCNN_PICTURES, if that names a folder.
"""

import json
import os
from pathlib import Path

import pytest
from test_train import run

SHORT_EDGE, LONG_EDGE, SMALLEST = 192, 288, 16  # pixels: of the resized images, and of the objects
SETTINGS = (
    *("MODE_FPN=True", "BACKBONE.NAME=resnet_basic", "BACKBONE.RESNET_NUM_BLOCKS=[2,2,2,2]", "BACKBONE.WIDTH=32"),
    *("BACKBONE.NORM=GN", "BACKBONE.FREEZE_AT=0", "FPN.NORM=GN", "FPN.NUM_CHANNEL=64", "MRCNN.HEAD_DIM=64"),
    *("FPN.FRCNN_FC_HEAD_DIM=256", "RPN.ANCHOR_SIZES=[16,32,64,128,256]", "RPN.BATCH_PER_IM=128"),
    *(f"PREPROC.TRAIN_SHORT_EDGE_SIZE={SHORT_EDGE}", f"PREPROC.TEST_SHORT_EDGE_SIZE={SHORT_EDGE}"),
    *(f"PREPROC.MAX_SIZE={LONG_EDGE}", "FRCNN.BATCH_PER_IM=128", "RPN.TRAIN_PER_LEVEL_NMS_TOPK=300"),
    *("RPN.TEST_PER_LEVEL_NMS_TOPK=300", "TRAIN.BATCH_SIZE_PER_GPU=8", "TEST.BATCH_SIZE_PER_GPU=4"),
    *(
        "TRAIN.OPTIMIZER=adamw",
        "TRAIN.BASE_LR=0.001",
        "TRAIN.WEIGHT_DECAY=0.0",
        "TRAIN.WARMUP=50",
        "TRAIN.CLIP_NORM=5.0",
    ),
    *("TRAIN.LR_POLICY=cosine", "TRAIN.EPOCHS=400", "TRAIN.STEPS_PER_EPOCH=200", "TRAIN.EVAL_PERIOD=0"),
    *("TRAIN.CHECKPOINT_PERIOD=10", "DATA.NUM_WORKERS=1"),
)


def choose(folder, target, *, count=16):
    """Writes annotations of `count` images, those of most objects, without crowds and objects that become small."""
    content = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    sizes = {image["id"]: min(image["width"], image["height"]) for image in content["images"]}

    def is_large(annotation):
        return min(annotation["bbox"][2:]) * SHORT_EDGE / sizes[annotation["image_id"]] >= SMALLEST

    kept = [x for x in content["annotations"] if not x["iscrowd"] and is_large(x)]
    of_image = {number: [x for x in kept if x["image_id"] == number] for number in sizes}
    chosen = sorted(sizes, key=lambda number: (-min(len(of_image[number]), 8), number))[:count]
    content["images"] = [image for image in content["images"] if image["id"] in chosen]
    content["annotations"] = [x for number in chosen for x in of_image[number]]
    path = target / "chosen.json"
    path.write_text(json.dumps(content))
    return path, len(content["annotations"])


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_sixteen_real_images_are_learnt_by_heart(coco_tiny, tmp_path):
    path, num_objects = choose(Path(coco_tiny), tmp_path)
    assert num_objects >= 48
    data = f"{path}:{Path(coco_tiny) / 'train2017'}"
    settings = [*SETTINGS, f"DATA.TRAIN={data}", f"DATA.VAL={data}"]
    result = run("train.py", "--logdir", tmp_path / "run", "--config", *settings)
    assert result.returncode == 0, result.stderr[-3000:]
    row = json.loads((tmp_path / "run" / "stats.json").read_text())[-1]
    box_ap50, mask_ap50 = (
        next(value for key, value in row.items() if key.endswith(f"mAP({kind})/IoU=0.5")) for kind in ("bbox", "segm")
    )
    if os.environ.get("RCNN_PICTURES"):
        images = [
            Path(coco_tiny) / "train2017" / image["file_name"] for image in json.loads(path.read_text())["images"]
        ]
        arguments = [
            "--predict",
            *images,
            "--load",
            tmp_path / "run",
            "--no-show",
            "--output",
            os.environ["RCNN_PICTURES"],
        ]
        assert run("predict.py", *arguments).returncode == 0
    assert box_ap50 >= 0.9 and mask_ap50 >= 0.85, (box_ap50, mask_ap50)
