"""The schedulers by the names that a configuration gives them."""

from __future__ import annotations

from collections.abc import Callable

from neox_core.errors import LaunchError
from tasks.jobs.executor import Executor
from tasks.jobs.local import LocalExecutor
from tasks.jobs.slurm import commands
from tasks.jobs.slurm.executor import SlurmExecutor

_EXECUTORS: dict[str, Callable[[], Executor]] = {"local": LocalExecutor, "slurm": SlurmExecutor}


def register_executor(name: str, make: Callable[[], Executor]) -> None:
    """Let configurations choose a scheduler by this name."""
    _EXECUTORS[name] = make


def choose_executor(name: str) -> str:
    """The name of a scheduler; for 'auto', slurm if its controller answers, else local."""
    if name == "auto":
        return "slurm" if commands.answers() else "local"
    return name


def executor_named(name: str) -> Executor:
    """The scheduler of this name.

    Raises:
        LaunchError: there is none.
    """
    if name not in _EXECUTORS:
        raise LaunchError(f"there is no executor {name!r}: choose one of auto, {', '.join(sorted(_EXECUTORS))}")
    return _EXECUTORS[name]()
