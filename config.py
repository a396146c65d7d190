"""The configuration: every setting with its default; how settings are read, checked, saved and frozen.

    from config import config
    config.update(["MODE_FPN=True", "TRAIN.BASE_LR=0.02"])    the words after --config on the command line
    config.update(["@recipes/r50_fpn_mask_1x.cfg"])           settings of a file; later words and files take precedence
    config.check()                                            rejects invalid settings before anything is built
    config.freeze()                                           makes it read-only: config.TRAIN.BASE_LR

Keys, defaults and meanings are those of the published recipes, so recipes can be pasted. A value is a Python literal of
the default's type (text needs no quotes); no expression is ever evaluated. Lists are stored as tuples.
"""

import ast
import difflib
import json
import logging
import math
import os
import re
import reprlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

VERSION = "1.0.0"  # of the project; CHANGELOG.md lists the changes of each version
PROJECT_DIR = os.path.dirname(os.path.abspath(__file__))

logger = logging.getLogger(__name__)

FPN_MULTIPLE = 32  # FPN pads images to multiples of the stride of its coarsest backbone map; C4 does not pad


class UserError(Exception):
    """Base of the errors that the user can correct: programs print the message and exit with `exit_code`."""

    exit_code = 2


class ConfigError(UserError):
    """Settings that are unknown, of the wrong type, out of range or contradictory; one line for each."""


