"""Starts a node's ranks, ends all of them when one fails on any node, and starts them again if that may help.

`python -m tasks.jobs.node.controller PLAN` is started by `tasks.jobs.local`; on SLURM it is the node's task. A rank
that has died or hung costs the job no more than the way back to the newest checkpoint, whose files lie on this node.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from functools import partial
from types import FrameType

from infra.ports import hold_port, port_of
from infra.processes import ProcessRecord
from neox_core.errors import GO_ON_EXIT_CODE, SUPERSEDED_EXIT_CODE
from neox_core.storage.full_disk import is_full
from tasks.jobs.node.agreement import Agreement, Failure, Memory, meeting_store
from tasks.jobs.node.plan import NodePlan
from tasks.jobs.node.ranks import Ranks, rank_log
from tasks.jobs.node.report import ControllerReport, ending
from tasks.jobs.rank_record import forget, last_words, read_failure

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_FAILURE_GRACE_SECONDS = 5.0
"""Time for the other ranks to notice a failed one by themselves and say what they saw."""
_SIGNAL_SECONDS = 30.0
"""Before the time limit, at most, for ranks to be told of it."""
_SIGNAL_AGAIN_SECONDS = 2.0
"""A signal reaches a rank that is about to start too early."""


class Controller:
    """Runs one node's ranks to their end, in one life or in several."""

    def __init__(self, plan: NodePlan) -> None:
        self._plan, self._told, self._told_at = plan, 0, float("-inf")
        self._starting = False
        self._started = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._on_signal)
        self._report = ControllerReport(ProcessRecord.of(os.getpid()))
        self._write_report()
        several = plan.nodes > 1
        self._store = meeting_store(plan.address, plan.port, plan.node, plan.nodes) if several else Memory()
        self._agreement = Agreement(self._store, plan.node, plan.nodes)
        self._saved = plan.restarts.saved_so_far() if plan.restarts else 0
        self._reasons: list[str] = []

    def run(self) -> int:
        """Run the ranks; the job's exit code."""
        life = 0
        while True:
            ranks = Ranks(self._plan, self._meeting_place(life))
            try:
                self._start(ranks)
                failure = self._watch(ranks, life)
            finally:
                ranks.kill()
            if failure is None:
                return 0
            self._agreement.meet(f"{life}/ended")  # only then no rank of this life can write any more
            if self._agreement.of_first(f"{life}/decision", partial(self._decision, failure)) != "restart":
                self._agreement.part(f"{life}/decided")
                return failure.exit_code
            life += 1

    def _meeting_place(self, life: int) -> dict[str, str]:
        """Variables that tell ranks where they meet, anew in each life."""
        if self._plan.nodes == 1:  # the host's name need not resolve on a laptop, and nobody else is to be reached
            self._held = hold_port()  # the first rank listens there, which it takes a while to do
            return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port_of(self._held))}
        if self._plan.node == 0:
            self._ranks_store = meeting_store(self._plan.address, 0, 0, self._plan.nodes)
        port = self._agreement.of_first(f"{life}/port", lambda: str(self._ranks_store.port))
        hosted = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        return {"MASTER_ADDR": self._plan.address, "MASTER_PORT": port, **hosted}

    def _start(self, ranks: Ranks) -> None:
        """Signals wait meanwhile: they would miss a rank half started."""
        self._starting = True
        for local_rank in range(self._plan.ranks):
            forget(self._plan.folder, self._plan.index, self._plan.first_rank + local_rank)
        self._report.exits, self._report.ranks = [], ranks.start()
        self._write_report()
        self._starting = False
        if self._told:
            self._on_signal(self._told, None)

    def _watch(self, ranks: Ranks, life: int) -> Failure | None:
        """Wait until the ranks of all nodes have returned (None), or some have not and the others' grace is over."""
        failed_at, finished = None, False
        while True:
            exits = ranks.exits()
            self._note(exits, life, ranks.killed_for)
            if not finished and len(exits) == self._plan.ranks and not any(exits.values()):
                self._agreement.finish(life)
                finished = True
            if failure := self._agreement.failure(life):
                failed_at = failed_at or time.monotonic()
                if len(exits) == self._plan.ranks or time.monotonic() - failed_at > _FAILURE_GRACE_SECONDS:
                    return failure
            elif finished and self._agreement.all_finished(life):
                self._agreement.part(f"{life}/returned")
                return None
            if self._time_is_over():
                self._agreement.fail(life, Failure("its time limit is over", decided=True))
                return self._agreement.failure(life)
            self._pass_on_signals(ranks)
            ranks.kill_stopped()
            time.sleep(_POLL_SECONDS)

    def _note(self, exits: dict[int, int], life: int, killed_for: Mapping[int, str]) -> None:
        """Write down which ranks have ended, and say so if one has not returned."""
        known = {rank for rank, _ in self._report.exits}
        new = [(rank, code) for rank, code in exits.items() if rank not in known]
        if not new:
            return
        self._report.exits += new
        self._write_report()
        failures = [self._failure(rank, code, killed_for.get(rank, "")) for rank, code in new if code]
        for failure in failures:
            _log.error("%s", failure.reason)
        if failures:  # one that could not say anything comes before those that noticed it
            self._agreement.fail(life, min(failures, key=lambda failure: failure.decided))

    def _failure(self, rank: int, code: int, killed_for: str) -> Failure:
        record = read_failure(self._plan.folder, self._plan.index, rank)
        exit_code = GO_ON_EXIT_CODE if self._told or code == GO_ON_EXIT_CODE else 1
        if record is not None:
            return Failure(f"rank {rank}: {record.message}", record.decided or bool(self._told), exit_code)
        said = f"rank {rank} {killed_for or ('was ' if code < 0 else '') + ending(code)}"
        reason = f"{said} without a Python error; last words: {last_words(rank_log(self._plan, rank))}"
        return Failure(reason, bool(self._told) or code == SUPERSEDED_EXIT_CODE, exit_code)

    def _time_is_over(self) -> bool:
        """Whether the job must end, where no scheduler sees to that; first it is told that the end is near."""
        if self._plan.seconds is None:
            return False
        left = self._plan.seconds - (time.monotonic() - self._started)
        if left < min(_SIGNAL_SECONDS, self._plan.seconds / 2):
            self._told = self._told or signal.SIGUSR2
        if left > 0:
            return False
        self._report.timed_out = True
        self._write_report()
        return True

    def _pass_on_signals(self, ranks: Ranks) -> None:
        if self._told and time.monotonic() - self._told_at > _SIGNAL_AGAIN_SECONDS:
            self._told_at = time.monotonic()
            ranks.send(signal.Signals(self._told))

    def _decision(self, failure: Failure) -> str:
        """On the first node, for all: 'restart' or 'end'."""
        restarts = self._plan.restarts
        if restarts is None:
            return "end"
        if (saved := restarts.saved_so_far()) > self._saved:
            self._saved, self._reasons = saved, []
        if failure.decided or self._told:
            return "end"
        self._reasons.append(failure.reason)
        self._report.restarts = self._reasons
        self._write_report()
        if len(self._reasons) > restarts.limit:
            for number, reason in enumerate(self._reasons, start=1):
                _log.error("end %d without a new checkpoint: %s", number, reason)
            return "end"
        _log.warning(
            "starting all ranks again (%d of %d times without a new checkpoint)", len(self._reasons), restarts.limit
        )
        return "restart"

    def _write_report(self) -> None:
        try:
            self._report.write(self._plan.folder, self._plan.node)
        except OSError as error:  # who reads it sees the one before; the ranks are more than that
            if not is_full(error):
                raise
            _log.error("%s has no room for the report of node %d: free some", self._plan.folder, self._plan.node)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._told = number
        if not self._starting and number == signal.SIGTERM and not self._plan.is_told_to_stop:
            sys.exit(128 + number)  # `run` ends the ranks on the way out


def main() -> None:
    """Run the part of a job that the command line describes."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.exit(Controller(NodePlan.from_json(sys.argv[1])).run())


if __name__ == "__main__":
    main()
