"""Which checkpoint is exported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from neox_core.config import CheckpointsConfig, EvaluateConfig, EvaluationTask, ExportConfig, RunConfig
from neox_core.errors import CheckpointError
from tasks import export
from tasks.identity.specs import export_spec
from tests.neox_core.train.small_training import CONFIG


@dataclass
class Trained:
    """Stands for a training with checkpoints of some steps."""

    config: RunConfig
    steps: tuple[int, ...]
    prefix: str = "train-1"
    fingerprint: str = "1"
    spec: Any = field(default_factory=lambda: SimpleNamespace(identity="train"))

    def lineage_checkpoints(self) -> dict[int, tuple[str, Any]]:
        return {step: (self.prefix, SimpleNamespace(step=step)) for step in self.steps}


def configured(tmp_path: Path, best_by: str) -> RunConfig:
    (tmp_path / "sums.jsonl").write_text("{}")
    tasks = {"sums": EvaluationTask(items=tmp_path / "sums.jsonl")}
    return CONFIG.model_copy(
        update={
            "workdir": tmp_path,
            "checkpoints": CheckpointsConfig(best_by=best_by),
            "evaluate": EvaluateConfig(tasks=tasks),
            "export": ExportConfig(checkpoint="best"),
        }
    )


def scored(step: int, bits: float) -> dict[str, Any]:
    return {"step": step, "sources": {}, "tasks": {"sums": {"metrics": {"bits_per_byte": {"value": bits}}}}}


def test_the_best_by_a_score_of_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations = [scored(0, 0.5), scored(25, 1.2), scored(50, 1.0), scored(75, 1.0), scored(100, 1.1)]
    monkeypatch.setattr(export, "require", lambda identity: SimpleNamespace(summary={"evaluations": evaluations}))
    config = configured(tmp_path, "sums/bits_per_byte")
    assert export._chosen(Trained(config, (25, 50, 75, 100)))[1].step == 50  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"that of step 50, which is not in the store; there are \[100\]"):
        export._chosen(Trained(config, (100,)))  # type: ignore[arg-type]


def test_the_best_by_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {0: 0.5, 20: "NaN", 25: 3.0, 30: 1.0, 50: 2.0, 75: 2.5}  # none was saved at 0 and 30
    lines = "".join(f'{{"step": {step}, "validation/loss": {loss}}}\n' for step, loss in losses.items())
    (tmp_path / "metrics.jsonl").write_text(lines)
    monkeypatch.setattr(export, "require", lambda identity: SimpleNamespace(folder=tmp_path))
    found = export._chosen(Trained(configured(tmp_path, "validation"), (25, 50, 75, 100)))  # type: ignore[arg-type]
    assert found[1].step == 50
    # A job that was stopped saves at any step, and the last step is saved whatever the interval.
    found = export._chosen(Trained(configured(tmp_path, "validation"), (25, 30, 75)))  # type: ignore[arg-type]
    assert found[1].step == 30
    with (tmp_path / "metrics.jsonl").open("a") as rows:
        rows.write(f'{{"step": {CONFIG.train.steps + 1}, "validation/loss": 0.75}}\n')
    longer = configured(tmp_path, "validation")
    longer = longer.model_copy(update={"train": longer.train.model_copy(update={"steps": CONFIG.train.steps + 1})})
    assert export._chosen(Trained(longer, (25, CONFIG.train.steps + 1)))[1].step == CONFIG.train.steps + 1  # type: ignore[arg-type]


def test_another_choice_is_another_model(tmp_path: Path) -> None:
    best = configured(tmp_path, "sums/bits_per_byte")
    last = best.model_copy(update={"export": ExportConfig()})
    assert (
        export_spec(last, "1").fingerprint
        == export_spec(last.model_copy(update={"evaluate": EvaluateConfig()}), "1").fingerprint
    )
    assert export_spec(best, "1").fingerprint != export_spec(last, "1").fingerprint
    assert set(export_spec(best, "1").inputs) == {"train", "evaluate"}
