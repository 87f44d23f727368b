"""The tasks that are offered, each with the local file that it reads instead of a download.

A task file of ours includes the harness's own and replaces its data set alone, so that prompts, few-shot texts and
filters stay the harness's. It has none for the likelihood of gold solutions: those files are whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from neox_core.config import GenerationConfig
from neox_core.errors import ConfigError
from neox_core.storage.atomic import write_atomically
from tasks.harness.documents import Document, gsm8k, minerva, minif2f, mmlu, write_documents
from tasks.harness.settings import TASK_FILES, HarnessSettings


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness."""

    file: str
    """JSON lines in the data folder."""
    document: Document
    include: str | None = None
    """The harness's own file, below its tasks."""
    kind: Literal["written", "choices", "solution"] = "written"
    """Answers are written, chosen by likelihood, or there is a gold solution whose likelihood counts."""
    shots_file: str | None = None
    """JSON lines that few-shot texts come from, where the task's own file does not hold them."""
    shots: int = 1
    """How many of those lines are shown."""
    last_number: bool = False
    """An answer without any sign is the last number."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """Of a task that the harness does not have: its templates."""

    @property
    def splits(self) -> dict[str, tuple[str, int]]:
        """By the harness's name of it the file of each split, and how many items it must hold."""
        return {"test": (self.file, 1)} | ({"train": (self.shots_file, self.shots)} if self.shots_file else {})


def _solution(file: str, document: Document, prompt: str, text: str) -> HarnessTask:
    own = {"output_type": "loglikelihood", "doc_to_text": prompt, "doc_to_target": f" {text}"}
    return HarnessTask(file, document, kind="solution", own=own)


_MINERVA, _MMLU = "minerva_math/minerva_math_algebra.yaml", "mmlu/default/_default_template_yaml"
_MINIF2F = "minif2f_isabelle_test.jsonl"
TASKS = {
    "gsm8k": HarnessTask("gsm8k_test.jsonl", gsm8k, "gsm8k/gsm8k.yaml", "written", "gsm8k_fewshot.jsonl", 5, True),
    "gsm8k_cot": HarnessTask("gsm8k_test.jsonl", gsm8k, "gsm8k/gsm8k-cot.yaml", last_number=True),
    # OCWCourses and MATH come as lines of `problem` and `solution`, whose last \boxed{} is the answer.
    "minerva_math": HarnessTask("math_test.jsonl", minerva, _MINERVA),
    "ocw_courses": HarnessTask("ocw_courses_test.jsonl", minerva, _MINERVA),
    "mmlu_stem": HarnessTask("mmlu_stem_test.jsonl", mmlu, _MMLU, "choices"),
    "sat_math": HarnessTask("sat_math_test.jsonl", mmlu, _MMLU, "choices"),
    # As `evaluate.tasks` scores each checkpoint by default: the same prompt, the same text.
    "gsm8k_solutions": _solution("gsm8k_test.jsonl", gsm8k, "Question: {{question}}\nAnswer:", "{{answer}}"),
    "minif2f_proofs": _solution(_MINIF2F, minif2f, "Problem: {{informal_statement}}\nProof:", "{{informal_proof}}"),
    "minif2f_statements": _solution(
        _MINIF2F, minif2f, "Problem: {{informal_statement}}\nIsabelle:", "{{formal_statement}}"
    ),
}
"""By name."""


def check_tasks(names: Iterable[str]) -> None:
    """Whether all are offered.

    Raises:
        ConfigError: one is not, or none is named.
    """
    asked = tuple(names)
    if not asked:
        raise ConfigError(f"no task: give one or more of {', '.join(TASKS)}")
    for name in asked:
        if name not in TASKS:
            raise ConfigError(f"unknown task {name!r}: there are {', '.join(TASKS)}")


def set_files(generate: GenerationConfig) -> list[Path]:
    """The files that tasks read; of those that are not known none."""
    known = [TASKS[name] for name in generate.tasks if name in TASKS]
    names = dict.fromkeys(name for task in known for name, _ in task.splits.values())
    return [generate.data / name for name in names]


def write_task_files(settings: HarnessSettings, harness: Path) -> Path:
    """Write the task files and their documents.

    Args:
        harness: the folder of the harness's own tasks.

    Returns:
        The folder of the task files.

    Raises:
        ConfigError: an unknown task, or one whose data is not in the data folder, or has changed since.
        DataError: a line is no item of its task.
    """
    folder = settings.out / TASK_FILES
    folder.mkdir(parents=True, exist_ok=True)
    check_tasks(settings.tasks)
    for name in settings.tasks:
        task = TASKS[name]
        files = {
            split: write_documents(
                settings.data / file, task.document, folder / f"{name}.{split}.jsonl", name, at_least
            )
            for split, (file, at_least) in task.splits.items()
        }
        text: dict[str, Any] = {"include": str(harness / task.include)} if task.include else {}
        text |= {"task": name, "tag": None, **task.own}
        text |= {"dataset_path": "parquet", "dataset_name": None, "test_split": "test", **_splits(files)}
        text |= {"dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}}}
        write_atomically(folder / f"{name}.yaml", yaml.safe_dump(text, sort_keys=False))
    return folder


def _splits(files: Mapping[str, Path]) -> dict[str, Any]:
    return {} if "train" in files else {"training_split": None, "fewshot_split": None}
