"""The engine on two ranks: master weights, recomputation, validation, replicated weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.host_memory import HostBuffers
from neox_core.config import OptimizerConfig, ParallelConfig, RunConfig, batch_geometry
from neox_core.parallel.parameter_gathering import OverlappedGathering
from neox_core.parallel.sharding import ROWS, TOKEN_NORM, set_sharding
from neox_core.train.engine.deepspeed_engine import ParameterGroups
from neox_core.train.engine.setup import deepspeed_config
from tests.distributed import run_ranks
from tests.neox_core.train.small_training import MODELS, config_for, rank_batches

RANKS = 2
STEPS = 6
LAYOUTS = {"tensor": (2, 1, 1), "data": (1, 1, 2)}


def build(config: RunConfig, shards: Path) -> tuple[Any, Any]:
    """Mesh and engine; building proves the master weights."""
    from neox_core.checkpoint.formats.neox import NeoxCheckpoint
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
    from neox_core.train.engine.deepspeed_engine import build_engine

    mesh = build_mesh(config.parallel, init_distributed(config.launch))
    return mesh, build_engine(config, mesh, batch_geometry(config), NeoxCheckpoint(shards).layer)


def verdict(engine: Any, trained: bool = False) -> str:
    """What verify_master_weights says."""
    from neox_core.errors import CheckpointError
    from neox_core.train.engine.state.verification import verify_master_weights

    try:
        verify_master_weights(engine, trained)
    except CheckpointError as error:
        return str(error)
    return "equal"


def save_verdict(engine: Any) -> str:
    """What verify_before_save says."""
    from neox_core.errors import TrainingError
    from neox_core.train.engine.state.verification import verify_before_save

    try:
        verify_before_save(engine, "global_step5")
    except TrainingError as error:
        return str(error)
    return "good"


@torch.no_grad()
def verdicts(engine: Any, rank: int) -> dict[str, str]:
    """Before, during and after faults that exist on rank 1 alone."""
    masters = [master.storage for master in engine.optimizer.masters]
    parameters = list(engine.module.parameters())
    sizes = sum(p.numel() for p in parameters)
    found = {"built": verdict(engine), "parameters": str(sizes)}
    kept = [p.clone() for p in parameters]
    for p in parameters if rank == 1 else []:
        p.add_(1.0)
    found["other weights in the model"] = verdict(engine)
    for p, old in zip(parameters, kept, strict=True):
        p.copy_(old)
    found["restored"] = verdict(engine)
    if rank == 1:
        parameters[0].view(-1)[5] += 1.0
    found["a weight that rank 0 owns"] = verdict(engine)
    if rank == 1:
        parameters[0].copy_(kept[0])
        engine.optimizer.bf16_groups[1][0][3] += 1.0
        engine.optimizer.masters[1].reset()
    found["a norm that agrees with its master"] = verdict(engine)
    if rank == 1:
        for p, old in zip(parameters, kept, strict=True):
            p.copy_(old)
        engine.optimizer.masters[1].reset()
        masters[0][3] += 1.0
    found["one other master"], found["one other master, saved"] = verdict(engine), save_verdict(engine)
    if rank == 1:
        engine.optimizer.masters[0].reset()
    found["restored again"] = save_verdict(engine)
    moments = engine.optimizer.optimizer.state[engine.optimizer.fp32_groups_flat_partition[1]]["exp_avg_sq"]
    if rank == 1:
        moments[2] = torch.inf
    found["an infinite moment"] = save_verdict(engine)
    if rank == 1:
        moments[2] = 0.0
        parameters[0].view(-1)[-1] = torch.nan
        engine.optimizer.masters[0].reset()
    found["a NaN in a weight"], found["a NaN, loaded"] = save_verdict(engine), verdict(engine, trained=True)
    return found


def train_overlapping(config: RunConfig, shards: Path, overlap: bool) -> dict[str, Any]:
    """A training whose gradients are summed in buckets, or at the end of the step; and how many were under way then."""
    mesh, engine = build(config, shards)
    reduction, under_way = engine.optimizer.reduction, []
    reduction.bucket_elements = 4096
    finish = reduction.finish

    def note_and_finish() -> None:
        under_way.append(reduction.buckets_under_way)
        finish()

    reduction.finish = note_and_finish
    if not overlap:
        engine.optimizer.begin_reduction = lambda: None
    batches = rank_batches(config, mesh.data_rank)
    losses = [float(engine.train_batch(batches)) for _ in range(STEPS)]
    engine.finish_step()
    weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    return {"losses": losses, "weights": weights, "under way": under_way}


def train_gathering(config: RunConfig, shards: Path, overlap: bool) -> dict[str, Any]:
    """A training whose parameters are gathered while layers compute, or before; and how many buckets were under way
    when each layer began."""
    mesh, engine = build(config, shards)
    optimizer, under_way = engine.optimizer, []
    flat, group = optimizer.bf16_groups_flat[0], optimizer.real_dp_process_group[0]
    sizes = [p.numel() for p in optimizer.bf16_groups[0]]
    layers = [int(optimizer.param_names[p].split(".")[0]) for p in optimizer.bf16_groups[0]]
    optimizer.gathering = OverlappedGathering(flat, group, sizes, layers, bucket_bytes=4096 * flat.element_size())
    engine.await_parameters()
    for layer in (module for name, module in engine.module.named_children() if name.isdigit()):
        layer.register_forward_pre_hook(lambda *_: under_way.append(optimizer.gathering.buckets_under_way))
    batches = rank_batches(config, mesh.data_rank)
    losses = []
    for _ in range(STEPS):
        losses.append(float(engine.train_batch(batches)))
        if not overlap:
            engine.finish_step()
    left = optimizer.gathering.buckets_under_way
    engine.finish_step()
    weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    return {"losses": losses, "weights": weights, "under way": under_way, "left": left}


def steps(engine: Any, batches: Any, count: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each of the next steps."""
    return [(float(engine.train_batch(batches)), float(engine.get_global_grad_norm())) for _ in range(count)]


