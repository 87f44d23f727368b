"""A number that is not finite, on any rank, stops the update on all ranks before it happens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.config import ParallelConfig
from neox_core.parallel.loss import ChunkedLoss
from neox_core.train.engine.outcome import PendingOutcome, StepOutcome, pack_outcome
from neox_core.train.observe.incidents import suspects
from tests.distributed import run_ranks
from tests.neox_core.train.engine.test_engine import build
from tests.neox_core.train.small_training import MODELS, config_for, rank_batches

LAYOUTS = {"tensor": (2, 1, 1), "pipeline": (1, 2, 1), "data": (1, 1, 2)}
TRAININGS = [("tensor", "bf16"), ("pipeline", "fp32"), ("data", "bf16")]
BAD_RANK = 1


@contextmanager
def nan_weight(engine: Any) -> Iterator[None]:
    engine.finish_step()
    weight = engine.optimizer.bf16_groups_flat[0]
    kept = weight[11].clone()
    weight[11] = math.nan
    yield
    weight[11] = kept


@contextmanager
def changed_loss(change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """The loss of one micro batch is made another."""
    whole = ChunkedLoss.__call__
    seen: list[int] = []

    def spoilt(self: ChunkedLoss, *given: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        loss = whole(self, *given)
        return change(loss) if len(seen) == 1 else loss

    with patch.object(ChunkedLoss, "__call__", spoilt):
        yield


def nan_loss(engine: Any) -> AbstractContextManager[None]:
    """Its gradient stays finite."""
    return changed_loss(lambda loss: loss + math.nan)


def nan_batch(engine: Any) -> AbstractContextManager[None]:
    """Its gradient is not finite either, as a bad batch or product makes it."""
    return changed_loss(lambda loss: loss * math.nan)


@contextmanager
def infinite_gradient(engine: Any) -> Iterator[None]:
    """After the reduction, so that no other rank has it."""
    reduce = engine.optimizer.reduce_gradients

    def spoilt(**named: Any) -> None:
        reduce(**named)
        engine.optimizer.fp32_groups_gradient_flat_partition[1][3] = math.inf

    engine.optimizer.reduce_gradients = spoilt
    yield
    del engine.optimizer.reduce_gradients


@contextmanager
def limited_loss(engine: Any) -> Iterator[None]:
    engine.optimizer.loss_limit.fill_(0.5)
    yield
    engine.optimizer.loss_limit.fill_(math.inf)


FAULTS: dict[str, Callable[[Any], Any]] = {
    "weight": nan_weight,
    "loss": nan_loss,
    "batch": nan_batch,
    "gradient": infinite_gradient,
    "limit": limited_loss,
}


def state(engine: Any) -> list[torch.Tensor]:
    """Weights, master weights, moments and the number of updates, bit for bit."""
    engine.finish_step()
    optimizer = engine.optimizer
    tensors = [*optimizer.bf16_groups_flat, *(master.storage for master in optimizer.masters)]
    for handle in optimizer.fp32_groups_flat_partition:
        tensors += optimizer.optimizer.state[handle].values()
    return [tensor.detach().clone().view(torch.uint8) for tensor in (t.reshape(-1) for t in tensors)]


def step(engine: Any, batches: Any, number: int = 0) -> StepOutcome:
    loss = engine.train_batch(batches)
    outcome = PendingOutcome(number, engine.optimizer.outcome).read()
    assert torch.equal(loss, torch.tensor(outcome.loss, dtype=torch.float32)) or math.isnan(outcome.loss)
    return outcome


def disturbed(engine: Any, config: Any, mesh: Any) -> dict[str, Any]:
    """Two good steps, a step with each fault, and the third good step."""
    batches = rank_batches(config, mesh.data_rank)
    found: dict[str, Any] = {"good": [step(engine, batches) for _ in range(2)], "changed": {}, "gradients": {}}
    for name, fault in FAULTS.items():
        before = state(engine)
        with fault(engine) if mesh.rank == BAD_RANK or name == "limit" else nullcontext():
            found[name] = step(engine, rank_batches(config, mesh.data_rank, first_step=50))
            found["gradients"][name] = any(bool(g.any()) for g in engine.optimizer.fp32_groups_gradients_flat)
        found["changed"][name] = [not torch.equal(a, b) for a, b in zip(before, state(engine), strict=True)]
    found["good"].append(step(engine, batches))
    found["groups"] = engine.gradient_groups
    return found | {"final": state(engine)}


def undisturbed(engine: Any, config: Any, mesh: Any) -> dict[str, Any]:
    batches = rank_batches(config, mesh.data_rank)
    return {"good": [step(engine, batches) for _ in range(3)], "final": state(engine)}


@torch.no_grad()
def examine(shards: dict[str, Path]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, precision in TRAININGS:
        config = config_for("gqa", *LAYOUTS[name], precision=precision)
        for kind in (undisturbed, disturbed):
            mesh, engine = build(config, shards[name])
            with torch.enable_grad():
                found[name, precision, kind.__name__] = kind(engine, config, mesh)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    base = tmp_path_factory.mktemp("base")
    make_random_base(MODELS["gqa"], base, seed=7)
    shards = {}
    for name, (tensor, pipeline, _) in LAYOUTS.items():
        shards[name] = tmp_path_factory.mktemp(name)
        convert(base, shards[name], MODELS["gqa"], ParallelConfig(tensor=tensor, pipeline=pipeline))
    return run_ranks(examine, 2, shards)


CASES = [pytest.param(*training, id="-".join(training)) for training in TRAININGS]


@pytest.mark.parametrize(("layout", "precision"), CASES)
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_updated_on_any_rank(ranks: list[dict[Any, Any]], layout: str, precision: str, fault: str) -> None:
    found = [rank[layout, precision, "disturbed"] for rank in ranks]
    for rank in found:
        assert not any(rank["changed"][fault])
        assert not rank["gradients"][fault], "the gradient is cleared all the same"
        assert not rank[fault].applied
        assert rank[fault].finite is (fault == "limit")
    if fault in ("loss", "gradient"):  # a weight spoils the activations of ranks downstream
        assert [rank[fault].own_finite for rank in found] == [True, False]
    if layout == "data":
        seen = [(replica, rank[fault].own_loss_finite, rank[fault].own_finite) for replica, rank in enumerate(found)]
        assert suspects(seen) == ([] if fault == "limit" else [BAD_RANK]), "also where the reduction spread it"
    assert math.isnan(found[0]["loss"].loss)
    assert math.isfinite(found[0]["loss"].gradient_norm)
    assert math.isfinite(found[0]["gradient"].loss)
    assert not math.isfinite(found[0]["gradient"].gradient_norm)


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_training_goes_on_as_if_the_step_had_not_been(ranks: list[dict[Any, Any]], layout: str, precision: str) -> None:
    for rank in ranks:
        smooth, rough = rank[layout, precision, "undisturbed"], rank[layout, precision, "disturbed"]
        assert all(outcome.applied for outcome in rough["good"])
        assert smooth["good"] == rough["good"]
        assert all(torch.equal(a, b) for a, b in zip(smooth["final"], rough["final"], strict=True))


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_norms_of_groups_are_known(ranks: list[dict[Any, Any]], layout: str, precision: str) -> None:
    found = ranks[0][layout, precision, "disturbed"]
    for outcome in found["good"]:
        assert len(outcome.group_norms) == len(found["groups"]) == 5  # embedding, 2 blocks, head, norms
    assert (
        ranks[0][layout, precision, "disturbed"]["good"][0].loss
        == ranks[1][layout, precision, "disturbed"]["good"][0].loss
    )


def test_an_outcome_survives_packing() -> None:
    whole, own = torch.tensor([5.0, 9.0, 4.0, -1e-9]), torch.tensor([2.5, 4.0, math.inf, 0.0])
    outcome = PendingOutcome(7, pack_outcome(torch.tensor(True), whole, own)).read()
    assert (outcome.step, outcome.applied, outcome.loss, outcome.gradient_norm) == (7, True, 5.0, 3.0)
    assert outcome.group_norms[0] == 2.0
    assert outcome.own == (2.5, 4.0, math.inf, 0.0)
    assert outcome.finite
    assert not outcome.own_finite
