"""Views by C against views by Pillow: every byte, at each instruction set that this processor has."""

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.record import ROOT
from fastdino.config import ConfigError, ViewsConfig
from fastdino.data.views import Column, fast, implementation, reference, sample_params
from fastdino.data.views.params import JITTER_ORDERS, crop_boxes
from tests.children import environment
from tests.data.pictures import photo
from tests.data.views.cases import ONE_STEP, one_step, random_cases

HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()
COMPILER = shutil.which(os.environ.get("CC", "cc"))
can_build = pytest.mark.skipif(not (COMPILER and HEADERS), reason="no C compiler, or no headers of Python's")


@can_build
def test_it_is_built_where_it_can_be():
    assert not fast.why_not(), f"{fast.why_not()}: run python setup.py build_ext --inplace"


pytestmark = pytest.mark.filterwarnings("error")
built = pytest.mark.skipif(bool(fast.why_not()), reason=f"fast: {fast.why_not()}")


@pytest.fixture(params=fast.levels() or [pytest.param("none", marks=built)])
def level(request) -> int:
    return fast.levels().index(request.param)


def by_fast(image: Image.Image, params: Tensor, like: dict[str, Tensor], level: int) -> dict[str, Tensor]:
    out = {name: torch.full_like(group, 77) for name, group in like.items()}
    fast.write(np.asarray(image), params, out, level)
    return out


def assert_equal(image: Image.Image, params: Tensor, config: ViewsConfig, level: int) -> None:
    want = reference.apply(np.asarray(image), params, config)
    got = by_fast(image, params, want, level)
    for name, group in want.items():
        for view, (a, b) in enumerate(zip(group, got[name], strict=True)):
            assert torch.equal(a, b), (
                f"{int((a != b).sum())} bytes of {name} view {view} differ, by up to "
                f"{(a.int() - b.int()).abs().max()}: {image.size} pixels, {config}, {params.tolist()}"
            )


