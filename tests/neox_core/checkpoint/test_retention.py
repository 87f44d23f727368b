from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from neox_core.artifact import FileRecord
from neox_core.checkpoint.manifest import Manifest, list_checkpoints, publish_manifest
from neox_core.checkpoint.retention import apply_retention, remove_remains, superseded
from neox_core.checkpoint.scores import publish_scores
from neox_core.config import CheckpointsConfig, EvaluateConfig, GenerationConfig, RunConfig
from neox_core.storage.object_store import ObjectStore
from tests.neox_core.train.small_training import CONFIG

PREFIX = "train-1"
LOSSES = {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5}


def publish(store: ObjectStore, step: int) -> None:
    store.put_text(f"{PREFIX}/global_step{step}/state.pt", "state")
    files = (FileRecord("state.pt", 5, "0" * 64),)
    manifest = Manifest(step, 8 * step, files=files, layout={}, fingerprint="1", config={})
    publish_manifest(store, PREFIX, manifest)


def config(generate: GenerationConfig | None = None, **keep: Any) -> RunConfig:
    changes = {"checkpoints": CheckpointsConfig(**keep), "evaluate": EvaluateConfig(generate=generate)}
    return CONFIG.model_copy(update=changes)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ({}, [10, 20, 30, 40, 50]),
        ({"keep_last": 1}, [50]),
        ({"keep_last": 2}, [40, 50]),
        ({"keep_last": 9}, [10, 20, 30, 40, 50]),
        ({"keep_last": 1, "keep_every": 20}, [20, 40, 50]),
        ({"keep_last": 1, "keep_best": 2}, [20, 30, 50]),
        ({"keep_last": 1, "keep_every": 40, "keep_best": 1}, [20, 40, 50]),
    ],
)
def test_what_is_kept(keep: dict[str, Any], kept: list[int]) -> None:
    steps = [30, 10, 50, 20, 40]
    gone = superseded(steps, CheckpointsConfig(**keep), LOSSES)
    assert sorted(set(steps) - set(gone)) == kept


def test_rules_without_keep_last_are_refused() -> None:
    with pytest.raises(ValidationError, match="need keep_last"):
        CheckpointsConfig(keep_every=5)


def test_an_incomplete_newer_one_supersedes_nothing(store: ObjectStore) -> None:
    for step in (1, 2, 3):
        publish(store, step)
    store.delete([f"{PREFIX}/global_step3/state.pt"])
    apply_retention(store, PREFIX, config(keep_last=1), {})
    assert [manifest.step for manifest in list_checkpoints(store, PREFIX)] == [2]
    assert [info.key for info in store.list(f"{PREFIX}/global_step1/")] == []


def test_remains_of_dead_jobs_are_removed(store: ObjectStore, tmp_path: Path) -> None:
    publish(store, 2)
    for key in ("global_step1/half.pt", "global_step2/reports/x/rank_0.json", "global_step3/coming.pt"):
        store.put_text(f"{PREFIX}/{key}", "x")
    store.put_text("train-2/global_step1/other.pt", "x")
    client, where = store._client, {"Bucket": store.bucket, "Key": store.full_key(f"{PREFIX}/global_step3/big.pt")}
    client.create_multipart_upload(**where)  # type: ignore[arg-type]
    remove_remains(store, PREFIX)
    assert [info.key.removeprefix(f"{PREFIX}/") for info in store.list(f"{PREFIX}/")] == [
        "global_step2/manifest.json",
        "global_step2/state.pt",
        "global_step3/coming.pt",
    ]
    assert len(store.list("train-2/")) == 1
    assert not client.list_multipart_uploads(Bucket=store.bucket).get("Uploads")


def test_those_that_are_to_write_answers_stay_until_they_have(store: ObjectStore) -> None:
    run = config(GenerationConfig(every=2, tasks=("gsm8k_cot",), data="/sets"), keep_last=1)
    for step in (1, 2, 3, 4, 5):
        publish(store, step)
    publish_scores(store, PREFIX, "global_step2", {"sums": {}})
    publish_scores(store, PREFIX, "global_step4", {"sums": {}, "gsm8k_cot, written": {}})
    apply_retention(store, PREFIX, run, {})
    assert [manifest.step for manifest in list_checkpoints(store, PREFIX)] == [2, 5]
    publish_scores(store, PREFIX, "global_step2", {"gsm8k_cot, written": {}})
    apply_retention(store, PREFIX, run, {})
    assert [manifest.step for manifest in list_checkpoints(store, PREFIX)] == [5]
