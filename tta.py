"""Test-time augmentation: the network looks at an image several times, mirrored and at several sizes, and what it finds
is merged.

Shape shorthand: N images of a batch; R detections; H, W height and width of the batch; M side of a predicted mask.
"""

import cv2
import numpy as np

import boxes
import data


def augmented(predict, *, scales, flip, multiple, iou_threshold, max_per_image):
    """A function like `predict`, (image uint8 [N, H, W, 3], image_shape int32 [N, 2]) -> Detections of NumPy arrays,
    that applies it to every view of the images, and merges the results.

    Args:
        scales: multiples of the test size. The images that come in have the size of the largest.
        flip: whether each view is looked at mirrored, too. multiple: what padded sizes are a multiple of.
        iou_threshold, max_per_image: see `merge`.
    """

    def predict_views(image, image_shape):
        originals = [pixels[:height, :width] for pixels, (height, width) in zip(image, image_shape)]
        found = []
        for scale in scales:
            views = [_resized(original, scale / max(scales)) for original in originals]
            for mirrored in (False, True) if flip else (False,):
                batch, shapes = data.pad_images(
                    [view[:, ::-1] if mirrored else view for view in views], multiple=multiple
                )
                seen = predict(batch, shapes)
                if not np.isfinite(seen.scores).all():
                    return seen  # the caller refuses it
                found.append(_seen_from_original(seen, shapes, image_shape, mirrored=mirrored))
        return merge(found, len(image), iou_threshold=iou_threshold, max_per_image=max_per_image)

    return predict_views


def _resized(image, factor):
    if factor == 1:
        return image
    size = [max(1, round(edge * factor)) for edge in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def _seen_from_original(found, shapes, original_shapes, *, mirrored):
    """Detections in views of `shapes` [N, 2] as they lie in the images of `original_shapes` [N, 2]."""
    shapes, original_shapes = (x[found.image_index] for x in (shapes, original_shapes))
    boxes_xyxy, masks = found.boxes, found.masks
    if mirrored:
        widths = shapes[:, 1].astype(np.float32)
        x1, y1, x2, y2 = boxes_xyxy.T
        boxes_xyxy = np.stack([widths - x2, y1, widths - x1, y2], axis=1)
        masks = None if masks is None else masks[:, :, ::-1]
    factors = (original_shapes / shapes)[:, [1, 0, 1, 0]].astype(np.float32)
    return found._replace(boxes=boxes_xyxy * factors, masks=masks)


def merge(found, num_images, *, iou_threshold, max_per_image):
    """The Detections of several views of the same images as one.

    Best first, a detection takes in those of its class in its image that overlap it by more than `iou_threshold`. Its
    score stays; its box, and its mask within it, become the means of all, weighted by score (box voting,
    arXiv:1505.01749). The best `max_per_image` of each image are kept.
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
    """[(indices of the detections that become one, the best first; their box)], best first, of the given `rows`."""
    merged, rows = [], rows[np.argsort(-joined.scores[rows], kind="stable")]
    while len(rows):
        overlap = boxes.pairwise_iou(joined.boxes[rows[:1]], joined.boxes[rows])[0]
        together = (overlap > iou_threshold) & (joined.labels[rows] == joined.labels[rows[0]])
        together[0] = True
        taken, rows = rows[together], rows[~together]
        merged.append((taken, np.average(joined.boxes[taken], axis=0, weights=joined.scores[taken] + 1e-12)))
    return merged


def _mean_mask(joined, rows, box_xyxy):
    masks = [_moved(joined.masks[row], joined.boxes[row], box_xyxy) for row in rows]
    return np.average(masks, axis=0, weights=joined.scores[rows] + 1e-12)


def _moved(mask, from_xyxy, to_xyxy):
    """A mask [M, M] that fills one box, as it lies in another: bilinear between cell centres, 0 beyond."""
    side = mask.shape[0]
    scale = (to_xyxy[2:] - to_xyxy[:2]) / (from_xyxy[2:] - from_xyxy[:2])
    shift = ((to_xyxy[:2] - from_xyxy[:2]) / (from_xyxy[2:] - from_xyxy[:2])) * side + 0.5 * scale - 0.5
    matrix = np.array([[scale[0], 0, shift[0]], [0, scale[1], shift[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(mask, matrix, (side, side), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
