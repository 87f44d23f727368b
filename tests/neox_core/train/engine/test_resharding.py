"""A state that one layout saved goes on in any other as if nothing had been: weights, moments, losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.host_memory import HostBuffers
from neox_core.checkpoint.partitions import Layout, Place, flat_groups
from neox_core.config import RunConfig, batch_geometry
from tests.distributed import run_ranks
from tests.neox_core.train.small_training import MODELS, config_for, rank_batches

SAVED, GOES_ON = 3, 20
Degrees = tuple[int, int, int]
"""Tensor, pipeline and data parallel."""
FIRST: Degrees = (2, 2, 1)
ONE_RANK: Degrees = (1, 1, 1)
UNEVEN: Degrees = (1, 1, 3)
"""Has four micro batches: two, one and one."""
FOUR_RANKS: tuple[Degrees, ...] = ((4, 1, 1), (1, 2, 2), (2, 1, 2))
"""With tensor 4, two ranks each have the same KV head of "gqa"."""
TAG = f"global_step{SAVED}"
KINDS = [
    ("mha", {"precision": "fp32"}),
    ("gqa", {"precision": "fp32"}),
    ("gqa", {"precision": "bf16", "master_weights": "fp32"}),
    ("gqa", {"precision": "bf16", "master_weights": "packed"}),
]


def write(content: Any, path: Path) -> None:
    """Save a file of the state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(HostBuffers().copy(content), path)


class Run:
    """One layout's engine on this rank, with the weights' base or on zeros."""

    def __init__(self, configs: Callable[[Degrees], RunConfig], degrees: Degrees, shards: Path | None) -> None:
        from neox_core.checkpoint.formats.neox import NeoxCheckpoint
        from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
        from neox_core.parallel.stages import pipeline_layers
        from neox_core.train.dry_run import zero_weights
        from neox_core.train.engine.deepspeed_engine import build_engine

        self.configs, self.config = configs, configs(degrees)
        self.mesh = build_mesh(self.config.parallel, init_distributed(self.config.launch))
        weights = NeoxCheckpoint(shards).layer if shards else zero_weights(self.config)
        self.engine = build_engine(self.config, self.mesh, batch_geometry(self.config), weights)
        self.layout = lambda d: Layout(d[0], d[2], pipeline_layers(configs(d)))
        geometry = batch_geometry(self.config)
        self.engine.set_accumulation_steps(geometry.accumulation_steps, geometry.micro_batches_of(self.mesh.data_rank))
        self.degrees, self.place = degrees, Place(self.mesh.pipeline_rank, self.mesh.data_rank, self.mesh.tensor_rank)

    def load(self, folder: Path, saved: Degrees) -> Run:
        from neox_core.checkpoint.resharding import Resharding

        resharding = Resharding(self.config.model, self.layout(saved), self.layout(self.degrees), self.place)
        self.engine.load_resharded(folder, TAG, SAVED, resharding)
        return self

    def save(self, folder: Path) -> Run:
        self.engine.save_state(folder, TAG, {}, write)
        return self

    def losses(self, first: int, count: int) -> list[float]:
        batches = rank_batches(self.config, self.mesh.data_rank, first)
        return [float(self.engine.train_batch(batches)) for _ in range(count)]

    def check_flat_groups(self) -> None:
        """The arithmetic puts parameters where DeepSpeed does."""
        groups = flat_groups(self.config.model, self.layout(self.degrees), self.place.stage, self.place.tensor_rank)
        optimizer = self.engine.optimizer
        found = [[(optimizer.param_names[p], tuple(p.shape)) for p in group] for group in optimizer.bf16_groups]
        assert found == [[(f"{p.layer}.{p.stored.name}", p.stored.shape) for p in g.parameters] for g in groups]
        assert [g.part for g in groups] == [p.numel() for p in optimizer.fp32_groups_gradient_flat_partition]


class Configs:
    """The configuration of a layout; travels to ranks."""

    def __init__(self, model: str, train: dict[str, str]) -> None:
        self.model, self.train = model, train

    def __call__(self, degrees: Degrees) -> RunConfig:
        return config_for(self.model, *degrees, **self.train)


