"""Where every parameter lies in the optimizer's files of a layout, and which of them another layout's ranks need.

A pipeline stage flattens its parameters in the order of the tensor map (formats/tensor_map.py), matrices and vectors
apart; data-parallel ranks have equal parts of each flat group, whose end is padded. Pure arithmetic: no tensor is
touched here. As all of it follows from the model and the layout, which a manifest has, no checkpoint needs to be
written for the layout that will read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from neox_core.checkpoint.formats.tensor_map import Form, Layer, StoredLayout, iterate_layers, stored_tensors
from neox_core.config import ModelConfig

GROUPS = 2
"""Matrices, which have weight decay, and vectors."""
_ALIGNMENT = 2
"""Each part of a flat group is a multiple of so many elements, as DeepSpeed aligns it."""


@dataclass(frozen=True)
class Layout:
    """How a training is cut among ranks."""

    tensor: int
    data: int
    stages: tuple[int, ...]
    """Transformer layers of each pipeline stage."""

    @classmethod
    def of_manifest(cls, values: Mapping[str, Any], model: ModelConfig) -> Layout:
        """From a manifest's `layout`."""
        return cls(values["tensor"], values["data"], tuple(values.get("pipeline_layers", [model.num_layers])))

    def to_manifest(self) -> dict[str, Any]:
        """As a manifest has it."""
        values: dict[str, Any] = {"tensor": self.tensor, "pipeline": len(self.stages), "data": self.data}
        return values | ({"pipeline_layers": list(self.stages)} if len(self.stages) > 1 else {})

    def has_layer(self, stage: int, layer: Layer) -> bool:
        """Whether a layer, by its index in NeoX's sequence, is on a stage: transformer layers begin at 2."""
        *starts, total = accumulate(self.stages, initial=2)
        bounds = [0, *starts[1:], total + 3]
        return bounds[stage] <= layer.index < bounds[stage + 1]


@dataclass(frozen=True, order=True)
class Place:
    """A rank by its place in the grid."""

    stage: int
    data_rank: int
    tensor_rank: int


@dataclass(frozen=True)
class FlatParameter:
    """A rank's part of a parameter, and where it begins in its flat group."""

    layer: int
    stored: StoredLayout
    first: int

    @property
    def width(self) -> int:
        """Elements of a row; a vector is one row."""
        return self.stored.shape[-1]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stored.shape[0] if len(self.stored.shape) > 1 else 1

    @property
    def end(self) -> int:
        """Where it ends in its flat group."""
        return self.first + self.rows * self.width


@dataclass(frozen=True)
class FlatGroup:
    """The parameters of one tensor-parallel rank and stage that are flattened together."""

    parameters: tuple[FlatParameter, ...]
    data: int
    """Ranks that have a part of it each."""

    @property
    def part(self) -> int:
        """Elements of each rank's part."""
        return -(-self.parameters[-1].end // (self.data * _ALIGNMENT)) * _ALIGNMENT

    def elements_of(self, data_rank: int) -> dict[str, range]:
        """Where a rank has each parameter in its part of the group, by NeoX's index and name."""
        begin, end = data_rank * self.part, (data_rank + 1) * self.part
        return {
            f"{p.layer}.{p.stored.name}": range(max(p.first, begin) - begin, min(p.end, end) - begin)
            for p in self.parameters
            if p.first < end and p.end > begin
        }


def flat_groups(model: ModelConfig, layout: Layout, stage: int, tensor_rank: int) -> tuple[FlatGroup, ...]:
    """The flat groups of a stage on a tensor-parallel rank."""
    parameters: tuple[list[FlatParameter], ...] = tuple([] for _ in range(GROUPS))
    for layer in iterate_layers(model):
        if layout.has_layer(stage, layer) and not layer.tied:
            for stored in stored_tensors(layer, model, Form.NEOX, layout.tensor, tensor_rank):
                group = parameters[len(stored.shape) == 1]
                group.append(FlatParameter(layer.index, stored, group[-1].end if group else 0))
    return tuple(FlatGroup(tuple(group), layout.data) for group in parameters)


@dataclass(frozen=True)
class Copy:
    """A rectangle of a saved parameter, and where a rank of another layout has it in its own."""

    tensor_rank: int
    """Whose part of the parameter it is."""
    rows: range
    columns: range
    at_rows: range
    at_columns: range


def copies(own: StoredLayout, saved: Mapping[int, StoredLayout], rows: range) -> Iterator[Copy]:
    """What makes some rows of a parameter.

    Args:
        own: the parameter in the layout that reads.
        saved: in the layout that was saved, by tensor-parallel rank. Of what several have, the first one's is taken.
        rows: those of `own` to make.
    """
    sources = [(rank, block) for rank, stored in saved.items() for block in stored.blocks if block.replica == 0]
    for block in own.blocks:
        at = _common(block.at_rows, rows)
        wanted = _within(block.at_rows, block.rows, at)
        for rank, source in sources if at else ():
            if source.whole != block.whole:
                continue
            r, c = _common(wanted, source.rows), _common(block.columns, source.columns)
            if r and c:
                yield Copy(
                    rank,
                    _within(source.rows, source.at_rows, r),
                    _within(source.columns, source.at_columns, c),
                    _within(block.rows, block.at_rows, r),
                    _within(block.columns, block.at_columns, c),
                )


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _within(whole: range, stored: range, wanted: range) -> range:
    """The part of `stored` that corresponds to the part `wanted` of `whole`."""
    return range(stored.start + wanted.start - whole.start, stored.start + wanted.stop - whole.start)
