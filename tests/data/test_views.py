"""Views: the drawn numbers against torchvision's random transforms, the applied pixels against its functions."""

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode

from fastdino.config import ViewsConfig
from fastdino.data.views import JITTER_ORDERS, Column, apply, center_view, normalize, sample_params

DINO = ViewsConfig()  # DINO v1's recipe
NEUTRAL = {Column.WIDTH: 1, Column.HEIGHT: 1, Column.BRIGHTNESS: 1, Column.CONTRAST: 1, Column.SATURATION: 1}


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with noise: every operation changes it."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((width, height), 3)
    return Image.fromarray((np.asarray(coarse) * 0.8 + rng.integers(0, 50, (height, width, 3))).astype(np.uint8))


def torchvision_view(image: Image.Image, row: list[float], size: int) -> torch.Tensor:
    """One view by torchvision's functions, in the order of DINO v1's pipeline."""
    left, top, width, height = (round(row[i] * side) for i, side in enumerate(image.size * 2))
    view = F.resized_crop(image, top, left, height, width, [size, size], InterpolationMode.BICUBIC)
    if row[Column.FLIP]:
        view = F.hflip(view)
    functions = {
        Column.BRIGHTNESS: F.adjust_brightness,
        Column.CONTRAST: F.adjust_contrast,
        Column.SATURATION: F.adjust_saturation,
        Column.HUE: F.adjust_hue,
    }
    jittered = any(row[column] != NEUTRAL.get(column, 0) for column in functions)
    for column in JITTER_ORDERS[int(row[Column.ORDER])] if jittered else ():
        if row[column] != NEUTRAL.get(column, 0):
            view = functions[column](view, row[column])
    if row[Column.GRAYSCALE]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if row[Column.BLUR]:
        view = view.filter(ImageFilter.GaussianBlur(radius=row[Column.BLUR]))
    if row[Column.SOLARIZE]:
        view = F.solarize(view, 128)
    return F.pil_to_tensor(view)


def draw(count: int, config: ViewsConfig = DINO, size: tuple[int, int] = (500, 375)) -> torch.Tensor:
    return torch.stack([sample_params(3, 1, index, config, size) for index in range(count)])  # (count, V, P)


@pytest.mark.parametrize("size", [(500, 375), (61, 97), (40, 700)], ids=str)
def test_pixels_equal_torchvision(size):
    config = ViewsConfig(global_size=64, local_size=31, num_local=4)
    for index in range(12):
        image = photo(*size, seed=index)
        params = sample_params(0, 0, index, config, size)
        global_views, local_views = apply(image, params, config)
        assert global_views.shape == (2, 3, 64, 64)
        assert local_views.shape == (4, 3, 31, 31)
        assert global_views.dtype == local_views.dtype == torch.uint8
        for view, row in zip([*global_views, *local_views], params.tolist(), strict=True):
            assert torch.equal(view, torchvision_view(image, row, view.shape[-1])), row


ONE_STEP = {
    "crop": {Column.LEFT: 0.25, Column.TOP: 0.1, Column.WIDTH: 0.5, Column.HEIGHT: 0.4},
    "flip": {Column.FLIP: 1},
    "brighter": {Column.BRIGHTNESS: 1.37},
    "darker": {Column.BRIGHTNESS: 0.61},
    "contrast": {Column.CONTRAST: 1.4},
    "less contrast": {Column.CONTRAST: 0.6},
    "saturation": {Column.SATURATION: 1.2},
    "less saturation": {Column.SATURATION: 0.8},
    "hue": {Column.HUE: 0.1},
    "hue back": {Column.HUE: -0.45},
    "hue by less than a step": {Column.HUE: 0.001},
    "grayscale": {Column.GRAYSCALE: 1},
    "blur": {Column.BLUR: 1.7},
    "gray blur": {Column.GRAYSCALE: 1, Column.BLUR: 0.4},
    "solarize": {Column.SOLARIZE: 1},
    "gray solarize": {Column.GRAYSCALE: 1, Column.SOLARIZE: 1},
}


@pytest.mark.parametrize("name", ONE_STEP)
def test_each_step_alone_equals_torchvision_and_shows(name):
    config = ViewsConfig(global_size=56, num_local=0)
    image = photo(90, 70)
    params = torch.zeros(2, len(Column))
    for column, value in NEUTRAL.items():
        params[:, column] = value
    for column, value in ONE_STEP[name].items():
        params[1, column] = value
    views, local_views = apply(image, params, config)
    assert local_views.shape[0] == 0
    assert torch.equal(views[1], torchvision_view(image, params[1].tolist(), 56))
    assert not torch.equal(views[0], views[1])


@pytest.mark.parametrize("order", [0, 5, 17, 23])
def test_jitter_acts_in_the_drawn_order(order):
    image, config = photo(64, 64), ViewsConfig(global_size=48, num_local=0)
    params = sample_params(0, 0, 0, config, image.size)
    params[:, Column.ORDER] = order
    params[:, Column.BRIGHTNESS : Column.HUE + 1] = torch.tensor([1.39, 0.62, 1.19, 0.09])
    views, _ = apply(image, params, config)
    assert torch.equal(views[0], torchvision_view(image, params[0].tolist(), 48))