# Units: lengths are pixels of the resized image; IoU, ratios and scores lie in 0..1. A step is one run of the graph;
# an update of the weights takes one step or, with gradient accumulation, several.
DEFAULTS = dict(
    TRAINER="replicated",  # "replicated": all GPUs of one machine; "horovod": one process per GPU, on any machines
    PLUGINS=[],  # modules given to --plugins, recorded by the run
    MODE_MASK=True,  # Mask R-CNN: predict a mask for each box
    CONVENTIONS="tensorpack",  # or torchvision, detectron2: framework-specific details that converted weights depend on
    MODE_FPN=False,  # feature pyramid (strides 4 to 64) instead of C4's one map of stride 16
    DATA=dict(
        BASEDIR="/path/to/your/DATA/DIR",  # folder with `annotations` and the image folders
        TRAIN=["coco_train2017"],  # data sets, combined: names (see dataset/) or ANNOTATIONS.json:IMAGE_DIR
        VAL=["coco_val2017"],  # data sets, evaluated one by one
        NUM_CATEGORY=-1,  # classes without background; filled in from the training data
        CLASS_NAMES=[],  # "BG" (background) and the names of the classes; filled in from the training data
        CATEGORY_IDS=[],  # ids of the classes in the annotations; filled in from the training data
        ABSOLUTE_COORD=True,  # annotated boxes are in pixels; False is not supported
        FILTER_EMPTY_ANNOTATIONS=True,  # leave images without objects out of training
        MAX_DROPPED=0.01,  # largest share of unusable objects, or unreadable images, to leave out; more end the run
        REPEAT_THRESHOLD=0.0,  # repeat images of classes that occur in a smaller share of images; LVIS: 0.001
        NUM_WORKERS=10,  # processes that prepare images; 0: in the main process
    ),
    BACKBONE=dict(
        WEIGHTS="",  # file of ImageNet weights to start from; empty: random weights
        NAME="resnet",  # resnet (50, 101, 152), resnet_basic (18, 34), resnext_32x4d, _32x8d, _64x4d, or convnext
        RESNET_NUM_BLOCKS=[3, 4, 6, 3],  # blocks of each stage: ResNet-50; [3,4,23,3] is ResNet-101
        WIDTH=64,  # channels of the stem; stages are 4, 8, 16, 32 times as wide. Published ResNets have 64
        NORM="FreezeBN",  # FreezeBN (stored statistics), SyncBN (statistics over all devices' batches), GN or None
        NORM_EPSILON=1e-5,  # added to a variance; torchvision's published detectors have 0
        FREEZE_AFFINE=False,  # FreezeBN: also freeze scale and shift of every norm
        FREEZE_AT=2,  # 0 trains the whole backbone, 1 freezes the stem, 2 also the first stage, ... 5 all
        TF_PAD_MODE=False,  # pad as TensorFlow does, at the bottom and right, for weights trained that way
        STRIDE_1X1=False,  # stride on a block's first 1x1 convolution (MSRA's ResNets) instead of the 3x3
    ),
    TRAIN=dict(
        NUM_GPUS=None,  # towers on this machine; None: one for each visible GPU, or one on the CPU
        BATCH_SIZE_PER_GPU=1,  # images
        PRECISION="float32",  # of the network: float32, bfloat16 or, on GPUs without that, float16 with loss scaling;
        # variables stay float32
        SEED=0,  # of weights, data order and samples
        OPTIMIZER="momentum",  # or adamw; plugins register others
        MOMENTUM=0.9,  # of the optimizer momentum
        ADAM_BETAS=[0.9, 0.999],  # forgetting of adamw's means of gradients and of their squares
        LOGGERS=["tensorboard"],  # destinations of a run's metrics, beside stats.json and the log; plugins add others
        WEIGHT_DECAY=1e-4,  # of convolution and fully connected kernels
        BACKBONE_RATE_DECAY=1.0,  # factor of the backbone's learning rate for each group of layers below the heads
        CLIP_NORM=0.0,  # shorten gradients to this global norm; 0: never
        EMA_DECAY=0.0,  # average the weights over updates with this forgetting, and evaluate the averages; 0: don't
        BASE_LR=0.01,  # learning rate at a total batch of 8 images; proportional to the total batch
        WARMUP=1000,  # first steps, with a linearly rising learning rate; independent of the batch
        WARMUP_INIT_LR=1e-5,  # learning rate at the start of the warm-up; independent of the batch
        WARMUP_FACTOR=0.0,  # above 0: share of the learning rate at the start of the warm-up, in its place
        STEPS_PER_EPOCH=500,  # an epoch is a unit of reporting, not a pass over the data
        STARTING_EPOCH=1,  # number of the first epoch; only 1 is supported, --resume continues a run
        LR_SCHEDULE="1x",  # "1x" to "9x", or a list of steps at a total batch of 8: rate / 10 at each, end at the last
        LR_POLICY="steps",  # after the warm-up: steps (a tenth at each), linear or cosine (down to 0 at the end)
        EPOCHS=0.0,  # above 0: length of the training in passes over the data, in place of LR_SCHEDULE
        DECAY_AT=[],  # with EPOCHS: shares of the length at which the learning rate falls to a tenth
        EVAL_PERIOD=50,  # epochs between evaluations of DATA.VAL; 0: only after the last epoch
        EVAL_PICTURES=0,  # images per data set that an evaluation draws beside their ground truth in TensorBoard
        CHECKPOINT_PERIOD=20,  # epochs between checkpoints
        STALL_TIMEOUT=600.0,  # seconds without a step after which a run ends; 20 median steps if that is longer
    ),
    PREPROC=dict(
        TRAIN_SHORT_EDGE_SIZE=[800, 800],  # one size; or [low, high], drawn evenly; or three or more choices
        TRAIN_CROP_SIZE=0,  # above 0: resize long edges to this times TRAIN_CROP_SCALE, crop squares of this size
        TRAIN_CROP_SCALE=[0.1, 2.0],  # lowest and highest factor (large-scale jitter)
        TRAIN_PAD=False,  # pad what is cropped to squares of TRAIN_CROP_SIZE, so that all batches have one shape
        COLOR_JITTER=[0.0, 0.0, 0.0],  # brightness, contrast, saturation: factors from 1 - x to 1 + x
        TRANSFORMS=[],  # names of transforms that plugins register, applied to training examples in this order
        TEST_SHORT_EDGE_SIZE=800,  # images are resized to this length of the short edge ...
        MAX_SIZE=1333,  # ... or less, if the long edge would exceed this; FPN: rounded up to a multiple of 32
        ANTIALIAS=False,  # shrink images with antialiasing, as Detectron2 does; converted weights set it
        PIXEL_MEAN=[123.675, 116.28, 103.53],  # subtracted; red, green, blue on a scale of 0..255
        PIXEL_STD=[58.395, 57.12, 57.375],  # divided by
    ),
    RPN=dict(
        ANCHOR_STRIDE=16,  # of C4's only map
        ANCHOR_SIZES=[32, 64, 128, 256, 512],  # square root of an anchor's area; FPN: one size for each level
        ANCHOR_RATIOS=[0.5, 1.0, 2.0],  # height / width
        POSITIVE_ANCHOR_THRESH=0.7,  # IoU with an object at or above which an anchor is foreground
        NEGATIVE_ANCHOR_THRESH=0.3,  # IoU with all objects below which it is background
        FG_RATIO=0.5,  # largest share of foreground among the sampled anchors
        BATCH_PER_IM=256,  # anchors sampled per image
        MIN_SIZE=0,  # proposals need width and height above this; 0 keeps all
        PROPOSAL_NMS_THRESH=0.7,  # IoU above which NMS removes the lower-scoring of two proposals
        CROWD_OVERLAP_THRESH=9.99,  # ignore anchors with a larger share in a crowd region; 1 and above: none
        HEAD_DIM=1024,  # channels of C4's RPN head
        NUM_CONVS=1,  # 3x3 convolutions of the RPN head
        TRAIN_PRE_NMS_TOPK=12000,  # proposals per image before and after NMS: C4, and FPN's mode Joint
        TRAIN_POST_NMS_TOPK=2000,
        TEST_PRE_NMS_TOPK=6000,
        TEST_POST_NMS_TOPK=1000,
        TRAIN_PER_LEVEL_NMS_TOPK=2000,  # FPN's mode Level: per level before and after NMS, and for all levels
        TEST_PER_LEVEL_NMS_TOPK=1000,
    ),
    FRCNN=dict(
        BATCH_PER_IM=512,  # proposals and ground truth boxes sampled per image
        BBOX_REG_WEIGHTS=[10.0, 10.0, 5.0, 5.0],  # factors of the box targets x, y, log w, log h
        FG_THRESH=0.5,  # IoU with an object at or above which a proposal is foreground, else background
        FG_RATIO=0.25,  # largest share of foreground among the sampled proposals
        BOX_LOSS_WEIGHT=1.0,  # factor of that loss
        BOX_LOSS="l1",  # of the foreground's box regression, or giou; plugins register others
    ),
    FPN=dict(
        ANCHOR_STRIDES=[4, 8, 16, 32, 64],  # of the levels p2 to p6
        PROPOSAL_MODE="Level",  # NMS per level; or Joint: over all levels together
        NUM_CHANNEL=256,  # channels of every level
        NORM="None",  # None, GN, SyncBN or FreezeBN; heads ..._bn_head have this batch norm, SyncBN without one
        FRCNN_HEAD_FUNC="fastrcnn_2fc_head",  # or fastrcnn_4conv1fc_head, fastrcnn_4conv1fc_gn_head, ..._bn_head
        FRCNN_CONV_HEAD_DIM=256,  # channels of the box head's convolutions
        FRCNN_FC_HEAD_DIM=1024,  # channels of its fully connected layers
        MRCNN_HEAD_FUNC="maskrcnn_up4conv_head",  # or maskrcnn_up4conv_gn_head, maskrcnn_up4conv_bn_head
        CASCADE=False,  # Cascade R-CNN: three box heads, each refining the boxes of the previous one
    ),
    MRCNN=dict(
        HEAD_DIM=256,  # channels of the mask head
        ACCURATE_PASTE=True,  # no effect, masks are always pasted accurately; accepted for published recipes
    ),
    CASCADE=dict(
        IOUS=[0.5, 0.6, 0.7],  # of each box head, in place of FRCNN.FG_THRESH
        BBOX_REG_WEIGHTS=[[10.0, 10.0, 5.0, 5.0], [20.0, 20.0, 10.0, 10.0], [30.0, 30.0, 15.0, 15.0]],
    ),
    TEST=dict(
        BATCH_SIZE_PER_GPU=1,  # images
        PRECISION="float32",  # float32, bfloat16 or float16
        FRCNN_NMS_THRESH=0.5,  # IoU above which NMS removes the lower-scoring of two detections of one class
        SOFT_NMS="None",  # "linear" or "gaussian": lower the score of overlapping detections instead of removing them
        SOFT_NMS_SIGMA=0.5,  # gaussian: IoU^2 at which the score falls to 1 / e
        TTA_FLIP=False,  # test-time augmentation: also detect in the mirrored image, and merge the detections
        TTA_SCALES=[1.0],  # ... and at these multiples of the test size
        RESULT_SCORE_THRESH=0.05,  # detections need a score above this
        RESULT_SCORE_THRESH_VIS=0.5,  # the same, in pictures
        RESULTS_PER_IM=100,  # largest number of detections per image
        METRICS=[],  # names of metrics that plugins register, computed beside COCO's
    ),
)

