"""Lines of the evaluation sets as the documents that the harness's templates read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from neox_core.errors import ConfigError, DataError
from neox_core.evaluation.answers.extract import last_boxed
from neox_core.evaluation.items import read_gold, read_options, read_records
from neox_core.storage.atomic import atomic_file, write_atomically

Record = Mapping[str, Any]
Document = Callable[[Record, str], dict[str, Any]]
"""From a line, and where it stands, to the fields that the harness's templates name, and `gold`."""
_CHOICES = 4
"""Options that the harness's template of MMLU shows."""


def gsm8k(record: Record, where: str) -> dict[str, Any]:
    """`question`, `answer` (the solution, with the line of hashes) and `gold`."""
    answer = record.get("answer")
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    gold = str(answer) if is_number else None
    return {
        "question": _text(record, "question", where),
        "answer": _text(record, "solution", where),
        "gold": gold or _text(record, "answer", where),
    }


def minerva(record: Record, where: str) -> dict[str, Any]:
    """`problem` and `solution`, whose last box holds the answer."""
    # The harness finds \\fbox{}, which some of MATH's solutions have, but takes no answer out of it.
    solution = _text(record, "solution", where).replace("\\fbox", "\\boxed")
    if not boxed_answer(solution):
        raise DataError(f"{where}: 'solution' does not end in \\boxed{{answer}}: correct it")
    return {"problem": _text(record, "problem", where), "solution": solution}


def boxed_answer(solution: str) -> str:
    """What stands in the last box, whole; nothing where it is empty or not closed.

    The harness's own gold answer has gone through Minerva's normalisation, which cuts it at `=` and takes bars off:
    of `x=2, y=3` it leaves 3, and of `0.\\overline{3}` 0.3.
    """
    box = solution[max(0, solution.rfind("\\boxed")) :]
    if not box.startswith(("\\boxed{", "\\boxed ")):  # the harness ends at any other
        return ""
    if (found := last_boxed(box)) is None and box.startswith("\\boxed "):
        found = box.removeprefix("\\boxed ").split("$")[0]
    return (found or "").strip()


def mmlu(record: Record, where: str) -> dict[str, Any]:
    """`question`, `choices` and `answer`, the right one's place."""
    options = read_options(record.get("options"), "options", where)
    if len(options) != _CHOICES:
        raise DataError(f"{where} has {len(options)} options, and the harness's prompt shows {_CHOICES}: take it out")
    place = read_gold(record.get("answer"), "answer", len(options), where)
    return {
        "question": _text(record, "question", where),
        "choices": options,
        "answer": place,
        "gold": options[place],
    }


def minif2f(record: Record, where: str) -> dict[str, Any]:
    """Statements and the informal proof, as they are."""
    return {name: _text(record, name, where) for name in ("informal_statement", "informal_proof", "formal_statement")}


def _text(record: Record, field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} has no text {field!r}: correct it")
    return value


def read_documents(path: Path, document: Document, name: str, at_least: int = 1) -> list[dict[str, Any]]:
    """A set's documents.

    Args:
        name: the task's.
        at_least: so many are needed.

    Raises:
        ConfigError: the set is not there.
        DataError: a line is no item of the task, or there are too few.
    """
    if not path.is_file():
        raise ConfigError(
            f"task {name} reads {path}, which does not exist: put the items there, or give another --data"
        )
    documents = [{"id": identity} | document(record, where) for identity, record, where in read_records(path)]
    if len(documents) < at_least:
        held = f"{len(documents)} items, and task {name} needs {at_least}" if documents else "no item"
        raise DataError(f"{path} holds {held}: correct the path or the file")
    return documents


def write_documents(path: Path, document: Document, written: Path, name: str, at_least: int = 1) -> Path:
    """Write a set's documents as JSON lines, the same for the same set, and as Parquet for the harness.

    Its library takes texts of JSON that look like dates for dates.

    Args:
        at_least: so many are needed.

    Returns:
        The Parquet file.

    Raises:
        ConfigError, DataError: as `read_documents`; or answers were given to another set that had its name.
    """
    import pyarrow
    import pyarrow.parquet

    documents = read_documents(path, document, name, at_least)
    text = "".join(json.dumps(found) + "\n" for found in documents)
    if written.is_file() and written.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{written} holds other items than {path} does now: give another --out, or the items of then")
    write_atomically(written, text)
    table = written.with_suffix(".parquet")
    with atomic_file(table) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(documents), temporary)
    return table
