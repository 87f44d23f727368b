"""Training sequences and validation windows cut from token files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from neox_core.config import RunConfig, load_config
from neox_core.data.dataset import (
    MixtureDataset,
    SequenceDataset,
    open_training_data,
    open_validation_data,
    validation_positions,
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


def read(dataset: SequenceDataset, indices: Iterable[int]) -> np.ndarray:
    return np.stack([dataset[int(index)] for index in indices])


@pytest.mark.parametrize("count", [9, 15, 16, 17, 1000])
def test_every_id_is_a_target_once_per_pass(tmp_path: Path, count: int) -> None:
    """Windows of 8 over 8 passes are `count` windows, and count x 8 targets, whatever the remainder of a pass."""
    length = 8
    dataset = SequenceDataset(write_tokens(tmp_path / "d", count), length, key="k")
    sequences = read(dataset, range(count))
    assert sequences.dtype == np.int64
    assert np.bincount(sequences[:, 1:].ravel(), minlength=count).tolist() == [length] * count
    # each is consecutive, around the end too
    assert np.array_equal(sequences, (sequences[:, :1] + np.arange(length + 1)) % count)
    # the passes come one after the other: after n windows no id was seen more than once more often than another
    for windows in range(1, count):
        seen = np.bincount(sequences[:windows, 1:].ravel(), minlength=count)
        assert seen.max() - seen.min() <= 2


@pytest.mark.parametrize("count", [64, 65, 71, 72])
def test_first_pass_repeats_nothing_but_at_the_seam(tmp_path: Path, count: int) -> None:
    dataset = SequenceDataset(write_tokens(tmp_path / "d", count), 8, key="k")
    windows = -(-count // 8)
    starts = np.sort(read(dataset, range(windows))[:, 0])
    assert starts.tolist() == list(range(0, count, 8))
    # the second pass goes on where the last window of the first ends
    following = -(-2 * count // 8)
    starts = np.sort(read(dataset, range(windows, following))[:, 0])
    assert starts.tolist() == list(range(windows * 8 - count, count, 8))


def test_epochs_and_keys_have_orders_of_their_own(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "d", 1000)
    dataset, other = SequenceDataset(prefix, 8, key="k"), SequenceDataset(prefix, 8, key="l")
    orders = [read(dataset, range(e * 125, (e + 1) * 125))[:, 0] for e in range(3)]
    orders.append(read(other, range(125))[:, 0])
    orders.append(np.sort(orders[0]))
    assert len({tuple(order) for order in orders}) == 5


def test_positions_restart_where_documents_begin(tmp_path: Path) -> None:
    """Against a loop over the ids, whose documents begin at 0, 7, 138, 269, ... and at the seam."""
    count, length = 300, 40
    dataset = SequenceDataset(write_tokens(tmp_path / "d", count), length, key="k")
    begins = {0, 7, 138, 269}
    seams = 0
    for index in range(60):
        inputs = dataset[index][:-1].tolist()
        expected: list[int] = []
        for token in inputs:
            expected.append(0 if token in begins or not expected else expected[-1] + 1)
        assert dataset.positions(index).tolist() == expected
        seams += 0 in inputs[1:]
    assert seams > 2


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
    code = sequences[sequences[:, 0] // 10_000 == 1][:49, 0]
    assert len(set(code.tolist())) == 49
    consumed = data.consumed(700)
    assert consumed["code"] == {"sequences": counts[1], "tokens": counts[1] * 16, "epochs": counts[1] * 16 / 777}
    assert data.positions(np.arange(5)).shape == (5, 16)
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
    positions = validation_positions(tmp_path, "a", 8)
    assert positions.shape == (len(windows), 8)
    for row, ids in zip(positions.tolist(), windows[:, :-1].tolist(), strict=True):
        begins = [
            place for place, token in enumerate(ids) if place == 0 or token in (7, 138, 269, 400, 531, 662, 793, 924)
        ]
        assert row == [place - max(begin for begin in begins if begin <= place) for place in range(8)]
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
