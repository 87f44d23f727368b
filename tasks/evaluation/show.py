"""Items of an evaluation as rows: which were wrong, and side by side at two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neox_core.errors import DataError
from tasks.evaluation.kept_items import items_file, load_items, read_items, written_name

Record = Mapping[str, Any]
_SHOWN = 300
"""Characters of a text; the file has all."""


def generated_items(out: Path, task: str) -> list[dict[str, Any]]:
    """The records of an exported model's evaluation.

    Raises:
        DataError: the task was not evaluated.
    """
    path = out / task / "items.jsonl"
    if not path.is_file():
        there = sorted(found.parent.name for found in out.glob("*/items.jsonl"))
        raise DataError(f"no items of task {task!r} in {out}: there are {there}")
    return read_items(path)


def is_right(record: Record) -> bool | None:
    """Whether the answer is right, greedy or picked; None where there is no right and wrong."""
    if "greedy" in record:
        return bool(record["greedy"][0]["correct"])
    return bool(record["picked"] == record["gold"]) if "picked" in record else None


def rows(records: Sequence[Record], against: Sequence[Record] = (), wrong: bool = False) -> list[dict[str, str]]:
    """A row per item: its prompt's end, the right answer, what was answered, and what another checkpoint answered.

    Args:
        against: the other checkpoint's records; items that flipped between right and wrong come first.
        wrong: only items that `records` has wrong; where there is no right and wrong, the least likely first.

    Raises:
        DataError: the other checkpoint was asked none of these items.
    """
    other = _same_items(records, against)
    if against and not other:
        raise DataError(
            f"none of the {len(records)} items is among the {len(against)} of the other evaluation: its items have "
            "other ids or prompts; give one of the same set"
        )
    chosen = [record for record in records if "left_out" not in record and not (wrong and is_right(record))]
    if wrong:
        chosen.sort(key=lambda record: -_bits(record))
    if other:
        chosen.sort(key=lambda record: is_right(record) == is_right(other.get(record["id"], record)))
    return [_row(record, other.get(record["id"])) for record in chosen]


def flipped(records: Sequence[Record], against: Sequence[Record]) -> list[dict[str, str]]:
    """Rows of the items that are right at one of two checkpoints and wrong at the other."""
    other = _same_items(records, [record for record in against if "left_out" not in record])
    both = [record for record in records if record["id"] in other and "left_out" not in record]
    return [_row(r, other[r["id"]]) for r in both if is_right(r) != is_right(other[r["id"]])]


def _same_items(records: Sequence[Record], against: Sequence[Record]) -> dict[str, Record]:
    """By id the other's records of the same items: ids such as `line 1` are those of other sets too."""
    asked = {(record["id"], record.get("prompt")) for record in records}
    return {record["id"]: record for record in against if (record["id"], record.get("prompt")) in asked}


def checkpoint_rows(folder: Path, task: str, step: int, against: int | None, wrong: bool) -> list[dict[str, str]]:
    """As `rows`, of a training's checkpoints; by its name alone also a task whose answers are written.

    Raises:
        DataError: no items of these were kept; or see `rows`.
    """
    if not items_file(folder, task, step).is_file() and items_file(folder, written_name(task), step).is_file():
        task = written_name(task)
    other = () if against is None else load_items(folder, task, against)
    return rows(load_items(folder, task, step), other, wrong)


def _row(record: Record, other: Record | None) -> dict[str, str]:
    row = {"item": record["id"], "prompt": record["prompt"].strip()[-_SHOWN:], "right": _right(record)}
    row["answer"] = _answer(record)
    return row | ({"other": _answer(other)} if other is not None else {})


def _right(record: Record) -> str:
    if "choices" in record:
        place = record.get("gold", 0)
        return str(record["choices"][place]).strip()[:_SHOWN]
    return str(record["gold"])


def _answer(record: Record) -> str:
    if "left_out" in record:
        return f"left out: {record['left_out']}"
    if "greedy" in record:
        given = record["greedy"][0]
        mark = "right" if given["correct"] else f"wrong ({given['reason']})"
        return f"{mark}: {given['answer']}; wrote: {given['text'].strip()[:_SHOWN]}"
    if "picked" in record:
        picked = str(record["choices"][record["picked"]]).strip()
        return f"{'right' if is_right(record) else 'wrong'}: {picked[:_SHOWN]}"
    return f"{_bits(record):.3f} bits per byte"


def _bits(record: Record) -> float:
    """Bits per byte of a gold solution; of other items nothing."""
    if "log_likelihood" not in record or "bytes" not in record:
        return 0.0
    return float(-record["log_likelihood"] / math.log(2) / record["bytes"])
