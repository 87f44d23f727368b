"""Every start is checked: master weights that are not the model's are noticed before the first update."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.config import batch_geometry
from tests.distributed import run_ranks
from tests.neox_core.train.small_training import config_for

KINDS = ("fp32", "packed")
"""Of master weights."""


def said(start: Any) -> str:
    from neox_core.errors import CheckpointError

    try:
        start()
    except CheckpointError as error:
        return str(error)
    return "nothing"


def broken_starts(shards: Path, kind: str) -> dict[str, str]:
    """What is said when an engine is built, and when weights are loaded after a dry run, with broken master weights."""
    from neox_core.checkpoint.formats.neox import NeoxCheckpoint
    from neox_core.optimizer import MasterWeights
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
    from neox_core.train.dry_run import dry_run, zero_weights
    from neox_core.train.engine.deepspeed_engine import build_engine

    config = config_for("gqa", 1, 1, 1, precision="bf16", master_weights=kind)
    mesh, geometry = build_mesh(config.parallel, init_distributed(config.launch)), batch_geometry(config)
    weights, make = NeoxCheckpoint(shards).layer, MasterWeights.__init__

    def slightly_off(self: MasterWeights, low_precision: Tensor, packed: bool) -> None:
        make(self, low_precision, packed)
        shift(self)

    def shift(self: MasterWeights) -> None:
        """By less than bf16 tells apart: they round to their parameters."""
        self.storage += 7 if self.packed else self.storage * 2**-10

    with patch.object(MasterWeights, "__init__", slightly_off):
        built = said(lambda: build_engine(config, mesh, geometry, weights))
    engine = build_engine(config, mesh, geometry, zero_weights(config))
    dry_run(engine, config, geometry, mesh)
    sound = said(lambda: engine.load_weights(weights))
    with patch.object(MasterWeights, "reset", shift):
        loaded = said(lambda: engine.load_weights(weights))
    return {"built": built, "sound": sound, "loaded": loaded}


def all_starts(shards: Path) -> dict[str, dict[str, str]]:
    return {kind: broken_starts(shards, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder, config = tmp_path_factory.mktemp("start"), config_for("gqa", 1, 1, 1)
    make_random_base(config.model, folder / "base", seed=7)
    convert(folder / "base", folder / "shards", config.model, config.parallel)
    (said_by_rank,) = run_ranks(all_starts, 1, folder / "shards")
    return dict(said_by_rank)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["built", "loaded"])
def test_a_broken_start_is_caught(found: dict[str, dict[str, str]], kind: str, start: str) -> None:
    assert "fp32 master weights differ from the model's weights" in found[kind][start]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_start_passes(found: dict[str, dict[str, str]], kind: str) -> None:
    assert found[kind]["sound"] == "nothing"
