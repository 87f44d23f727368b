"""Words that were given up for plainer ones, one per concept, stay out of code and pages."""

from __future__ import annotations

import re

from tests.paths import ROOT

GIVEN_UP = {
    "he": "it",
    "beside": "next to, alongside or in addition to",
    "gets on": "makes progress",
    "foreman": "fork server",
    "hygiene": "decontamination",
}
FILES = sorted(
    path
    for folder in ("flows", "tasks", "neox_core", "infra", "docs", "benchmarks")
    for kind in ("*.py", "*.md", "*.html.j2")
    for path in (ROOT / folder).rglob(kind)
)


def found(text: str) -> list[str]:
    """The given-up words of a text."""
    return [word for word in GIVEN_UP if re.search(r"\b" + r"\s+".join(word.split()) + r"\b", text, re.IGNORECASE)]


def test_they_are_seen() -> None:
    assert found("Beside the rank, which gets\non") == ["beside", "gets on"]
    assert not found("on the other side, besides: the heat")


def test_no_file_has_one() -> None:
    words = {path: found(path.read_text()) for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *FILES)}
    named = [
        f"{path.relative_to(ROOT)}: {word!r}, write {GIVEN_UP[word]}" for path, has in words.items() for word in has
    ]
    assert not named, "\n".join(named)
