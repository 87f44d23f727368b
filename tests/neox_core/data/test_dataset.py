"""Training sequences and validation windows cut from token files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neox_core.config import RunConfig, load_config
from neox_core.data.dataset import (
    MixtureDataset,
    SequenceDataset,
    open_training_data,
    open_validation_data,
    validation_windows,
)
from neox_core.data.indexed import IndexedWriter
from neox_core.data.mixture import Mixture
from neox_core.errors import DataError

TOKENS_PER_SOURCE = {"arxiv": 1000, "code": 777, "open-web-math": 2049}


def write_tokens(prefix: Path, count: int, first: int = 0) -> Path:
    """A dataset whose ids count up from `first`, in documents of uneven length."""
    ids = np.arange(first, first + count)
    with IndexedWriter(prefix, np.dtype("i4")) as writer:
        for document in np.split(ids, range(7, count, 131)):
            writer.add_document(document)
    return prefix


def toy(weights: dict[str, float], eval_sources: tuple[str, ...] = (), sequence_length: int = 16) -> RunConfig:
    config = load_config("configs/toy.yml")
    content = {"input": config.data.input, "sources": {name: {"weight": w} for name, w in weights.items()}}
    data = type(config.data).model_validate(content | {"eval_sources": eval_sources})
    train = config.train.model_copy(update={"sequence_length": sequence_length})
    return config.model_copy(update={"data": data, "train": train})


@pytest.mark.parametrize("count", [9, 16, 17, 1000])
def test_an_epoch_is_every_window_once(tmp_path: Path, count: int) -> None:
    length = 8
    dataset = SequenceDataset(write_tokens(tmp_path / "d", count), length, key="k")
    assert dataset.num_sequences == (count - 1) // length
    for epoch in range(3):
        indices = np.arange(epoch * dataset.num_sequences, (epoch + 1) * dataset.num_sequences)
        sequences = dataset.sequences(indices)
        assert sequences.dtype == np.int64
        starts = np.sort(sequences[:, 0])
        assert starts.tolist() == [length * window for window in range(dataset.num_sequences)]
        assert np.array_equal(sequences - sequences[:, :1], np.tile(np.arange(length + 1), (len(indices), 1)))


def test_epochs_and_keys_have_orders_of_their_own(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "d", 1000)
    dataset, other = SequenceDataset(prefix, 8, key="k"), SequenceDataset(prefix, 8, key="l")
    n = dataset.num_sequences
    orders = [dataset.sequences(np.arange(e * n, (e + 1) * n))[:, 0] for e in range(3)]
    orders.append(other.sequences(np.arange(n))[:, 0])
    orders.append(np.sort(orders[0]))
    assert len({tuple(order) for order in orders}) == 5


def test_one_at_a_time_and_many_across_epochs_agree(tmp_path: Path) -> None:
    dataset = SequenceDataset(write_tokens(tmp_path / "d", 100), 8, key="k")
    indices = np.array([0, 40, 3, 11, 12, 13, 100, 0])
    assert np.array_equal(dataset.sequences(indices), np.stack([dataset[int(i)] for i in indices]))


def test_source_shorter_than_a_sequence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d\.bin holds 8 tokens, fewer than one sequence of 8 \+ 1"):
        SequenceDataset(write_tokens(tmp_path / "d", 8), 8, key="k")


def write_sources(folder: Path, split: str) -> None:
    for number, (name, count) in enumerate(TOKENS_PER_SOURCE.items()):
        write_tokens(folder / name / split, count, first=10_000 * number)


def test_training_data_follows_the_mixture(tmp_path: Path) -> None:
    write_sources(tmp_path, "train")
    weights = {"arxiv": 2.0, "code": 1.0, "open-web-math": 4.0}
    data = open_training_data(tmp_path, toy(weights))
    sequences = data.sequences(np.arange(700))
    assert sequences.shape == (700, 17)
    counts = np.bincount(sequences[:, 0] // 10_000).tolist()
    assert counts == [data.mixture.consumed(700)[name] for name in TOKENS_PER_SOURCE]
    assert np.abs(np.array(counts) - [200, 100, 400]).max() <= 1
    # the first epoch of each source repeats nothing
    code = sequences[sequences[:, 0] // 10_000 == 1][:48, 0]
    assert len(set(code.tolist())) == 48
    assert data.sequences(np.array([], dtype=np.int64)).shape == (0, 17)


def test_seed_changes_the_order_and_nothing_else_does(tmp_path: Path) -> None:
    write_sources(tmp_path, "train")
    config = toy({"arxiv": 1, "code": 1})
    indices = np.arange(50)
    first = open_training_data(tmp_path, config).sequences(indices)
    assert np.array_equal(first, open_training_data(tmp_path, config).sequences(indices))
    other = open_training_data(tmp_path, config.model_copy(update={"seed": 1})).sequences(indices)
    assert not np.array_equal(first, other)


def test_source_of_weight_zero_needs_no_data(tmp_path: Path) -> None:
    write_sources(tmp_path, "train")
    data = open_training_data(tmp_path, toy({"arxiv": 1, "absent": 0}))
    assert set((data.sequences(np.arange(100))[:, 0] // 10_000).tolist()) == {0}
    with pytest.raises(DataError, match=r"absent/train\.bin does not exist: run prepare-data"):
        open_training_data(tmp_path, toy({"arxiv": 1, "absent": 1}))
    with pytest.raises(DataError, match="draws from absent"):
        MixtureDataset(Mixture({"absent": 1}), {})


def test_validation_data_uses_the_sources_for_evaluation(tmp_path: Path) -> None:
    write_sources(tmp_path, "validation")
    weights = {"arxiv": 1.0, "open-web-math": 3.0, "code": 9.0}
    data = open_validation_data(tmp_path, toy(weights, ("arxiv", "open-web-math")))
    assert data.mixture.consumed(400) == {"arxiv": 100, "open-web-math": 300}
    zero = {"arxiv": 0.0, "open-web-math": 0.0, "code": 9.0}
    data = open_validation_data(tmp_path, toy(zero, ("arxiv", "open-web-math")))
    assert data.mixture.consumed(400) == {"arxiv": 200, "open-web-math": 200}
    assert set((data.sequences(np.arange(100))[:, 0] // 10_000).tolist()) == {0, 2}


@pytest.mark.parametrize("count", [2, 8, 9, 10, 16, 17, 1000])
def test_validation_predicts_every_token_but_the_first_once(tmp_path: Path, count: int) -> None:
    write_tokens(tmp_path / "a" / "validation", count)
    windows = validation_windows(tmp_path, "a", 8)
    assert windows.dtype == np.int64
    targets = windows[:, 1:][windows[:, 1:] >= 0]
    assert targets.tolist() == list(range(1, count))
    inputs = windows[:, :-1][windows[:, 1:] >= 0]
    assert inputs.tolist() == list(range(count - 1))
    assert (windows[:, 1:] == -1).sum() == -(-(count - 1) // 8) * 8 - (count - 1)
    assert np.array_equal(validation_windows(tmp_path, "a", 8, limit=1), windows[:1])
    assert np.array_equal(validation_windows(tmp_path, "a", 8, limit=10**6), windows)


def test_validation_of_one_token(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a" / "validation", 1)
    with pytest.raises(DataError, match="nothing to predict"):
        validation_windows(tmp_path, "a", 8)
