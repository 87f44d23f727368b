"""An optimizer of one's own, through the public seam: planned, trained with, saved and resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.host_memory import HostBuffers
from neox_core.config import OptimizerConfig, RunConfig, batch_geometry
from neox_core.errors import ConfigError
from neox_core.optimizer import MasterWeights, UpdateStep, register_optimizer, update_rule
from neox_core.planning.activation_checkpointing import layer_modes
from neox_core.planning.memory import stage_memory
from tests.distributed import run_ranks
from tests.neox_core.train.small_training import MODELS, config_for, rank_batches

KIND, RATE = "momentum", 0.05


@dataclass(frozen=True)
class Momentum:
    """Gradient descent with momentum, without weight decay."""

    beta: float
    state_names: ClassVar[tuple[str, ...]] = ("velocity",)

    def update(
        self, weights: MasterWeights, gradient: Tensor, state: Mapping[str, Tensor], scale: Tensor, step: UpdateStep
    ) -> None:
        if scale > 0:
            velocity = state["velocity"].mul_(self.beta).add_(gradient * scale)
            weights.write(0, len(gradient), weights.read(0, len(gradient)) - step.lr * velocity)
        gradient.zero_()


def register() -> None:
    register_optimizer(KIND, lambda config: Momentum(config.betas[0]))


def config(kind: str) -> RunConfig:
    run = config_for("gqa", 1, 1, 2, precision="fp32")
    optimizer = run.train.optimizer.model_copy(update={"kind": kind, "lr": RATE})
    return run.model_copy(update={"train": run.train.model_copy(update={"optimizer": optimizer})})


def train_rank(shards: Path, folder: Path) -> dict[str, Any]:
    """The last of three steps, in the engine that took the others and in one that resumed."""
    register()
    from neox_core.checkpoint.formats.neox import NeoxCheckpoint
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
    from neox_core.train.engine.deepspeed_engine import build_engine

    run = config(KIND)
    mesh = build_mesh(run.parallel, init_distributed(run.launch))
    engine = build_engine(run, mesh, batch_geometry(run), NeoxCheckpoint(shards).layer)
    before = [master.to_host() for master in engine.optimizer.masters]
    batches = rank_batches(run, mesh.data_rank)
    losses = [float(engine.train_batch(batches))]
    state = list(engine.optimizer.optimizer.state.values())
    moved = [
        torch.equal(master.to_host(), old - RATE * own["velocity"])
        for master, old, own in zip(engine.optimizer.masters, before, state, strict=True)
    ]
    losses.append(float(engine.train_batch(batches)))

    def write(content: Any, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(HostBuffers().copy(content), path)

    engine.save_state(folder, "global_step2", {}, write)
    torch.distributed.barrier()
    losses.append(float(engine.train_batch(batches)))
    resumed = build_engine(run, mesh, batch_geometry(run), NeoxCheckpoint(shards).layer)
    resumed.load_state(folder, "global_step2")
    again = float(resumed.train_batch(rank_batches(run, mesh.data_rank, first_step=3)))
    return {"losses": losses, "moved": moved, "again": again, "state": [sorted(own) for own in state]}


@pytest.fixture
def registered() -> Iterator[None]:
    from neox_core.optimizer import registry

    register()
    yield
    del registry._KINDS[KIND]


def test_a_registered_optimizer_trains_and_resumes(tmp_path: Path) -> None:
    make_random_base(MODELS["gqa"], tmp_path / "base", seed=7)
    convert(tmp_path / "base", tmp_path / "shards", MODELS["gqa"], config(KIND).parallel)
    for rank in run_ranks(train_rank, 2, tmp_path / "shards", tmp_path / "checkpoints"):
        assert rank["moved"] == [True, True]
        assert rank["state"] == [["step", "velocity"]] * 2
        assert rank["losses"][2] < rank["losses"][0]
        assert rank["again"] == rank["losses"][2]


def test_the_plan_counts_what_it_keeps(registered: None) -> None:
    memory = {}
    for kind in ("adamw", KIND):
        run = config(kind)
        geometry = batch_geometry(run)
        memory[kind] = stage_memory(run, geometry, 0, layer_modes(run, geometry, 0, None))
    assert memory[KIND].optimizer * 2 == memory["adamw"].optimizer > 0
    assert memory[KIND].total == memory["adamw"].total - memory[KIND].optimizer


def test_an_unknown_optimizer_is_refused(registered: None) -> None:
    with pytest.raises(ConfigError, match=r"train.optimizer.kind is 'lion', known are adamw, momentum: use one"):
        update_rule(OptimizerConfig(kind="lion", lr=1.0))


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="there is an optimizer 'adamw' already"):
        register_optimizer("adamw", lambda config: Momentum(0.9))
