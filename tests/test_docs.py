"""What the docs name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(r"(?<![\w/.-])((?:flows|tasks|infra|neox_core|tests|benchmarks|configs|docs)/[\w/.-]*\w/?)")


def named_paths(text: str) -> list[str]:
    """Paths of this repository in a page, wherever they stand."""
    return PATH.findall(text)


def test_paths_are_seen() -> None:
    assert named_paths("see `tasks/jobs/`, infra/install.sh and [a](docs/b.md). Not s3://flows/x, runs/toy.") == [
        "tasks/jobs/",
        "infra/install.sh",
        "docs/b.md",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    mine = {"configs/mine.yml"}  # the reader's own file
    missing = [path for path in named_paths(page.read_text()) if path not in mine and not (ROOT / path).exists()]
    assert not missing


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    command = re.compile(r"(?:`|&& |^ {4})make ([a-z][\w-]*)", flags=re.MULTILINE)
    named = {name for page in PAGES for name in command.findall(page.read_text())}
    assert {"demo", "test", "check", "docs"} <= named
    assert named <= targets
