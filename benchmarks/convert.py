"""Conversion at real shapes: rate compared with cp, peak memory, and a bit-identical way back.

    python -m benchmarks.convert --folder /scratch/convert

Makes 7B- and 34B-shaped Meta checkpoints with fewer layers (random bits, bf16, 1 and 4 shards), converts them to TP=2
and TP=8 and back to Meta's format, copies them with cp before and after on the same disk, and does the same conversion
as GPT-NeoX's scripts do it: load all, then write. Each reader starts with the source out of the page cache, each
writer ends with its files on the disk. Memory is the process's own (anonymous) beyond what the interpreter had,
sampled. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.export import export_meta
from neox_core.checkpoint.conversion.proof import prove_conversion
from neox_core.checkpoint.formats.meta_params import meta_params
from neox_core.checkpoint.formats.model_files import shard_name
from neox_core.checkpoint.formats.model_weights import layouts_of
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.checkpoint.formats.tensor_map import Form
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.storage.tensor_writer import StreamedTensor, write_torch

SHAPES = {"7b": (4096, 32, 32, 11008, 32016, 1, 2, 20), "34b": (8192, 64, 8, 22016, 32000, 4, 8, 6)}
"""Hidden size, heads, KV heads, MLP width, vocabulary, Meta's shards, tensor parallelism and layers to measure with, of
the CodeLlama models."""


@dataclass
class Measured:
    """One timed piece of work."""

    seconds: float = 0.0
    peak_extra_gib: float = 0.0


def main() -> None:
    arguments = parse()
    results = {shape: measure(shape, arguments) for shape in arguments.shape}
    worst = {
        "rate_vs_cp": min(result["rate_vs_cp"] for result in results.values()),
        "peak_extra_gib": max(result["peak_extra_gib"] for result in results.values()),
        "round_trip_identical": all(result["round_trip_identical"] for result in results.values()),
    }
    show(json.dumps(worst | {"shapes": results}))


def measure(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one shape."""
    hidden, heads, kv_heads, ffn, vocab, shards, ranks, layers = SHAPES[shape]
    model = ModelConfig(
        num_layers=arguments.layers or layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=ffn,
        vocab_size=vocab,
        rope_theta=1e6,
    )
    folder = arguments.folder / shape
    source, neox, back = folder / "source", folder / "neox", folder / "back"
    make_source(source, model, shards)
    size = bytes_of(source)
    show(f"{shape}-shaped, {model.num_layers} layers, {size / 1e9:.2f} GB in {shards} shards")

    copies = [timed_cp(source, folder / "copy")]
    with measured(source) as forward:
        convert(source, neox, model, ParallelConfig(tensor=ranks), bar("convert"))
    copies.append(timed_cp(source, folder / "copy"))
    proof = Measured()
    if arguments.prove:
        with measured(source) as proof:
            found = prove_conversion(source, NeoxCheckpoint(neox), model, bar("prove"))
        row(f"proof, largest {found['largest_layer_difference']:.1e} in {found['worst_layer']}", size, proof)
    with measured(neox) as backward:
        export_meta(neox, back, model, shards, bar("back"))
    identical = same(source, back, shards)
    shutil.rmtree(back)
    shutil.rmtree(neox)
    row("cp before", size, Measured(copies[0]))
    row(f"Meta -> NeoX TP={ranks}", size, forward)
    row("cp after", size, Measured(copies[1]))
    row(f"NeoX TP={ranks} -> Meta", size, backward)
    if arguments.naive:
        row("load all, then write", size, naive(source, folder / "naive", ranks))
    shutil.rmtree(source)
    return {
        "rate_vs_cp": round(min(sum(copies) / 2 / way.seconds for way in (forward, backward)), 3),
        "peak_extra_gib": round(max(forward.peak_extra_gib, backward.peak_extra_gib), 3),
        "proof_peak_gib": round(proof.peak_extra_gib, 3),
        "round_trip_identical": identical,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-convert"), help="on the disk to measure")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--layers", type=int, help="default: 20 of 7B's (8.6 GB), 6 of 34B's (9.4 GB)")
    parser.add_argument("--prove", action="store_true", help="compare every layer with transformers too")
    parser.add_argument("--no-naive", dest="naive", action="store_false", help="leave out the method that fills memory")
    return parser.parse_args()


