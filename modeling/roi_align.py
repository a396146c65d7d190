"""RoIAlign (Mask R-CNN, arXiv:1703.06870 sec. 3) on a map or on a feature pyramid. No variables, no settings.

Shapes: N images, H and W of a map, C channels, R RoIs of all images, L levels.
boxes: float32 [R, 4], x1 y1 x2 y2 in pixels. image_index: int32 [R], the image of each RoI.
"""

import math
from typing import NamedTuple

import tensorflow as tf

from . import box_ops, device

MANY_CHANNELS = 1024  # of a map: from this number upwards RoIAlign saves memory
MAX_SAMPLES = 64  # along a side of a cell of an RoI; no image requires more


def extend_border(features):
    """Extends a map [N, H, W, C] by one pixel on each side, for `roi_align`: [N, H + 2, W + 2, C]."""
    return tf.pad(features, [[0, 0], [1, 1], [1, 1], [0, 0]], mode="SYMMETRIC")


class Window(NamedTuple):
    """Where in an atlas the maps of RoIs lie, with their borders."""

    corner: tf.Tensor  # float32 [R, 4], left and top, twice
    size: tf.Tensor  # float32 [R, 2], height and width


def roi_align(extended_features, boxes, image_index, *, resolution, half_pixel=True, adaptive=False, window=None):
    """Applies RoIAlign: the mean of bilinear samples in each cell.

    Args:
        extended_features: float32 [N, H + 2, W + 2, C] of `extend_border`, or an atlas of such maps
        boxes: float32 [R, 4] in pixels of the feature map. image_index: int32 [R]. resolution: cells per side.
        half_pixel: False is torchvision's `aligned=False`, as in the first RoIAlign: pixel centres lie at + 0, and RoIs
            narrower than a pixel of the map are widened to one
        adaptive: take as many samples along a side of a cell as it has pixels, rounded up, instead of two
        window: Window of each RoI's map in the atlas
    Returns:
        float32 [R, resolution, resolution, C]. No gradient flows into the boxes.
    """
    offset = 0.5 if half_pixel else 0.0
    boxes = tf.stop_gradient(boxes) + 1.0  # coordinates in the extended map
    if not half_pixel:
        top_left, bottom_right = tf.split(boxes, 2, axis=1)
        boxes = tf.concat([top_left, tf.maximum(bottom_right, top_left + 1.0)], axis=1)
    in_atlas = boxes if window is None else boxes + window.corner
    if adaptive:
        sizes = boxes[:, 2:] - boxes[:, :2]
        return _adaptive_roi_align(
            extended_features, in_atlas, image_index, sizes, resolution=resolution, offset=offset
        )
    if extended_features.shape[-1] >= MANY_CHANNELS:
        return _lean_roi_align(extended_features, in_atlas, image_index, resolution=resolution, offset=offset)
    if not device.is_gpu():
        return _mean_2x2(
            _sample_grid(extended_features, in_atlas, image_index, 2 * resolution, 2 * resolution, offset=offset)
        )
    # Four crops are summed faster than one of four times the size is pooled.
    moved = tf.reshape(_moved_by_quarters(in_atlas, resolution), [-1, 4])
    indices = tf.tile(tf.cast(image_index, tf.float32)[:, None], [1, 4])  # the tiles of int32 are the host's
    indices = tf.cast(tf.reshape(indices, [-1]), tf.int32)
    samples = _sample_grid(extended_features, moved, indices, resolution, resolution, offset=offset)
    if window is not None and not half_pixel:  # the widened RoIs may reach beyond their map
        moved = tf.reshape(_moved_by_quarters(boxes, resolution), [-1, 4])
        sizes = tf.reshape(tf.tile(window.size, [1, 4]), [-1, 2])
        samples *= _is_inside(moved, sizes, resolution)
    return _mean_of_four(samples)


def _moved_by_quarters(boxes, resolution):
    """Moves boxes [R, 4] by a quarter of a cell in each diagonal direction: [R, 4, 4].

    Their cells' centres are the 2x2 samples of each cell of `boxes`.
    """
    quarter = tf.tile((boxes[:, 2:] - boxes[:, :2]) / (4.0 * resolution), [1, 2])
    signs = tf.constant([[-1, -1, -1, -1], [1, -1, 1, -1], [-1, 1, -1, 1], [1, 1, 1, 1]], tf.float32)
    return boxes[:, None] + quarter[:, None] * signs


