"""Jobs of an evaluation, followed to their end."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from neox_core.artifact import fingerprint
from neox_core.config import RunConfig
from neox_core.data.tokenization.tokenizer_file import tokenizer_in
from tasks.evaluation.generation import GenerationJob, answers_so_far, finish, generate_rank, progress_text
from tasks.evaluation.kept_items import generated_folder
from tasks.identity.specs import EVALUATE
from tasks.identity.stage import StageSpec, require
from tasks.identity.training import Training
from tasks.jobs.failure import JobFailed
from tasks.jobs.launch import Job, find_jobs, submit_or_attach
from tasks.jobs.restarts import run_to_end
from tasks.jobs.retry import SchedulerRetry

logger = logging.getLogger(__name__)


class Report(Protocol):
    """Tells how far the evaluation is, in these words or its own; also the moment at which it hears an interruption."""

    def __call__(self, text: str = "", /) -> None: ...


def follow_to_end(
    submit: Callable[[], Job],
    report: Report,
    max_restarts: int,
    saved: Callable[[], int] = lambda: 0,
    words: Callable[[], str] = lambda: "",
) -> Any:
    """What rank 0 of a job returned; it is submitted again as `run_to_end` does.

    Args:
        saved: how much of its work will not be lost.
        words: how far it is.

    Raises:
        JobFailed, LaunchError: see `run_to_end`.
    """

    def follow(job: Job) -> None:
        for _ in job.while_at_work():
            report(words())
            time.sleep(0.2)

    return run_to_end(lambda: SchedulerRetry().wait_for(submit, meanwhile=report), follow, saved, max_restarts, report)[
        0
    ]


def evaluation_jobs(spec: StageSpec) -> list[Job]:
    """All jobs of this evaluation."""
    return find_jobs(spec.config.workdir / "jobs", _key_prefix(spec))


def _key_prefix(spec: StageSpec) -> str:
    return spec.fingerprint[:8]


def evaluate_steps(
    spec: StageSpec, training: Training, prefix: str, steps: list[int], report: Report
) -> list[dict[str, Any]]:
    """Evaluate some steps in one job of `parallel.tensor` ranks on one node.

    Returns:
        A result per step; none if the job failed and steps have left the store meanwhile, as `checkpoints.keep_last`
        has it while a job waits for its turn: the others are left to another job.
    """
    config, data, weights = spec.config, require(training.data), require(training.weights)
    counts = {
        source: splits["validation"] for source, splits in data.summary["sources"].items() if "validation" in splits
    }
    # Keys of one evaluation begin alike, so that its jobs can be found (see `evaluation_jobs`).
    key = _key_prefix(spec) + fingerprint("evaluate-job", {"prefix": prefix, "steps": steps}, {})[:56]
    # A folder of its own: a job that outlived its flow may still be reading and deleting the same checkpoints.
    scratch = config.workdir / "scratch" / f"evaluate-{key[:16]}"

    def submit() -> Job:
        return submit_or_attach(
            config.launch,
            config.workdir / "jobs",
            EVALUATE,
            key,
            evaluate_rank,
            (config, data.folder, weights.folder, prefix, tuple(steps), counts, scratch),
            1,
            config.parallel.tensor,
        )

    try:
        results: list[dict[str, Any]] = follow_to_end(submit, report, config.launch.max_restarts)
    except JobFailed as error:
        stored = training.lineage_checkpoints()
        gone = [step for step in steps if step and step not in stored]
        if not gone:
            raise
        logger.warning("steps %s are not evaluated, their checkpoints have left the store: %s", gone, error)
        shutil.rmtree(scratch, ignore_errors=True)
        return []
    return results


def generate_answers(training: Training, spec: StageSpec, folder: Path, step: int, prefix: str, report: Report) -> Any:
    """Let a checkpoint write answers, in a job of one rank; returns what the artifact keeps of it."""
    config, weights = spec.config, require(training.weights)
    key = _key_prefix(spec) + fingerprint("generate-job", {"prefix": prefix, "step": step}, {})[:56]
    job = GenerationJob(
        step,
        weights.folder,
        prefix,
        tokenizer_in(require(training.data).folder),
        weights.summary.get("special_ids") or {},
        config.workdir / "scratch" / f"generate-{key[:16]}",
        generated_folder(folder, step),
    )

    def submit() -> Job:
        return submit_or_attach(
            config.launch, config.workdir / "jobs", "generate", key, generate_rank, (config, job), 1, 1
        )

    found = follow_to_end(
        submit,
        report,
        config.launch.max_restarts,
        lambda: answers_so_far(job.out),
        lambda: progress_text(job),
    )
    return finish(folder, step, found)


def evaluate_rank(
    config: RunConfig,
    data: Path,
    weights: Path,
    prefix: str,
    steps: tuple[int, ...],
    counts: dict[str, dict[str, int]],
    scratch: Path,
) -> list[dict[str, Any]]:
    """What each rank of the job runs; torch is imported by the ranks alone, as in `train_rank`."""
    from neox_core.evaluation.perplexity import EvaluateJob, evaluate_checkpoints

    return evaluate_checkpoints(config, EvaluateJob(data, weights, prefix, steps, counts, scratch))
