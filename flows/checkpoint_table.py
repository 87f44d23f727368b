"""The table of a conversion or an export: sizes, rates, largest differences, files."""

from __future__ import annotations

from typing import Any

from neox_core.artifact import Artifact
from neox_core.config import RunConfig
from tasks.stage import StageResult

_LARGEST = 5
"""Differences that are shown; the artifact has all."""


def checkpoint_table(config: RunConfig, result: StageResult) -> list[dict[str, Any]]:
    """As a stage's flow publishes it."""
    return [{"what": what, "value": value} for what, value in checkpoint_rows(result.artifact)]


def checkpoint_rows(artifact: Artifact) -> list[tuple[str, str]]:
    """What, and its value with its unit."""
    summary = dict(artifact.summary)
    count, size, seconds = (summary.pop(name) for name in ("files", "bytes", "write_seconds"))
    rows = [("weights", f"{size:,} bytes in {count} file{'s' if count > 1 else ''}")]
    rate = summary.pop("bytes_per_second", None)
    rows.append(("written", f"at {rate / 1e6:,.0f} MB/s, in {seconds:.1f} s" if rate else "by an earlier attempt"))
    differences = summary.pop("layer_differences", {})
    bound = summary.get("layer_tolerance")
    for part in sorted(differences, key=differences.__getitem__, reverse=True)[:_LARGEST]:
        rows.append((f"difference in {part}", f"{differences[part]:.1e} of its largest value; bound {bound:g}"))
    rows += [(name.replace("_", " "), _text(value)) for name, value in summary.items()]
    return rows + [(file.path, f"{file.size:,} bytes, SHA-256 {file.sha256}") for file in artifact.files]


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1e-2 else str(value)