# Keys that accept other types than their default's: an example of each, tried in this order.
TYPES = {
    "DATA.TRAIN": ([""], ""),  # a single name becomes a list
    "DATA.VAL": ([""], ""),
    "DATA.CLASS_NAMES": ([""],),
    "DATA.CATEGORY_IDS": ([0],),
    "PREPROC.TRANSFORMS": ([""],),
    "TRAIN.LOGGERS": ([""],),
    "TEST.METRICS": ([""],),
    "PLUGINS": ([""],),
    "TRAIN.NUM_GPUS": (None, 0),
    "TRAIN.DECAY_AT": ([0.0],),
    "TRAIN.LR_SCHEDULE": ([0], ""),
    "PREPROC.TRAIN_SHORT_EDGE_SIZE": (0, [0]),
    "PREPROC.MAX_SIZE": (0, 0.0),
    "RPN.ANCHOR_SIZES": ([0], [0.0]),
    "RPN.MIN_SIZE": (0, 0.0),
}


# Settings that silently change what a checkpoint computes: fine-tuning always takes them from the checkpoint's run.
OF_WEIGHTS = (
    "CONVENTIONS",
    "BACKBONE.NORM_EPSILON",
    "BACKBONE.STRIDE_1X1",
    "BACKBONE.TF_PAD_MODE",
    "PREPROC.PIXEL_MEAN",
    "PREPROC.PIXEL_STD",
    "PREPROC.ANTIALIAS",
    "RPN.ANCHOR_SIZES",
    "RPN.ANCHOR_RATIOS",
    "FRCNN.BBOX_REG_WEIGHTS",
    "CASCADE.BBOX_REG_WEIGHTS",
)
# Keys, and prefixes of keys, that a user may set to other values than converted weights require.
ADAPTABLE = (
    *("MODE_MASK", "DATA.", "TEST.", "TRAIN.", "RPN.ANCHOR_SIZES", "RPN.ANCHOR_RATIOS"),
    *("PREPROC.TRAIN_", "PREPROC.TEST_", "PREPROC.MAX_SIZE"),
)


def as_overrides(settings: Mapping[str, Any]) -> str:
    """Formats {key: value} as text that can be pasted after --config."""
    return " ".join(
        f"{key}={shlex.quote(value if isinstance(value, str) else _literal(value))}" for key, value in settings.items()
    )


def _literal(value):
    """Formats a value as a Python literal without spaces; tuples become lists."""
    return f"[{','.join(map(_literal, value))}]" if isinstance(value, list | tuple) else repr(value)


