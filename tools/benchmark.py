"""Measures the speed of data, training, inference, mask pasting and NMS, also beside torchvision's model.

    python -m tools.benchmark                                      R50-FPN Mask R-CNN on images of 800x1202
    python -m tools.benchmark --vs torchvision --precision float32 bfloat16 --batch 1 2
    python -m tools.benchmark --parts data --config DATA.BASEDIR=/path/to/COCO DATA.TRAIN=coco_train2017

Each measurement runs in a process of its own. Two that are compared alternate, so that other load on the machine
affects both; the one that waits is idle. Both do the same work, which is printed. Weights are random: thresholds set
the numbers of proposals, RoIs, foreground masks and detections, and weights are drawn until these are reached (30 times
at most). If the work differs, no ratio is printed. Without DATA settings the data are square generated images; one core
makes the examples.
"""

import argparse
import collections
import contextlib
import functools
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

from config import UserError, config, padding_multiple
from dataset.images import pad_images

SIDES = ("this", "torchvision")
COMPARED = ("training", "inference")  # parts that torchvision has, too
CLASSES = 80
OBJECTS = 20  # per image, in training
MEBIBYTE = 2**20
OP_EVENT = re.compile(r"([\w/.]+):\w+")  # the profiler's name of a run of an op: NAME:TYPE
# The scopes of the model's parts, also within the names of gradients and of a second use (rpn_1).
STAGE = re.compile(r"(?:^|/)(conv0|group\d|fpn|rpn|fastrcnn|cascade_rcnn_stage\d|maskrcnn|Momentum)(?:_\d+)?(?=/|$)")
OTHER = "other"  # ops of no part: RoIAlign, NMS, sampling, losses


class Case(NamedTuple):
    """A measurement: one part of the work, on one side, with its settings."""

    side: str  # one of SIDES
    part: str  # a key of PREPARE
    precision: str  # float32, bfloat16 or float16
    batch: int  # images
    size: tuple[int, int]  # height, width in pixels
    overrides: tuple[str, ...]  # KEY=VALUE
    foreground_iou: float = 0.05  # low, so that random proposals contain all the foreground that a recipe samples
    proposal_iou: float = 0.8  # high, so that the NMS of random proposals keeps enough of them, in bfloat16 too
    candidates: int = 1000  # (RoI, class) pairs per image that compete to be detections
    draws: int = 30  # of random weights, at most, until the proposals contain all the RoIs that training samples


def synthetic_batch(case):
    """Makes images of noise with random objects: only sizes and counts matter.

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


# ---------------------------------------------------------------- this program: each part as (run, work)


def configure(case):
    """Sets the global config for a case: R50-FPN with the thresholds for random weights, then the case's overrides."""
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
    """Prepares training steps on one and the same batch: losses, gradients and the update."""
    from training.exactness import complete_gradients

    session, fetches, feed, work = training_graph(case)

    def step():
        with complete_gradients():
            session.run(fetches, feed)

    return step, work


def training_graph(case):
    """The training graph with random weights: (session, fetches of a step, its feed, the work that it does)."""
    from tensorpack.compat import tfv1
    from tensorpack.tfutils.tower import TowerContext

    from inference.graph import session_config
    from training.model import TrainingModel

    config.freeze()
    tfv1.disable_eager_execution()
    model = TrainingModel(config, learning_rate=1e-6)
    inputs = [tfv1.placeholder(spec.dtype, spec.shape, spec.name) for spec in model.inputs()]
    fill, stage, staged = staging(inputs)
    with TowerContext("", is_training=True):
        cost = model.build_graph(*staged)
        step = model.optimizer().minimize(cost)
    session = tfv1.Session(config=session_config())
    initialize = tfv1.global_variables_initializer()
    batch = training_batch(case)
    feed = {placeholder: batch[placeholder.op.name] for placeholder in inputs}
    graph, scope = tfv1.get_default_graph(), "cascade_stage1" if config.FPN.CASCADE else "fastrcnn"
    counted = {name: graph.get_tensor_by_name(f"{scope}/{name}:0") for name in ("num_rois", "num_foreground")}
    num_rois = config.FRCNN.BATCH_PER_IM
    session.run(fill, feed)
    for _ in range(case.draws):
        session.run(initialize)
        work = {name: float(value) for name, value in session.run((counted, stage), feed)[0].items()}
        if work == {"num_rois": num_rois, "num_foreground": int(num_rois * config.FRCNN.FG_RATIO)}:
            break
    return session, [step, cost, model.gradient_norm, stage], feed if stage.type == "NoOp" else {}, work


