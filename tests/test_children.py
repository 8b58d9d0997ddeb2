"""Forks stand in for processes of their own: their environment, their end and what they say are those."""

import os
import signal
import sys
import time
import weakref

import pytest

from tests.children import forked, python


class Kept:
    pass


def says(variable: str) -> None:
    print(os.environ["RANK"], os.environ.get(variable), os.environ.get("TRITON_INTERPRET"), flush=True)


def fails(last: int) -> None:
    """On rank 1."""
    if os.environ["RANK"] == "1":
        sys.stderr.write("rank 1 fails\n")
        os.kill(os.getpid(), last) if last else sys.exit(85)


def leaves() -> None:
    kept = Kept()
    weakref.finalize(kept, print, "finalized")
    sys.modules["kept"] = kept  # type: ignore[assignment]


def test_ranks_have_their_place_and_the_variables_that_are_set() -> None:
    done = forked(says, "SET", ranks=2, SET="here")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["0 here None", "1 here None"], "no interpreter of Triton's"


@pytest.mark.parametrize(("number", "code"), [(0, 85), (signal.SIGKILL, -9)])
def test_one_rank_that_fails_is_the_exit_code(number: int, code: int) -> None:
    done = forked(fails, number, ranks=2)
    assert (done.returncode, done.stderr) == (code, "rank 1 fails\n")


def test_one_that_does_not_end_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="1 of 1 have not ended"):
        forked(time.sleep, 600, timeout=0.5)


def test_its_end_is_that_of_an_interpreter() -> None:
    """What was left to it is done: processes that make views end so."""
    assert forked(leaves).stdout == "finalized\n"


def test_python_takes_code_and_modules() -> None:
    done = forked(python, "-c", "import sys; print(sys.argv, __name__); sys.exit(3)", "a", "b")
    assert (done.returncode, done.stdout) == (3, "['-c', 'a', 'b'] __main__\n")
    assert forked(python, "-m", "bench.record", "none").returncode == 0
