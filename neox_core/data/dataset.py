"""Token files as training sequences: S + 1 ids each, of which the first S are inputs and the last S are targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from neox_core.config import RunConfig
from neox_core.data.document_order import DocumentOrder, Spans, joined
from neox_core.data.documents import document_starts, restarting_positions
from neox_core.data.indexed import IndexedDataset, Tokens, bin_path
from neox_core.data.mixture import Indices, Mixture
from neox_core.data.mixture_weights import training_mixture, validation_mixture
from neox_core.data.order_version import DATA_ORDER, ORDER_VERSIONS, data_order
from neox_core.data.permutation import permute
from neox_core.data.skipped import SkippedSequences
from neox_core.errors import DataError

PADDING_ID = -1
"""Fills the last validation window; a target that is never counted, and no id of any tokenizer."""

_FEW_PIECES = 16
"""Up to so many pieces are copied one by one faster than their ids are gathered."""


class SequenceDataset:
    """One source, repeated without end and cut into windows of S + 1 ids that share one id with the next.

    A pass over the source, an epoch, has its documents in an order of its own (see `DocumentOrder`), and is every
    window that starts in it, in an order of its own. As the windows go on across the end, into the next epoch's
    documents, each id is a target exactly once per pass, and none is lost; only the very first has nothing before it.
    """

    def __init__(self, tokens: IndexedDataset | Path, sequence_length: int, key: str, order: int = DATA_ORDER) -> None:
        """Cut `tokens` (or the dataset at that prefix); `key` fixes the order, another one in each epoch.

        Args:
            order: its version.

        Raises:
            DataError: the files cannot be read, are damaged, or hold fewer tokens than one sequence.
        """
        self._dataset = tokens if isinstance(tokens, IndexedDataset) else IndexedDataset(tokens)
        self._tokens = self._dataset.tokens
        self.sequence_length, self._key = sequence_length, key
        if len(self._tokens) <= sequence_length:
            raise DataError(
                f"{bin_path(self._dataset.prefix)} holds {len(self._tokens)} tokens, fewer than one sequence of "
                f"{sequence_length} + 1: add text, or lower train.sequence_length or the source's weight to 0"
            )
        version = ORDER_VERSIONS[order]
        self._order = DocumentOrder(self._dataset, key, version.lanes, version.run)

    @property
    def num_tokens(self) -> int:
        """Ids of one pass."""
        return len(self._tokens)

    def __getitem__(self, index: int) -> Tokens:
        """Ids of one sequence, int64 [S + 1]; sequences are numbered on through the epochs."""
        spans = self._spans(index, self.sequence_length + 1)
        if len(spans.places) > _FEW_PIECES:
            return self._tokens[_places(spans)].astype(np.int64)
        pieces = zip(spans.places.tolist(), spans.lengths.tolist(), strict=True)
        return np.concatenate([self._tokens[place : place + length] for place, length in pieces], dtype=np.int64)

    def positions(self, index: int) -> Tokens:
        """Token position of each input id of a sequence within its document, int64 [S]; see `restarting_positions`."""
        lengths = self._spans(index, self.sequence_length).lengths
        return np.arange(self.sequence_length) - np.repeat(lengths.cumsum() - lengths, lengths)

    def documents(self, index: int) -> list[int]:
        """Numbers in the file, from 0, of the documents that a sequence's ids come from, in the sequence's order."""
        return self._spans(index, self.sequence_length + 1).documents.tolist()

    def places(self, index: int) -> Tokens:
        """Place in the file of each id of a sequence, int64 [S + 1]."""
        return _places(self._spans(index, self.sequence_length + 1))

    def _spans(self, index: int, length: int) -> Spans:
        """Where the first ids of a sequence lie. An epoch is longer than a sequence, so that two are enough."""
        epoch, start = self._start(index)
        stop, tokens = start + length, len(self._tokens)
        if stop <= tokens:
            return self._order.spans(epoch, start, stop)
        rest = self._order.spans(epoch + 1, 0, stop - tokens)
        return joined([self._order.spans(epoch, start, tokens), rest])

    def _start(self, index: int) -> tuple[int, int]:
        """The epoch that a sequence starts in, and at which of the epoch's tokens."""
        length, tokens = self.sequence_length, len(self._tokens)
        epoch = index * length // tokens
        first, end = (-(-number * tokens // length) for number in (epoch, epoch + 1))
        window = first + permute(index - first, end - first, f"{self._key}/{epoch}")
        return epoch, window * length - epoch * tokens


def _places(spans: Spans) -> Tokens:
    """Place in the file of each token, int64 [sum of the lengths]."""
    begins = spans.lengths.cumsum() - spans.lengths
    places = np.repeat(spans.places - begins, spans.lengths)
    places += np.arange(len(places))
    return places


class MixtureDataset:
    """Several sources, blended; addressed by the global sequence index alone."""

    def __init__(self, mixture: Mixture, sources: Mapping[str, SequenceDataset]) -> None:
        """Blend `sources`, which must hold every source that `mixture` draws from.

        Raises:
            DataError: one is missing.
        """
        if missing := [name for name in mixture.drawn if name not in sources]:
            raise DataError(f"the mixture draws from {', '.join(missing)}, of which there is no data: run prepare-data")
        self.mixture = mixture
        self._sources = {mixture.names.index(name): sources[name] for name in mixture.drawn}
        self._length = sources[mixture.drawn[0]].sequence_length

    def sequences(self, indices: Indices) -> Tokens:
        """Ids of the sequences with these global indices [n]: int64 [n, S + 1]."""
        output = np.empty((len(indices), self._length + 1), dtype=np.int64)
        for row, (source, index) in enumerate(self._located(indices)):
            output[row] = source[index]
        return output

    def positions(self, indices: Indices) -> Tokens:
        """Token positions within documents of the sequences' inputs: int64 [n, S]."""
        output = np.empty((len(indices), self._length), dtype=np.int64)
        for row, (source, index) in enumerate(self._located(indices)):
            output[row] = source.positions(index)
        return output

    def documents(self, indices: Indices) -> dict[str, list[list[int]]]:
        """Per source, the documents of each sequence with these global indices [n], in their order."""
        found: dict[str, list[list[int]]] = {}
        source_ids, within = self.mixture.locate(indices)
        for source_id, index in zip(source_ids.tolist(), within.tolist(), strict=True):
            found.setdefault(self.mixture.names[source_id], []).append(self._sources[source_id].documents(index))
        return found

    def places(self, index: int) -> tuple[str, Tokens]:
        """The source of the sequence with this global index, and the place in its file of each id, int64 [S + 1]."""
        source_ids, within = self.mixture.locate(np.array([index]))
        source_id = int(source_ids[0])
        return self.mixture.names[source_id], self._sources[source_id].places(int(within[0]))

    def consumed(self, sequences: int) -> dict[str, dict[str, float]]:
        """What the first `sequences` sequences took of each source: sequences, tokens (x S) and passes over it."""
        counts = self.mixture.consumed(sequences)
        drawn = {self.mixture.names[source_id]: source for source_id, source in self._sources.items()}
        return {
            name: consumption(count, self._length, drawn[name].num_tokens if name in drawn else 0)
            for name, count in counts.items()
        }

    def _located(self, indices: Indices) -> Iterator[tuple[SequenceDataset, int]]:
        source_ids, within = self.mixture.locate(indices)
        for source_id, index in zip(source_ids.tolist(), within.tolist(), strict=True):
            yield self._sources[source_id], index


def consumption(sequences: int, sequence_length: int, available: int) -> dict[str, float]:
    """An entry of a ledger: sequences, tokens, and epochs of a source that has `available` tokens."""
    tokens = sequences * sequence_length
    return {"sequences": sequences, "tokens": tokens, "epochs": tokens / available if sequences else 0.0}


def open_training_data(folder: Path, config: RunConfig, skipped: Sequence[SkippedSequences] = ()) -> MixtureDataset:
    """The training mixture from the token files of `folder` (`<source>/train.bin/.idx`).

    Args:
        skipped: sequences that training left out so far.

    Raises:
        DataError: files are missing or damaged, or a source is shorter than a sequence.
        ConfigError: the amounts that the configuration asks for do not add up.
    """
    mixture = training_mixture(config, _train_tokens(folder), skipped)
    return MixtureDataset(mixture, _open(folder, config, mixture.drawn, "train"))


def open_validation_data(folder: Path, config: RunConfig) -> MixtureDataset:
    """The validation sources, blended by their training weights at the start, or equally if those are all 0.

    Raises:
        DataError: files are missing or damaged, or a source is shorter than a sequence.
        ConfigError: the amounts that the configuration asks for do not add up.
    """
    mixture = validation_mixture(config, _train_tokens(folder))
    return MixtureDataset(mixture, _open(folder, config, mixture.drawn, "validation"))


def validation_windows(folder: Path, source: str, sequence_length: int, limit: int | None = None) -> Tokens:
    """A source's validation split in reading order, int64 [n, S + 1], every id but the first a target exactly once.

    Consecutive windows share one id; the last is filled up with PADDING_ID. `limit` keeps the first windows only.

    Raises:
        DataError: files are missing or damaged, or hold fewer than two tokens.
    """
    dataset = IndexedDataset(token_prefix(folder, source, "validation"))
    count = _validation_count(dataset, sequence_length, limit)
    output = np.full((count, sequence_length + 1), PADDING_ID, dtype=np.int64)
    for row in range(count):
        window = dataset.tokens[row * sequence_length : (row + 1) * sequence_length + 1]
        output[row, : len(window)] = window
    return output


def validation_positions(folder: Path, source: str, sequence_length: int, limit: int | None = None) -> Tokens:
    """Token positions within documents of the inputs of `validation_windows`, int64 [n, S].

    Raises:
        DataError: files are missing or damaged, or hold fewer than two tokens.
    """
    dataset = IndexedDataset(token_prefix(folder, source, "validation"))
    count = _validation_count(dataset, sequence_length, limit)
    output = np.empty((count, sequence_length), dtype=np.int64)
    for row in range(count):
        start = row * sequence_length
        starts = document_starts(dataset, start, min(start + sequence_length, len(dataset.tokens)))
        output[row] = restarting_positions(starts - start, sequence_length)
    return output


def token_prefix(folder: Path, source: str, split: str) -> Path:
    """Where a source's token files lie in prepare-data's folder, without .bin and .idx."""
    return folder / source / split


def _validation_count(dataset: IndexedDataset, sequence_length: int, limit: int | None) -> int:
    targets = len(dataset.tokens) - 1
    if targets < 1:
        raise DataError(f"{bin_path(dataset.prefix)} holds {targets + 1} tokens: nothing to predict; add text")
    count = -(-targets // sequence_length)
    return count if limit is None else min(count, limit)


def _train_tokens(folder: Path) -> Callable[[str], int]:
    return lambda source: len(IndexedDataset(token_prefix(folder, source, "train")).tokens)


def _open(folder: Path, config: RunConfig, sources: Iterable[str], split: str) -> dict[str, SequenceDataset]:
    def source(name: str) -> SequenceDataset:
        prefix = token_prefix(folder, name, split)
        key = f"{config.seed}/{name}/{split}"
        return SequenceDataset(prefix, config.train.sequence_length, key, data_order(config))

    return {name: source(name) for name in sources}
