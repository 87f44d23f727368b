"""evaluate: perplexity and scores of each checkpoint as it appears in the object store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from neox_core.checkpoint.retention import apply_retention
from neox_core.checkpoint.scores import publish_scores
from neox_core.config import VALIDATION
from neox_core.errors import LlemmaError
from neox_core.progress import Progress
from neox_core.storage.atomic import write_atomically
from neox_core.train.identity import training_fingerprint
from neox_core.train.observe.metrics import METRICS_FILE, validation_losses
from neox_core.train.resuming.lineage import earlier_configs
from tasks.evaluation.contamination import overlapping_items, without_overlap
from tasks.evaluation.generation import steps_to_generate
from tasks.evaluation.jobs import evaluate_steps, generate_answers
from tasks.evaluation.kept_items import GENERATED, compare, inherit_items, keep_items, scored_tasks
from tasks.evaluation.score_log import ScoreLog, score_run
from tasks.identity.specs import evaluate_spec
from tasks.identity.stage import StageResult, StageSpec, require, run_stage, try_claim
from tasks.identity.training import Training
from tasks.jobs.launch import find_job
from tasks.jobs.retry import SchedulerRetry
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
    require(training.data), require(training.weights)
    spec = evaluate_spec(config, training.fingerprint)

    def build(folder: Path) -> Mapping[str, Any]:
        retry_policy = SchedulerRetry()
        run = score_run(spec.fingerprint, training.fingerprint)
        with ScoreLog(config, training.scratch, run) as score_log:
            found = _Scores(training, spec, folder, score_log, progress)
            while True:
                available = _available(training)
                if found.evaluate_new(available) or found.generate_next(available):
                    continue
                if config.train.steps in found.results:
                    break
                if _training_failed(training, started, retry_policy):
                    found.report()  # raises if it is an interruption of both that has ended training
                    raise LlemmaError(
                        f"training ended before step {config.train.steps}; evaluated so far: steps "
                        f"{sorted(found.results)}. Go on with both: `llemma run CONFIG train evaluate`"
                    )
                _wait(config.evaluate.poll_seconds, found.report)
            found.report()
            _let_go(training)
        return {"evaluations": [found.results[step] for step in sorted(found.results)]}

    return run_stage(spec, build, progress)


class _Scores:
    """What the checkpoints were scored, by step, and what has still to be."""

    def __init__(
        self, training: Training, spec: StageSpec, folder: Path, score_log: ScoreLog, progress: Progress
    ) -> None:
        self._training, self._spec, self._folder = training, spec, folder
        self._score_log, self._progress = score_log, progress
        self._overlapping = overlapping_items(spec.config, require(training.data).folder)
        self.results: dict[int, dict[str, Any]] = _inherited(training, folder) | _load(folder)
        self._next_look = 0.0

    def report(self, text: str = "", /) -> None:
        """Tell how far it is; also the moment at which an interruption is heard, so never long apart."""
        step = max(self.results, default=_BASE_STEP)
        waiting = "waiting for the base weights' evaluation"
        text = text or (_describe(self.results[step]) if self.results else waiting)
        self._progress(step / self._spec.config.train.steps, text)

    def evaluate_new(self, available: Mapping[int, str]) -> bool:
        """Evaluate the checkpoints that were not; False if there are none."""
        todo = [(prefix, step) for step, prefix in available.items() if step not in self.results]
        for prefix, found in groupby(sorted(todo), key=itemgetter(0)):
            for result in evaluate_steps(self._spec, self._training, prefix, [step for _, step in found], self.report):
                kept = keep_items(self._folder, result)
                step = kept["step"]
                self.results[step] = kept | {
                    "tasks": without_overlap(self._folder, step, kept["tasks"], self._overlapping)
                }
                self._tell(step)
            self._store()
        return bool(todo)

    def generate_next(self, available: Mapping[int, str]) -> bool:
        """Let the first checkpoint that is to write answers do so; False if there is none."""
        waiting = steps_to_generate(self._spec.config, self.results, available)
        for step in waiting[:1]:
            written = generate_answers(
                self._training, self._spec, self._folder, step, available[step], self._report_and_evaluate
            )
            self.results[step] = self.results[step] | {
                GENERATED: without_overlap(self._folder, step, written, self._overlapping)
            }
            self._tell(step)
            self._store()
        return bool(waiting)

    def _report_and_evaluate(self, text: str = "", /) -> None:
        """While a checkpoint writes answers, which can take hours, those that appear meanwhile are evaluated."""
        self.report(text)
        if time.monotonic() >= self._next_look:
            self.evaluate_new(_available(self._training))
            self._next_look = time.monotonic() + self._spec.config.evaluate.poll_seconds

    def _tell(self, step: int) -> None:
        """Put a checkpoint's scores next to its manifest, and into W&B."""
        tasks = scored_tasks(self.results[step])
        if tasks and (found := self._training.lineage_checkpoints().get(step)):
            prefix, manifest = found
            publish_scores(self._training.store, prefix, manifest.name, tasks)
        self._score_log.log(self.results[step])

    def _store(self) -> None:
        self.results = compare(self._folder, self.results)
        ordered = [self.results[step] for step in sorted(self.results)]
        write_atomically(self._folder / EVALUATIONS_FILE, json.dumps(ordered, indent=1))


def _let_go(training: Training) -> None:
    """Remove the checkpoints that stayed for their scores or answers alone."""
    config, folders = training.config, (training.scratch, training.spec.identity.folder)
    by_loss = config.checkpoints.best_by == VALIDATION
    if by_loss and config.evaluate.generate is None:
        return  # none has waited
    losses = next((found for folder in folders if (found := validation_losses(folder / METRICS_FILE))), {})
    if losses or not (by_loss and config.checkpoints.keep_best):
        apply_retention(training.store, training.prefix, config, losses)


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

    What an earlier attempt left does not count at first: a train stage that starts next to this one replaces it.
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


def _load(folder: Path) -> dict[int, dict[str, Any]]:
    """Results that an interrupted call left."""
    path = folder / EVALUATIONS_FILE
    if not path.is_file():
        return {}
    return {result["step"]: result for result in json.loads(path.read_text(encoding="utf-8"))}


def _describe(result: Mapping[str, Any]) -> str:
    perplexities = ", ".join(f"{name} {values['perplexity']:.1f}" for name, values in result["sources"].items())
    return f"step {result['step']}: perplexity {perplexities}"
