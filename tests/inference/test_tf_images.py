"""What an exported graph does by itself: resizing, pasting and decoding are those of OpenCV and NumPy, bit by bit."""

import struct

import cv2
import numpy as np
import pytest
import tensorflow as tf
from helpers import paste_mask
from PIL import Image

from dataset.images import MIN_EDGE, pad_images, resized_shape
from inference import tf_images

tfv1 = tf.compat.v1


@pytest.fixture(scope="module", params=[False, True], ids=["OpenCV", "Pillow"])
def resize(request):
    """Resizes a batch in TensorFlow, into a larger frame than it needs; and an image by the library."""
    with tf.Graph().as_default(), tfv1.Session() as session:
        image = tfv1.placeholder(tf.uint8, [None, None, None, 3])
        old, new = (tfv1.placeholder(tf.int32, [None, 2]) for _ in range(2))
        resized = tf_images.resize(image, old, new, tf.reduce_max(new, axis=0) + 3, antialias=request.param)

        def by_library(image, height, width):
            if request.param:
                return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
            return cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_LINEAR)

        yield lambda *arrays: session.run(resized, dict(zip((image, old, new), arrays))), by_library


def sizes(rng, count):
    """(h, w, new h, new w): any, halved (where OpenCV takes another way), doubled, one edge kept, and one pixel."""
    for number in range(count):
        h, w, new_h, new_w = rng.integers(1, 300, 4).tolist()
        yield [
            (h, w, new_h, new_w),
            (2 * h, 2 * w, h, w),
            (h, w, 2 * h, 2 * w),
            (h, w, h, new_w),
            (1, w, new_h, 1),
            (h, w, h, w),
        ][number % 6]


def test_resize_equals_the_library(resize):
    resize, by_library = resize
    rng = np.random.default_rng(0)
    for h, w, new_h, new_w in [*sizes(rng, 240), (480, 640, 800, 1067), (1500, 2000, 800, 1067)]:
        image = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        (resized,) = resize(image[None], [[h, w]], [[new_h, new_w]])
        expected = by_library(image, new_h, new_w)
        np.testing.assert_array_equal(resized[:new_h, :new_w], expected, err_msg=f"{h}x{w} to {new_h}x{new_w}")
        assert not resized[new_h:].any() and not resized[:, new_w:].any()


def test_resize_of_a_batch_takes_each_image_by_itself(resize):
    """What lies in the padding has no influence: border pixels repeat the image's own."""
    resize, by_library = resize
    rng = np.random.default_rng(1)
    batch = rng.integers(0, 256, (3, 50, 70, 3), dtype=np.uint8)
    old, new = [[50, 70], [20, 70], [33, 5]], [[80, 40], [31, 93], [66, 10]]
    for slot, image, (h, w), (new_h, new_w) in zip(resize(batch, old, new), batch, old, new):
        expected = by_library(np.ascontiguousarray(image[:h, :w]), new_h, new_w)
        np.testing.assert_array_equal(slot[:new_h, :new_w], expected)


def test_resized_shape_equals_data():
    rng = np.random.default_rng(2)
    shapes = np.concatenate([rng.integers(1, 5000, (3000, 2)), rng.integers(1, 30, (300, 2))]).astype(np.int32)
    for short_edge, max_size in ((800, 1344), (800, 1333), (600, 1024.0), (5, 8)):
        with tf.Graph().as_default(), tfv1.Session() as session:
            new = tf_images.resized_shape(
                tf.constant(shapes), short_edge=short_edge, max_size=max_size, min_edge=MIN_EDGE
            )
            expected = [resized_shape(*shape, short_edge=short_edge, max_size=max_size) for shape in shapes.tolist()]
            np.testing.assert_array_equal(session.run(new), expected)


def test_pasting_equals_numpy():
    rng = np.random.default_rng(3)
    corner = rng.uniform(-30, 100, (60, 2))
    boxes = np.concatenate([corner, corner + rng.exponential(40, (60, 2))], axis=1).astype(np.float32)
    boxes[0], boxes[1], boxes[2] = (5, 5, 5, 30), (20, 5, 10, 30), (0, 0, 90, 80)
    masks = rng.uniform(size=(60, 14, 14)).astype(np.float32)
    with tf.Graph().as_default(), tfv1.Session() as session:
        pasted = session.run(tf_images.paste_masks(tf.constant(masks), tf.constant(boxes), tf.constant([80, 90])))
    expected = [paste_mask(mask, box, 80, 90) for mask, box in zip(masks, boxes)]
    np.testing.assert_array_equal(pasted, expected)
    assert not pasted[:2].any() and pasted[2].any()


