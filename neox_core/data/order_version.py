"""Versions of the order of training sequences: a training ends in the order that it began in."""

from __future__ import annotations

from typing import NamedTuple

from neox_core.config import RunConfig


class OrderVersion(NamedTuple):
    """What an order is made with."""

    lanes: int
    """Places of the file that the documents of a block come from."""
    run: int
    """Neighbours of the file that stay in one block, at most; lanes x run documents' sizes are read for a sequence."""
    exact_amounts: bool
    """Sources whose amount is in tokens or epochs get it to a sequence, not to a part of the mixture's period."""


DATA_ORDER = 3
"""The newest version: part of a training's identity, as no training may change its order on the way.

1 (no longer made): windows of the file as it lies. 2: windows of documents that are permuted in each epoch. 3: of
documents from four times as many places, so that a window's topics vary as after a full shuffle (at most 1.15 times
their variance on documents of 700 tokens; 2: 1.4 times); amounts are exact. Reading a sequence of order 3 takes 1.3 to
1.5 times as long; more lanes take longer still (benchmarks/sampler.py measures both).
"""

ORDER_VERSIONS = {2: OrderVersion(4, 64, exact_amounts=False), 3: OrderVersion(16, 16, exact_amounts=True)}


def data_order(config: RunConfig) -> int:
    """The version of a run's order."""
    return config.data.order or DATA_ORDER
