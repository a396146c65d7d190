"""How long things take: loading data, a training step, inference, what follows it; beside torchvision's model if asked.

    python -m tools.benchmark                                      R50-FPN Mask R-CNN on images of 800x1202
    python -m tools.benchmark --vs torchvision --precision float32 bfloat16 --batch 1 2
    python -m tools.benchmark --parts data --config DATA.BASEDIR=/path/to/COCO DATA.TRAIN=coco_train2017

Each measurement is a process of its own. Where two are compared they take turns, so that a noisy machine is noisy for
both; who waits does nothing. Both do the same work, which is printed: weights are random, so the numbers of proposals,
RoIs, foreground masks and detections are set by thresholds, and weights drawn until they suffice (30 times at most).
Where the work differs, there is no ratio. Data are square generated images if no DATA settings name others; one core
makes the examples.
"""

import argparse
import collections
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from config import UserError, config
from data import network_geometry, pad_images

SIDES = ("this", "torchvision")
COMPARED = ("training", "inference")  # parts that torchvision has, too
CLASSES = 80
OBJECTS = 20  # per image, in training
MEBIBYTE = 2**20
OP_EVENT = re.compile(r"(?P<name>[\w/.]+):(?P<kind>\w+)")  # how the profiler names the run of an op
# The scopes of the model's parts, also where ops stand in the gradients of one or for its second use (rpn_1).
STAGE = re.compile(r"(?:^|/)(conv0|group\d|fpn|rpn|fastrcnn|cascade_rcnn_stage\d|maskrcnn|Momentum)(?:_\d+)?(?=/|$)")
MULTIPLYING = {"Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter", "MatMul", "BatchMatMulV2"}
OTHER = "other"  # no part's: RoIAlign, NMS, sampling, losses


class Case(NamedTuple):
    """One thing to measure."""

    side: str  # of SIDES
    part: str  # of PREPARE
    precision: str
    batch: int  # images
    size: tuple  # height, width in pixels
    overrides: tuple  # KEY=VALUE
    foreground_iou: float = 0.05  # low, so that random proposals suffice for all the foreground that a recipe samples
    proposal_iou: float = 0.8  # high, so that the NMS of random proposals leaves enough of them, in bfloat16 too
    candidates: int = 1000  # (RoI, class) pairs per image that compete to be detections
    draws: int = 30  # of random weights, at most, until the proposals suffice for all the RoIs that training samples


def synthetic_batch(case):
    """Images of noise with random objects: only sizes and counts matter.

    Returns:
        dict: image uint8 [N, H, W, 3], gt_boxes float32 [N, G, 4], gt_labels int64 [N, G], gt_masks bool [N, G, H, W]
    """
    rng = np.random.default_rng(0)
    height, width = case.size
    sizes = rng.uniform(0.05, 0.4, (case.batch, OBJECTS, 2)) * (width, height)
    corners = rng.uniform(0, 1, sizes.shape) * ((width, height) - sizes)
    boxes_xyxy = np.concatenate([corners, corners + sizes], axis=-1).astype(np.float32)
    masks = np.zeros((case.batch, OBJECTS, height, width), bool)
    for image, slot in np.ndindex(case.batch, OBJECTS):
        x1, y1, x2, y2 = boxes_xyxy[image, slot].astype(int)
        masks[image, slot, y1:y2, x1:x2] = True
    return {
        "image": rng.integers(0, 256, (case.batch, height, width, 3)).astype(np.uint8),
        "gt_boxes": boxes_xyxy,
        "gt_labels": rng.integers(1, CLASSES + 1, (case.batch, OBJECTS)),
        "gt_masks": masks,
    }


# ---------------------------------------------------------------- this program: (run, work) of each part


def configure(case):
    """The configuration of a case: R50-FPN with the thresholds for random weights, then what was asked for."""
    height, width = case.size
    config.update(["MODE_FPN=True", f"FRCNN.FG_THRESH={case.foreground_iou}", "TEST.RESULT_SCORE_THRESH=0.0"])
    config.update([f"RPN.PROPOSAL_NMS_THRESH={case.proposal_iou}"])
    config.update([f"PREPROC.{phase}_SHORT_EDGE_SIZE={min(case.size)}" for phase in ("TRAIN", "TEST")])
    config.update([f"PREPROC.MAX_SIZE={max(height, width, 1333)}"])
    config.update([f"{phase}.PRECISION={case.precision}" for phase in ("TRAIN", "TEST")])
    config.update([f"{phase}.BATCH_SIZE_PER_GPU={case.batch}" for phase in ("TRAIN", "TEST")])
    config.update(case.overrides)
    config.DATA.NUM_CATEGORY = CLASSES
    config.check()


