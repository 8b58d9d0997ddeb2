"""Prometheus, node_exporter and Weights & Biases are told what metrics.jsonl says; none of them ends a run."""

import importlib
import json
import logging
import math
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import fastdino
from fastdino import cli
from fastdino.config import Config, ConfigError, RunConfig
from fastdino.distributed import Ranks
from fastdino.training.metrics import Metrics
from fastdino.training.monitoring import monitors
from fastdino.training.monitoring.monitors import Monitors
from tests.training.test_trainer import tiny

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """W&B as a new process has it, for which a test sets the environment."""
    module = importlib.import_module("wandb")
    module.teardown()
    yield monkeypatch
    module.teardown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def config(folder: Path, **settings: Any) -> Config:
    return Config(run=RunConfig(dir=folder, **settings))


def parsed(text: str) -> dict[str, float]:
    """Values by name; all have the run's label."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert len({sample.labels["run"] for sample in samples}) == 1
    return {sample.name.removeprefix("fastdino_"): sample.value for sample in samples}


def scraped(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://localhost:{port}/metrics") as answer:
        return parsed(answer.read().decode())


def newest(folder: Path) -> dict[str, float]:
    """The newest number of each name in metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: value for line in lines for name, value in line.items() if not isinstance(value, str)}


def test_a_scrape_and_the_textfile_are_what_metrics_says(tmp_path, monkeypatch):
    """Of a real run, scraped as its last step is logged."""
    port, found = free_port(), {}
    original = Metrics.close

    def close(self: Metrics) -> None:
        found.update(scraped(port))
        original(self)

    monkeypatch.setattr(Metrics, "close", close)
    run = tiny(tmp_path / 'a "run"', run__prometheus=port, run__knn_every=1, run__epochs=1)
    fastdino.train(run)
    said = newest(run.run.dir)
    names = {"loss", "knn", "rankme", "rankme_at_start", "images_per_second", "grad_norm_head", "skipped_steps"}
    assert names | {"seconds_backward"} <= said.keys()
    assert found == said
    assert parsed((run.run.dir / "metrics.prom").read_text()) == said
    with pytest.raises(OSError, match="refused"):
        scraped(port)


def test_numbers_that_are_none_are_told_as_prometheus_has_them(tmp_path):
    with Monitors(config(tmp_path, prometheus=free_port()), ALONE) as told:
        told.write(7, {"loss": math.nan, "grad_norm": math.inf, "protocol": "no number"})
        for values in (parsed((tmp_path / "metrics.prom").read_text()), scraped(told._config.run.prometheus)):
            assert (values["step"], values["grad_norm"]) == (7, math.inf)
            assert math.isnan(values["loss"])
            assert "protocol" not in values


def test_a_port_in_use_is_refused(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^run.prometheus={port} cannot be listened at \(Address already in"):
            fastdino.train(tiny(tmp_path / "run", run__prometheus=port))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "package"), [(["--run.prometheus", "9400"], "prometheus-client"), (["--run.wandb", "dino"], "wandb")]
)
def test_a_package_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capfd, flags, package):
    for name in ("prometheus_client", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "demo", "--run.dir", str(tmp_path / "run"), "--engine.device", "cpu", *flags])
    assert ended.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line]
    assert f"needs the package {package}" in line
    assert "pip install 'fastdino[monitoring]'" in line
    assert not (tmp_path / "run").exists()


def test_a_disk_that_refuses_is_warned_of_once(tmp_path, caplog):
    with Monitors(config(tmp_path / "gone"), ALONE) as told:
        told.write(1, {"loss": 1.0})
        told.write(2, {"loss": 2.0})
        (tmp_path / "gone").mkdir()
        told.write(3, {"loss": 3.0})
    assert caplog.text.count("metrics.prom cannot be told (No such file or directory)") == 1
    assert parsed((tmp_path / "gone/metrics.prom").read_text()) == {"step": 3, "loss": 3}
    assert [file.name for file in (tmp_path / "gone").iterdir()] == ["metrics.prom"]


def test_a_run_and_its_resumption_are_one_run_of_wandb(tmp_path, wandb):
    """By the real package, offline, whose files name what they were told."""
    wandb.setenv("WANDB_MODE", "offline")
    told = []
    for epochs in (1, 2):
        run = tiny(tmp_path / "run", run__wandb="dino", run__epochs=epochs, optim__schedule="constant").run.dir
        fastdino.train(tiny(run, run__wandb="dino", run__epochs=epochs, optim__schedule="constant"))
        told.append({path.parent.name: path.read_bytes() for path in run.glob("wandb/offline-run-*/run-*.wandb")})
        sleep(1.1)  # a folder of theirs has the second in its name
    kept = (run / "wandb.id").read_text()
    assert [len(files) for files in told] == [1, 2]
    for name, content in told[1].items():
        assert name.endswith(f"-{kept}")
        assert b"grad_norm_head" in content


def test_a_network_that_fails_is_warned_of_and_training_goes_on(tmp_path, wandb, caplog):
    """The real package, and a server that is not there."""
    wandb.setattr(monitors, "PATIENCE", 1.0)
    wandb.setenv("WANDB_MODE", "online")
    wandb.setenv("WANDB_BASE_URL", f"http://localhost:{free_port()}")
    wandb.setenv("WANDB_API_KEY", "a" * 40)
    with caplog.at_level(logging.WARNING), Monitors(config(tmp_path, wandb="dino"), ALONE) as told:
        for step in range(1, 4):
            told.write(step, {"loss": 1.0})
    assert caplog.text.count("Weights & Biases cannot be told") == 1
    assert "training goes on without" in caplog.text


def test_without_a_setting_neither_package_is_imported(tmp_path, monkeypatch):
    for name in ("prometheus_client", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with Monitors(config(tmp_path), ALONE) as told:
        told.write(1, {"loss": 1.0})
    assert (tmp_path / "metrics.prom").exists()
