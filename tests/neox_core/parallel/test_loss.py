"""Vocabulary-parallel cross-entropy against torch's in float64, on 1, 2 and 4 ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from neox_core.parallel.loss import IGNORED, token_losses
from tests.distributed import run_ranks

VOCABULARY = 24
SIZES = (1, 2, 4)
"""Ranks that share the vocabulary."""


@dataclass(frozen=True)
class Case:
    logits: Tensor
    targets: Tensor
    upstream: Tensor
    """Gradient of the losses."""


def cases() -> dict[str, Case]:
    """Logits [3,5,24] of several kinds, with targets in every rank's part."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(3, 5, VOCABULARY, generator=generator)
    targets = torch.randperm(VOCABULARY, generator=generator)[:15].view(3, 5)
    upstream = torch.randn(3, 5, generator=generator)
    ignoring = targets.clone()
    ignoring[0, 1] = ignoring[2] = IGNORED
    extreme = torch.where(torch.rand(logits.shape, generator=generator) < 0.5, 1e4, -1e4) + logits
    lonely = torch.full_like(logits, -1e4)  # one logit is far above all others, in each rank's part once
    lonely[..., ::7] = 1e4
    return {
        "fp32": Case(logits, targets, upstream),
        "bf16": Case(logits.bfloat16(), targets, upstream),
        "ignored": Case(logits, ignoring, upstream),
        "extreme": Case(extreme, targets, upstream),
        "lonely": Case(lonely, targets, upstream),
        "all ignored": Case(logits, torch.full_like(targets, IGNORED), upstream),
    }


def compute_all() -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """One rank's losses and its part of the logits' gradients, for every case and size of the group."""
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    results = {}
    for size in SIZES:
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, dist.get_world_size(), size)]
        which, rank = divmod(dist.get_rank(), size)
        for name, case in cases().items():
            logits = case.logits.chunk(size, dim=-1)[rank].clone().requires_grad_()
            losses = token_losses(logits, case.targets, groups[which], rank)
            losses.backward(case.upstream)
            assert logits.grad is not None
            results[name, size] = losses.detach(), logits.grad
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, int], tuple[Tensor, Tensor]]]:
    return run_ranks(compute_all, max(SIZES))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", cases())
def test_values_and_gradients(ranks: list[Any], name: str, size: int) -> None:
    case = cases()[name]
    exact = case.logits.double().requires_grad_()
    expected = F.cross_entropy(
        exact.flatten(0, 1), case.targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(case.targets)
    expected.backward(case.upstream.double())
    results = [rank[name, size] for rank in ranks]
    for losses, _ in results:
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=2e-6)
        assert bool((losses[case.targets == IGNORED] == 0).all())
    gradient = torch.cat([gradient for _, gradient in results[:size]], dim=-1)
    assert gradient.dtype == case.logits.dtype
    rounding = 2**-8 if name == "bf16" else 1e-6
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=rounding, atol=1e-6)
