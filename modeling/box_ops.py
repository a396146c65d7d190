"""Boxes in TensorFlow: overlaps, encoding, matching and sampling. No variables, no settings.

Shapes: N images, A anchors or other boxes, G ground truths, S samples.
boxes: float32 [..., 4], x1 y1 x2 y2 in continuous pixel coordinates of the padded network input, no "+1".
deltas: float32 [..., 4], (tx, ty, tw, th) of Faster R-CNN, arXiv:1506.01497 eq. 2, times the box regression weights.
Indices and counts computed from data are int64 or float32: TensorFlow runs a GPU's int32 arithmetic on the host.
"""

import math
from typing import NamedTuple

import tensorflow as tf

from . import device
from .layers import shape_list

KEY_PURPOSES = {"anchors": 1, "rois": 2}  # uses of random numbers
PARTS_OF_ROW = 16  # see `top_k`
NEVER = -1.0  # random keys are in [0, 1): a candidate with this key is never sampled


def sum_of_coordinates(x):
    """Sums over the last axis: float32 [..., 4] -> [...]. The gradient of `tf.reduce_sum` waits for the host."""
    return tf.add_n(tf.unstack(x, axis=-1))


def area(boxes):
    """Returns the area of boxes [..., 4] -> [...]; 0 for boxes with a negative side."""
    x1, y1, x2, y2 = tf.unstack(boxes, axis=-1)
    return tf.maximum(x2 - x1, 0.0) * tf.maximum(y2 - y1, 0.0)


def clip(boxes, image_shape):
    """Clips boxes [N, A, 4] to their images. `image_shape`: integers [N, 2], height and width."""
    height_width = tf.cast(image_shape, tf.float32)
    limit = tf.reverse(height_width, [1])[:, None, :]  # width, height
    return tf.maximum(tf.minimum(boxes, tf.concat([limit, limit], axis=-1)), 0.0)


def is_nonempty(boxes, min_size=0.0):
    """Returns whether boxes [..., 4] are finite and both sides are above `min_size` pixels: bool [...]."""
    x1, y1, x2, y2 = tf.unstack(boxes, axis=-1)
    width, height = x2 - x1, y2 - y1
    finite = tf.math.is_finite(tf.reduce_sum(boxes, axis=-1))
    return finite & (width > min_size) & (height > min_size)


def _pairwise_intersection(boxes_a, boxes_b):
    x1a, y1a, x2a, y2a = tf.split(boxes_a, 4, axis=-1)  # each [N, A, 1]
    x1b, y1b, x2b, y2b = tf.unstack(boxes_b[:, None, :, :], axis=-1)  # each [N, 1, G]
    width = tf.maximum(tf.minimum(x2a, x2b) - tf.maximum(x1a, x1b), 0.0)
    height = tf.maximum(tf.minimum(y2a, y2b) - tf.maximum(y1a, y1b), 0.0)
    return width * height


def pairwise_iou(boxes_a, boxes_b):
    """Returns the intersection over union of all pairs: [N, A, 4], [N, G, 4] -> float32 [N, A, G]; 0 if both are empty.

    The union is (area_a + area_b) - intersection in this order: rounding decides which anchors tie for the highest IoU
    with an object, and all of those become foreground.
    """
    intersection = _pairwise_intersection(boxes_a, boxes_b)
    union = (area(boxes_a)[:, :, None] + area(boxes_b)[:, None, :]) - intersection
    return tf.math.divide_no_nan(intersection, union)


def pairwise_ioa(boxes_a, boxes_b):
    """Returns the share of each of `boxes_a` inside each of `boxes_b`: [N, A, 4], [N, G, 4] -> float32 [N, A, G]."""
    return tf.math.divide_no_nan(_pairwise_intersection(boxes_a, boxes_b), area(boxes_a)[:, :, None])


def _center_and_size(boxes):
    top_left, bottom_right = tf.split(boxes, 2, axis=-1)
    return (top_left + bottom_right) * 0.5, bottom_right - top_left


def encode(boxes, references, *, weights=(1.0, 1.0, 1.0, 1.0)):
    """Returns the deltas from `references` to `boxes`, both [..., 4] and not empty: [..., 4], times `weights`."""
    center, size = _center_and_size(boxes)
    reference_center, reference_size = _center_and_size(references)
    shift = (center - reference_center) / reference_size
    growth = tf.math.log(size / reference_size)
    return tf.concat([shift, growth], axis=-1) * tf.constant(weights, tf.float32)


def decode(deltas, references, *, max_log_size, weights=(1.0, 1.0, 1.0, 1.0)):
    """Applies `deltas` to `references`, both broadcastable to [..., 4]: the inverse of `encode`.

    Args:
        max_log_size: limit of tw and th, which keeps the exponential finite
    Returns:
        boxes [..., 4]
    """
    shift, growth = tf.split(deltas / tf.constant(weights, tf.float32), 2, axis=-1)
    reference_center, reference_size = _center_and_size(references)
    center = shift * reference_size + reference_center
    half_size = tf.exp(tf.minimum(growth, max_log_size)) * reference_size * 0.5
    return tf.concat([center - half_size, center + half_size], axis=-1)


@tf.custom_gradient
def gather(values, index):
    """Gathers per image: [N, A, ...], int64 [N, S] in 0..A - 1 -> [N, S, ...], with a gradient summed in float32.

    The gradient of `tf.gather` for several images computes its places on the host, and sums in 16 bits.
    """

    def gradient(dy):
        n, count, *rest = shape_list(values)
        first = tf.cast(tf.range(n) * count, tf.int64)[:, None]
        rows, places = tf.reshape(dy, [-1, *rest]), tf.reshape(index + first, [-1])
        return tf.reshape(_sum_rows(rows, places, n * count, values.dtype), tf.shape(values)), None

    return tf.gather(values, index, batch_dims=1), gradient


