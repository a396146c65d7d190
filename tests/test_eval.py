"""Evaluation of data sets."""

import json
import math
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import found
from rectangles import make_dataset, make_settings, perfect
from tensorpack.utils import logger

import data
import eval
from common.files import FileError
from common.ranks import Ranks
from dataset import images
from evaluation.metrics import NonFiniteError


@pytest.fixture
def settings():
    return make_settings()


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_perfect_network_scores_1(settings, dataset, tmp_path, batch_size):
    settings.TEST.BATCH_SIZE_PER_GPU = batch_size
    metrics = eval.evaluate_dataset(settings, perfect(dataset), dataset, output=tmp_path / "out.json")
    assert metrics["mAP(bbox)/IoU=0.5:0.95"] == pytest.approx(1)
    assert metrics["mAP(segm)/IoU=0.5:0.95"] == pytest.approx(1)
    results = json.loads((tmp_path / "out.json").read_text())
    assert len(results) == 10
    by_image = {(result["image_id"], result["category_id"]): result["bbox"] for result in results}
    for image_id in range(1, 6):
        np.testing.assert_allclose(by_image[image_id, 30], [2, 3, 24, 24], atol=2e-3)
        np.testing.assert_allclose(by_image[image_id, 40], [20, 22, 21, 21], atol=2e-3)


class OneOfTwo(Ranks):
    """A rank of two that are run one after the other, rank 1 first: what it tells waits in `told`."""

    size = 2

    def __init__(self, rank, told):
        self.rank, self._told = rank, told

    def gather(self, value, *, chief_only=False):
        assert chief_only
        self._told.append(value)
        return None if self.rank > 0 else self._told[::-1]


def test_ranks_share_the_work_and_find_the_same(settings, dataset, tmp_path):
    alone = eval.evaluate_dataset(settings, perfect(dataset), dataset, output=tmp_path / "alone.json")
    told, images, calls = [], [], []

    def predict(image, image_shape):
        images.extend(image[:, 0, 0, 0].tolist())
        return perfect(dataset)(image, image_shape)

    for rank in (1, 0):
        metrics = eval.evaluate_dataset(
            settings,
            predict,
            dataset,
            output=tmp_path / "shared.json",
            ranks=OneOfTwo(rank, told),
            num_parallel=3,
            before_batch=lambda: calls.append(rank),  # noqa: B023 (called at once)
        )
        assert metrics == (alone if rank == 0 else None)
    assert (tmp_path / "shared.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert sorted(images) == [record.image_id for record in dataset.records(training=False)]
    assert calls.count(0) == calls.count(1) > 0


def test_a_rank_that_cannot_write_leaves_no_other_waiting(settings, dataset, tmp_path):
    (tmp_path / "file").touch()
    told = [[]]  # of rank 1
    with pytest.raises(FileError, match="cannot write"):
        eval.evaluate_dataset(
            settings, perfect(dataset), dataset, output=tmp_path / "file" / "out.json", ranks=OneOfTwo(0, told)
        )
    assert len(told) == 2


def test_loading_network_and_results_go_on_at_the_same_time(settings, dataset, monkeypatch):
    """Each waits for what the others do ahead of it or behind it: one after the other, they would wait for ever."""
    settings.update(["DATA.NUM_WORKERS=1"])
    loaded, seen = [threading.Event() for _ in range(6)], [threading.Event() for _ in range(6)]
    order, load_image, encode = [], images.load_image, eval.coco_results

    def load(path):
        order.append(int(Path(path).stem))
        loaded[len(order)].set()
        return load_image(path)

    def predict(image, image_shape):
        number = order.index(int(image[0, 0, 0, 0])) + 1
        seen[number].set()
        assert loaded[min(number + 1, 5)].wait(20), "the next image is not loaded beside the network"
        return perfect(dataset)(image, image_shape)

    def slow_results(image_id, *arguments, **options):
        assert seen[min(order.index(image_id) + 2, 5)].wait(20), "the next image is not seen beside the results"
        return encode(image_id, *arguments, **options)

    monkeypatch.setattr(images, "load_image", load)
    monkeypatch.setattr(eval, "coco_results", slow_results)
    assert eval.evaluate_dataset(settings, predict, dataset)["mAP(segm)/IoU=0.5:0.95"] == pytest.approx(1)


def test_evaluation_does_not_run_far_ahead(settings, dataset):
    """Who takes the first image's results only has made the network see three: results are not piled up in memory."""
    seen, third = [], threading.Event()

    def predict(image, image_shape):
        seen.append(int(image[0, 0, 0, 0]))
        if len(seen) == 3:
            third.set()
        return perfect(dataset)(image, image_shape)

    batches = data.evaluation_data(settings, dataset.records(training=False))
    results = eval.results_of(predict, batches, dataset.category_ids)
    next(results)
    assert third.wait(20)
    results.close()  # waits for what runs; what waits is not started
    assert len(seen) == 3


def test_shares_of_the_time(settings, dataset, monkeypatch):
    lines = []
    monkeypatch.setattr(logger, "info", lines.append)
    eval.evaluate_dataset(settings, perfect(dataset), dataset)
    number = r"(\d+\.\d)"
    pattern = f"network {number}%, waiting for images and results {number}%, metrics {number}%; {number} s of masks"
    assert "rectangles: 5 images in " in lines[-1]
    assert sum(map(float, re.search(pattern, lines[-1]).groups()[:3])) == pytest.approx(100, abs=0.2)


def test_evaluation_without_masks_or_file(settings, dataset, tmp_path):
    settings.MODE_MASK = False
    before = set(tmp_path.iterdir())
    without_masks = perfect(dataset)
    metrics = eval.evaluate_dataset(settings, lambda *batch: without_masks(*batch)._replace(masks=None), dataset)
    assert len(metrics) == 6 and metrics["mAP(bbox)/IoU=0.5"] == pytest.approx(1)
    assert set(tmp_path.iterdir()) == before


def test_existing_results_are_refused_before_the_network_runs(settings, dataset, tmp_path):
    (tmp_path / "out.json").write_text("mine")
    with pytest.raises(FileError, match="exists already"):
        eval.evaluate_dataset(settings, lambda *_: pytest.fail("ran"), dataset, output=tmp_path / "out.json")


def test_failing_network_ends_the_evaluation_without_a_file(settings, dataset, tmp_path):
    calls = []

    def predict(image, image_shape):
        calls.append(1)
        return found(([0, 0, math.nan, 5], 0.5, 1, 0)) if len(calls) > 1 else perfect(dataset)(image, image_shape)

    with pytest.raises(NonFiniteError, match=r"image \d: .*diverged"):
        eval.evaluate_dataset(settings, predict, dataset, output=tmp_path / "out.json")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
