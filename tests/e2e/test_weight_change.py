"""Mixture, learning rate and batch are changed in the middle of a training: nothing is lost or repeated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.evaluate import evaluate
from flows.train import train
from infra.s3.service import storage_service
from neox_core.artifact import read_artifact
from neox_core.checkpoint.manifest import list_checkpoints
from neox_core.storage.object_store import ObjectStore
from tasks.identity.training import resolve_training
from tests.e2e.conftest import Chain
from tests.e2e.runs import GLOBAL_BATCH, INTERVAL, SEQUENCE, STEPS, Run, training_values, write_run

pytestmark = pytest.mark.e2e
LR = 2.0e-3


def changed(chain: Chain, folder: Path, *patterns: str) -> Run:
    """The chain's run, after the first checkpoint with arxiv alone, another learning rate and twice the batch; and
    parts of the chain's workdir."""
    config, source = chain.run.config, chain.run.path.parent
    weights = {name: {"weight": int(name == "arxiv")} for name in config.data.sources}
    data = {"input": str(source / "text"), "weight_changes": [{"from_step": INTERVAL + 1, "sources": weights}]}
    recipe = {"from_step": INTERVAL + 1, "lr": LR, "global_batch_tokens": 2 * GLOBAL_BATCH * SEQUENCE}
    changes = {"data": data, "train": {"changes": [recipe]}, "base_model": {"path": str(source / "base")}}
    run = Run(write_run(folder, changes))
    for pattern in patterns:
        for path in chain.run.workdir.glob(pattern):
            shutil.copytree(path, run.workdir / path.name)
    return run


def consumed(run: Run, store: ObjectStore) -> dict[int, dict[str, Any]]:
    prefix = resolve_training(run.config).prefix
    return {manifest.step: dict(manifest.consumed) for manifest in list_checkpoints(store, prefix)}


def trained(run: Run, also: Callable[[ObjectStore], Any]) -> tuple[dict[str, Any], Any]:
    with storage_service(run.config.storage, run.workdir) as storage:
        summary = dict(train(str(run.path)).artifact.summary)
        return summary, also(ObjectStore(storage))


def test_a_change_goes_on_from_the_training_before_it(chain: Chain, tmp_path: Path) -> None:
    """As the training that knew of the change from its first step on, by losses, gradients and ledger, bit for bit."""
    branch = changed(chain, tmp_path / "branch", ".current", "prepare-data-*", "convert-*", "evaluate-*", "s3")
    whole = changed(chain, tmp_path / "whole", ".current", "prepare-data-*", "convert-*")
    old = evaluations(chain.run)

    def also(store: ObjectStore) -> tuple[Any, Any, Any]:
        return consumed(branch, store), consumed(chain.run, store), evaluate(str(branch.path))

    summary, (ledger, before, evaluated) = trained(branch, also)
    reference, ledger_of_whole = trained(whole, lambda store: consumed(whole, store))

    assert (summary["started_from_step"], reference["started_from_step"]) == (INTERVAL, 0)
    assert training_values(branch.rows(), 0) == training_values(whole.rows(), 0)
    until = {step: row for step, row in training_values(chain.run.rows(), 0).items() if step <= INTERVAL}
    assert {step: training_values(branch.rows(), 0)[step] for step in until} == until
    assert training_values(branch.rows(), STEPS) != training_values(chain.run.rows(), STEPS)

    rates = {row["step"]: row["lr"] for row in branch.rows() if "lr" in row}
    usual = {row["step"]: row["lr"] for row in chain.run.rows() if "lr" in row}
    peak = chain.run.config.train.optimizer.lr
    assert rates == pytest.approx({step: rate * (LR / peak if step > INTERVAL else 1) for step, rate in usual.items()})

    assert list(ledger) == [STEPS]  # the ancestor's stay its own
    assert ledger_of_whole == {INTERVAL: before[INTERVAL], STEPS: ledger[STEPS]}
    more = {"arxiv": (STEPS - INTERVAL) * 2 * GLOBAL_BATCH}
    for name, use in ledger[STEPS].items():
        assert use["sequences"] == before[INTERVAL][name]["sequences"] + more.get(name, 0)
        assert use["tokens"] == use["sequences"] * SEQUENCE
    assert [entry["step"] for entry in summary["consumed"]] == [INTERVAL, STEPS]

    curve = {entry["step"]: entry for entry in evaluated.artifact.summary["evaluations"]}
    assert list(curve) == [0, INTERVAL, STEPS]
    assert [curve[step] for step in (0, INTERVAL)] == [entry for entry in old if entry["step"] <= INTERVAL]
    assert curve[STEPS] not in old
    assert len(branch.attempts("evaluate")) == 1  # of the last step alone


def evaluations(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_artifact(run.stage_folder("evaluate")).summary["evaluations"]
    return found
