"""Every item's record of every checkpoint, in the evaluation's folder, and the differences between checkpoints.

One file per task and checkpoint: `items/TASK/step-000025.jsonl`, a line per item with its prompt, likelihoods and what
was picked; of written answers `generated/step-000025/TASK/items.jsonl`, of a task that is called `TASK, written`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from neox_core.config import WRITTEN
from neox_core.errors import DataError
from neox_core.evaluation.scores import differences
from neox_core.storage.atomic import write_atomically

ITEMS = "items"
GENERATED = "generated"
"""Of a result, and of the folder: what `evaluate.generate` made."""
BASE_STEP = 0
Result = dict[str, Any]
"""A checkpoint's evaluation, as in evaluations.json."""


def written_name(task: str) -> str:
    """The name of a task whose answers are written, unlike those that are scored by likelihood."""
    return task + WRITTEN


def scored_tasks(result: Mapping[str, Any]) -> dict[str, Any]:
    """All that a checkpoint was scored on."""
    found: dict[str, Any] = result.get("tasks", {}) | result.get(GENERATED, {})
    return found


def scored_apart(scored: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Of a task some of whose items overlap the training text: what a table calls the others, and their metrics."""
    others = scored.get("without_overlap", scored)
    if others["items"] >= scored["items"]:
        return None
    return f"of the {others['items']:,} items without overlap", others["metrics"]


def generated_folder(folder: Path, step: int) -> Path:
    """Where a checkpoint's written answers lie."""
    return folder / GENERATED / f"step-{step:06d}"


def items_file(folder: Path, task: str, step: int) -> Path:
    """Where a checkpoint's records lie."""
    if task.endswith(WRITTEN):
        return generated_folder(folder, step) / task.removesuffix(WRITTEN) / "items.jsonl"
    return folder / ITEMS / task / f"step-{step:06d}.jsonl"


def keep_items(folder: Path, result: Result) -> Result:
    """Write the items' records of a checkpoint; what is left is its summary."""
    tasks = {}
    for name, scored in result.get("tasks", {}).items():
        records = scored["records"]
        path = items_file(folder, name, result["step"])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        tasks[name] = {key: value for key, value in scored.items() if key != "records"}
    return result | {"tasks": tasks}


def load_items(folder: Path, task: str, step: int) -> list[dict[str, Any]]:
    """A checkpoint's records.

    Raises:
        DataError: none were kept.
    """
    path = items_file(folder, task, step)
    if not path.is_file():
        kept = sorted(found.stem.removeprefix("step-").lstrip("0") or "0" for found in path.parent.glob("step-*.jsonl"))
        tasks = sorted(found.name for found in (folder / ITEMS).glob("*"))
        tasks += sorted({written_name(found.parent.name) for found in (folder / GENERATED).glob("*/*/items.jsonl")})
        there = f"steps {kept}" if kept else f"tasks {tasks}"
        raise DataError(f"no items of task {task!r} at step {step} in {folder}: there are {there}")
    return read_items(path)


def read_items(path: Path) -> list[dict[str, Any]]:
    """A file's records.

    Raises:
        DataError: it is damaged.
    """
    try:
        # Lines end with \n alone: a prompt may hold what Unicode takes for an end, such as U+2028.
        return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): evaluate again, the answers are kept") from None


def inherit_items(folder: Path, earlier: Path, steps: Iterable[int]) -> None:
    """Copy the records of steps that another training evaluated before it became this one."""
    for step in steps:
        for path in (earlier / ITEMS).glob(f"*/step-{step:06d}.jsonl"):
            copy = items_file(folder, path.parent.name, step)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.is_file():
                shutil.copyfile(path, copy)
        if (written := generated_folder(earlier, step)).is_dir():
            shutil.copytree(written, generated_folder(folder, step), dirs_exist_ok=True)


def compare(folder: Path, results: Mapping[int, Result]) -> dict[int, Result]:
    """The results with each task's paired differences from the base weights and from the checkpoint before."""
    compared = dict(results)
    for part, mark in (("tasks", "compared_with"), (GENERATED, "generated_compared_with")):
        steps = [step for step in sorted(results) if results[step].get(part)]
        for before, step in pairwise(steps):
            if BASE_STEP in steps and results[step].get(mark) != before:
                tasks = {
                    name: scored
                    | {
                        "from_base": _differences(folder, name, step, BASE_STEP),
                        "from_previous": _differences(folder, name, step, before),
                    }
                    for name, scored in results[step][part].items()
                }
                compared[step] = compared[step] | {part: tasks, mark: before}
    return compared


def _differences(folder: Path, task: str, step: int, earlier: int) -> dict[str, dict[str, float]]:
    return differences(load_items(folder, task, step), load_items(folder, task, earlier))
