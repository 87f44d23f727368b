"""What many short processes import is quick to import."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "without"),
    [("flows.cli", ("torch", "prefect")), ("flows.watch", ("torch", "deepspeed", "plotly", "transformers"))],
)
def test_short_processes_import_no_large_package(module: str, without: tuple[str, ...]) -> None:
    code = f"import sys, {module}\nprint(*(name for name in {without} if name in sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=True)
    assert not ended.stdout.split()
