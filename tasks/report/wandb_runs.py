"""A training's runs of Weights & Biases, and its evaluation's: where they are, and the upload of what is offline."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

from neox_core.errors import LlemmaError
from neox_core.storage.claims import is_claimed
from neox_core.train.observe.wandb_run import WandbRun, address_of, offline_folders
from tasks.evaluation.score_log import score_run
from tasks.identity.specs import evaluate_spec
from tasks.identity.training import Training
from tasks.train import training_jobs

_WANDB = (sys.executable, "-m", "wandb")


def wandb_links(training: Training) -> dict[str, str]:
    """Where the runs are, by what a page calls them: an address, or the folder that waits for its upload."""
    links = {}
    for run, _ in _runs(training):
        if address := address_of(training.scratch, run):
            links[f"W&B: {run.kind}"] = address
        if offline := list(offline_folders(training.scratch, run)):
            links[f"W&B: {run.kind}, {len(offline)} not uploaded"] = str(offline[0].parent)
    return links


def upload_runs(training: Training) -> int:
    """Upload what was written offline, by `wandb sync`, which says what it does; jobs of one run go into one run of
    W&B, in their order. What a job or an evaluation still writes is left for later.

    Returns:
        The number of folders that were uploaded.

    Raises:
        LlemmaError: some were not.
    """
    waiting = []
    for run, is_at_work in _runs(training):
        folders = list(offline_folders(training.scratch, run))
        waiting += folders[:-1] if is_at_work else folders
    if not waiting:
        return 0
    # Each job of a run continues it, so they are uploaded one after the other.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SILENT"}
    command = [*_WANDB, "sync", *map(str, waiting)]
    status = subprocess.run(command, env=environment, cwd=training.scratch, check=False).returncode
    left = {folder for run, _ in _runs(training) for folder in offline_folders(training.scratch, run)} & set(waiting)
    if left:  # the command ends with 0 then, too
        raise LlemmaError(
            f"wandb sync ended with status {status}, and {len(left)} of {len(waiting)} runs were not uploaded, such as "
            f"{min(left)}: see above what it says; WANDB_API_KEY must be set, or `wandb login` have been run"
        )
    return len(waiting)


def _runs(training: Training) -> Iterator[tuple[WandbRun, bool]]:
    """The training's and the evaluation's, each with whether somebody may be writing it."""
    jobs = training_jobs(training)
    yield WandbRun(training.fingerprint, "train", training.fingerprint), any(not job.done() for job in jobs)
    spec = evaluate_spec(training.config, training.fingerprint)
    yield (
        score_run(spec.fingerprint, training.fingerprint),
        is_claimed(training.config.workdir, spec.folder.name),
    )
