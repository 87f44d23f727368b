"""Other programs that a benchmark runs, one after the other, and what they found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def torchrun(ranks: int, module: str, *arguments: str) -> list[str]:
    """The command that runs a module in as many ranks of this host."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launch, "-m", module, *arguments]


def run_json(command: Sequence[str], limit: float | None = None) -> dict[str, Any]:
    """The JSON of a command's last such line, or how it failed. All that it started ends with it."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        err += f"\nended after {limit} s"
    except BaseException:  # Ctrl-C reaches this process alone
        os.killpg(process.pid, signal.SIGKILL)
        raise
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if lines:  # a rank that does not end after its result does not spoil it
        result: dict[str, Any] = json.loads(lines[-1])
        return result
    return {"failed": f"{out[-500:]}{err[-1500:]}"}
