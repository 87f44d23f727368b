"""Looks at processes, which may end in any moment, and at such as have ended and nobody has waited for."""

from __future__ import annotations

import psutil


def command_of(process: psutil.Process) -> list[str]:
    """The words of its command; none of one that has ended, and of another user's."""
    try:
        return list(process.cmdline())
    except (psutil.Error, ProcessLookupError):
        return []


def is_running(pid: int) -> bool:
    """Whether a process has this id and has not ended."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
