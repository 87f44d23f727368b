"""Lists of what was found in the text: bad records, overlaps with evaluation sets and with validation texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from neox_core.config import DataConfig
from neox_core.data.tokenization.filters.dropped import MadePart, ValidationTexts
from neox_core.data.tokenization.filters.overlap import OverlapWords, load_items, set_names
from neox_core.data.tokenization.part_files import load_table
from neox_core.errors import DataError
from neox_core.storage.atomic import atomic_file, remove_remains, write_atomically

REJECTED_FILE = "rejected.jsonl"
OVERLAP_FILE = "overlap.json"
VALIDATION_FILE = "in_validation.jsonl"


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
    """List every overlap with the evaluation sets, and per set what was and what was not looked for.

    Returns:
        "sources": per source, how many items and documents are in it; "sets": per set, how many items it has, how many
        were looked for by runs of words, as a whole or not at all, and how many were found.
    """
    length = OverlapWords(data.overlap_words, data.overlap_min_words)
    names = set_names(data.evaluation_sets)
    coverage = load_items(data.evaluation_sets, length).coverage(names)
    hits: dict[str, list[dict[str, Any]]] = {source: [] for source in data.sources}
    for part in parts:
        for line in part.overlaps():
            what = {key: line[key] for key in ("item", "field", "words", "text")}
            hits[part.file.source].append(
                {"set": names[line["set"]], **what, "file": part.file.logical_name, "line": line["line"]}
            )
    summary = {
        source: {
            "items": len({(hit["set"], hit["item"]) for hit in found}),
            "documents": len({(hit["file"], hit["line"]) for hit in found}),
        }
        for source, found in hits.items()
    }
    content = {
        "words": data.overlap_words,
        "words_of_whole_texts": data.overlap_min_words,
        "decontaminated": data.decontaminate,
        "sets": {
            name: {
                **counts,
                "items_found": len({hit["item"] for found in hits.values() for hit in found if hit["set"] == name}),
            }
            for name, counts in coverage.items()
        },
        "sources": {source: {**summary[source], "hits": hits[source]} for source in hits},
    }
    write_atomically(folder / OVERLAP_FILE, json.dumps(content, indent=1))
    return {"sources": summary, "sets": content["sets"]}


def write_in_validation(
    parts: Sequence[MadePart], texts: Sequence[ValidationTexts], data: DataConfig, folder: Path
) -> dict[str, dict[str, int]]:
    """List every training document that is in a validation split, or have no list if there is none.

    Returns:
        per source with such documents, how many are "equal", and where near-duplicates are looked for, how many "near".
    """
    path = folder / VALIDATION_FILE
    remove_remains(path)
    summary: dict[str, dict[str, int]] = {}
    sought = ("equal",) if data.near_duplicates is None else ("equal", "near")
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as output:
        for part, found in zip(parts, texts, strict=True):
            for kind, mask in found._asdict().items():
                if not mask.any():
                    continue
                summary.setdefault(part.file.source, dict.fromkeys(sought, 0))[kind] += int(mask.sum())
                for line in load_table(part.paths)["line"][mask].tolist():
                    what = {"file": part.file.logical_name, "line": line, "likeness": kind}
                    output.write(json.dumps(what | {"dropped": data.drop_validation_duplicates}) + "\n")
    if path.stat().st_size == 0:
        path.unlink()
    return summary


def check_damaged(parts: Sequence[MadePart], data: DataConfig) -> None:
    """Refuse damaged files, all in one message; or those that are to be skipped, if they are too much of a source.

    Raises:
        DataError: names every one, and says what is wrong with it.
    """
    damaged = [part for part in parts if part.record.damaged]
    if damaged and not data.skip_damaged_files:
        raise DataError(
            f"{len(damaged)} of {len(parts)} files {'is' if len(damaged) == 1 else 'are'} damaged: {_named(damaged)}: "
            "correct them or fetch them again, or set data.skip_damaged_files"
        )
    for source in data.sources:
        sizes = [sum(part.file.size for part in some if part.file.source == source) for some in (damaged, parts)]
        if sizes[0] > data.max_damaged * sizes[1]:
            some = [part for part in damaged if part.file.source == source]
            raise DataError(
                f"source {source!r}: damaged files hold {sizes[0]:,} of its {sizes[1]:,} bytes, more than "
                f"data.max_damaged {data.max_damaged:g}: {_named(some)}: correct or fetch them again, or raise "
                "data.max_damaged"
            )


def _named(damaged: Sequence[MadePart]) -> str:
    return "; ".join(f"{part.file.location} ({part.record.damaged})" for part in damaged)
