"""A node's controller whose ranks are forks of it, since it has imported what they need: a start costs no imports."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from typing import Any
from unittest.mock import patch

from submitit.core.submission import process_job

from tasks.jobs.node import controller
from tasks.jobs.node.plan import NodePlan
from tasks.jobs.node.ranks import Ranks, rank_log


class Fork:
    """A child of this process; as much of subprocess.Popen as `Ranks` uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"process {self.pid} does not end"
            time.sleep(0.01)


class ForkedRanks(Ranks):
    """As its base class, without a new Python."""

    def _start(self, local_rank: int) -> None:
        rank = self._plan.first_rank + local_rank
        environment = self._environment(rank)
        pid = os.fork()
        if pid == 0:
            self._become(rank, environment)
        processes: Any = self._processes
        processes[rank] = Fork(pid)

    def _become(self, rank: int, environment: dict[str, str]) -> None:
        code = 1
        try:
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ.update(environment)
            with rank_log(self._plan, rank).open("ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            process_job(self._plan.folder)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def control(plan: str, log: str, environment: dict[str, str]) -> None:
    """Run a node's part of a job in this process, which ends with the job's exit code.

    Args:
        environment: the caller's; that of the fork server may be older.
    """
    os.environ.update(environment)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from tests.soak.kills import end_with_parent

    end_with_parent()
    with patch.object(controller, "Ranks", ForkedRanks):
        code = controller.Controller(NodePlan.from_json(plan)).run()
    sys.stdout.flush()
    os._exit(code)
