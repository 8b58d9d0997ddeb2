"""Mixtures: shares as asked, every image in turn, the same order wherever a run is resumed."""

from pathlib import Path

import numpy as np
import pytest

from fastdino.cli import configured
from fastdino.config import Config, ConfigError, DataConfig
from fastdino.config.data import mixture
from fastdino.data import FolderSource, ShapesSource
from fastdino.data.sources.composed import Mixture
from tests.data.batches import assert_equal, make_config, start, take
from tests.data.pictures import noise, photos, write
from tests.data.sources.tars import opened, png, write_tar


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """40 images of cats and dogs; 10 of dogs and owls."""
    return photos(tmp_path / "a", ("cat", "dog"), 20), photos(tmp_path / "b", ("dog", "owl"), 5)


def mixed(*weights: float, sizes: tuple[int, ...] = (60, 30, 10)) -> Mixture:
    shapes = {f"s{i}": ShapesSource(size, 8, i) for i, size in enumerate(sizes)}
    return Mixture(dict(list(shapes.items())[: len(weights)]), weights)


def test_it_is_all_of_its_sources(folders, tmp_path):
    source = opened(f"{folders[0]}:3 {folders[1]}:1", tmp_path / "cache")
    a, b = map(FolderSource, folders)
    assert len(source) == 50
    assert source.labels == ["cat", "dog", "owl"]
    assert [source.encoded(i) for i in range(50)] == [part.encoded(i) for part in (a, b) for i in range(len(part))]
    assert [source.label(i) for i in (0, 20, 40, 45)] == [0, 1, 1, 2]
    assert source.read(45)[1] == 2
    assert source.name(40) == f"{folders[1]}: dog/00.png"
    for i in (0, 45):
        assert source.encoded(i + 50) == source.encoded(i + 100) == source.encoded(i)
        assert source.label(i + 50) == source.label(i)


def test_equal_classes_stay_as_they_are_and_none_stays_none(tmp_path):
    for name in ("x", "y"):
        photos(tmp_path / name, ("b", "a"), 2)
        write(tmp_path / name / "stray.png")
    source = opened(f"{tmp_path}/x:1 {tmp_path}/y:1", tmp_path / "cache")
    assert source.labels == ["a", "b"]
    assert [source.label(i) for i in range(10)] == [-1, 0, 0, 1, 1] * 2
    assert [source.read(i)[1] for i in (0, 5)] == [-1, -1]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1, 8), (1e-9, 1), (5, 5)])
def test_shares_are_those_that_were_asked_for(weights):
    source = mixed(*weights)
    ends = np.cumsum([60, 30, 10][: len(weights)])
    orders = np.concatenate([source.order(7, epoch) for epoch in range(50)]) % len(source)
    found = np.bincount(np.searchsorted(ends, orders, side="right"), minlength=len(weights)) / len(orders)
    assert found == pytest.approx(np.array(weights) / sum(weights), abs=0.025)  # 4 deviations or more


