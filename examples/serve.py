r"""Serves an exported model over HTTP with nothing but TensorFlow, as TensorFlow Serving's REST interface does.

    ./predict.py --output-serving models/rcnn/1 --load train_log/run
    .venv/bin/python examples/serve.py models/rcnn/1 --port 8501
    curl -d "{\"signature_name\": \"encoded\", \"inputs\": {\"image_bytes\": [{\"b64\": \"$(base64 -w0 a.jpg)\"}]}}" \
        localhost:8501/v1/models/rcnn:predict

The answer is {"outputs": {name: list}}, with masks as PNG files in base64; inference/export.py describes the outputs.
TensorFlow Serving answers the same request (`--model_base_path=$PWD/models/rcnn --model_name=rcnn
--rest_api_port=8501`).
"""

import argparse
import base64
import contextlib
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import tensorflow as tf  # noqa: E402


def main():
    """Runs the server until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="SavedModel")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8501, help="0: any free one")
    arguments = parser.parse_args()
    if not tf.saved_model.contains_saved_model(arguments.folder):
        parser.error(f"no SavedModel in {arguments.folder}: give the folder that holds saved_model.pb")
    model = tf.saved_model.load(arguments.folder)
    server = ThreadingHTTPServer((arguments.host, arguments.port), Handler)
    server.signatures = model.signatures
    print(
        f"serving {arguments.folder} at http://{arguments.host}:{server.server_port}/v1/models/rcnn:predict", flush=True
    )
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


class Handler(BaseHTTPRequestHandler):
    """Answers POST .../rcnn:predict."""

    def do_POST(self):
        """Answers with code 200 and the outputs, or with code 400 and the error."""
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, answer = 200, {"outputs": predict(self.server.signatures, request)}
        except (ValueError, TypeError, KeyError, tf.errors.InvalidArgumentError) as error:
            code, answer = 400, {"error": " ".join(str(error).split())[:500]}
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def predict(signatures, request):
    """The outputs, as lists, for a request {"signature_name": ..., "inputs": {name: value}}.

    Raises:
        ValueError, TypeError, KeyError, tf.errors.InvalidArgumentError: the request is wrong.
    """
    signature = signatures[request.get("signature_name", "serving_default")]
    _, specs = signature.structured_input_signature
    if not request["inputs"].keys() <= specs.keys():
        raise ValueError(f"the inputs are {', '.join(specs)}")
    inputs = {name: tf.constant(_decoded(value), specs[name].dtype) for name, value in request["inputs"].items()}
    return {name: _encoded(name, value.numpy().tolist()) for name, value in signature(**inputs).items()}


def _decoded(value):
    """Replaces each {"b64": ...} in nested lists by its bytes."""
    if isinstance(value, dict):
        return base64.b64decode(value["b64"], validate=True)
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _encoded(name, value):
    """Replaces bytes in nested lists: by {"b64": ...} in outputs called *_bytes, by text in others."""
    if isinstance(value, list):
        return [_encoded(name, item) for item in value]
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()} if name.endswith("_bytes") else value.decode()
    return value


if __name__ == "__main__":
    main()
