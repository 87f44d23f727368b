"""How a rank's end is recorded and what its exit code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox_core.errors import GO_ON_EXIT_CODE, StoppedError, TrainingError
from tasks.jobs.rank import RankTask
from tasks.jobs.rank_record import read_failure


def fail(error: Exception) -> None:
    raise error


def test_a_training_that_was_told_to_stop_says_go_on(tmp_path: Path) -> None:
    task = RankTask(fail, (StoppedError("stopped after step 6, which is saved: run again"),), tmp_path)
    with pytest.raises(SystemExit) as ended:
        task.run(3)
    assert ended.value.code == GO_ON_EXIT_CODE
    failure = read_failure(tmp_path, 0, 3)
    assert failure is not None
    assert failure.message == "stopped after step 6, which is saved: run again"


def test_another_error_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(TrainingError):
        RankTask(fail, (TrainingError("nan"),), tmp_path).run(0)