def prepare_training(case):
    """A step on the same batch again and again: losses, gradients and the update."""
    session, fetches, feed, work = training_graph(case)
    return (lambda: session.run(fetches, feed)), work


def training_graph(case):
    """(session, what a step fetches, what it is fed with, the work that it does) with random weights."""
    from tensorpack.compat import tfv1
    from tensorpack.tfutils.tower import TowerContext

    import sessions
    from modeling import rcnn

    config.freeze()
    tfv1.disable_eager_execution()
    inputs = [tfv1.placeholder(spec.dtype, spec.shape, spec.name) for spec in rcnn.input_signature(training=True)]
    model = rcnn.RCNN(learning_rate=1e-6)
    with TowerContext("", is_training=True):
        cost = model.build_graph(*inputs)
        step = model.optimizer().minimize(cost)
    session = tfv1.Session(config=sessions.session_config())
    initialize = tfv1.global_variables_initializer()
    batch = training_batch(case)
    feed = {placeholder: batch[placeholder.op.name] for placeholder in inputs}
    graph, scope = tfv1.get_default_graph(), "cascade_stage1" if config.FPN.CASCADE else "fastrcnn"
    counted = {name: graph.get_tensor_by_name(f"{scope}/{name}:0") for name in ("num_rois", "num_foreground")}
    num_rois = config.FRCNN.BATCH_PER_IM
    for _ in range(case.draws):
        session.run(initialize)
        work = {name: float(value) for name, value in session.run(counted, feed).items()}
        if work == {"num_rois": num_rois, "num_foreground": int(num_rois * config.FRCNN.FG_RATIO)}:
            break
    return session, [step, cost, model.gradient_norm], feed, work


def training_batch(case):
    """The batch as the training graph takes it."""
    made = synthetic_batch(case)
    _, multiple = network_geometry()
    image, image_shape = pad_images(list(made["image"]), multiple=multiple)
    masks = np.zeros((case.batch, OBJECTS, *image.shape[1:3]), bool)
    masks[:, :, : case.size[0], : case.size[1]] = made["gt_masks"]
    return made | {
        "image": image,
        "image_shape": image_shape,
        "gt_masks": np.packbits(masks, axis=-1),
        "image_id": np.arange(case.batch),
        "sample_key": np.array([[0, i] for i in range(case.batch)], np.int32),
    }


def prepare_inference(case):
    """From images to detections with masks pasted into them."""
    import eval as evaluation

    images = list(synthetic_batch(case)["image"])
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "random.npz")
        config.TEST.RESULT_SCORE_THRESH, num_rois = save_random_weights(weights, images, case.candidates)
        config.freeze()
        predict = evaluation.load_predictor(weights)
    found = evaluation.predict_images(predict, images)
    work = {"num_rois": num_rois, "num_detections": sum(len(one.scores) for one in found) / case.batch}
    return (lambda: evaluation.predict_images(predict, images)), work


def save_random_weights(path, images, candidates):
    """Write random weights; (score that so many candidates of the first image lie above with them, number of RoIs)."""
    with inference_graph(images[:1]) as (session, _, feed, weights):
        np.savez(path, **weights)
        softmax = [op.outputs[0] for op in session.graph.get_operations() if op.type == "Softmax"]
        scores = np.mean(session.run(softmax, feed), axis=0)[:, 1:]
    return float(np.sort(scores, axis=None)[-candidates]), len(scores)


@contextlib.contextmanager
def inference_graph(images):
    """(session, what inference fetches, what it is fed with, weights by name) with random weights."""
    import tensorflow as tf
    from tensorpack.compat import tfv1

    import checkpoint
    import sessions

    _, multiple = network_geometry()
    with tf.Graph().as_default(), tfv1.Session(config=sessions.session_config()) as session:
        inference = sessions.Inference()
        session.run(tfv1.global_variables_initializer())
        weights = session.run(checkpoint.model_variables())
        for name, value in weights.items():
            if name.endswith(("/b", "/beta")):  # adding zeros would be optimised away
                value += np.random.default_rng(0).normal(0, 0.01, value.shape)
        checkpoint.assign(session, {v: weights[n] for n, v in checkpoint.model_variables().items()})
        feed = dict(zip(inference.inputs, pad_images(images, multiple=multiple)))
        fetches = [tensor for tensor in inference.detections if tensor is not None]
        yield session, fetches, feed, weights


