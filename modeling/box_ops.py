"""Boxes in TensorFlow: overlaps, encoding, matching, sampling, NMS and RoIAlign. No variables, no settings.

Shapes: N images, A anchors or other boxes, G ground truths, R RoIs, S samples, C channels or classes.
boxes: float32 [..., 4], x1 y1 x2 y2 in continuous pixel coordinates of the padded network input, no "+1".
deltas: float32 [..., 4], (tx, ty, tw, th) of Faster R-CNN, arXiv:1506.01497 eq. 2, times the box regression weights.
"""

from typing import NamedTuple

import tensorflow as tf

KEY_PURPOSES = {"anchors": 1, "rois": 2}  # uses of random numbers
NEVER = -1.0  # random keys are in [0, 1): a candidate with this key is never sampled
MANY_CHANNELS = 1024  # of a map: from this number upwards RoIAlign saves memory
MAX_SAMPLES = 64  # along a side of a cell of an RoI; no image requires more
NO_SCORE = -1.0  # score in `batched_nms` of boxes that are not candidates


def area(boxes):
    """Returns the area of boxes [..., 4] -> [...]; 0 for boxes with a negative side."""
    x1, y1, x2, y2 = tf.unstack(boxes, axis=-1)
    return tf.maximum(x2 - x1, 0.0) * tf.maximum(y2 - y1, 0.0)


def clip(boxes, image_shape):
    """Clips boxes [N, A, 4] to their images. `image_shape`: int32 [N, 2], height and width."""
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


def random_keys(sample_key, identity, *, purpose):
    """Returns random numbers that depend on image and candidate only, not on batch, tower or rank.

    TensorFlow's stateless generators would tie a candidate's number to its index and so to the padding of the batch.
    This function applies a 32-bit xor-shift-multiply hash to the candidate's identity. It computes in int64, because
    TensorFlow runs a GPU's int32 ops on the host.

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

    index: tf.Tensor  # int32 [N, S], index into the candidates
    is_foreground: tf.Tensor  # bool [N, S]
    is_valid: tf.Tensor  # bool [N, S], foreground or background


def sample(is_foreground, is_background, keys, *, size, foreground_ratio):
    """Samples at random up to size * foreground_ratio foreground candidates, and background to fill up to `size`.

    Args:
        is_foreground, is_background: bool [N, A]. keys: float32 [N, A], random.
    Returns:
        Sample of S = min(size, A) slots
    """
    candidates = tf.shape(keys)[1]
    slots = tf.minimum(size, candidates)
    max_foreground = tf.minimum(int(size * foreground_ratio), candidates)
    foreground_keys, foreground = tf.math.top_k(tf.where(is_foreground, keys, NEVER), max_foreground)
    background_keys, background = tf.math.top_k(tf.where(is_background, keys, NEVER), slots)
    num_foreground = _count(foreground_keys > NEVER)
    slot = tf.range(slots)[None, :]
    from_foreground = slot < num_foreground
    source = tf.where(from_foreground, slot, slot - num_foreground + max_foreground)
    index = tf.gather(tf.concat([foreground, background], axis=1), source, batch_dims=1)
    is_valid = slot < num_foreground + _count(background_keys > NEVER)
    return Sample(index, from_foreground, is_valid)


def _count(mask):
    """Counts the true entries per row: bool [N, A] -> int32 [N, 1]."""
    return tf.reduce_sum(tf.cast(mask, tf.int32), axis=1, keepdims=True)


def mean_count(mask):
    """Counts the true entries per row of bool [N, A] and averages over rows: a float32 scalar."""
    return tf.reduce_mean(tf.reduce_sum(tf.cast(mask, tf.float32), axis=1))


def share(part, whole):
    """Returns the share of bool `whole`'s true entries that are also true in `part`: a scalar, 0 if there are none."""
    count = tf.reduce_sum(tf.cast(whole, tf.float32))
    return tf.math.divide_no_nan(tf.reduce_sum(tf.cast(part & whole, tf.float32)), count)


