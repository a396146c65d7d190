"""Bad data sets of every kind: what a training does about them, and what tools.doctor says of them."""

import io
import itertools
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import data
import train
from common.rle import encode_rle, segmentation_to_mask
from config import Config, UserError
from dataset.images import check_sizes
from evaluation import metrics
from evaluation.results import coco_results
from inference.predictor import ImageDetections
from tools import doctor

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH = 40, 60
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
IMAGES = 8


def annotation(number, **changes):
    """A square of 20 x 20 at (10, 10), in the image of its number."""
    entry = {"id": number, "image_id": number, "category_id": 1 + number % 2, "bbox": [10, 10, 20, 20]}
    return {**entry, "area": 400, "iscrowd": 0, "segmentation": [SQUARE], **changes}


def content():
    images = [{"id": n, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH} for n in range(1, IMAGES + 1)]
    annotations = [annotation(n) for n in range(1, IMAGES + 1)]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }


def encode(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def picture(mode="RGB", size=(WIDTH, HEIGHT)):
    small = np.random.default_rng(0).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(small, size, interpolation=cv2.INTER_CUBIC)).convert(mode)


class DataSet:
    """A small data set on disk: eight images with an object each, good until something is done to it."""

    def __init__(self, folder):
        self.images = folder / "images"
        self.images.mkdir()
        self.json = folder / "a.json"
        self.content = content()
        for entry in self.content["images"]:
            (self.images / entry["file_name"]).write_bytes(encode(picture(), "JPEG"))

    def write(self):
        if self.content is not None:
            # Python writes NaN and Infinity, which no JSON has, as some tools do.
            self.json.write_text(json.dumps(self.content))
        return f"{self.json}:{self.images}"


# What is done to the data set. The first annotation and the first image have what is wrong.


def raw(text):
    def change(data_set):
        data_set.content = None
        data_set.json.write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def with_json(key, value):
    return lambda data_set: data_set.content.update({key: value})


def without(key):
    return lambda data_set: data_set.content.pop(key)


def with_annotation(**changes):
    return lambda data_set: data_set.content["annotations"][0].update(changes)


def with_all_annotations(**changes):
    return lambda data_set: [entry.update(changes) for entry in data_set.content["annotations"]]


def with_image(**changes):
    return lambda data_set: data_set.content["images"][0].update(changes)


def with_file(make):
    return lambda data_set: (data_set.images / "1.jpg").write_bytes(make())


def renamed(name):
    def change(data_set):
        (data_set.images / name).parent.mkdir(exist_ok=True)
        (data_set.images / "1.jpg").rename(data_set.images / name)
        data_set.content["images"][0]["file_name"] = name

    return change


def of_size(width, height):
    def change(data_set):
        (data_set.images / "1.jpg").write_bytes(encode(picture(size=(width, height)), "PNG"))
        data_set.content["images"][0].update(height=height, width=width)
        bbox, polygon = [0, 0, width, height], [0, 0, width, 0, width, height, 0, height]
        data_set.content["annotations"][0].update(bbox=bbox, segmentation=[polygon], area=width * height)

    return change


def missing(data_set):
    (data_set.images / "1.jpg").unlink()


def link_outside(data_set):
    (data_set.images / "1.jpg").rename(data_set.images.parent / "1.jpg")
    (data_set.images / "1.jpg").symlink_to(data_set.images.parent / "1.jpg")


def without_keys(*keys):
    return lambda data_set: [entry.pop(key) for entry in data_set.content["annotations"] for key in keys]


def all_of(*changes):
    return lambda data_set: [change(data_set) for change in changes]


def sideways(width, height):
    exif = Image.Exif()
    exif[274] = 6
    return all_of(
        with_file(lambda: encode(picture(size=(HEIGHT, WIDTH)), "JPEG", exif=exif)),
        with_image(width=width, height=height),
    )


def cut(kind):
    def make():
        whole = encode(picture(), kind)
        return whole[:-20]

    return make


