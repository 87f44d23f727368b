"""The order of documents in an epoch, against plain loops over all of them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from neox_core.data.document_order import DocumentOrder, Spans, _Epoch
from neox_core.data.indexed import IndexedDataset
from neox_core.data.order_version import DATA_ORDER, ORDER_VERSIONS
from neox_core.errors import DataError
from tests.neox_core.data.slow_order import documents_of_epoch, texts, write

LANES, RUN, _ = ORDER_VERSIONS[DATA_ORDER]
OLDER = ORDER_VERSIONS[2][:2]
GENERATOR = np.random.default_rng(5)
SIZES = {
    "one": [30],
    "fewer than lanes": [5, 1, 9],
    "uneven": GENERATOR.integers(0, 20, 90).tolist(),
    "tiny": [1] * 100,
    "empty ones": [0, 0, 0, *([0] * 60), 7, 0, 0, 3, *([0] * 60), 5, 0],
    "one long": [3] * 20 + [400] + [2] * 37,
    "growing": [2**n for n in range(9)],
}
# documents of several sequences, of one, and of none, also at the end
SENTENCES = ([5, 1, 0, 7, 3, 4, 2, 2, 9, 0, 1, 6], [0, 2, 2, 3, 6, 7, 7, 7, 8, 11, 12, 12])


def check(dataset: IndexedDataset, lanes: int, run: int, epoch: int) -> None:
    """Every range of an epoch's tokens."""
    documents, tokens = texts(dataset), len(dataset.tokens)
    order = documents_of_epoch(len(documents), "k", epoch, lanes, run)
    assert sorted(order) == list(range(len(documents)))
    stream = [(document, place) for document in order for place in documents[document]]
    assert len(stream) == tokens
    read = DocumentOrder(dataset, "k", lanes, run)
    for start in range(0, tokens, max(1, tokens // 60)):
        for stop in {start + 1, start + 2, start + 9, start + 130, tokens}:
            if stop <= tokens:
                assert tokens_of(read.spans(epoch, start, stop)) == stream[start:stop]


def tokens_of(spans: Spans) -> list[tuple[int, int]]:
    assert all((spans.lengths > 0).tolist())
    return [
        (document, place + number)
        for document, place, length in zip(*(column.tolist() for column in spans), strict=True)
        for number in range(length)
    ]


@pytest.mark.parametrize(("lanes", "run"), [(1, 1), (1, 7), (2, 3), (3, 4), (5, 1), OLDER, (LANES, RUN)])
@pytest.mark.parametrize("name", SIZES)
def test_spans(name: str, lanes: int, run: int, tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", SIZES[name])
    for epoch in (0, 1, 7):
        check(dataset, lanes, run, epoch)


@pytest.mark.parametrize(("lanes", "run"), [(1, 1), (1, 3), (2, 2), (3, 2), OLDER, (LANES, RUN)])
def test_documents_of_several_sequences(lanes: int, run: int, tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", *SENTENCES)
    assert [len(text) for text in texts(dataset)] == [6, 0, 0, 14, 2, 0, 0, 2, 10, 6, 0, 0]
    for epoch in range(4):
        check(dataset, lanes, run, epoch)


@pytest.mark.parametrize(("lanes", "run"), [OLDER, (LANES, RUN)])
def test_many_blocks(lanes: int, run: int, tmp_path: Path) -> None:
    """The numbers of lanes and neighbours that are in use, with documents whose sizes grow through the file."""
    count = 20 * lanes * run + 17
    check(write(tmp_path / "d", (GENERATOR.integers(0, 12, count) * np.arange(count) // count).tolist()), lanes, run, 1)


def test_neighbours_are_others_in_each_epoch(tmp_path: Path) -> None:
    """And few of them are neighbours in the file: as many as share a run."""
    count = 30 * LANES * RUN
    order = DocumentOrder(write(tmp_path / "d", [1] * count), "k", LANES, RUN)
    epochs = [order.spans(epoch, 0, count).documents for epoch in range(3)]
    pairs = [set(zip(epoch[:-1].tolist(), epoch[1:].tolist(), strict=True)) for epoch in epochs]
    assert len(pairs[0] & pairs[1]) + len(pairs[1] & pairs[2]) < count / 100
    for epoch in epochs:
        near = np.abs(np.diff(epoch)) < RUN
        assert near.mean() == pytest.approx(1 / LANES, rel=0.1)


def test_keys_have_orders_of_their_own(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", [1] * 100)
    first, other = (DocumentOrder(dataset, key, LANES, RUN).spans(0, 0, 100).documents.tolist() for key in ("k", "l"))
    assert sorted(first) == sorted(other)
    assert first != other


@pytest.mark.parametrize(
    ("version", "epochs"),
    [
        (2, [[9681, 4770, 5995, 5939, 9653, 9641, 5963, 5996], [6145, 4310, 9504, 6154, 4280, 9534, 9552, 1569]]),
        (3, [[3690, 7476, 5187, 8384, 7903, 5789, 7477, 1499], [379, 3893, 5830, 4729, 7829, 5839, 3200, 9954]]),
    ],
)
def test_order_is_fixed_for_ever(version: int, epochs: list[list[int]], tmp_path: Path) -> None:
    """A change here would change the data order of runs that resume: it needs another DATA_ORDER."""
    lanes, run, _ = ORDER_VERSIONS[version]
    order = DocumentOrder(write(tmp_path / "d", [1] * 10_000), "1234/arxiv/train", lanes, run)
    assert [order.spans(epoch, 5000, 5008).documents.tolist() for epoch in (0, 1)] == epochs


@pytest.mark.parametrize("grows", [1.0, 1.0001, 0.9999])
def test_search_is_short(grows: float, tmp_path: Path) -> None:
    """With even documents a look or two, and with any others no more than bisection's ten and some."""
    count, looks, most = 200_000, [], []
    sizes = np.maximum(GENERATOR.uniform(0, 2, count) * grows ** np.arange(count), 0)
    sizes = (sizes * 1e8 / sizes.sum()).astype("<i4")
    dataset = sparse(tmp_path / "d", sizes)
    order, read = DocumentOrder(dataset, "k", LANES, RUN), _Epoch._read

    def counted(self: _Epoch, number: int) -> Any:
        looks.append(number)
        return read(self, number)

    with patch.object(_Epoch, "_read", counted):
        for start in GENERATOR.integers(0, len(dataset.tokens) - 9, 200).tolist():
            spans = order.spans(0, start, start + 9)
            assert spans.lengths.sum() == 9
            most.append(len(looks))
            looks.clear()
    assert max(most) <= 8 + 10
    if grows == 1:
        assert np.mean(most) < 3


def sparse(prefix: Path, sizes: np.ndarray) -> IndexedDataset:
    """Files as of `write`, whose ids are holes."""
    ends = np.cumsum(sizes, dtype=np.int64) * 4
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, len(sizes), len(sizes) + 1))
        for column in (sizes, ends - sizes.astype(np.int64) * 4, np.arange(len(sizes) + 1)):
            file.write(column.tobytes())
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(int(ends[-1]))
    return IndexedDataset(prefix)


@pytest.mark.parametrize("documents", [[0, 3, 1, 2], [0, 9, 1, 2], [0, -1, 2, 3], [0, 2**40, 2, 3]])
def test_damaged_indices_are_refused(documents: list[int], tmp_path: Path) -> None:
    for lanes, run in ((1, 1), (2, 1), (LANES, RUN)):
        order = DocumentOrder(write(tmp_path / "d", [3, 4, 5, 6], documents), "k", lanes, run)
        with pytest.raises(DataError, match=r"d\.idx is damaged \(its documents do not follow one another\)"):
            [order.spans(0, start, start + 1) for start in range(18)]


def test_tokens_before_the_first_document_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="do not follow one another"):
        DocumentOrder(write(tmp_path / "d", [3, 4, 5], [1, 2]), "k", LANES, RUN)
