"""A small web service: a page that takes an image and shows what is in it, and the interface behind it, for programs.

    .venv/bin/python -m pip install -r requirements/web.txt -c requirements/constraints.txt
    .venv/bin/python -m examples.web_service train_log/rcnn --port 8000

http://localhost:8000 is the page, http://localhost:8000/docs describes the interface.
"""

import argparse
import base64
import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI, HTTPException, UploadFile
from fastapi.responses import FileResponse

import data
import viz
from config import UserError
from eval import Predictor
from media import Style


def make_app(predictor, score_threshold):
    app = FastAPI(title="Objects in images")
    style = Style(predictor.class_names, predictor.category_ids, score_threshold)

    @app.get("/", include_in_schema=False)
    def page():
        return FileResponse(Path(__file__).with_name("web_service.html"))

    @app.post("/predict")
    def predict(image: UploadFile):
        """The objects in an image, as COCO results, and a picture of them as a PNG file in base64."""
        try:
            pixels = data.decode_image(image.file.read(), image.filename)
        except data.ImageError as error:
            raise HTTPException(status_code=400, detail=str(error)) from error
        found = style.select(predictor([pixels])[0])  # FastAPI calls this from many threads at once: it may
        picture = base64.b64encode(viz.encode_picture(style.draw(pixels, found))).decode()
        return {"objects": style.results(image.filename, found), "picture": picture}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--score-threshold", type=float, default=0.5)
    arguments = parser.parse_args()
    try:
        predictor = Predictor(arguments.checkpoint)
    except UserError as error:
        sys.exit(f"web_service: {error}")
    uvicorn.run(make_app(predictor, arguments.score_threshold), port=arguments.port)
