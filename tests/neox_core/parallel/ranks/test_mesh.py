"""Who computes what, and what stands in the way of starting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from neox_core.config import LaunchConfig, ParallelConfig
from neox_core.errors import ConfigError, LaunchError
from neox_core.parallel.ranks.mesh import Mesh, build_mesh, init_distributed

CPU = torch.device("cpu")
VARIABLES = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@contextmanager
def one_of(world_size: int, rank: int) -> Iterator[None]:
    """This process as one rank of a world whose other ranks do not exist: groups are made, nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def meshes(world_size: int, tensor: int, pipeline: int) -> list[tuple[Mesh, list[int]]]:
    """Every rank's mesh and the ranks of its tensor-parallel group."""
    made = []
    for rank in range(world_size):
        with one_of(world_size, rank):
            mesh = build_mesh(ParallelConfig(tensor=tensor, pipeline=pipeline), CPU)
            made.append((mesh, dist.get_process_group_ranks(mesh.tensor_group)))
    return made


def test_coordinates_of_eight_ranks() -> None:
    """Neighbouring ranks share a tensor-parallel group; a pipeline stage is a block of consecutive ranks."""
    made = meshes(8, tensor=2, pipeline=2)
    places = [(mesh.pipeline_rank, mesh.data_rank, mesh.tensor_rank) for mesh, _ in made]
    assert places == [(p, d, t) for p in range(2) for d in range(2) for t in range(2)]
    assert [ranks for _, ranks in made] == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [6, 7], [6, 7]]
    for rank, (mesh, _) in enumerate(made):
        assert (mesh.rank, mesh.world_size) == (rank, 8)
        assert mesh.layout == {"tensor": 2, "pipeline": 2, "data": 2}
        assert (mesh.tensor_size, mesh.pipeline_size, mesh.data_size) == (2, 2, 2)


def test_tensor_parallel_over_a_whole_node() -> None:
    made = meshes(16, tensor=8, pipeline=1)
    assert [ranks for _, ranks in made] == [list(range(8))] * 8 + [list(range(8, 16))] * 8
    assert [mesh.tensor_rank for mesh, _ in made] == [*range(8), *range(8)]


def test_local_rank_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert meshes(1, 1, 1)[0][0].local_rank == 5


def test_world_size_must_be_divisible() -> None:
    with (
        one_of(6, 0),
        pytest.raises(ConfigError, match=r"world size 6 .* parallel.tensor 2 x parallel.pipeline 2") as caught,
    ):
        build_mesh(ParallelConfig(tensor=2, pipeline=2), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", VARIABLES)
def test_each_missing_variable_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in VARIABLES.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv(name)
    with pytest.raises(LaunchError, match=rf"environment variables \['{name}'\] are not set: start with torchrun"):
        init_distributed(LaunchConfig(device="cpu"))


def test_cuda_demanded_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in VARIABLES.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LaunchError, match=r"launch.device is 'cuda' but this rank sees no GPU"):
        init_distributed(LaunchConfig(device="cuda"))
