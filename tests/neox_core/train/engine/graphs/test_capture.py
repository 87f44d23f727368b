"""Slots of recorded micro batches, and an engine that replays them. tests/gpu/test_graphs.py records for real."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import RunConfig, batch_geometry
from neox_core.train.engine.graphs.capture import Passed, StageGraphs, Work
from tests.distributed import run_ranks
from tests.neox_core.train.small_training import MODELS, config_for, rank_batches

STEPS = 4


@dataclass
class Rerun:
    """In place of a GPU's recorder: does the work anew each time. What recording adds to buffers is undone."""

    buffers: list[Tensor]

    def record(self, work: Callable[[], None]) -> Any:
        kept = [buffer.clone() for buffer in self.buffers]
        work()
        for buffer, before in zip(self.buffers, kept, strict=True):
            buffer.copy_(before)
        return Replay(work)


@dataclass
class Divided(Rerun):
    """As a GPU's recorder, keeps the number by which gradients were divided."""

    engine: Any

    def record(self, work: Callable[[], None]) -> Any:
        steps = self.engine.gradient_accumulation_steps()

        def as_recorded() -> None:
            with mock.patch.object(self.engine, "gradient_accumulation_steps", return_value=steps):
                work()

        return super().record(as_recorded)


@dataclass
class Replay:
    work: Callable[[], None]

    def replay(self) -> None:
        self.work()


def doubling(log: list[str], name: str) -> Work:
    def forward(inputs: Any, targets: Tensor | None) -> Passed:
        return Passed(2 * inputs)

    def backward(results: Any, gradient: Tensor | None) -> None:
        log.append(name)
        results.backward(gradient)

    return Work(forward, backward)


@pytest.mark.parametrize(("count", "in_flight", "places"), [(1, 1, 1), (1, 3, 1), (5, 2, 3), (4, 4, 5), (6, 1, 2)])
def test_the_last_micro_batch_of_a_step_has_work_of_its_own(count: int, in_flight: int, places: int) -> None:
    log: list[str] = []
    x = torch.ones(2, requires_grad=True)
    works = doubling(log, "each"), doubling(log, "last")
    graphs = StageGraphs(*works, x, None, count, in_flight, lambda: Rerun([]))
    slots = [graphs.slot(index) for index in range(count)]
    log.clear()
    for slot in slots:
        slot.forward(torch.ones(2), None)
        slot.backward(torch.ones(2))
    assert log == ["each"] * (count - 1) + ["last"]
    together = [slots[max(0, index - in_flight + 1) : index + 1] for index in range(count)]
    assert all(len({id(slot) for slot in flying}) == len(flying) for flying in together)
    assert len({id(slot) for slot in slots}) == min(places, count)


def test_a_slot_has_results_and_input_gradients_in_its_own_places() -> None:
    x = torch.zeros(2, requires_grad=True)
    work = doubling([], "each")
    graphs = StageGraphs(work, None, x, None, count=4, in_flight=2, new_recorder=lambda: Rerun([]))
    first, second = graphs.slot(0), graphs.slot(1)
    results = [slot.forward(torch.full((2,), value), None).results for slot, value in ((first, 3.0), (second, 5.0))]
    assert [float(result[0]) for result in results if isinstance(result, Tensor)] == [6.0, 10.0]
    for slot, gradient in ((first, 1.0), (second, 7.0), (first, 2.0)):
        slot.forward(torch.ones(2), None)
        slot.backward(torch.full((2,), gradient))
        assert isinstance(slot.inputs, Tensor)
        assert slot.inputs.grad is not None
        assert slot.inputs.grad.tolist() == [2 * gradient] * 2
    assert graphs.slot(2) is first


