"""Measures a node of any number of GPUs, call by call, and holds the planner's predictions against what it finds.

    python -m benchmarks.node results.jsonl                 # as many rows as fit 9 minutes; again: those that are left
    python -m benchmarks.node results.jsonl --minutes 55
    python -m benchmarks.node results.jsonl --table         # what there is, measured and predicted
    python -m benchmarks.node toy.jsonl --toy               # two ranks on CPUs, to try it

First the node itself (`llemma plan --calibrate`: products, attention and copies on all GPUs at once, exchanges), whose
figures also go to `results.hardware.json`, for `llemma plan --hardware`. Then one training step after the other
(benchmarks/train_step.py): one GPU, and every layout that divides the GPUs, of the 7B (all layers where memory allows)
and of a slice of the 34B, with the micro batch and recomputation that the planner takes for the fastest, with CUDA
graphs and overlap; then each without one of them, and pipeline stages in the other schedule; then the peers
(benchmarks/peers.py). Each row is one line of JSON, written when it is there; a row that failed is not tried again
unless `--retry` is given. A file is of one node.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.commands import at_least, positive, require_gpus, run_json, torchrun, why
from benchmarks.node_rows import Row, fastest, limit_seconds, rows, table
from benchmarks.peers import titan_rows
from benchmarks.train_step import parse_options, run_config
from neox_core.errors import ConfigError
from neox_core.planning.calibration import calibrate
from neox_core.planning.hardware import Hardware, load_hardware

MODELS = ("7b", "34b-slice")
PEER_SECONDS, TITAN_SECONDS = 480, 240
"""What one of the peers' rows may take at most; as of ours, none is begun with less time left."""


@dataclass(frozen=True)
class Peer:
    """A measurement of what others offer."""

    key: str
    command: tuple[str, ...]
    limit: float


def main() -> None:
    """Measure what is not in the file yet, for as long as there is time, and print the table."""
    options = _options()
    deadline = time.monotonic() + 60 * options.minutes
    if not options.table:
        require_gpus(options.gpus or 1, "tiny" if options.toy else MODELS[0])
        _require_writable(options.results)
    gpus = options.gpus or torch.cuda.device_count() or 2
    results = _read(options.results)
    hardware = _hardware(options, gpus, results)
    left = [] if options.table else _measure_rows(options, gpus, hardware, results, deadline)
    sys.stdout.write(table(list(results.values()), hardware) + "\n")
    if left:
        sys.stdout.write(f"{len(left)} rows are left: run the same command again{_longer(left, options.minutes)}\n")


def _longer(left: list[float], minutes: float) -> str:
    """What to change for rows that this much time never suffices for."""
    needed = math.ceil(max(left) / 60) + 1  # one for all that comes before the first row
    return f", with --minutes {needed}: the longest may take so long" if needed > minutes else ""


def _measure_rows(
    options: argparse.Namespace, gpus: int, hardware: Hardware, results: dict[str, Any], deadline: float
) -> list[float]:
    """Measure rows that are not there and add them; returns the seconds that those may take for which there was no
    time."""
    left = list[float]()
    models = ("tiny",) if options.toy else MODELS
    peers = [peer for model in (() if options.toy else MODELS) for peer in _peers(model, gpus, hardware)]
    wanted: list[Row | Peer] = [*rows(gpus, hardware, models, options.toy), *peers]
    wanted = [row for row in wanted if options.only in row.key]
    if not wanted:
        sys.exit(f"no row's name contains {options.only!r}: names are the keys of {options.results}")
    for row in sorted(wanted, key=lambda row: row.key in results):  # what fails again and again comes last
        if row.key in results and not ("failed" in results[row.key] and options.retry):
            continue
        limit = row.limit if isinstance(row, Peer) else limit_seconds(row, hardware)
        if time.monotonic() + limit > deadline:
            left.append(limit)
            continue
        result = _measure_peer(row) if isinstance(row, Peer) else _measure(row, limit)
        _append(options.results, result)
        results[row.key] = result
        found = why(result) if "failed" in result else result.get("tokens_per_second", result.get("peers"))
        sys.stdout.write(f"{row.key}: {found}\n")
        sys.stdout.flush()
    return left


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="file to which rows are added")
    parser.add_argument("--minutes", type=positive, default=9.0, help="for all rows of this call")
    parser.add_argument("--gpus", type=at_least(1), help="fewer than there are")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose key contains it, such as 34b-slice")
    parser.add_argument("--retry", action="store_true", help="measure rows again that failed")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    parser.add_argument("--toy", action="store_true", help="a model of two layers, on CPUs where there is no GPU")
    options = parser.parse_args()
    if options.results.is_dir() or not options.results.parent.is_dir():
        parser.error(f"{options.results} must be a file, in a folder that is there")
    return options


