"""A small web service: a page that takes an image and shows its detections, and the HTTP interface behind that page.

    .venv/bin/python -m pip install -r requirements/web.txt -c requirements/constraints.txt
    .venv/bin/python -m examples.web_service train_log/rcnn --port 8000

http://localhost:8000 shows the page, http://localhost:8000/docs describes the interface.
"""

import argparse
import base64
import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI, HTTPException, UploadFile
from fastapi.responses import FileResponse

from common import viz
from common.errors import ImageError
from common.plugins import add_option, load_plugins
from config import UserError
from dataset.images import decode_image
from inference import media
from inference.predictor import Predictor


def make_app(predictor: Predictor, score_threshold: float) -> FastAPI:
    """The web application. `score_threshold`: in [0, 1], the lowest score that it shows."""
    app = FastAPI(title="Objects in images")
    style = media.Style(predictor.class_names, predictor.category_ids, score_threshold)

    @app.get("/", include_in_schema=False)
    def page():
        return FileResponse(Path(__file__).with_name("web_service.html"))

    @app.post("/predict")
    def predict(image: UploadFile):
        """The objects in an image, as COCO results, and a picture of them as a PNG file in base64."""
        try:
            pixels = decode_image(image.file.read(), image.filename)
        except ImageError as error:
            raise HTTPException(status_code=400, detail=str(error)) from error
        found = style.select(predictor([pixels])[0])  # FastAPI runs this in several threads at once
        picture = base64.b64encode(viz.encode_picture(style.draw(pixels, found))).decode()
        return {"objects": style.results(image.filename, found), "picture": picture}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--score-threshold", type=float, default=0.5)
    add_option(parser)
    arguments = parser.parse_args()
    try:
        load_plugins(arguments.plugins)
        predictor = Predictor(arguments.checkpoint)
    except UserError as error:
        sys.exit(f"web_service: {error}")
    uvicorn.run(make_app(predictor, arguments.score_threshold), port=arguments.port)