def prepare_data(case):
    """Making training batches in this process alone, on one core: decode, flip, resize, rasterise, pad."""
    import cv2

    import data
    from dataset import get_datasets, shapes

    cv2.setNumThreads(1)  # as in a worker
    folder = tempfile.TemporaryDirectory()  # lives as long as the function below
    if not any(override.startswith(("DATA.TRAIN=", "DATA.BASEDIR=")) for override in case.overrides):
        shapes.generate(folder.name, train=8, val=1, size=min(case.size))
        config.update([f"DATA.BASEDIR={folder.name}", "DATA.TRAIN=shapes_train"])
    config.DATA.NUM_WORKERS = 0
    config.freeze()
    records = [
        record
        for one in get_datasets(config.DATA.TRAIN, config.DATA.BASEDIR)
        for record in one.records(training=True, masks=config.MODE_MASK)
    ]
    batches = iter(data.training_data(records))
    return (lambda: (folder, next(batches))), {"num_images": len(records)}


def prepare_paste(case):
    """Pasting masks into an image of 480x640, as RLE: of 100 boxes as large as COCO's, or as the whole image."""
    import boxes

    rng = np.random.default_rng(0)
    height, width, count = 480, 640, 100
    sizes = np.exp(rng.normal(np.log(60), 1.0, (count, 2))).clip(2, (width, height))  # half are above 60 pixels
    if case.part == "paste-full":
        sizes = np.full((count, 2), (width, height))
    corners = rng.uniform(0, 1, (count, 2)) * ((width, height) - sizes)
    boxes_xyxy = np.concatenate([corners, corners + sizes], axis=1).astype(np.float32)
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    radius = rng.uniform(0.5, 1.2, (count, 1, 1)) + 0.2 * np.sin(
        5 * np.arctan2(y, x) + rng.uniform(0, 6, (count, 1, 1))
    )
    masks = (1 / (1 + np.exp(8 * (np.hypot(x, y) - radius)))).astype(np.float32)
    return (lambda: boxes.paste_rle(masks, boxes_xyxy, height, width)), {"num_detections": count}


PREPARE = {
    "data": prepare_data,
    "training": prepare_training,
    "inference": prepare_inference,
    "paste": prepare_paste,
    "paste-full": prepare_paste,
}


# ---------------------------------------------------------------- processes


def serve(case, connection):
    """The process of one case: prepares it, then measures whenever it is told to."""
    try:
        if case.side == "torchvision":
            from tools import torchvision_peer

            run, work = torchvision_peer.PREPARE[case.part](case, synthetic_batch(case))
        else:
            configure(case)
            run, work = PREPARE[case.part](case)
        run()
        connection.send({"work": work})
        while connection.recv():
            start = time.perf_counter()
            run()
            connection.send({"seconds": time.perf_counter() - start})
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        connection.send({"peak": peak, "ops": profile_ops(run)})
    except UserError as error:
        connection.send({"error": str(error)})


def profile_ops(run):
    """Where one more run spends its time: list of (name of op, kind, seconds on all threads); [] without a graph."""
    if "tensorflow" not in sys.modules:
        return []
    from tensorflow.python.profiler import profiler_v2
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    seconds = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        profiler_v2.start(folder)
        run()
        profiler_v2.stop()
        for path in Path(folder).rglob("*.xplane.pb"):
            space = xplane_pb2.XSpace.FromString(path.read_bytes())
            for plane in space.planes:
                for event in (event for line in plane.lines for event in line.events):
                    name = plane.event_metadata[event.metadata_id].name
                    op = OP_EVENT.fullmatch(name)
                    if op:
                        seconds[op["name"], op["kind"]] += event.duration_ps / 1e12
    return [(name, kind, time_taken) for (name, kind), time_taken in seconds.items()]


def stage_of(op_name):
    """The part of the model that an op belongs to, by its name."""
    stage = STAGE.search(op_name)
    return stage[1] if stage else OTHER


def shares(pairs):
    """Of (key, seconds): list of (key, seconds in all, share of all seconds), the dearest first."""
    sums = collections.Counter()
    for key, seconds in pairs:
        sums[key] += seconds
    return [(key, seconds, seconds / sums.total()) for key, seconds in sums.most_common()]


