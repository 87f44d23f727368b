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
from neox_core.data.indexed import IndexedDataset, IndexedWriter
from neox_core.data.mixture import Mixture
from neox_core.data.order_version import DATA_ORDER, ORDER_VERSIONS
from neox_core.errors import DataError
from tests.neox_core.data.slow_order import documents_of_epoch, texts, write

LANES, RUN, _ = ORDER_VERSIONS[DATA_ORDER]
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


def stream_of(dataset: IndexedDataset, epochs: int) -> list[tuple[int, int, int]]:
    """Epoch, document and place in the file of each token, by plain loops; the key is "k"."""
    documents = texts(dataset)
    return [
        (epoch, document, place)
        for epoch in range(epochs)
        for document in documents_of_epoch(len(documents), "k", epoch, LANES, RUN)
        for place in documents[document]
    ]


def check_windows(dataset: IndexedDataset, length: int, epochs: int) -> None:
    """Sequences, positions and documents of some passes, against the windows of the whole stream."""
    stream, tokens = stream_of(dataset, epochs + 2), len(dataset.tokens)
    read_there = SequenceDataset(dataset, length, key="k")
    index = 0
    for epoch in range(epochs):
        first, end = -(-epoch * tokens // length), -(-(epoch + 1) * tokens // length)
        windows = {
            tuple(place for *_, place in stream[n * length : (n + 1) * length + 1]): n for n in range(first, end)
        }
        seen = []
        for index in range(first, end):
            places = read_there.places(index)
            assert (places.dtype, places.shape) == (np.int64, (length + 1,))
            window = windows[tuple(places.tolist())]
            seen.append(window)
            part = stream[window * length : (window + 1) * length + 1]
            ids = read_there[index]
            assert (ids.dtype, ids.tolist()) == (np.int64, dataset.tokens[places].tolist())
            pieces = [(epoch, document) for epoch, document, _ in part]
            assert read_there.documents(index) == [document for _, document in dict.fromkeys(pieces)]
            expected: list[int] = []
            for number, piece in enumerate(pieces[:-1]):
                expected.append(expected[-1] + 1 if number and piece == pieces[number - 1] else 0)
            assert read_there.positions(index).tolist() == expected
        assert sorted(seen) == list(range(first, end))
        assert end - first < 8 or seen != sorted(seen)
    assert index + 1 == -(-epochs * tokens // length)


@pytest.mark.parametrize("count", [64, 65, 71, 72, 1000])
def test_windows_are_those_of_the_stream(tmp_path: Path, count: int) -> None:
    """They continue across the end of a pass into the next one's documents."""
    check_windows(IndexedDataset(write_tokens(tmp_path / "d", count)), 8, 9)


def test_windows_of_documents_of_any_size(tmp_path: Path) -> None:
    """Empty ones, of one token, of many windows; more than one block of them."""
    generator = np.random.default_rng(3)
    sizes = generator.choice([0, 1, 2, 30], 3 * LANES * RUN, p=[0.3, 0.3, 0.3, 0.1])
    sizes[700] = 3000
    check_windows(write(tmp_path / "d", sizes.tolist()), 64, 2)
    check_windows(write(tmp_path / "e", [1] * 3 * LANES * RUN), 2 * LANES * RUN + 9, 3)


def test_windows_of_documents_of_several_sequences(tmp_path: Path) -> None:
    check_windows(write(tmp_path / "d", [5, 1, 0, 7, 3, 4, 2, 2, 9, 0, 6], [0, 2, 2, 3, 6, 7, 7, 8, 11]), 4, 6)


@pytest.mark.parametrize("count", [9, 15, 16, 17, 1000])
def test_every_id_is_a_target_once_per_pass(tmp_path: Path, count: int) -> None:
    """Windows of 8 over 8 passes are `count` windows, and count x 8 targets, whatever the remainder of a pass.

    The first id of all has nothing before it; the last target is the first id of the pass after.
    """
    length = 8
    dataset = SequenceDataset(write_tokens(tmp_path / "d", count), length, key="k")
    sequences = read(dataset, range(count))
    stream = stream_of(IndexedDataset(tmp_path / "d"), 9)
    (*_, first), (*_, last) = stream[0], stream[8 * count]
    expected = np.full(count, 8)
    np.add.at(expected, [first, last], [-1, 1])
    assert np.bincount(sequences[:, 1:].ravel(), minlength=count).tolist() == expected.tolist()
    # the passes come one after the other: after n windows no id was seen more than once more often than another,
    # but for those of the window that reaches into the next pass
    for windows in range(1, count):
        seen = np.bincount([first, *sequences[:windows, 1:].ravel()], minlength=count)
        assert seen.max() - seen.min() <= 2


def test_epochs_and_keys_have_orders_of_their_own(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "d", 1000)
    dataset, other = SequenceDataset(prefix, 8, key="k"), SequenceDataset(prefix, 8, key="l")
    orders = [read(dataset, range(e * 125, (e + 1) * 125))[:, 0] for e in range(3)]
    orders.append(read(other, range(125))[:, 0])
    orders.append(np.sort(orders[0]))
    assert len({tuple(order) for order in orders}) == 5


def test_nothing_depends_on_what_was_read_before(tmp_path: Path) -> None:
    """And `places` says where each id of a mixture's sequence lies."""
    write_sources(tmp_path, "train")
    data = open_training_data(tmp_path, toy({"arxiv": 1, "code": 1}))
    indices = np.random.default_rng(0).permutation(400)
    rows = data.sequences(indices)
    for index, row in zip(indices.tolist(), rows, strict=True):
        again = open_training_data(tmp_path, toy({"arxiv": 1, "code": 1})) if index % 50 == 0 else data
        assert np.array_equal(again.sequences(np.array([index]))[0], row)
        name, places = data.places(index)
        assert np.array_equal(places + 10_000 * list(TOKENS_PER_SOURCE).index(name), row)


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


def test_the_configuration_chooses_the_version_of_the_order(tmp_path: Path) -> None:
    """So that a training that began in an older one ends in it; without a choice it is the newest."""
    (tmp_path / "arxiv").mkdir()
    write(tmp_path / "arxiv" / "train", [5] * 2000)
    config = toy({"arxiv": 1})
    windows = {}
    for order in (None, *ORDER_VERSIONS):
        chosen = config.model_copy(update={"data": config.data.model_copy(update={"order": order})})
        windows[order] = open_training_data(tmp_path, chosen).sequences(np.arange(20)).tolist()
    assert windows[None] == windows[DATA_ORDER] != windows[2]
    key = f"{config.seed}/arxiv/train"
    older = SequenceDataset(tmp_path / "arxiv" / "train", 16, key, order=2)
    assert windows[2] == read(older, range(20)).tolist()
