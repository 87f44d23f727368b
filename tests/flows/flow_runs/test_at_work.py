from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.flow_runs.at_work import at_work, end_process, forget_process, has_died

RUN = "b9f5"
HOLD = """
import sys, time
from pathlib import Path
from flows.flow_runs.at_work import at_work
with at_work(Path(sys.argv[1]), "b9f5"):
    print("at work", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_is_told_from_one_that_has_ended(tmp_path: Path) -> None:
    assert has_died(tmp_path, RUN) is None
    with at_work(tmp_path, RUN):
        assert has_died(tmp_path, RUN) is False
    assert has_died(tmp_path, RUN) is None
    with pytest.raises(ValueError, match="refused"), at_work(tmp_path, RUN):
        raise ValueError("refused")
    assert has_died(tmp_path, RUN) is None
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert has_died(tmp_path, RUN) is False
        os.kill(process.pid, signal.SIGKILL)
    assert has_died(tmp_path, RUN) is True
    end_process(tmp_path, RUN)  # which has nothing to do
    forget_process(tmp_path, RUN)
    assert has_died(tmp_path, RUN) is None


def test_a_process_of_this_host_can_be_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr("socket.gethostname", lambda: "other")
            end_process(tmp_path, RUN)
        assert has_died(tmp_path, RUN) is False
        end_process(tmp_path, RUN)
        assert process.wait(300) == -signal.SIGTERM


def test_without_a_flow_run_there_is_nothing_to_lock(tmp_path: Path) -> None:
    with at_work(tmp_path, None):
        assert list(tmp_path.iterdir()) == []
