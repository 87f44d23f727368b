"""What a family's differences cost a training step: the 7B's layers on one GPU, of each family, side by side.

    python -m benchmarks.families                   8 of the 7B's layers
    python -m benchmarks.families 7b --layers 16 --attention cudnn
    python -m benchmarks.families tiny --tokens 1024 --sequence-length 64 --steps 3 --gemm-seconds 0.2

Options are those of benchmarks/train_step.py, which runs once for each family, and for Llama a second time at the end,
to see how far figures drift. A family's own work counts: rates are of the model's FLOPs against Llama's mean. The last
line is JSON.
"""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from benchmarks.commands import require_gpus, run_json, torchrun
from benchmarks.train_step import parse_options, report, run_config
from neox_core.config.families import FAMILIES
from neox_core.planning.plan import flops_per_token

DEFAULT = ("7b", "--layers", "8", "--micro-batch", "2", "--gemm-seconds", "2")
BASE = "llama"
ROW_SECONDS = 150
"""What one family may take at most."""


def main() -> None:
    """Run the benchmark and print its figures."""
    arguments = sys.argv[1:] or list(DEFAULT)
    require_gpus(1, parse_options(arguments).model)  # an error before anything runs
    others = [family for family in FAMILIES if family != BASE]
    found = {turn: _run(arguments, turn) for turn in tqdm([BASE, *others, f"{BASE} again"], unit=" runs")}
    base = (found[BASE]["model_flops"] + found[f"{BASE} again"]["model_flops"]) / 2
    ratios = {turn: round(result["model_flops"] / base, 4) for turn, result in found.items()}
    report({"device": found[BASE]["device"], "ratio_to_gemm": found[BASE]["ratio_to_gemm"]} | ratios)


def _run(arguments: list[str], turn: str) -> dict[str, Any]:
    options = [*arguments, "--family", turn.split()[0]]
    found = run_json(torchrun(1, "benchmarks.train_step", *options), ROW_SECONDS)
    if "failed" in found:
        sys.exit(f"{turn}: {found['failed']}")
    tqdm.write(f"{turn}: {found['tokens_per_second']} tokens/s, {found['peak_memory_gib']} GiB")
    config = run_config(parse_options(options), 1)
    work = flops_per_token(config.model, config.train.sequence_length, causal=True)
    return found | {"model_flops": found["tokens_per_second"] * work}


if __name__ == "__main__":
    main()
