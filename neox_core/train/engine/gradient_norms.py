"""Norms of the gradient per group of layers, from what each rank has of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox_core.config import ModelConfig
from neox_core.model.layer_groups import NORMS, group_names, layer_group
from neox_core.parallel.mesh import Mesh
from neox_core.parallel.replicas import shared_elements


class GradientNorms:
    """Reads the optimizer's gradient partitions, between their reduction and the update.

    Args:
        module: this rank's pipeline stage, whose children are named by their NeoX layer index.
        optimizer: with DeepSpeed's flat groups of parameters: matrices, norms.
        model: sizes of the whole model.
        mesh: the grid of ranks.
    """

    def __init__(self, module: nn.Module, optimizer: Any, model: ModelConfig, mesh: Mesh) -> None:
        self.names = group_names(model.num_layers)
        matrices, norms = optimizer.bf16_groups
        gradient, norm_gradient = optimizer.fp32_groups_gradient_flat_partition
        first = dist.get_rank(optimizer.real_dp_process_group[0]) * gradient.numel()
        indices = {id(p): int(name.split(".")[0]) for name, p in module.named_parameters()}
        spans = _spans(matrices, [layer_group(indices[id(p)], model.num_layers) for p in matrices])
        self._pieces = {name: _pieces(gradient, first, [span]) for name, span in spans.items()}
        if mesh.tensor_rank == 0 and norms:  # the tensor-parallel ranks have the same norms
            self._pieces[NORMS] = [norm_gradient]
        self._repeated: dict[str, list[Tensor]] = {}
        if mesh.tensor_rank % max(1, mesh.tensor_size // model.num_kv_heads):  # a rank before has the same KV head
            shared = shared_elements(matrices)
            for name, span in spans.items():
                self._repeated[name] = _pieces(gradient, first, [r for r in shared if r.start in span])
        self._zero = torch.zeros((), device=mesh.device)

    def squares(self) -> Tensor:
        """This rank's share of each group's squared norm [groups], fp32, on the device: the sum over ranks is whole."""
        return self._sums(self._pieces) - (self._sums(self._repeated) if self._repeated else 0)

    def _sums(self, groups: Mapping[str, list[Tensor]]) -> Tensor:
        found = {name: torch.stack(torch._foreach_norm(pieces)).norm() for name, pieces in groups.items() if pieces}
        return torch.stack([found.get(name, self._zero) for name in self.names]).square()


def _pieces(partition: Tensor, first: int, ranges: Sequence[range]) -> list[Tensor]:
    """What a partition that begins at `first` of the flat gradient has of these ranges."""
    pieces = [partition[max(r.start - first, 0) : max(r.stop - first, 0)] for r in ranges]
    return [piece for piece in pieces if piece.numel()]


def _spans(parameters: Sequence[Tensor], groups: Sequence[str]) -> dict[str, range]:
    """Where each group lies among the flattened parameters, which are in the order of layers."""
    spans: dict[str, range] = {}
    offset = 0
    for parameter, group in zip(parameters, groups, strict=True):
        start = spans[group].start if group in spans else offset
        offset += parameter.numel()
        spans[group] = range(start, offset)
    return spans
