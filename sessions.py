"""How graphs run: the settings of sessions, the process's memory, and the inference graph as a function."""

import ctypes
import os
import queue

import tensorflow as tf
from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig
from tensorpack.compat import tfv1

from modeling import rcnn


def session_config(*, towers=1):
    """How sessions run the graph: on all cores of the process (not on one), with GPU memory as it is needed."""
    cores = len(os.sched_getaffinity(0))
    options = tfv1.ConfigProto(allow_soft_placement=True, intra_op_parallelism_threads=cores)
    if towers > 1:
        options.device_count["CPU"] = towers  # SyncBN's sums want one for each
        # Each tower puts a batch into its staging area and takes one out, and both may block a thread.
        options.inter_op_parallelism_threads = max(cores, 2 * towers + 2)
    options.gpu_options.allow_growth = True
    # No use to us, and its cost estimate of CropAndResize prints pages of warnings.
    options.graph_options.rewrite_options.memory_optimization = RewriterConfig.NO_MEM_OPT
    return options


def keep_freed_memory():
    """Has glibc keep what this process frees for what it allocates next. By default it returns the larger maps of every
    batch to the system, which zeroes them before they come back: a tenth of the time of four images in bfloat16.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other systems may have none
    if mallopt:
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # glibc's names of settings
        mallopt(trim_threshold, -1)  # never
        mallopt(mmap_max, 0)
        mallopt(arena_max, 1)  # the arenas of other threads have no room for large maps


class Inference:
    """The inference graph within the default graph: placeholders in, detections out.

    Variables are shared with what the graph has already (a training tower), or made.

    Attributes:
        inputs: the placeholders of `rcnn.input_signature`. detections: what `rcnn.build_inference` returns.
    """

    def __init__(self):
        self.inputs = [
            tfv1.placeholder(spec.dtype, spec.shape, f"inference/{spec.name}")
            for spec in rcnn.input_signature(training=False)
        ]
        with tfv1.variable_scope(tfv1.get_variable_scope(), reuse=tfv1.AUTO_REUSE), tf.name_scope("inference"):
            self.detections = rcnn.build_inference(*self.inputs)

    def bind(self, session):
        """The function (image uint8 [N, H, W, 3], image_shape int32 [N, 2]) -> Detections of NumPy arrays."""
        made = {name: tensor for name, tensor in self.detections._asdict().items() if tensor is not None}
        run = session.make_callable(list(made.values()), self.inputs)

        def predict(image, image_shape):
            return self.detections._replace(**dict(zip(made, run(image, image_shape))))

        return predict


class TowerInference:
    """An Inference for each of the training towers, on its device and with its copy of the weights."""

    def __init__(self, num_towers):
        self._towers = []
        for tower in range(num_towers):
            scope = f"tower{tower}" if tower else tfv1.get_variable_scope()
            with tf.device(f"/gpu:{tower}"), tfv1.variable_scope(scope, reuse=True):
                self._towers.append(Inference())

    def bind(self, session):
        """As Inference.bind; as many threads as there are towers may call the function at once."""
        idle = queue.SimpleQueue()
        for tower in self._towers:
            idle.put(tower.bind(session))

        def predict(image, image_shape):
            run = idle.get()
            try:
                return run(image, image_shape)
            finally:
                idle.put(run)

        return predict
