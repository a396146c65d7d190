"""What the tests of TensorFlow code share: running it on arrays, and slow NumPy definitions that several parts need."""

import numpy as np
import tensorflow as tf

from common import boxes as np_boxes
from common.rle import paste_masks
from modeling.box_head import Detections

tfv1 = tf.compat.v1


def evaluate(function, *arrays, random_variables=None):
    """Run a function of tensors on arrays, in a graph of its own.

    Args:
        function: gets a placeholder per array and returns tensors, in any nesting
        arrays: anything that NumPy takes; float64 becomes float32
        random_variables: a NumPy generator; all variables get values from it in place of their initial ones
    Returns:
        what the function returned, with arrays for tensors
    """
    arrays = [np.asarray(x, np.float32 if np.asarray(x).dtype == np.float64 else None) for x in arrays]
    with tf.Graph().as_default(), tfv1.Session() as session:
        inputs = [tfv1.placeholder(x.dtype, _known_sizes(x)) for x in arrays]
        outputs = function(*inputs)
        initial = _random_values(random_variables) if random_variables else {}
        session.run(tfv1.global_variables_initializer(), initial)
        return session.run(outputs, dict(zip(inputs, arrays)))


def _known_sizes(x):
    """Models know the number of channels, of classes and of a box's coordinates, and no other size of a tensor."""
    is_known = x.dtype.kind == "f" and (x.ndim > 2 or x.shape[-1:] == (4,))
    return [None] * (x.ndim - 1) + [x.shape[-1] if is_known else None] if x.ndim else []


def _random_values(rng):
    """What to feed for the initial values of all variables: away from zero, and above it for what is a variance."""
    values = {}
    for variable in tfv1.global_variables():
        sign = 1 if "variance" in variable.op.name else rng.choice([-1, 1], variable.shape)
        values[variable.initializer.inputs[1]] = sign * rng.uniform(0.2, 1, variable.shape)
    return values


def variables():
    """The variables of the graph by name, to be evaluated beside a function's outputs."""
    return {variable.op.name: variable for variable in tfv1.global_variables()}


def found(*rows, masks=None):
    """What a network returns (see inference/graph.py), from rows of (box, score, label, image)."""
    box, score, label, image = zip(*rows) if rows else ((), (), (), ())
    return Detections(
        np.array(box, np.float32).reshape(-1, 4),
        np.array(score, np.float32),
        np.array(label, np.int64),
        np.array(image, np.int32),
        masks,
    )


def random_boxes(rng, *shape, low=0.0, high=100.0, size=30.0):
    """Boxes [*shape, 4]: top left corners between `low` and `high`, sides of `size` on average and not below 0.01."""
    corner = rng.uniform(low, high, (*shape, 2))
    return np.concatenate([corner, corner + rng.exponential(size, (*shape, 2)) + 0.01], axis=-1).astype(np.float32)


def encode(box, reference):
    """Faster R-CNN's (tx, ty, tw, th) of one box, arXiv:1506.01497 eq. 2, in float64."""
    (x1, y1, x2, y2), (xa1, ya1, xa2, ya2) = np.float64(box), np.float64(reference)
    width, height = xa2 - xa1, ya2 - ya1
    shift = ((x1 + x2) / 2 - (xa1 + xa2) / 2) / width, ((y1 + y2) / 2 - (ya1 + ya2) / 2) / height
    return np.array([*shift, np.log((x2 - x1) / width), np.log((y2 - y1) / height)])


def decode(deltas, reference, *, max_log_size):
    """The box that (tx, ty, tw, th) lead to, in float64."""
    (tx, ty, tw, th), (xa1, ya1, xa2, ya2) = np.float64(deltas), np.float64(reference)
    x, y = tx * (xa2 - xa1) + (xa1 + xa2) / 2, ty * (ya2 - ya1) + (ya1 + ya2) / 2
    width, height = np.exp(min(tw, max_log_size)) * (xa2 - xa1), np.exp(min(th, max_log_size)) * (ya2 - ya1)
    return np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


def greedy_nms(boxes, scores, threshold):
    """The indices of what non-maximum suppression keeps, best first."""
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if all(np_boxes.pairwise_iou(boxes[i], boxes[k])[0, 0] <= threshold for k in kept):
            kept.append(i)
    return kept