def bomb():
    """A PNG of 20,000 x 20,000 pixels by its header, in 100 bytes."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def png_16():
    return cv2.imencode(".png", np.full((HEIGHT, WIDTH, 3), 40_000, np.uint16))[1].tobytes()


def rle(mask=None, *, compressed=True):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8) if mask is None else mask
    mask[10:30, 10:30] = 1
    if compressed:
        return encode_rle(mask)
    edges = np.flatnonzero(np.diff(mask.T.ravel())) + 1
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *edges, mask.size]).tolist()}


REPEATED = with_json("annotations", [annotation(1), annotation(1)])
RLE = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}

# Name: what is done, the exit code of a training, and the rule that the doctor finds broken (None: it sees a clean
# data set; an upper-case letter begins what it says of a file that is none).
CASES = {
    "a list": (raw("[]"), 2, "The top level is a list"),
    "cut off json": (lambda d: (d.write(), raw(d.json.read_bytes()[:-40])(d)), 2, "Not valid JSON"),
    "an empty file": (raw(""), 2, "Not valid JSON"),
    "binary": (raw(b"\x00\xff\xfe"), 2, "Not valid JSON"),
    "deeply nested": (raw("[" * 100_000), 2, "Nested too deeply"),
    "a huge number": (raw('{"images": [' + "9" * 1_000_000 + "]}"), 2, "Not valid JSON"),
    "no categories": (without("categories"), 2, 'No key "categories"'),
    "no images": (without("images"), 2, 'No key "images"'),
    "empty images": (with_json("images", []), 2, 'The list "images" is empty'),
    "images that are no list": (with_json("images", {}), 2, 'No list "images"'),
    "category without name": (with_json("categories", [{"id": 1}, {"id": 2, "name": "b"}]), 2, "format"),
    "category id twice": (with_json("categories", 2 * [{"id": 1, "name": "a"}]), 2, "duplicate"),
    "image without size": (with_image(height=None), 2, "format"),
    "image id twice": (with_image(id=2), 2, "duplicate"),
    "file name twice": (with_image(file_name="2.jpg"), 2, "duplicate"),
    "annotation id twice": (REPEATED, 2, "duplicate"),
    "annotation without id": (with_annotation(id=None), 2, "format"),
    "unknown image": (with_annotation(image_id=99), 2, "image_id"),
    "unknown category": (with_annotation(category_id=3), 2, "category_id"),
    "box of NaN": (with_annotation(bbox=[1, 2, 3, float("nan")]), 2, "bbox"),
    "infinite box": (with_annotation(bbox=[1, 2, float("inf"), 4]), 2, "bbox"),
    "box of text": (with_annotation(bbox=[1, 2, 3, "4"]), 2, "bbox"),
    "box of three numbers": (with_annotation(bbox=[1, 2, 3]), 2, "bbox"),
    "no box": (with_annotation(bbox=None), 2, "bbox"),
    "area of text": (with_annotation(area="large"), 2, "format"),
    "some without segmentation": (with_annotation(segmentation=None), 2, "no segmentation"),
    "segmentation of text": (with_annotation(segmentation="x"), 2, "segmentation"),
    "polygon of text": (with_annotation(segmentation=[["1"] * 6]), 2, "segmentation"),
    "polygon of NaN": (with_annotation(segmentation=[[float("nan")] * 6]), 2, "segmentation"),
    "RLE of another size": (with_annotation(segmentation={**RLE, "size": [60, 40]}), 2, "segmentation"),
    "RLE too short": (with_annotation(segmentation={**RLE, "counts": [99]}), 2, "segmentation"),
    "RLE beyond 32 bits": (with_annotation(segmentation={**RLE, "counts": "oooooooooooo0"}), 2, "segmentation"),
    "RLE of huge runs": (with_annotation(segmentation={**RLE, "counts": [2**62, 2**62]}), 2, "segmentation"),
    "RLE of negative runs": (with_annotation(segmentation={**RLE, "counts": [2500, -100]}), 2, "segmentation"),
    "file outside": (all_of(renamed("../1.jpg")), 2, "outside file"),
    "absolute file name": (with_image(file_name="/etc/hostname"), 2, "outside file"),
    "link outside": (link_outside, 2, "outside file"),
    "missing file": (missing, 2, "missing file"),
    "no object at all": (with_json("annotations", []), 2, None),
    "width and height swapped": (sideways(HEIGHT, WIDTH), 2, "size"),
    "other width": (with_image(width=WIDTH + 1), 2, "size"),
    "reversed box": (with_annotation(bbox=[30, 30, -20, -20]), 4, "reversed box"),
    "empty box": (with_annotation(bbox=[10, 10, 0, 20]), 4, "zero box"),
    "box outside": (with_annotation(bbox=[70, 10, 20, 20]), 4, "outside box"),
    "box below a pixel": (with_annotation(bbox=[10, 10, 0.5, 0.5]), 4, "tiny"),
    "no area": (with_annotation(area=0), 4, "tiny"),
    "no polygon": (with_annotation(segmentation=[]), 4, "no polygon"),
    "two points": (with_annotation(segmentation=[[1, 1, 9, 9]]), 4, "no polygon"),
    "odd count": (with_annotation(segmentation=[[1, 1, 9, 9, 9, 1, 5]]), 4, "no polygon"),
    "empty image file": (with_file(bytes), 4, "unreadable"),
    "text for an image": (with_file(lambda: b"no image"), 4, "unreadable"),
    "cut off JPEG": (with_file(cut("JPEG")), 4, "unreadable"),
    "cut off PNG": (with_file(cut("PNG")), 4, "unreadable"),
    "decompression bomb": (all_of(with_file(bomb), with_image(height=20_000, width=20_000)), 4, "unreadable"),
    "half outside": (with_annotation(bbox=[-10, 10, 30, 20]), 0, "clipped box"),
    "huge coordinates": (with_annotation(segmentation=[[*SQUARE[:4], 1e9, 1e9, *SQUARE[6:]]]), 0, "far polygon"),
    "one bad polygon of two": (with_annotation(segmentation=[SQUARE, [1, 1]]), 0, "bad polygon"),
    "marked as ignore": (with_annotation(ignore=1), 0, "ignore"),
    "unused class": (
        lambda d: d.content["categories"].append({"id": 3, "name": "c"}),
        0,
        "unused class",
    ),
    "one name twice": (with_json("categories", [{"id": k, "name": "a"} for k in (1, 2)]), 0, "same name"),
    "object that vanishes": (with_annotation(bbox=[10, 10, 1.1, 1.1], area=1.2), 0, "vanishing"),
    "good": (lambda data_set: None, 0, None),
    "annotation id 0": (with_annotation(id=0), 0, None),
    "no area, no iscrowd": (without_keys("area", "iscrowd"), 0, None),
    "RLE": (with_annotation(segmentation=rle()), 0, None),
    "RLE of numbers": (with_annotation(segmentation=rle(compressed=False)), 0, None),
    "crowd": (with_annotation(segmentation=rle(compressed=False), iscrowd=1), 0, None),
    "an image without objects": (lambda data_set: data_set.content["annotations"].pop(), 0, None),
    "name with spaces and accents": (renamed("ein Bild, früh 図.jpg"), 0, None),
    "file in a folder": (renamed("sub/1.jpg"), 0, None),
    "grey JPEG": (with_file(lambda: encode(picture("L"), "JPEG")), 0, None),
    "CMYK JPEG": (with_file(lambda: encode(picture("CMYK"), "JPEG")), 0, None),
    "palette PNG": (with_file(lambda: encode(picture("P"), "PNG")), 0, None),
    "RGBA PNG": (with_file(lambda: encode(picture("RGBA"), "PNG")), 0, None),
    "grey and alpha PNG": (with_file(lambda: encode(picture("LA"), "PNG")), 0, None),
    "16 bit PNG": (with_file(png_16), 0, None),
    "rotated by EXIF": (sideways(WIDTH, HEIGHT), 0, None),
    "1 x 1": (of_size(1, 1), 4, "tiny"),
    "1 x 5000": (of_size(1, 5000), 0, None),
    "5000 x 1": (of_size(5000, 1), 0, None),
}


@pytest.fixture
def data_set(tmp_path):
    return DataSet(tmp_path)


@pytest.fixture
def fresh_config(monkeypatch):
    """The default configuration, and small images."""
    config = Config()
    sizes = ["PREPROC.TRAIN_SHORT_EDGE_SIZE=32", "PREPROC.TEST_SHORT_EDGE_SIZE=32", "PREPROC.MAX_SIZE=128"]
    config.update([*sizes, "DATA.NUM_WORKERS=0", "TRAIN.BATCH_SIZE_PER_GPU=1"])
    for module in (train, doctor):
        monkeypatch.setattr(module, "config", config)
    return config


def train_on(config, path):
    """What train.py does with its data, without a model: (exit code, message, batches of two passes)."""
    config.update([f"DATA.TRAIN={path}", "DATA.VAL=[]"])
    try:
        datasets, _ = train.load_datasets()
        records = train.training_records(datasets)
        check_sizes(records, max_dropped=config.DATA.MAX_DROPPED)
        batches = iter(data.training_data(config, records))
        taken = list(itertools.islice(batches, 2 * len(records)))
        batches.close()
    except UserError as error:
        return error.exit_code, str(error), []
    return 0, "", taken


@pytest.mark.parametrize("case", CASES)
def test_training(case, data_set, fresh_config):
    change, expected, rule = CASES[case]
    change(data_set)
    code, message, batches = train_on(fresh_config, data_set.write())
    assert code == expected, message
    assert all(np.isfinite(batch["gt_boxes"]).all() for batch in batches)
    if code:
        assert message.startswith(str(data_set.json)) or "images" in message
        assert len(message) < 1000
        # Which it is: the first annotation, the first image.
        if rule and rule[0].islower() and case not in ("category without name", "category id twice", "file name twice"):
            assert "1" in message.replace(str(data_set.json.parent), "")


def examine(data_set, *arguments, capsys):
    """(exit code, the --json report or what was said instead of it)."""
    data_set.write()
    arguments = [str(data_set.json), str(data_set.images), "--json", *map(str, arguments)]
    try:
        code = doctor.main(doctor.parse_arguments(arguments))
    except UserError as error:
        return 4, str(error)
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("case", CASES)
def test_doctor(case, data_set, fresh_config, capsys):
    change, exit_code, rule = CASES[case]
    change(data_set)
    code, report = examine(data_set, capsys=capsys)
    if rule and rule[0].isupper():
        assert code == 4 and rule.lower() in report.lower() and str(data_set.json) in report
        return
    # Where entries are missing, classes may be, too.
    found = {name: each for name, each in report["findings"].items() if name == rule or name != "unused class"}
    assert code == (4 if exit_code and rule else 0)
    assert (rule in found) if rule else not found
    # Nothing else is wrong, but for what follows from it.
    if case in (
        "category without name",
        "category id twice",
        "image id twice",
        "decompression bomb",
        "no object at all",
    ):
        return
    assert len(found) <= 1
    if rule and case != "one name twice":
        (first, *others) = found[rule]["list"]
        assert not others and found[rule]["count"] == 1
        assert first["annotation_id"] in (None, 1, 0) or case == "annotation without id"
        assert (
            first["annotation_id"] is not None or first["file_name"] or case in ("image without size", "unused class")
        )


@pytest.mark.parametrize("case", [case for case, (_, _, rule) in CASES.items() if not rule or rule[0].islower()])
def test_a_cleaned_copy_is_clean_and_keeps_the_rest(case, data_set, fresh_config, capsys):
    CASES[case][0](data_set)
    data_set.write()
    before = data_set.json.read_bytes()
    fixed = data_set.json.with_name("fixed.json")
    examine(data_set, "--fix", fixed, capsys=capsys)
    after = json.loads(fixed.read_text())
    assert data_set.json.read_bytes() == before
    data_set.json, data_set.content = fixed, after
    code, report = examine(data_set, capsys=capsys)
    assert code == 0, report["findings"]
    if case not in ("no object at all", "category without name", "category id twice", "annotation id twice"):
        good = {entry["id"] for entry in content()["annotations"]} - {0, 1, 2, 8}
        assert good <= {entry["id"] for entry in after["annotations"]}
        train_code, message, _ = train_on(fresh_config, f"{fixed}:{data_set.images}")
        assert train_code == 0, message


BOMB = """
import resource, sys
import psutil
from common.errors import ImageError
from dataset.images import image_size, load_image
load_image(sys.argv[1])
limit = psutil.Process().memory_info().vms + 10**8  # bytes; the decoded pixels need four times these 100 MB
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for read in (load_image, image_size):
    try:
        sys.exit(f"read {read(sys.argv[2])}")
    except ImageError as error:
        assert "20000 x 20000 pixels are more than the 100,000,000" in str(error), error
