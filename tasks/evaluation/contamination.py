"""Scores without the items that share a run of words with the training text, next to those of all items."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neox_core.config import RunConfig
from neox_core.data.tokenization.filters.findings import OVERLAP_FILE
from neox_core.data.tokenization.filters.overlap import set_names
from neox_core.evaluation.scores import scores
from tasks.evaluation.kept_items import load_items, written_name
from tasks.harness.catalogue import TASKS


def overlapping_items(config: RunConfig, data: Path) -> dict[str, set[str]]:
    """By task the ids of the items that prepare-data found in the training text.

    A task is not there if its file is not among data.evaluation_sets: nothing is known about it. Nor is any if the
    documents in question were left out of the training text.
    """
    paths = config.data.evaluation_sets
    names = dict(zip((path.resolve() for path in paths), set_names(paths), strict=True))
    known = {name: names[path] for name, path in _files(config).items() if path in names}
    if not known or config.data.decontaminate:
        return {}
    report = json.loads((data / OVERLAP_FILE).read_text(encoding="utf-8"))
    found: dict[str, set[str]] = {name: set() for name in names.values()}
    for source in report["sources"].values():
        for hit in source["hits"]:
            found[hit["set"]].add(hit["item"])
    return {task: found[name] for task, name in known.items()}


def _files(config: RunConfig) -> dict[str, Path]:
    """Each task's items, those of `generate` too."""
    files = {name: task.items.resolve() for name, task in config.evaluate.tasks.items()}
    if generate := config.evaluate.generate:
        files |= {written_name(name): (generate.data / TASKS[name].file).resolve() for name in generate.tasks}
    return files


def without_overlap(
    folder: Path, step: int, tasks: Mapping[str, Any], overlapping: Mapping[str, set[str]]
) -> dict[str, Any]:
    """A checkpoint's scored tasks with `without_overlap` next to the metrics: how many items are left, and scores."""
    found: dict[str, Any] = {}
    for name, scored in tasks.items():
        found[name] = scored
        if name in overlapping:
            records = load_items(folder, name, step)
            left = [record for record in records if record["id"] not in overlapping[name]]
            counted = sum("left_out" not in record for record in left)
            found[name] = scored | {"without_overlap": {"items": counted, "metrics": scores(left)}}
    return found
