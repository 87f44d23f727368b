"""What SLURM's states, exit codes and log lines mean."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tasks.jobs.status import Cause, State, Status

_PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
_CAUSES = {
    "TIMEOUT": Cause.TIMEOUT,
    "DEADLINE": Cause.TIMEOUT,
    "NODE_FAIL": Cause.NODE_FAIL,
    "BOOT_FAIL": Cause.NODE_FAIL,
    "OUT_OF_MEMORY": Cause.OUT_OF_MEMORY,
    "PREEMPTED": Cause.PREEMPTED,
    "CANCELLED": Cause.CANCELLED,
    "REVOKED": Cause.CANCELLED,
}
_NO_REASON = ("", "None", "(null)")

_RANKS_ENDED = re.compile(r"^srun: error: \S+: tasks? ([\d,-]+): (.+?)\s*$", re.MULTILINE)
_OUT_OF_MEMORY = re.compile(r"exceeded (job |step )?memory limit|oom[-_ ]kill|out of memory handler", re.IGNORECASE)
_NODE_FAILED = re.compile(r"^srun: error: Node failure on (\S+)", re.MULTILINE)


def status_of(state: str, exit_code: str = "", derived: str = "", reason: str = "") -> Status:
    """A state as squeue or sacct writes it, such as 'CANCELLED by 0', in our words.

    Args:
        exit_code, derived: as <exit code>:<signal>, of the script and the worst of its steps.
        reason: why the job waits, or was held.
    """
    word = (state.split() or ["UNKNOWN"])[0].rstrip("+").upper()
    reason = "" if reason in _NO_REASON else reason
    if word in _PENDING or word in _RUNNING:
        return Status("pending" if word in _PENDING else "running", None, reason)
    if word in ("COMPLETED", "UNKNOWN"):
        return Status("completed" if word == "COMPLETED" else "unknown")
    cause = _CAUSES.get(word, Cause.ERROR)
    ending: State = "cancelled" if cause is Cause.CANCELLED else "failed"
    codes = [f"exit code {code}" for code in (derived, exit_code) if code not in ("", "0:0")][:1]
    own_words = " ".join(state.split()) if word == "CANCELLED" else word
    return Status(ending, cause, ", ".join([f"SLURM: {own_words}", *codes, *([reason] if reason else [])]))


def cause_in_log(log: str) -> Cause | None:
    """What srun and the nodes write when accounting says FAILED only."""
    if _OUT_OF_MEMORY.search(log):
        return Cause.OUT_OF_MEMORY
    return Cause.NODE_FAIL if _NODE_FAILED.search(log) else None


def ranks_in_log(log: str) -> dict[int, str]:
    """How ranks ended by srun's lines, such as 'srun: error: node2: tasks 2-3: Killed', in their order.

    Those that were ended because another one had are not among them.
    """
    ended: dict[int, str] = {}
    for ranks, how in _RANKS_ENDED.findall(log):
        if how != "Terminated":
            ended |= {rank: how[0].lower() + how[1:] for rank in _numbers(ranks) if rank not in ended}
    return ended


def _numbers(ranges: str) -> Iterator[int]:
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
