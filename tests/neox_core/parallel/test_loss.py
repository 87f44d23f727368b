"""Vocabulary-parallel cross-entropy against torch's in float64, on 1, 2 and 4 ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from neox_core.parallel.loss import IGNORE_INDEX, ChunkedLoss, token_losses
from neox_core.parallel.weight_gradients import AccumulatingLinear, Accumulator
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
    ignoring[0, 1] = ignoring[2] = IGNORE_INDEX
    extreme = torch.where(torch.rand(logits.shape, generator=generator) < 0.5, 1e4, -1e4) + logits
    lonely = torch.full_like(logits, -1e4)  # one logit is far above all others, in each rank's part once
    lonely[..., ::7] = 1e4
    return {
        "fp32": Case(logits, targets, upstream),
        "bf16": Case(logits.bfloat16(), targets, upstream),
        "ignored": Case(logits, ignoring, upstream),
        "extreme": Case(extreme, targets, upstream),
        "lonely": Case(lonely, targets, upstream),
        "all ignored": Case(logits, torch.full_like(targets, IGNORE_INDEX), upstream),
    }


Results = dict[tuple[str, int, float], tuple[Tensor, Tensor]]
Z_LOSSES = (0.0, 0.03)


def compute_all() -> Results:
    """One rank's losses and its part of the logits' gradients, for every case, size of the group and z-loss."""
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    results: Results = {}
    for size in SIZES:
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, dist.get_world_size(), size)]
        which, rank = divmod(dist.get_rank(), size)
        for (name, case), z_loss in itertools.product(cases().items(), Z_LOSSES):
            logits = case.logits.chunk(size, dim=-1)[rank].clone().requires_grad_()
            losses = token_losses(logits, case.targets, groups[which], rank, z_loss)
            losses.backward(case.upstream)
            assert logits.grad is not None
            results[name, size, z_loss] = losses.detach(), logits.grad
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def ranks() -> list[Results]:
    return run_ranks(compute_all, max(SIZES))


@pytest.mark.parametrize("z_loss", Z_LOSSES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", cases())
def test_values_and_gradients(ranks: list[Any], name: str, size: int, z_loss: float) -> None:
    """The value is the cross-entropy; the gradient is that of the cross-entropy and z_loss (log Z)^2."""
    case = cases()[name]
    exact = case.logits.double().requires_grad_()
    expected = F.cross_entropy(
        exact.flatten(0, 1), case.targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view_as(case.targets)
    squares = exact.logsumexp(-1).square() * (case.targets != IGNORE_INDEX)
    (expected + z_loss * squares).backward(case.upstream.double())
    results = [rank[name, size, z_loss] for rank in ranks]
    for losses, _ in results:
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=2e-6)
        assert bool((losses[case.targets == IGNORE_INDEX] == 0).all())
    gradient = torch.cat([gradient for _, gradient in results[:size]], dim=-1)
    assert gradient.dtype == case.logits.dtype
    rounding = 2**-8 if name == "bf16" else 1e-6
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=rounding, atol=1e-6)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("early", [False, True], ids=["recomputed", "early gradient"])
def test_chunked_loss(alone: dist.ProcessGroup, early: bool) -> None:
    """Sum over the positions that count, its gradient of the hidden states, and that of the head's weight."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, VOCABULARY, bias=False), torch.randn(2, 15, 8, requires_grad=True)
    targets = torch.randint(VOCABULARY, (2, 15))
    targets[0, 3:9] = IGNORE_INDEX
    exact = [x.detach().double().requires_grad_() for x in (head.weight, hidden)]
    logits = (exact[1] @ exact[0].t()).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum") / 30
    (expected / 4).backward()

    weight_gradient = torch.zeros(VOCABULARY, 8)
    project = AccumulatingLinear.of(head)
    project.accumulator = Accumulator(weight_gradient, lambda: None)
    loss = ChunkedLoss(7, alone, 0)
    loss.project = project
    loss.early_gradient = 1 / 4 if early else None
    value = loss(hidden, targets)
    value.div(4).backward()

    assert float(loss.take_counted_share()) == 24 / 30
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weight_gradient.double(), exact[0].grad, rtol=1e-5, atol=1e-6)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact[1].grad, rtol=1e-5, atol=1e-6)


def test_early_gradient_refuses_another_one(alone: dist.ProcessGroup) -> None:
    loss = ChunkedLoss(7, alone, 0)
    loss.project, loss.early_gradient = lambda x: x, 0.5
    value = loss(torch.zeros(1, 3, VOCABULARY, requires_grad=True), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(RuntimeError, match="another gradient than early_gradient"):
        value.backward()
