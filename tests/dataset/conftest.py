"""What tests of data sets share."""

import json

import pytest
from coco_files import coco_json

from dataset import CocoDataset


@pytest.fixture
def make(tmp_path):
    """Write a json (content, or its text) and empty image files, and open it."""

    def write_and_open(content=None, *, files=("5.jpg", "9.jpg"), **options):
        text = content if isinstance(content, str) else json.dumps(coco_json() if content is None else content)
        (tmp_path / "some.json").write_text(text)
        (tmp_path / "images").mkdir(exist_ok=True)
        for name in files:
            (tmp_path / "images" / name).touch()
        return CocoDataset("some", tmp_path / "some.json", tmp_path / "images", **options)

    return write_and_open