class _Group:
    """The keys below a prefix, as attributes. The Config stores all values in one flat dict."""

    def __init__(self, root, prefix):
        vars(self).update(_root=root, _prefix=prefix)

    def __getattr__(self, name):
        if name.startswith("_"):  # copy and pickle look up such names
            raise AttributeError(name)
        key = self._prefix + name
        if key in GROUPS:
            return _Group(self._root, key + ".")
        if key in FLAT_DEFAULTS:
            return self._root._values[key]
        raise AttributeError(_unknown(key))

    def __setattr__(self, name, value):
        self._root._set(_from_value, [(self._prefix + name, value)])

    def __delattr__(self, name):
        raise ConfigError(f"{self._prefix + name}: keys cannot be deleted")

    def __str__(self):
        """Returns a line `KEY = value` for each key; a line can be pasted after --config, in quotes."""
        return "\n".join(f"{k} = {v!r}" for k, v in self._root._values.items() if k.startswith(self._prefix))


class Config(_Group):
    """All keys, initially with their defaults. Keys are set by attribute, `update` and `load`, by the same rules."""

    def __init__(self):
        super().__init__(self, "")
        vars(self).update(_values=dict(FLAT_DEFAULTS), _given=set(), _frozen=False)

    def _set(self, read, items, source=""):
        """Sets the (key, value) that `read` returns for each item: all of them, or none.

        Returns:
            list of the keys
        Raises:
            ConfigError: a line for each item that cannot be set; each line starts with `source`.
        """
        if self._frozen:
            raise ConfigError("the configuration is frozen: it cannot change any more")
        values, problems = [], []
        for item in items:
            try:
                values.append(read(item))
            except ConfigError as error:
                problems.append(f"{source}{error}")
        if problems:
            raise ConfigError("\n".join(problems))
        self._values.update(values)
        return [key for key, _ in values]

    def update(self, overrides: Iterable[str]) -> None:
        """Sets keys from texts "KEY=VALUE" and "@FILE": all of them, or none. Later texts take precedence.

        FILE contains settings KEY=VALUE, quoted as in a shell, and comments that start with #. If FILE does not exist
        relative to the current directory, the project's folder is searched.

        Raises:
            ConfigError: a line for each text that cannot be used.
        """
        self._given.update(self._set(_from_word, _words(overrides)))

    def load(self, path: str | os.PathLike) -> None:
        """Sets the keys in a file written from `to_json`; other keys keep their values.

        Raises:
            ConfigError: the file cannot be read, or contains a key or value that cannot be used.
        """
        try:
            with open(path, encoding="utf-8") as file:
                tree = json.load(file)
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is damaged or not a configuration: {error}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} is not a configuration: expected a JSON object of keys")
        self.set_tree(tree, source=f"{path}: ")

    def set_tree(self, tree: Mapping[str, Any], source: str = "") -> None:
        """Sets the keys of a tree of dicts in the form of `to_dict`; `source` starts the lines of a ConfigError.

        Raises:
            ConfigError: a line for each key that cannot be set.
        """
        self._given.update(self._set(_from_value, _flatten(tree), source))

    def adopt(self, settings: Mapping[str, Any], *, source: str | os.PathLike) -> None:
        """Sets the keys {key: value} that the weights in the file `source` require.

        A key that `update` or `load` has set keeps its value. The value must be the required one, unless the key is in
        ADAPTABLE.

        Raises:
            ConfigError: a key was set to another value.
        """
        needed = Config()
        needed._set(_from_value, settings.items(), source=f"{source}: ")
        differing = [
            key
            for key in settings
            if key in self._given and not self.fits(key, needed._values[key]) and not key.startswith(ADAPTABLE)
        ]
        if differing:
            given = as_overrides({key: self._values[key] for key in differing})
            required = as_overrides({key: needed._values[key] for key in differing})
            raise ConfigError(f"{source} requires {required}, but --config sets {given}")
        self._set(_from_value, [(key, value) for key, value in settings.items() if key not in self._given])

    def fits(self, key: str, value: Any) -> bool:
        """Whether weights that require `value` of a key can be used with its value here: both are equal, or both are
        batch norm, frozen or not.
        """
        values = self.value(key), _convert(key, value, reprlib.repr(value))
        return values[0] == values[1] or (
            key in ("BACKBONE.NORM", "FPN.NORM") and set(values) == {"FreezeBN", "SyncBN"}
        )

    def check(self) -> None:
        """Verifies all settings; logs a warning for each setting without effect.

        Raises:
            ConfigError: a line for each setting that is invalid or contradicts another.
        """
        problems = [*_out_of_range(self), *_contradictions(self)]
        if problems:
            raise ConfigError("\n".join(problems))
        for line in _without_effect(self):
            logger.warning(line)

    def freeze(self) -> None:
        """Makes the configuration read-only: setting a key raises ConfigError."""
        vars(self)["_frozen"] = True

    def changes(self) -> dict[str, Any]:
        """Returns {key: value} of the keys that differ from their defaults."""
        return {key: value for key, value in self._values.items() if value != FLAT_DEFAULTS[key]}

    def value(self, key: str) -> Any:
        """Returns the value of a key "GROUP.NAME".

        Raises:
            ConfigError: the key does not exist.
        """
        _types(key)
        return self._values[key]

    def to_json(self) -> str:
        """Formats all keys as a JSON object, for `load`."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Returns all keys as a new tree of dicts, in the form of DEFAULTS."""
        tree = {}
        for key, value in self._values.items():
            group, _, name = key.rpartition(".")
            (tree.setdefault(group, {}) if group else tree)[name] = value
        return tree


