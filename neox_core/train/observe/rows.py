"""The training's rows, as metrics.jsonl and incidents.jsonl have them, and what they come to."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median_high
from typing import Any

from neox_core.errors import DataError

logger = logging.getLogger(__name__)

_TAIL = 1 << 16
"""Bytes in which the last row is looked for first."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl into one row per step, in order of steps.

    A resumed run repeats steps: the later line's values win.

    Raises:
        DataError: as `read_rows`.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in read_rows(path):
        rows.setdefault(int(row["step"]), {}).update(row)
    return [rows[step] for step in sorted(rows)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl or incidents.jsonl, a row per line.

    A run that was killed may leave half a last line, which is passed over with a warning. A file that does not exist
    yet has no rows.

    Raises:
        DataError: another line is not a JSON object with a step.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            int(row["step"])
            rows.append(row)
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise DataError(
                    f"{path}, line {number} is not a JSON object with a step ({error!r}): remove the line"
                ) from None
            logger.warning("%s: the last line is incomplete and is passed over", path)
    return rows


def last_row(path: Path, name: str) -> dict[str, Any] | None:
    """The last row of metrics.jsonl that has a value of this name, without reading all those before it, as it is asked
    for again and again; half a row, which may get its other half this moment, does not count."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for length in (_TAIL, size):
            file.seek(max(0, size - length))
            for line in reversed(file.read().splitlines()):
                if f'"{name}"'.encode() in line and (row := _whole(line)):
                    return row
    return None


def _whole(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def training_figures(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """First and last loss, steps, and the median of speed and utilisation, as the first steps of a job warm up; empty
    before the first step."""
    rows = [row for row in metrics if "train/loss" in row]
    if not rows:
        return {}
    return {
        "first_loss": rows[0]["train/loss"],
        "last_loss": rows[-1]["train/loss"],
        "steps": rows[-1]["step"],
        "tokens_per_second": median_high(row["train/tokens_per_second"] for row in rows),
        "mfu": median_high(row["train/mfu"] for row in rows),
    }
