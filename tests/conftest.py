"""What all tests share: a quiet TensorFlow on the CPU, and the way to the real data that some tests need."""

import os
from pathlib import Path

import pytest
from processes import end_children_with_this_process

ROOT = Path(__file__).resolve().parent.parent

# Set before anything imports TensorFlow; the processes that tests start inherit it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if os.environ.get("RCNN_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
end_children_with_this_process()


@pytest.fixture(scope="session")
def coco_tiny():
    """A folder with a small part of COCO in its layout: $RCNN_COCO_TINY, or beside the checkout. Skips without it."""
    folder = Path(os.environ.get("RCNN_COCO_TINY") or ROOT.parent / "shared" / "coco_tiny")
    if not (folder / "annotations").is_dir():
        pytest.skip(f"no data in {folder}: name its folder in RCNN_COCO_TINY")
    return folder