def _is_inside(boxes, size, samples):
    """Returns 1 for samples of boxes [R, 4] within maps of height and width `size` [R, 2], else 0: [R, S, S, 1]."""
    share = (tf.range(samples, dtype=tf.float32) + 0.5) / samples
    x1, y1, x2, y2 = tf.split(boxes, 4, axis=1)
    rows, columns = y1 + (y2 - y1) * share <= size[:, :1] - 1.0, x1 + (x2 - x1) * share <= size[:, 1:] - 1.0
    return tf.cast(rows[:, :, None] & columns[:, None, :], tf.float32)[..., None]


def _lean_roi_align(features, boxes, image_index, *, resolution, offset):
    """Computes `roi_align` with less memory: all 2x2 samples of each cell of C4's 1000 RoIs would fill gigabytes.

    It takes one sample of each cell at a time, from RoIs shifted by a quarter of a cell.
    """
    total = tf.zeros([])
    for moved in tf.unstack(_moved_by_quarters(boxes, resolution), axis=1):
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
    corners = _corners(features, boxes, rows, columns, offset=offset)
    return tf.image.crop_and_resize(features, corners, image_index, [rows, columns])


def _corners(features, boxes, rows, columns, *, offset):
    """The boxes that `crop_and_resize` takes for `_sample_grid`: float32 [R, 4], y x y x, 1 for the last pixel."""
    top_left, bottom_right = tf.split(boxes, 2, axis=1)  # x y
    counts = tf.cast(tf.stack([columns, rows]), tf.float32)
    step = (bottom_right - top_left) / counts
    first = top_left + step * 0.5 - offset
    last = first + step * (counts - 1.0)
    height, width = tf.unstack(tf.shape(features)[1:3] - 1)
    size = tf.cast(tf.stack([width, height, width, height]), tf.float32)
    return tf.gather(tf.concat([first, last], axis=1) / size, [1, 0, 3, 2], axis=1)


def _adaptive_roi_align(features, boxes, image_index, sizes, *, resolution, offset):
    """Implements Detectron2's `sampling_ratio=0`: a loop over the sample counts that occur, each for all its RoIs.

    The host learns once how many RoIs have which counts; from then on it knows all sizes, and nothing waits.

    Args:
        features: float32 [N, H, W, C]. boxes: float32 [R, 4] in its pixels. sizes: float32 [R, 2], their width and
            height, which a box in an atlas has only approximately
    """
    # Indices are float32 here, too: int32 would be the host's; these are exact. One RoI more, for the loop.
    rois = tf.pad(tf.concat([boxes, tf.cast(image_index, tf.float32)[:, None]], axis=1), [[0, 1], [0, 0]])
    samples = tf.clip_by_value(tf.math.ceil(tf.pad(sizes, [[0, 1], [0, 0]]) / resolution), 1.0, MAX_SAMPLES)
    kind, order = _sort(samples[:, 0] * (MAX_SAMPLES + 1.0) + samples[:, 1])
    with tf.device("/cpu:0"):
        kinds, _, counts = tf.unique_with_counts(tf.cast(kind, tf.int32))
        on_host = kinds, tf.cumsum(counts), counts, tf.size(kinds)
    groups = _Groups(tf.gather(rois, order), order, *on_host)
    return _pool_groups(features, groups, resolution=resolution, offset=offset)[:-1]


def _sort(x):
    """Sorts float32 [R], of equal ones the first first: the sorted values, and their places, int32 [R]."""
    values, order = tf.math.top_k(-x, tf.size(x))
    return -values, order


class _Groups(NamedTuple):
    """RoIs sorted by the number of their samples. All but `rois` and `order` lies on the host."""

    rois: tf.Tensor  # float32 [R, 5], a box and the index of its image
    order: tf.Tensor  # int32 [R], their places before sorting
    kinds: tf.Tensor  # [K], across * (MAX_SAMPLES + 1) + down, of the samples of a cell
    ends: tf.Tensor  # [K], the end of each group in `rois`
    counts: tf.Tensor  # [K], its length
    size: tf.Tensor  # K

    def get(self, i):
        """The i-th group: across, down, int32 scalars; boxes float32 [n, 4]; image_index int32 [n]."""
        rois = tf.stop_gradient(self.rois[self.ends[i] - self.counts[i] : self.ends[i]])
        across, down = self.kinds[i] // (MAX_SAMPLES + 1), self.kinds[i] % (MAX_SAMPLES + 1)
        return across, down, rois[:, :4], tf.cast(rois[:, 4], tf.int32)


