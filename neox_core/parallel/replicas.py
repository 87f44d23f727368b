"""Weights that several tensor-parallel ranks hold: their gradients are summed, and count once in the norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from neox_core.model import ModelDimensions, TransformerBlock

_SHARED_ROWS = "shared_rows"


def mark_shared_rows(block: TransformerBlock, dims: ModelDimensions) -> None:
    """Note which rows of a block's fused projection other ranks have too: its k and v, as NeoX orders them.

    Args:
        dims: one rank's.
    """
    kv_rows = 2 * dims.head_dim * dims.num_kv_heads // dims.num_heads
    stride = dims.head_dim + kv_rows
    rows = [range(head * stride + dims.head_dim, (head + 1) * stride) for head in range(dims.num_heads)]
    setattr(block.attention.query_key_value.weight, _SHARED_ROWS, rows)


def shared_elements(parameters: Sequence[Tensor]) -> list[range]:
    """Where the shared rows lie when the parameters are flattened one after the other."""
    ranges, offset = [], 0
    for parameter in parameters:
        for rows in getattr(parameter, _SHARED_ROWS, []):
            width = parameter.shape[1]
            ranges.append(range(offset + rows.start * width, offset + rows.stop * width))
        offset += parameter.numel()
    return ranges


class ReplicatedGradients:
    """Pieces of a flat gradient that the ranks of a group share; each rank has a part of the sum.

    Args:
        gradient: this rank's partition of the flat gradient.
        first: where the partition begins in it.
        elements: the shared ones, counted from the flat gradient's begin.
        group: the ranks that share them, in the same order.
    """

    def __init__(self, gradient: Tensor, first: int, elements: Sequence[range], group: dist.ProcessGroup) -> None:
        size = gradient.numel()
        clipped = [(max(r.start - first, 0), min(r.stop - first, size)) for r in elements]
        self._pieces = [gradient[start:stop] for start, stop in clipped if start < stop]
        self._group = group

    def sum(self) -> None:
        """Give every rank the sum, the same bits on each."""
        if not self._pieces:
            return  # the ranks of the group have the same partition, so none has any
        total = torch.cat(self._pieces)
        dist.all_reduce(total, group=self._group)
        torch._foreach_copy_(self._pieces, torch.split(total, [piece.numel() for piece in self._pieces]))

    def repeated_squares(self) -> Tensor | float:
        """Sum of the squares that another rank of the group counts too; 0 on the group's first rank."""
        if not self._pieces or dist.get_rank(self._group) == 0:
            return 0.0
        return torch.stack(torch._foreach_norm(self._pieces)).square().sum()
