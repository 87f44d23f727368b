"""Which groups of layers a model has."""

from __future__ import annotations

from neox_core.model.layer_groups import group_names


def test_group_names_are_few_and_fixed() -> None:
    assert group_names(2) == ("embedding", "blocks_00", "blocks_01", "head", "norms")
    assert group_names(48)[1:3] == ("blocks_00-05", "blocks_06-11")
    assert len(group_names(48)) == 8 + 3
    assert group_names(9)[1:] == (
        "blocks_00-01",
        "blocks_02-03",
        "blocks_04-05",
        "blocks_06-07",
        "blocks_08",
        "head",
        "norms",
    )
