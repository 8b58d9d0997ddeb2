"""Rendered objects: pure, told apart by form and not by colour, with masks that fit."""

import numpy as np
import pytest

from fastdino.data.sources.shapes import CLASSES, SILHOUETTES, TEXTURES, ShapesSource

SIZE = 48


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """600 images and labels of one seed, 600 of another."""
    found = []
    for seed in (11, 12):
        source = ShapesSource(600, SIZE, seed)
        images, labels = zip(*(source.read(i) for i in range(600)), strict=True)
        found += [np.stack([np.asarray(image) for image in images]) / 255, np.array(labels)]
    return tuple(found)


def nearest_class_mean(bank: np.ndarray, bank_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    means = np.stack([bank[bank_labels == label].mean(0) for label in range(len(CLASSES))])
    return float((((test[:, None] - means) ** 2).sum(-1).argmin(1) == test_labels).mean())


def test_an_image_is_a_pure_function_of_seed_index_and_size():
    source = ShapesSource(100, SIZE, seed=5)
    later = source.read(40)[0]
    again = ShapesSource(41, SIZE, seed=5).read(40)[0]  # another length, nothing read before
    assert np.array_equal(later, again)
    assert not np.array_equal(later, source.read(52)[0]), "same class, other image"
    assert not np.array_equal(later, ShapesSource(100, SIZE, seed=6).read(40)[0])


def test_no_image_of_one_seed_comes_back_in_another(sets):
    train, _, test, _ = sets
    assert len({image.tobytes() for image in (*train, *test)}) == 1200


def test_labels_are_balanced_and_named():
    source = ShapesSource(36, SIZE)
    assert len(source) == 36
    assert len(set(source.labels)) == len(source.labels) == 12
    assert np.bincount([source.read(i)[1] for i in range(36)]).tolist() == [3] * 12
    for outside in (36, -1):
        with pytest.raises(IndexError):
            source.read(outside)


@pytest.mark.parametrize("size", [8, 33, 96, 224])
def test_any_size(size):
    source = ShapesSource(12, size)
    for index in range(12):
        image, _ = source.read(index)
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
        assert source.mask(index).shape == (size, size)
        assert source.mask(index).dtype == bool


def test_colour_tells_nothing_about_the_class(sets):
    train, labels, test, test_labels = sets
    chance = 1 / len(CLASSES)
    limit = chance + 3 * (chance * (1 - chance) / len(test)) ** 0.5
    for statistic in (lambda x: x.mean((1, 2)), lambda x: x.std((1, 2)), lambda x: x[:, :2].mean((1, 2))):
        assert nearest_class_mean(statistic(train), labels, statistic(test), test_labels) < limit


def test_form_and_texture_tell_the_class(sets):
    """With colour standardised away, pixels alone get far; so the classes do differ."""
    train, labels, test, test_labels = sets

    def standardised(x: np.ndarray) -> np.ndarray:
        x = x.mean(-1)
        x = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
        return x.reshape(len(x), -1)

    distances = -standardised(test) @ standardised(train).T
    assert (labels[distances.argmin(1)] == test_labels).mean() > 0.5


def test_the_object_is_lighter_than_what_is_behind_it():
    source = ShapesSource(240, SIZE)
    for index in range(240):
        image, mask = np.asarray(source.read(index)[0]).astype(float), source.mask(index)
        assert (image[mask].mean(0) > image[~mask].mean(0) + 4).all(), index


def test_objects_fill_much_of_the_image_but_not_all_of_it():
    source = ShapesSource(240, SIZE)
    shares = np.array([source.mask(index).mean() for index in range(240)])
    assert shares.min() > 0.05
    assert shares.max() < 0.7
    assert shares.std() > 0.05


def test_turning_does_not_bend():
    source = ShapesSource(600, 96)
    whole = 0
    for index in range(0, 600, 12):  # discs
        mask = source.mask(index)
        if not (mask[[0, -1]].any() or mask[:, [0, -1]].any()):
            height, width = mask.any(1).sum(), mask.any(0).sum()
            assert abs(int(height) - int(width)) <= 1
            assert mask.sum() == pytest.approx(np.pi / 4 * height * width, rel=0.03)
            whole += 1
    assert whole > 5


def test_mask_is_where_the_object_is_at_any_size():
    """Rendered twice as large, the same image: mask and pixels agree after halving."""
    small, large = ShapesSource(24, 48), ShapesSource(24, 96)
    for index in range(24):
        halved = large.mask(index).reshape(48, 2, 48, 2).mean((1, 3)) > 0.5
        assert (halved != small.mask(index)).mean() < 0.04
        pixels = np.asarray(large.read(index)[0]).reshape(48, 2, 48, 2, 3).mean((1, 3))
        assert np.abs(pixels - np.asarray(small.read(index)[0])).mean() < 8


@pytest.mark.parametrize("name", SILHOUETTES)
def test_silhouettes_are_signed_distances_within_the_unit_disc(name):
    line = np.linspace(-1.3, 1.3, 261)
    x, y = np.meshgrid(line, line)
    distance = SILHOUETTES[name](x, y)
    inside = distance < 0
    assert 0.1 < inside.mean() * 2.6**2 / np.pi < 0.95, "share of the unit disc"
    assert np.hypot(x, y)[inside].max() < 1.05
    slope = np.hypot(*np.gradient(distance, line, line))[np.abs(distance) < 0.02]
    assert 0.5 < np.median(slope) < 1.3, "edges are one pixel soft only where the slope is 1"


def test_silhouettes_differ_from_each_other():
    line = np.linspace(-1, 1, 96)
    x, y = np.meshgrid(line, line)
    inside = np.stack([SILHOUETTES[silhouette](x, y) < 0 for _, silhouette in CLASSES]).reshape(len(CLASSES), -1)
    overlap = (inside[:, None] & inside).sum(-1) / (inside[:, None] | inside).sum(-1)
    np.fill_diagonal(overlap, 0)
    assert overlap.max() < 0.85
    assert {silhouette for _, silhouette in CLASSES} == set(SILHOUETTES)
    assert {texture for texture, _ in CLASSES} == set(TEXTURES)


@pytest.mark.parametrize("name", [name for name in TEXTURES if name != "plain"])
def test_textures_have_dark_and_light(name):
    line = np.linspace(-1, 1, 200)
    x, y = np.meshgrid(line, line)
    dark = TEXTURES[name](x, y, 0.01)
    assert dark.min() == 0
    assert dark.max() == 1
    assert 0.2 < dark.mean() < 0.6
