"""The output head of a model with tied embeddings, whose weight is the embedding's: the optimizer has it once.

A stage with both layers has one weight and one gradient. Where the embedding is on another stage, the last one has a
copy of the weight, without any state of the optimizer's: before each update its gradient goes to the first stage, and
after it the weight comes back, between the ranks that have the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox_core.parallel.layers import ChunkedHead, SplitEmbedding
from neox_core.parallel.ranks.mesh import Mesh
from neox_core.parallel.weight_gradients import AccumulatingLinear, Accumulator

_PIECE = 1 << 24
"""Elements that are sent at a time: 64 MiB of gradient."""


@dataclass(frozen=True)
class TiedHead:
    """One stage's part: the embedding's weight or the head's copy of it.

    Args:
        weight: [V,D], this rank's rows.
        gradient: its fp32 sum.
        peer: the rank that has the other one; None: this rank has both, in one place.
        has_embedding: whose optimizer has the weight.
    """

    weight: Tensor
    gradient: Tensor
    peer: int | None
    has_embedding: bool

    @property
    def awaits_gradient(self) -> bool:
        """The embedding's gradient is not complete when this stage's backward pass is."""
        return self.has_embedding and self.peer is not None

    def sum_gradients(self) -> None:
        """Give the embedding the head's gradient too. All micro batches are through, and nothing is averaged yet."""
        if self.peer is None:
            return
        for piece in torch.split(self.gradient.view(-1), _PIECE):
            if self.has_embedding:
                received = torch.empty_like(piece)
                dist.recv(received, self.peer)
                piece.add_(received)
            else:
                dist.send(piece, self.peer)
        if not self.has_embedding:
            self.gradient.zero_()

    def copy_weight(self) -> None:
        """Give the head the embedding's weight."""
        if self.peer is None:
            return
        if self.has_embedding:
            dist.send(self.weight.detach(), self.peer)
        else:
            dist.recv(self.weight.detach(), self.peer)


def tie_head(module: nn.Module, optimizer: Any, mesh: Mesh) -> TiedHead | None:
    """Tie the head of a model with tied embeddings; None: this stage has neither layer.

    From now on, the head's gradient goes to the embedding's buffer, or where that is elsewhere, to its own.

    Args:
        optimizer: the stage's ShardedOptimizer.
    """
    embedding = next((x.word_embeddings.weight for x in module.modules() if isinstance(x, SplitEmbedding)), None)
    head = next((x.final_linear for x in module.modules() if isinstance(x, ChunkedHead)), None)
    assert head is None or isinstance(head, AccumulatingLinear), "parallelize gives every head a place for its buffer"
    first, last = mesh.peers("pipeline")[0], mesh.peers("pipeline")[-1]
    if embedding is not None:
        gradient = _gradient_of(embedding, optimizer)
        if head is not None:
            head.weight.data = embedding.data
            head.accumulator = Accumulator(gradient, _nothing)
        return TiedHead(embedding, gradient, None if head is not None else last, has_embedding=True)
    if head is None:
        return None
    gradient = torch.zeros_like(head.weight, dtype=torch.float32)
    head.accumulator = Accumulator(gradient, _nothing)
    return TiedHead(head.weight, gradient, first, has_embedding=False)


def _gradient_of(parameter: Tensor, optimizer: Any) -> Tensor:
    """The optimizer's fp32 sum of a parameter's gradients, in its shape."""
    group, index = next(
        (g, i) for g, group in enumerate(optimizer.bf16_groups) for i, p in enumerate(group) if p is parameter
    )
    gradient: Tensor = optimizer.fp32_groups_gradients[group][index].view(parameter.shape)
    return gradient


def _nothing() -> None:
    """The embedding's own gradient, which comes last, is what the optimizer waits for."""