def train_rank(config: RunConfig, shards: Path, replay: bool) -> list[Any]:
    """Losses and norms of some steps with validations and another accumulation in between, and what was replayed."""
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
    from neox_core.train.engine.deepspeed_engine import build_engine
    from neox_core.train.engine.graphs.graphed_stage import GraphedStage

    mesh = build_mesh(config.parallel, init_distributed(config.launch))
    engine = build_engine(config, mesh, batch_geometry(config), NeoxCheckpoint(shards).layer)
    if replay:
        buffers = engine.optimizer.fp32_groups_gradients_flat
        engine._graphs = GraphedStage(engine, mesh.data_size > 1, lambda: Rerun(buffers))
    seen: list[tuple[float, int]] = []
    engine.observe(None, lambda losses, targets: seen.append((float(losses.sum()), int(targets.sum()))))
    engine.set_learning_rate(1e-3)
    batches, found = rank_batches(config, mesh.data_rank), []
    accumulation = batch_geometry(config).accumulation_steps
    for step in range(STEPS):
        engine.set_accumulation_steps(accumulation if step != STEPS - 1 else 1)
        found.append((float(engine.train_batch(batches)), float(engine.get_global_grad_norm())))
        found.append((float(engine.eval_batch(batches, num_micro_batches=2)), 0.0))
    return [found, seen]


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 1)])
def test_replayed_steps_are_the_same_steps(tensor: int, pipeline: int, data: int, tmp_path: Path) -> None:
    config = config_for("gqa", tensor, pipeline, data)
    make_random_base(MODELS["gqa"], tmp_path / "base", seed=7)
    convert(tmp_path / "base", tmp_path / "shards", MODELS["gqa"], config.parallel)
    ranks = tensor * pipeline * data
    plain, replayed = (run_ranks(train_rank, ranks, config, tmp_path / "shards", r) for r in (False, True))
    assert replayed == plain
    assert any(seen for _, seen in plain)


def train_uneven(config: RunConfig, shards: Path, replay: bool) -> list[float]:
    """Gradient norms where ranks have 2 and 2 micro batches, then 3 and 2."""
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
    from neox_core.train.engine.deepspeed_engine import build_engine
    from neox_core.train.engine.graphs.graphed_stage import GraphedStage

    mesh = build_mesh(config.parallel, init_distributed(config.launch))
    engine = build_engine(config, mesh, batch_geometry(config), NeoxCheckpoint(shards).layer)
    if replay:
        buffers = engine.optimizer.fp32_groups_gradients_flat
        engine._graphs = GraphedStage(engine, True, lambda: Divided(buffers, engine))
    batches, norms = rank_batches(config, mesh.data_rank), []
    for step in range(STEPS):
        count = 2 if step < STEPS - 1 else 3
        engine.set_accumulation_steps(count, count - (mesh.data_rank if count == 3 else 0))
        engine.train_batch(batches)
        norms.append(float(engine.get_global_grad_norm()))
    return norms


def test_what_was_recorded_is_of_the_number_by_which_all_ranks_divide(tmp_path: Path) -> None:
    config = config_for("gqa", 1, 1, 2)
    make_random_base(MODELS["gqa"], tmp_path / "base", seed=7)
    convert(tmp_path / "base", tmp_path / "shards", MODELS["gqa"], config.parallel)
    plain, replayed = (run_ranks(train_uneven, 2, config, tmp_path / "shards", r) for r in (False, True))
    assert replayed == plain


def fail_to_record(config: RunConfig, shards: Path) -> tuple[list[float], int, int, str]:
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
    from neox_core.train.engine.deepspeed_engine import build_engine
    from neox_core.train.engine.graphs import graphed_stage

    class Broken:
        def record(self, work: Callable[[], None]) -> Any:
            exchange.last = "gather"
            failure = RuntimeError("operation not permitted when stream is capturing")
            with mock.patch.object(engine.module.loss_fn, "_mean", side_effect=failure):
                work()

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    graphed_stage.logger.addHandler(handler)
    mesh = build_mesh(config.parallel, init_distributed(config.launch))
    engine = build_engine(config, mesh, batch_geometry(config), NeoxCheckpoint(shards).layer)
    exchange = SimpleNamespace(last="scatter")
    engine._mesh = replace(mesh, exchange=exchange)
    engine._graphs = graphed_stage.GraphedStage(engine, False, Broken)
    batches = rank_batches(config, 0)
    seen: list[Tensor] = []
    engine.observe(None, lambda losses, targets: seen.append(losses))
    losses = [float(engine.train_batch(batches)) for _ in range(STEPS)]
    said = [m for m in messages if "off, since recording a micro batch failed: operation not permitted" in m]
    return losses, len(said), len(seen), exchange.last


def test_what_cannot_be_recorded_goes_on_without_and_says_so_once(tmp_path: Path) -> None:
    config = config_for("gqa", 1, 1, 1)
    make_random_base(MODELS["gqa"], tmp_path / "base", seed=7)
    convert(tmp_path / "base", tmp_path / "shards", MODELS["gqa"], config.parallel)
    ((losses, said, seen, exchanged),) = run_ranks(fail_to_record, 1, config, tmp_path / "shards")
    assert said == 1
    assert exchanged == "scatter", "or the next barrier would depend on what other ranks could record"
    assert seen == STEPS * batch_geometry(config).accumulation_steps
    assert losses[-1] < losses[0]
