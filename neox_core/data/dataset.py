"""Token files as training sequences: S + 1 ids each, of which the first S are inputs and the last S are targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from neox_core.config import RunConfig
from neox_core.data.indexed import IndexedDataset, Tokens, bin_path
from neox_core.data.mixture import Indices, Mixture
from neox_core.data.permutation import permute
from neox_core.errors import DataError

PADDING_ID = -1
"""Fills the last validation window; a target that is never counted, and no id of any tokenizer."""


class SequenceDataset:
    """One source, cut into windows of S + 1 ids that share one id with the next; random order, any number of epochs."""

    def __init__(self, tokens: IndexedDataset | Path, sequence_length: int, key: str) -> None:
        """Cut `tokens` (or the dataset at that prefix); `key` fixes the order, another one in each epoch.

        Raises:
            DataError: the files cannot be read, or hold fewer tokens than one sequence.
        """
        dataset = tokens if isinstance(tokens, IndexedDataset) else IndexedDataset(tokens)
        self._tokens = dataset.tokens
        self.sequence_length, self._key = sequence_length, key
        self.num_sequences = windows_in(len(self._tokens), sequence_length)
        """Sequences of one epoch. The ids past the last whole window, fewer than S, are not used."""
        if self.num_sequences == 0:
            raise DataError(
                f"{bin_path(dataset.prefix)} holds {len(self._tokens)} tokens, fewer than one sequence of "
                f"{sequence_length} + 1: add text, or lower train.sequence_length or the source's weight to 0"
            )

    def __getitem__(self, index: int) -> Tokens:
        """Ids of one sequence, int64 [S + 1]; index // num_sequences is its epoch."""
        return self.sequences(np.array([index]))[0]

    def sequences(self, indices: Indices) -> Tokens:
        """Ids of several sequences, int64 [n, S + 1]; indices [n] count on through the epochs."""
        windows = self._windows(np.asarray(indices, dtype=np.int64))
        output = np.empty((len(windows), self.sequence_length + 1), dtype=np.int64)
        for row, start in enumerate((windows * self.sequence_length).tolist()):
            output[row] = self._tokens[start : start + self.sequence_length + 1]
        return output

    def _windows(self, indices: Indices) -> Indices:
        epochs, within = np.divmod(indices, self.num_sequences)
        windows = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            windows[here] = permute(within[here], self.num_sequences, f"{self._key}/{epoch}")
        return windows


class MixtureDataset:
    """Several sources, blended; addressed by the global sequence index alone."""

    def __init__(self, mixture: Mixture, sources: Mapping[str, SequenceDataset]) -> None:
        """Blend `sources`, which must hold every source that `mixture` draws from.

        Raises:
            DataError: one is missing.
        """
        drawn = [name for name, count in mixture.consumed(mixture.period).items() if count]
        if missing := [name for name in drawn if name not in sources]:
            raise DataError(f"the mixture draws from {', '.join(missing)}, of which there is no data: run prepare-data")
        self.mixture = mixture
        self._sources = {mixture.names.index(name): sources[name] for name in drawn}
        self._width = 1 + sources[drawn[0]].sequence_length

    def sequences(self, indices: Indices) -> Tokens:
        """Ids of the sequences with these global indices [n]: int64 [n, S + 1]."""
        source_ids, within = self.mixture.locate(indices)
        output = np.empty((len(source_ids), self._width), dtype=np.int64)
        for source_id, dataset in self._sources.items():
            here = source_ids == source_id
            output[here] = dataset.sequences(within[here])
        return output


def open_training_data(folder: Path, config: RunConfig) -> MixtureDataset:
    """The training mixture from the token files of `folder` (`<source>/train.bin/.idx`).

    Raises:
        DataError: files are missing or damaged, or a source is shorter than a sequence.
    """
    weights = {name: source.weight for name, source in config.data.sources.items()}
    return _open(folder, config, weights, "train")


def open_validation_data(folder: Path, config: RunConfig) -> MixtureDataset:
    """The validation sources, blended by their training weights, or equally if those are all 0.

    Raises:
        DataError: files are missing or damaged, or a source is shorter than a sequence.
    """
    weights = {name: config.data.sources[name].weight for name in config.data.validation_sources}
    if not any(weights.values()):
        weights = dict.fromkeys(weights, 1.0)
    return _open(folder, config, weights, "validation")


def validation_windows(folder: Path, source: str, sequence_length: int, limit: int | None = None) -> Tokens:
    """A source's validation split in reading order, int64 [n, S + 1], every id but the first a target exactly once.

    Consecutive windows share one id; the last is filled up with PADDING_ID. `limit` keeps the first windows only.

    Raises:
        DataError: files are missing or damaged, or hold fewer than two tokens.
    """
    dataset = IndexedDataset(token_prefix(folder, source, "validation"))
    targets = len(dataset.tokens) - 1
    if targets < 1:
        raise DataError(f"{bin_path(dataset.prefix)} holds {targets + 1} tokens: nothing to predict; add text")
    count = -(-targets // sequence_length)
    count = count if limit is None else min(count, limit)
    output = np.full((count, sequence_length + 1), PADDING_ID, dtype=np.int64)
    for row in range(count):
        window = dataset.tokens[row * sequence_length : (row + 1) * sequence_length + 1]
        output[row, : len(window)] = window
    return output


def windows_in(tokens: int, sequence_length: int) -> int:
    """How many windows of S + 1 ids, each sharing one with the next, a number of tokens holds."""
    return max(0, tokens - 1) // sequence_length


def token_prefix(folder: Path, source: str, split: str) -> Path:
    """Where a source's token files lie in prepare-data's folder, without .bin and .idx."""
    return folder / source / split


def _open(folder: Path, config: RunConfig, weights: Mapping[str, float], split: str) -> MixtureDataset:
    def source(name: str) -> SequenceDataset:
        prefix = token_prefix(folder, name, split)
        return SequenceDataset(prefix, config.train.sequence_length, key=f"{config.seed}/{name}/{split}")

    drawn: Iterable[str] = (name for name, weight in weights.items() if weight > 0)
    return MixtureDataset(Mixture(weights), {name: source(name) for name in drawn})
