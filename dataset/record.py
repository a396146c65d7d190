"""The record of an image and its annotations, and the interface of data sets."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from config import UserError


class DatasetError(UserError):
    """A data set that cannot be used: the message names file, key or id, and the expected content."""


class TooManyDropped(DatasetError):
    """More objects are unusable for training than the configuration allows."""

    exit_code = 4


# An object's mask: polygons, each float32 [P, 2] of x, y with P >= 3; or a compressed RLE,
# {"size": [h, w], "counts": bytes}; or None.
Segmentation = list[np.ndarray] | dict[str, Any] | None


# No generated __eq__: it would compare arrays and fail.
@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One image and its G annotated objects."""

    image_id: int  # the data set's own id
    path: str  # image file
    height: int  # of the image in pixels, as annotated
    width: int
    boxes_xyxy: np.ndarray = field(repr=False)  # float32 [G, 4], continuous pixel coordinates, clipped to the image
    labels: np.ndarray = field(repr=False)  # int64 [G], 1..C
    is_crowd: np.ndarray = field(repr=False)  # bool [G]; a crowd region covers objects that are not annotated singly
    segmentations: tuple[Segmentation, ...] = field(repr=False)  # of length G


class Dataset(ABC):
    """A named set of annotated images. A format is a subclass that sets the attributes and creates the records."""

    name: str  # short, valid as part of a file name
    class_names: tuple[str, ...]  # C names, without background
    category_ids: tuple[int, ...]  # C ids; label k has the id `category_ids[k - 1]` in annotations and results
    annotation_file: str  # path of the ground truth in COCO's json format, for the evaluation
    image_ids: tuple[int, ...]  # of this data set's images, ascending; the annotation file may list more

    @abstractmethod
    def records(
        self, *, training: bool, filter_empty: bool = True, masks: bool = True, max_dropped: float = 1.0
    ) -> list[Record]:
        """Returns the images as a list of Records, in ascending order of image id.

        Args:
            training: False returns every image with all its ground truth. True leaves out objects that cannot be
                learned: marked `ignore`, area <= 1, empty inside the image, or without a usable segmentation (if
                `masks`).
            filter_empty: with `training`, leave out images without objects other than crowd regions.
            masks: whether the training uses masks.
            max_dropped: largest share, 0..1, of objects that may be left out; those marked `ignore` do not count.

        Raises:
            DatasetError: nothing is left to train on, or `masks` and an annotation has no `segmentation`.
            TooManyDropped: more than `max_dropped` is left out.
        """
