"""Session settings, the memory of the process, and the inference graph as a function.

The function is called `network` throughout the program: `network(image, image_shape)` takes a batch, uint8 [N, H, W, 3]
BGR and int32 [N, 2] (height and width of the part that is image), and returns modeling.box_head.Detections of NumPy
arrays: `boxes` float32 [R, 4] (x1 y1 x2 y2 in pixels of the batch), `scores` [R], `labels` [R] (1..C), `image_index`
[R], and `masks` float32 [R, M, M] (probabilities within the box) or None.
"""

import ctypes
import os
import queue
from collections.abc import Callable

import tensorflow as tf
from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig
from tensorpack.compat import tfv1
from tensorpack.utils import logger

from common.weights import model_variables
from config import Config, ConfigError
from modeling import device, parameters, rcnn

# Takes a GPU's memory as needed. A session's options come too late: TensorFlow opens the GPUs for a graph's first loop.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")


def session_config(*, towers: int = 1) -> tfv1.ConfigProto:
    """The settings of a session: it uses all cores of the process.

    Args:
        towers: number of training towers in this process.
    """
    cores = len(os.sched_getaffinity(0))
    options = tfv1.ConfigProto(allow_soft_placement=True, intra_op_parallelism_threads=cores)
    if towers > 1:
        options.device_count["CPU"] = towers  # SyncBN's sums need one device per tower
        # Each tower puts a batch into its staging area and takes one out, and both may block a thread.
        options.inter_op_parallelism_threads = max(cores, 2 * towers + 2)
    options.graph_options.rewrite_options.layout_optimizer = RewriterConfig.OFF  # maps stay NHWC on GPUs, too
    # It saves nothing here, and its cost estimate of CropAndResize prints pages of warnings.
    options.graph_options.rewrite_options.memory_optimization = RewriterConfig.NO_MEM_OPT
    return options


def warn_of_precision(precision: str) -> None:
    """Warns if this processor may be slower in a precision than in float32."""
    if precision == "bfloat16" and device.emulates_bfloat16():
        logger.warning("this processor has no instructions for bfloat16: float32 may be faster (docs/speed.md)")


def keep_freed_memory() -> None:
    """Makes glibc reuse the memory that this process frees. By default it returns the large maps of each batch to the
    system, which zeroes them before it hands them out again: a tenth of the time of four images in bfloat16.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in other C libraries
    if mallopt:
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # glibc's numbers of these settings
        mallopt(trim_threshold, -1)  # never
        mallopt(mmap_max, 0)
        mallopt(arena_max, 1)  # the arenas of other threads have no room for large maps


class Inference:
    """The inference graph, built in the default graph: from placeholders to detections.

    It shares the variables that the graph has already, those of a training tower, and creates the others.

    Attributes:
        inputs: list of placeholders, those of `rcnn.input_signature`.
        detections: box_head.Detections of tensors, as `rcnn.build_inference` returns them.
    """

    def __init__(self, settings: Config, *, getter: Callable | None = None):
        """
        Args:
            getter: `custom_getter` of the variables, see tf.compat.v1.variable_scope.
        Raises:
            ConfigError: a setting names nothing that is registered, or a plugin's variables cannot be shared.
        """
        rcnn.check(settings)
        known = model_variables()
        self.inputs = [
            tfv1.placeholder(spec.dtype, spec.shape, f"inference/{spec.name}")
            for spec in rcnn.input_signature(settings, training=False)
        ]
        shared = tfv1.variable_scope(tfv1.get_variable_scope(), reuse=tfv1.AUTO_REUSE, custom_getter=getter)
        with shared, tf.name_scope("inference"), parameters.stored() as updates:
            self.detections = rcnn.build_inference(settings, *self.inputs)
        self._update = tf.group(*updates)
        added = sorted(model_variables().keys() - known)
        if known and added:
            raise ConfigError(
                f"the network creates {added[0]} anew each time it is built: "
                "create variables by tf.compat.v1.get_variable"
            )

    def update(self, session: tfv1.Session) -> None:
        """Prepares the parameters (see modeling/parameters.py) of the weights that the variables hold now."""
        session.run(self._update)

    def bind(self, session: tfv1.Session) -> Callable:
        """The `network` (see the module's docstring) that runs in this session, with the weights of the last update."""
        self.update(session)
        tensors = {name: tensor for name, tensor in self.detections._asdict().items() if tensor is not None}
        run = session.make_callable(list(tensors.values()), self.inputs)

        def network(image, image_shape):
            return self.detections._replace(**dict(zip(tensors, run(image, image_shape))))

        return network


class TowerInference:
    """An Inference for each training tower, on its device and with its copy of the weights."""

    def __init__(self, settings: Config, num_towers: int, *, getter: Callable | None = None):
        self._towers = []
        for tower in range(num_towers):
            scope = f"tower{tower}" if tower else tfv1.get_variable_scope()
            with tf.device(f"/gpu:{tower}"), tfv1.variable_scope(scope, reuse=True):
                self._towers.append(Inference(settings, getter=getter))

    def update(self, session: tfv1.Session) -> None:
        """See Inference.update."""
        for tower in self._towers:
            tower.update(session)

    def bind(self, session: tfv1.Session) -> Callable:
        """See Inference.bind. `num_towers` threads may call the function at once; another call waits for a tower."""
        idle = queue.SimpleQueue()
        for tower in self._towers:
            idle.put(tower.bind(session))

        def network(image, image_shape):
            run = idle.get()
            try:
                return run(image, image_shape)
            finally:
                idle.put(run)

        return network
