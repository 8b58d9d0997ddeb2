"""The data benchmark: equal pixels before any figure, the peers' distributions, what it writes."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import data, report
from bench.peers import views as peers
from bench.record import write
from fastdino.config import ViewsConfig
from fastdino.data.views import fast

pytestmark = pytest.mark.skipif(bool(fast.why_not()), reason=f"fast: {fast.why_not()}")
SIZES = data.Sizes(images=8, width=60, height=45, rounds=3, per_round=2, batch=2, loader_rounds=3, batches=2)
VIEWS = ViewsConfig(global_size=32, local_size=16, num_local=2)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return data.make_files(tmp_path, SIZES)


@pytest.fixture(autouse=True)
def no_handler_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A DataLoader of torch's leaves a handler of SIGCHLD behind, which raises in whatever test a child dies in."""
    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    yield
    signal.signal(signal.SIGCHLD, before)


def test_files_are_made_alike_and_differ(paths: list[Path], tmp_path: Path) -> None:
    assert [Image.open(path).size for path in paths] == [(60, 45)] * 8
    assert len({path.read_bytes() for path in paths}) == 8
    (tmp_path / "again").mkdir()
    assert [path.read_bytes() for path in data.make_files(tmp_path / "again", SIZES)] == [p.read_bytes() for p in paths]


def test_no_figure_when_a_pixel_differs(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data.check(paths, VIEWS)
    monkeypatch.setattr(peers, "SOLARIZE_THRESHOLD", 127)
    with pytest.raises(AssertionError, match=r"no figure: view 1 of image . by reference is not torchvision's"):
        data.check(paths, ViewsConfig(global_size=32, local_size=16, num_local=2, solarize=1.0))


def test_no_figure_when_fast_views_differ(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right = data.implementation

    def wrong(name: str) -> tuple[data.Write, str]:
        write, said = right(name)
        return (lambda image, params, out: write(image, params.flip(0), out)) if name == "fast" else write, said

    monkeypatch.setattr(data, "implementation", wrong)
    with pytest.raises(AssertionError, match="no figure: view 0 of image 0 by fast is not torchvision's"):
        data.check(paths, VIEWS)


def test_no_figure_beside_a_peer_that_makes_other_views(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers.multi_crop
    for wrong, message in (
        (lambda views: views[:-1], "torchvision makes views of other sizes"),
        (lambda views: [view // 2 for view in views], "mean of the views by torchvision is"),
    ):
        monkeypatch.setattr(
            peers, "multi_crop", lambda *args, of=wrong, **kw: lambda image: of(right(*args, **kw)(image))
        )
        with pytest.raises(AssertionError, match=f"no figure: {message}"):
            data.check(paths, VIEWS)


def test_random_transforms_act_as_often_as_ours(paths: list[Path]) -> None:
    """Gray views, which nothing but the drawn grayscale makes here: every one, or none."""
    image = {False: peers.read_pil(paths[0]), True: peers.read_tensor(paths[0])}
    for tensors in (False, True):
        for share in (0.0, 1.0):
            config = ViewsConfig(global_size=32, local_size=16, num_local=1, grayscale=share)
            views = peers.multi_crop(config, tensors=tensors)(image[tensors])
            gray = [bool((view == view[:1]).all()) for view in views]
            assert gray == [bool(share)] * 3
            assert [tuple(view.shape) for view in views] == [(3, 32, 32), (3, 32, 32), (3, 16, 16)]
            assert all(view.dtype == torch.uint8 for view in views)


def test_measure_and_table(tmp_path: Path) -> None:
    document = data.measure(SIZES, VIEWS, [1])
    assert set(document["stages"]) == {"for the device", "decode", "views", "decode and views", "loader, 1 worker"}
    assert data.REFERENCE in document["stages"]["views"]
    assert data.REFERENCE in document["stages"]["decode and views"]
    for contenders in document["stages"].values():
        assert contenders[data.OURS]["times_ours"]["median"] == 1
        assert all(f["images_per_second"] > 0 for f in contenders.values())
    assert report.data_table(tmp_path) == "Not measured yet.\n"
    where = {**data.provenance(data.CPU, "bench.data"), "views": "fast, avx2"}
    write(tmp_path / "data-cpu.json", {"provenance": where, **document})
    table = report.data_table(tmp_path)
    assert "; views by fast, avx2; torch " in table
    assert "60 x 45 pixels" in table
    assert (
        f"| loader, 1 worker | fastdino | {document['stages']['loader, 1 worker']['fastdino']['per_core']:.3g} |"
        in table
    )
    assert json.loads((tmp_path / "data-cpu.json").read_text())["views"] == "2 x 32 + 2 x 16"