# ------------------------------------------------------------------------------------------------------- reading values

GROUPS = [name for name, value in DEFAULTS.items() if isinstance(value, dict)]


def _flatten(tree):
    """Yields ("GROUP.NAME" or "NAME", value) for a tree of dicts in the form of DEFAULTS."""
    for name, value in tree.items():
        if name in GROUPS and isinstance(value, dict):
            yield from ((f"{name}.{leaf}", x) for leaf, x in value.items())
        else:
            yield name, value


def _as(value, example):
    """Converts `value` to the type of `example`: numbers stay exact, lists become tuples, and so do texts for lists.

    Raises:
        ValueError: it does not fit, or is not finite. OverflowError: an integer exceeds all floats.
    """
    if isinstance(example, (list, tuple)):
        items = [value] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)):
            return tuple(_as(item, example[0]) for item in items)
    elif type(value) in (int, float) and type(example) in (int, float):
        if math.isfinite(value) and type(example)(value) == value:
            return type(example)(value)
    elif type(value) is type(example):
        return value
    raise ValueError


FLAT_DEFAULTS = {key: _as(value, value) for key, value in _flatten(DEFAULTS)}


def _types(key):
    """Returns an example for each type that a key accepts; raises ConfigError if there is no such key."""
    if key in GROUPS:
        first = next(x for x in FLAT_DEFAULTS if x.startswith(key + "."))
        raise ConfigError(f"{key} is a group and cannot be set: set its keys, such as {first}")
    if key not in FLAT_DEFAULTS:
        raise ConfigError(_unknown(key))
    return TYPES.get(key, (FLAT_DEFAULTS[key],))


def _unknown(key):
    """Returns the message for a key that does not exist, with keys of similar spelling in any group."""
    key = _shorten(key)
    name = key.upper()

    def similarity(known):
        pairs = (name, known), (name.rpartition(".")[2], known.rpartition(".")[2])
        return sorted((difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs), reverse=True)

    ranked = sorted(((similarity(known), known) for known in FLAT_DEFAULTS), reverse=True)[:3]
    near = [known for (best, _), known in ranked if best >= max(0.6, ranked[0][0][0] - 0.1)]
    return f"unknown key {key}: " + (f"did you mean {' or '.join(near)}?" if near else "config.py lists all keys")


def _convert(key, value, shown):
    """Converts `value` to the first type of the key that it fits; raises ConfigError if there is none."""
    for example in _types(key):
        try:
            return _as(value, example)
        except (ValueError, OverflowError):
            pass
    expected = " or ".join(map(_describe, _types(key)))
    raise ConfigError(f"{key}={_shorten(shown)}: expected {expected}")


def _describe(example):
    if isinstance(example, (list, tuple)):
        return f"list of {_describe(example[0])}"
    return {bool: "True or False", int: "integer", float: "finite number", str: "text"}.get(type(example), "None")


def _shorten(text):
    """Formats `text` on one line of at most 80 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


def _from_value(item):
    key, value = item
    return key, _convert(key, value, reprlib.repr(value))


def _words(overrides):
    """Yields (source, text) for each override; "@FILE" yields those of the file, `source` naming file and line."""
    for text in overrides:
        if text.startswith("@"):
            yield from _words_of_file(_find_file(text[1:]))
        else:
            yield "", text


def _find_file(path):
    """Returns `path` relative to the current directory or, if there is no such file, to the project's folder."""
    for candidate in (path, os.path.join(PROJECT_DIR, path)):
        if path and os.path.exists(candidate):
            return candidate
    raise ConfigError(f"@{path}: there is no such file here or in {PROJECT_DIR}")


def _words_of_file(path):
    """Yields (source, text) for each setting in a file of settings."""
    for number, line in enumerate(_read_lines(path), start=1):
        source = f"{path}:{number}: "
        if _WORD.sub("", line).strip():
            raise ConfigError(f"{source}unbalanced quotation mark, or backslash at the end of the line")
        yield from ((source, text) for text in _split(line))


def _read_lines(path):
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"cannot read the settings in {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ConfigError(f"{path} is not a file of settings: it is not text")
    return text.split("\n")


# A comment, or a word: quoted text, escaped characters, and other characters except blanks.
_WORD = re.compile(r"""#.*|(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\])+""")


def _split(line):
    """Splits a line into settings and unquotes them as a shell does, but keeps the quotes in a list, ['a','b']."""
    words = [word for word in _WORD.findall(line) if not word.startswith("#")]
    return [word if re.match(r"[\w.]+=[\[(]", word) else shlex.split(word)[0] for word in words]


def _from_word(word):
    """Returns (key, value) of a word of `_words`."""
    source, text = word
    try:
        if source and text.startswith("@"):
            raise ConfigError(f"{_shorten(text)}: a file of settings cannot include another")
        return _from_text(text)
    except ConfigError as error:
        raise ConfigError(f"{source}{error}") from error


