"""Mean loss of each source, where one sequence's loss is not finite."""

from __future__ import annotations

import math

import pytest
import torch

from neox_core.config import BatchGeometry
from neox_core.data.mixture import Mixture
from neox_core.train.observe.source_losses import SourceLosses

GEOMETRY = BatchGeometry(
    world_size=1, data_parallel=1, micro_batch_size=4, accumulation_steps=1, sequences=4, tokens=12
)
MIXTURE = Mixture({"a": 0.5, "b": 0.5})


def taken(applied: bool) -> list[float]:
    """Sums of losses and numbers of tokens of a step with a NaN in source a, and of a good one after it."""
    losses = SourceLosses(MIXTURE, GEOMETRY, 0, torch.device("cpu"))
    sources, _ = MIXTURE.locate(torch.arange(8).numpy())
    for first, good in ((0, False), (4, True)):
        losses.begin(first)
        tokens = torch.ones(4, 3)
        if not good:
            tokens[int((sources[:4] == 0).argmax()), 1] = math.nan
        losses.add(tokens, torch.zeros(4, 3, dtype=torch.long))
        losses.end(torch.tensor(good or applied))
    return losses.take().tolist()


def test_what_is_not_finite_stays_with_its_source() -> None:
    sums = taken(applied=True)
    assert math.isnan(sums[0])
    assert sums[1:] == [12.0, 12.0, 12.0]


def test_a_step_that_was_not_done_does_not_count() -> None:
    assert taken(applied=False) == pytest.approx([6.0, 6.0, 6.0, 6.0])
