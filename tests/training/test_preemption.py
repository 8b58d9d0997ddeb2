"""A notice: the work at hand is finished or given up in seconds, and nothing keeps a process from ending."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fastdino.training import preemption
from fastdino.training.preemption import Interrupted, PreemptionNotice
from tests.children import environment


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_notice_is_noticed_and_handlers_are_put_back(number):
    before = [signal.getsignal(s) for s in preemption.SIGNALS]
    with PreemptionNotice() as notice:
        assert not notice.given
        os.kill(os.getpid(), number)
        assert notice.given
    assert [signal.getsignal(s) for s in preemption.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert not [thread for thread in threading.enumerate() if thread.name == "preemption"]


@pytest.mark.parametrize("given", ["before", "during"])
@pytest.mark.parametrize("grace", [0.0, 0.5])
def test_work_is_interrupted_when_its_grace_is_over(given, grace):
    """A read that hangs, as from a file system that is gone."""
    hang, _ = os.pipe()
    with PreemptionNotice() as notice:
        if given == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        started = time.monotonic()
        with pytest.raises(Interrupted), notice.interruptible(grace):
            os.read(hang, 1)
        assert grace - 0.1 < time.monotonic() - started < grace + 30


def test_work_that_ends_in_time_is_not_interrupted():
    with PreemptionNotice() as notice:
        with notice.interruptible(grace=2.0):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        time.sleep(2.5)  # what follows, a save, may take as long as it needs
        assert notice.given


def test_it_is_no_exception_that_a_decoder_could_catch():
    assert not issubclass(Interrupted, Exception)


def deaf() -> subprocess.Popen[str]:
    """A process whose main thread is in C code and stays there."""
    program = """
import ctypes
from fastdino.training import preemption
preemption.REPEAT = 2.0
with preemption.PreemptionNotice():
    print("ready", flush=True)
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # never returns, and no signal handler of Python runs meanwhile
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_sigterm_ends_a_process_that_hears_nothing():
    process = deaf()
    process.terminate()
    time.sleep(0.1)
    process.terminate()  # a launcher passes on what a scheduler sends to all: still the first
    time.sleep(3.0)
    assert process.poll() is None, "it may be saving"
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM


def test_a_thread_leaves_signals_to_the_program():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with PreemptionNotice() as notice, notice.interruptible():
            found.append((signal.getsignal(signal.SIGTERM), notice.given))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(before, False)]
