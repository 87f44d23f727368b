"""Parts into datasets: what is left out, the counts that must add up, and the lists of what was found."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from neox_core.config import DataConfig
from neox_core.data.tokenization.duplicates import find_duplicates
from neox_core.data.indexed import IndexedDataset
from neox_core.data.tokenization.merge import Mask, Part, merge
from neox_core.data.tokenization.overlap import load_items, set_names
from neox_core.data.tokenization.part import find_record
from neox_core.data.tokenization.part_files import PartPaths, load_table
from neox_core.data.tokenization.part_settings import PartRecord
from neox_core.data.tokenization.readers import InputFile
from neox_core.errors import DataError
from neox_core.storage.atomic import atomic_file, remove_remains, write_atomically

REJECTED_FILE = "rejected.jsonl"
OVERLAP_FILE = "overlap.json"


@dataclass(frozen=True)
class MadePart:
    """An input file and its part."""

    file: InputFile
    record: PartRecord
    paths: PartPaths

    def overlaps(self) -> Iterable[dict[str, Any]]:
        """The lines of the part's list of overlaps."""
        with self.paths.overlaps.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


@dataclass(frozen=True)
class SplitPlan:
    """Which documents of one split's parts are kept, and how many are not and why."""

    parts: tuple[MadePart, ...]
    keep: tuple[Mask | None, ...]
    """Per part, [documents]; None: all."""
    counts: Mapping[str, int]
    """documents_in = documents + rejected + duplicates + decontaminated; bytes and tokens of `documents`."""


def plan_split(parts: Sequence[MadePart], data: DataConfig) -> SplitPlan:
    """Decide for one source and split. A duplicate that overlaps as well counts as a duplicate."""
    totals = {unit: sum(getattr(part.record, unit) for part in parts) for unit in ("documents", "bytes", "tokens")}
    rejected = sum(part.record.rejected for part in parts)
    counts = {"documents_in": totals["documents"] + rejected, **totals, "rejected": rejected}
    if not (data.deduplicate or data.decontaminate):
        return SplitPlan(tuple(parts), (None,) * len(parts), counts | {"duplicates": 0, "decontaminated": 0})
    duplicate = _duplicates(parts, data)
    overlapping = [_overlapping(part) if data.decontaminate else None for part in parts]
    keep: list[Mask] = []
    dropped = {"duplicates": 0, "decontaminated": 0}
    for part, again, found in zip(parts, duplicate, overlapping, strict=True):
        contaminated = found & ~again if found is not None else np.zeros_like(again)
        keep.append(~(again | contaminated))
        dropped["duplicates"] += int(again.sum())
        dropped["decontaminated"] += int(contaminated.sum())
        counts["documents"] -= int((~keep[-1]).sum())
        counts["bytes"] -= int(load_table(part.paths)["bytes"][~keep[-1]].sum())
        counts["tokens"] -= int(IndexedDataset(part.paths.prefix).sizes[~keep[-1]].sum(dtype=np.int64))
    return SplitPlan(tuple(parts), tuple(keep), counts | dropped)


def check_rejected(plans: Iterable[SplitPlan], source: str, limit: float) -> None:
    """Refuse a source of which too many records are bad.

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
        f"source {source!r}: {rejected} of {total} records are bad, more than data.max_rejected {limit:g}; the first is "
        f"{part.file.location}, line {first['line']}: {first['reason']} (all are in {REJECTED_FILE}): correct or "
        "remove them, correct data.text_key, or raise data.max_rejected"
    )


def merge_split(plan: SplitPlan, prefix: Path, workers: int) -> None:
    """Write one split's dataset and count it.

    Raises:
        DataError: the counts do not add up, or the dataset does not hold what they say.
    """
    counts = plan.counts
    accounted = sum(counts[unit] for unit in ("documents", "rejected", "duplicates", "decontaminated"))
    merge([Part(part.paths.prefix, keep) for part, keep in zip(plan.parts, plan.keep, strict=True)], prefix, workers)
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


def write_rejected(parts: Iterable[MadePart], folder: Path) -> None:
    """List every rejected record and left-out file, or have no list if there is none."""
    path = folder / REJECTED_FILE
    remove_remains(path)
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as output:
        for part in parts:
            with part.paths.rejected.open(encoding="utf-8") as lines:
                for line in map(json.loads, lines):
                    output.write(json.dumps({"file": part.file.logical_name, **line}) + "\n")
    if path.stat().st_size == 0:
        path.unlink()


def write_overlap(parts: Sequence[MadePart], data: DataConfig, folder: Path) -> dict[str, Any]:
    """List every overlap with the evaluation sets; returns, per source, how many items and documents are in it."""
    items = load_items(data.evaluation_sets, data.overlap_words)
    names = set_names(data.evaluation_sets)
    all_items = {(item.set_number, item.item) for item in items.items}
    long_enough = {(item.set_number, item.item) for item in items.items if len(item.words) >= data.overlap_words}
    hits: dict[str, list[dict[str, Any]]] = {source: [] for source in data.sources}
    for part in parts:
        for line in part.overlaps():
            what = {key: line[key] for key in ("item", "field", "words", "text")}
            hits[part.file.source].append({"set": names[line["set"]], **what, "file": part.file.logical_name, "line": line["line"]})
    summary = {
        source: {
            "items": len({(hit["set"], hit["item"]) for hit in found}),
            "documents": len({(hit["file"], hit["line"]) for hit in found}),
        }
        for source, found in hits.items()
    }
    content = {
        "words": data.overlap_words,
        "decontaminated": data.decontaminate,
        "items": len(all_items),
        "items_too_short_to_check": len(all_items - long_enough),
        "sources": {source: {**summary[source], "hits": hits[source]} for source in hits},
    }
    write_atomically(folder / OVERLAP_FILE, json.dumps(content, indent=1))
    return summary


def _duplicates(parts: Sequence[MadePart], data: DataConfig) -> list[Mask]:
    if data.deduplicate:
        return find_duplicates([partial(load_table, part.paths) for part in parts])
    return [np.zeros(part.record.documents, dtype=np.bool_) for part in parts]


def _overlapping(part: MadePart) -> Mask:
    mask = np.zeros(part.record.documents, dtype=np.bool_)
    mask[[line["document"] for line in part.overlaps()]] = True
    return mask
