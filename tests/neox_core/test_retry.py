from __future__ import annotations

import pytest

from neox_core.retry import Failure, RetryPolicy


def test_pauses_grow_up_to_the_longest_and_differ() -> None:
    policy = RetryPolicy(1e9, first_wait=1.0, longest_wait=60.0)
    for attempts, allowed in [(1, 1.0), (2, 2.0), (4, 8.0), (7, 60.0), (5000, 60.0)]:
        waits = [policy.wait(attempts) for _ in range(50)]
        assert all(allowed / 2 <= wait <= allowed for wait in waits)
        assert len(set(waits)) > 1


def test_it_tries_until_it_succeeds() -> None:
    failures: list[Failure] = []
    pauses: list[float] = []
    errors = iter([OSError("first"), OSError("second")])

    def attempt() -> str:
        for error in errors:
            raise error
        return "done"

    assert RetryPolicy(1e9).call(attempt, lambda _: True, failures.append, pauses.append) == "done"
    assert [(str(failure.error), failure.attempts) for failure in failures] == [("first", 1), ("second", 2)]
    assert pauses == [failure.wait for failure in failures]


def test_it_gives_up_and_raises_the_last_error() -> None:
    failures: list[Failure] = []

    def attempt() -> None:
        raise OSError(f"attempt {len(failures)}")

    with pytest.raises(OSError, match="attempt 0"):
        RetryPolicy(0.0).call(attempt, lambda _: True, failures.append)
    assert [failure.wait for failure in failures] == [0.0]


def test_what_cannot_pass_is_raised_at_once() -> None:
    with pytest.raises(ZeroDivisionError):
        RetryPolicy(1e9).call(lambda: 1 // 0, lambda error: isinstance(error, OSError))
