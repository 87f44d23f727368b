"""What the model answered, kept after every batch, so that a killed evaluation goes on with the items that are left."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neox_core.errors import DataError

Answer = Callable[[Sequence[int]], list[Any]]
"""Answers of the requests with these numbers."""


def answer_all(
    path: Path, batches: Sequence[Sequence[int]], answer: Answer, finished: Callable[[int, int], None]
) -> dict[int, Any]:
    """Answers by request number. Batches that a file holds already are not asked again.

    Args:
        path: JSON lines, one per batch; a last line that a kill cut off is dropped.
        finished: told how many batches are through, and how many of them were asked in this call.

    Raises:
        DataError: the file holds something else.
    """
    known = _read(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        asked = 0
        for count, batch in enumerate(batches):
            if not all(number in known for number in batch):
                given = answer(batch)
                file.write((json.dumps(list(zip(batch, given, strict=True))) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
                known |= dict(zip(batch, given, strict=True))
                asked += 1
            finished(count + 1, asked)
    return known


def _read(path: Path) -> dict[int, Any]:
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    try:
        return {int(number): given for line in whole.splitlines() for number, given in json.loads(line)}
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): remove it, and its answers are asked again") from None