def convolve(x, kernel, *, bias=0.0, stride=1, before=0, after=0):
    """Cross-correlation of [N, H, W, C] with [K, K, C, D], padded with zeros top and left, and bottom and right."""
    x = np.pad(x, [(0, 0), (before, after), (before, after), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))[:, ::stride, ::stride]
    return np.tensordot(windows, kernel, axes=((4, 5, 3), (0, 1, 2))) + bias


def group_norm(x, gamma, beta, *, groups):
    """Group normalisation of [N, H, W, C], group by group, with epsilon 1e-5."""
    y = np.zeros_like(x, np.float64)
    for n, group in np.ndindex(len(x), groups):
        channels = slice(group * x.shape[3] // groups, (group + 1) * x.shape[3] // groups)
        part = np.float64(x[n, :, :, channels])
        y[n, :, :, channels] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    return y * gamma + beta


def stored_norm(x, values, scope):
    """Batch norm of [..., C] by the statistics among the variables `values` of the scope, with epsilon 1e-5."""
    mean, variance, gamma, beta = (values[f"{scope}/{x}"] for x in ("mean/EMA", "variance/EMA", "gamma", "beta"))
    return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta


def batch_norm(x, gamma, beta, *, is_valid=None):
    """Batch norm of [N, H, W, C] by the statistics of its items that are valid, with epsilon 1e-5, in float64."""
    used = np.float64(x if is_valid is None else x[np.asarray(is_valid)])
    return (x - used.mean(axis=(0, 1, 2))) / np.sqrt(used.var(axis=(0, 1, 2)) + 1e-5) * gamma + beta


def relu(x):
    return np.maximum(x, 0)


# Kinds that are left where a convolution or matrix product was not fused with its bias and ReLU.
NOT_FUSED = {"Conv2D", "_MklNativeConv2D", "_MklNativePadWithConv2D", "MatMul", "_MklMatMul", "BiasAdd", "Relu"}


def run_traced(session, fetches, feed):
    """What the session runs after its optimisations: nodes by name, and the names of what ran, as often as it did."""
    options = tfv1.RunOptions(output_partition_graphs=True, trace_level=tfv1.RunOptions.FULL_TRACE)
    trace = tfv1.RunMetadata()
    session.run(fetches, feed, options=options, run_metadata=trace)
    nodes = {node.name: node for graph in trace.partition_graphs for node in graph.node}
    return nodes, [node.node_name for device in trace.step_stats.dev_stats for node in device.node_stats]


def not_fused(nodes):
    return sorted(name for name, node in nodes.items() if node.op in NOT_FUSED and "gradients/" not in name)


def paste_mask(mask, box_xyxy, height, width):
    """`common.rle.paste_masks` of one mask: uint8 [H, W] of 0 and 1."""
    return paste_masks(np.asarray(mask)[None], [box_xyxy], height, width)[0].view(np.uint8)


def paste_by_definition(mask, box, height, width):
    """Each pixel on its own: the mask with a ring of zeros, the box larger by as much, bilinear at the pixel's centre.

    Returns the interpolated values, float64 [height, width].
    """
    ringed = np.pad(np.asarray(mask, np.float64), 1)
    rows, columns = ringed.shape
    x1, y1, x2, y2 = np.asarray(box, np.float64)
    box_width, box_height = (x2 - x1) * columns / (columns - 2), (y2 - y1) * rows / (rows - 2)
    left, top = (x1 + x2) / 2 - box_width / 2, (y1 + y2) / 2 - box_height / 2
    values = np.zeros((height, width))
    for i, j in np.ndindex(height, width):
        v, u = (i + 0.5 - top) / box_height * rows - 0.5, (j + 0.5 - left) / box_width * columns - 0.5
        for row in (int(np.floor(v)), int(np.floor(v)) + 1):
            for column in (int(np.floor(u)), int(np.floor(u)) + 1):
                if 0 <= row < rows and 0 <= column < columns:
                    values[i, j] += (1 - abs(v - row)) * (1 - abs(u - column)) * ringed[row, column]
    return values
