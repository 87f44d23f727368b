"""Flows side by side: whose error counts, and that a signal to the main thread ends them all."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from flows.flow_runs.interruption import raise_if_interrupted, side_by_side


def test_results_come_in_the_flows_order_and_the_flows_run_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=300)

    def flow(name: str) -> str:
        both.wait()
        return f"{name} of {threading.get_ident()}"

    results = side_by_side("config", flow, flow)
    assert len(set(results)) == 2
    assert all(result.startswith("config of ") for result in results)


def test_the_first_flows_error_counts_though_the_second_failed_before() -> None:
    second_failed = threading.Event()

    def train(config: str) -> None:
        assert second_failed.wait(300)
        raise ValueError("train")

    def evaluate(config: str) -> None:
        second_failed.set()
        raise ValueError("evaluate")

    with pytest.raises(ValueError, match="train"):
        side_by_side("config", train, evaluate)


def test_training_is_not_given_up_when_evaluation_fails() -> None:
    ended = threading.Event()

    def train(config: str) -> None:
        time.sleep(0.2)
        raise_if_interrupted()
        ended.set()

    def evaluate(config: str) -> None:
        raise ValueError("evaluate")

    with pytest.raises(ValueError, match="evaluate"):
        side_by_side("config", train, evaluate)
    assert ended.is_set()


@pytest.fixture
def _hears_interrupts() -> Iterator[None]:
    """Also where the tests are a shell's background job, which begins with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_hears_interrupts")
def test_a_signal_to_the_main_thread_ends_every_flow() -> None:
    both = threading.Barrier(2, timeout=300)
    heard: list[str] = []

    def flow(config: str) -> None:
        if both.wait() == 0:
            os.kill(os.getpid(), signal.SIGINT)
        try:
            for _ in range(6000):
                raise_if_interrupted()
                time.sleep(0.01)
        except KeyboardInterrupt:
            heard.append(config)
            raise

    with pytest.raises(KeyboardInterrupt):
        side_by_side("config", flow, flow)
    assert heard == ["config", "config"]
    raise_if_interrupted()  # it is over: nothing else is interrupted