def moments(engine: Any) -> list[int]:
    """Where the optimizer's states lie."""
    states = engine.optimizer.optimizer.state.values()
    return [value.data_ptr() for state in states for value in state.values()]


def write(content: Any, path: Path) -> None:
    """Save a file of the state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(HostBuffers().copy(content), path)


def go_on_and_resume(config: RunConfig, shards: Path, folder: Path) -> list[Any]:
    """What follows a saved step in the engine that saved it, and in a new one that loads it."""
    mesh, engine = build(config, shards)
    batches = rank_batches(config, mesh.data_rank)
    steps(engine, batches, 2)
    engine.save_state(folder, "global_step2", {"sequences_consumed": 16}, write)
    went_on = steps(engine, batches, 2)
    _, resumed = build(config, shards)
    places = moments(resumed)
    resumed.load_state(folder, "global_step2")
    assert moments(resumed) == places, "read in place, since two sets of them need not fit"
    assert verdict(resumed, trained=True) == "equal"
    if config.train.precision == "bf16":
        assert verdict(resumed) != "equal", "master weights have moved"
    return [went_on, steps(resumed, rank_batches(config, mesh.data_rank, first_step=3), 2)]


def train(config: RunConfig, shards: Path, validate: bool = False) -> dict[str, Any]:
    """Losses and gradient norms of some steps, and the norms' scales after them."""
    mesh, engine = build(config, shards)
    batches = rank_batches(config, mesh.data_rank)
    losses, gradient_norms = [], []
    for _ in range(STEPS):
        losses.append(float(engine.train_batch(batches)))
        gradient_norms.append(float(engine.get_global_grad_norm()))
        if validate:
            engine.eval_batch(rank_batches(config, mesh.data_rank, first_step=100))
    scales = {name: p.detach().clone() for name, p in engine.module.named_parameters() if p.ndim == 1}
    timers = list(engine.timers.get_timers())
    return {"losses": losses, "gradient norms": gradient_norms, "scales": scales, "timers": timers}


