"""Every benchmark can be started as it says."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.test_docs import PAGES

BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
AS_A_FILE = re.compile(r"(?:python|torchrun [^\n]*) benchmarks/(\w+)\.py")


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_it_is_imported(path: Path) -> None:
    """What it takes from elsewhere is there: no type checker looks at benchmarks."""
    importlib.import_module(f"benchmarks.{path.stem}")


@pytest.mark.parametrize("page", [*PAGES, *BENCHMARKS], ids=lambda path: path.name)
def test_commands_by_file_need_no_other_file(page: Path) -> None:
    """A file that is started by its path does not find its neighbours; a module does."""
    for name in AS_A_FILE.findall(page.read_text()):
        source = (ROOT / "benchmarks" / f"{name}.py").read_text()
        assert "sys.path[0]" in source or not re.search(r"^from (benchmarks|tests)\b", source, re.MULTILINE), name
