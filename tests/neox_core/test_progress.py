"""The time that is left of work."""

from __future__ import annotations

import pytest

from neox_core import progress
from neox_core.progress import short_time, with_time_left


def test_the_time_left_follows_from_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[float, str]] = []
    clock = iter([0.0, 60.0, 120.0, 130.0, 140.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    report = with_time_left(lambda share, text: said.append((share, text)))
    report(0.5, "found")  # what an earlier attempt has done
    report(0.5, "step 5")
    report(0.75, "step 7")
    report(0.8, "step 8, 3 min left")
    report(1.0, "done")
    assert said == [
        (0.5, "found"),
        (0.5, "step 5"),
        (0.75, "step 7, about 2 min left"),
        (0.8, "step 8, 3 min left"),
        (1.0, "done"),
    ]


def test_times_are_short() -> None:
    times = [short_time(seconds) for seconds in (12.9, 300, 12_000, 1_050_000)]
    assert times == ["12 s", "5 min", "3 h 20 min", "12 d 3 h"]
