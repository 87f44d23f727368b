"""Training as torch alone does it: what ours is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neox_core.checkpoint.conversion.reference import open_reference, whole_llama
from tests.neox_core.train.small_training import SEQUENCE

Documents = Sequence[list[int]] | None
"""Lengths of each sequence's documents, which see themselves alone; None: a sequence is one."""


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


def train(base: Path, rate: float, batches: Iterable[tuple[torch.Tensor, Documents]]) -> list[tuple[float, float]]:
    """Losses and gradient norms of transformers' own model, with nothing of ours but the weights' file."""
    model = whole_llama(open_reference(base, SEQUENCE, torch.float32))
    optimizer = adamw([p.requires_grad_() for p in model.parameters()], rate)
    return [step(model, optimizer, batch, documents) for batch, documents in batches]


def step(
    model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor, documents: Documents = None
) -> tuple[float, float]:
    """Loss and gradient norm of a step of a transformers model on sequences [B, T + 1]."""
    output = packed_logits(model, batch[:, :-1], documents)
    loss = torch.nn.functional.cross_entropy(output.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach()), norm


def packed_logits(model: Any, ids: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Logits [B, T, V] of sequences [B, T]; of documents that are packed into them, each by itself."""
    if documents is None:
        return model(ids).logits
    rows = (row.split(lengths) for row, lengths in zip(ids, documents, strict=True))
    return torch.stack([torch.cat([model(document[None]).logits[0] for document in row]) for row in rows])