def staging(inputs):
    """On a GPU, a batch that stays there: the op that takes it there, the op that keeps it there, and its tensors."""
    import tensorflow as tf
    from tensorflow.python.ops.data_flow_ops import StagingArea

    from modeling import device

    if not device.is_gpu():
        return tf.no_op(), tf.no_op(), inputs
    area = StagingArea([x.dtype for x in inputs], [x.shape for x in inputs], capacity=1)
    fill, staged = area.put(inputs), area.get()
    return fill, area.put(staged), staged


def training_batch(case):
    """The synthetic batch as `rcnn.input_signature` describes it, padded and with packed masks."""
    batch = synthetic_batch(case)
    image, image_shape = pad_images(list(batch["image"]), multiple=padding_multiple(config))
    masks = np.zeros((case.batch, OBJECTS, *image.shape[1:3]), bool)
    masks[:, :, : case.size[0], : case.size[1]] = batch["gt_masks"]
    return batch | {
        "image": image,
        "image_shape": image_shape,
        "gt_masks": np.packbits(masks, axis=-1),
        "image_id": np.arange(case.batch),
        "sample_key": np.array([[0, i] for i in range(case.batch)], np.int32),
    }


def prepare_inference(case):
    """Prepares inference: from images to detections with pasted masks."""
    from data import inference_geometry
    from inference.predictor import load_network, predict_images

    images = list(synthetic_batch(case)["image"])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "random.npz")
        config.TEST.RESULT_SCORE_THRESH, num_rois = save_random_weights(path, images, case.candidates)
        config.freeze()
        network = load_network(config, path)
    run = functools.partial(predict_images, network, images, geometry=inference_geometry(config))
    work = {"num_rois": num_rois, "num_detections": sum(len(one.scores) for one in run()) / case.batch}
    return run, work


def save_random_weights(path, images, candidates):
    """Writes random weights; returns the score that `candidates` pairs of the first image reach, and its RoI count."""
    with inference_graph(images[:1]) as (session, _, feed, values):
        np.savez(path, **values)
        softmax = [op.outputs[0] for op in session.graph.get_operations() if op.type == "Softmax"]
        scores = np.mean(session.run(softmax, feed), axis=0)[:, 1:]
    return float(np.sort(scores, axis=None)[-candidates]), len(scores)


@contextlib.contextmanager
def inference_graph(images):
    """Yields the inference graph with random weights: (session, fetches, feed, weights by name)."""
    import tensorflow as tf
    from tensorpack.compat import tfv1

    from common import weights
    from inference.graph import Inference, session_config

    with tf.Graph().as_default(), tfv1.Session(config=session_config()) as session:
        inference = Inference(config)
        session.run(tfv1.global_variables_initializer())
        values = session.run(weights.model_variables())
        for name, value in values.items():
            if name.endswith(("/b", "/beta")):  # TensorFlow would remove the addition of zeros
                value += np.random.default_rng(0).normal(0, 0.01, value.shape)
        weights.assign(session, {v: values[n] for n, v in weights.model_variables().items()})
        inference.update(session)
        feed = dict(zip(inference.inputs, pad_images(images, multiple=padding_multiple(config))))
        fetches = [tensor for tensor in inference.detections if tensor is not None]
        yield session, fetches, feed, values


def prepare_data(case):
    """Prepares training batches, made in this process on one core: decode, flip, resize, rasterise, pad."""
    import cv2

    from data import training_data
    from dataset import get_datasets, shapes

    cv2.setNumThreads(1)  # as in a worker
    folder = tempfile.TemporaryDirectory()  # the returned function keeps it alive
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
    batches = iter(training_data(config, records))
    return (lambda: (folder, next(batches))), {"num_images": len(records)}


def prepare_paste(case):
    """Prepares pasting 100 masks into an image of 480x640, as RLE: in boxes of COCO's sizes, or of the whole image."""
    from common.rle import paste_rle

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
    return (lambda: paste_rle(masks, boxes_xyxy, height, width)), {"num_detections": count}


def prepare_nms(case):
    """Prepares the NMS of proposals, in the form for CPUs or GPUs: for each image five problems of 2000 boxes."""
    import tensorflow as tf
    from tensorpack.compat import tfv1

    from inference.graph import session_config
    from modeling import device, nms

    boxes_xyxy = clustered_boxes(5 * case.batch, 2000, case.size)
    with tf.Graph().as_default(), device.building_for(gpu=case.part == "nms-gpu"):
        boxes = tfv1.get_variable("boxes", boxes_xyxy.shape)  # the device has it before the measurement
        candidates = tf.fill(boxes_xyxy.shape[:2], True)
        kept = nms.suppress(boxes, candidates, iou_threshold=0.7, max_output=1000)
        session = tfv1.Session(config=session_config())
    session.run(boxes.initializer, {boxes.initializer.inputs[1]: boxes_xyxy})
    num_kept = int(session.run(kept)[1].sum())
    return (lambda: session.run([x.op for x in kept])), {"num_kept": num_kept}


