"""A model's weights, wherever files keep them, and any layout's tensors made from them, some rows at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neox_core.checkpoint.formats.tensor_map import Block, Form, StoredLayout, iterate_layers, stored_tensors
from neox_core.config import ModelConfig
from neox_core.errors import CheckpointError
from neox_core.storage.tensor_reader import StoredTensor
from neox_core.storage.tensor_writer import StreamedTensor

NewRows = Callable[[str, range, Tensor], None]
"""Makes rows of a whole tensor that the base lacks: called with its name, the rows, and where to put them."""
_PROBE_ROWS = 256


@dataclass(frozen=True)
class Place:
    """A block of a whole tensor, and the file's tensor that has it."""

    block: Block
    stored: StoredTensor


@dataclass(frozen=True)
class ModelWeights:
    """All of a model's weights, found in files."""

    origin: str
    """The folder, for messages."""
    model: ModelConfig
    places: Mapping[str, tuple[Place, ...]]
    """By the whole tensors' names."""

    @property
    def dtypes(self) -> Mapping[torch.dtype, int]:
        """The types in the files, and how many tensors of the files have each."""
        stored = {place.stored.place: place.stored.dtype for places in self.places.values() for place in places}
        return Counter(stored.values())

    @property
    def dtype(self) -> torch.dtype:
        """The type of all weights; where they differ (norms in fp32, others in bf16), the one that holds them all."""
        return next(iter(self.dtypes)) if len(self.dtypes) == 1 else torch.float32

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of a whole tensor; a vector has one row."""
        blocks = [place.block for place in self.places[name]]
        return max(block.rows.stop for block in blocks), max(block.columns.stop for block in blocks)

    def read(self, whole: str, rows: range, columns: range, out: Tensor) -> range:
        """Copy a rectangle of a whole tensor into `out`, rounding if its type is narrower; yields the rows there were.

        Raises:
            CheckpointError: files disagree about a rectangle that several have.
        """
        last = rows.start
        for place in self.places[whole]:
            block = place.block
            r = range(max(rows.start, block.rows.start), min(rows.stop, block.rows.stop))
            c = range(max(columns.start, block.columns.start), min(columns.stop, block.columns.stop))
            if not r or not c:
                continue
            last = max(last, r.stop)
            source = place.stored.read(
                _within(block.rows, block.at_rows, r), _within(block.columns, block.at_columns, c)
            )
            target = out[r.start - rows.start : r.stop - rows.start, c.start - columns.start : c.stop - columns.start]
            if block.replica == 0:
                target.copy_(source)
            elif not torch.equal(_bits(target), _bits(source.to(target.dtype))):
                raise CheckpointError(
                    f"{place.stored.place} must be the same in every shard, but shard {block.replica} differs "
                    "from shard 0"
                )
        return range(rows.start, last)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in memory, by Hugging Face's name and in its order of rows; a vector has one row."""
        height, width = self.shape(name)
        out = torch.empty(height, width, dtype=self.dtype)
        self.read(name, range(height), range(width), out)
        return out

    def as_stored(
        self, layout: StoredLayout, dtype: torch.dtype, new_rows: NewRows | None = None, prefix: str = ""
    ) -> StreamedTensor:
        """A tensor of another layout's file, computed from these weights when it is written.

        Its `fill` raises CheckpointError where a value is NaN or infinite, or `new_rows` is None and rows are missing.
        """

        def fill(out: Tensor, first: int) -> None:
            for block in layout.blocks:
                self._fill(block, first, out, new_rows)
            low, high = torch.aminmax(out)
            if not math.isfinite(low.item()) or not math.isfinite(high.item()):
                raise CheckpointError(self._blame(layout))

        return StreamedTensor(prefix + layout.name, layout.shape, dtype, fill)

    def _fill(self, block: Block, first: int, out: Tensor, new_rows: NewRows | None) -> None:
        """The rows of a block that `out` holds, whose first row is number `first` of the file's tensor."""
        step = block.at_rows.step
        start = max(0, -(-(first - block.at_rows.start) // step))
        at = block.at_rows[start:]
        at = range(at.start, min(at.stop, first + len(out)), step) if at else at
        if not at:
            return
        rows = block.rows[start : start + len(at)]
        target = out[at.start - first : at.stop - first : step, block.at_columns.start : block.at_columns.stop]
        known = self.read(block.whole, rows, block.columns, target)
        if missing := rows[len(known) :]:
            if new_rows is None:
                raise CheckpointError(f"{self.origin}: {block.whole} lacks rows {missing.start} to {missing.stop - 1}")
            made = torch.empty((len(missing), self.shape(block.whole)[1]), dtype=out.dtype)
            new_rows(block.whole, missing, made)
            target[len(known) :].copy_(made[:, block.columns.start : block.columns.stop])

    def _blame(self, layout: StoredLayout) -> str:
        """Which tensor of which file has the value that is not finite."""
        stored = {place.stored.place: place.stored for block in layout.blocks for place in self.places[block.whole]}
        for place, tensor in stored.items():
            width = tensor.shape[-1]
            height = math.prod(tensor.shape) // width
            for start in range(0, height, _PROBE_ROWS):
                values = tensor.read(range(start, min(start + _PROBE_ROWS, height)), range(width))
                bad = (~torch.isfinite(values)).nonzero()
                if len(bad):
                    row, column = bad[0].tolist()
                    return f"{place} is {values[row, column].item()} in row {start + row}, column {column}: not usable"
        return f"{self.origin}: {layout.name} gets values that are not finite"


def _bits(values: Tensor) -> Tensor:
    """As integers, so that NaN equals NaN."""
    return values.view({2: torch.int16, 4: torch.int32}[values.dtype.itemsize])


def _within(whole: range, stored: range, wanted: range) -> range:
    """The part of `stored` that corresponds to the part `wanted` of `whole`; both are consecutive."""
    return stored[wanted.start - whole.start : wanted.stop - whole.start]


@dataclass
class Locator:
    """Collects the places of a form's tensors, file by file."""

    origin: str
    model: ModelConfig
    form: Form
    parts: int
    hint: str = "is the model section this checkpoint's?"
    """What to look at where a tensor is missing."""
    places: dict[str, list[Place]] = field(default_factory=dict)

    def add(self, part: int, find: Callable[[int, str], object]) -> None:
        """Add a file's tensors; `find` gives one by NeoX's layer index and its name there, or None.

        Raises:
            CheckpointError: a tensor is missing, or its shape or type is not what the model needs.
        """
        for layer in iterate_layers(self.model):
            for layout in stored_tensors(layer, self.model, self.form, self.parts, part):
                stored = find(layer.index, layout.name)
                tensor = self._checked(stored, layout, layer.index)
                for block in layout.blocks:
                    self.places.setdefault(block.whole, []).append(Place(block, tensor))

    def weights(self) -> ModelWeights:
        """What was found."""
        first_copies_first = {
            name: tuple(sorted(places, key=lambda place: place.block.replica)) for name, places in self.places.items()
        }
        return ModelWeights(self.origin, self.model, first_copies_first)

    def _checked(self, stored: object, layout: StoredLayout, index: int) -> StoredTensor:
        what = f"{self.origin}: layer {index}: {layout.name}"
        if not isinstance(stored, StoredTensor):
            kind = "missing" if stored is None else f"{type(stored).__name__}, not a tensor"
            raise CheckpointError(f"{what} is {kind}: {self.hint}")
        if stored.shape != layout.shape:
            raise CheckpointError(
                f"{stored.content.name}: {layout.name} has shape {stored.shape}, but the model needs {layout.shape} in "
                f"{'this file' if self.parts == 1 else f'each of {self.parts} parts'}: is it another model's, or are "
                "there too many or too few parts?"
            )
        if stored.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise CheckpointError(f"{stored.place} is {stored.dtype}; weights must be bf16, fp16 or fp32")
        return stored


def layouts_of(model: ModelConfig, form: Form, parts: int = 1, part: int = 0) -> Iterable[tuple[int, StoredLayout]]:
    """NeoX's layer index and layout of every tensor of a file."""
    for layer in iterate_layers(model):
        for layout in stored_tensors(layer, model, form, parts, part):
            yield layer.index, layout
