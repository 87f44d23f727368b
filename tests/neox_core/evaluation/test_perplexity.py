"""Perplexity on two tensor-parallel ranks against transformers on the same windows, in fp32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from neox_core.artifact import FileRecord
from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.reference import llama_from_meta
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.formats.neox import layer_file
from neox_core.checkpoint.manifest import Manifest, publish_manifest
from neox_core.config import EvaluateConfig, ModelConfig, ParallelConfig, RunConfig, SourceConfig, StorageConfig
from neox_core.data.indexed import IndexedWriter
from neox_core.errors import CheckpointError
from neox_core.evaluation.perplexity import EvaluateJob, _download, evaluate_checkpoints, perplexity
from neox_core.storage.digest import sha256_of
from neox_core.storage.object_store import ObjectStore
from tests.distributed import run_ranks
from tests.neox_core.train.small_training import config_for

SEQUENCE = 16
TOKENS = {"full": 4 * SEQUENCE + 1, "padded": 3 * SEQUENCE + 6, "short": 7}
"""Tokens of each source's split: whole windows, a last window that is not full, less than one window."""
BYTES = {"full": 201, "padded": 333, "short": 17}
PREFIX = "train-0123"
MODEL = ModelConfig(
    num_layers=2, hidden_size=64, num_attention_heads=8, num_kv_heads=2, intermediate_size=96, vocab_size=128,
    rope_theta=1e4,
)  # fmt: skip


def ids_of(source: str) -> np.ndarray:
    return np.random.default_rng(len(source)).integers(0, MODEL.vocab_size, TOKENS[source])


def small_config(storage: StorageConfig, max_sequences: int | None) -> RunConfig:
    config = config_for("gqa", 2, 1, 1, sequence_length=SEQUENCE)
    data = config.data.model_copy(
        update={"sources": {name: SourceConfig(weight=1) for name in TOKENS}, "eval_sources": ()}
    )
    evaluate = EvaluateConfig(micro_batch_size=3, max_sequences=max_sequences)
    return config.model_copy(update={"model": MODEL, "data": data, "storage": storage, "evaluate": evaluate})


@dataclass(frozen=True)
class Evaluation:
    """What there is to evaluate."""

    bases: dict[int, Path]
    """Meta's weights of each step."""
    job: EvaluateJob
    storage: StorageConfig

    def run(self, max_sequences: int | None) -> list[dict[str, Any]]:
        """The results, which two ranks agree on."""
        first, second = run_ranks(evaluate_checkpoints, 2, small_config(self.storage, max_sequences), self.job)
        assert first == second
        return first


def put_checkpoint(store: ObjectStore, shards: Path, step: int) -> None:
    """Upload converted shards as a training's checkpoint, with a file that an evaluation need not fetch."""
    folder = shards / "global_step0"
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"large")
    records = []
    for path in sorted(folder.iterdir()):
        store.put_file(path, f"{PREFIX}/global_step{step}/{path.name}")
        records.append(FileRecord(path.name, path.stat().st_size, sha256_of(path)))
    layout = {"tensor": 2, "pipeline": 1, "data": 1}
    publish_manifest(store, PREFIX, Manifest(step, 0, tuple(records), layout, "0123", {}))


def split_by_layer(shards: Path) -> None:
    """From one file per rank to one per layer and rank, as a training writes them."""
    for rank, path in enumerate(sorted((shards / "global_step0").glob("mp_rank_*_model_states.pt"))):
        layers: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in torch.load(path)["module"].items():
            _, index, rest = name.split(".", 2)
            layers.setdefault(int(index), {})[rest] = tensor
        for index, tensors in layers.items():
            torch.save(tensors, path.with_name(layer_file(index, rank)))
        path.unlink()


@pytest.fixture
def evaluation(storage_config: StorageConfig, store: ObjectStore, tmp_path: Path) -> Evaluation:
    for source in TOKENS:
        with IndexedWriter(tmp_path / "data" / source / "validation", np.dtype("<u2")) as writer:
            for document in np.split(ids_of(source), [5]):
                writer.add_document(document)
    bases = {step: tmp_path / f"base-{step}" for step in (0, 5)}
    for step, base in bases.items():
        make_random_base(MODEL, base, seed=step)
        ranks = 1 if step else 2  # the training's layout is not the evaluation's
        convert(base, tmp_path / f"shards-{step}", MODEL, ParallelConfig(tensor=ranks))
    split_by_layer(tmp_path / "shards-5")
    put_checkpoint(store, tmp_path / "shards-5", 5)
    counts = {source: {"documents": 2, "tokens": TOKENS[source], "bytes": BYTES[source]} for source in TOKENS}
    job = EvaluateJob(tmp_path / "data", tmp_path / "shards-0", PREFIX, (0, 5), counts, tmp_path / "scratch")
    return Evaluation(bases, job, storage_config)


def expected_loss(base: Path, source: str, windows: int | None = None) -> tuple[float, int]:
    """Mean loss of transformers' model, and the number of targets, window by window without padding or batches."""
    llama = llama_from_meta(base, MODEL, SEQUENCE)
    ids = torch.from_numpy(ids_of(source))
    total, count = 0.0, 0
    for first in range(0, len(ids) - 1, SEQUENCE)[:windows]:
        window = ids[first : first + SEQUENCE + 1]
        with torch.no_grad():
            logits = llama(window[None, :-1]).logits[0].double()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        count += len(window) - 1
    return total / count, count


@pytest.mark.parametrize("windows", [None, 2])
def test_losses_are_transformers(evaluation: Evaluation, windows: int | None) -> None:
    results = evaluation.run(windows)
    assert [result["step"] for result in results] == [0, 5]
    for result in results:
        assert result["sources"].keys() == TOKENS.keys()
        for source, found in result["sources"].items():
            loss, count = expected_loss(evaluation.bases[result["step"]], source, windows)
            assert (found["tokens"], found["bytes"]) == (count, BYTES[source])
            assert found["loss"] == pytest.approx(loss, rel=1e-5)
            assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
            # Bits of all tokens of the split over its bytes, also where only some windows were read.
            assert found["bits_per_byte"] == pytest.approx(
                loss / math.log(2) * TOKENS[source] / BYTES[source], rel=1e-5
            )
    tokens = {name: found["tokens"] for name, found in results[0]["sources"].items()}
    # Every id but the first is a target, and padding is none.
    whole, limited = {"full": 64, "padded": 53, "short": 6}, {"full": 32, "padded": 32, "short": 6}
    assert tokens == (limited if windows else whole)
    assert results[0]["sources"]["full"]["loss"] != results[1]["sources"]["full"]["loss"]
    assert list(evaluation.job.scratch.rglob("*")) == []  # what was fetched is gone


def test_a_step_without_a_checkpoint(evaluation: Evaluation, store: ObjectStore) -> None:
    with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 7 below s3://.*: there are \[5\]"):
        _download(store, evaluation.job, 7, cast(Any, None))


def test_the_perplexity_of_a_training_that_has_diverged() -> None:
    """Its evaluation ended in an OverflowError, again and again."""
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(9743.05) == math.inf
    assert math.isnan(perplexity(math.nan))
