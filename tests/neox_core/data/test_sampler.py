"""The order of training data: one for all numbers of ranks, and the same after any resume."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from neox_core.config import BatchGeometry
from neox_core.data.dataset import MixtureDataset, SequenceDataset
from neox_core.data.indexed import IndexedWriter
from neox_core.data.mixture import Mixture
from neox_core.data.sampler import micro_batches

GLOBAL, STEPS = 16, 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> MixtureDataset:
    folder = tmp_path_factory.mktemp("tokens")
    sources = {}
    for number, name in enumerate(("a", "b", "c")):
        with IndexedWriter(folder / name, np.dtype("i4")) as writer:
            for document in np.split(np.arange(200) + 1000 * number, range(9, 200, 17)):
                writer.add_document(document)
        sources[name] = SequenceDataset(folder / name, 4, key=name)
    return MixtureDataset(Mixture({"a": 5, "b": 2, "c": 1}), sources)


def geometry(data_parallel: int, micro: int) -> BatchGeometry:
    accumulation = GLOBAL // (data_parallel * micro)
    return BatchGeometry(data_parallel, data_parallel, micro, accumulation, GLOBAL, GLOBAL * 4)


def global_batches(dataset: MixtureDataset, cut: BatchGeometry, steps: int, consumed: int) -> list[np.ndarray]:
    """The batches of all ranks together, each [GLOBAL, S + 1]: by accumulation step, then rank, then row."""
    ranks = [micro_batches(dataset, cut, rank, consumed) for rank in range(cut.data_parallel)]
    passes = (np.concatenate([next(rank) for rank in ranks]) for _ in range(steps * cut.accumulation_steps))
    return [np.concatenate(list(islice(passes, cut.accumulation_steps))) for _ in range(steps)]


@pytest.mark.parametrize(("data_parallel", "micro"), [(1, 1), (1, 4), (2, 2), (2, 8), (4, 1), (4, 4)])
def test_global_order_is_the_mixtures_own(dataset: MixtureDataset, data_parallel: int, micro: int) -> None:
    for consumed in (0, 5, 160):
        batches = global_batches(dataset, geometry(data_parallel, micro), STEPS, consumed)
        expected = dataset.sequences(np.arange(consumed, consumed + STEPS * GLOBAL))
        assert np.array_equal(np.concatenate(batches), expected)


def test_micro_batch_of_one_rank(dataset: MixtureDataset) -> None:
    """Against the formula: consumed + step x global + (accumulation x ranks + rank) x micro + row."""
    batches = list(islice(micro_batches(dataset, geometry(2, 4), 1, sequences_consumed=32), 4))
    indices = [32 + t * 16 + (m * 2 + 1) * 4 + np.arange(4) for t in range(2) for m in range(2)]
    assert batches[0].shape == (4, 5)
    for batch, index in zip(batches, indices, strict=True):
        assert np.array_equal(batch, dataset.sequences(index))


def test_ranks_with_fewer_micro_batches(dataset: MixtureDataset) -> None:
    """Five micro batches of three on two ranks, as those of 15 sequences: dealt in turn; no sequence is left out."""
    cut = BatchGeometry(2, 2, 3, 3, 15, 60)
    first, second = (micro_batches(dataset, cut, rank, 4) for rank in range(2))
    for step in range(STEPS):
        dealt = [next(rank) for rank in (first, second, first, second, first)]
        begin = 4 + 15 * step
        assert np.array_equal(np.concatenate(dealt), dataset.sequences(np.arange(begin, begin + 15)))


@pytest.mark.parametrize("resumed_with", [(1, 2), (2, 2), (4, 1)])
def test_resume_at_any_step_on_any_number_of_ranks(dataset: MixtureDataset, resumed_with: tuple[int, int]) -> None:
    whole = global_batches(dataset, geometry(2, 4), STEPS, 0)
    for step in range(STEPS):
        rest = global_batches(dataset, geometry(*resumed_with), STEPS - step, step * GLOBAL)
        assert np.array_equal(np.concatenate(rest), np.concatenate(whole[step:]))


def test_nothing_repeats_within_an_epoch(dataset: MixtureDataset) -> None:
    batches = global_batches(dataset, geometry(4, 2), 4, 0)
    firsts = np.concatenate(batches)[:, 0]
    from_a = firsts[firsts < 1000]
    assert len(from_a) == 40
    assert len(set(from_a.tolist())) == 40
