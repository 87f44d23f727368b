"""A chain whose training becomes worse exports its best checkpoint by a score, and keeps that and the last one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flows.llemma_pretrain import llemma_pretrain
from infra.s3.service import storage_service
from neox_core.artifact import read_artifact
from neox_core.checkpoint.manifest import list_checkpoints
from neox_core.storage.object_store import ObjectStore
from tests.e2e.runs import Run, copy_text, write_run
from tests.paths import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

BEST, LAST = 4, 8


def test_the_best_is_kept_and_exported(prefect_server: None, tmp_path: Path) -> None:
    copy_text(tmp_path)
    shutil.copy(ROOT / "data" / "eval" / "gsm8k_test.jsonl", tmp_path / "items.jsonl")
    changes = {
        "train": {
            "checkpoint_interval": 2,
            "validation": {"interval": 2},
            "changes": [{"from_step": BEST + 1, "lr": 1.0}],
        },
        "checkpoints": {"keep_last": 1, "keep_best": 1, "best_by": "gold/bits_per_byte"},
        "evaluate": {"tasks": {"gold": {"items": str(tmp_path / "items.jsonl"), "limit": 20}}},
        "export": {"checkpoint": "best"},
    }
    run = Run(write_run(tmp_path, changes))
    llemma_pretrain(str(run.path))
    found = read_artifact(run.stage_folder("evaluate")).summary["evaluations"]
    scores = {entry["step"]: entry["tasks"]["gold"]["metrics"]["bits_per_byte"]["value"] for entry in found}
    assert min(scores, key=scores.__getitem__) == BEST
    with storage_service(run.config.storage, run.workdir) as storage:
        kept = list_checkpoints(ObjectStore(storage), run.stage_folder("train").name)
    assert [manifest.step for manifest in kept] == [BEST, LAST]
    # The last one's weights have grown by the learning rate.
    exported = load_file(run.stage_folder("export") / "model.safetensors")
    assert max(float(tensor.abs().max()) for tensor in exported.values()) < 2
