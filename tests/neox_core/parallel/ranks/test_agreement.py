"""Checksums of weights."""

from __future__ import annotations

import pytest
import torch

from neox_core.parallel.ranks import agreement
from neox_core.parallel.ranks.agreement import checksum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_change_changes_the_checksum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_PIECE", 100)
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    same = checksum([weights])
    assert torch.equal(checksum([weights.clone()]), same)
    assert torch.equal(checksum([weights[:123], weights[123:]]), same)
    bits = weights.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
    changed = [weights.roll(1), weights.flip(0), -weights, torch.cat([weights[-1:], weights[1:-1], weights[:1]])]
    for element in (0, 99, 100, 999):  # the last bit of one element
        other = bits.clone()
        other[element] ^= 1
        changed.append(other.view(dtype))
    assert all(not torch.equal(checksum([other]), same) for other in changed)
