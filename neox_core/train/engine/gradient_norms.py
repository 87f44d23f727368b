"""The gradient's norm and that of each group of layers, from what each rank has of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox_core.config import ModelConfig
from neox_core.model.layer_groups import NORMS, group_names, layer_group
from neox_core.parallel.norms import short_pieces
from neox_core.parallel.ranks.mesh import Mesh
from neox_core.parallel.replicas import shared_elements
from neox_core.parallel.sharding import sharding_of


class GradientNorms:
    """Reads the optimizer's gradient partitions, between their reduction and the update.

    Args:
        module: this rank's pipeline stage, whose children are named by their NeoX layer index.
        optimizer: with DeepSpeed's flat groups of parameters, each of which says how ranks hold it.
        model: sizes of the whole model.
        mesh: the grid of ranks.
    """

    def __init__(self, module: nn.Module, optimizer: Any, model: ModelConfig, mesh: Mesh) -> None:
        self.names = group_names(model.num_layers)
        self._pieces: dict[str, list[Tensor]] = {}
        self._repeated: dict[str, list[Tensor]] = {}
        """Parts of the pieces that a rank before this one counts too. They are counted and taken off again, so that a
        NaN is seen whichever rank has it."""
        indices = {id(p): int(name.split(".")[0]) for name, p in module.named_parameters()}
        repeats_heads = mesh.tensor_rank % max(1, mesh.tensor_size // model.num_kv_heads)
        for parameters, gradient, ranks in zip(
            optimizer.bf16_groups,
            optimizer.fp32_groups_gradient_flat_partition,
            optimizer.real_dp_process_group,
            strict=True,
        ):
            first = dist.get_rank(ranks) * gradient.numel()
            groups = [_group(p, indices[id(p)], model.num_layers) for p in parameters]
            # Of replicated parameters, the first tensor-parallel rank has the whole gradient.
            repeats = [mesh.tensor_rank > 0 and sharding_of(p).replicated for p in parameters]
            replicated = _runs(parameters, groups, repeats)
            shared = shared_elements(parameters) if repeats_heads else []
            for name, runs in _runs(parameters, groups, [True] * len(groups)).items():
                self._pieces.setdefault(name, []).extend(_pieces(gradient, first, runs))
                repeated = replicated.get(name, []) + [r for r in shared if any(r.start in run for run in runs)]
                self._repeated.setdefault(name, []).extend(_pieces(gradient, first, repeated))
        assert self._pieces.keys() <= set(self.names), "what is in no group would be missing in the whole norm"
        self._zero = torch.zeros((), device=mesh.device)

    def squares(self) -> Tensor:
        """This rank's share of each group's squared norm [groups], fp32, on the device: the sum over ranks is whole."""
        return self._sums(self._pieces) - (self._sums(self._repeated) if any(self._repeated.values()) else 0)

    def _sums(self, groups: Mapping[str, list[Tensor]]) -> Tensor:
        found = {name: torch.stack(torch._foreach_norm(pieces)).norm() for name, pieces in groups.items() if pieces}
        return torch.stack([found.get(name, self._zero) for name in self.names]).square()


def _pieces(partition: Tensor, first: int, ranges: Sequence[range]) -> list[Tensor]:
    """What a partition that begins at `first` of the flat gradient has of these ranges, in pieces for norms."""
    pieces = [partition[max(r.start - first, 0) : max(r.stop - first, 0)] for r in ranges]
    return short_pieces([piece for piece in pieces if piece.numel()])


def _group(parameter: Tensor, index: int, num_layers: int) -> str:
    return NORMS if sharding_of(parameter).kind == "norm" else layer_group(index, num_layers)


def _runs(parameters: Sequence[Tensor], groups: Sequence[str], wanted: Sequence[bool]) -> dict[str, list[range]]:
    """Where each group's wanted parameters lie when all are flattened one after the other; neighbours as one range."""
    runs: dict[str, list[range]] = {}
    offset = 0
    for parameter, group, wants in zip(parameters, groups, wanted, strict=True):
        end = offset + parameter.numel()
        if wants:
            own = runs.setdefault(group, [])
            start = own.pop().start if own and own[-1].stop == offset else offset
            own.append(range(start, end))
        offset = end
    return runs
