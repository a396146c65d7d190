"""Detections in COCO's results format, and the file that holds them."""

import contextlib
import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from full_disk import full_disk

from common.files import FileError
from evaluation.metrics import EvaluationError
from evaluation.results import coco_results, results_file
from inference import ImageDetections


def image_detections(box=(1, 2, 4, 6), label=2, masks=None):
    return ImageDetections(np.float32([box]), np.float32([0.75]), np.array([label]), masks)


def test_coco_results():
    mask = np.zeros((1, 8, 9), bool)
    mask[0, 2:6, 1:4] = True
    (result,) = coco_results(77, image_detections(masks=mask), (10, 20, 30))
    rle = result.pop("segmentation")
    assert result == {"image_id": 77, "category_id": 20, "bbox": [1, 2, 3, 4], "score": 0.75}
    assert (mask_util.decode(rle) == mask[0]).all()
    (result,) = coco_results(77, image_detections(), (10, 20, 30))
    assert "segmentation" not in result
    json.dumps(result)  # plain numbers, no NumPy
    box = (0.1234567, 0, 1.1234567, 1)
    assert coco_results(77, image_detections(box), (10, 20))[0]["bbox"] == [0.123, 0, 1, 1]


@pytest.mark.parametrize("label", [0, 4])
def test_classes_that_the_data_set_does_not_have_are_refused(label):
    with pytest.raises(EvaluationError, match=f"image 77: .*class {label}.*3 classes"):
        coco_results(77, image_detections(label=label), (10, 20, 30))


RESULT = {"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}


def test_results_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "out.json"
    with results_file(path) as write:
        write([RESULT, RESULT])
        write([])
        write([RESULT])
        assert not path.exists()
    assert json.loads(path.read_text()) == [RESULT] * 3
    assert list(path.parent.iterdir()) == [path]


def test_results_file_without_results_is_json(tmp_path):
    with results_file(tmp_path / "out.json"):
        pass
    assert json.loads((tmp_path / "out.json").read_text()) == []


def test_failed_evaluation_leaves_no_results_file(tmp_path):
    with pytest.raises(ZeroDivisionError), results_file(tmp_path / "out.json") as write:
        write([RESULT])
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_results_file_is_not_overwritten_unasked(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("mine")
    with (
        pytest.raises(FileError, match="out.json exists already: choose another path, or move it away"),
        results_file(path),
    ):
        pass
    assert path.read_text() == "mine"
    with results_file(path, overwrite=True) as write:
        write([RESULT])
    assert json.loads(path.read_text()) == [RESULT]


def test_results_file_of_another_evaluation_meanwhile_stays(tmp_path):
    path = tmp_path / "out.json"
    with results_file(path) as write:
        write([RESULT])
        path.write_text("theirs")
    assert path.read_text() == "theirs"
    assert json.loads((tmp_path / "out-1.json").read_text()) == [RESULT]


def test_results_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write .*out.json"), results_file(tmp_path / "file" / "out.json"):
        pass


@pytest.mark.parametrize("count", [1, 150, 1000])
@pytest.mark.parametrize("num_bytes", [50, 5000])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, count, num_bytes):
    """Whether the file's buffer holds the results until it is closed, or some of them are written before."""
    path = tmp_path / "out.json"
    fits = num_bytes > 80 * count
    expected = contextlib.nullcontext() if fits else pytest.raises(FileError, match="cannot write .*out.json: File too")
    with expected, full_disk(num_bytes), results_file(path) as write:
        write([RESULT] * count)
    assert list(tmp_path.iterdir()) == ([path] if fits else [])


def test_no_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with results_file(None) as write:
        write([RESULT])
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_number_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"), results_file(tmp_path / "out.json") as write:
        write([{**RESULT, "score": float("nan")}])
    assert list(tmp_path.iterdir()) == []
