"""Test-time augmentation: runs the network on several views of an image, mirrored and at several sizes, and merges the
detections.

Shape shorthand: N images of a batch; R detections; H, W height and width of the batch; M side of a predicted mask.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from common import boxes as np_boxes
from dataset.images import pad_images, resize
from modeling.box_head import Detections


def augmented(
    network: Callable,
    *,
    scales: Sequence[float],
    flip: bool,
    multiple: int,
    iou_threshold: float,
    max_per_image: int,
    antialias: bool = False,
) -> Callable:
    """Returns a function like `network` (see inference/graph.py) that runs it on each view of the images, and merges
    the detections.

    Args:
        scales: in units of the test size. The function takes images at the size of the largest scale.
        flip: whether to add a mirrored copy of each view. multiple: padded sizes are multiples of it.
        iou_threshold, max_per_image: see `merge`. antialias: see `dataset.images.resize`.
    """

    def predict_views(image, image_shape):
        originals = [pixels[:height, :width] for pixels, (height, width) in zip(image, image_shape)]
        found = []
        for scale in scales:
            views = [_resized(original, scale / max(scales), antialias) for original in originals]
            for mirrored in (False, True) if flip else (False,):
                batch, shapes = pad_images([view[:, ::-1] if mirrored else view for view in views], multiple=multiple)
                detections = network(batch, shapes)
                if not np.isfinite(detections.scores).all():
                    return detections  # the caller raises an error
                found.append(_in_original(detections, shapes, image_shape, mirrored=mirrored))
        return merge(found, len(image), iou_threshold=iou_threshold, max_per_image=max_per_image)

    return predict_views


def _resized(image, factor, antialias):
    if factor == 1:
        return image
    return resize(image, *(max(1, round(edge * factor)) for edge in image.shape[:2]), antialias=antialias)


def _in_original(found, shapes, original_shapes, *, mirrored):
    """Maps Detections from views of `shapes` [N, 2] to the images of `original_shapes` [N, 2]."""
    shapes, original_shapes = (x[found.image_index] for x in (shapes, original_shapes))
    boxes_xyxy, masks = found.boxes, found.masks
    if mirrored:
        boxes_xyxy = np_boxes.flip_horizontal(boxes_xyxy, shapes[:, 1].astype(np.float32))
        masks = None if masks is None else masks[:, :, ::-1]
    factors = (original_shapes / shapes)[:, [1, 0, 1, 0]].astype(np.float32)
    return found._replace(boxes=boxes_xyxy * factors, masks=masks)


def merge(found: list[Detections], num_images: int, *, iou_threshold: float, max_per_image: int) -> Detections:
    """Merges the Detections of several views of the same images.

    In the order of scores, each detection absorbs the remaining ones of its image and class that overlap it by an IoU
    above `iou_threshold`. It keeps its score; its box, and the mask within it, become the means of all, weighted by
    score (box voting, arXiv:1505.01749). The best `max_per_image` detections of each image remain.

    Args:
        found: one for each view, of NumPy arrays, boxes in pixels of the images.
    """
    joined = found[0]._replace(
        **{
            name: None if part is None else np.concatenate([getattr(each, name) for each in found])
            for name, part in found[0]._asdict().items()
        }
    )
    merged = [
        one
        for index in range(num_images)
        for one in _merge_image(joined, np.flatnonzero(joined.image_index == index), iou_threshold)[:max_per_image]
    ]
    best = np.array([rows[0] for rows, _ in merged], np.int64)
    masks = joined.masks
    if masks is not None:
        masks = np.array([_mean_mask(joined, rows, box) for rows, box in merged], np.float32).reshape(
            -1, *masks.shape[1:]
        )
    return joined._replace(
        boxes=np.array([box for _, box in merged], np.float32).reshape(-1, 4),
        scores=joined.scores[best],
        labels=joined.labels[best],
        image_index=joined.image_index[best],
        masks=masks,
    )


def _merge_image(joined, rows, iou_threshold):
    """Groups the detections `rows` of one image: a list of (indices that merge, best first; their box), best first."""
    merged, rows = [], rows[np.argsort(-joined.scores[rows], kind="stable")]
    while len(rows):
        overlap = np_boxes.pairwise_iou(joined.boxes[rows[:1]], joined.boxes[rows])[0]
        is_same = (overlap > iou_threshold) & (joined.labels[rows] == joined.labels[rows[0]])
        is_same[0] = True
        group, rows = rows[is_same], rows[~is_same]
        merged.append((group, np.average(joined.boxes[group], axis=0, weights=joined.scores[group] + 1e-12)))
    return merged


def _mean_mask(joined, rows, box_xyxy):
    masks = [_moved(joined.masks[row], joined.boxes[row], box_xyxy) for row in rows]
    return np.average(masks, axis=0, weights=joined.scores[rows] + 1e-12)


def _moved(mask, from_xyxy, to_xyxy):
    """Resamples a mask [M, M] from one box to another: bilinear between the centres of cells, 0 outside its box."""
    side = mask.shape[0]
    scale = (to_xyxy[2:] - to_xyxy[:2]) / (from_xyxy[2:] - from_xyxy[:2])
    shift = ((to_xyxy[:2] - from_xyxy[:2]) / (from_xyxy[2:] - from_xyxy[:2])) * side + 0.5 * scale - 0.5
    matrix = np.array([[scale[0], 0, shift[0]], [0, scale[1], shift[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(mask, matrix, (side, side), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