class Worker:
    """A process that measures one case when it is told to."""

    def __init__(self, case):
        context = multiprocessing.get_context("spawn")
        self.case, self.seconds = case, []
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(case, other), daemon=True)
        self._process.start()
        other.close()
        self.work = self._answer()["work"]

    def _answer(self):
        try:
            message = self._connection.recv()
        except EOFError:
            raise UserError(f"{self.case.side}, {self.case.part}: the process that measures died") from None
        if "error" in message:
            raise UserError(f"{self.case.side}, {self.case.part}: {message['error']}")
        return message

    def measure(self):
        """Run once more."""
        self._connection.send(True)
        self.seconds.append(self._answer()["seconds"] / self.case.batch)

    def finish(self):
        """The result as a dict: the case, seconds per image, images per second, memory, the work done, stages, ops."""
        self._connection.send(False)
        last = self._answer()
        self._process.join(60)  # until it has removed its folder, if it has one
        median = statistics.median(self.seconds)
        return {
            **{name: getattr(self.case, name) for name in ("part", "precision", "batch", "side")},
            "s/img": median,
            "lowest": min(self.seconds),
            "highest": max(self.seconds),
            "img/s": 1 / median,
            "peak MiB": last["peak"] / MEBIBYTE,
            "work": self.work,
            "stages": shares((stage_of(name), seconds) for name, _, seconds in last["ops"]),
            "ops": shares((kind, seconds) for _, kind, seconds in last["ops"]),
        }

    def kill(self):
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()