def name(degrees: Degrees) -> str:
    return "x".join(map(str, degrees))


def first_world(configs: Configs, shards: Path, folder: Path, steps: int) -> dict[str, list[float]]:
    """The training that is saved, and what follows; the same from its state in other layouts."""
    run = Run(configs, FIRST, shards)
    run.losses(1, SAVED)
    run.save(folder / name(FIRST)).check_flat_groups()
    found = {name(FIRST): run.losses(SAVED + 1, steps)}
    for degrees in FOUR_RANKS:
        run = Run(configs, degrees, None).load(folder / name(FIRST), FIRST).save(folder / name(degrees))
        run.check_flat_groups()
        found[name(degrees)] = run.losses(SAVED + 1, steps)
    return found


def other_world(configs: Configs, degrees: Degrees, folder: Path, steps: int) -> list[float]:
    """From the first layout to one of another number of ranks."""
    run = Run(configs, degrees, None).load(folder / name(FIRST), FIRST).save(folder / name(degrees))
    run.check_flat_groups()
    return run.losses(SAVED + 1, steps)


def last_world(configs: Configs, folder: Path) -> None:
    """From every other layout back to the first, and from one rank to the others."""
    for degrees in (ONE_RANK, UNEVEN, *FOUR_RANKS):
        Run(configs, FIRST, None).load(folder / name(degrees), degrees).save(folder / f"back from {name(degrees)}")
    for degrees in FOUR_RANKS:
        run = Run(configs, degrees, None).load(folder / name(ONE_RANK), ONE_RANK)
        run.save(folder / f"{name(degrees)} from {name(ONE_RANK)}")


def assert_same_state(one: Path, other: Path) -> None:
    """Every number of the optimizer's files, padding included."""
    paths = sorted((one / TAG).glob("*optim_states.pt"))
    assert [p.name for p in paths] == [p.name for p in sorted((other / TAG).glob("*optim_states.pt"))] != []
    for path in paths:
        ours, theirs = (
            torch.load(place / TAG / path.name, weights_only=False)["optimizer_state_dict"] for place in (one, other)
        )
        for a, b in zip(
            ours["single_partition_of_fp32_groups"], theirs["single_partition_of_fp32_groups"], strict=True
        ):
            assert torch.equal(a, b)
        states = [kept["base_optimizer_state"]["state"] for kept in (ours, theirs)]
        for group, values in states[0].items():
            assert values.keys() == states[1][group].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert values["step"] == SAVED
            for key, value in values.items():
                assert torch.equal(value, states[1][group][key])


@pytest.mark.parametrize(("model", "train"), KINDS)
def test_any_layout_goes_on_from_any_other(tmp_path: Path, model: str, train: dict[str, str]) -> None:
    """Resharding moves numbers and changes none: the state that comes back is the one that was saved, bit for bit."""
    configs, states = Configs(model, train), tmp_path / "states"
    make_random_base(MODELS[model], tmp_path / "base", seed=7)
    convert(tmp_path / "base", tmp_path / "shards", MODELS[model], configs(FIRST).parallel)
    exact = train["precision"] == "fp32"
    steps = GOES_ON if exact and model == "gqa" else 3
    found = run_ranks(first_world, math.prod(FIRST), configs, tmp_path / "shards", states, steps)[0]
    for degrees in (ONE_RANK, UNEVEN):
        found[name(degrees)] = run_ranks(other_world, math.prod(degrees), configs, degrees, states, steps)[0]
    run_ranks(last_world, math.prod(FIRST), configs, states)
    for degrees in (ONE_RANK, UNEVEN, *FOUR_RANKS):
        assert_same_state(states / name(FIRST), states / f"back from {name(degrees)}")
        np.testing.assert_allclose(found[name(degrees)], found[name(FIRST)], rtol=1e-6 if exact else 1e-2)
    for degrees in FOUR_RANKS:
        assert_same_state(states / name(degrees), states / f"{name(degrees)} from {name(ONE_RANK)}")