def _from_text(text):
    """Returns (key, value) of "KEY=VALUE".

    Keys of text take the text unchanged, with optional quotes; keys of lists of text also take [a,b].
    """
    key, equals, text = (part.strip() for part in text.partition("="))
    if not equals:
        raise ConfigError(f"{_shorten(key)}: expected KEY=VALUE")
    types = {type(example) for example in _types(key)}
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    if str in types and not isinstance(value, (str, list, tuple) if list in types else str):
        value = text
    if value is text and text[:1] + text[-1:] == "[]" and any(example == [""] for example in _types(key)):
        value = [name.strip() for name in text[1:-1].split(",")]
    if key == "PLUGINS" and value:
        raise ConfigError("PLUGINS records the option --plugins: use that option instead")
    return key, _convert(key, value, text)


# --------------------------------------------------------------------------------------------------------------- checks

# Names that are registered (backbones, heads, losses, ...) are checked where the model is wired: modeling/rcnn.py.
CHOICES = {
    "TRAINER": ("replicated", "horovod"),
    "DATA.ABSOLUTE_COORD": (True,),
    "BACKBONE.NORM": ("FreezeBN", "SyncBN", "GN", "None"),
    "BACKBONE.FREEZE_AT": (0, 1, 2, 3, 4, 5),
    "TRAIN.STARTING_EPOCH": (1,),  # --resume continues a run
    "TRAIN.PRECISION": ("float32", "bfloat16", "float16"),
    "TEST.PRECISION": ("float32", "bfloat16", "float16"),
    "TEST.SOFT_NMS": ("None", "linear", "gaussian"),
    "TRAIN.LR_POLICY": ("steps", "linear", "cosine"),
    "FPN.PROPOSAL_MODE": ("Level", "Joint"),
    "FPN.NORM": ("None", "GN", "SyncBN", "FreezeBN"),
}

LENGTHS = {
    "BACKBONE.RESNET_NUM_BLOCKS": 4,
    "PREPROC.PIXEL_MEAN": 3,
    "PREPROC.PIXEL_STD": 3,
    "PREPROC.TRAIN_CROP_SCALE": 2,
    "PREPROC.COLOR_JITTER": 3,
    "TRAIN.ADAM_BETAS": 2,
    "FRCNN.BBOX_REG_WEIGHTS": 4,
    "CASCADE.IOUS": 3,
    "CASCADE.BBOX_REG_WEIGHTS": 3,
}

# Requirement on each number of a key, its test, the keys. The last row is for all other keys; int32 ends at 2**31.
RANGES = (
    (
        "from 0 to 1",
        lambda x: 0 <= x <= 1,
        """DATA.MAX_DROPPED DATA.REPEAT_THRESHOLD PREPROC.COLOR_JITTER RPN.POSITIVE_ANCHOR_THRESH
        RPN.NEGATIVE_ANCHOR_THRESH RPN.FG_RATIO RPN.PROPOSAL_NMS_THRESH FRCNN.FG_THRESH FRCNN.FG_RATIO CASCADE.IOUS
        TEST.FRCNN_NMS_THRESH TEST.RESULT_SCORE_THRESH TEST.RESULT_SCORE_THRESH_VIS""",
    ),
    (
        "from 0 to below 1",
        lambda x: 0 <= x < 1,
        "TRAIN.MOMENTUM TRAIN.ADAM_BETAS TRAIN.EMA_DECAY TRAIN.WARMUP_FACTOR",
    ),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, "TRAIN.BACKBONE_RATE_DECAY TRAIN.DECAY_AT"),
    (
        "0 or more",
        lambda x: 0 <= x < 2**31,
        """DATA.NUM_WORKERS TRAIN.SEED TRAIN.WEIGHT_DECAY TRAIN.WARMUP TRAIN.EVAL_PERIOD TRAIN.EVAL_PICTURES
        TRAIN.WARMUP_INIT_LR TRAIN.CLIP_NORM TRAIN.EPOCHS RPN.MIN_SIZE RPN.CROWD_OVERLAP_THRESH
        BACKBONE.NORM_EPSILON""",
    ),
    ("whole numbers", lambda x: True, "DATA.CATEGORY_IDS"),
    ("0 (no crop), or at least 32", lambda x: x == 0 or 32 <= x < 2**15, "PREPROC.TRAIN_CROP_SIZE"),
    ("from 0 to 255", lambda x: 0 <= x <= 255, "PREPROC.PIXEL_MEAN"),
    ("-1 (not known yet) or above 0", lambda x: x == -1 or 0 < x < 2**31, "DATA.NUM_CATEGORY"),
    ("at least 16 and below 2**31", lambda x: 16 <= x < 2**31, "PREPROC.MAX_SIZE"),
    ("above 0 and below 2**31", lambda x: 0 < x < 2**31, ""),
)

