"""Parts of flat groups in one layout, made from another's files: against a cut of whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neox_core.checkpoint import resharding
from neox_core.checkpoint.formats.tensor_map import iterate_layers
from neox_core.checkpoint.partitions import GROUPS, Layout, Place, flat_groups
from neox_core.checkpoint.resharding import Resharding
from neox_core.config import ModelConfig
from neox_core.errors import CheckpointError

MODEL = ModelConfig(
    num_layers=4, hidden_size=16, num_attention_heads=4, num_kv_heads=2, intermediate_size=24, vocab_size=32,
    rope_theta=1e4,
)  # fmt: skip
ONE = Layout(1, 1, (4,))
LAYOUTS = [
    ONE,
    Layout(2, 1, (4,)),
    Layout(4, 3, (1, 3)),
    Layout(4, 1, (2, 2)),  # two ranks each have the same KV head
    Layout(1, 2, (1, 1, 1, 1)),
    Layout(2, 5, (3, 1)),
    Layout(1, 300, (4,)),  # more ranks than elements of some group: some have padding alone
]


def whole_tensors() -> dict[str, Tensor]:
    """Each element of the model another number, by Hugging Face's names."""
    found, number = {}, 0
    for layer in iterate_layers(MODEL.num_layers):
        for tensor in layer.tensors:
            shape = tensor.shape(MODEL)
            size = torch.Size(shape).numel()
            name = layer.huggingface_prefix + tensor.huggingface
            found[name] = torch.arange(number + 1, number + 1 + size, dtype=torch.float32).view(-1, shape[-1])
            number += size
    return found


def parts(layout: Layout) -> dict[tuple[Place, int], Tensor]:
    """What each rank of the layout has of each flat group."""
    whole, found = whole_tensors(), {}
    for stage in range(len(layout.stages)):
        for rank in range(layout.tensor):
            for index, group in enumerate(flat_groups(MODEL, layout, stage, rank)):
                flat = torch.zeros(group.part * layout.data)
                for parameter in group.parameters:
                    matrix = torch.empty(parameter.rows, parameter.width)
                    for block in parameter.stored.blocks:
                        at = slice(block.at_rows.start, block.at_rows.stop)
                        rows, columns = (slice(r.start, r.stop) for r in (block.rows, block.columns))
                        matrix[at, block.at_columns.start : block.at_columns.stop] = whole[block.whole][rows, columns]
                    flat[parameter.first : parameter.end] = matrix.flatten()
                for data_rank, part in enumerate(flat.split(group.part)):
                    found[Place(stage, data_rank, rank), index] = part
    return found


@pytest.mark.parametrize("own", LAYOUTS, ids=str)
@pytest.mark.parametrize("saved", LAYOUTS, ids=str)
@pytest.mark.parametrize("piece", [1, 1 << 23])
def test_every_rank_gets_its_own(saved: Layout, own: Layout, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the files that it names, and no others; and the one layout's parts hold every element."""
    monkeypatch.setattr(resharding, "_PIECE", piece)
    there, expected = parts(saved), parts(own)
    places = {place for place, _ in expected}
    for place in list(places)[:: max(1, len(places) // 12)]:
        made = Resharding(MODEL, saved, own, place)
        files = made.files()
        assert files

        def read(asked: Place, group: int, files: set[Place] = files) -> Tensor:
            assert asked in files
            return there[asked, group]

        for group in range(GROUPS):
            part = torch.zeros_like(expected[place, group])
            for start, elements in made.read(group, read):
                part[start : start + len(elements)] = elements
            assert torch.equal(part, expected[place, group])


def test_few_files_are_needed() -> None:
    """One of 16 ranks reads the files of the ranks that had the same part of the model."""
    saved, own = Layout(2, 8, (4,)), Layout(2, 16, (4,))
    files = Resharding(MODEL, saved, own, Place(0, 5, 1)).files()
    assert files <= {Place(0, data_rank, rank) for data_rank in (2, 3) for rank in (0, 1)}


def test_a_part_of_another_size() -> None:
    read: Any = lambda place, group: torch.zeros(10)  # noqa: E731
    with pytest.raises(CheckpointError, match=r"Place.* has \[10\] elements in group 0, but layout .* puts \d+ there"):
        list(Resharding(MODEL, ONE, ONE, Place(0, 0, 0)).read(0, read))


def test_a_layout_in_a_manifest() -> None:
    assert Layout.of_manifest({"tensor": 2, "pipeline": 1, "data": 3}, MODEL) == Layout(2, 3, (4,))
    for layout in LAYOUTS:
        assert Layout.of_manifest(layout.to_manifest(), MODEL) == layout
