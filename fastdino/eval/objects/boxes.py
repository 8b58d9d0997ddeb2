"""Boxes around objects: of masks, and how well they agree.

A box is (left, top, right, bottom) in pixels from the image's upper left corner; right and bottom lie outside of it.
"""

import numpy as np

HIT = 0.5  # IoU from which a box is right


def ious(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(m,) intersection over union of a (4,) box with each of (m, 4); a box without area has 0."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    both = (high - low).clip(min=0).prod(axis=1)
    either = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - both
    return both / np.maximum(either, 1e-12)


def is_hit(box: np.ndarray, boxes: np.ndarray) -> bool:
    """CorLoc of one image: the box has an IoU of at least a half with any of the (m, 4) boxes."""
    return bool((ious(box, boxes) >= HIT).any())


def box_around(mask: np.ndarray) -> np.ndarray:
    """(4,) int64, the smallest box around the true pixels of (h, w), of which there is at least one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def component(mask: np.ndarray, seed: int) -> np.ndarray:
    """The connected part of (rows, columns) bool that holds the element ``seed``, counted row by row; sides connect."""
    from scipy.ndimage import label

    parts, _ = label(mask)
    return parts == parts.flat[seed]


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The connected part of (rows, columns) bool with the most elements, of equal ones the first; sides connect."""
    from scipy.ndimage import label

    parts, _ = label(mask)
    sizes = np.bincount(parts.ravel())
    return parts == 1 + sizes[1:].argmax()


def enlarged(mask: np.ndarray, patch: int, height: int, width: int) -> np.ndarray:
    """(rows, columns) of patches -> (height, width) of pixels; what the last patches have beyond the image is cut."""
    return mask.repeat(patch, axis=0).repeat(patch, axis=1)[:height, :width]
