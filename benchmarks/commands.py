"""Other programs that a benchmark runs, one after the other, and what they found; what is refused before."""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
_GRACE = 60.0
"""Seconds for a command to end what it started; torchrun gives its ranks 30."""
_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""
_ERROR = re.compile(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception)\b")
_RANK_ENDED = re.compile(r".*torch/distributed/elastic/.*(death signal|closing signal|failed \()")
"""torchrun's first words on a rank that ended; what ranks said about it comes before, and a long summary after."""


def at_least(smallest: int) -> Callable[[str], int]:
    """Type of a command line's whole number, which may not be smaller."""

    def whole(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {smallest} on")
        return int(text)

    return whole


def positive(text: str) -> float:
    """Type of a command line's number, which neither zero nor infinity is."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def require_gpus(count: int, model: str) -> None:
    """End with a line that says so where this host has fewer; the tiny model is for CPUs too."""
    found = torch.cuda.device_count()
    if found < count and model != "tiny":
        needed = f"{count} GPU{'s' * (count > 1)}"
        sys.exit(f"{model} needs {needed} here, and torch finds {found}; for a trial on CPUs, take tiny")


def require_ranks(module: str, model: str) -> None:
    """End with a line that says what is missing: torchrun, which starts the module, or a GPU for the model."""
    if "WORLD_SIZE" not in os.environ:
        sys.exit(f"start it with torchrun: torchrun --nproc_per_node GPUS -m {module} {model}")
    require_gpus(1, model)


def torchrun(ranks: int, module: str, *arguments: str) -> list[str]:
    """The command that runs a module in as many ranks of this host."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launch, "-m", module, *arguments]


def run_json(command: Sequence[str], limit: float | None = None) -> dict[str, Any]:
    """The JSON of a command's last such line, or how it failed, in its first line and at length. All that it started
    ends with it."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    ended = ""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        out, err = _end(process)
        ended = f"ended after {limit:g} s"
    except BaseException:  # Ctrl-C reaches this process alone
        _end(process)
        raise
    for line in reversed(out.splitlines()):
        if (result := _result(line)) is not None:  # a rank that does not end after its result does not spoil it
            return result
    return {"failed": _failure(out, err, ended or f"exit code {process.returncode}")}


def why(failed: dict[str, Any]) -> str:
    """In a line, how a command failed of which `run_json` says so."""
    return str(failed["failed"]).partition("\n")[0]


def _result(line: str) -> dict[str, Any] | None:
    try:
        result = json.loads(line) if line.startswith("{") else None
    except ValueError:  # something else in braces
        return None
    return result if isinstance(result, dict) else None


def _failure(out: str, err: str, ended: str) -> str:
    """The first error that was named, then what was printed last, up to torchrun's summary, which names none."""
    lines = err.splitlines()
    until = next((number for number, line in enumerate(lines) if _RANK_ENDED.match(line)), len(lines))
    said = [line for line in lines[:until] if line.strip()]
    error = next(filter(_ERROR.match, said), None)
    rank = re.search(r"exitcode: (-?\d+)\) local_rank: (\d+)", err)
    ranks = f"; rank {rank[2]}'s is {rank[1]}" if rank else ""
    printed = "\n".join(said)
    what = f"{ended}{ranks}, {error or f'last printed: {said[-1] if said else None}'}"
    return f"{what[:500]}\n{out[-500:]}{printed[-1500:]}"


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Ask first: torchrun's ranks are in sessions of their own, which it alone ends."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.communicate(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()