def _pool_groups(features, groups, *, resolution, offset):
    """Samples and averages all groups; returns the RoIs in their first order: float32 [R, resolution, resolution, C].

    Its gradient is a loop, too: TensorFlow's own of such a loop keeps its integers in lists on the device.
    """
    channels = features.shape[-1]
    shape = [None, resolution, resolution, channels]

    def pool(i, pooled):
        across, down, boxes, image_index = groups.get(i)
        samples = _sample_grid(features, boxes, image_index, down * resolution, across * resolution, offset=offset)
        cells = tf.reshape(samples, [-1, resolution, down, resolution, across, channels])
        return i + 1, pooled.write(i, tf.reduce_mean(cells, axis=[2, 4]))

    def spread(i, dy, total):
        across, down, boxes, image_index = groups.get(i)
        own = dy[groups.ends[i] - groups.counts[i] : groups.ends[i]] / tf.cast(across * down, tf.float32)
        rows, columns = down * resolution, across * resolution
        samples = tf.tile(own[:, :, None, :, None], [1, 1, down, 1, across, 1])
        total += tf.raw_ops.CropAndResizeGradImage(
            grads=tf.reshape(samples, [-1, rows, columns, channels]),
            boxes=_corners(features, boxes, rows, columns, offset=offset),
            box_ind=image_index,
            image_size=tf.shape(features),
            T=tf.float32,
        )
        return i + 1, dy, tf.ensure_shape(total, features.shape)

    @tf.custom_gradient
    def pool_all(features):
        def gradient(dy):
            state = 0, tf.gather(dy, groups.order), tf.zeros_like(features)
            *_, total = tf.while_loop(lambda i, *_: i < groups.size, spread, state)
            return total

        pooled = tf.TensorArray(tf.float32, groups.size, infer_shape=False, element_shape=shape)
        _, pooled = tf.while_loop(lambda i, _: i < groups.size, pool, (0, pooled))
        _, place = _sort(tf.cast(groups.order, tf.float32))
        return tf.ensure_shape(tf.gather(pooled.concat(), place), shape), gradient

    return pool_all(features)