def test_no_mask_and_masks_of_impossible_boxes():
    """None gives none; a box that is not finite, or reaches to infinity, covers nothing."""
    boxes = np.float32([[1, 1, np.inf, 5], [np.nan, 1, 4, 5], [-np.inf, 1, 4, 5], [1, 1, 4, 5]])
    with tf.Graph().as_default(), tfv1.Session() as session:
        masks = tfv1.placeholder(tf.float32, [None, 14, 14])
        pasted = tf_images.paste_masks(masks, tfv1.placeholder_with_default(boxes, [None, 4]), tf.constant([8, 9]))
        found = session.run(pasted, {masks: np.ones((4, 14, 14), np.float32)})
        box_input = pasted.graph.get_tensor_by_name("PlaceholderWithDefault:0")
        none = session.run(pasted, {masks: np.zeros((0, 14, 14)), box_input: np.zeros((0, 4))})
    assert [x.any() for x in found] == [False, False, False, True]
    assert none.shape == (0, 8, 9)


def test_exactly_half_is_in_the_mask():
    """By hand: cells of a pixel each, whose centres meet the pixels'; the ring of zeros halves the value around."""
    masks = np.array([[[0.5, 0.49], [0.51, 0.5]], [[1.0, 1.0], [1.0, 1.0]]], np.float32)
    boxes = np.array([[1, 1, 3, 3], [1.5, 1, 3.5, 3]], np.float32)
    with tf.Graph().as_default(), tfv1.Session() as session:
        found = session.run(tf_images.paste_masks(tf.constant(masks), tf.constant(boxes), tf.constant([4, 5])))
    assert np.argwhere(found[0]).tolist() == [[1, 1], [2, 1], [2, 2]]
    # Columns 1 and 3 have their centres on the edges of the box, midway between a cell of 1 and the ring.
    assert np.argwhere(found[1]).tolist() == [[row, column] for row in (1, 2) for column in (1, 2, 3)]
    for mask, box, pasted in zip(masks, boxes, found):
        np.testing.assert_array_equal(paste_mask(mask, box, 4, 5), pasted)


def test_decoding_equals_opencv():
    rng = np.random.default_rng(4)
    images = [
        cv2.blur(rng.integers(0, 256, (h, w, 3), dtype=np.uint8), (5, 5)) for h, w in ((40, 60), (33, 71), (9, 5))
    ]
    grey = cv2.cvtColor(images[0], cv2.COLOR_BGR2GRAY)
    files = [cv2.imencode(suffix, image)[1].tobytes() for suffix in (".jpg", ".png", ".bmp") for image in images]
    files.append(cv2.imencode(".jpg", grey)[1].tobytes())
    with tf.Graph().as_default(), tfv1.Session() as session:
        batch, shapes = session.run(tf_images.decode_images(tf.constant(files)))
    expected = [cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR) for file in files]
    expected, expected_shapes = pad_images(expected, multiple=1)
    np.testing.assert_array_equal(shapes, expected_shapes)
    np.testing.assert_array_equal(batch, expected)


def exif_jpeg(image, orientation, *, byte_order, before=b""):
    """A JPEG with an EXIF segment of three tags, orientation the second, after the segments `before`."""
    end = "<" if byte_order == b"II" else ">"
    entries = [
        (0x10F, 2, 3, b"me\0\0"),
        (0x112, 3, 1, struct.pack(end + "HH", orientation, 0)),
        (0x128, 3, 1, bytes(4)),
    ]
    directory = b"".join(struct.pack(end + "HHI", *entry[:3]) + entry[3] for entry in entries)
    tiff = byte_order + struct.pack(end + "HIH", 42, 8, len(entries)) + directory + bytes(4)
    content = b"Exif\0\0" + tiff
    segment = b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content
    jpeg = cv2.imencode(".jpg", image)[1].tobytes()
    return jpeg[:2] + before + segment + jpeg[2:]


def test_jpegs_are_turned_as_opencv_turns_them():
    image = cv2.blur(np.random.default_rng(6).integers(0, 256, (24, 40, 3), dtype=np.uint8), (5, 5))
    files = [exif_jpeg(image, number, byte_order=order) for order in (b"II", b"MM") for number in range(10)]
    comment = b"\xff\xfe\x00\x06Exif"  # a decoy
    files += [exif_jpeg(image, 6, byte_order=b"MM", before=comment), cv2.imencode(".png", image)[1].tobytes()]
    with tf.Graph().as_default(), tfv1.Session() as session:
        batch, shapes = session.run(tf_images.decode_images(tf.constant(files)))
    expected = [cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR) for file in files]
    assert len({each.shape for each in expected}) == 2 and not np.array_equal(expected[1], expected[3])
    expected, expected_shapes = pad_images(expected, multiple=1)
    np.testing.assert_array_equal(shapes, expected_shapes)
    np.testing.assert_array_equal(batch, expected)