def clustered_boxes(problems, count, size):
    """Boxes around 100 centres in each problem, float32 [problems, count, 4], as a trained RPN proposes them."""
    rng, (height, width) = np.random.default_rng(0), size
    centers = rng.uniform(0, 1, (problems, 100, 2)) * (width, height)
    edges = np.exp(rng.normal(np.log(min(size) / 8), 0.5, (problems, 100, 2)))
    cluster = rng.integers(0, 100, (problems, count, 1))
    center, edge = (np.take_along_axis(x, cluster, axis=1) for x in (centers, edges))
    center, edge = center + edge * rng.normal(0, 0.08, center.shape), edge * np.exp(rng.normal(0, 0.15, edge.shape))
    return np.concatenate([center - edge / 2, center + edge / 2], axis=2).astype(np.float32)


PREPARE = {
    "data": prepare_data,
    "training": prepare_training,
    "inference": prepare_inference,
    "paste": prepare_paste,
    "paste-full": prepare_paste,
    "nms": prepare_nms,
    "nms-gpu": prepare_nms,
}


# ---------------------------------------------------------------- processes


def serve(case, connection):
    """The process of a case: prepares it, then measures one run for each true value that it receives."""
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
        device, peak = find_device(case)
        connection.send({"device": device, "peak": peak, "ops": profile_ops(run) if device == "CPU" else []})
    except UserError as error:
        connection.send({"error": str(error)})


def find_device(case):
    """ "GPU" or "CPU", which this process used, and the peak of its memory there, in bytes."""
    of_process = "CPU", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if case.part not in COMPARED:
        return of_process
    if case.side == "torchvision":
        from tools import torchvision_peer

        peak = torchvision_peer.peak_memory()
        return of_process if peak is None else ("GPU", peak)
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        return of_process
    return "GPU", tf.config.experimental.get_memory_info("GPU:0")["peak"]


def profile_ops(run):
    """Profiles one more run: list of (name of an op, its seconds on all threads); [] without a graph."""
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
                        seconds[op[1]] += event.duration_ps / 1e12
    return list(seconds.items())


def stage_of(op_name):
    """The part of the model to which an op of this name belongs."""
    stage = STAGE.search(op_name)
    return stage[1] if stage else OTHER


def shares(pairs):
    """Sums (key, seconds) by key: list of (key, seconds, share of all seconds), the largest first."""
    sums = collections.Counter()
    for key, seconds in pairs:
        sums[key] += seconds
    return [(key, seconds, seconds / sums.total()) for key, seconds in sums.most_common()]


class Worker:
    """A process that measures one case on demand.

    Attributes:
        case: Case. work: dict of numbers by name. seconds: list of float, per image.
    """

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
        """Measures one more run."""
        self._connection.send(True)
        self.seconds.append(self._answer()["seconds"] / self.case.batch)

    def finish(self):
        """Ends the process; returns a dict: case, seconds per image, images per second, memory, work, and stages."""
        self._connection.send(False)
        last = self._answer()
        self._process.join(60)  # it may have a temporary folder to remove
        median = statistics.median(self.seconds)
        return {
            **{name: getattr(self.case, name) for name in ("part", "precision", "batch", "side")},
            "s/img": median,
            "lowest": min(self.seconds),
            "highest": max(self.seconds),
            "img/s": 1 / median,
            "peak MiB": last["peak"] / MEBIBYTE,
            "device": last["device"],
            "work": self.work,
            "stages": shares((stage_of(name), seconds) for name, seconds in last["ops"]),
        }

    def kill(self):
        """Kills the process."""
        self._process.kill()
        self._process.join()


