"""Image files against Pillow, and how images are resized and padded."""

import dataclasses
import io
from fractions import Fraction

import cv2
import numpy as np
import pytest
from painted import make_record
from PIL import Image

from common.errors import ImageError
from dataset import DatasetError
from dataset.images import NAMED_IMAGES, SkippedImages, check_sizes, image_size, load_image, pad_images, resized_shape

# -------------------------------------------------------------------------------------------------------- reading files


def smooth_picture(mode="RGB"):
    """A smooth picture, which lossy formats keep, 48 wide and 32 high."""
    small = np.random.default_rng(3).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(small, (48, 32), interpolation=cv2.INTER_CUBIC)).convert(mode)


def encode(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def load_bytes(folder, content, name="a picture, é"):
    path = folder / name
    path.write_bytes(content)
    return load_image(str(path))


@pytest.mark.parametrize(
    ("mode", "kind", "tolerance"),
    [
        ("RGB", "PNG", 0),
        ("RGB", "BMP", 0),
        ("RGB", "JPEG", 6),
        ("L", "PNG", 0),
        ("L", "JPEG", 3),
        ("LA", "PNG", 0),
        ("RGBA", "PNG", 0),
        ("P", "PNG", 0),
        ("1", "PNG", 0),
        ("CMYK", "JPEG", 6),
    ],
)
def test_load_image_gives_the_colours_that_pillow_reads(tmp_path, mode, kind, tolerance):
    content = encode(smooth_picture(mode), kind)
    image = load_bytes(tmp_path, content)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert image.dtype == np.uint8 and image.shape == (32, 48, 3)
    # JPEG decoders may round differently, and interpolate colour in their own way.
    assert np.abs(image[..., ::-1].astype(int) - expected).mean() <= tolerance


@pytest.mark.parametrize("channels", [1, 3])
def test_load_image_keeps_the_high_byte_of_16_bits(tmp_path, channels):
    values = np.random.default_rng(0).integers(0, 2**16, (5, 7, channels), dtype=np.uint16)
    _, content = cv2.imencode(".png", values)
    image = load_bytes(tmp_path, content.tobytes())
    np.testing.assert_allclose(image, np.broadcast_to(values / 257, (5, 7, 3)), atol=1)


# EXIF orientation: what must be done to the stored pixels to see them upright (exif.org, tag 274).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_load_image_applies_the_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    plain = load_bytes(tmp_path, encode(smooth_picture(), "JPEG"))
    image = load_bytes(tmp_path, encode(smooth_picture(), "JPEG", exif=exif))
    np.testing.assert_array_equal(image, UPRIGHT[orientation](plain))


def jpeg_with_thumbnail():
    """The thumbnail in the header has an end marker of its own."""
    content, thumbnail = encode(smooth_picture(), "JPEG"), encode(smooth_picture().resize((12, 8)), "JPEG")
    segment = b"Exif\0\0" + thumbnail
    return content[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + content[2:]


COMPLETE = {
    "JPEG": lambda: encode(smooth_picture(), "JPEG"),
    "progressive JPEG": lambda: encode(smooth_picture(), "JPEG", progressive=True),
    "JPEG with a thumbnail": jpeg_with_thumbnail,
    "JPEG with fill bytes": lambda: encode(smooth_picture(), "JPEG").replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),
    "PNG": lambda: encode(smooth_picture(), "PNG"),
    "BMP": lambda: encode(smooth_picture(), "BMP"),
    "WEBP": lambda: encode(smooth_picture(), "WEBP"),
}


@pytest.mark.parametrize("kind", COMPLETE)
def test_truncated_images_are_refused_and_bytes_after_the_end_are_not(tmp_path, kind):
    content = COMPLETE[kind]()
    assert load_bytes(tmp_path, content + b"appended").shape == (32, 48, 3)
    # Not every OpenCV notices that a JPEG is cut off; data does.
    complaint = "half: the image is cut off" if "JPEG" in kind else "half: not readable"
    for length in (4, *(int(len(content) * share) for share in (0.02, 0.3, 0.6, 0.95)), len(content) - 1):
        with pytest.raises(ImageError, match=complaint):
            load_bytes(tmp_path, content[:length], name="half")


def test_what_is_no_image_is_refused_by_name(tmp_path):
    for name, content in (
        ("empty.jpg", b""),
        ("text.jpg", b"no image at all, not even near"),
        ("start", b"\xff\xd8\xff"),
    ):
        with pytest.raises(ImageError, match=name):
            load_bytes(tmp_path, content, name=name)
    with pytest.raises(ImageError, match=r"gone\.jpg: No such file"):
        load_image(str(tmp_path / "gone.jpg"))
    with pytest.raises(ImageError, match="directory"):
        load_image(str(tmp_path))
    assert ImageError.exit_code == 4


# ---------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (800, 1067)),  # 640 * 800 / 480 = 1066.67
        (640, 480, (1067, 800)),
        (427, 640, (800, 1199)),  # 1199.06
        (800, 800, (800, 800)),
        (400, 1200, (448, 1344)),  # limited: 1344 / 1200 * 400
        (2000, 1000, (1344, 672)),
        (1, 5000, (32, 1344)),  # 0.27 would be no pixel
        (5000, 1, (1344, 32)),
        (1, 1, (800, 800)),
    ],
)
def test_resized_shape_by_hand(height, width, expected):
    assert resized_shape(height, width, short_edge=800, max_size=1344) == expected


