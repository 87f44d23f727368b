"""The small training's losses are those that were recorded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.golden.losses import GOLDEN, LAYOUTS, PRECISIONS, train_layout

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
"""Processors sum in other orders and have other bf16 products; on one machine the bits are equal (losses.py)."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_golden(layout: tuple[int, int, int], tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    found = train_layout(layout, tmp_path)
    assert {name.split()[1] for name in found} == set(PRECISIONS)
    for name, values in found.items():
        for key in ("losses", "norms"):
            np.testing.assert_allclose(values[key], golden[name][key], rtol=TOLERANCE[name.split()[1]], err_msg=name)
