"""`evaluate.generate`: chosen checkpoints write answers, each in a job of its own on one GPU.

What a checkpoint wrote is in `generated/step-000025` of the evaluation's folder, answer by answer, so that a job that
was killed goes on with the items that are left.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox_core.config import GenerationConfig, RunConfig
from neox_core.errors import ConfigError
from neox_core.storage.atomic import write_atomically
from tasks.evaluation.kept_items import BASE_STEP, GENERATED, Result, generated_folder, written_name
from tasks.harness.catalogue import TASKS, check_tasks, set_files
from tasks.harness.documents import read_documents

logger = logging.getLogger(__name__)

_PROGRESS_FILE = "progress.txt"
_LEFT_BY_JOB = ("cache", ".claims", _PROGRESS_FILE)
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class GenerationJob:
    """What one job reads."""

    step: int
    weights: Path
    """Folder of the NeoX shards that training starts from: step 0."""
    prefix: str
    """Key of the checkpoint's training in the store."""
    tokenizer: Path
    special_ids: Mapping[str, Any]
    """The base's, for the export."""
    scratch: Path
    """Folder for the checkpoint and its export; kept until the job is through."""
    out: Path
    """Folder for the answers."""


def check_generation(config: RunConfig) -> None:
    """Whether the harness, the tasks and their files are there, and these can be read.

    Raises:
        ConfigError: one is not.
        DataError: a line is no item of its task, or there are too few.
    """
    if (generate := config.evaluate.generate) is None:
        return
    check_tasks(generate.tasks)
    for path in set_files(generate):
        if not path.is_file():
            raise ConfigError(f"evaluate.generate: {path} does not exist: put the items there or correct `data`")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("evaluate.generate needs the harness: `pip install 'llemma-pretrain[harness]'`")
    for name in generate.tasks:
        for file, at_least in TASKS[name].splits.values():
            read_documents(generate.data / file, TASKS[name].document, name, at_least)


def steps_to_generate(config: RunConfig, results: Mapping[int, Result], available: Collection[int]) -> list[int]:
    """Evaluated checkpoints that are to write answers, and have not."""
    chosen = [step for step in sorted(results) if config.evaluate.is_to_generate(step, config.train.steps)]
    return [step for step in chosen if GENERATED not in results[step] and step in available]


def generate_rank(config: RunConfig, job: GenerationJob) -> dict[str, Any]:
    """What the job runs: export the checkpoint, answer the tasks, return the content of results.json."""
    from tasks.harness.run import evaluate_model
    from tasks.harness.settings import HarnessSettings

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in _RANK_VARIABLES:  # one process; the harness would take them for a group of them
        os.environ.pop(name, None)
    generate = config.evaluate.generate
    assert generate is not None
    job.out.mkdir(parents=True, exist_ok=True)
    settings = HarnessSettings(
        model=_exported(config, job),
        data=generate.data,
        out=job.out,
        identity=f"{job.prefix or 'base'} step {job.step}",
        **{name: getattr(generate, name) for name in GenerationConfig.model_fields if name not in ("every", "data")},
    )

    def progress(share: float, text: str) -> None:
        logger.info("%.0f%%, %s", 100 * share, text)
        write_atomically(job.out / _PROGRESS_FILE, text)

    results = evaluate_model(settings, progress)
    shutil.rmtree(job.scratch, ignore_errors=True)
    return results


def _exported(config: RunConfig, job: GenerationJob) -> Path:
    """The checkpoint in Hugging Face's format; what an earlier attempt exported is used."""
    from neox_core.checkpoint.conversion.export import export_huggingface
    from neox_core.checkpoint.formats.special_ids import from_json
    from neox_core.checkpoint.manifest import download_checkpoint, list_checkpoints
    from neox_core.storage.object_store import ObjectStore

    model = job.scratch / "model"
    if (model / "config.json").is_file():  # it comes last
        return model
    weights = job.weights
    if job.step != BASE_STEP:
        store = ObjectStore(config.storage)
        manifest = {found.step: found for found in list_checkpoints(store, job.prefix)}[job.step]
        weights = download_checkpoint(store, job.prefix, manifest, job.scratch, lambda name: name.startswith("layer_"))
    export_huggingface(
        weights, model, config.model, job.tokenizer, config.train.sequence_length, special=from_json(job.special_ids)
    )
    return model


def answers_so_far(out: Path) -> int:
    """Batches that are answered: what a killed job will not do again."""
    return sum(len(path.read_bytes().splitlines()) for path in out.glob("*/*.jsonl") if path.parent.name in TASKS)


def progress_text(job: GenerationJob) -> str:
    """How far the job is."""
    path = job.out / _PROGRESS_FILE
    try:
        return f"step {job.step} writes answers: {path.read_text(encoding='utf-8')}"
    except FileNotFoundError:
        return f"step {job.step} writes answers: starting"


def finish(folder: Path, step: int, results: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a checkpoint's results: per task the items and the metrics; what the job alone needs goes."""
    out = generated_folder(folder, step)
    for name in _LEFT_BY_JOB:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return {
        written_name(task): {"items": found["items"], "seconds": found["seconds"], "metrics": found["scores"]}
        for task, found in results.items()
    }