def top_k(values, k, *, is_long):
    """Returns the `k` largest of each row of float32 [N, A], largest first, smaller index first on ties.

    Args:
        k: integer or int32 scalar, A at most
        is_long: rows have tens of thousands of values. A GPU sorts a row by one block of threads, however long: long
            rows are divided, and the best of their parts compared.
    Returns:
        values float32 [N, k]; index int64 [N, k]
    """
    if not (is_long and device.is_gpu()):
        best, index = tf.math.top_k(values, k)
        return best, tf.cast(index, tf.int64)
    n, size = shape_list(values)
    width = tf.maximum(tf.maximum(-(-size // PARTS_OF_ROW), k), 1)
    parts = -(-size // width)
    padded = tf.pad(values, [[0, 0], [0, parts * width - size]], constant_values=-math.inf)
    best, index = tf.math.top_k(tf.reshape(padded, [n, parts, width]), k)
    first = tf.cast(tf.range(parts) * width, tf.int64)[:, None]
    index = tf.reshape(tf.cast(index, tf.int64) + first, [n, parts * k])
    best, place = tf.math.top_k(tf.reshape(best, [n, parts * k]), k)
    return best, gather(index, tf.cast(place, tf.int64))


@tf.custom_gradient
def gather_rows(values, index):
    """Gathers along the first axis: [A, ...], int64 [S] -> [S, ...], with a gradient summed in float32."""

    def gradient(dy):
        return _sum_rows(dy, index, tf.shape(values)[0], values.dtype), None

    return tf.gather(values, index), gradient


def _sum_rows(rows, index, count, dtype):
    """Sums the rows of equal index, in float32: [S, ...], int64 [S] in 0..count - 1 -> [count, ...] of `dtype`."""
    return tf.cast(tf.math.unsorted_segment_sum(tf.cast(rows, tf.float32), index, count), dtype)


def random_keys(sample_key, identity, *, purpose):
    """Returns random numbers that depend on image and candidate only, not on batch, tower or rank.

    TensorFlow's stateless generators would tie a candidate's number to its index and so to the padding of the batch.
    This function applies a 32-bit xor-shift-multiply hash to the candidate's identity.

    Args:
        sample_key: int32 [N, 2], the seed and the image's position in the order of the data
        identity: int64 [A] or [N, A], of each candidate, the same in every batch
        purpose: one of KEY_PURPOSES, which makes the samples of different uses independent
    Returns:
        float32 [N, A] in [0, 1)
    """
    key = tf.cast(sample_key, tf.int64)
    state = tf.zeros_like(key[:, 0])
    for word in (key[:, 0], key[:, 1], KEY_PURPOSES[purpose]):
        state = _mix(state + word)
    hashed = _mix(_mix(state[:, None] + identity))
    return tf.cast(tf.bitwise.right_shift(hashed, 8), tf.float32) / 2.0**24


def _mix(x):
    """Applies one finaliser round to the low 32 bits of int64 `x`."""
    low_32_bits, multiplier = 0xFFFFFFFF, 0x45D9F3B  # below 2^31, so the product fits into int64
    x = tf.bitwise.bitwise_and(x, low_32_bits)
    for _ in range(2):
        x = tf.bitwise.bitwise_and(_xor_shift(x) * multiplier, low_32_bits)
    return _xor_shift(x)


def _xor_shift(x):
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, 16))


class Sample(NamedTuple):
    """Candidates sampled for a loss: foreground first, then background, then unused slots."""

    index: tf.Tensor  # int64 [N, S], index into the candidates
    is_foreground: tf.Tensor  # bool [N, S]
    is_valid: tf.Tensor  # bool [N, S], foreground or background


def sample(is_foreground, is_background, keys, *, size, foreground_ratio, is_long=False):
    """Samples at random up to size * foreground_ratio foreground candidates, and background to fill up to `size`.

    Args:
        is_foreground, is_background: bool [N, A]. keys: float32 [N, A], random. is_long: see `top_k`.
    Returns:
        Sample of S = min(size, A) slots
    """
    candidates = tf.shape(keys)[1]
    slots = tf.minimum(size, candidates)
    max_foreground = tf.minimum(int(size * foreground_ratio), candidates)
    foreground_keys, foreground = top_k(tf.where(is_foreground, keys, NEVER), max_foreground, is_long=is_long)
    background_keys, background = top_k(tf.where(is_background, keys, NEVER), slots, is_long=is_long)
    num_foreground = _count(foreground_keys > NEVER)
    slot = tf.cast(tf.range(slots), tf.int64)[None, :]
    from_foreground = slot < num_foreground
    source = tf.where(from_foreground, slot, slot - num_foreground + tf.cast(max_foreground, tf.int64))
    index = gather(tf.concat([foreground, background], axis=1), source)
    is_valid = slot < num_foreground + _count(background_keys > NEVER)
    return Sample(index, from_foreground, is_valid)


def _count(mask):
    """Counts the true entries per row: bool [N, A] -> int64 [N, 1]."""
    return tf.reduce_sum(tf.cast(mask, tf.int64), axis=1, keepdims=True)


def mean_count(mask):
    """Counts the true entries per row of bool [N, A] and averages over rows: a float32 scalar."""
    return tf.reduce_mean(tf.reduce_sum(tf.cast(mask, tf.float32), axis=1))


def share(part, whole):
    """Returns the share of bool `whole`'s true entries that are also true in `part`: a scalar, 0 if there are none."""
    count = tf.reduce_sum(tf.cast(whole, tf.float32))
    return tf.math.divide_no_nan(tf.reduce_sum(tf.cast(part & whole, tf.float32)), count)