def batched_nms(boxes, scores, *, iou_threshold, max_output):
    """Applies greedy non-maximum suppression to many independent problems at once: B images, or images and levels.

    Within a problem, each box, best first, suppresses those of its own class whose IoU with it exceeds the threshold.
    One op solves all problems, on the CPU (it has no GPU kernel), distributed over the cores. Scores must be positive:
    the op pads its result with dummies of score -1 and ranks them above lower scores.

    Args:
        boxes: float32 [B, A, Q, 4], Q = 1 (shared by the classes) or C
        scores: float32 [B, A, C], above 0, or NO_SCORE
    Returns:
        boxes float32 [B, max_output, 4], scores [B, max_output], best first, class_index int32 [B, max_output],
            is_valid bool [B, max_output]; entries that are not valid are zero
    """
    kept = tf.image.combined_non_max_suppression(
        boxes,
        scores,
        max_output_size_per_class=max_output,
        max_total_size=max_output,
        iou_threshold=iou_threshold,
        score_threshold=0.0,
        clip_boxes=False,
    )
    is_valid = tf.sequence_mask(kept.valid_detections, max_output)
    return kept.nmsed_boxes, kept.nmsed_scores, tf.cast(kept.nmsed_classes, tf.int32), is_valid


def batched_soft_nms(boxes, scores, *, kind, iou_threshold, sigma, score_threshold, max_output):
    """Applies Soft-NMS (arXiv:1704.04503) to many independent problems at once.

    A box that overlaps a better box of its class loses a part of its score instead of being suppressed. The loop
    repeatedly selects the best candidate of all classes; as scores only fall, this gives the same order as separate
    selections per class, merged by their final scores.

    Args:
        boxes, scores: as in `batched_nms`
        kind: "linear": factor 1 - IoU above `iou_threshold`; "gaussian": factor exp(-IoU^2 / sigma)
        score_threshold: 0 or more; selected boxes need a final score above it
    Returns:
        as `batched_nms`
    """
    b, candidates, classes = tf.unstack(tf.shape(scores))
    boxes = tf.broadcast_to(boxes, [b, candidates, classes, 4])
    problem, known_shape = tf.range(b), scores.shape

    def pick(i, scores, picks):
        best = tf.argmax(tf.reshape(scores, [b, candidates * classes]), axis=1, output_type=tf.int32)
        place = tf.stack([problem, best // classes, best % classes], axis=1)
        box, score, class_index = tf.gather_nd(boxes, place), tf.gather_nd(scores, place), best % classes
        rivals = tf.gather(boxes, class_index, axis=2, batch_dims=1)  # [B, A, 4]
        iou = pairwise_iou(rivals, box[:, None])
        factor = (
            tf.exp(-tf.square(iou) / sigma) if kind == "gaussian" else tf.where(iou > iou_threshold, 1.0 - iou, 1.0)
        )
        is_rival = tf.one_hot(class_index, classes, True, False)[:, None]
        scores = tf.where(is_rival & (scores > 0.0), scores * factor, scores)
        scores = tf.tensor_scatter_nd_update(scores, place, tf.fill([b], NO_SCORE))
        return (
            i + 1,
            tf.ensure_shape(scores, known_shape),
            [array.write(i, x) for array, x in zip(picks, (box, score, class_index))],
        )

    picks = [tf.TensorArray(dtype, max_output) for dtype in (tf.float32, tf.float32, tf.int32)]
    _, _, picks = tf.while_loop(lambda i, *_: i < max_output, pick, (0, scores, picks))
    boxes, scores, class_index = (tf.transpose(x, [1, 0, *range(2, x.shape.rank)]) for x in (p.stack() for p in picks))
    is_valid = scores > score_threshold
    return tf.where(is_valid[..., None], boxes, 0.0), tf.where(is_valid, scores, 0.0), class_index, is_valid


def extend_border(features):
    """Extends a map [N, H, W, C] by one pixel on each side, as float32: the input of `roi_align`."""
    return tf.pad(tf.cast(features, tf.float32), [[0, 0], [1, 1], [1, 1], [0, 0]], mode="SYMMETRIC")


def roi_align(extended_features, boxes, image_index, *, resolution, half_pixel=True, adaptive=False):
    """Applies RoIAlign (Mask R-CNN, arXiv:1703.06870 sec. 3): the mean of bilinear samples in each cell.

    Args:
        extended_features: float32 [N, H + 2, W + 2, C] of `extend_border`
        boxes: float32 [R, 4] in pixels of the feature map. image_index: int32 [R]. resolution: cells per side.
        half_pixel: False is torchvision's `aligned=False`, as in the first RoIAlign: pixel centres lie at + 0, and RoIs
            narrower than a pixel of the map are widened to one
        adaptive: take as many samples along a side of a cell as it has pixels, rounded up, instead of two
    Returns:
        float32 [R, resolution, resolution, C]. No gradient flows into the boxes.
    """
    offset = 0.5 if half_pixel else 0.0
    boxes = tf.stop_gradient(boxes) + 1.0  # coordinates in the extended map
    if not half_pixel:
        top_left, bottom_right = tf.split(boxes, 2, axis=1)
        boxes = tf.concat([top_left, tf.maximum(bottom_right, top_left + 1.0)], axis=1)
    if adaptive:
        return _adaptive_roi_align(extended_features, boxes, image_index, resolution=resolution, offset=offset)
    if extended_features.shape[-1] >= MANY_CHANNELS:
        return _lean_roi_align(extended_features, boxes, image_index, resolution=resolution, offset=offset)
    samples = 2 * resolution
    return _mean_2x2(_sample_grid(extended_features, boxes, image_index, samples, samples, offset=offset))


def _lean_roi_align(features, boxes, image_index, *, resolution, offset):
    """Computes `roi_align` with less memory: all 2x2 samples of each cell of C4's 1000 RoIs would fill gigabytes.

    It takes one sample of each cell at a time, from RoIs shifted by a quarter of a cell.
    """
    quarter = (boxes[:, 2:] - boxes[:, :2]) / (4.0 * resolution)
    total = tf.zeros([])
    for signs in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
        moved = boxes + tf.tile(quarter * tf.constant(signs, tf.float32), [1, 2])
        with tf.control_dependencies([total]):
            total += _sample_grid(features, moved, image_index, resolution, resolution, offset=offset)
    return total * 0.25


def _sample_grid(features, boxes, image_index, rows, columns, *, offset):
    """Samples bilinearly at the centres of a grid of cells over each box: float32 [R, rows, columns, C].

    `crop_and_resize` puts its samples on the corners of a box and counts pixel centres as integers; the box is shifted
    and shrunk so that they fall on the centres of the cells, with pixel centres at + `offset`.

    Args:
        features: float32 [N, H, W, C]. boxes: float32 [R, 4] in its pixels. rows, columns: integers or int32 scalars.
    """
    x1, y1, x2, y2 = tf.unstack(boxes, axis=-1)
    height, width = (tf.cast(size - 1, tf.float32) for size in tf.unstack(tf.shape(features)[1:3]))
    step_x, step_y = (x2 - x1) / tf.cast(columns, tf.float32), (y2 - y1) / tf.cast(rows, tf.float32)
    first_x, first_y = x1 + step_x * 0.5 - offset, y1 + step_y * 0.5 - offset
    last_x = first_x + step_x * tf.cast(columns - 1, tf.float32)
    last_y = first_y + step_y * tf.cast(rows - 1, tf.float32)
    normalised = tf.stack([first_y / height, first_x / width, last_y / height, last_x / width], axis=-1)
    return tf.image.crop_and_resize(features, normalised, image_index, [rows, columns])


def _adaptive_roi_align(features, boxes, image_index, *, resolution, offset):
    """Implements Detectron2's `sampling_ratio=0`: a loop over the sample counts that occur, each for all its RoIs.

    Args:
        features: float32 [N, H, W, C]. boxes: float32 [R, 4] in its pixels.
    """
    boxes, image_index = tf.pad(boxes, [[0, 1], [0, 0]]), tf.pad(image_index, [[0, 1]])  # at least one for the loop
    sides = tf.math.ceil((boxes[:, 2:] - boxes[:, :2]) / resolution)
    across, down = tf.unstack(tf.cast(tf.clip_by_value(sides, 1.0, MAX_SAMPLES), tf.int32), axis=1)
    kinds, kind = tf.unique(across * (MAX_SAMPLES + 1) + down)
    channels = features.shape[-1]

    def pool(i, pooled):
        across, down = kinds[i] // (MAX_SAMPLES + 1), kinds[i] % (MAX_SAMPLES + 1)
        rois = tf.where(tf.equal(kind, i))[:, 0]
        own_boxes = tf.stop_gradient(tf.gather(boxes, rois))  # again: the loop's gradient ignores the first one
        own_index = tf.gather(image_index, rois)
        samples = _sample_grid(features, own_boxes, own_index, down * resolution, across * resolution, offset=offset)
        cells = tf.reshape(samples, [-1, resolution, down, resolution, across, channels])
        return i + 1, pooled.write(i, tf.reduce_mean(cells, axis=[2, 4]))

    count = tf.size(kinds)
    shape = [None, resolution, resolution, channels]
    pooled = tf.TensorArray(tf.float32, count, infer_shape=False, element_shape=shape)
    _, pooled = tf.while_loop(lambda i, _: i < count, pool, (0, pooled))
    place = tf.math.invert_permutation(tf.argsort(kind, stable=True))
    return tf.ensure_shape(tf.gather(pooled.concat(), place)[:-1], shape)


@tf.custom_gradient
def _mean_2x2(x):
    """Averages each 2x2 window: [R, 2 H, 2 W, C] -> [R, H, W, C]. The gradient is a broadcast, not AvgPoolGrad."""

    def gradient(dy):
        r, height, width, channels = tf.unstack(tf.shape(x))
        spread = tf.broadcast_to(dy[:, :, None, :, None, :] * 0.25, [r, height // 2, 2, width // 2, 2, channels])
        return tf.reshape(spread, [r, height, width, channels])

    return tf.nn.avg_pool2d(x, 2, 2, "VALID"), gradient


def multilevel_roi_align(extended_pyramid, strides, boxes, image_index, *, resolution, **options):
    """Applies RoIAlign to the pyramid level that fits each RoI's size (FPN, arXiv:1612.03144 eq. 1).

    Args:
        extended_pyramid: list of `extend_border` maps; a single map serves all RoIs. strides: pixels per cell of each
            map.
        boxes: float32 [R, 4] in pixels of the network input. image_index: int32 [R]. options: of `roi_align`.
    Returns:
        float32 [R, resolution, resolution, C]
    """
    options["resolution"] = resolution
    if len(strides) == 1:
        return roi_align(extended_pyramid[0], boxes / strides[0], image_index, **options)
    level = roi_level(boxes, num_levels=len(strides))
    rois, crops = [], []
    for i, (features, stride) in enumerate(zip(extended_pyramid, strides)):
        rois.append(tf.cast(tf.where(tf.equal(level, i))[:, 0], tf.int32))
        level_boxes = tf.gather(boxes, rois[-1]) / stride
        crops.append(roi_align(features, level_boxes, tf.gather(image_index, rois[-1]), **options))
    return tf.dynamic_stitch(rois, crops)  # its gradient is a gather


def roi_level(boxes, *, num_levels):
    """Returns the level of RoIs [R, 4] as an index from level 2, int32 [R] in 0..num_levels - 1.

    The level is floor(4 + log2(sqrt(area) / 224 + 1e-6)), arXiv:1612.03144 eq. 1, limited to the existing levels.
    """
    octave = tf.math.log(tf.sqrt(area(boxes)) / 224.0 + 1e-6) / tf.math.log(2.0)
    return tf.cast(tf.clip_by_value(tf.floor(4.0 + octave), 2.0, num_levels + 1.0), tf.int32) - 2
