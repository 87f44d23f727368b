"""A rank's share of the optimizer's state, read from the files of ranks of another layout, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from neox_core.checkpoint.partitions import GROUPS, Copy, FlatGroup, FlatParameter, Layout, Place, copies, flat_groups
from neox_core.config import ModelConfig
from neox_core.errors import CheckpointError

_PIECE = 1 << 23
"""Elements at a time, at most, or one row: 32 MiB in fp32."""

ReadPart = Callable[[Place, int], Tensor]
"""A saved rank's part of a flat group, by the group's number; flat, not copied to memory."""


@dataclass(frozen=True)
class Piece:
    """Rows of a parameter that a rank has a part of, and what they are made from."""

    parameter: FlatParameter
    rows: range
    elements: range
    """Those that the rank has, counted from the flat group's begin."""
    sources: tuple[Copy, ...]


@dataclass(frozen=True)
class Holders:
    """Who has saved a parameter."""

    stage: int
    parts: Mapping[int, FlatParameter]
    """By tensor-parallel rank."""
    size: int
    """Elements of each data-parallel rank's part of their flat group."""


@dataclass(frozen=True)
class Resharding:
    """From one layout of a model to a rank's place in another."""

    model: ModelConfig
    saved: Layout
    own: Layout
    place: Place

    def files(self) -> set[Place]:
        """The ranks whose files are needed; at least one, as each has the number of updates."""
        found = {
            place
            for group in range(GROUPS)
            for piece in self._pieces(group)
            for copy in piece.sources
            for place, _ in self._parts(piece, copy)
        }
        return found or {Place(0, 0, 0)}

    def read(self, group: int, read: ReadPart) -> Iterator[tuple[int, Tensor]]:
        """This rank's part of a flat group: where each piece begins in the part, and its elements. Padding has none.

        Raises:
            CheckpointError: a saved part is not as long as the layout says.
        """
        for piece in self._pieces(group):
            rows = torch.empty(len(piece.rows), piece.parameter.width)
            for copy in piece.sources:
                at = slice(copy.at_rows.start - piece.rows.start, copy.at_rows.stop - piece.rows.start)
                columns = slice(copy.at_columns.start, copy.at_columns.stop)
                rows[at, columns] = self._source(group, piece, copy, read)
            first = piece.parameter.first + piece.rows.start * piece.parameter.width
            start, stop = piece.elements.start, piece.elements.stop
            yield start - self.place.data_rank * self._own[group].part, rows.flatten()[start - first : stop - first]

    def saved_elements(self, place: Place) -> list[dict[str, range]]:
        """Of each flat group, where a saved rank has each parameter in its part, by NeoX's index and name."""
        groups = flat_groups(self.model, self.saved, place.stage, place.tensor_rank)
        return [group.elements_of(place.data_rank) for group in groups]

    @cached_property
    def _own(self) -> tuple[FlatGroup, ...]:
        return flat_groups(self.model, self.own, self.place.stage, self.place.tensor_rank)

    @cached_property
    def _holders(self) -> Mapping[tuple[int, str], Holders]:
        """By layer and name."""
        found: dict[tuple[int, str], Holders] = {}
        for stage in range(len(self.saved.stages)):
            ranks = [flat_groups(self.model, self.saved, stage, rank) for rank in range(self.saved.tensor)]
            for same_groups in zip(*ranks, strict=True):
                for same in zip(*(group.parameters for group in same_groups), strict=True):
                    key = same[0].layer, same[0].stored.name
                    found[key] = Holders(stage, dict(enumerate(same)), same_groups[0].part)
        return found

    def _pieces(self, group: int) -> Iterator[Piece]:
        own, data_rank = self._own[group], self.place.data_rank
        for parameter in own.parameters:
            width, first = parameter.width, parameter.first
            begin, end = max(first, data_rank * own.part), min(parameter.end, (data_rank + 1) * own.part)
            if begin >= end:
                continue
            parts = self._holders[parameter.layer, parameter.stored.name].parts
            saved = {rank: part.stored for rank, part in parts.items()}
            last, step = -(-(end - first) // width), max(1, _PIECE // width)
            for start in range((begin - first) // width, last, step):
                rows = range(start, min(start + step, last))
                elements = range(max(begin, first + rows.start * width), min(end, first + rows.stop * width))
                yield Piece(parameter, rows, elements, tuple(copies(parameter.stored, saved, rows)))

    def _parts(self, piece: Piece, copy: Copy) -> Iterator[tuple[Place, range]]:
        """The ranks that have the whole rows of a source, and the elements of their parts."""
        holders = self._holders[piece.parameter.layer, piece.parameter.stored.name]
        parameter, size = holders.parts[copy.tensor_rank], holders.size
        start = parameter.first + copy.rows.start * parameter.width
        stop = parameter.first + copy.rows.stop * parameter.width
        for rank in range(start // size, -(-stop // size)):
            elements = range(max(start - rank * size, 0), min(stop - rank * size, size))
            yield Place(holders.stage, rank, copy.tensor_rank), elements

    def _source(self, group: int, piece: Piece, copy: Copy, read: ReadPart) -> Tensor:
        size = self._holders[piece.parameter.layer, piece.parameter.stored.name].size
        parts = []
        for place, elements in self._parts(piece, copy):
            saved = read(place, group)
            if saved.shape != (size,):
                raise CheckpointError(
                    f"the optimizer's file of {place} has {list(saved.shape)} elements in group {group}, but layout "
                    f"{self.saved} puts {size} there: was the checkpoint written by another version?"
                )
            parts.append(saved[elements.start : elements.stop])
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.view(len(copy.rows), -1)[:, copy.columns.start : copy.columns.stop]
