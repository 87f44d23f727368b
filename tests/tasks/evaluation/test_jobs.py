"""Jobs whose checkpoints go before they are read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tasks.evaluation import jobs
from tasks.jobs.failure import JobFailed
from tests.neox_core.train.small_training import CONFIG


@pytest.mark.parametrize("stored", [{50}, {25, 50}])
def test_a_job_fails_because_a_checkpoint_has_left_the_store(
    stored: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIG.model_copy(update={"workdir": tmp_path})
    inputs = {"data": None, "weights": None, "lineage_checkpoints": lambda: dict.fromkeys(stored)}
    training = cast(Any, SimpleNamespace(**inputs))
    spec = cast(Any, SimpleNamespace(config=config, fingerprint="0" * 64))

    half = tmp_path / "scratch" / f"evaluate-{'0' * 8}{'1' * 8}"

    def fails(*_: Any) -> None:
        half.mkdir(parents=True)
        raise JobFailed("job 7 failed", final=True)

    monkeypatch.setattr(jobs, "require", lambda _: SimpleNamespace(summary={"sources": {}}, folder=tmp_path))
    monkeypatch.setattr(jobs, "fingerprint", lambda *_: "1" * 64)
    monkeypatch.setattr(jobs, "follow_to_end", fails)
    if 25 in stored:
        with pytest.raises(JobFailed, match="job 7"):
            jobs.evaluate_steps(spec, training, "prefix", [0, 25, 50], lambda text="", /: None)
    else:
        assert jobs.evaluate_steps(spec, training, "prefix", [0, 25, 50], lambda text="", /: None) == []
        assert "steps [25] are not evaluated, their checkpoints have left the store: job 7 failed" in caplog.text
    assert half.exists() == (25 in stored)
