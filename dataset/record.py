"""What an image and its annotations are, and what every data set can do."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from config import UserError


class DatasetError(UserError):
    """A data set that cannot be used as it is: one line that names file, key or id, and what is expected."""


class TooManyDropped(DatasetError):
    """More objects cannot be trained on than the configuration allows."""

    exit_code = 4


# No generated __eq__: it would compare arrays and fail.
@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One image and its G annotated objects.

    Attributes:
        image_id: the data set's own id.
        path: image file.
        height, width: of the image as the data set states them, in pixels.
        boxes_xyxy: float32 [G, 4], continuous pixel coordinates, clipped to the image.
        labels: int64 [G], 1..C.
        is_crowd: bool [G]; a crowd region marks many objects that nobody counted.
        segmentations: tuple of G: each a list of polygons float32 [P, 2] (x, y; P >= 3), or an RLE dict
            `{"size": [h, w], "counts": bytes}` (compressed), or None.
    """

    image_id: int
    path: str
    height: int
    width: int
    boxes_xyxy: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    is_crowd: np.ndarray = field(repr=False)
    segmentations: tuple = field(repr=False)


class Dataset(ABC):
    """A named set of annotated images. A format is a subclass that sets the attributes and makes the records.

    Attributes:
        name: short, without characters that a file's name can't have.
        class_names: tuple of C names, without background.
        category_ids: tuple of C; label k is the category with id `category_ids[k - 1]` in the annotations and results.
        annotation_file: path of the ground truth in COCO's json format, for the evaluation.
        image_ids: tuple of the ids of this data set's images, ascending. The annotation file may list more.
    """

    name: str
    class_names: tuple
    category_ids: tuple
    annotation_file: str
    image_ids: tuple

    @abstractmethod
    def records(self, *, training, filter_empty=True, masks=True, max_dropped=1.0):
        """The images as a list of Records, in ascending order of image id.

        Args:
            training: False gives every image with all its ground truth. True leaves out objects that cannot be learned:
                marked `ignore`, area <= 1, empty inside the image, or without a usable segmentation (if `masks`).
            filter_empty: with `training`, leave out images that hold nothing but crowd regions, or nothing at all.
            masks: whether the training uses masks.
            max_dropped: largest share, 0..1, of objects that may be left out (those marked `ignore` do not count).

        Raises:
            DatasetError: nothing is left to train on, or `masks` and an object has no segmentation at all.
            TooManyDropped: more than `max_dropped` is left out.
        """
