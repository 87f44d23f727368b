"""evaluate: perplexity and scores of each checkpoint as it appears in the object store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from neox_core.artifact import Artifact, fingerprint
from neox_core.checkpoint.scores import publish_scores
from neox_core.config import RunConfig
from neox_core.errors import LlemmaError
from neox_core.progress import Progress
from neox_core.storage.atomic import write_atomically
from neox_core.train.identity import training_fingerprint
from neox_core.train.lineage import earlier_configs
from tasks.evaluation.contamination import overlapping_items, without_overlap
from tasks.evaluation.generation import (
    GenerationJob,
    answers_so_far,
    finish,
    generate_rank,
    progress_text,
    steps_to_generate,
)
from tasks.evaluation.jobs import Report, follow_to_end
from tasks.evaluation.kept_items import GENERATED, compare, generated_folder, inherit_items, keep_items, scored_tasks
from tasks.identity.specs import EVALUATE, evaluate_spec
from tasks.identity.stage import StageResult, StageSpec, require, run_stage, try_claim
from tasks.identity.training import Training
from tasks.jobs.launch import Job, find_job, find_jobs, submit_or_attach
from tasks.jobs.retry import SchedulerRetry
from tasks.prepare import tokenizer_of
from tasks.train import FAILURE_FILE

EVALUATIONS_FILE = "evaluations.json"
_BASE_STEP = 0
_PATIENCE_SECONDS = 60.0
_REPORT_SECONDS = 1.0


def evaluate(training: Training, progress: Progress) -> StageResult:
    """Evaluate the base weights and every checkpoint until the last step's is through.

    A training with changes includes what was evaluated of the trainings that it was before them.

    Raises:
        LlemmaError: training ended without its last checkpoint; evaluations so far are kept.
        LaunchError: an evaluation job failed, or SLURM does not answer for long.
    """
    started, config = time.time(), training.config
    data, weights = require(training.data), require(training.weights)
    spec = evaluate_spec(config, training.fingerprint)

    def build(folder: Path) -> Mapping[str, Any]:
        results: dict[int, dict[str, Any]]
        overlapping = overlapping_items(config, data.folder)
        results, retry_policy = _inherited(training, folder) | _load(folder), SchedulerRetry()

        def report(text: str = "") -> None:
            """Tell how far it is; also the moment at which an interruption is heard, so never long apart."""
            step = max(results, default=_BASE_STEP)
            text = text or (_describe(results[step]) if results else "waiting for the base weights' evaluation")
            progress(step / config.train.steps, text)

        while True:
            available = _available(training)
            todo = [(prefix, step) for step, prefix in available.items() if step not in results]
            if todo:
                for prefix, found in groupby(sorted(todo), key=itemgetter(0)):
                    for result in _run_job(spec, data, weights, prefix, [step for _, step in found], report):
                        kept = keep_items(folder, result)
                        left = without_overlap(folder, kept["step"], kept["tasks"], overlapping)
                        results[kept["step"]] = kept | {"tasks": left}
                        _publish(training, prefix, results[kept["step"]])
                    results = compare(folder, results)
                    _store(folder, results)
                continue
            if waiting := steps_to_generate(config, results, available):
                step = waiting[0]
                written = _generate(training, spec, folder, step, available[step], report)
                results[step] = results[step] | {GENERATED: without_overlap(folder, step, written, overlapping)}
                _publish(training, available[step], results[step])
                results = compare(folder, results)
                _store(folder, results)
                continue
            if config.train.steps in results:
                break
            if _training_failed(training, started, retry_policy):
                report()  # raises if it is an interruption of both that has ended training
                raise LlemmaError(
                    f"training ended before step {config.train.steps}; evaluated so far: steps {sorted(results)}. "
                    "Go on with both: `llemma run CONFIG train evaluate`"
                )
            _wait(config.evaluate.poll_seconds, report)
        report()
        return {"evaluations": [results[step] for step in sorted(results)]}

    return run_stage(spec, build, progress)


def _publish(training: Training, prefix: str, result: Mapping[str, Any]) -> None:
    """Put a checkpoint's scores beside its manifest in the store."""
    if result["step"] != _BASE_STEP and (tasks := scored_tasks(result)):
        publish_scores(training.store, prefix, result["step"], tasks)


