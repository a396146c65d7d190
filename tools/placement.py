"""Counts what a training step or an inference does on a GPU, without having one: what runs on the host, and what waits.

    python -m tools.placement training MODE_FPN=True TRAIN.PRECISION=bfloat16
    python -m tools.placement inference MODE_FPN=True
    python -m tools.placement renew       rewrites the table of kernels from an installed TensorFlow with GPU support

The graph is built for a GPU, and runs once on the CPU as train.py runs it: for what TensorFlow's optimizer leaves of
it, and for the sizes of tensors. The table says which ops have a kernel for GPUs, and which inputs and outputs of the
kernel lie in host memory. A tensor that is made on the device and read on the host crosses: it is copied, and waited
for. Random weights leave loops at their first look.
"""

import argparse
import collections
import contextlib
import json
import logging.handlers
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from config import UserError, config

TABLE = Path(__file__).parent / "gpu_kernels.json"
# Ops that launch nothing on the device.
METADATA = {
    *(
        "Const",
        "Identity",
        "IdentityN",
        "Reshape",
        "ExpandDims",
        "Squeeze",
        "Bitcast",
        "Shape",
        "ShapeN",
        "Size",
        "Rank",
    ),
    *("NoOp", "StopGradient", "PreventGradient", "Placeholder", "PlaceholderWithDefault", "_Arg", "_Retval", "_Send"),
    *("VarHandleOp", "ReadVariableOp", "VariableV2", "ControlTrigger", "_Recv", "_HostSend", "_HostRecv"),
    *("Enter", "Exit", "Switch", "Merge", "NextIteration", "LoopCond", "RefEnter", "RefSwitch"),
}
FED = {"Const", "Placeholder", "_Arg", "_Recv"}
OF_THE_INPUT = re.compile(
    r"(^|/)(QueueInput|input_queue|StagingInput|input_wanted|input_there|data_time)|EMA/data_time"
    r"|Queue(Dequeue|Enqueue|Size)"
)
ON_DEVICE = re.compile(r"Horovod|Collective|Nccl")  # in builds with GPU support
SUMMARY = re.compile(r"Summary$")
FINISH = "finish"  # name of the stand-in for an op that CPUs lack: see `finish`


class Crossing(NamedTuple):
    """A tensor that is made on the device and read on the host."""

    tensor: str
    label: str  # its op and dtype, and the op that reads it
    times: int  # in the step
    octets: int  # in the step; 0 where sizes are not known


class Trace(NamedTuple):
    """A graph that has run."""

    nodes: list  # of NodeDef, as executed
    runs: collections.Counter  # executions of each, by name
    sizes: dict[str, int]  # bytes of a tensor, by "name:port"
    lines: dict[str, str]  # "file:line" of the project that made an op, by name
    on_host: frozenset[str] = frozenset()  # names of ops that the program puts there


class Count(NamedTuple):
    """What a graph does on a GPU."""

    without_kernel: dict[str, list[str]]  # names of nodes, by op and dtypes
    crossings: list[Crossing]
    device: list[str]  # names of nodes that launch work
    launches: int  # their executions
    host: list[str]  # names of nodes that compute on the host
    ops: collections.Counter  # nodes by op


# ---------------------------------------------------------------- the table


def renew(path=TABLE):
    """Writes the table from the kernels that the installed TensorFlow has for GPUs.

    Raises:
        UserError: it has none.
    """
    from tensorflow.python.framework import dtypes, kernels

    table = collections.defaultdict(set)
    for kernel in kernels.get_all_registered_kernels().kernel:
        if kernel.device_type in ("GPU", "DEFAULT"):
            types = {
                c.name: tuple(sorted(dtypes.as_dtype(t).name for t in c.allowed_values.list.type))
                for c in kernel.constraint
            }
            table[kernel.op].add((tuple(sorted(types.items())), tuple(sorted(kernel.host_memory_arg))))
    if "Conv2D" not in table:
        raise UserError("the installed TensorFlow has no kernels for GPUs: install requirements/gpu.txt")
    lines = (f"{json.dumps(op)}: {json.dumps(sorted(table[op]))}" for op in sorted(table))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read_table(path=TABLE):
    """The table: {op: [(dtypes allowed per attribute, arguments in host memory)]}."""
    return {
        op: [({name: set(types) for name, types in constraints}, set(host)) for constraints, host in kernels]
        for op, kernels in json.loads(path.read_text()).items()
    }


