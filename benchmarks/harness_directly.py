"""The harness called directly, without this package, against an evaluation by `llemma evaluate`: are they the same?

    llemma evaluate --model MODEL --data DATA --tasks gsm8k_solutions,mmlu_stem,gsm8k_cot --dtype float32 --out OUT
    python benchmarks/harness_directly.py OUT [--tasks gsm8k_cot] [--batch-size 8]

Of likelihoods it prints the largest difference in nats (1e-3 is the bound), of written answers how many texts are equal
and on how many of them the verdicts differ. It ends with 1 if a bound is broken. Both have to compute in float32: in
bf16 the padding of a batch moves a likelihood by more than that.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

BOUND = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="what llemma evaluate wrote")
    parser.add_argument("--tasks", help="default: all that were evaluated")
    parser.add_argument("--batch-size", type=int, default=8)
    asked = parser.parse_args()
    settings = json.loads((asked.out / "settings.json").read_text())
    tasks = asked.tasks.split(",") if asked.tasks else list(json.loads((asked.out / "results.json").read_text()))
    started = time.monotonic()
    direct = call_harness(asked.out, settings, tasks, asked.batch_size)
    sys.stdout.write(f"the harness took {time.monotonic() - started:.1f} s for all\n")
    broken = sum(compare(asked.out, task, direct["samples"][task]) for task in tasks)
    sys.exit(int(broken > 0))


def call_harness(out: Path, settings: dict[str, Any], tasks: list[str], batch_size: int) -> dict[str, Any]:
    """Its own loop, on the task files of the evaluation."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import lm_eval.tasks
    import torch

    manager = lm_eval.tasks.TaskManager(include_path=str(out / "tasks"), include_defaults=False)
    config = json.loads((Path(settings["model"]) / "config.json").read_text())
    arguments = {
        "pretrained": settings["model"], "dtype": settings["dtype"], "softmax_dtype": "float32",
        "max_length": config["max_position_embeddings"],
    }  # fmt: skip
    return lm_eval.simple_evaluate(
        model="hf", model_args=arguments, tasks=tasks, task_manager=manager, batch_size=batch_size,
        limit=settings["limit"], device="cuda" if torch.cuda.is_available() else "cpu",
        gen_kwargs={"max_gen_toks": settings["max_tokens"]}, bootstrap_iters=0,
    )  # fmt: skip


def compare(out: Path, task: str, samples: list[dict[str, Any]]) -> bool:
    """Print how a task's items differ; whether a bound is broken."""
    lines = (out / task / "items.jsonl").read_text(encoding="utf-8").strip("\n").split("\n")
    ours = {record["id"]: record for record in map(json.loads, lines) if "left_out" not in record}
    if any("greedy" in record for record in ours.values()):
        return compare_written(task, ours, samples)
    largest, differing = 0.0, 0
    for sample in samples:
        record, theirs = ours.get(sample["doc"]["id"]), [float(found[0]) for found in _pairs(sample["filtered_resps"])]
        if record is None:
            continue
        given = record.get("log_likelihoods") or [record["log_likelihood"]]
        largest = max(largest, *(abs(one - other) for one, other in zip(given, theirs, strict=True)))
        differing += "picked" in record and float(sample["acc"]) != float(record["picked"] == record.get("gold"))
    sys.stdout.write(f"{task}: {len(ours)} items, largest difference {largest:.1e} nats, {differing} verdicts differ\n")
    return largest > BOUND or differing > 0


def _pairs(responses: Any) -> list[Any]:
    """The harness unpacks the pair of an item with one request."""
    return [responses] if isinstance(responses[0], int | float | str) else list(responses)


def compare_written(task: str, ours: dict[str, Any], samples: list[dict[str, Any]]) -> bool:
    """As `compare`; a verdict is compared where the text is the same."""
    same, differing, judged = set(), 0, 0
    for sample in samples:
        record = ours[sample["doc"]["id"]]
        if record["greedy"][0]["text"] != sample["resps"][0][0]:
            continue
        same.add(record["id"])
        if (name := sample["filter"]) in record.get("harness", {}):
            judged += 1
            differing += float(sample["exact_match"]) != record["harness"][name]
    sys.stdout.write(
        f"{task}: {len(same)} of {len(ours)} texts equal; {differing} of {judged} of its verdicts differ\n"
    )
    return differing > 0 or len(same) < len(ours)


if __name__ == "__main__":
    main()
