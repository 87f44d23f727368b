"""What one rank computes knows nothing of ranks. (import-linter sees packages of others only as a whole: torch.)"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import neox_core.model


def imported(source: str) -> Iterator[str]:
    """Names of the modules that a source imports, also inside of functions, and of what is taken from them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_are_seen() -> None:
    sources = ("import torch.distributed as dist", "def f():\n    from torch import distributed", "import torch")
    assert ["torch.distributed" in imported(source) for source in sources] == [True, True, False]


def test_model_does_not_import_torch_distributed() -> None:
    sources = sorted(Path(neox_core.model.__file__).parent.rglob("*.py"))
    assert len(sources) > 5
    found = {path.name: [name for name in imported(path.read_text()) if "distributed" in name] for path in sources}
    assert not {name: modules for name, modules in found.items() if modules}
