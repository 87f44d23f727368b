"""Log-likelihood of texts after prompts, on tensor-parallel ranks.

Shapes: B requests, T tokens. Requests of about the same length share a batch; padding follows the texts, where causal
attention hides it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from neox_core.evaluation.lengths import encoded
from neox_core.parallel.layers import ChunkedHead
from neox_core.parallel.loss import IGNORE_INDEX, token_losses

if TYPE_CHECKING:
    from neox_core.data.tokenization.tokenizer import Tokenizer
    from neox_core.parallel.ranks.mesh import Mesh

_SHORTEST = 64
"""Tokens to which a batch is padded at least. Few lengths mean few compiled kernels."""


@dataclass(frozen=True)
class Request:
    """Ids of a prompt and of what follows it."""

    ids: tuple[int, ...]
    scored: int
    """How many at the end count."""


def encode_request(tokenizer: Tokenizer, prompt: str, text: str, sequence_length: int) -> Request | None:
    """Ids of `<s> prompt text`, cut at the left to what the model takes; None where the text alone is too long."""
    whole, scored = encoded(tokenizer, prompt, text)
    if not 0 < scored <= sequence_length:
        return None
    return Request(tuple([tokenizer.start_id, *whole][-(sequence_length + 1) :]), scored)


@torch.inference_mode()
def log_likelihoods(
    layers: nn.Sequential, requests: Sequence[Request], sequence_length: int, tokens_per_batch: int, mesh: Mesh
) -> list[float]:
    """log p(text | prompt) of each request, in nats. Collective over the tensor-parallel ranks.

    Args:
        layers: all layers of this rank, from ids [B,T] to the hidden states that its head projects.
        sequence_length: what the layers take, to which no batch is padded beyond.
        tokens_per_batch: padded tokens of a batch, at most, unless one request has more.
    """
    found, head = [0.0] * len(requests), layers[-1]
    assert isinstance(head, ChunkedHead)
    for numbers, inputs, targets in _batches(requests, sequence_length, tokens_per_batch, mesh.device):
        losses = token_losses(head.project(layers(inputs)), targets, mesh.tensor_group, mesh.tensor_rank)
        for number, loss in zip(numbers, losses.double().sum(-1).tolist(), strict=True):
            found[number] = -loss
    return found


def padded_length(tokens: int) -> int:
    """The next of 64, 96, 128, 192, 256, ..."""
    length = _SHORTEST
    while length < tokens:
        length = length * 3 // 2 if length & (length - 1) == 0 else length // 3 * 4
    return length


def _batches(
    requests: Sequence[Request], sequence_length: int, tokens_per_batch: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Places of the requests, their inputs and their targets [B,T]; long ones first, so that memory fails at once."""
    order = sorted(range(len(requests)), key=lambda number: -len(requests[number].ids))
    while order:
        length = min(padded_length(len(requests[order[0]].ids) - 1), sequence_length)
        numbers = order[: max(1, tokens_per_batch // length)]
        order = order[len(numbers) :]
        inputs = torch.zeros(len(numbers), length, dtype=torch.long)
        targets = torch.full((len(numbers), length), IGNORE_INDEX)
        for row, number in enumerate(numbers):
            ids, scored = torch.tensor(requests[number].ids), requests[number].scored
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(ids) - 1 - scored : len(ids) - 1] = ids[-scored:]
        yield numbers, inputs.to(device), targets.to(device)
