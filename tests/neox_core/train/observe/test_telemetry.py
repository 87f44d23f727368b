"""What the real loop logs with a real engine, against transformers' model and plain sums."""

from __future__ import annotations

import gzip
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.reference import llama_from_meta
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.config import ProfileConfig, RunConfig, TrainChange, ValidationConfig
from neox_core.data.mixture import Mixture
from tests.distributed import run_ranks
from tests.neox_core.train.observe.host_reads import HostReads
from tests.neox_core.train.small_loop import WEIGHTS, run_loop, sequences
from tests.neox_core.train.small_training import BATCH, MODELS, SEQUENCE, config_for

INTERVAL, STEPS = 2, 5
LAYOUTS = [(1, 2, 2), (4, 1, 1)]
"""Pipeline and data parallel; tensor parallel with KV heads that two ranks share."""


def config(*layout: int, **train: Any) -> RunConfig:
    """A learning rate that moves nothing, so that the weights of every step are the first's."""
    optimizer = config_for("gqa", 1, 1, 1).train.optimizer.model_copy(update={"lr": 1e-30})
    settings: dict[str, Any] = {"steps": STEPS, "log_interval": INTERVAL, "optimizer": optimizer}
    settings |= {"validation": ValidationConfig(interval=100, iterations=1), "checkpoint_interval": 100}
    return config_for("gqa", *layout, **settings | train)


def train_rank(config: RunConfig, shards: Path, folder: Path) -> list[dict[str, float]]:
    from neox_core.checkpoint.formats.neox import NeoxCheckpoint

    return run_loop(config, NeoxCheckpoint(shards).layer, folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_random_base(MODELS["gqa"], folder, seed=7)
    return folder


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def rows(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, float]]:
    """Of rank 0."""
    shards = tmp_path_factory.mktemp("shards")
    convert(base, shards, MODELS["gqa"], config(*request.param).parallel)
    ranks = run_ranks(
        train_rank, math.prod(request.param), config(*request.param), shards, tmp_path_factory.mktemp("out")
    )
    assert ranks[1:] == [[]] * (len(ranks) - 1)
    return list(ranks[0])


@pytest.fixture(scope="module")
def llama(base: Path) -> Any:
    return llama_from_meta(base, MODELS["gqa"], SEQUENCE).double()


def batch(step: int) -> tuple[torch.Tensor, list[str]]:
    """Ids of a step's global batch, and the source of each of its sequences."""
    indices = np.arange((step - 1) * BATCH, step * BATCH)
    mixture = Mixture(WEIGHTS)
    return torch.from_numpy(sequences(indices)), [mixture.names[i] for i in mixture.locate(indices)[0]]


def token_losses(llama: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = llama(ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def test_steps_and_the_last_one_are_logged(rows: list[dict[str, float]]) -> None:
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert [row["train/sequences_consumed"] for row in rows] == [2 * BATCH, 4 * BATCH, 5 * BATCH]


def test_loss_of_each_source_is_the_mean_over_the_interval(rows: list[dict[str, float]], llama: Any) -> None:
    for row, steps in zip(rows, [(1, 2), (3, 4), (5,)], strict=True):
        losses = defaultdict(list)
        for step in steps:
            ids, sources = batch(step)
            with torch.no_grad():
                for source, loss in zip(sources, token_losses(llama, ids).mean(-1), strict=True):
                    losses[source].append(float(loss))
        found = {key.removeprefix("loss/"): value for key, value in row.items() if key.startswith("loss/")}
        assert found == {source: pytest.approx(np.mean(values), rel=1e-5) for source, values in losses.items()}
        assert len(set(found.values())) == 3  # no two sources alike, and none that was not drawn


def test_norms_of_the_groups_are_those_of_the_whole_gradient(rows: list[dict[str, float]], llama: Any) -> None:
    for row in rows:
        llama.zero_grad()
        token_losses(llama, batch(int(row["step"]))[0]).mean().backward()
        squares: dict[str, float] = defaultdict(float)
        for name, parameter in llama.named_parameters():
            group = f"blocks_{int(name.split('.')[2]):02d}" if "layers." in name else "head"
            group = "embedding" if "embed_tokens" in name else "norms" if parameter.ndim == 1 else group
            squares[group] += float(parameter.grad.square().sum())
        for group, square in squares.items():
            assert row[f"gradient_norm/{group}"] == pytest.approx(math.sqrt(square), rel=1e-4), group
        assert {key for key in row if key.startswith("gradient_norm/")} == {f"gradient_norm/{name}" for name in squares}
        assert row["train/gradient_norm"] == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-4)


def test_times_are_of_a_step_and_add_up(rows: list[dict[str, float]]) -> None:
    for row in rows:
        phases = [row[f"time/{name}"] for name in ("forward_backward", "reduce", "optimizer", "logging")]
        assert all(0 < seconds < row["time/step"] for seconds in phases[:3])
        # Of logging, a part lies between the steps.
        assert sum(phases[:3]) < row["time/step"] <= sum(phases) * (1 + 1e-9)
        assert 0 <= row["time/data_wait"] < row["time/step"]
        assert row["train/tokens_per_second"] == pytest.approx(BATCH * SEQUENCE / row["time/step"])
        assert 0 < row["train/mfu_causal"] < row["train/mfu"]
        assert 0.05 < row["memory/resident_gib"] < 16


def test_speed_counts_the_tokens_of_every_batch_since_the_last_row(base: Path, tmp_path: Path) -> None:
    """A row over steps of one and of two batches' size."""
    changes = (TrainChange(from_step=3, global_batch_tokens=2 * BATCH * SEQUENCE),)
    run = config(1, 1, 1, steps=4, log_interval=3, changes=changes)
    convert(base, tmp_path / "shards", MODELS["gqa"], run.parallel)
    ((mixed, last),) = run_ranks(train_rank, 1, run, tmp_path / "shards", tmp_path / "output")
    tokens = BATCH * SEQUENCE
    assert mixed["train/tokens_per_second"] * mixed["time/step"] == pytest.approx((tokens + tokens + 2 * tokens) / 3)
    assert last["train/tokens_per_second"] * last["time/step"] == pytest.approx(2 * tokens)


def watch_reads(config: RunConfig, shards: Path, folder: Path) -> tuple[set[str], set[str]]:
    """Where the host reads tensors in steps 2 to 4, and what is found where it certainly does."""
    from neox_core.checkpoint.formats.neox import NeoxCheckpoint

    reads, control = HostReads(), HostReads()

    def on_place(place: str) -> None:
        if place == "step 2":
            reads.__enter__()
        elif place == f"step {config.train.steps}":
            reads.__exit__(None, None, None)

    run_loop(config, NeoxCheckpoint(shards).layer, folder, on_place)
    with control:
        one = torch.ones(1)
        float(one)
        one.tolist()
    return reads.places, control.places


def test_no_step_makes_the_host_wait_and_the_profiled_ones_leave_a_trace(base: Path, tmp_path: Path) -> None:
    run = config(1, 1, 1, log_interval=1, profile=ProfileConfig(first_step=2, last_step=3))
    convert(base, tmp_path / "shards", MODELS["gqa"], run.parallel)
    ((places, control),) = run_ranks(watch_reads, 1, run, tmp_path / "shards", tmp_path / "output")
    assert control == {"test_telemetry.py:watch_reads"}
    # What has arrived on the host; and the update, which on a CPU is the host's own work.
    assert places == {"figures.py:read", "outcome.py:read", "adamw.py:update"}
    with gzip.open(tmp_path / "output" / "profile_rank_0_steps_2-3.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names
