"""Training called from where a program is not the main one: a thread, a process of a pool, a spawned one."""

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

import fastdino
from fastdino.training.trainer import Result
from tests.children import environment
from tests.training.test_trainer import tiny


def steps_of(folder: Path) -> int:
    """A run with workers of its own, as far as the caller may have some."""
    return fastdino.train(tiny(folder, data__num_workers=1, run__epochs=1)).steps


def test_in_a_thread(tmp_path):
    """As a notebook's executor or a sweep calls it: signals stay the program's."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(steps_of, tmp_path / "run").result() == 5
    assert threading.current_thread() is threading.main_thread()


def test_in_a_process_of_a_pool(tmp_path):
    """Which may not start processes of its own."""
    spawned = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, environment(), clear=True), spawned.Pool(1) as pool:
        assert pool.apply(steps_of, [tmp_path / "run"]) == 5


def test_one_after_another_and_a_failed_one_between(tmp_path):
    """The cells of a notebook."""
    found: list[Result] = []
    for name in ("one", "two"):
        found.append(fastdino.train(tiny(tmp_path / name, run__epochs=1)))
        with pytest.raises(fastdino.ConfigError):
            fastdino.train(tiny(tmp_path / "none", data__root="/no/such/folder"))
    assert found[0].loss == found[1].loss
