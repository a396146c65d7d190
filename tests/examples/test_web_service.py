"""The web service of the examples, in a real browser: choose an image, see what was found."""

import base64
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from browser import Browser, needs_browser
from tiny_models import make_model

from common import viz
from dataset import shapes
from dataset.images import decode_image
from inference import media
from inference.predictor import Predictor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def service(tmp_path):
    """(url, folder of its model)"""
    model = make_model(tmp_path, "fpn")
    command = [sys.executable, "-m", "examples.web_service", model, "--port", "0", "--score-threshold", "0.1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        lines = (re.search(r"running on (http://\S+)", line) for line in process.stderr)
        yield next(filter(None, lines))[1], model
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@needs_browser
def test_page_shows_what_is_found_in_a_chosen_image(service, tmp_path):
    url, model = service
    image, _ = shapes.draw_image(np.random.default_rng(5), 200)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    (tmp_path / "b.png").write_text("no image")
    with Browser() as browser:
        browser.open(url)
        browser.choose_file("file", tmp_path / "b.png")
        browser.wait_for("document.querySelector('#status.error')")
        assert browser.run("return document.getElementById('status').textContent") == "b.png: not readable as an image"
        browser.choose_file("file", tmp_path / "a.png")
        browser.wait_for("document.getElementById('picture').naturalWidth > 0")
        source = browser.run("return document.getElementById('picture').src")
        rows = browser.run("return [...document.querySelectorAll('tbody tr')].map(row => row.innerText.split('\\t'))")
        status = browser.run("return document.getElementById('status').textContent")
        screenshot = cv2.imdecode(np.frombuffer(browser.screenshot(), np.uint8), cv2.IMREAD_COLOR)
    predictor = Predictor(model)
    style = media.Style(predictor.class_names, predictor.category_ids, 0.1)
    found = style.select(predictor([image])[0])
    assert len(found.labels) > 3 and status == f"{len(found.labels)} found"
    assert [(row[0], row[1]) for row in rows] == [
        (predictor.class_names[label - 1], f"{100 * score:.0f}%") for label, score in zip(found.labels, found.scores)
    ]
    picture = decode_image(base64.b64decode(source.partition(",")[2]), "picture")
    np.testing.assert_array_equal(picture, style.draw(image, found))
    assert (screenshot == viz.class_colour(int(found.labels[0]))).all(axis=2).any()  # and it is on the screen
