"""Weights' gradients in the time that pipeline stages would wait: the same steps bit for bit, in less of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from deepspeed.runtime.pipe.schedule import TrainSchedule

from neox_core.checkpoint.conversion.convert import convert, open_source
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import PipelineSchedule, RunConfig, batch_geometry
from neox_core.planning.step_time import times_filled
from neox_core.train.engine.zero_bubble import WeightGradients, ZeroBubbleSchedule
from tests.distributed import run_ranks
from tests.neox_core.checkpoint.conversion.test_families import CASES, write_model
from tests.neox_core.train.engine.graphs.test_capture import Replay, Rerun
from tests.neox_core.train.small_training import config_for, rank_batches

STEPS = 3


class Passes(NamedTuple):
    """Seconds of a micro batch on a stage."""

    forward: float = 1.0
    inputs: float = 1.0
    """Of the backward pass that makes inputs' gradients."""
    weights: float = 1.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def commands(schedule: type[TrainSchedule], count: int, stages: int, stage: int) -> list[Any]:
    return [command for step in schedule(count, stages, stage).steps() for command in step]


def seconds_of(schedules: Sequence[type[TrainSchedule]], count: int, passes: Passes) -> float:
    """A step's time, where who sends waits for who receives and the other way round."""
    stages = len(schedules)
    left = [commands(schedule, count, stages, stage)[::-1] for stage, schedule in enumerate(schedules)]
    own, clocks = list(map(_own_seconds, schedules, [passes] * stages)), [0.0] * stages
    while any(left):
        before = sum(map(len, left))
        for stage, waiting in enumerate(left):
            while waiting and (name := type(waiting[-1]).__name__) in own[stage]:
                clocks[stage] += own[stage][name]
                waiting.pop()
            partner = stage + (-1 if name in ("SendGrad", "RecvActivation") else 1)
            if waiting and left[partner] and type(left[partner][-1]).__name__ == _PARTNER[name]:
                clocks[stage] = clocks[partner] = max(clocks[stage], clocks[partner])
                waiting.pop()
                left[partner].pop()
        assert sum(map(len, left)) < before, "all wait for each other"
    return max(clocks)


_PARTNER = {"SendActivation": "RecvActivation", "SendGrad": "RecvGrad"}
_PARTNER |= {receives: sends for sends, receives in _PARTNER.items()}


def _own_seconds(schedule: type[TrainSchedule], passes: Passes) -> dict[str, float]:
    backward = passes.inputs + (passes.weights if schedule is TrainSchedule else 0.0)
    none = dict.fromkeys(("LoadMicroBatch", "ReduceTiedGrads", "ReduceGrads", "OptimizerStep"), 0.0)
    return none | {"ForwardPass": passes.forward, "BackwardPass": backward, "WeightGradients": passes.weights}


@pytest.mark.parametrize("passes", [Passes(), Passes(1, 1.25, 0.75), Passes(1, 1.7, 0.8)], ids=str)
@pytest.mark.parametrize(("stages", "count"), [(2, 16), (4, 16), (8, 32), (8, 8)])
def test_stages_wait_as_long_as_the_paper_says(stages: int, count: int, passes: Passes) -> None:
    work, others = count * passes.total, stages - 1
    filled = [TrainSchedule, *[ZeroBubbleSchedule] * others]
    assert seconds_of([TrainSchedule] * stages, count, passes) == pytest.approx(work + others * passes.total)
    assert seconds_of(filled, count, passes) == pytest.approx(work + others * (passes.total - 2 * passes.weights))


@pytest.mark.parametrize("passes", [Passes(), Passes(1, 1.7, 0.8)], ids=str)
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_few_micro_batches_fill_as_much_as_is_predicted(stages: int, passes: Passes) -> None:
    filled = [TrainSchedule, *[ZeroBubbleSchedule] * (stages - 1)]
    for count in range(1, 2 * stages):
        spared = seconds_of([TrainSchedule] * stages, count, passes) - seconds_of(filled, count, passes)
        assert spared == pytest.approx(times_filled(stages, count) * passes.weights)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("stages", [2, 3, 5])
def test_what_a_stage_does_otherwise_is_the_same(stages: int, count: int) -> None:
    for stage in range(1, stages):
        made = commands(ZeroBubbleSchedule, count, stages, stage)
        others = [repr(command) for command in made if not isinstance(command, WeightGradients)]
        assert others == list(map(repr, commands(TrainSchedule, count, stages, stage)))
        names = [type(command).__name__ for command in made]
        forward = backward = complete = 0
        for name in names:
            forward += name == "ForwardPass"
            backward += name == "BackwardPass"
            complete += name == "WeightGradients"
            assert complete <= backward
            assert forward - complete <= stages, "as many micro batches as have a place"
            assert backward - complete <= stage + 1
            assert complete == count or name != "ReduceGrads"
        assert complete == count


