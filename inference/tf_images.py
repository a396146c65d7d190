"""Images and masks in TensorFlow: an exported graph's equivalents of dataset/images.py and common/rle.py.

Shapes: N images, H and W of the padded batch, h and w of the resized one, R RoIs, M mask resolution.
"""

import tensorflow as tf

EXIF_LIMIT = 2**16  # the orientation is searched for in this many bytes at the start of a file
COEFFICIENT_BITS = 11  # of OpenCV's fixed-point interpolation
PILLOW_BITS = 22  # of Pillow's


def decode_images(contents: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes image files to a padded batch.

    Args:
        contents: string [N], the bytes of JPEG, PNG, WebP, BMP or GIF (its first frame) files. JPEGs are rotated
            by their EXIF.
    Returns:
        image uint8 [N, H, W, 3] BGR, zeros at the bottom and right; image_shape int32 [N, 2]
    """
    count = tf.shape(contents)[0]

    def decode(i, images, shapes):
        image = tf.reverse(_upright(_decode(contents[i]), _exif_orientation(contents[i])), [2])
        return i + 1, images.write(i, image), shapes.write(i, tf.shape(image)[:2])

    images = tf.TensorArray(tf.uint8, count, infer_shape=False, clear_after_read=False)
    shapes = tf.TensorArray(tf.int32, count, element_shape=[2])
    _, images, shapes = tf.while_loop(lambda i, *_: i < count, decode, (0, images, shapes))
    image_shape = shapes.stack()
    size = tf.reduce_max(image_shape, axis=0)

    def pad(i):
        fill = size - image_shape[i]
        return tf.pad(images.read(i), [[0, fill[0]], [0, fill[1]], [0, 0]])

    padded = tf.map_fn(pad, tf.range(count), fn_output_signature=tf.uint8)
    return tf.ensure_shape(padded, [None, None, None, 3]), image_shape


def _decode(content):
    """Decodes one file to uint8 [H, W, 3] RGB; JPEGs with the accurate transform, as OpenCV does."""
    image = tf.cond(
        tf.io.is_jpeg(content),
        lambda: tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(content, channels=3, expand_animations=False),
    )
    return tf.ensure_shape(image, [None, None, 3])


def _exif_orientation(content):
    """The orientation of a JPEG, the tag 0x112 in the first directory of its EXIF (a TIFF file in its header): scalar
    int32, 1 to 8; 1 (upright) without that tag."""
    header = tf.cast(tf.io.decode_raw(tf.strings.substr(content, 0, EXIF_LIMIT), tf.uint8), tf.int32)
    header = tf.pad(header, [[0, 64]])  # so that reads beyond the end return 0
    length = tf.shape(header)[0]
    marker = [tf.equal(header[i : length - 5 + i], byte) for i, byte in enumerate(b"Exif\0\0")]
    starts = tf.where(tf.reduce_all(marker, axis=0))[:, 0]
    tiff = tf.cast(tf.concat([starts, [0]], axis=0)[0], tf.int32) + 6
    is_little_endian = tf.equal(header[tf.minimum(tiff, length - 1)], ord("I"))

    def number(position, size):
        index = tf.expand_dims(position, -1) + tf.where(is_little_endian, tf.range(size)[::-1], tf.range(size))
        digits = tf.gather(header, tf.clip_by_value(index, 0, length - 1))
        return tf.reduce_sum(digits * 256 ** tf.range(size)[::-1], axis=-1)

    directory = tiff + number(tiff + 4, 4)
    entries = directory + 2 + 12 * tf.range(number(directory, 2))
    values = number(tf.boolean_mask(entries, tf.equal(number(entries, 2), 0x112)) + 8, 2)
    value = tf.concat([values, [1]], axis=0)[0]
    is_known = tf.io.is_jpeg(content) & (tf.size(starts) > 0) & (value >= 1) & (value <= 8)
    return tf.where(is_known, value, 1)


def _upright(image, orientation):
    """Turns an image [H, W, 3] of EXIF orientation 1 to 8 upright."""
    image = tf.cond(orientation >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
    image = tf.where(tf.reduce_any(tf.equal(orientation, [3, 4, 7, 8])), image[::-1], image)
    image = tf.where(tf.reduce_any(tf.equal(orientation, [2, 3, 6, 7])), image[:, ::-1], image)
    return tf.ensure_shape(image, [None, None, 3])


def resized_shape(image_shape: tf.Tensor, *, short_edge: int, max_size: float, min_edge: int) -> tf.Tensor:
    """Computes dataset.images.resized_shape, int32 [N, 2] -> int32 [N, 2], by the same float64 operations in order."""
    edges = tf.cast(image_shape, tf.float64)
    scale = short_edge / tf.reduce_min(edges, axis=1)
    scale *= tf.minimum(tf.constant(1.0, tf.float64), max_size / (scale * tf.reduce_max(edges, axis=1)))
    return tf.maximum(tf.cast(edges * scale[:, None] + 0.5, tf.int32), min(min_edge, short_edge))


def resize(
    image: tf.Tensor, image_shape: tf.Tensor, new_shape: tf.Tensor, size: tf.Tensor, *, antialias: bool
) -> tf.Tensor:
    """Resizes each image of a padded batch, with the exact result of dataset.images.resize.

    Args:
        image: uint8 [N, H, W, 3]. image_shape, new_shape: int32 [N, 2], height and width before and after.
        size: int32 [2], height and width h, w of the result, at least the largest of new_shape.
    Returns:
        uint8 [N, h, w, 3], zeros beyond new_shape
    """
    resized = (_resize_as_pillow if antialias else _resize_as_opencv)(image, image_shape, new_shape, size)
    inside = [tf.sequence_mask(new_shape[:, axis], size[axis], tf.uint8) for axis in (0, 1)]
    return resized * (inside[0][:, :, None] * inside[1][:, None, :])[..., None]


def _resize_as_pillow(image, image_shape, new_shape, size):
    """`resize` as Pillow's BILINEAR: along x, then y, rounded in between (its src/libImaging/Resample.c)."""
    for axis in (1, 0):
        image = _average(image, image_shape[:, axis], new_shape[:, axis], size[axis], axis=axis + 1)
    return image


def _average(image, old, new, size, *, axis):
    """Averages along one axis under a triangle around each new pixel's centre, with weights of 22 bits.

    Args:
        image: uint8 [N, H, W, 3]. old, new: int32 [N], edges in pixels. size: of the result. axis: 1 or 2.
    """
    scale = tf.cast(old, tf.float64)[:, None] / tf.cast(new, tf.float64)[:, None]
    radius = tf.maximum(scale, 1.0)
    center = (tf.cast(tf.range(size), tf.float64) + 0.5) * scale
    # Positions of empty images and beyond `new` only have to stay inside.
    first = tf.cast(tf.maximum(center - radius + 0.5, 0.0), tf.int32)
    last = tf.minimum(tf.cast(center + radius + 0.5, tf.int32), old[:, None])
    taps = tf.maximum(tf.reduce_max(last - first), 1)
    pixel = first[:, :, None] + tf.range(taps)
    distance = (tf.cast(pixel, tf.float64) - center[:, :, None] + 0.5) * (1.0 / radius)[:, :, None]
    weights = tf.where(pixel < last[:, :, None], tf.maximum(1.0 - tf.abs(distance), 0.0), 0.0)
    weights = tf.math.divide_no_nan(weights, tf.reduce_sum(weights, axis=2, keepdims=True))
    weights = tf.cast(weights * 2.0**PILLOW_BITS + 0.5, tf.int32)
    pixel = tf.minimum(pixel, old[:, None, None] - 1)

    def add(tap, total):
        taken = tf.cast(tf.gather(image, pixel[:, :, tap], axis=axis, batch_dims=1), tf.int32)
        weight = weights[:, :, tap]
        return tap + 1, total + taken * (weight[:, None, :, None] if axis == 2 else weight[:, :, None, None])

    shape = tf.shape(image)
    shape = tf.concat([shape[:axis], [size], shape[axis + 1 :]], axis=0)
    start = 0, tf.fill(shape, 2 ** (PILLOW_BITS - 1))
    invariants = tf.TensorShape([]), tf.TensorShape([None, None, None, 3])
    total = tf.while_loop(lambda tap, _: tap < taps, add, start, shape_invariants=invariants)[1]
    return tf.cast(tf.clip_by_value(tf.bitwise.right_shift(total, PILLOW_BITS), 0, 255), tf.uint8)


def _resize_as_opencv(image, image_shape, new_shape, size):
    """`resize` as cv2.resize(..., INTER_LINEAR) for uint8.

    OpenCV interpolates along x first, with weights rounded to 11 bits, and drops 4 bits of the result. It drops 16 bits
    of the products with the weights along y, and rounds their sum to 8 bits (its modules/imgproc/src/resize.cpp).
    """
    rows, row_weights = _interpolation(image_shape[:, 0], new_shape[:, 0], size[0], weight_at_border=True)
    columns, column_weights = _interpolation(image_shape[:, 1], new_shape[:, 1], size[1], weight_at_border=False)
    lines = [_blend_columns(tf.gather(image, index, batch_dims=1), columns, column_weights) for index in rows]
    shift = tf.bitwise.right_shift
    parts = [shift(weight[:, :, None, None] * shift(line, 4), 16) for line, weight in zip(lines, row_weights)]
    return tf.cast(shift(parts[0] + parts[1] + 2, 2), tf.uint8)


def _blend_columns(image, columns, weights):
    """Interpolates [N, H, W, 3] along x: int32 [N, H, w, 3], weighted sums of two columns each."""
    left, right = (
        tf.cast(tf.gather(image, index, axis=2, batch_dims=1), tf.int32) * weight[:, None, :, None]
        for index, weight in zip(columns, weights)
    )
    return left + right


def _interpolation(old, new, size, *, weight_at_border):
    """The two source pixels of each new one along one axis, and their weights out of 2^11.

    Args:
        old, new: int32 [N], edges in pixels. size: of the result, at least the largest of `new`.
        weight_at_border: whether positions beyond the outermost centres, whose two source pixels are the same, keep
            their fractional weights: OpenCV does so for rows and not for columns.
    Returns:
        two index tensors int32 [N, size], two weight tensors int32 [N, size]
    """
    old, scale = old[:, None], 1.0 / (tf.cast(new, tf.float64) / tf.cast(old, tf.float64))[:, None]
    positions = tf.cast((tf.cast(tf.range(size), tf.float64) + 0.5) * scale - 0.5, tf.float32)
    before = tf.floor(positions)
    fraction, before = positions - before, tf.cast(before, tf.int32)
    if not weight_at_border:
        fraction = tf.where((before < 0) | (before >= old - 1), 0.0, fraction)
    indices = [tf.clip_by_value(before + offset, 0, old - 1) for offset in (0, 1)]
    one = float(2**COEFFICIENT_BITS)
    return indices, [tf.cast(tf.round(part * one), tf.int32) for part in (1.0 - fraction, fraction)]


def paste_masks(masks: tf.Tensor, boxes: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Pastes predicted masks into their image as common.rle.paste_masks does, one after the other to save memory.

    Args:
        masks: float32 [R, M, M], probabilities within the box. boxes: float32 [R, 4], pixels of the image.
        size: int32 [2], height and width H, W of the image.
    Returns:
        uint8 [R, H, W] of 0 and 1
    """

    def paste(mask_and_box):
        return _paste(*mask_and_box, size)

    padded = tf.pad(masks, [[0, 0], [1, 1], [1, 1]])
    return _map_rows(paste, (padded, boxes), tf.TensorSpec([None, None], tf.uint8))


def encode_masks(masks: tf.Tensor, sizes: tf.Tensor) -> tf.Tensor:
    """Encodes masks as grey PNG files of 0 and 255.

    Args:
        masks: uint8 [R, H, W] of 0 and 1. sizes: int32 [R, 2], height and width of the part of each to encode.
    Returns:
        string [R]
    """

    def encode(mask_and_size):
        mask, size = mask_and_size
        height, width = tf.unstack(tf.maximum(size, 1))
        return tf.io.encode_png(mask[:height, :width, None] * tf.constant(255, tf.uint8))

    return _map_rows(encode, (masks, sizes), tf.TensorSpec([], tf.string))


def _map_rows(function, rows, spec):
    """`tf.map_fn` over tensors [R, ...], also for R = 0, for which TensorFlow cannot stack results of unknown shape."""
    count = tf.shape(rows[0])[0]
    is_empty = tf.cast(tf.equal(count, 0), tf.int32)
    padded = [tf.pad(x, [[0, is_empty]] + [[0, 0]] * (x.shape.rank - 1)) for x in rows]
    return tf.map_fn(function, tuple(padded), fn_output_signature=spec)[:count]


def _paste(padded, box, size):
    """Pastes one mask, float32 [M + 2, M + 2] with its ring of zero cells, into the image: uint8 [H, W]."""
    x1, y1, x2, y2 = tf.unstack(tf.cast(box, tf.float64))
    cells_high, cells_wide = (tf.shape(padded)[axis] - 2 for axis in (0, 1))
    top, bottom, cells_y, weights_y = _mask_interpolation(y1, y2, cells_high, size[0])
    left, right, cells_x, weights_x = _mask_interpolation(x1, x2, cells_wide, size[1])
    lines = tf.gather(padded, cells_y)
    lines += weights_y[:, None] * (tf.gather(padded, cells_y + 1) - lines)
    before, after = tf.gather(lines, cells_x, axis=1), tf.gather(lines, cells_x + 1, axis=1)
    inside = tf.cast((after - before) * weights_x + before >= 0.5, tf.uint8)
    return tf.pad(inside, [[top, size[0] - bottom], [left, size[1] - right]])


def _mask_interpolation(low, high, cells, pixels):
    """The pixels that a mask can reach along one axis, and their cells; the same arithmetic as in common/rle.py.

    Returns:
        the first pixel and the last + 1; for each pixel the cell at or before its centre, int32, and the weight of the
        next cell, float32. An empty box reaches no pixel.
    """
    cell = (high - low) / tf.cast(cells, tf.float64)
    is_real = (cell > 0) & tf.math.is_finite(cell)
    start, stop = (
        tf.cast(tf.clip_by_value(edge, 0.0, tf.cast(pixels, tf.float64)), tf.int32)
        for edge in (tf.where(is_real, tf.floor(low), 0.0), tf.where(is_real, tf.math.ceil(high), 0.0))
    )
    positions = (tf.cast(tf.range(start, stop), tf.float64) + 0.5 - low) / cell + 0.5
    positions = tf.clip_by_value(positions, 0.0, tf.cast(cells + 1, tf.float64))
    before = tf.minimum(tf.cast(positions, tf.int32), cells)
    return start, stop, before, tf.cast(positions - tf.cast(before, tf.float64), tf.float32)
