"""Names of sources for GPT-NeoX's token files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LLEMMA_SOURCES = {
    "arxiv-rp": "arxiv",
    "code-with-proofsteps": "algebraic-stack",
    "code-rp": "code",
}
"""Llemma's working names of token files, and the names under which Proof-Pile-2 was published."""


def source_names(paths: Sequence[Any], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """A source's name for each path: its last part, with the folder before it where several paths end alike.

    `known` gives the names of paths that are named already.
    """
    different = list(dict.fromkeys(str(path) for path in paths))
    ends = Counter(_last(path) for path in different)
    names: dict[str, str] = {}
    for path in different:
        name = _last(path) if ends[_last(path)] == 1 else _clean(f"{Path(path).parent.name}-{_last(path)}")
        number, free = 2, name
        while free in names.values():
            number, free = number + 1, f"{name}-{number}"
        names[path] = (known or {}).get(path, free)
    return names


def _last(path: str) -> str:
    name = Path(path).name.removesuffix("_text_document")
    return _clean(_LLEMMA_SOURCES.get(name, name))


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip("._-") or "source"