def examine(shards: dict[str, Path], scratch: Path) -> dict[Any, Any]:
    """Everything that one of two ranks finds out."""
    found: dict[Any, Any] = {}
    for name, layout in LAYOUTS.items():
        mesh, engine = build(config_for("gqa", *layout, precision="bf16"), shards[name])
        found[name] = verdicts(engine, mesh.rank)
    config = config_for("gqa", 2, 1, 1, precision="bf16")
    found["full"] = train(config, shards["tensor"])
    found["none"] = train(
        config_for("gqa", 2, 1, 1, precision="bf16", activation_checkpointing="none"), shards["tensor"]
    )
    found["validated"] = train(config, shards["tensor"], validate=True)
    for overlap in (True, False):
        config = config_for("gqa", 1, 1, 2, precision="bf16")
        found["overlap", overlap] = train_overlapping(config, shards["data"], overlap)
        found["gathering", overlap] = train_gathering(config, shards["data"], overlap)
    for changes in ({"precision": "fp32"}, {"precision": "bf16", "master_weights": "packed"}):
        config = config_for("gqa", 1, 1, 2, **changes)
        name = "-".join(changes.values())
        found["resumed", name] = go_on_and_resume(config, shards["data"], scratch / name)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    base = tmp_path_factory.mktemp("base")
    make_random_base(MODELS["gqa"], base, seed=7)
    shards = {}
    for name, (tensor, pipeline, _) in LAYOUTS.items():
        shards[name] = tmp_path_factory.mktemp(name)
        convert(base, shards[name], MODELS["gqa"], ParallelConfig(tensor=tensor, pipeline=pipeline))
    return run_ranks(examine, RANKS, shards, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_master_weights_are_checked_on_all_ranks(ranks: list[dict[Any, Any]], layout: str) -> None:
    """A fault on one rank is raised on both: a rank that went on would wait for the other for ever."""
    for rank, found in enumerate(result[layout] for result in ranks):
        assert found["built"] == found["restored"] == "equal"
        several = re.match(
            r"(\d+) fp32 master weights differ .* \((\d+) on rank (\d)\)", found["other weights in the model"]
        )
        assert several is not None
        assert int(several[3]) == rank
        assert int(several[2]) == (int(several[1]) if rank == 1 else 0)
        # Of rank 1's own partition all weights differ: it has the whole or, with data parallelism, half the model.
        assert int(several[1]) == pytest.approx(int(found["parameters"]) / LAYOUTS[layout][2], rel=0.01)
        if layout == "data":  # of tensor-parallel ranks, each owns all that it has
            assert found["a weight that rank 0 owns"].startswith("ranks [1] have loaded other weights")
        assert found["a norm that agrees with its master"].startswith("ranks [1] have loaded other weights")
        assert found["one other master"].startswith(f"1 fp32 master weights differ from the model's weights ({rank} on")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_that_no_start_would_take_is_not_saved(ranks: list[dict[Any, Any]], layout: str) -> None:
    for found in (result[layout] for result in ranks):
        assert "1 fp32 master weights do not round to the model's weights" in found["one other master, saved"]
        assert found["restored again"] == "good"
        assert "not finite are exp_avg_sq of group 1 on rank 1: the checkpoint before" in found["an infinite moment"]
        assert re.search(r"not finite are \S*word_embeddings.weight on rank 1:", found["a NaN in a weight"])
        # With data parallelism, rank 0's copy is another; else a NaN that was saved once is equal to itself.
        assert found["a NaN, loaded"] == "equal" or layout == "data"


def test_recomputation_does_not_change_the_training(ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        assert rank["full"]["losses"] == rank["none"]["losses"]
        assert rank["full"]["gradient norms"] == rank["none"]["gradient norms"]


def test_validation_does_not_disturb_training(ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        assert rank["full"]["losses"] == rank["validated"]["losses"]
        assert rank["full"]["gradient norms"] == rank["validated"]["gradient norms"]
        assert len(set(rank["full"]["losses"])) == STEPS


def test_no_timer_keeps_something_of_each_step(ranks: list[dict[Any, Any]]) -> None:
    assert [rank["validated"]["timers"] for rank in ranks] == [[]] * RANKS


@pytest.mark.parametrize("kind", ["fp32", "bf16-packed"])
def test_a_resumed_training_goes_on_bit_by_bit(ranks: list[dict[Any, Any]], kind: str) -> None:
    for rank in ranks:
        went_on, resumed = rank["resumed", kind]
        assert went_on == resumed
        assert went_on[0] != went_on[1]


def test_overlapping_reduction_changes_no_bit(ranks: list[dict[Any, Any]]) -> None:
    """Of 74,048 weights in two partitions, 18 buckets of 4,096 but for the embedding's 8,192 and a rest."""
    for rank in ranks:
        overlapped, at_the_end = rank["overlap", True], rank["overlap", False]
        assert overlapped["losses"] == at_the_end["losses"]
        for name, weight in overlapped["weights"].items():
            assert torch.equal(weight, at_the_end["weights"][name]), name
        assert at_the_end["under way"] == [0] * STEPS
        assert min(overlapped["under way"]) > 10


def test_overlapping_gathering_changes_no_bit(ranks: list[dict[Any, Any]]) -> None:
    """Each layer of a step's first forward pass leaves fewer buckets under way, and those of all layers leave none."""
    for rank in ranks:
        overlapped, at_once = rank["gathering", True], rank["gathering", False]
        assert overlapped["losses"] == at_once["losses"] == rank["overlap", True]["losses"]
        for name, weight in overlapped["weights"].items():
            assert torch.equal(weight, at_once["weights"][name]), name
        assert set(at_once["under way"]) == {0}
        assert (at_once["left"], overlapped["left"]) == (0, 18)
        of_step = len(overlapped["under way"]) // STEPS
        second = overlapped["under way"][of_step : 2 * of_step]
        embedding, *blocks = second[:3]
        assert embedding > blocks[0] > blocks[1] > 0
        assert set(second[5:]) == {0}, "of the head, and of other micro batches"


def test_norms_stay_equal_on_tensor_parallel_ranks(ranks: list[dict[Any, Any]]) -> None:
    first, second = (rank["full"]["scales"] for rank in ranks)
    assert len(first) == 2 * 2 + 1
    for name, scale in first.items():
        assert torch.equal(scale, second[name]), name
        assert not bool((scale == 1).all()), name


def test_settings_of_bf16() -> None:
    config = config_for("gqa", 1, 1, 2, precision="bf16")
    settings = deepspeed_config(config, batch_geometry(config))
    assert settings["bf16"] == {"enabled": True, "immediate_grad_update": True}
    # Without both, gradients would be summed in bf16.
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["communication_data_type"] == "fp32"
    assert settings["zero_optimization"] == {"stage": 1}
    assert (settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]) == (2, 2)
    assert settings["gradient_clipping"] == config.train.gradient_clip


def test_matrices_decay_and_norms_do_not() -> None:
    linear, norm = nn.Linear(3, 2, bias=False), nn.RMSNorm(3)
    set_sharding(linear.weight, ROWS)
    set_sharding(norm.weight, TOKEN_NORM)
    module = nn.ModuleDict({"linear": linear, "norm": norm})
    matrices, norms = ParameterGroups(module, OptimizerConfig(lr=1.0)).param_groups
    assert [p.shape for p in matrices["params"]] == [(2, 3)]
    assert matrices["weight_decay"] == 0.1
    assert [p.shape for p in norms["params"]] == [(3,)]
    assert norms["weight_decay"] == 0.0
    assert len(ParameterGroups(linear, OptimizerConfig(lr=1.0)).param_groups) == 2