def find_kernel(table, node):
    """The arguments in host memory of the kernel that fits a NodeDef, a set, or None without a kernel for GPUs."""
    import tensorflow as tf

    if ON_DEVICE.search(node.op) or (node.op == "PyFuncStateless" and node.name.rpartition("/")[2].startswith(FINISH)):
        return set()
    for constraints, host in table.get(node.op, ()):
        types = {name: node.attr[name] for name in constraints if name in node.attr}
        if all(
            {tf.as_dtype(t).name for t in (value.list.type or [value.type]) if t} <= constraints[name]
            for name, value in types.items()
        ):
            return host
    return None


# ---------------------------------------------------------------- counting


def count(traced, table):
    """Counts what a Trace does on a GPU. `table`: see `read_table`."""
    nodes, runs, sizes = traced.nodes, traced.runs, traced.sizes
    by_name = {node.name: node for node in nodes}
    kernels = {node.name: find_kernel(table, node) for node in nodes}
    is_input = {node.name: bool(OF_THE_INPUT.search(node.name) or OF_THE_INPUT.search(node.op)) for node in nodes}
    without, device, host = collections.defaultdict(list), [], []
    for node in nodes:
        if is_input[node.name] or node.op in METADATA or SUMMARY.search(node.op):
            continue
        if node.name in traced.on_host and not ON_DEVICE.search(node.op):
            kernels[node.name] = None
        elif kernels[node.name] is None:
            without[_describe(node)].append(node.name)
        (host if _is_of_host(node, kernels[node.name]) else device).append(node.name)
    crossings = {}
    for node in nodes:
        for position, tensor in enumerate(x for x in node.input if not x.startswith("^")):
            name, _, port = tensor.partition(":")
            source = by_name.get(name)
            if source is None or source.op in FED or is_input[name] or tensor in crossings:
                continue
            if SUMMARY.search(node.op) or node.op == "_Retval":  # the results
                continue
            if _is_on_device(source, int(port or 0), kernels[name]) and _wants_host(node, position, kernels[node.name]):
                times = max(runs[name], 1)
                label = f"{_describe(source)} -> {node.op}"
                crossings[tensor] = Crossing(tensor, label, times, times * sizes.get(f"{name}:{port or 0}", 0))
    ops = collections.Counter(node.op for node in nodes)
    launches = sum(runs[name] for name in device)
    return Count(dict(without), list(crossings.values()), device, launches, host, ops)


def _describe(node):
    import tensorflow as tf

    types = [tf.as_dtype(node.attr[name].type).name for name in ("T", "dtype", "SrcT", "DstT") if node.attr[name].type]
    return f"{node.op}({', '.join(types)})"


def _argument(arguments, node, index):
    """The ArgDef that the index-th tensor of a node belongs to, and the tensor's DataType."""
    first = 0
    for argument in arguments:
        types = list(node.attr[argument.type_list_attr].list.type) if argument.type_list_attr else None
        length = len(types) if types is not None else node.attr[argument.number_attr].i if argument.number_attr else 1
        if index < first + length:
            single = argument.type or node.attr[argument.type_attr].type
            return argument.name, types[index - first] if types is not None else single
        first += length
    return None, 0


def _op_def(node):
    from tensorflow.python.framework import op_def_registry

    return op_def_registry.get(node.op)


def _is_resource(dtype):
    import tensorflow as tf

    return dtype in (tf.resource.as_datatype_enum, tf.variant.as_datatype_enum, tf.string.as_datatype_enum)


def _is_on_device(node, port, host):
    op_def = _op_def(node)
    if host is None or op_def is None:
        return False
    name, dtype = _argument(op_def.output_arg, node, port)
    return name not in host and not _is_resource(dtype)


def _wants_host(node, position, host):
    op_def = _op_def(node)
    if op_def is None:
        return False
    return host is None or _argument(op_def.input_arg, node, position)[0] in host


