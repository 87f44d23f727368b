"""Each event reaches each address once, and no address is named anywhere."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tasks.watch.memory import Memory
from tasks.watch.notify import Event, tell
from tests.tasks.watch.receiver import receiving

FAILURE = Event("failure", "failed 7", "train failed", "mend it")


def test_each_address_is_told_once_and_the_next_time_if_it_was_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def look(event: Event = FAILURE) -> None:
        tell(event, "toy: failure", f"{event.text}; next: {event.todo}", Memory.of(tmp_path))

    with receiving() as here, receiving() as away, caplog.at_level(logging.INFO, logger="tasks"):
        monkeypatch.setenv("LLEMMA_NOTIFY_URLS", f"{here.url('alerts')} {away.url('chat')} no-such-scheme://secret")
        away.refusing = True
        look()
        look()
        away.refusing = False
        look()
        look()
        assert here.messages("alerts") == away.messages("chat") == ["train failed; next: mend it"]
        assert here.received[0][1]["title"] == "toy: failure"
        look(Event("failure", "failed 8", "train failed again", ""))
        assert len(here.messages("alerts")) == 2
    assert "address 2 of LLEMMA_NOTIFY_URLS does not take 'toy: failure'" in caplog.text
    assert "address 3 of" in caplog.text
    assert "secret" not in caplog.text + (tmp_path / "watch.json").read_text()


def test_without_addresses_nothing_is_told_or_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLEMMA_NOTIFY_URLS", raising=False)
    tell(FAILURE, "toy: failure", "train failed", Memory.of(tmp_path))
    assert list(tmp_path.iterdir()) == []
