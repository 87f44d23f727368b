"""Golden losses: 20 steps of a small training, by layout and precision, as they were recorded once.

`python -m tests.golden.losses` compares bit for bit, on the machine where they were recorded; `--record` writes them
anew, which is a decision to explain in the commit. The tests of layouts (test_layouts.py) compare their own trainings
with the record, with a tolerance, since processors round differently.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("losses.json")
LAYOUTS = ((1, 1, 1), (2, 2, 1), (2, 1, 2))
"""Tensor, pipeline and data parallel."""
PRECISIONS = ("fp32", "bf16")
Losses = dict[str, dict[str, list[float]]]
"""By layout and precision, as in '2x1x2 bf16': losses and gradient norms of each step."""


def train_layout(layout: tuple[int, int, int], folder: Path) -> Losses:
    """What the layout's first rank that knows the loss makes of it, in each precision."""
    from tests.distributed import run_ranks
    from tests.neox_core.train.engine.test_layouts import Variant, train_rank
    from tests.neox_core.train.small_training import MODELS, config_for

    configs = {
        Variant(precision, layout[0] > 1): config_for("gqa", *layout, precision=precision) for precision in PRECISIONS
    }
    shards = convert_base(MODELS["gqa"], next(iter(configs.values())).parallel, folder)
    results = run_ranks(train_rank, math.prod(layout), configs, shards)[0]
    name = "x".join(map(str, layout))
    return {f"{name} {v.precision}": {key: results[v][key] for key in ("losses", "norms")} for v in configs}


def convert_base(model: Any, parallel: Any, folder: Path) -> Path:
    """A random base model as shards for the layout."""
    from neox_core.checkpoint.conversion.convert import convert
    from neox_core.checkpoint.conversion.toy_base import make_random_base

    base, shards = folder / "base", folder / "shards"
    make_random_base(model, base, seed=7)
    convert(base, shards, model, parallel)
    return shards


def main() -> None:
    """Compare with the record, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    record = parser.parse_args().record
    found: Losses = {}
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            found |= train_layout(layout, Path(folder))
    if record:
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        return
    expected = json.loads(GOLDEN.read_text())
    different = [name for name in expected if expected[name] != found.get(name)]
    sys.stdout.write(f"different: {', '.join(different)}\n" if different else "equal bit for bit\n")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