def measure(cases, *, repeat):
    """Measures cases alternately, `repeat` times each; returns the list of their `Worker.finish`."""
    workers = []
    try:
        for case in cases:  # one after the other: preparation would disturb a measurement
            workers.append(Worker(case))
        for _ in range(repeat):
            for worker in workers:
                worker.measure()
        return [worker.finish() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()


# ---------------------------------------------------------------- a lower bound


def count_multiply_adds(case):
    """The multiply-adds per image of a part's convolutions and matrix products; in training with their gradients."""
    from tools import multiply_adds

    configure(case)
    if case.part == "training":
        session, fetches, feed, _ = training_graph(case)
        return multiply_adds.count(session, fetches, feed) / case.batch
    config.freeze()
    with inference_graph(list(synthetic_batch(case)["image"])) as (session, fetches, feed, _):
        return multiply_adds.count(session, fetches, feed) / case.batch


def convolution_rate(precision):
    """The multiply-adds per second of a large convolution: see `multiply_adds.rate`."""
    from tools import multiply_adds

    return multiply_adds.rate(precision)


# ---------------------------------------------------------------- the command


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PREPARE, default=list(PREPARE))
    parser.add_argument("--precision", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N", help="images (default: 1)")
    parser.add_argument("--size", default="800x1202", metavar="HEIGHTxWIDTH", help="of the images (%(default)s)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="number of measurements (%(default)s)")
    parser.add_argument("--vs", choices=["torchvision"], help="also measure its model (`make bench` installs it)")
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="KEY=VALUE", help="settings of another model or data"
    )
    parser.add_argument("--xla", action="store_true", help="let TensorFlow compile clusters of ops by XLA")
    parser.add_argument("--json", metavar="FILE", help="also write the results to this new file")
    return parser.parse_args(arguments)


def parse_size(text):
    """Parses HEIGHTxWIDTH: (height, width), each at least 32; raises UserError for other texts."""
    edges = text.split("x")
    if len(edges) != 2 or not all(edge.isdecimal() and int(edge) >= 32 for edge in edges):
        raise UserError(f"--size {text}: give HEIGHTxWIDTH in pixels, 32 at least")
    return tuple(map(int, edges))


def main(arguments):
    """Measures all combinations of part, precision and batch; prints them, and writes them to --json."""
    size, overrides = parse_size(arguments.size), tuple(arguments.config)
    check_arguments(arguments)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # of all processes to come
    if arguments.xla:
        os.environ["TF_XLA_FLAGS"] = "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit"
    if arguments.vs:
        in_process(check_peer)
    results = []
    for part, precision, batch in itertools.product(arguments.parts, arguments.precision, arguments.batch):
        # Parts other than the network: once is enough, but the number of problems of an NMS grows with the batch.
        batches = arguments.batch if part.startswith("nms") else arguments.batch[:1]
        if part not in COMPARED and (precision != arguments.precision[0] or batch not in batches):
            continue
        sides = SIDES if arguments.vs and part in COMPARED else SIDES[:1]
        cases = [Case(side, part, precision, batch, size, overrides) for side in sides]
        results += measure(cases, repeat=arguments.repeat)
        print_group(results[-len(cases) :])
    counts, rates = {}, {}
    if all(result["device"] == "CPU" for result in results):
        counts, rates = find_floors(arguments, size, overrides)
        print_floors(counts, rates)
    if arguments.json:
        with open(arguments.json, "x") as file:
            parts = {"results": results, "multiply-adds": counts, "multiply-adds per second": rates}
            json.dump(parts, file, indent=2)


def find_floors(arguments, size, overrides):
    """The multiply-adds per image of each part that is a graph, and their rate in each precision: two dicts."""
    cases = [Case(SIDES[0], part, "float32", 1, size, overrides) for part in COMPARED if part in arguments.parts]
    counts = {case.part: in_process(count_multiply_adds, case) for case in cases}
    return counts, {precision: in_process(convolution_rate, precision) for precision in arguments.precision if counts}


def check_peer():
    """Raises UserError if torchvision's side cannot be measured."""
    try:
        importlib.import_module("tools.torchvision_peer")
    except ImportError as error:
        raise UserError(f"--vs torchvision: {error}: `make bench` installs what it needs") from error


def check_arguments(arguments):
    """Raises UserError for options with unusable values."""
    if min(*arguments.batch, arguments.repeat) < 1:
        raise UserError("--batch and --repeat: 1 at least")
    path = Path(arguments.json).absolute() if arguments.json else None
    if path and (path.exists() or not os.access(path.parent, os.W_OK)):
        raise UserError(f"--json {path}: give a new file in a folder that can be written to")
    if arguments.vs and not all(override.startswith("DATA.") for override in arguments.config):
        raise UserError("--vs torchvision: its side is R50-FPN Mask R-CNN, so --config takes DATA keys alone")


def print_floors(counts, rates):
    """Prints the time of an image's multiply-adds at the rate of a large convolution: a lower bound."""
    for precision, rate in rates.items():
        print(f"a large 3x3 convolution in {precision}: {rate / 1e9:.0f} billion multiply-adds per second")
        for part, count in counts.items():
            print(f"  {part}: {count / 1e9:.0f} billion per image, {count / rate:.3f} s at that rate")


def in_process(function, *args):
    """Calls a function in a process of its own, so that its graphs and memory vanish with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def print_group(results):
    """Prints a table of results that were measured alternately, and the ratio of their times if their work is equal."""
    columns = ("part", "device", "precision", "batch", "side", "s/img", "lowest", "highest", "img/s", "peak MiB")
    rows = [[result[name] for name in columns] for result in results]
    formats = ("", "", "", "", "", ".4f", ".4f", ".4f", ".2f", ".0f")
    print(tabulate(rows, columns, floatfmt=formats))
    for result in results:
        print(f"  {result['side']}: " + ", ".join(f"{name} {value:g}" for name, value in result["work"].items()))
        if result["stages"]:
            print("  time of ops: " + ", ".join(f"{stage} {share:.1%}" for stage, _, share in result["stages"]))
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
