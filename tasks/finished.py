"""What a stage has made, for those that come after it; and how to have it made again."""

from __future__ import annotations

import shutil

from neox_core.config import RunConfig
from neox_core.errors import LlemmaError
from neox_core.storage.claims import try_claim_name
from tasks.evaluation.jobs import evaluation_jobs
from tasks.identity.current import current, find_current, outlived
from tasks.identity.specs import CONVERT, EVALUATE, EXPORT, PREPARE_DATA, TRAIN, evaluate_spec, export_spec
from tasks.identity.stage import StageIdentity, StageResult, StageSpec, require
from tasks.identity.training import Training


def finished_stage(config: RunConfig, training: Training | None, name: str) -> StageResult:
    """A stage's finished, intact result.

    Args:
        training: needed for the stages from train on.

    Raises:
        LlemmaError: the stage is not finished.
    """
    return StageResult(require(_identity(config, training, name)), skipped=True)


def forget_stage(config: RunConfig, training: Training | None, name: str) -> None:
    """Remove what a stage has made from the workdir, so that it is made again. Checkpoints in the store stay.

    Raises:
        LlemmaError: another run is at work on the stage, or what it was made of is gone.
    """
    if name in (PREPARE_DATA, CONVERT):
        if find_current(config, name) is None:
            return
        if outlived(config, name):
            raise LlemmaError(f"stage {name} cannot be made again, what it was made of is gone: leave out force")
    identity = _identity(config, training, name)
    with try_claim_name(config.workdir, identity.folder.name) as claimed:
        if not claimed:
            raise LlemmaError(f"another run is at work on stage {name}: cancel it first, or leave out force")
        if name == EVALUATE and training:
            for job in evaluation_jobs(evaluate_spec(config, training.fingerprint)):
                job.cancel()
                shutil.rmtree(job.home)
        shutil.rmtree(identity.folder, ignore_errors=True)


def _identity(config: RunConfig, training: Training | None, name: str) -> StageIdentity:
    if name in (PREPARE_DATA, CONVERT):
        return current(config, name)
    assert training is not None
    specs: dict[str, StageSpec] = {
        TRAIN: training.spec,
        EVALUATE: evaluate_spec(config, training.fingerprint),
        EXPORT: export_spec(config, training.fingerprint),
    }
    return specs[name].identity
