"""``fastdino bench data``: what it measures, and what it advises for which figures."""

import dataclasses

import pytest

from fastdino.config import Config, ConfigError, DataConfig, RunConfig, ViewsConfig
from fastdino.data.speed import Speed, measure
from fastdino.data.views import fast
from tests.data.pictures import noise

SPEED = Speed(
    read=1e-5,
    decode=1.5e-3,
    packed=1.5e-3,
    reference=20e-3,
    fast=2.5e-3,
    device=1.6e-3,
    loader=2.1e-3,
    num_workers=2,
    shorter=375,
    bytes=95_000,
)


def test_cores_are_those_of_decoding_and_making_views():
    assert SPEED.advice(3500) == [
        "3,500 images/s need 14 cores per GPU: --data.num-workers 14",
        "where there are fewer, let the GPU make the views, --data.views device: 6 cores per GPU: --data.num-workers 6",
    ]
    (line,) = dataclasses.replace(SPEED, device=None).advice(250)
    assert line == "250 images/s need 1 core per GPU: --data.num-workers 1"
    lines = {line[:32].strip(): line[32:].split() for line in SPEED.table(3500, "views").splitlines()}
    assert lines["decode and views, fast"] == ["250", "14.0"]
    assert lines["for views by the device"] == ["625", "5.6"]
    assert lines["views, reference"] == ["50", "70.0"]
    assert lines["loader, 2 workers"] == ["238", "14.7"], "of one of its two workers"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fast": None}, "build the fast views, which make the same pixels several times as fast"),
        ({"decode": 16e-3}, "fastdino shard SRC DST --short-side 512, of which a core makes 4.6 times as many"),
        ({"read": 5e-3}, "reading takes longer than all else"),
    ],
)
def test_what_costs_most_is_what_is_advised(change, says):
    first, *_ = dataclasses.replace(SPEED, **change).advice(3500)
    assert says in first


def test_a_source_is_measured(tmp_path):
    for i in range(6):
        noise(i, 60).save(tmp_path / f"{i}.png")
    noise(6, 1500).resize((1500, 900)).save(tmp_path / "6.jpg", quality=60)
    (tmp_path / "7.jpg").write_bytes(b"not an image")
    config = Config(
        views=ViewsConfig(global_size=32, local_size=16, num_local=2),
        data=DataConfig(root=str(tmp_path), num_workers=1),
        run=RunConfig(local_batch=64),
    )
    found = measure(config, seconds=0.1)
    assert found.shorter == 60
    assert found.num_workers == 1
    assert 0 < found.packed < found.decode, "of the large one"
    assert found.loader > 0
    assert (found.fast is None) == bool(fast.why_not())
    assert found.fast is None or 0 < found.fast < found.reference
    assert found.device > 0


def test_a_source_of_which_nothing_can_be_read(tmp_path):
    (tmp_path / "7.jpg").write_bytes(b"not an image")
    with pytest.raises(ConfigError, match=r"none of 1 images of data\.root=.* can be read"):
        measure(Config(data=DataConfig(root=str(tmp_path))))
