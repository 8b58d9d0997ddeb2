"""What is drawn for an image's views: distributions against torchvision's, and numbers that never change."""

import hashlib

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image

from fastdino.config import ViewsConfig
from fastdino.data.views import Column, sample_params, sample_params_of_many

DINO = ViewsConfig()  # DINO v1's recipe


def draw(count: int, config: ViewsConfig = DINO, size: tuple[int, int] = (500, 375)) -> torch.Tensor:
    return torch.stack([sample_params(3, 1, index, config, size) for index in range(count)])  # (count, V, P)


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Kolmogorov-Smirnov: the largest difference of the two distribution functions."""
    places = np.sort(np.concatenate([ours, theirs]))
    share = [np.searchsorted(np.sort(x), places, side="right") / len(x) for x in (ours, theirs)]
    return float(np.abs(share[0] - share[1]).max())


@pytest.mark.parametrize("size", [(500, 375), (300, 400), (640, 100)], ids=str)
@pytest.mark.parametrize("group", ["global", "local"])
def test_crops_are_distributed_as_torchvisions(group, size):
    n, scale = 3000, DINO.global_scale if group == "global" else DINO.local_scale
    torch.manual_seed(0)
    blank = Image.new("RGB", size)
    theirs = np.array([T.RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(n)])
    theirs = theirs[:, [1, 0, 3, 2]]  # left, top, width, height
    view = 0 if group == "global" else 5
    ours = draw(n, size=size)[:, view, :4].double().numpy() * np.tile(size, 2)
    assert np.abs(ours - np.rint(ours)).max() < 1e-3, "boxes are of whole pixels"
    ours = np.rint(ours)
    assert ours.min() >= 0
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    assert (ours[:, 2:] >= 1).all()
    for name, function in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "ratio": lambda box: box[:, 2] / box[:, 3],
        "left": lambda box: box[:, 0],
        "top": lambda box: box[:, 1],
        "place": lambda box: box[:, 0] / np.maximum(size[0] - box[:, 2], 1),
    }.items():
        assert distance(function(ours), function(theirs)) < 1.95 * (2 / n) ** 0.5, name  # one false alarm in 1000


@pytest.mark.parametrize("size", [(1000, 20), (20, 1000), (9, 1)], ids=str)
def test_where_no_crop_fits_the_center_is_taken(size):
    config = ViewsConfig(global_scale=(0.95, 1.0), num_local=0)
    top, left, height, width = T.RandomResizedCrop.get_params(Image.new("RGB", size), [0.95, 1.0], [3 / 4, 4 / 3])
    box = sample_params(0, 0, 0, config, size)[0, :4].numpy() * np.tile(size, 2)
    assert np.rint(box).tolist() == [left, top, width, height]


def test_frequencies_and_ranges_are_those_of_the_paper():
    params = draw(3000)  # (n, V, P)
    n = params.shape[0]

    def share(column: Column, view: int, neutral: float = 0) -> float:
        return (params[:, view, column] != neutral).double().mean().item()

    def near(probability: float) -> object:
        return pytest.approx(probability, abs=3.3 * (probability * (1 - probability) / n) ** 0.5 + 1e-9)

    for view in range(DINO.num_views):
        assert share(Column.FLIP, view) == near(0.5)
        assert share(Column.HUE, view) == near(0.8)
        assert share(Column.BRIGHTNESS, view, neutral=1) == near(0.8)
        assert share(Column.GRAYSCALE, view) == near(0.2)
        assert share(Column.BLUR, view) == near({0: 1.0, 1: 0.1}.get(view, 0.5))
        assert share(Column.SOLARIZE, view) == near(0.2 if view == 1 else 0.0)
    assert (params[..., Column.ROTATE] == 0).all()
    uniform_in = {
        Column.BRIGHTNESS: (0.6, 1.4, 1),
        Column.CONTRAST: (0.6, 1.4, 1),
        Column.SATURATION: (0.8, 1.2, 1),
        Column.HUE: (-0.1, 0.1, 0),
        Column.BLUR: (0.1, 2.0, 0),
    }
    for column, (low, high, neutral) in uniform_in.items():
        drawn = params[..., column].flatten()
        drawn = ((drawn[drawn != neutral] - low) / (high - low)).numpy()
        assert distance(drawn, np.linspace(0, 1, 20000)) < 0.02, column
    orders = np.bincount(params[..., Column.ORDER].flatten().long().numpy(), minlength=24) / (n * DINO.num_views)
    assert orders == pytest.approx(np.full(24, 1 / 24), abs=0.006)


def test_steps_are_drawn_independently_of_each_other():
    params = draw(3000)[:, 2:5].reshape(-1, len(Column)).double()  # local views: all of one kind
    jittered = params[params[:, Column.HUE] != 0][:, Column.ORDER : Column.HUE + 1]
    assert torch.corrcoef(jittered.T).fill_diagonal_(0).abs().max() < 0.05
    switches = params[:, [Column.FLIP, Column.HUE, Column.GRAYSCALE, Column.BLUR]] != 0
    assert torch.corrcoef(torch.cat([switches, params[:, :1]], 1).T).fill_diagonal_(0).abs().max() < 0.05


def test_views_of_one_image_differ():
    assert len(draw(1)[0].unique(dim=0)) == DINO.num_views


def test_parameters_are_a_pure_function():
    again = [sample_params(3, 1, 7, DINO, (500, 375)) for _ in range(2)]
    assert torch.equal(*again)
    for other in [(4, 1, 7), (3, 2, 7), (3, 1, 8), (1, 3, 7), (7, 1, 3)]:
        assert not torch.equal(again[0], sample_params(*other, DINO, (500, 375)))


def test_many_images_at_once_are_drawn_as_each_alone():
    rng = np.random.default_rng(0)
    sizes = [tuple(int(side) for side in 10 ** rng.uniform(0, 4, 2)) for _ in range(60)]  # a crop fits into some
    config = ViewsConfig(num_local=3, rotate=20, global_scale=(0.9, 1))
    for start in (0, 7):
        indices = [int(index) for index in rng.integers(0, 10**12, len(sizes) - start)]
        many = sample_params_of_many(3, 1, indices, config, sizes[start:])
        assert many.shape == (len(indices), 5, len(Column))
        for row, index, size in zip(many, indices, sizes[start:], strict=True):
            assert torch.equal(row, sample_params(3, 1, index, config, size))


def test_changing_one_probability_leaves_the_other_numbers_alone():
    base = draw(50)
    other = draw(50, ViewsConfig(flip=0.0, jitter=0.0, blur=(0, 0, 0), rotate=30, solarize=0, grayscale=0.2))
    for column in Column:
        same = torch.equal(base[..., column], other[..., column])
        kept = (Column.LEFT, Column.TOP, Column.WIDTH, Column.HEIGHT, Column.ORDER, Column.GRAYSCALE)
        assert same == (column in kept), column


def test_the_draws_never_change():
    """Of sizes for which a crop fits at once, after some tries, or never."""
    digest = hashlib.sha256()
    for index in range(600):
        size = (1 + 37 * index % 911, 1 + index * index % 1013)
        config = ViewsConfig(num_local=index % 3, rotate=10, global_scale=(0.9, 1))
        digest.update(sample_params(1, 2, index, config, size).numpy().tobytes())
    assert digest.hexdigest()[:16] == "1bcda1be5c9fe3ee"


GOLDEN = [  # left, top, width, height, flip, rotate
    [0.108, 0.016, 0.782, 0.984, 0.0, -0.6204528],
    [0.202, 0.0186667, 0.74, 0.8053333, 0.0, -1.6124417],
    [0.02, 0.1386667, 0.384, 0.544, 1.0, 9.4224596],
]


def test_the_numbers_never_change():
    """A run resumed with a later version has to see the same views: these values are for good."""
    found = sample_params(0, 5, 123456, ViewsConfig(num_local=1, rotate=10), (500, 375))
    torch.testing.assert_close(found[:, :6], torch.tensor(GOLDEN), rtol=0, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_jitter_strength_at_its_ends(strength):
    params = draw(200, ViewsConfig(jitter=1, jitter_strength=(strength,) * 3 + (min(strength, 0.5),)))
    factors = params[..., Column.BRIGHTNESS : Column.SATURATION + 1]
    if strength == 0:
        assert (factors == 1).all()
        assert (params[..., Column.HUE] == 0).all()
    else:
        assert 0 <= factors.min() < 0.05
        assert 2.95 < factors.max() <= 3