def evaluation_jobs(spec: StageSpec) -> list[Job]:
    """All jobs of this evaluation."""
    return find_jobs(spec.config.workdir / "jobs", _key_prefix(spec))


def _key_prefix(spec: StageSpec) -> str:
    return spec.fingerprint[:8]


def _wait(seconds: float, report: Callable[[], None]) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        report()
        time.sleep(min(left, _REPORT_SECONDS))


def _available(training: Training) -> dict[int, str]:
    """Steps that can be evaluated, and the key below which their checkpoints lie."""
    found = {step: prefix for step, (prefix, _) in training.lineage_checkpoints().items()}
    return {_BASE_STEP: training.prefix} | found


def _inherited(training: Training, folder: Path) -> dict[int, dict[str, Any]]:
    """Results for the steps that this training shares with those before its changes."""
    results: dict[int, dict[str, Any]] = {}
    for earlier, last_step in reversed(earlier_configs(training.config)):
        weights = training.weights.weights or training.weights.fingerprint
        before = evaluate_spec(earlier, training_fingerprint(earlier, training.data.fingerprint, weights)).folder
        found = {step: result for step, result in _load(before).items() if step <= last_step}
        inherit_items(folder, before, found)
        results |= found
    return results


def _training_failed(training: Training, since: float, retry_policy: SchedulerRetry) -> bool:
    """Whether the train stage failed since then, or its job died without anyone to notice.

    What an earlier attempt left does not count at first: a train stage that starts beside this one replaces it.
    """
    failure = training.scratch / FAILURE_FILE
    impatient = time.time() - since > _PATIENCE_SECONDS
    if failure.is_file():
        return impatient or failure.stat().st_mtime > since
    with try_claim(training.spec) as nobody_is_at_work:
        if not nobody_is_at_work:  # a train stage is, and submits the job again if need be
            return False
    job = find_job(training.config.workdir / "jobs", training.fingerprint)
    return job is not None and retry_policy.ask(job.state) in ("failed", "cancelled") and impatient


def _run_job(
    spec: StageSpec, data: Artifact, weights: Artifact, prefix: str, steps: list[int], report: Report
) -> list[dict[str, Any]]:
    """Evaluate some steps in one job of `parallel.tensor` ranks on one node."""
    config = spec.config
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

    results: list[dict[str, Any]] = follow_to_end(submit, report, config.launch.max_restarts)
    return results


def _generate(training: Training, spec: StageSpec, folder: Path, step: int, prefix: str, report: Report) -> Any:
    """Let a checkpoint write answers, in a job of one rank; returns what the artifact keeps of it."""
    config, weights = spec.config, require(training.weights)
    key = _key_prefix(spec) + fingerprint("generate-job", {"prefix": prefix, "step": step}, {})[:56]
    job = GenerationJob(
        step,
        weights.folder,
        prefix,
        tokenizer_of(require(training.data)),
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


def _load(folder: Path) -> dict[int, dict[str, Any]]:
    """Results that an interrupted call left."""
    path = folder / EVALUATIONS_FILE
    if not path.is_file():
        return {}
    return {result["step"]: result for result in json.loads(path.read_text(encoding="utf-8"))}


def _store(folder: Path, results: Mapping[int, dict[str, Any]]) -> None:
    write_atomically(folder / EVALUATIONS_FILE, json.dumps([results[step] for step in sorted(results)], indent=1))


def _describe(result: Mapping[str, Any]) -> str:
    perplexities = ", ".join(f"{name} {values['perplexity']:.1f}" for name, values in result["sources"].items())
    return f"step {result['step']}: perplexity {perplexities}"