# Settings, and the keys (or groups) without effect under them: changing those causes a warning.
UNUSED = (
    ("MODE_FPN=False", "FPN. RPN.TRAIN_PER_LEVEL_NMS_TOPK RPN.TEST_PER_LEVEL_NMS_TOPK"),
    ("MODE_FPN=True", "RPN.ANCHOR_STRIDE RPN.HEAD_DIM"),
    (
        "MODE_FPN=True FPN.PROPOSAL_MODE=Level",
        "RPN.TRAIN_PRE_NMS_TOPK RPN.TRAIN_POST_NMS_TOPK RPN.TEST_PRE_NMS_TOPK RPN.TEST_POST_NMS_TOPK",
    ),
    ("FPN.PROPOSAL_MODE=Joint", "RPN.TRAIN_PER_LEVEL_NMS_TOPK RPN.TEST_PER_LEVEL_NMS_TOPK"),
    ("TEST.SOFT_NMS=None", "TEST.SOFT_NMS_SIGMA"),
    ("TEST.SOFT_NMS=linear", "TEST.SOFT_NMS_SIGMA"),
    ("TEST.SOFT_NMS=gaussian", "TEST.FRCNN_NMS_THRESH"),
    ("FPN.CASCADE=False", "CASCADE."),
    ("FPN.CASCADE=True", "FRCNN.BBOX_REG_WEIGHTS"),
    ("MODE_MASK=False", "MRCNN. FPN.MRCNN_HEAD_FUNC"),
    ("PREPROC.TRAIN_CROP_SIZE=0", "PREPROC.TRAIN_CROP_SCALE PREPROC.TRAIN_PAD"),
    ("PREPROC.TRAIN_CROP_SIZE>0", "PREPROC.TRAIN_SHORT_EDGE_SIZE"),
    ("BACKBONE.NAME=resnet_basic", "BACKBONE.STRIDE_1X1"),
    ("BACKBONE.NAME=convnext", "BACKBONE.NORM BACKBONE.FREEZE_AFFINE BACKBONE.STRIDE_1X1 BACKBONE.TF_PAD_MODE"),
    ("TRAIN.EPOCHS=0.0", "TRAIN.DECAY_AT"),
    ("TRAIN.EPOCHS>0", "TRAIN.LR_SCHEDULE"),
    ("TRAIN.LR_POLICY=linear", "TRAIN.DECAY_AT"),
    ("TRAIN.LR_POLICY=cosine", "TRAIN.DECAY_AT"),
    ("TRAIN.WARMUP_FACTOR>0", "TRAIN.WARMUP_INIT_LR"),
    ("TRAIN.OPTIMIZER=momentum", "TRAIN.ADAM_BETAS"),
    ("TRAIN.OPTIMIZER=adamw", "TRAIN.MOMENTUM"),
)


def _out_of_range(c):
    """Yields a line for each key of Config `c` whose value is invalid by itself."""
    for key, value in c._values.items():
        requirement, test, _ = next(row for row in RANGES if key in row[2].split() or not row[2])
        fits = _all(test, value)
        if key in CHOICES:
            requirement, fits = "one of " + ", ".join(map(str, CHOICES[key])), value in CHOICES[key]
        elif key in LENGTHS and len(value) != LENGTHS[key]:
            requirement, fits = f"a list of {LENGTHS[key]}", False
        if not fits:
            yield f"{key}={value}: must be {requirement}"


def _all(test, value):
    """Returns whether all numbers of a value pass the test."""
    if isinstance(value, tuple):
        return all(_all(test, item) for item in value)
    return type(value) not in (int, float) or test(value)


def uses_augmentation(c: Config) -> bool:
    """Returns whether test-time augmentation is configured."""
    return c.TEST.TTA_FLIP or set(c.TEST.TTA_SCALES) != {1.0}


def padding_multiple(c: Config) -> int:
    """Returns the number of pixels to whose multiples the edges of a batch are padded: FPN_MULTIPLE, or 1 for C4."""
    return FPN_MULTIPLE if c.MODE_FPN else 1


