"""The `llemma` command, run in the test's own process."""

from __future__ import annotations

import sys

import pytest

from flows import cli


def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `llemma` with these words."""
    monkeypatch.setattr(sys, "argv", ["llemma", *words])
    status = 0
    try:
        cli.main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    output = capsys.readouterr()
    return status, output.out, output.err