STEPS = {
    **ONE_STEP,
    "nothing": {},
    "rotation": {Column.ROTATE: -37.25},
    "flipped rotation": {Column.FLIP: 1, Column.ROTATE: 10},
    "wide blur": {Column.BLUR: 9},
    "blur wider than the view": {Column.BLUR: 300},
    "black": {Column.BRIGHTNESS: 0},
    "far too bright": {Column.BRIGHTNESS: 60},
    "a negative of the contrast": {Column.CONTRAST: -1.5},
    "flat": {Column.CONTRAST: 0},
    "garish": {Column.SATURATION: 7},
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("size", [(90, 70), (31, 200), (224, 17)], ids=str)
def test_each_step_alone(name, size, level):
    for side in (56, 7):
        config = ViewsConfig(global_size=side, num_local=0)
        assert_equal(photo(*size), one_step(STEPS[name], num_views=2), config, level)


@pytest.mark.parametrize("order", range(len(JITTER_ORDERS)))
def test_each_order_of_the_jitter(order, level):
    config = ViewsConfig(global_size=48, num_local=0, jitter=1)
    params = sample_params(0, 0, order, config, (64, 80))
    params[:, Column.ORDER] = order
    assert_equal(photo(64, 80), params, config, level)


@pytest.mark.parametrize("shift", [-0.5, -0.0789, 0.1, 0.37])
def test_every_kind_of_colour_turns_alike(shift, level):
    colours = np.arange(1024 * 1024, dtype=np.uint32) * 16  # every 16th of all
    pixels = np.stack([colours >> 16, colours >> 8, colours + (colours >> 5)], -1).astype(np.uint8)
    image = Image.fromarray(pixels.reshape(1024, 1024, 3))
    config = ViewsConfig(global_size=1024, num_local=0)
    assert_equal(image, one_step({Column.HUE: shift}, num_views=2), config, level)


@pytest.mark.parametrize("seed", range(8))
def test_random_images_and_draws(seed, level):
    for pixels, params, config in random_cases(seed, 60, longest=700):
        assert_equal(Image.fromarray(pixels), params, config, level)


@pytest.mark.parametrize(
    ("size", "side"),
    [((8000, 3), 40), ((3, 8000), 40), ((1, 8000), 9), ((8000, 1), 9), ((1, 1), 100), ((5000, 400), 64),
     ((100, 80), 1031), ((2, 2), 1), ((63, 65), 64), ((1500, 2000), 224)],
    ids=str,
)  # fmt: skip
def test_extreme_sizes(size, side, level):
    config = ViewsConfig(global_size=side, local_size=max(1, side // 2), num_local=2, rotate=20)
    for index in range(2):
        assert_equal(photo(*size), sample_params(0, 0, index, config, size), config, level)


def test_a_published_recipe(level):
    for index in range(3):
        assert_equal(photo(500, 375), sample_params(0, 0, index, ViewsConfig(), (500, 375)), ViewsConfig(), level)


def test_boxes_stay_within_images_whose_sides_fp32_cannot_hold():
    """The last pixels of 100,000,001 are all at the share 1."""
    side = 100_000_001
    params = one_step({Column.LEFT: (side - 2) / side, Column.WIDTH: 2 / side})
    assert params[0, Column.LEFT] == 1
    assert crop_boxes(params, (side, 1)).tolist() == [[side - 1, 0, 1, 1]]
    assert crop_boxes(params[:, [1, 0, 3, 2, *range(4, len(Column))]], (1, side)).tolist() == [[0, side - 1, 1, 1]]


# ----------------------------------------------------------------------------------------- where and how it writes


def test_views_go_to_their_places_in_a_batch(level):
    config = ViewsConfig(global_size=20, local_size=9, num_local=3)
    params, image = sample_params(0, 0, 0, config, (60, 50)), photo(60, 50)
    batch = {"global": torch.full((2, 5, 3, 20, 20), 9, dtype=torch.uint8)}
    batch["local"] = torch.full((3, 5, 3, 9, 9), 9, dtype=torch.uint8)
    want = reference.apply(np.asarray(image), params, config)
    fast.write(np.asarray(image), params, {name: group[:, 2] for name, group in batch.items()}, level)
    for name, group in batch.items():
        assert torch.equal(group[:, 2], want[name])
        assert (group[:, [0, 1, 3, 4]] == 9).all(), "other images of the batch stay as they are"


def test_threads_make_what_one_makes(level):
    config = ViewsConfig(global_size=64, local_size=32, num_local=2)
    images = [photo(100 + 9 * i, 80, seed=i) for i in range(6)]
    params = [sample_params(0, 0, i, config, image.size) for i, image in enumerate(images)]
    want = [reference.apply(np.asarray(image), p, config) for image, p in zip(images, params, strict=True)]

    def work(i: int) -> bool:
        got = by_fast(images[i % 6], params[i % 6], want[i % 6], level)
        return all(torch.equal(got[name], group) for name, group in want[i % 6].items())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(120)))


def test_the_interpreter_is_free_meanwhile(level):
    image, config = photo(2000, 1500), ViewsConfig(global_size=224, num_local=30)
    params = sample_params(0, 0, 0, config, image.size)
    views = [np.zeros((3, 224, 224), np.uint8) for _ in params]
    pixels, boxes, turns = np.asarray(image), crop_boxes(params, image.size), fast.turns_of(params)
    begins, ended = threading.Event(), []

    def work() -> None:
        begins.set()  # and nothing more before the call that would let the other thread run
        fast._fast.make_views(pixels, boxes, params.numpy(), turns, views, level)
        ended.append(True)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is made to let go
    try:
        thread = threading.Thread(target=work)
        thread.start()
        begins.wait()
        assert not ended
    finally:
        sys.setswitchinterval(interval)
        thread.join()


# ---------------------------------------------------------------------------------------------------- bad input


def arguments() -> dict[str, object]:
    """Of a call that works."""
    return {
        "pixels": np.zeros((6, 5, 3), np.uint8),
        "boxes": np.array([[0, 0, 5, 6], [1, 2, 3, 4]], np.int32),
        "params": one_step({}, num_views=2).numpy(),
        "turns": np.array([[1.0, 0.0], [0.0, -1.0]]),
        "views": [np.zeros((3, 4, 4), np.uint8) for _ in range(2)],
        "level": 0,
    }


def changed(name: str, change) -> tuple[object, ...]:
    given = arguments()
    given[name] = change(given[name])
    return tuple(given.values())


def put(row: int, column: int, value: float):
    def change(array: np.ndarray) -> np.ndarray:
        array[row, column] = value
        return array

    return change


READ_ONLY = np.zeros((3, 4, 4), np.uint8)
READ_ONLY.flags.writeable = False
BAD = [
    ("pixels", lambda x: x[:, :, :2].copy(), ValueError, r"pixels: must be \(height, width, 3\)"),
    ("pixels", lambda x: x.astype(np.int8), TypeError, "pixels: must have 3 dimensions of format B, not 3 of b"),
    ("pixels", lambda x: x[0], TypeError, "pixels: must have 3 dimensions of format B, not 2 of B"),
    ("pixels", lambda x: x[:, ::2], ValueError, "not C-contiguous"),
    ("pixels", lambda x: x[:0], ValueError, "view 0: box .* is not within 5 x 0 pixels"),
    ("pixels", lambda x: object(), TypeError, "buffer|bytes-like"),
    ("boxes", lambda x: x.astype(np.int64), TypeError, "boxes: must have 2 dimensions of format i, not 2 of l"),
    ("boxes", lambda x: x[:1], ValueError, "1 boxes, 2 rows of parameters and 2 turns for 2 views"),
    ("boxes", lambda x: np.zeros((2, 5), np.int32), ValueError, "a box has 4 columns, not 5"),
    ("boxes", put(1, 0, 3), ValueError, r"view 1: box \(3, 2, 3, 4\) is not within 5 x 6 pixels"),
    ("boxes", put(1, 1, 3), ValueError, r"view 1: box \(1, 3, 3, 4\) is not within 5 x 6 pixels"),
    ("boxes", put(0, 0, -1), ValueError, "view 0: box"),
    ("boxes", put(0, 2, 0), ValueError, "view 0: box"),
    ("boxes", put(0, 3, 2**31 - 1), ValueError, "view 0: box"),
    ("boxes", put(1, 1, -(2**31)), ValueError, "view 1: box"),
    ("params", lambda x: x[:, :13].copy(), ValueError, "parameters have 14, not 13"),
    ("params", lambda x: x.astype(np.float64), TypeError, "params: must have 2 dimensions of format f, not 2 of d"),
    ("params", put(1, Column.ORDER, 24), ValueError, "view 1: column 6 of its parameters cannot be 24"),
    ("params", put(1, Column.ORDER, -1), ValueError, "view 1: column 6 of its parameters cannot be -1"),
    ("params", put(0, Column.CONTRAST, np.nan), ValueError, "view 0: column 8 of its parameters cannot be nan"),
    ("params", put(0, Column.ROTATE, np.inf), ValueError, "view 0: column 5 of its parameters cannot be inf"),
    ("params", put(0, Column.HUE, 3e9), ValueError, "column 10 of its parameters cannot be 3e"),
    ("params", put(0, Column.BLUR, -1), ValueError, "column 12 of its parameters cannot be -1"),
    ("params", put(0, Column.BLUR, 1e30), ValueError, "column 12 of its parameters cannot be 1e"),
    ("turns", lambda x: x.astype(np.float32), TypeError, "turns: must have 2 dimensions of format d, not 2 of f"),
    ("turns", lambda x: x[:1], ValueError, "2 boxes, 2 rows of parameters and 1 turns for 2 views"),
    ("turns", lambda x: np.zeros((2, 3)), ValueError, "a turn has 2, not 3"),
    ("turns", put(1, 0, np.nan), ValueError, r"view 1: its cosine and sine are not within \[-1, 1\]"),
    ("turns", put(0, 1, 1.5), ValueError, r"view 0: its cosine and sine are not within \[-1, 1\]"),
    ("views", lambda x: [x[0], np.zeros((3, 4, 5), np.uint8)], ValueError, r"view 1: must be \(3, size, size\), not"),
    ("views", lambda x: [x[0], np.zeros((3, 0, 0), np.uint8)], ValueError, r"view 1: must be \(3, size, size\), not"),
    ("views", lambda x: [x[0], np.zeros((1, 4, 4), np.uint8)], ValueError, r"view 1: must be \(3, size, size\), not"),
    ("views", lambda x: [x[0], np.zeros((3, 4, 8), np.uint8)[:, :, ::2]], ValueError, "not C-contiguous"),
    ("views", lambda x: [x[0], READ_ONLY], ValueError, "read-only"),
    ("views", lambda x: [*x, x[0]], ValueError, "2 boxes, 2 rows of parameters and 2 turns for 3 views"),
    ("views", lambda x: object(), TypeError, "views: must be a sequence of buffers"),
    ("level", lambda x: 9, ValueError, "level 9: this processor has 0 to"),
    ("level", lambda x: -1, ValueError, "level -1: this processor has 0 to"),
]


@built
@pytest.mark.parametrize(("name", "change", "kind", "says"), BAD)
def test_bad_input_is_an_error_and_not_a_crash(name, change, kind, says):
    given = changed(name, change)
    before = [sys.getrefcount(x) for x in given[:5]]  # none of which anything else holds, such as None
    with pytest.raises(kind, match=says):
        fast._fast.make_views(*given)
    assert [sys.getrefcount(x) for x in given[:5]] == before, "nothing is held"


@built
def test_the_call_that_the_bad_ones_differ_from_works():
    fast._fast.make_views(*arguments().values())


# -------------------------------------------------------------------------------------------------- which one runs


@built
def test_auto_is_fast_where_it_is_built(monkeypatch):
    monkeypatch.delenv(fast.SIMD, raising=False)
    widest = fast.levels()[-1]
    assert implementation("auto")[1] == implementation("fast")[1] == f"fast, {widest}"
    assert implementation("reference") == (reference.write, "reference")
    for number, name in enumerate(fast.levels()):
        monkeypatch.setenv(fast.SIMD, name)
        write, said = implementation("auto")
        assert said == f"fast, {name}"
        assert write.keywords == {"level": number}
    monkeypatch.setenv(fast.SIMD, "avx1024")
    with pytest.raises(ConfigError, match="FASTDINO_SIMD='avx1024' must be one of baseline"):
        implementation("fast")


def test_without_it_the_reference_stands_in_and_says_what_that_costs(monkeypatch):
    monkeypatch.setattr(fast, "_REASON", "it is not built (No module named '_fast')")
    write, said = implementation("auto")
    assert write is reference.write
    assert said.startswith("reference, because fast cannot be used: it is not built")
    assert "several times fewer images per second" in said
    with pytest.raises(ConfigError, match=r"data.views='fast' cannot be used: it is not built .*build_ext --inplace"):
        implementation("fast")
    assert implementation("reference")[1] == "reference"
    assert fast.levels() == ()


@built
def test_a_build_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(fast._fast, "SOURCES", "0" * 8)
    assert "built from C files other than those beside it" in fast.why_not()
    assert implementation("auto")[0] is reference.write


# ------------------------------------------------------------------------------------------------------- building


def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp"]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, check=True, timeout=300
    )


