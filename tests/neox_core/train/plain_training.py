"""Training as torch alone does it: what ours is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def adamw(parameters: Sequence[nn.Parameter], rate: float) -> torch.optim.AdamW:
    """torch's AdamW with the tests' settings: weight decay of matrices alone."""
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
        lr=rate,
    )


def step(
    model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor, documents: Sequence[list[int]] | None = None
) -> tuple[float, float]:
    """Loss and gradient norm of a step of a transformers model on sequences [B, T + 1].

    Args:
        documents: lengths of each sequence's documents, which see themselves alone; None: a sequence is one.
    """
    inputs = batch[:, :-1]
    if documents is None:
        output = model(inputs).logits
    else:
        output = torch.stack([alone(model, row, lengths) for row, lengths in zip(inputs, documents, strict=True)])
    loss = torch.nn.functional.cross_entropy(output.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach()), norm


def alone(model: Any, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Logits [T, V] of documents that are not packed, put one after the other."""
    return torch.cat([model(document[None]).logits[0] for document in ids.split(lengths)])