def test_a_hue_shift_of_nothing_still_equals_torchvision_for_every_colour():
    colours = Image.fromarray(np.arange(4096 * 3, dtype=np.uint8).reshape(64, 64, 3) * 37)
    params = torch.zeros(2, len(Column))
    for column, value in NEUTRAL.items():
        params[:, column] = value
    for shift in np.linspace(-0.5, 0.5, 9):
        params[:, Column.HUE] = shift
        views, _ = apply(colours, params, ViewsConfig(global_size=64, num_local=0))
        assert torch.equal(views[0], torchvision_view(colours, params[0].tolist(), 64))


# ---------------------------------------------------------------------------------------------------- rotation


def rotated(image: Image.Image, degrees: float) -> torch.Tensor:
    params = torch.zeros(2, len(Column))
    for column, value in NEUTRAL.items():
        params[:, column] = value
    params[:, Column.ROTATE] = degrees
    return apply(image, params, ViewsConfig(global_size=image.width, num_local=0))[0][0]


def test_rotation_is_counter_clockwise_about_the_center():
    image = photo(32, 32)
    upright = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    for quarters in (-1, 1, 2):
        turned = rotated(image, 90.0 * quarters).int()
        assert (turned - torch.rot90(upright, quarters, (1, 2)).int()).abs().max() <= 1


@pytest.mark.parametrize("size", [8, 24, 48])
@pytest.mark.parametrize("degrees", [-10.0, 45.0, 133.0])
def test_rotation_brings_in_no_border(degrees, size):
    flat = Image.new("RGB", (size, size), (200, 100, 50))
    assert (rotated(flat, degrees) == torch.tensor([200, 100, 50]).view(3, 1, 1)).all()


def test_rotation_equals_pillow_away_from_the_border():
    image = photo(48, 48)
    want = F.pil_to_tensor(image.rotate(10, Image.Resampling.BILINEAR)).int()
    got = rotated(image, 10.0).int()
    assert (got - want).abs()[:, 8:-8, 8:-8].max() <= 1


# ---------------------------------------------------------------------------------------------- drawn numbers


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


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 500)], ids=str)
def test_the_smallest_images_give_views(size):
    global_views, local_views = apply(Image.new("RGB", size), sample_params(0, 0, 0, DINO, size), DINO)
    assert global_views.shape == (2, 3, 224, 224)
    assert local_views.shape == (8, 3, 96, 96)


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


def test_changing_one_probability_leaves_the_other_numbers_alone():
    base = draw(50)
    other = draw(50, ViewsConfig(flip=0.0, jitter=0.0, blur=(0, 0, 0), rotate=30, solarize=0, grayscale=0.2))
    for column in Column:
        same = torch.equal(base[..., column], other[..., column])
        kept = (Column.LEFT, Column.TOP, Column.WIDTH, Column.HEIGHT, Column.ORDER, Column.GRAYSCALE)
        assert same == (column in kept), column


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


# -------------------------------------------------------------------------------- evaluation, normalisation


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (257, 1000), (90, 60)], ids=str)
@pytest.mark.parametrize("side", [224, 48])
def test_center_view_is_dino_v1s_evaluation_transform(size, side):
    image = photo(*size)
    short = {224: 256, 48: 55}[side]
    theirs = T.Compose([T.Resize(short, interpolation=InterpolationMode.BICUBIC), T.CenterCrop(side)])
    assert torch.equal(center_view(image, side), F.pil_to_tensor(theirs(image)))


def test_imagenet_normalisation_is_torchvisions():
    pixels = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    before = pixels.clone()
    want = F.normalize(pixels.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    got = normalize(pixels, "imagenet")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert torch.equal(pixels, before)
    assert torch.equal(normalize(pixels[0, 0], "imagenet"), got[0, 0])


def test_image_normalisation_standardises_each_channel_of_each_view():
    pixels = torch.randint(0, 256, (2, 5, 3, 16, 16), dtype=torch.uint8)
    pixels[0, 0, 1] = 77
    got = normalize(pixels, "image")
    assert got.dtype == torch.float32
    assert got.mean((-2, -1)).abs().max() < 1e-5
    deviation = got.std((-2, -1), correction=0)
    assert deviation[0, 0, 1] == 0
    deviation[0, 0, 1] = 1
    assert (deviation - 1).abs().max() < 0.03
    faint = torch.tensor([100, 101], dtype=torch.uint8).repeat(1, 3, 4, 2)
    assert normalize(faint, "image").abs().max() < 0.5, "rounding noise is not blown up"
    brighter = (pixels[1] // 2 + 60).to(torch.uint8)  # gain and offset go away
    assert (normalize(brighter, "image") - got[1]).abs().mean() < 0.05