def make_source(folder: Path, model: ModelConfig, shards: int) -> None:
    """Random weights of magnitudes around 2^-6, either sign; norms are ones."""
    folder.mkdir(parents=True)
    generator = np.random.Generator(np.random.SFC64(1))

    def fill(out: Tensor, first: int) -> None:
        if len(out) == 1:
            out.fill_(1.0)
            return
        bits = generator.integers(0, 2**63, (out.numel() * 2 + 7) // 8, dtype=np.int64).view(np.int16)[: out.numel()]
        bits = (bits & np.int16(-0x7F81)) | np.int16(0x3C00)
        out.view(torch.int16).copy_(torch.from_numpy(bits).view(out.shape))

    for shard in range(shards):
        tensors = [
            StreamedTensor(layout.name, layout.shape, torch.bfloat16, fill)
            for _, layout in layouts_of(model, Form.META, shards, shard)
        ]
        with (folder / shard_name(shard)).open("wb") as file, ThreadPoolExecutor(1) as in_order:
            write_torch(file, tensors, in_order)
            os.fsync(file.fileno())
    (folder / "params.json").write_text(json.dumps(meta_params(model)))


def timed_cp(source: Path, target: Path) -> float:
    forget(source)
    started = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


@contextmanager
def measured(source: Path) -> Iterator[Measured]:
    """Time and peak anonymous memory of a block that reads `source`."""
    forget(source)
    result, done = Measured(), threading.Event()
    before = anonymous_bytes()

    def sample() -> None:
        while not done.wait(0.01):
            result.peak_extra_gib = max(result.peak_extra_gib, (anonymous_bytes() - before) / 2**30)

    sampler = threading.Thread(target=sample)
    sampler.start()
    started = time.monotonic()
    try:
        yield result
    finally:
        result.seconds = time.monotonic() - started
        done.set()
        sampler.join()


def naive(source: Path, target: Path, ranks: int) -> Measured:
    """The seed's way: every shard in memory, whole tensors, then rank after rank. Without its permutations."""
    rows = ("wq", "wk", "wv", "w1", "w3", "output")
    with measured(source) as result:
        shards = [torch.load(path, weights_only=True) for path in sorted(source.glob("*.pth"))]
        whole: dict[str, Tensor] = {}
        for name in list(shards[0]):  # kinder than the scripts: what is merged is let go
            parts = [shard.pop(name) for shard in shards]
            dim = 0 if name.split(".")[-2] in rows else 1
            whole[name] = torch.cat(parts, dim) if parts[0].dim() > 1 and len(parts) > 1 else parts[0]
        del shards, parts
        target.mkdir()
        for rank in range(ranks):
            module = {
                name: value.chunk(ranks, 1 if name.split(".")[-2] in ("wo", "w2") else 0)[rank].clone()
                if value.dim() > 1
                else value
                for name, value in whole.items()
            }
            torch.save({"module": module}, target / f"mp_rank_{rank:02d}_model_states.pt")
        subprocess.run(["sync", "-f", str(target)], check=True)
    shutil.rmtree(target)
    return result


def same(first: Path, second: Path, shards: int) -> bool:
    """Whether all tensors are equal bit for bit, read by torch."""
    for shard in range(shards):
        a, b = (torch.load(folder / shard_name(shard), mmap=True, weights_only=True) for folder in (first, second))
        if a.keys() != b.keys():
            return False
        if not all(torch.equal(a[name].view(torch.int16), b[name].view(torch.int16)) for name in a):
            return False
    return True


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bar(what: str) -> Callable[[float, str], None]:
    def progress(share: float, text: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{what} {share:4.0%} {text}   ")

    return progress


def row(what: str, size: int, measured: Measured) -> None:
    memory = f"{measured.peak_extra_gib:6.2f} GiB" if measured.peak_extra_gib else ""
    show(f"{what:32} {measured.seconds:7.1f} s {size / measured.seconds / 1e6:7.0f} MB/s {memory}")


def show(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