def _is_of_host(node, host):
    """Whether a node computes on the host: it has no kernel, or one whose outputs all lie there."""
    if host is None:
        return True
    outputs = [argument.name for argument in _op_def(node).output_arg]
    return bool(outputs) and set(outputs) <= host


# ---------------------------------------------------------------- graphs


def trace(mode, overrides):
    """Runs a training step, or an inference, built for a GPU.

    Returns:
        Trace
    """
    from unittest import mock

    from modeling import device, layers

    with (
        device.building_for(gpu=True),
        mock.patch.object(device, "runs_on_gpu", lambda: True),
        mock.patch.object(layers, "_fused_finish", finish),
    ):
        metadata, graph = {"training": trace_training, "inference": trace_inference}[mode](overrides)
    nodes = [node for graph in metadata.partition_graphs for node in graph.node]
    runs, sizes = collections.Counter(), {}
    for stats in (s for of_device in metadata.step_stats.dev_stats for s in of_device.node_stats):
        runs[stats.node_name] += 1
        for output in stats.output:
            sizes[f"{stats.node_name}:{output.slot}"] = _octets(output.tensor_description)
    on_host = frozenset(op.name for op in graph.get_operations() if "CPU" in op.device.upper())
    return Trace(nodes, runs, sizes, _source_lines(graph), on_host)


def finish(x, bias, shortcut, *, has_relu):
    """Stands for the op of `layers._fused_finish`, which only GPUs have, as one op too."""
    import numpy as np
    import tensorflow as tf

    def compute(x, bias, *shortcut):
        y = sum(shortcut, x + bias.astype(x.dtype))
        return np.maximum(y, 0) if has_relu else y

    return tf.numpy_function(compute, [x, bias, *shortcut], x.dtype, stateful=False, name=FINISH)


def _source_lines(graph):
    """The line of the project that made each op of a graph: {name: "file:line"}."""
    root = str(Path(__file__).resolve().parent.parent) + os.sep
    lines = {}
    for op in graph.get_operations():
        frames = [f for f in op.traceback or () if f.filename.startswith(root) and ".venv" not in f.filename]
        if frames:
            lines[op.name] = f"{frames[-1].filename.removeprefix(root)}:{frames[-1].lineno}"
    return lines


def _octets(description):
    import tensorflow as tf

    count = 1
    for dimension in description.shape.dim:
        count *= dimension.size
    return count * tf.as_dtype(description.dtype).size if description.dtype else 0


def _trace_options():
    from tensorpack.compat import tfv1

    return tfv1.RunOptions(trace_level=tfv1.RunOptions.FULL_TRACE, output_partition_graphs=True)


def plain_session_config(make):
    """Returns `make`, a function like `inference.graph.session_config`, without the fusions that CPUs alone have."""

    def session_config(**options):
        from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig

        result = make(**options)
        result.graph_options.rewrite_options.remapping = RewriterConfig.OFF
        return result

    return session_config


def trace_inference(overrides, *, size=(256, 320), batch=2):
    """The RunMetadata of an inference of random weights, and its graph."""
    import numpy as np
    import tensorflow as tf
    from tensorpack.compat import tfv1

    from inference.graph import Inference, session_config

    settings = config
    settings.update([*overrides, "TEST.RESULT_SCORE_THRESH=0.0"])
    settings.DATA.NUM_CATEGORY = 80
    metadata = tfv1.RunMetadata()
    with tf.Graph().as_default(), tfv1.Session(config=plain_session_config(session_config)()) as session:
        inference = Inference(settings)
        session.run(tfv1.global_variables_initializer())
        inference.update(session)
        image = np.random.default_rng(0).integers(0, 256, (batch, *size, 3)).astype(np.uint8)
        feed = dict(zip(inference.inputs, (image, np.array([size] * batch, np.int32))))
        fetches = [tensor for tensor in inference.detections if tensor is not None]
        session.run(fetches, feed, options=_trace_options(), run_metadata=metadata)
        return metadata, session.graph


class _Traced(Exception):
    """Leaves a training whose step is traced."""


