"""J and F on masks made by hand, and their course over a video."""

import numpy as np
import pytest

from fastdino.eval.objects.contours import course, outline, outline_f, region, saliency

SIZE = (60, 80)  # a diagonal of 100 pixels, so outlines may be ceil(0.8) = 1 apart


def square(top: int = 20, left: int = 30, side: int = 10) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top : top + side, left : left + side] = True
    return mask


NOTHING = np.zeros(SIZE, bool)


def test_region() -> None:
    assert region(square(), square()) == 1
    assert region(NOTHING, NOTHING) == 1
    assert region(NOTHING, square()) == region(square(), NOTHING) == 0
    assert region(square(), square(left=35)) == pytest.approx(50 / 150)
    assert region(square(side=5), square()) == pytest.approx(25 / 100)


def test_saliency_by_hand() -> None:
    """6 of 8 pixels that were found are right, of 10: P = 3/4, R = 3/5; 6 of 20 are wrong."""
    true, found = np.arange(20) < 10, np.arange(20) >= 4
    found[12:] = False
    iou, accuracy, f = saliency(found, true)
    assert iou == pytest.approx(6 / 12)
    assert accuracy == pytest.approx(14 / 20)
    assert f == pytest.approx(1.3 * 0.75 * 0.6 / (0.3 * 0.75 + 0.6))
    assert saliency(~true, true) == (0, 0, 0)


def test_outline() -> None:
    """The pixels above and left of an edge, and the corner: 4 sides of 10, and the upper left corner outside."""
    line = outline(square())
    assert line.sum() == 40
    assert line[(19, 19, 28, 29), (29, 38, 29, 39)].all()
    assert not line[20:29, 30:39].any()
    assert not outline(np.ones(SIZE, bool)).any()  # the image's edge is none of an object
    half = np.arange(80) < 40
    assert np.array_equal(outline(np.broadcast_to(half, SIZE)), np.broadcast_to(np.arange(80) == 39, SIZE))


def test_outline_f() -> None:
    assert outline_f(square(), square()) == 1
    assert outline_f(NOTHING, NOTHING) == 1
    assert outline_f(NOTHING, square()) == outline_f(square(), NOTHING) == 0
    assert outline_f(square(), square(top=21)) == 1  # shifted by as much as is forgiven
    assert outline_f(square(), square(top=40, left=60)) == 0  # shifted beyond


def test_outline_f_by_hand() -> None:
    """Two lines: of the true one, 60 long, the found one covers 20, and it is wrong in the other 20."""
    true, found = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    true[:, :40] = True  # the outline is column 39
    found[:20, :40] = True  # its outline: column 39 down to row 19, and row 19 left of it
    precision, recall = (20 + 1) / 59, (20 + 1) / 60  # one more each within a pixel: (19, 38) and (20, 39)
    assert outline(found).sum() == 59
    assert outline_f(found, true) == pytest.approx(2 * precision * recall / (precision + recall))


def test_the_tolerance_is_a_disk() -> None:
    """Of 480 x 854 pixels its radius is ceil(7.84) = 8: outlines of 2 x 2 pixels match whole or in part."""
    for moved, least, most in (((8, 0), 1, 1), ((5, 6), 1, 1), ((6, 6), 0.1, 0.9), ((9, 0), 0.1, 0.9), ((9, 9), 0, 0)):
        a, b = np.zeros((480, 854), bool), np.zeros((480, 854), bool)
        a[100, 100] = b[100 + moved[0], 100 + moved[1]] = True
        assert least <= outline_f(a, b) <= most, moved


def test_course_by_hand() -> None:
    mean, recall, decay = course([1.0, 0.9, 0.8, 0.6, 0.5, 0.4, 0.2, 0.0, 0.0])
    assert mean == pytest.approx(4.4 / 9)
    assert recall == pytest.approx(4 / 9)  # a half itself is not above
    assert decay == pytest.approx((1.0 + 0.9 + 0.8) / 3 - (0.2 + 0.0 + 0.0) / 3)  # frames 1 to 3 and 7 to 9
    assert course([1.0, 1.0, 0.9, 0.5, 0.2, 0.0]).decay == pytest.approx(0.9)  # borders at 1, 2.25, 3.5, 4.75 and 6
    assert course([0.7]) == (0.7, 1.0, 0.0)
    assert course(list(np.linspace(1, 0, 400))).decay == pytest.approx(0.75, abs=0.01)  # more frames than a byte counts
