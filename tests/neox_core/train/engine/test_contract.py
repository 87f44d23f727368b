"""DeepSpeed has what this software uses of its insides, and all that is used is in the list."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from neox_core.parallel.ranks.mesh import Axis, Mesh
from neox_core.train.engine import pipeline_stage
from neox_core.train.engine.contract import ATTRIBUTES, EXPECTED, METHODS
from neox_core.train.engine.sharded_optimizer import ShardedOptimizer
from neox_core.train.engine.state import files as state_files
from neox_core.train.engine.step_engine import StepEngine
from neox_core.train.engine.training_engine import TrainingEngine

SUBCLASSES = {
    TrainingEngine: PipelineEngine,
    ShardedOptimizer: BF16_Optimizer,
    pipeline_stage._Pipeline: PipelineModule,
    pipeline_stage._LayerSpec: LayerSpec,
    state_files.StateFiles: CheckpointEngine,
}


def named(lists: Any) -> list[Any]:
    """A test case for each name, which is in its id."""
    return [
        pytest.param(owner, name, id=f"{owner.__name__}.{name}") for owner, names in lists.items() for name in names
    ]


@cache
def tree(owner: type) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(owner)))


@cache
def names_on_self(owner: type) -> frozenset[str]:
    """Attributes that the class's own methods, or those that it inherits from DeepSpeed, set on `self`."""
    found = set()
    for base in owner.__mro__:
        if base.__module__.startswith("deepspeed"):
            found |= {name for name, context in attributes_of_self(base) if isinstance(context, ast.Store)}
    return frozenset(found)


def attributes_of_self(owner: type) -> Iterator[tuple[str, ast.expr_context]]:
    for node in ast.walk(tree(owner)):
        if isinstance(node, ast.Attribute):
            of_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            if of_super or getattr(node.value, "id", "") == "self":
                yield node.attr, node.ctx


@pytest.mark.parametrize(("owner", "name"), named(METHODS))
def test_methods_are_there_with_their_parameters(owner: type, name: str) -> None:
    assert hasattr(owner, name), f"DeepSpeed's {owner.__name__} has no {name} any more"
    parameters = [one for one in inspect.signature(getattr(owner, name)).parameters if one != "self"]
    assert ", ".join(parameters) == METHODS[owner][name], f"{owner.__name__}.{name} takes other parameters now"


@pytest.mark.parametrize(("owner", "name"), named(ATTRIBUTES))
def test_attributes_are_there(owner: type, name: str) -> None:
    assert hasattr(owner, name) or name in names_on_self(owner), f"{owner.__name__} has no {name} any more"


@pytest.mark.parametrize(("owner", "name"), named(EXPECTED))
def test_what_is_set_is_looked_for(owner: type, name: str) -> None:
    code = "".join(inspect.getsource(base) for base in owner.__mro__ if base.__module__.startswith("deepspeed"))
    assert name in code, f"{owner.__name__} does not look for {name} any more"


@pytest.mark.parametrize("ours", SUBCLASSES, ids=lambda ours: ours.__name__)
def test_the_list_is_complete(ours: type) -> None:
    """Every name of DeepSpeed's class that the class here overrides or uses."""
    theirs = SUBCLASSES[ours]
    listed = {
        *METHODS.get(theirs, ()),
        *ATTRIBUTES.get(theirs, ()),
        *(name for names in EXPECTED.values() for name in names),
    }
    used = {name for name, _ in attributes_of_self(ours)} | {name for name in vars(ours) if not name.startswith("__")}
    python = {*dir(torch.nn.Module), "_abc_impl"}
    is_theirs = {name for name in used if hasattr(theirs, name) or name in names_on_self(theirs)}
    assert is_theirs - python - listed == set()


def test_the_schedules_instructions_are_hooked() -> None:
    """DeepSpeed looks the functions up by the instruction, not by name."""
    for instruction in (schedule.BackwardPass, schedule.ReduceGrads, schedule.OptimizerStep):
        function = TrainingEngine._INSTRUCTION_MAP[instruction]
        assert function is vars(TrainingEngine)[PipelineEngine._INSTRUCTION_MAP[instruction].__name__]


def test_the_engine_has_the_whole_face() -> None:
    face = {name for name in vars(StepEngine) if not name.startswith("_")} - {"gradient_groups"}
    missing = face - vars(TrainingEngine).keys()
    assert missing == {"train_batch"}, "inherited"
    for name in face - missing:
        theirs = getattr(TrainingEngine, name)
        if callable(theirs):
            parameters = list(inspect.signature(getattr(StepEngine, name)).parameters)
            assert list(inspect.signature(theirs).parameters)[: len(parameters)] == parameters


@pytest.mark.parametrize(("pipeline", "data", "tensor"), [(1, 1, 1), (2, 3, 4), (3, 1, 2)])
def test_ranks_lie_as_deepspeed_lays_them(pipeline: int, data: int, tensor: int) -> None:
    topology = PipeModelDataParallelTopology(pipeline, tensor, data)
    axes: dict[str, Axis] = {"pipe": "pipeline", "data": "data", "model": "tensor"}
    for rank in range(pipeline * data * tensor):
        place: Any = topology.get_coord(rank)
        mesh = Mesh(
            rank=rank, local_rank=0, world_size=pipeline * data * tensor, tensor_rank=place.model, tensor_size=tensor,
            pipeline_rank=place.pipe, pipeline_size=pipeline, data_rank=place.data, data_size=data,
            tensor_group=Any, device=torch.device("cpu"),
        )  # fmt: skip
        for theirs, ours in axes.items():
            (peers,) = [found for found in topology.get_axis_comm_lists(theirs) if rank in found] or [[rank]]
            assert list(mesh.peers(ours)) == peers


def test_deepspeed_takes_the_gpu_that_a_rank_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number 0 where a rank sees no other, whatever its LOCAL_RANK."""
    from deepspeed.runtime import engine

    from neox_core.train.engine.deepspeed_engine import device_arguments

    chosen: list[int] = []
    accelerator = SimpleNamespace(set_device=chosen.append, device_name=lambda number: f"cuda:{number}")
    monkeypatch.setattr(engine, "get_accelerator", lambda: accelerator)
    for name in ("get_world_size", "get_rank"):
        monkeypatch.setattr(engine.dist, name, lambda: 6)
    made = SimpleNamespace(local_rank=5)
    engine.DeepSpeedEngine._set_distributed_vars(made, device_arguments(torch.device("cuda", 0)))
    assert chosen == [0]
    assert made.device == torch.device("cuda", 0)
    assert device_arguments(torch.device("cpu")) is None