@tf.custom_gradient
def _mean_2x2(x):
    """Averages each 2x2 window: [R, 2 H, 2 W, C] -> [R, H, W, C]. The gradient is a broadcast, not AvgPoolGrad."""

    def gradient(dy):
        r, height, width, channels = tf.unstack(tf.shape(x))
        spread = tf.broadcast_to(dy[:, :, None, :, None, :] * 0.25, [r, height // 2, 2, width // 2, 2, channels])
        return tf.reshape(spread, [r, height, width, channels])

    return tf.nn.avg_pool2d(x, 2, 2, "VALID"), gradient


@tf.custom_gradient
def _mean_of_four(x):
    """Averages each four adjacent items: [4 R, ...] -> [R, ...]. The gradient of `tf.reduce_mean` asks the host."""
    fours = tf.reshape(x, [-1, 4, math.prod(x.shape[1:])])

    def gradient(dy):
        rows = tf.reshape(dy * 0.25, [-1, 1, fours.shape[2]])
        return tf.reshape(tf.broadcast_to(rows, tf.shape(fours)), tf.shape(x))

    return tf.reshape(tf.reduce_mean(fours, axis=1), [-1, *x.shape[1:]]), gradient


class Pyramid:
    """The maps that RoIs pool from, each with its border (`extend_border`); a single map serves all RoIs.

    On a CPU each level pools its own RoIs, whose number the host must know. On a GPU, where that would be a wait per
    level, an atlas holds all levels, the finest on the left and the others below one another on its right, and one
    operation pools all RoIs; Detectron2's adaptive sampling waits once, and has one for each of its sample counts.
    """

    def __init__(self, features, strides, *, half_pixel, adaptive, after=()):
        """
        Args:
            features: list of [N, H, W, C], finest first. strides: pixels per cell of each.
            half_pixel, adaptive: see `roi_align`
            after: tensors that are to be computed before the atlas. What makes RoIs of proposals takes the host longer
                to launch than a GPU to run; while the GPU makes the atlas, the host gets ahead.
        """
        self._strides, self._half_pixel, self._adaptive = strides, half_pixel, adaptive
        self._is_atlas = len(features) > 1 and device.is_gpu()
        if self._is_atlas:
            with tf.control_dependencies(after):
                maps = [extend_border(x) for x in features]
            self._sizes = [tf.shape(x)[1:3] for x in maps]
            self._maps = [tf.cast(_join_maps(maps), tf.float32)]
        else:
            self._maps = [extend_border(tf.cast(x, tf.float32)) for x in features]

    def align(self, boxes, image_index, *, resolution):
        """Applies RoIAlign at the level that fits each RoI's size (FPN, arXiv:1612.03144 eq. 1).

        Args:
            boxes: float32 [R, 4] in pixels of the network input. image_index: int32 [R].
        Returns:
            float32 [R, resolution, resolution, C]
        """
        options = dict(resolution=resolution, half_pixel=self._half_pixel, adaptive=self._adaptive)
        if len(self._strides) == 1:
            return roi_align(self._maps[0], boxes / self._strides[0], image_index, **options)
        level = roi_level(boxes, num_levels=len(self._strides))
        if self._is_atlas:
            return self._align_in_atlas(boxes, image_index, level, resolution)
        rois, crops = [], []
        for i, (features, stride) in enumerate(zip(self._maps, self._strides)):
            rois.append(tf.cast(tf.where(tf.equal(level, i))[:, 0], tf.int32))
            level_boxes = tf.gather(boxes, rois[-1]) / stride
            crops.append(roi_align(features, level_boxes, tf.gather(image_index, rois[-1]), **options))
        return tf.dynamic_stitch(rois, crops)  # its gradient is a gather

    def _align_in_atlas(self, boxes, image_index, level, resolution):
        sizes = tf.cast(tf.stack(self._sizes), tf.float32)  # [L, 2], height and width with the border
        top = tf.concat([[0.0, 0.0], tf.cumsum(sizes[1:-1, 0])], axis=0)
        left = tf.concat([[0.0], tf.fill([len(self._strides) - 1], sizes[0, 1])], axis=0)
        corner = tf.stack([left, top, left, top], axis=1)
        of_level = tf.concat([tf.constant(self._strides, tf.float32)[:, None], corner, sizes], axis=1)
        stride, corner, size = tf.split(tf.gather(of_level, level), [1, 4, 2], axis=1)
        return roi_align(
            self._maps[0],
            boxes / stride,
            image_index,
            resolution=resolution,
            half_pixel=self._half_pixel,
            adaptive=self._adaptive,
            window=Window(corner, size),
        )


def _join_maps(maps):
    """Makes the atlas of maps [N, H, W, C]: the first on the left, the others below one another on its right."""
    column_width = tf.shape(maps[1])[2]
    column = tf.concat([_pad_to(x, tf.shape(x)[1], column_width) for x in maps[1:]], axis=1)
    height = tf.maximum(tf.shape(maps[0])[1], tf.shape(column)[1])
    return tf.concat([_pad_to(x, height, tf.shape(x)[2]) for x in (maps[0], column)], axis=2)


def _pad_to(x, height, width):
    """Adds zeros at the bottom and right of maps [N, H, W, C]."""
    return tf.pad(x, [[0, 0], [0, height - tf.shape(x)[1]], [0, width - tf.shape(x)[2]], [0, 0]])


def roi_level(boxes, *, num_levels):
    """Returns the level of RoIs [R, 4] as an index from level 2, int64 [R] in 0..num_levels - 1.

    The level is floor(4 + log2(sqrt(area) / 224 + 1e-6)), arXiv:1612.03144 eq. 1, limited to the existing levels.
    """
    octave = tf.math.log(tf.sqrt(box_ops.area(boxes)) / 224.0 + 1e-6) / tf.math.log(2.0)
    return tf.cast(tf.clip_by_value(tf.floor(4.0 + octave), 2.0, num_levels + 1.0) - 2.0, tf.int64)