def trace_training(overrides):
    """The RunMetadata of the second step of a training of generated images, and its graph."""
    from unittest import mock

    from tensorpack.callbacks import Callback
    from tensorpack.compat import tfv1

    from training import run

    class Tracer(Callback):
        _chief_only = False
        steps = 0

        def _before_run(self, _):
            self.steps += 1
            return tfv1.train.SessionRunArgs([], options=_trace_options()) if self.steps == 2 else None

        def _after_run(self, _, values):
            if self.steps == 2:
                found.extend([values.run_metadata, tfv1.get_default_graph()])
                raise _Traced

    found = []
    make_callbacks, make_session_config = run.make_callbacks, run.session_config
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.suppress(_Traced),
        mock.patch.object(run, "make_callbacks", lambda *a, **k: [*make_callbacks(*a, **k), Tracer()]),
        mock.patch.object(run, "session_config", plain_session_config(make_session_config)),
    ):
        run.train(_small_run(overrides, Path(folder)))
    return tuple(found)


def _small_run(overrides, folder):
    """A Run of 16 generated images in a step, which no recipe accumulates, written to a folder."""
    from common.ranks import Ranks
    from dataset import get_datasets, shapes
    from training.run import Run
    from training.watchdog import Watchdog

    shapes.generate(folder, train=16, val=1, size=96)
    config.update([f"DATA.BASEDIR={folder}", "DATA.TRAIN=shapes_train", "DATA.VAL=[]", "DATA.NUM_WORKERS=0"])
    config.update(["TRAIN.STEPS_PER_EPOCH=5", "PREPROC.TRAIN_SHORT_EDGE_SIZE=96", "TRAIN.BATCH_SIZE_PER_GPU=16"])
    config.update(overrides)
    (dataset,) = get_datasets(config.DATA.TRAIN, config.DATA.BASEDIR)
    config.DATA.CLASS_NAMES = ["BG", *dataset.class_names]
    config.DATA.NUM_CATEGORY = len(dataset.class_names)
    config.DATA.CATEGORY_IDS = dataset.category_ids
    config.freeze()
    logdir = folder / "run"
    logdir.mkdir()
    records = dataset.records(training=True, masks=config.MODE_MASK)
    messages = logging.handlers.MemoryHandler(1)
    return Run(config, records, [], None, logdir, False, Ranks(), Watchdog(), messages)


# ---------------------------------------------------------------- program


def report(counted, lines, *, names=False):
    """Prints a Count: numbers, ops without a kernel, crossings, with the lines of code that made them."""
    octets = sum(crossing.octets for crossing in counted.crossings)
    waits = {op: n for op, n in counted.ops.items() if op in ("Where", "Unique", "LoopCond")}
    print(f"nodes: {len(counted.device)} on the device, {len(counted.host)} on the host; ops that wait: {waits}")
    print(f"launches on the device: {counted.launches}")
    print(f"without a kernel for GPUs: {sum(map(len, counted.without_kernel.values()))}")
    for op, found in sorted(counted.without_kernel.items()):
        print(f"    {len(found):4d}  {op}  {found[0]}  {lines.get(found[0], '')}")
    print(f"tensors that cross to the host: {sum(c.times for c in counted.crossings)}, {octets} bytes")
    for crossing in counted.crossings:
        line = lines.get(crossing.tensor.partition(":")[0], "")
        print(f"    {crossing.times:4d}  {crossing.label}  {crossing.tensor}  {line}")
    if names:
        print("host nodes:", *counted.host, sep="\n    ")
        by_line = collections.Counter(lines.get(name, name.split("/")[0]) for name in counted.device)
        print("device nodes by line:", *(f"{n:5d} {line}" for line, n in by_line.most_common(70)), sep="\n    ")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["training", "inference", "renew"])
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--names", action="store_true", help="also print the names of nodes on the host")
    arguments = parser.parse_args()
    if arguments.mode == "renew":
        renew()
        return
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"  # oneDNN's ops stand for those that a GPU would run
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    traced = trace(arguments.mode, arguments.settings)
    report(count(traced, read_table()), traced.lines, names=arguments.names)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
