# ruff: noqa: E402
"""Tokenization speed: our encoder against SentencePiece's, and our stage against GPT-NeoX's way of doing it.

    python benchmarks/tokenize.py ../shared/data/mini-proof-pile ../shared/data/tokenizers/mistral-v1.model

All runs are of the same text, in turn, each in a fresh process. Figures are MB of UTF-8 text per second: of CPU (user
and system, with all child processes) and by the wall. The last line is JSON, of the figures per CPU second.

GPT-NeoX's way is written here from its description: one writer, a pool of encoders fed document by document with JSON
lines, one `add_item` per document of a list of ids.
"""

from __future__ import annotations

import os
import sys

# A script's folder comes first, where this file would stand for the standard library's own `tokenize`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import io
import json
import multiprocessing
import resource
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import zstandard

from neox_core.config import StorageConfig, TokenizerConfig
from neox_core.data.indexed import IndexedDataset
from neox_core.data.merge import merge
from neox_core.data.part import PartSettings
from neox_core.data.part_files import PartPaths
from neox_core.data.readers import InputFile
from neox_core.data.tokenizer import Tokenizer
from tasks.tokenize_pool import made_in_processes

_MB = 1e6


@dataclass(frozen=True)
class Work:
    """What every contestant does."""

    files: tuple[Path, ...]
    model: Path
    workers: int
    output: Path


def texts_of(files: tuple[Path, ...]) -> Iterator[str]:
    """All texts, in order."""
    return (json.loads(line)["text"] for line in lines_of(files))


def lines_of(files: tuple[Path, ...]) -> Iterator[str]:
    """All lines, through the reader that GPT-NeoX uses."""
    for path in files:
        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as reader:
            yield from io.TextIOWrapper(reader, encoding="utf-8", newline="\n")


def encode_sentencepiece(work: Work) -> tuple[float, float]:
    """CPU and wall seconds of SentencePiece's own encode, text by text."""
    texts = list(texts_of(work.files))
    return _timed(sentencepiece.SentencePieceProcessor(model_file=str(work.model)).encode, texts)


def encode_ours(work: Work) -> tuple[float, float]:
    """CPU and wall seconds of our encode, text by text, starting cold."""
    texts = list(texts_of(work.files))
    return _timed(Tokenizer(TokenizerConfig(model=work.model)).encode, texts)


def stage_neox(work: Work) -> tuple[float, float]:
    """zstd in, .bin and .idx out, as GPT-NeoX's preprocess_data does it."""
    cpu, wall = _cpu(), time.perf_counter()
    sizes = []
    with (
        multiprocessing.get_context("spawn").Pool(work.workers, _start_encoder, (work.model,)) as pool,
        (work.output / "neox.bin").open("wb") as file,
    ):
        for ids in pool.imap(_encode_line, lines_of(work.files), chunksize=25):
            file.write(np.array(ids, dtype=np.uint16).tobytes(order="C"))
            sizes.append(len(ids))
        pool.close()
        pool.join()
    offsets = np.cumsum([0, *sizes[:-1]], dtype=np.int64) * 2
    with (work.output / "neox.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(sizes), len(sizes) + 1))
        file.write(np.array(sizes, "<i4").tobytes() + offsets.tobytes() + np.arange(len(sizes) + 1).tobytes())
    return _cpu() - cpu, time.perf_counter() - wall


def stage_ours(work: Work) -> tuple[float, float]:
    """The same, our way: parts, verification against SentencePiece and merge included."""
    cpu, wall = _cpu(), time.perf_counter()
    settings = PartSettings(
        TokenizerConfig(model=work.model), StorageConfig(url="s3://unused/x"), "text", False, False, (), 30
    )
    files = [InputFile("all", "train", f"{n}-{p.name}", str(p), p.stat().st_size) for n, p in enumerate(work.files)]
    for _ in made_in_processes(files, settings, work.output, work.workers):
        pass
    merge([PartPaths.of(file, work.output).prefix for file in files], work.output / "ours", work.workers)
    return _cpu() - cpu, time.perf_counter() - wall


def identical(work: Work) -> bool:
    """Whether each of our ids is SentencePiece's, and the two stages' files agree."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(work.model))
    ours = IndexedDataset(work.output / "ours")
    texts = list(texts_of(work.files))
    same = len(ours) == len(texts) and all(
        ours[i].tolist() == [*reference.encode(text), reference.eos_id()] for i, text in enumerate(texts)
    )
    names = [("ours.bin", "neox.bin"), ("ours.idx", "neox.idx")]
    return same and all((work.output / a).read_bytes() == (work.output / b).read_bytes() for a, b in names)


def _start_encoder(model: Path) -> None:
    global _encoder
    _encoder = sentencepiece.SentencePieceProcessor(model_file=str(model))


def _encode_line(line: str) -> list[int]:
    return [*_encoder.encode(json.loads(line)["text"]), _encoder.eos_id()]


def _timed(encode: Callable[[str], Any], texts: list[str]) -> tuple[float, float]:
    cpu, wall = _cpu(), time.perf_counter()
    for text in texts:
        encode(text)
    return _cpu() - cpu, time.perf_counter() - wall


def _cpu() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _in_fresh_process(function: Callable[[Work], Any], work: Work) -> Any:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_answer, args=(function, work, answers))
    process.start()
    result = answers.get()
    process.join()
    return result


def _answer(function: Callable[[Work], Any], work: Work, answers: Any) -> None:
    answers.put(function(work))


def _choose(folder: Path, megabytes: float) -> tuple[tuple[Path, ...], int]:
    """Training files of all sources in turn, up to that much text, and the bytes of their text."""
    by_source = [sorted(source.glob("train/*.jsonl.zst")) for source in sorted(folder.iterdir()) if source.is_dir()]
    chosen: list[Path] = []
    size = 0
    for turn in range(max(map(len, by_source))):
        for paths in by_source:
            if turn < len(paths) and size < megabytes * _MB:
                chosen.append(paths[turn])
                size += sum(len(text.encode()) for text in texts_of((paths[turn],)))
    return tuple(chosen), size


def main() -> None:
    """Run all contestants in turn and print their speeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(__file__).parents[2] / "shared" / "data"
    parser.add_argument("text", type=Path, nargs="?", default=shared / "mini-proof-pile", help="<source>/train/*.zst")
    parser.add_argument("model", type=Path, nargs="?", default=shared / "tokenizers" / "mistral-v1.model")
    parser.add_argument("--megabytes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    files, size = _choose(arguments.text, arguments.megabytes)
    out = sys.stdout
    out.write(f"{size / _MB:.1f} MB of text in {len(files)} files, {arguments.workers} workers\n")
    out.write(f"{'':24} MB per CPU second  MB per second\n")
    with tempfile.TemporaryDirectory() as folder:
        work = Work(files, arguments.model, arguments.workers, Path(folder))
        cpu: dict[str, float] = {}
        for contestant in (encode_sentencepiece, encode_ours, stage_neox, stage_ours):
            cpu[contestant.__name__], wall = _in_fresh_process(contestant, work)
            speed = size / _MB / cpu[contestant.__name__]
            out.write(f"{contestant.__name__:24} {speed:17.1f} {size / _MB / wall:14.1f}\n")
        result = {
            "encode_vs_sentencepiece": round(cpu["encode_sentencepiece"] / cpu["encode_ours"], 2),
            "stage_vs_neox": round(cpu["stage_neox"] / cpu["stage_ours"], 2),
            "identical_ids": identical(work),
        }
    out.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
