"""Set-up for every test: Triton's interpreter and no gpu-marked tests where there is no GPU."""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before anything imports fastdino_kernels
torch.set_num_threads(1)  # the networks are tiny, and two threads wait for each other when anything else runs
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


# Files of half a minute and more begin first, so that no worker is left alone with one; the others fill what is left.
LONG = {
    "test_engine", "test_zero3", "test_faults", "test_trainer", "test_footprint", "test_step_bench", "test_graphs",
    "test_two_hosts", "test_slurm", "test_demo", "test_online_knn", "test_ranks", "test_front_door", "test_planted",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish():
    """Engines, counters and tests collect garbage: what has been imported by now is none, and takes long to look at."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _product_path(request, monkeypatch):
    """Outside tests/kernels a CPU runs what users run there, the references: the interpreter is for judging kernels."""
    if "kernels" not in request.path.parts[-2:]:
        monkeypatch.setattr("fastdino_kernels._backend.INTERPRETED", False)