def round_up(size: Any, multiple: int) -> Any:
    """Rounds `size` (a number, an array or an integer tensor) up to a multiple."""
    return -(-size // multiple) * multiple


def largest_edge(c: Config) -> float:
    """Returns the limit of an image's long edge in pixels.

    FPN rounds PREPROC.MAX_SIZE up to FPN_MULTIPLE, as the reference does: 1333 to 1344.
    """
    return round_up(c.PREPROC.MAX_SIZE, padding_multiple(c))


def _contradictions(c):
    """Yields a line for each requirement between keys that is not met."""
    rpn, fpn, names = c.RPN, c.FPN, c.DATA.CLASS_NAMES
    if fpn.CASCADE and not c.MODE_FPN:
        yield "FPN.CASCADE=True needs MODE_FPN=True"
    if c.MODE_FPN and fpn.ANCHOR_STRIDES != (4, 8, 16, 32, 64):
        yield "FPN.ANCHOR_STRIDES must be [4,8,16,32,64], the strides of p2 to p6"
    if c.MODE_FPN and len(rpn.ANCHOR_SIZES) != len(fpn.ANCHOR_STRIDES):
        yield "RPN.ANCHOR_SIZES must be one size for each of FPN.ANCHOR_STRIDES where MODE_FPN=True"
    if not c.MODE_FPN and rpn.ANCHOR_STRIDE != 16:
        yield "RPN.ANCHOR_STRIDE must be 16, the stride of the C4 map, where MODE_FPN=False"
    if c.TEST.SOFT_NMS != "None" and uses_augmentation(c):
        yield "TEST.SOFT_NMS and test-time augmentation (TEST.TTA_FLIP, TEST.TTA_SCALES) don't go together: choose one"
    if not c.TEST.TTA_SCALES:
        yield "TEST.TTA_SCALES must contain at least one scale"
    if not (rpn.ANCHOR_SIZES and rpn.ANCHOR_RATIOS):
        yield "RPN.ANCHOR_SIZES and RPN.ANCHOR_RATIOS must not be empty"
    if rpn.NEGATIVE_ANCHOR_THRESH > rpn.POSITIVE_ANCHOR_THRESH:
        yield "RPN.NEGATIVE_ANCHOR_THRESH must not be above RPN.POSITIVE_ANCHOR_THRESH"
    for group in ("RPN", "FRCNN"):
        if getattr(c, group).BATCH_PER_IM * getattr(c, group).FG_RATIO < 1:
            yield f"{group}.BATCH_PER_IM * {group}.FG_RATIO must be at least 1, or no object is ever sampled"
    if any(len(weights) != 4 for weights in c.CASCADE.BBOX_REG_WEIGHTS):
        yield "CASCADE.BBOX_REG_WEIGHTS must be lists of 4"
    if c.BACKBONE.FREEZE_AFFINE and c.BACKBONE.NORM != "FreezeBN":
        yield "BACKBONE.FREEZE_AFFINE=True needs BACKBONE.NORM=FreezeBN"
    edges = c.PREPROC.TRAIN_SHORT_EDGE_SIZE
    if edges == () or (isinstance(edges, tuple) and len(edges) == 2 and edges[0] > edges[1]):
        yield "PREPROC.TRAIN_SHORT_EDGE_SIZE must be one size, [low, high], or a list of sizes"
    if list(c.PREPROC.TRAIN_CROP_SCALE) != sorted(c.PREPROC.TRAIN_CROP_SCALE):
        yield "PREPROC.TRAIN_CROP_SCALE must be [low, high]"
    if not c.DATA.TRAIN or not all(c.DATA.TRAIN + c.DATA.VAL):
        yield "DATA.TRAIN and DATA.VAL must be names of data sets, or ANNOTATIONS.json:IMAGE_DIR"
    if names and (names[0] != "BG" or len(names) != c.DATA.NUM_CATEGORY + 1):
        yield 'DATA.CLASS_NAMES must be "BG" and one name for each of DATA.NUM_CATEGORY classes'
    if c.DATA.CATEGORY_IDS and len(set(c.DATA.CATEGORY_IDS)) != c.DATA.NUM_CATEGORY:
        yield "DATA.CATEGORY_IDS must be one id for each of DATA.NUM_CATEGORY classes"
    if list(c.TRAIN.DECAY_AT) != sorted(set(c.TRAIN.DECAY_AT)):
        yield "TRAIN.DECAY_AT must be rising shares of the length of the training"
    if c.TRAIN.EPOCHS and c.TRAIN.LR_POLICY == "steps" and not c.TRAIN.DECAY_AT:
        yield "TRAIN.EPOCHS with TRAIN.LR_POLICY=steps needs TRAIN.DECAY_AT, such as [0.89,0.96]"
    try:
        lr_schedule_steps(c.TRAIN.LR_SCHEDULE)
    except ConfigError as error:
        yield str(error)
    yield from _unfit_for_group_norm(c)


def _unfit_for_group_norm(c):
    """Yields a line for each number of channels that GroupNorm cannot group (see modeling/layers.py)."""
    for uses_group_norm, key, channels in (
        (c.BACKBONE.NORM == "GN", "BACKBONE.WIDTH", [c.BACKBONE.WIDTH * 2**doubled for doubled in range(6)]),
        (c.FPN.NORM == "GN", "FPN.NUM_CHANNEL", [c.FPN.NUM_CHANNEL]),
        ("_gn_" in c.FPN.FRCNN_HEAD_FUNC, "FPN.FRCNN_CONV_HEAD_DIM", [c.FPN.FRCNN_CONV_HEAD_DIM]),
        ("_gn_" in c.FPN.MRCNN_HEAD_FUNC, "MRCNN.HEAD_DIM", [c.MRCNN.HEAD_DIM]),
    ):
        unfit = [x for x in channels if x % (32 if x >= 64 else 2)]
        if uses_group_norm and unfit:
            yield f"{key}: GroupNorm needs even numbers of channels, multiples of 32 if 64 or more, not {unfit[0]}"


def _without_effect(c):
    """Yields a line for each changed key that other settings disable."""
    settings = {f"{key}={value}" for key, value in c._values.items()}
    settings |= {f"{key}>0" for key, value in c._values.items() if type(value) in (int, float) and value > 0}
    for setting, keys in UNUSED:
        if settings.issuperset(setting.split()):
            unused = [key for key in c.changes() if key.startswith(tuple(keys.split()))]
            yield from (f"{key} has no effect with {setting}" for key in unused)


def lr_schedule_steps(schedule: str | Sequence[int]) -> list[int]:
    """Returns the steps at which the learning rate drops, and the last step, for a total batch of 8.

    "1x" is [120000, 160000, 180000]. "2x" to "9x" are that many times as long, with the low rates never longer than in
    "2x" (arXiv:1811.08883). A list is returned unchanged.

    Raises:
        ConfigError: the schedule has another form.
    """
    if schedule == "1x":
        return [120000, 160000, 180000]
    if isinstance(schedule, str) and re.fullmatch("[2-9]x", schedule):
        end = 180000 * int(schedule[0])
        return [end - 120000, end - 40000, end]
    if isinstance(schedule, str) or not schedule or list(schedule) != sorted(set(schedule)):
        raise ConfigError(f'TRAIN.LR_SCHEDULE={schedule}: must be "1x" to "9x" or a list of rising steps')
    return list(schedule)


config = Config()
