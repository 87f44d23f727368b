"""What tests lean on: who waits for a helper that has died learns of it at once, with the reason."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from tests.distributed import run_ranks
from tests.meanwhile import meanwhile


def die() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


def test_a_rank_that_is_killed_is_not_waited_for() -> None:
    with pytest.raises(AssertionError, match="rank 1 has ended with exit code -9, without a word"):
        run_ranks(die, 2)


def fail() -> None:
    raise ValueError("dead")


def test_a_thread_that_fails_ends_the_wait_for_it() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(ValueError, match="dead"), meanwhile(fail):
        threading.Event().wait()  # for ever
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_failure_is_heard_after_a_signal_that_was_not() -> None:
    go_on, signals, waited = threading.Event(), list[int](), list[bool]()

    def fail_late() -> None:
        assert go_on.wait(300)
        fail()

    def miss_one_and_wait() -> None:
        interrupt = signal.signal(signal.SIGUSR1, lambda number, _: signals.append(number))
        go_on.set()
        while not signals:
            time.sleep(0.01)
        signal.signal(signal.SIGUSR1, interrupt)
        waited.append(threading.Event().wait(60))

    with pytest.raises(ValueError, match="dead"), meanwhile(fail_late):
        miss_one_and_wait()
    assert not waited


def test_a_thread_around_another_fails() -> None:
    go_on = threading.Event()

    def fail_late() -> None:
        assert go_on.wait(300)
        fail()

    with pytest.raises(ValueError, match="dead"), meanwhile(fail_late), meanwhile(go_on.set):
        threading.Event().wait()


def test_what_the_block_raises_comes_out() -> None:
    done = threading.Event()
    with pytest.raises(KeyError), meanwhile(done.set):
        raise KeyError
    assert done.is_set()