"""


def test_a_bomb_needs_no_memory(data_set):
    (data_set.images / "bomb.png").write_bytes(bomb())
    command = [sys.executable, "-c", BOMB, data_set.images / "1.jpg", data_set.images / "bomb.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What costs no detector anything. (A box that reaches outside costs every detector that stays inside.)
ACCEPTED = [case for case, (_, code, rule) in CASES.items() if code == 0 and rule not in ("clipped box", "vanishing")]


@pytest.mark.parametrize("case", ACCEPTED)
def test_the_ground_truth_found_is_perfect(case, data_set, fresh_config):
    """Whatever the file lacks or counts from: a detector that returns its objects has an AP of 1."""
    CASES[case][0](data_set)
    fresh_config.update([f"DATA.TRAIN={data_set.write()}", "DATA.VAL=[]"])
    ((dataset,), _) = train.load_datasets()
    results = []
    for record in dataset.records(training=False):
        masks = [segmentation_to_mask(s, record.height, record.width) for s in record.segmentations]
        scores = np.ones(len(record.labels), np.float32)
        found = ImageDetections(record.boxes_xyxy, scores, record.labels, np.array(masks, bool))
        results += coco_results(record.image_id, found, dataset.category_ids)
    for each in metrics.evaluate(dataset.annotation_file, results, image_ids=dataset.image_ids):
        assert each.metrics()[f"mAP({each.kind})/IoU=0.5:0.95"] == 1, case


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_coco_is_clean(split, coco_tiny, fresh_config, capsys):
    path, images = coco_tiny / "annotations" / f"instances_{split}.json", coco_tiny / split
    assert doctor.main(doctor.parse_arguments([str(path), str(images), "--json"])) == 0
    report = json.loads(capsys.readouterr().out)
    truth = json.loads(path.read_text())
    statistics = report["statistics"]
    assert statistics["objects"] + statistics["crowds"] == len(truth["annotations"])
    assert statistics["crowds"] == sum(entry["iscrowd"] for entry in truth["annotations"])
    for each in statistics["classes"]:
        of_class = [entry for entry in truth["annotations"] if entry["category_id"] == each["id"]]
        assert each["objects"] + each["crowds"] == len(of_class)
        assert each["images"] == len({entry["image_id"] for entry in of_class})


def test_report_for_people(data_set, fresh_config, capsys):
    for change in ("unknown category", "cut off JPEG", "half outside"):
        CASES[change][0](data_set)
    data_set.content["annotations"][1].update(bbox=[0, 0, 0, 0])
    data_set.content["annotations"][2].update(bbox=[-10, 10, 30, 20])
    data_set.write()
    assert doctor.main(doctor.parse_arguments([str(data_set.json), str(data_set.images)])) == 4
    text = capsys.readouterr().out
    for line in (
        "8 images (1 without objects), 7 objects, 0 crowd regions, 2 classes",
        "refused: 1 x category_id that no category has\n  annotation id 1 has an unknown category_id: 3 (in 1.jpg)",
        "left out of training: 1 x image that cannot be read\n  " + str(data_set.images / "1.jpg"),
        "left out of training: 1 x width or height 0\n  annotation id 2",
        "noted: 1 x box that reaches outside the image, clipped\n  annotation id 3",
        "3 errors",
    ):
        assert line in text
    assert "   1  a" in text and "   2  b" in text


def test_sizes_beside_the_anchors(data_set, fresh_config, capsys):
    """By hand: at a short edge of 80, twice the size, the objects of 20 x 20 are as large as the anchors of 40."""
    fresh_config.update(["PREPROC.TRAIN_SHORT_EDGE_SIZE=80", "RPN.ANCHOR_SIZES=[10,40,160]"])
    data_set.content["annotations"][0].update(bbox=[0, 0, 60, 5])
    _, report = examine(data_set, capsys=capsys)
    training = report["statistics"]["training"]
    assert (training["short_edge"], training["sqrt_area"]["p50"]) == (80, 40)
    # 120 x 10 overlaps the anchors of 40 best, 56.6 x 28.3: by 566 / (1200 + 1600 - 566).
    assert training["objects_by_anchor_size"] == {"10": 0, "40": 8, "160": 0}
    assert training["share_with_few_anchors"] == 1 / 8
    assert [each["objects"] for each in report["statistics"]["classes"]] == [4, 4]


def test_classes_are_compared(data_set, fresh_config, capsys):
    other = data_set.json.with_name("other.json")
    for names, code, said in ((("a", "b"), 0, None), (("b", "a"), 4, "another order"), (("a", "c"), 4, "b missing; c")):
        categories = [{"id": number, "name": name} for number, name in enumerate(names)]
        other.write_text(json.dumps({**content(), "categories": categories}))
        found, report = examine(data_set, "--other", other, capsys=capsys)
        assert found == code
        assert report["difference"] is None if said is None else said in report["difference"]


def test_a_data_set_of_boxes_is_clean(data_set, fresh_config, capsys):
    with_all_annotations(segmentation=None)(data_set)
    data_set.write()
    assert doctor.main(doctor.parse_arguments([str(data_set.json), str(data_set.images)])) == 0
    assert "train with MODE_MASK=False" in capsys.readouterr().out


def test_some_without_masks_do_not_matter_to_a_training_without(data_set, fresh_config, capsys):
    fresh_config.update(["MODE_MASK=False"])
    data_set.content["annotations"][0].update(segmentation=[])
    data_set.content["annotations"][1].update(segmentation=None)
    assert examine(data_set, capsys=capsys)[0] == 0


def test_thumbnails(data_set, fresh_config, capsys):
    CASES["cut off JPEG"][0](data_set)
    data_set.content["annotations"][1]["bbox"][2] = 0
    data_set.content["categories"][0]["name"] = "<a & b>"
    data_set.content["images"][3]["file_name"] = "<4>.jpg"
    (data_set.images / "4.jpg").rename(data_set.images / "<4>.jpg")
    pages = data_set.json.with_name("pages")
    examine(data_set, "--show", pages, capsys=capsys)
    page = (pages / "index.html").read_text()
    # The images with findings come first; one cannot be drawn.
    assert page.index("1.jpg: 1 object") < page.index("2.jpg: 1 object") < page.index("3.jpg: 1 object")
    assert sorted(path.name for path in pages.glob("*.jpg")) == [f"{n:03d}.jpg" for n in range(2, 9)]
    assert "&lt;4&gt;.jpg" in page and "<4>" not in page
    assert "the image is cut off" in page and "width or height 0" in page
    drawn = cv2.imread(str(pages / "003.jpg"))
    assert max(drawn.shape) <= doctor.THUMBNAIL_EDGE


def test_nothing_is_overwritten(data_set, fresh_config, capsys):
    data_set.write()
    (data_set.json.parent / "pages").mkdir()
    (data_set.json.parent / "pages" / "index.html").write_text("mine")
    for flag, path in (("--fix", data_set.json), ("--show", data_set.json.parent / "pages")):
        with pytest.raises(UserError, match="exists already") as error:
            doctor.main(doctor.parse_arguments([str(data_set.json), str(data_set.images), flag, str(path)]))
        assert error.value.exit_code == 2
    assert (data_set.json.parent / "pages" / "index.html").read_text() == "mine"


@pytest.mark.slow
def test_command_line(data_set):
    def run(*arguments):
        command = [sys.executable, "-m", "tools.doctor", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    data_set.write()
    clean = run(data_set.json, data_set.images)
    assert (clean.returncode, clean.stdout.splitlines()[-1]) == (0, "clean")
    assert "images: 100%" in clean.stderr
    CASES["cut off JPEG"][0](data_set)
    assert run(data_set.json, data_set.images, "--no-decode").returncode == 0, "the header is whole"
    broken = run(data_set.json, data_set.images, "--json")
    assert broken.returncode == 4 and json.loads(broken.stdout)["errors"] == 1
    assert run(data_set.json, "nowhere").returncode == 2
    data_set.json.write_text("[]")
    for command in ([data_set.json, data_set.images], ["--help"]):
        assert "Traceback" not in run(*command).stderr
    assert run(data_set.json, data_set.images).returncode == 4