def test_every_image_of_a_source_comes_before_one_comes_again():
    source = mixed(1, 1, 8)
    for epoch in range(3):
        order = source.order(3, epoch)
        assert len({*order.tolist()}) == 100, "views of an image that comes twice differ"
        for start_, size in ((0, 60), (60, 30), (90, 10)):
            mine = [i for i in order.tolist() if start_ <= i % 100 < start_ + size]
            turns = [i // 100 for i in mine]
            assert turns == sorted(turns)
            for first in range(0, len(mine), size):
                some = [i % 100 for i in mine[first : first + size]]
                assert len({*some}) == len(some)
                assert {*some} == {*range(start_, start_ + size)} or len(some) < size
        assert max(order) >= 700, "ten images, eighty places"


def test_orders_are_a_function_of_seed_and_epoch():
    one, same = mixed(2, 1), mixed(4, 2)
    assert np.array_equal(one.order(1, 2), same.order(1, 2))
    others = [one.order(1, 3), one.order(2, 2), mixed(1, 1).order(1, 2)]
    assert not any(np.array_equal(other, one.order(1, 2)) for other in others)
    turns = [i % 90 for i in mixed(1, 99, sizes=(80, 10)).order(0, 0).tolist() if i % 90 >= 80]
    assert turns[:10] != turns[10:20], "another order in each turn"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_goes_on_with_the_same_batches(folders, tmp_path, num_workers):
    root = f"{folders[0]}:1 {folders[1]}:9"
    whole = take(20, make_config(), opened(root, tmp_path / "cache"))  # an epoch has 12 steps
    for step in (1, 11, 12, 15):
        source = opened(root, tmp_path / "cache")
        assert_equal(take(20 - step, make_config(num_workers), source, step=step), whole[step:])


def test_a_batch_shows_the_images_that_were_drawn(folders, tmp_path):
    source = opened(f"{folders[0]}:1 {folders[1]}:9", tmp_path / "cache")
    batches = start(make_config(), source)
    assert batches.steps_per_epoch == 12
    keys = [key for step in range(12) for key in batches.plan.micro_batch(step, 0, 0)]
    assert [index for _, index in keys] == source.order(3, 0)[:48].tolist()
    assert sum(index % 50 >= 40 for _, index in keys) > 35


def test_views_of_an_image_that_comes_again_differ(tmp_path):
    write(tmp_path / "one/a.png", noise(1, 36))
    photos(tmp_path / "many")
    source = opened(f"{tmp_path}/one:9 {tmp_path}/many:1", tmp_path / "cache")
    views = [v.numpy().tobytes() for batch in take(5, make_config(), source) for v in batch.views["global"][0]]
    assert len({*views}) == 20


def test_bad_images_are_named_with_their_source(folders, tmp_path):
    for path in folders[1].rglob("*.*"):
        path.write_bytes(b"")
    source = opened(f"{folders[0]}:1 {folders[1]}:1", tmp_path / "cache")
    bad = [image for batch in take(12, make_config(), source) for image in batch.bad]
    assert len(bad) > 12
    assert all(image.startswith(f"{folders[1]}: ") for image in bad)


def test_sources_of_any_kind(folders, tmp_path):
    write_tar(tmp_path / "t/0.tar", [("a.png", png())])
    config = {"num_images": 5, "image_size": 8}
    source = opened(f"shapes:1 {tmp_path}/t:1 '{folders[0]}':1", tmp_path / "cache", **config)
    assert len(source) == 46
    assert source.read(5)[0].shape == (16, 16, 3)
    assert Config(data=DataConfig(root="shapes:1 /x:1", num_images=5)).ignored() == []


def test_a_mixture_in_a_file(folders, tmp_path):
    want = opened(f"{folders[0]}:3 {folders[1]}:1", tmp_path / "cache")
    (tmp_path / "mix.yaml").write_text(f"# photos\na: 3\n{folders[1]}: 1.0\n")
    source = opened(tmp_path / "mix.yaml", tmp_path / "cache")
    assert source.fingerprint() == want.fingerprint()
    assert np.array_equal(source.order(0, 0), want.order(0, 0))
    (tmp_path / "mix.yml").write_text("shapes: 1\nb: 1\n")
    assert len(opened(tmp_path / "mix.yml", tmp_path / "cache", num_images=5)) == 15


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 0\nb: 1\n", "the weight of a is 0, and it must be a positive number"),
        ("a: x\nb: 1\n", "the weight of a is 'x'"),
        ("a: .nan\nb: 1\n", "the weight of a is nan"),
        ("a: yes\nb: 1\n", "the weight of a is True"),
        ("a: 1\n", "lists no mixture: write two lines"),
        ("- a\n- b\n", "lists no mixture"),
        ("", "lists no mixture"),
        ("a: [\n", r"cannot read .*mix\.yaml: while parsing"),
        ("a: 1\nnowhere: 1\n", r"/nowhere' does not exist"),
    ],
)
def test_a_file_that_is_no_mixture(folders, tmp_path, text, says):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        opened(tmp_path / "mix.yaml", tmp_path / "cache")


@pytest.mark.parametrize(
    ("root", "says"),
    [
        ("{a}:0.7 {b}", "and /.*/b has no weight: write a:0.7 b:0.3"),
        ("{a}:0.7 {b}:0", "their weights must be positive"),
        ("{a}:0.7 {b}:-1", "their weights must be positive"),
        ("{a}:nan {b}:1", "their weights must be positive"),
        ("{a}:inf {b}:1", "their weights must be positive"),
        ("{a}:1 {a}:1", "names a source twice: add its weights"),
        ("{a}:1 /nowhere:1", "'/nowhere' does not exist"),
        ("{a} {b}", "does not exist"),
    ],
)
def test_weights_that_cannot_be(folders, tmp_path, root, says):
    with pytest.raises(ConfigError, match=says):
        opened(root.format(a=folders[0], b=folders[1]), tmp_path / "cache")


def test_what_is_a_mixture():
    assert mixture("a:0.7 b:0.3") == [("a", 0.7), ("b", 0.3)]
    assert mixture("'my pics:1':2 s3://x/y:1e-1") == [("my pics:1", 2.0), ("s3://x/y", 0.1)]
    for one in ("a", "a:0.7", "/my pics", "it's", "s3://x/y", ""):
        assert mixture(one) == []


def test_a_folder_of_any_name_is_one_source(tmp_path):
    for name in ("a b", "a:1 b:2", "it's"):
        photos(tmp_path / name, each=1)
        assert isinstance(opened(tmp_path / name, tmp_path / "cache"), FolderSource)


@pytest.mark.parametrize(
    ("flags", "root"),
    [
        (["--data.root", "a:0.7", "b c:0.3", "--run.epochs", "20"], "a:0.7 'b c:0.3'"),
        (["--run.epochs", "20", "--data.root", "a b"], "a b"),
        (["--data.root", "a", "--run.epochs", "20"], "a"),
        (["--data.root=a:1 b:2"], "a:1 b:2"),
    ],
)
def test_several_words_on_the_command_line(flags, root):
    config = configured("vit_small_16", flags)
    assert config.data.root == root
    assert config.run.epochs == (20 if "20" in flags else 100)


def test_fingerprints_follow_sources_and_weights():
    seen = {mixed(*weights, sizes=sizes).fingerprint() for weights, sizes in
            [((1, 2), (5, 6)), ((1, 1), (5, 6)), ((1, 2), (5, 7)), ((2, 1), (5, 6))]}  # fmt: skip
    assert len(seen) == 4
    assert mixed(1, 2).fingerprint() == mixed(10, 20).fingerprint()