@dataclass
class Slot(Rerun):
    """A recorder whose memory one micro batch at a time may use, from its first pass to its last."""

    passes: int
    recorded: int = 0
    busy: bool = False

    def record(self, work: Callable[[], None]) -> Any:
        place, replay = self.recorded % self.passes, super().record(work)
        self.recorded += 1

        def guarded() -> None:
            assert self.busy == (place > 0), "its memory belongs to another micro batch"
            replay.replay()
            self.busy = place < self.passes - 1

        return Replay(guarded)


def trainings(configs: Sequence[RunConfig], shards: Path, replays: Sequence[bool]) -> list[Any]:
    """One rank: losses, norms, weights and which graphs were replayed, of each training."""
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed

    device = init_distributed(configs[0].launch)
    return [
        training(config, build_mesh(config.parallel, device), shards, replay)
        for config, replay in zip(configs, replays, strict=True)
    ]


def training(config: RunConfig, mesh: Any, shards: Path, replay: bool) -> Any:
    from neox_core.train.engine.deepspeed_engine import accumulate_in_products, build_engine
    from neox_core.train.engine.graphs.graphed_stage import GraphedStage

    engine = build_engine(config, mesh, batch_geometry(config), NeoxCheckpoint(shards).layer)
    accumulate_in_products(engine, batch_geometry(config))
    if replay and config.parallel.sequence:  # else there are no graphs, see `why_not`
        buffers, passes = engine.optimizer.fp32_groups_gradients_flat, 2 if engine.deferred is None else 3
        engine._graphs = GraphedStage(engine, engine.optimizer.overlaps, lambda: Slot(buffers, passes))
    engine.set_learning_rate(1e-2)
    batches, found = rank_batches(config, mesh.data_rank), []
    for step in range(STEPS + 1):
        if step == STEPS:
            engine.set_accumulation_steps(1)
        found.append((float(engine.train_batch(batches)), float(engine.get_global_grad_norm())))
    engine.finish_step()
    weights = {name: p.detach().double().sum().item() for name, p in engine.module.named_parameters()}
    return found, weights, engine.deferred is not None


def with_schedule(config: RunConfig, schedule: PipelineSchedule, **parallel: Any) -> RunConfig:
    update = {"pipeline_schedule": schedule} | parallel
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=update)})


@pytest.mark.parametrize(
    ("family", "layout", "train", "parallel"),
    [
        pytest.param("llama with biases", (1, 2, 2), {}, {}, id="two data-parallel ranks"),
        pytest.param("qwen3", (1, 3, 1), {"precision": "bf16", "mask_documents": True}, {}, id="masks"),
        pytest.param("llama tied", (1, 3, 1), {"activation_checkpointing": "selective"}, {}, id="tied embeddings"),
        pytest.param("olmo2 with biases", (2, 2, 1), {"activation_checkpointing": "full"}, {}, id="tensor-parallel"),
        pytest.param("mistral", (2, 2, 1), {}, {"sequence": False}, id="states sent in parts"),
    ],
)
def test_steps_are_the_same_bit_for_bit(
    family: str, layout: tuple[int, int, int], train: dict[str, Any], parallel: dict[str, Any], tmp_path: Path
) -> None:
    """Replayed as from graphs too. Of three stages, one in the midst also receives gradients."""
    write_model(tmp_path / "base", **CASES[family] | {"num_hidden_layers": 4})
    model = open_source(tmp_path / "base").model
    config = config_for("mha", *layout, micro_batch_size=1, **train).model_copy(update={"model": model})
    convert(tmp_path / "base", tmp_path / "shards", model, config.parallel)
    runs = [with_schedule(config, schedule, **parallel) for schedule in ("1f1b", "zb-h1", "zb-h1")]
    ranks = layout[0] * layout[1] * layout[2]
    for rank, found in enumerate(run_ranks(trainings, ranks, runs, tmp_path / "shards", [False, False, True])):
        plain, deferred, replayed = found
        assert deferred[:2] == plain[:2]
        assert replayed[:2] == plain[:2]
        behind_the_first = rank >= ranks // layout[1]
        assert [run[2] for run in found] == [False, behind_the_first, behind_the_first]