def _require_writable(path: Path) -> None:
    """End with a line that says so where it is not, before minutes are spent on a row."""
    try:
        path.open("ab").close()
    except OSError as error:
        sys.exit(f"{path} cannot be written ({error.strerror}): give another file")


def _read(path: Path) -> dict[str, Any]:
    """Rows by key. Of those that are there more than once, the last counts; a line that was cut off does not."""
    found = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            sys.stderr.write(f"{path}: a line is incomplete, as after a call that was ended: {line[:60]}\n")
            continue
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            sys.exit(f"{path} holds a line that is no row of this benchmark: {line[:60]}: give another file")
        found[row["key"]] = row
    return found


def _append(path: Path, result: dict[str, Any]) -> None:
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        between = b"" if file.read(1) in (b"", b"\n") else b"\n"  # what was cut off stays a line of its own
        file.write(between + json.dumps(result).encode() + b"\n")


def _hardware(options: argparse.Namespace, gpus: int, results: dict[str, Any]) -> Hardware:
    """This node's figures, measured once; the results must be of this node too."""
    path = options.results.with_suffix(".hardware.json")
    if options.table and not path.exists():
        sys.exit(f"{path}, the node's figures, is missing: they are measured by a call without --table")
    here = None if options.table else _card()
    if here and not path.exists():
        _require_device(here, options.results, results)
        name = "tiny" if options.toy else "7b"
        shapes = run_config(parse_options([name, "--micro-batch", "2"]), gpus)
        calibrate(shapes, seconds=0.2 if options.toy else 8.0).save(path)
    try:
        hardware = load_hardware(str(path))
    except ConfigError as error:
        sys.exit(f"{error}; without this file, the same command measures them again")
    if here and hardware.name != here:
        sys.exit(f"{path} is of {hardware.name}, and this node has {here}: give another file of results")
    _require_device(hardware.name, options.results, results)
    return hardware


def _require_device(name: str, path: Path, results: dict[str, Any]) -> None:
    """End with a line that says so where a row was measured on another: predictions are of one."""
    for key, row in results.items():
        if row.get("device", name) != name:
            sys.exit(
                f"{path} holds a row of {row['device']} ({key}), and the figures here are of {name}: give another file "
                f"of results, or put that node's {path.with_suffix('.hardware.json').name} next to it"
            )


def _card() -> str:
    """This node's. Another process asks, since who asks may keep some of the GPU's memory, which rows want all of."""
    if not torch.cuda.device_count():
        return "cpu"
    program = "import json, torch; print(json.dumps({'name': torch.cuda.get_device_name()}))"
    found = run_json([sys.executable, "-c", program])
    return str(found["name"]) if "name" in found else sys.exit(f"torch does not reach the GPUs: {found['failed']}")


def _measure(row: Row, limit: float) -> dict[str, Any]:
    found = run_json(torchrun(row.gpus, "benchmarks.train_step", *row.arguments), limit)
    return found | {"key": row.key, "gpus": row.gpus, "arguments": row.arguments, "time": time.time()}


def _peers(model: str, gpus: int, hardware: Hardware) -> Iterator[Peer]:
    """transformers on one GPU, in as many layers as fit with nothing computed again; torchtitan on several, a layout at
    a time."""
    alone = fastest(model, 1, 1, 1, hardware, modes=("none",))
    if alone is not None:
        layers, micro_batch = alone.config.model.num_layers, alone.config.train.micro_batch_size
        sizes = ("--layers", str(layers), "--micro-batch", str(micro_batch))
        yield Peer(f"peers of {model}", (sys.executable, "-m", "benchmarks.peers", model, *sizes), PEER_SECONDS)
    for name, row in titan_rows(gpus).items() if gpus > 1 else ():
        command = torchrun(gpus, "benchmarks.torchtitan_step", model, "--micro-batch", "2", *row)
        yield Peer(f"{name}, {model}", tuple(command), TITAN_SECONDS)


def _measure_peer(peer: Peer) -> dict[str, Any]:
    found = run_json(peer.command, peer.limit)
    rates = found.get("tokens_per_second")
    named: dict[str, Any] = {"peers": rates if isinstance(rates, dict) else {peer.key: rates}} if rates else {}
    failed = {"failed": found["failed"]} if "failed" in found else {}
    return named | failed | {"key": peer.key, "time": time.time()}


if __name__ == "__main__":
    main()
