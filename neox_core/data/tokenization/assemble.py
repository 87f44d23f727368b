"""Parts into datasets: what is left out, and the counts that must add up."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neox_core.config import DataConfig
from neox_core.data.indexed import IndexedDataset, IndexedWriter
from neox_core.data.ledger import LEFT_OUT
from neox_core.data.tokenization.filters.dropped import TRAIN, MadePart, ValidationTexts, find_dropped
from neox_core.data.tokenization.filters.findings import REJECTED_FILE
from neox_core.data.tokenization.merge import Mask, Part, merge
from neox_core.data.tokenization.part import find_record
from neox_core.data.tokenization.part_files import load_table
from neox_core.errors import DataError


@dataclass(frozen=True)
class SplitPlan:
    """Which documents of one split's parts are kept, and how many are not and why."""

    parts: tuple[MadePart, ...]
    keep: tuple[Mask | None, ...]
    """Per part, [documents]; None: all."""
    counts: Mapping[str, int]
    """documents_in = documents + those of each of LEFT_OUT; bytes and tokens of `documents`."""


def plan_splits(
    parts: Sequence[MadePart], data: DataConfig, in_validation: Sequence[ValidationTexts]
) -> dict[tuple[str, str], SplitPlan]:
    """Decide for every source and split. A document that may be left out for several reasons counts for the first of
    LEFT_OUT. Of a source that is left out as a whole there are no parts."""
    dropped = find_dropped(parts, data, in_validation)
    places = defaultdict[tuple[str, str], list[int]](list)
    for place, part in enumerate(parts):
        places[part.file.source, part.file.split].append(place)
    for source in data.sources:
        places.setdefault((source, TRAIN), [])
    return {
        key: _plan_split([parts[place] for place in here], [dropped[place] for place in here])
        for key, here in places.items()
    }


def _plan_split(parts: Sequence[MadePart], dropped: Sequence[Mapping[str, Mask]]) -> SplitPlan:
    records = [part.record for part in parts]
    rejected, empty = (sum(getattr(record, unit) for record in records) for unit in ("rejected", "empty"))
    counts = {unit: sum(getattr(record, unit) for record in records) for unit in ("documents", "bytes", "tokens")}
    counts = {"documents_in": counts["documents"] + rejected + empty, **counts, **dict.fromkeys(LEFT_OUT, 0)}
    counts |= {"rejected": rejected, "empty": empty}
    keep: list[Mask | None] = []
    for part, reasons in zip(parts, dropped, strict=True):
        left_out = np.zeros(part.record.documents, dtype=np.bool_)
        for reason, mask in reasons.items():
            counts[reason] += int((mask & ~left_out).sum())
            left_out |= mask
        keep.append(~left_out if left_out.any() else None)
        if left_out.any():
            counts["documents"] -= int(left_out.sum())
            counts["bytes"] -= int(load_table(part.paths)["bytes"][left_out].sum())
            counts["tokens"] -= int(IndexedDataset(part.paths.prefix).sizes[left_out].sum(dtype=np.int64))
    return SplitPlan(tuple(parts), tuple(keep), counts)


def check_rejected(plans: Iterable[SplitPlan], source: str, limit: float, folder: Path) -> None:
    """Refuse a source of which too many records are bad; they are listed in `folder`.

    Raises:
        DataError: says how many, and the first reason.
    """
    plans = list(plans)
    rejected, total = (sum(plan.counts[unit] for plan in plans) for unit in ("rejected", "documents_in"))
    if rejected <= limit * total:
        return
    part = next(part for plan in plans for part in plan.parts if part.record.rejected)
    with part.paths.rejected.open(encoding="utf-8") as lines:
        first = json.loads(next(lines))
    raise DataError(
        f"source {source!r}: {rejected} of {total} records are bad, more than data.max_rejected {limit:g}; the first "
        f"is {part.file.location}, line {first['line']}: {first['reason']} (all are in {folder / REJECTED_FILE}): "
        "correct or remove them, correct data.text_key, or raise data.max_rejected"
    )


def merge_split(plan: SplitPlan, prefix: Path, workers: int) -> None:
    """Write one split's dataset and count it.

    Raises:
        DataError: the counts do not add up, or the dataset does not hold what they say.
    """
    counts = plan.counts
    accounted = sum(counts[unit] for unit in ("documents", *LEFT_OUT))
    parts = [Part(part.paths.prefix, keep) for part, keep in zip(plan.parts, plan.keep, strict=True)]
    if parts:
        merge(parts, prefix, workers)
    else:
        with IndexedWriter(prefix, np.dtype(np.uint16)):
            pass
    merged = IndexedDataset(prefix)
    found = {"documents_in": accounted, "documents": len(merged), "tokens": len(merged.tokens)}
    if wrong := {unit: (value, counts[unit]) for unit, value in found.items() if value != counts[unit]}:
        raise DataError(f"{prefix} does not add up (found, expected): {wrong}; this is a fault of this program")


def check_unchanged(parts: Iterable[MadePart]) -> None:
    """Refuse what was merged of parts that were replaced meanwhile: a job of an earlier run may have outlived it.

    Raises:
        DataError: says which.
    """
    for part in parts:
        record = find_record(part.paths)
        if record is None or record.sha256 != part.record.sha256:
            raise DataError(
                f"the part of {part.file.location} at {part.paths.prefix} was replaced while it was merged: end the "
                "other run that tokenizes in this workdir, or its jobs, and run again"
            )
