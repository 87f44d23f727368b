"""The harness's tasks that are offered, each with the local file that it reads instead of a download.

A task file of ours includes the harness's own and replaces its data set alone, so that prompts, few-shot texts and
filters stay the harness's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neox_core.errors import ConfigError, DataError
from neox_core.evaluation.items import LETTERS, MAX_ITEM_BYTES
from neox_core.storage.atomic import write_atomically
from tasks.evaluation.harness.settings import HarnessSettings

Record = Mapping[str, Any]


def _gsm8k(record: Record) -> dict[str, Any]:
    return {"question": record["question"], "answer": record["solution"], "gold": record["answer"]}


def _minerva(record: Record) -> dict[str, Any]:
    return {"problem": record["problem"], "solution": record["solution"]}


def _mmlu(record: Record) -> dict[str, Any]:
    lost = [isinstance(option, float) and math.isnan(option) for option in record["options"]]  # pandas' reading of None
    options = ["None" if gone else option for gone, option in zip(lost, record["options"], strict=True)]
    gold = LETTERS.index(record["answer"])
    return {"question": record["question"], "choices": options, "answer": gold, "gold": options[gold]}


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness."""

    include: str
    """Its file, below the harness's tasks."""
    file: str
    """JSON lines in the data folder."""
    document: Callable[[Record], dict[str, Any]]
    """From a line to the fields that the harness's templates name, and `gold`."""
    shots_file: str | None = None
    """JSON lines that few-shot texts come from, where the task's own file does not hold them."""
    generates: bool = True
    """Answers are written, not chosen."""
    last_number: bool = False
    """An answer without any sign is the last number."""


TASKS = {
    "gsm8k": HarnessTask("gsm8k/gsm8k.yaml", "gsm8k_test.jsonl", _gsm8k, "gsm8k_fewshot.jsonl", last_number=True),
    "gsm8k_cot": HarnessTask("gsm8k/gsm8k-cot.yaml", "gsm8k_test.jsonl", _gsm8k, last_number=True),
    # OCWCourses and MATH come as lines of `problem` and `solution`, whose last \boxed{} is the answer.
    "minerva_math": HarnessTask("minerva_math/minerva_math_algebra.yaml", "math_test.jsonl", _minerva),
    "ocw_courses": HarnessTask("minerva_math/minerva_math_algebra.yaml", "ocw_courses_test.jsonl", _minerva),
    "mmlu_stem": HarnessTask("mmlu/default/_default_template_yaml", "mmlu_stem_test.jsonl", _mmlu, generates=False),
    "sat_math": HarnessTask("mmlu/default/_default_template_yaml", "sat_math_test.jsonl", _mmlu, generates=False),
}
"""By name."""


def write_task_files(settings: HarnessSettings, harness: Path) -> Path:
    """Write the task files and their documents.

    Args:
        harness: the folder of the harness's own tasks.

    Returns:
        The folder of the task files.

    Raises:
        ConfigError: an unknown task, or one whose data is not in the data folder.
        DataError: a line lacks a field.
    """
    folder = settings.out / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    for name in settings.tasks:
        if name not in TASKS:
            raise ConfigError(f"unknown task {name!r}: there are {', '.join(TASKS)}")
        task = TASKS[name]
        files = {"test": _write_documents(settings.data / task.file, task, folder / f"{name}.test.jsonl", name)}
        if task.shots_file is not None:
            shots = settings.data / task.shots_file
            files["train"] = _write_documents(shots, task, folder / f"{name}.train.jsonl", name)
        text: dict[str, Any] = {"include": str(harness / task.include), "task": name, "tag": None}
        text |= {"dataset_path": "json", "dataset_name": None, "test_split": "test", **_splits(files)}
        text |= {"dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}}}
        write_atomically(folder / f"{name}.yaml", yaml.safe_dump(text, sort_keys=False))
    return folder


def _splits(files: Mapping[str, Path]) -> dict[str, Any]:
    return {} if "train" in files else {"training_split": None, "fewshot_split": None}


def _write_documents(path: Path, task: HarnessTask, written: Path, name: str) -> Path:
    if not path.is_file():
        raise ConfigError(
            f"task {name} reads {path}, which does not exist: put the items there, or give another --data"
        )
    write_atomically(written, "".join(json.dumps(document) + "\n" for document in _documents(path, task)))
    return written


def _documents(path: Path, task: HarnessTask) -> Iterator[dict[str, Any]]:
    empty = True
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        if len(line) > MAX_ITEM_BYTES:
            raise DataError(f"{path}, line {number} has {len(line):,} bytes, {MAX_ITEM_BYTES:,} at most: take it out")
        try:
            record = json.loads(line)
            document = {"id": str(record.get("id", f"line {number}"))} | task.document(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}, line {number} is no item of this task ({error!r}): correct it") from None
        empty = False
        yield document
    if empty:
        raise DataError(f"{path} holds no item: correct the path or the file")