def measure(cases, *, repeat):
    """Measure cases in turns: list of the results of `Worker.finish`."""
    workers = []
    try:
        for case in cases:  # one after the other: preparing is noisy, too
            workers.append(Worker(case))
        for _ in range(repeat):
            for worker in workers:
                worker.measure()
        return [worker.finish() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()


# ---------------------------------------------------------------- the floor: arithmetic, and the rate of a convolution


def multiply_adds(case):
    """Multiply-adds per image of a graph's convolutions and matrix products, in training those of the gradients too."""
    configure(case)
    if case.part == "training":
        session, fetches, feed, _ = training_graph(case)
        return count_multiply_adds(session, fetches, feed) / case.batch
    config.freeze()
    with inference_graph(list(synthetic_batch(case)["image"])) as (session, fetches, feed, _):
        return count_multiply_adds(session, fetches, feed) / case.batch


def count_multiply_adds(session, fetches, feed):
    """Of all convolutions and matrix products that fetching some tensors or ops takes."""
    from tensorpack.compat import tfv1

    graph = session.graph
    fetched = [fetch.name.partition(":")[0] for fetch in fetches]
    needed = {node.name for node in tfv1.graph_util.extract_sub_graph(graph.as_graph_def(), fetched).node}
    with graph.as_default():
        factors = [factors_of(op) for op in graph.get_operations() if op.name in needed and op.type in MULTIPLYING]
    return sum(int(np.prod(np.concatenate(pair), dtype=np.int64)) for pair in session.run(factors, feed))


def factors_of(op):
    """Two vectors of numbers whose product is how often an op of MULTIPLYING multiplies."""
    import tensorflow as tf

    if op.type == "Conv2D":  # for each output, once for each weight of its channel
        return tf.shape(op.outputs[0]), tf.shape(op.inputs[1])[:3]
    if op.type == "Conv2DBackpropInput":
        return tf.shape(op.inputs[2]), tf.shape(op.inputs[1])[:3]
    if op.type == "Conv2DBackpropFilter":
        return tf.shape(op.inputs[2]), op.inputs[1][:3]
    axis = -2 if op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x") else -1
    return tf.shape(op.outputs[0]), tf.shape(op.inputs[0])[axis, None]


def convolution_rate(precision, *, repeat=5):
    """Multiply-adds per second of a large 3x3 convolution, 256 channels on a map of 200x304: what the cores can do."""
    import tensorflow as tf
    from tensorpack.compat import tfv1

    import sessions

    shape, channels = (1, 200, 304, 256), 256
    with tf.Graph().as_default(), tfv1.Session(config=sessions.session_config()) as session:
        dtype = tf.as_dtype(precision)
        x = tfv1.Variable(tf.cast(tf.ones(shape), dtype))
        kernel = tfv1.Variable(tf.cast(tf.ones((3, 3, channels, channels)), dtype))
        run = tf.nn.conv2d(x, kernel, 1, "SAME").op
        session.run(tfv1.global_variables_initializer())
        session.run(run)
        seconds = []
        for _ in range(repeat):
            start = time.perf_counter()
            session.run(run)
            seconds.append(time.perf_counter() - start)
    return shape[1] * shape[2] * 9 * channels * channels / statistics.median(seconds)


# ---------------------------------------------------------------- the command


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PREPARE, default=list(PREPARE))
    parser.add_argument("--precision", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N", help="images (default: 1)")
    parser.add_argument("--size", default="800x1202", metavar="HEIGHTxWIDTH", help="of the images (%(default)s)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="times that each is measured (%(default)s)")
    parser.add_argument("--vs", choices=["torchvision"], help="measure that, too, in turns (`make bench` installs it)")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="another model than R50-FPN")
    parser.add_argument("--profile", action="store_true", help="print what kinds of ops take the time")
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    return parser.parse_args(arguments)


def parse_size(text):
    """HEIGHTxWIDTH as two integers."""
    edges = text.split("x")
    if len(edges) != 2 or not all(edge.isdecimal() and int(edge) >= 32 for edge in edges):
        raise UserError(f"--size {text}: give HEIGHTxWIDTH in pixels, 32 at least")
    return tuple(map(int, edges))


def main(arguments):
    size, overrides = parse_size(arguments.size), tuple(arguments.config)
    check_arguments(arguments)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # of all processes to come
    if arguments.vs:
        in_process(check_peer)
    counts, rates = find_floors(arguments, size, overrides)
    results = []
    for part, precision, batch in itertools.product(arguments.parts, arguments.precision, arguments.batch):
        if part not in COMPARED and (precision, batch) != (arguments.precision[0], arguments.batch[0]):
            continue  # once is enough
        sides = SIDES if arguments.vs and part in COMPARED else SIDES[:1]
        cases = [Case(side, part, precision, batch, size, overrides) for side in sides]
        results += measure(cases, repeat=arguments.repeat)
        print_group(results[-len(cases) :], profile=arguments.profile)
    print_floors(counts, rates)
    if arguments.json:
        with open(arguments.json, "x") as file:
            parts = {"results": results, "multiply-adds": counts, "multiply-adds per second": rates}
            json.dump(parts, file, indent=2)


def find_floors(arguments, size, overrides):
    """Multiply-adds per image of each part that is a graph, and their rate per second in each precision: two dicts."""
    cases = [Case(SIDES[0], part, "float32", 1, size, overrides) for part in COMPARED if part in arguments.parts]
    counts = {case.part: in_process(multiply_adds, case) for case in cases}
    return counts, {precision: in_process(convolution_rate, precision) for precision in arguments.precision if counts}


def check_peer():
    """Raises UserError where torchvision's side can't be measured."""
    try:
        importlib.import_module("tools.torchvision_peer")
    except ImportError as error:
        raise UserError(f"--vs torchvision: {error}: `make bench` installs what it needs") from error


def check_arguments(arguments):
    """Raises UserError for options that nothing can be measured with."""
    if min(*arguments.batch, arguments.repeat) < 1:
        raise UserError("--batch and --repeat: 1 at least")
    path = Path(arguments.json).absolute() if arguments.json else None
    if path and (path.exists() or not os.access(path.parent, os.W_OK)):
        raise UserError(f"--json {path}: give a new file in a folder that can be written to")
    if arguments.vs and not all(override.startswith("DATA.") for override in arguments.config):
        raise UserError("--vs torchvision: its side is R50-FPN Mask R-CNN, so --config takes DATA keys alone")
    if arguments.vs and "float16" in arguments.precision:
        raise UserError("--vs torchvision: not in float16, which its model does not train in on a CPU")


def print_floors(counts, rates):
    """How long an image's multiply-adds take at the rate of a large convolution."""
    for precision, rate in rates.items():
        print(f"a large 3x3 convolution in {precision}: {rate / 1e9:.0f} billion multiply-adds per second")
        for part, count in counts.items():
            print(f"  {part}: {count / 1e9:.0f} billion per image, {count / rate:.3f} s at that rate")


def in_process(function, *args):
    """Call a function in a process of its own, which takes what it leaves behind with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def print_group(results, *, profile):
    """A table of results that were measured in turns; the ratio says how many times faster this program is."""
    columns = ("part", "precision", "batch", "side", "s/img", "lowest", "highest", "img/s", "peak MiB")
    rows = [[result[name] for name in columns] for result in results]
    formats = ("", "", "", "", ".3f", ".3f", ".3f", ".2f", ".0f")
    print(tabulate(rows, columns, floatfmt=formats))
    for result in results:
        print(f"  {result['side']}: " + ", ".join(f"{name} {value:g}" for name, value in result["work"].items()))
        if result["stages"]:
            print("  time of ops: " + ", ".join(f"{stage} {share:.1%}" for stage, _, share in result["stages"]))
        for kind, seconds, share in result["ops"][: 15 if profile else 0]:
            print(f"    {kind:<28} {seconds:8.3f} s {share:6.1%}")
    if len(results) == 2 and results[0]["work"] == results[1]["work"]:
        print(f"  ratio {results[1]['s/img'] / results[0]['s/img']:.2f}: torchvision's time over ours")
    elif len(results) == 2:
        print("  no ratio: they didn't do the same work")
    print(flush=True)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