def test_without_a_compiler_the_installation_goes_on(tmp_path):
    done = build(tmp_path, CC="false")
    assert 'building extension "fastdino.data.views._fast" failed' in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@can_build
def test_flags_that_change_pixels_are_refused(tmp_path):
    done = build(tmp_path, CFLAGS="-ffast-math")
    assert "no -ffast-math" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    """150 of them with their views, for tests.data.views.sanitized."""
    arrays = {}
    for count, (pixels, params, config) in enumerate(random_cases(100, 150, longest=300)):
        arrays |= {f"{count} pixels": pixels, f"{count} boxes": crop_boxes(params, pixels.shape[1::-1])}
        arrays |= {f"{count} params": params.numpy(), f"{count} turns": fast.turns_of(params)}
        views = [view for group in reference.apply(pixels, params, config).values() for view in group.numpy()]
        arrays |= {f"{count} view {v}": view for v, view in enumerate(views)}
    path = tmp_path_factory.mktemp("cases") / "cases.npz"
    np.savez(path, **arrays)
    return path


def in_a_child(folder: Path, cases: Path, **variables: str) -> str:
    """What tests.data.views.sanitized prints of the extension that was built below ``folder``."""
    (extension,) = folder.rglob("*.so")
    command = [sys.executable, str(Path(__file__).with_name("sanitized.py")), str(extension), str(cases)]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@can_build
def test_the_code_for_other_processors_makes_the_same_bytes(tmp_path, cases):
    build(tmp_path, CFLAGS="-DFASTDINO_PORTABLE")
    assert in_a_child(tmp_path, cases) == "150 cases by baseline\n"


@can_build
def test_sanitizers_find_nothing(tmp_path, cases):
    """Of addresses and of undefined behaviour, over random cases, whose every byte is compared as well."""
    library = subprocess.run([COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("no address sanitizer")
    checks = "address,undefined,float-cast-overflow"
    build(tmp_path, CFLAGS=f"-fsanitize={checks} -fno-sanitize-recover=all -g", LDFLAGS=f"-fsanitize={checks}")
    options = {"ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}  # every buffer with ends of its own
    assert in_a_child(tmp_path, cases, LD_PRELOAD=library, **options).startswith("150 cases")
