"""A run that is small enough to test whole chains with, and a look at what it leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from infra.processes import ProcessRecord
from neox_core.config import RunConfig, load_config
from neox_core.config.load import merge
from tests.paths import ROOT
from tests.processes import is_running

STEPS = 8
INTERVAL = 4
GLOBAL_BATCH = 32
SEQUENCE = 64

SETTINGS: dict[str, Any] = {
    "include": str(ROOT / "configs" / "toy.yml"),
    "name": "small",
    "workdir": "run",
    "tokenizer": {"model": str(ROOT / "data" / "tokenizers" / "demo-2048.model")},
    "data": {"workers": 1},
    "model": {"num_layers": 2, "hidden_size": 64, "intermediate_size": 96, "rope_theta": 10000},
    "train": {
        "steps": STEPS,
        "sequence_length": SEQUENCE,
        "global_batch_tokens": SEQUENCE * GLOBAL_BATCH,
        "micro_batch_size": 2,
        "optimizer": {"lr": 1.0e-2},
        "schedule": {"warmup_steps": 2},
        "validation": {"interval": INTERVAL, "iterations": 1},
        "checkpoint_interval": INTERVAL,
    },
    "wandb": {"mode": "disabled"},
    "evaluate": {"poll_seconds": 0.2, "micro_batch_size": 16, "max_sequences": 32},
}
"""The toy run, smaller. Many small micro batches make a step last a while, so that tests can interfere."""


def write_run(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """The configuration of a small run in `folder`, whose text, base model and workdir lie next to it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"data": {"input": "text"}, "base_model": {"path": "base"}}
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump(merge(merge(SETTINGS, paths), changes or {})))
    return path


def copy_text(folder: Path) -> Path:
    """The smallest file of each source and split of the demo's text, in `folder`/text."""
    for split in (ROOT / "data" / "tiny-proof-pile").glob("*/*/"):
        if files := sorted(split.glob("*.jsonl.zst"), key=lambda file: file.stat().st_size):
            target = folder / "text" / split.parent.name / split.name
            target.mkdir(parents=True)
            shutil.copy(files[0], target)
    return folder / "text"


@dataclass(frozen=True)
class Run:
    """A run's configuration and what lies in its folders."""

    path: Path

    @property
    def config(self) -> RunConfig:
        """As the flows load it; its endpoint is 'embedded'."""
        return load_config(self.path)

    @property
    def workdir(self) -> Path:
        """Where everything of the run lies."""
        return self.config.workdir

    def stage_folder(self, stage: str) -> Path:
        """The one artifact folder of a stage."""
        (folder,) = self.workdir.glob(f"{stage}-*")
        return folder

    def rows(self) -> list[dict[str, Any]]:
        """The train stage's metrics, line by line."""
        return [json.loads(line) for line in (self.stage_folder("train") / "metrics.jsonl").read_text().splitlines()]

    def attempts(self, kind: str | None = None) -> list[Path]:
        """The folder of each job that was submitted, of one kind (train, evaluate) if it is given."""
        jobs = [path.parent for path in self.workdir.glob("jobs/*/job.json")]
        wanted = [job for job in jobs if kind is None or f"llemma-{kind}-" in (job / "job.json").read_text()]
        return sorted(attempt for job in wanted for attempt in job.glob("attempt-*"))

    def processes(self) -> list[psutil.Process]:
        """What runs on this run's behalf: servers, controllers, ranks."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def job_processes(self) -> list[ProcessRecord]:
        """The controllers and ranks of all jobs that have a controller, as they were recorded."""
        files = [path for attempt in self.attempts() for path in attempt.glob("controller*.json")]
        reports = [json.loads(path.read_text()) for path in files]
        records = [record for report in reports for record in (report["controller"], *report["ranks"])]
        return [ProcessRecord(**record) for record in records]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            traces = [*process.cmdline(), process.environ().get("PREFECT_HOME", "")]
        except (psutil.Error, ProcessLookupError):  # it has ended, or is another user's
            return False
        return any(str(self.workdir) in trace for trace in traces) and is_running(process.pid)


def training_values(rows: list[dict[str, Any]], first_step: int) -> dict[int, dict[str, float]]:
    """What is exactly reproducible of each step from `first_step` on; where a step is repeated, its last row."""
    names = ("train/loss", "train/gradient_norm", "train/lr", "train/sequences_consumed", "validation/loss")
    values: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["step"] >= first_step:
            values.setdefault(row["step"], {}).update({name: row[name] for name in names if name in row})
    return values
