"""Accounts as containers give them: no name, no home, a long TMPDIR; each trains."""

import os
import subprocess
import sys
from pathlib import Path

from tests.children import environment

NAMES = ("USER", "LOGNAME", "LNAME", "USERNAME", "TRITON_HOME")
TRAIN = """
import pwd, sys
from pathlib import Path
def nobody(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = nobody
import fastdino
from fastdino import recipes
import dataclasses
base = recipes.get("demo")
run = dataclasses.replace(base.run, dir=Path(sys.argv[1]), epochs=1, local_batch=8, knn_every=0)
data = dataclasses.replace(base.data, num_images=16, image_size=32, num_workers=1)
views = dataclasses.replace(base.views, global_size=30, local_size=18, num_local=1)
optim = dataclasses.replace(base.optim, warmup_epochs=0)
config = dataclasses.replace(base, run=run, data=data, views=views, optim=optim)
sys.exit(fastdino.train(config).steps != 2)
"""


def python(code: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in environment().items() if name not in NAMES} | variables
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)


def test_an_account_that_lacks_things_trains(tmp_path):
    long = tmp_path / ("long" * 20)
    long.mkdir()
    done = python(TRAIN, tmp_path / "run", HOME="/dev/null/home", TMPDIR=str(long))
    assert done.returncode == 0, done.stderr
    assert "TMPDIR is too long" in done.stderr


def test_triton_compiles_into_a_folder_of_ones_own():
    code = "import fastdino, os; home = os.environ['TRITON_HOME']; print(home, oct(os.stat(home).st_mode & 0o777))"
    folder, mode = python(code, HOME="/dev/null/home").stdout.split()
    assert mode == "0o700"
    assert Path(folder).stat().st_uid == os.getuid()
    assert python(code, HOME="/dev/null/home").stdout.split()[0] == folder, "what is compiled is found again"


def test_no_folder_for_temporary_files_is_said(tmp_path):
    """Where none may be written; what needs none works all the same."""
    code = """
import tempfile
def none():
    raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")
tempfile.gettempdir = none
from fastdino import cli
cli.main(["recipes"])
"""
    done = python(code, HOME="/dev/null/home")
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr == "No usable temporary directory found in ['/tmp']: set TMPDIR to a folder that may be written\n"
    )
    assert "vit_small_16" in done.stdout


def test_nothing_is_set_where_nothing_lacks(tmp_path):
    code = "import os; before = dict(os.environ); import fastdino; print(dict(os.environ) == before)"
    assert python(code, HOME=str(tmp_path), USER="me", TMPDIR="/tmp").stdout == "True\n"
