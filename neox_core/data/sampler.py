"""Which sequences a data-parallel rank computes, and when."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from neox_core.config import BatchGeometry
from neox_core.data.dataset import MixtureDataset
from neox_core.data.indexed import Tokens
from neox_core.data.mixture import Indices


def micro_batches(
    dataset: MixtureDataset, geometry: BatchGeometry, data_parallel_rank: int, sequences_consumed: int = 0
) -> Iterator[Tokens]:
    """Micro batches of one data-parallel rank, int64 [micro_batch, S + 1], without end.

    A global batch takes the next `geometry.sequences` sequences of the mixture's order, whatever the number of ranks,
    so the only state is `sequences_consumed`: the sequences that all ranks together have taken before.
    """
    return map(dataset.sequences, micro_batch_indices(geometry, data_parallel_rank, sequences_consumed))


def micro_batch_positions(
    dataset: MixtureDataset, geometry: BatchGeometry, data_parallel_rank: int, sequences_consumed: int = 0
) -> Iterator[Tokens]:
    """The token positions within documents that belong to `micro_batches`, int64 [micro_batch, S]."""
    return map(dataset.positions, micro_batch_indices(geometry, data_parallel_rank, sequences_consumed))


def micro_batch_indices(geometry: BatchGeometry, data_parallel_rank: int, sequences_consumed: int) -> Iterator[Indices]:
    """Global indices of each micro batch's sequences, [micro_batch], without end; see `micro_batches`."""
    assert 0 <= data_parallel_rank < geometry.data_parallel, "data-parallel rank out of range"
    micro, ranks = geometry.micro_batch_size, geometry.data_parallel
    first = sequences_consumed + data_parallel_rank * micro + np.arange(micro, dtype=np.int64)
    while True:
        for accumulation_step in range(geometry.micro_batches_of(data_parallel_rank)):
            yield first + accumulation_step * ranks * micro
        first = first + geometry.sequences