def test_resized_shape_is_exact():
    """The definition in fractions, where floating point leaves no doubt."""
    rng = np.random.default_rng(0)
    for height, width in rng.integers(40, 2000, (2000, 2)).tolist():
        scale = min(Fraction(800, min(height, width)), Fraction(1333, max(height, width)))
        exact = [height * scale + Fraction(1, 2), width * scale + Fraction(1, 2)]
        if all(abs(edge - round(edge)) > 1e-9 or scale * min(height, width) == 800 for edge in exact):
            expected = tuple(max(int(edge), 32) for edge in exact)
            assert resized_shape(height, width, short_edge=800, max_size=1333) == expected


def test_short_edges_below_the_smallest_edge_are_kept():
    assert resized_shape(100, 200, short_edge=16, max_size=64) == (16, 32)


@pytest.mark.parametrize(("multiple", "expected"), [(32, (64, 96)), (1, (41, 70))])
def test_pad_images(multiple, expected):
    rng = np.random.default_rng(0)
    images = [rng.integers(1, 255, (*size, 3), dtype=np.uint8) for size in ((41, 60), (30, 70))]
    padded, shapes = pad_images(images, multiple=multiple)
    assert padded.shape == (2, *expected, 3) and padded.dtype == np.uint8 and shapes.dtype == np.int32
    np.testing.assert_array_equal(shapes, [[41, 60], [30, 70]])
    for image, slot in zip(images, padded):
        height, width = image.shape[:2]
        np.testing.assert_array_equal(slot[:height, :width], image)
        assert slot.sum() == image.sum()


# ------------------------------------------------------------------------------------------------------ whole data sets


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_size_in_the_header_is_the_size_of_the_image(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "image"
    path.write_bytes(encode(smooth_picture(), kind, exif=exif))
    assert image_size(str(path)) == load_image(str(path)).shape[:2]


def test_sizes_of_a_large_data_set_are_sampled(tmp_path):
    """Evenly: of the 1000 images, one file, those of the second half have another size than annotated."""
    record = make_record(tmp_path, 1, 60, 90)
    wrong = dataclasses.replace(record, width=91)
    with pytest.raises(DatasetError, match="^250 of 500 images") as error:
        check_sizes([record] * 500 + [wrong] * 500, max_dropped=0.49)
    assert len(str(error.value).splitlines()) == 1 + NAMED_IMAGES
    unreadable = dataclasses.replace(record, path=str(tmp_path / "none.png"))
    check_sizes([unreadable], max_dropped=0)


def test_only_the_first_skipped_images_are_named(caplog):
    skipped = SkippedImages(1000, 1.0)
    for number in [*range(1, 201), *range(1, 201)]:
        skipped.add(f"{number}.jpg", f"{number}.jpg: broken")
    named = [record.getMessage() for record in caplog.records]
    assert named == [f"unreadable image {n}, skipped: {n}.jpg: broken" for n in (*range(1, 11), 100)]
