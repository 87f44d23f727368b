"""Files of a node's figures, and how a link's time follows from its points."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from neox_core.config import load_config
from neox_core.errors import ConfigError
from neox_core.planning.calibration import calibrate, part_bytes
from neox_core.planning.hardware import CARDS, Link, load_hardware
from tests.paths import CONFIGS


def test_figures_survive_their_file(tmp_path: Path) -> None:
    for name, card in CARDS.items():
        assert load_hardware(name) is card
        card.save(tmp_path / name)
        assert load_hardware(str(tmp_path / name)) == card


def test_a_link_between_and_beyond_its_points() -> None:
    link = Link(((0.0, 1.0), (10.0, 2.0), (20.0, 6.0)))
    assert [link.seconds(sent) for sent in (0, 5, 10, 15, 30)] == [1.0, 1.5, 2.0, 4.0, 10.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gemm": 0}, r"{'gemm': 0.0} must be finite and above 0"),
        ({"memory_gib": math.inf}, r"{'memory_gib': inf} must be finite"),
        ({"link": {"points": [[0, 1], [8, math.nan]]}}, r"take \[1.0, nan\] seconds"),
        ({"link": {"points": [[0, 1], [8, -2]]}}, r"take \[1.0, -2.0\] seconds"),
        ({"gemm": "fast"}, "could not convert"),
        ({"speed": 1}, "speed"),
        ({"link": {"points": [[5, 1], [6, 2]]}}, "must begin with 0 and rise"),
        ({"link": {"points": [[0, 1]]}}, "must begin with 0 and rise"),
        ({"link": 3}, "holds no hardware's figures"),
    ],
)
def test_other_files_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    CARDS["h100"].save(tmp_path / "figures")
    found = json.loads((tmp_path / "figures").read_text()) | change
    (tmp_path / "figures").write_text(json.dumps(found))
    with pytest.raises(ConfigError, match=message):
        load_hardware(str(tmp_path / "figures"))


def test_an_unknown_card_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"h300: neither a file nor one of a100-40gb, a100-80gb, h100, h200"):
        load_hardware("h300")


def test_calibration_measures_this_machine(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "toy.yml")
    found = calibrate(config, seconds=0.2)
    found.save(tmp_path / "figures")
    assert load_hardware(str(tmp_path / "figures")) == found
    assert 1e6 < found.gemm < 1e15
    assert 1e6 < found.memory < 1e13
    assert found.link.seconds(1 << 22) > found.link.seconds(0)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
def test_ranks_gather_at_addresses_that_are_aligned(ranks: int) -> None:
    for shrunk in (1, 64):
        parts = part_bytes(ranks, shrunk)
        assert not any(part % 16 for part in parts)
        assert parts[0] > 0
        assert parts == sorted(set(parts))
