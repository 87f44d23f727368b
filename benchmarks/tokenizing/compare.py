"""Tokenization speed: our encoder against SentencePiece's, and our stage against GPT-NeoX's way of doing it.

    python benchmarks/tokenize.py ../shared/data/mini-proof-pile ../shared/data/tokenizers/mistral-v1.model

All runs are of the same text, in turn, each in a fresh process. Figures are MB of UTF-8 text per second: of CPU (user
and system, with all child processes) and by the wall, the median of several turns. The last line is JSON, of the
figures per CPU second.

The encoders are timed from the first text on, cold. The stages (`neox_way.py`, `our_way.py`) are
whole commands: the start of the interpreter, imports, and the tokenizer's loading count.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import sentencepiece
import zstandard

from neox_core.data.indexed import IndexedDataset
from neox_core.data.tokenization.part_settings import TokenizerSettings
from neox_core.data.tokenization.tokenizer import Tokenizer
from neox_core.errors import DataError

_MB = 1e6
_ROOT = Path(__file__).parents[2]


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
    return _timed(Tokenizer(TokenizerSettings(work.model)).encode, texts)


def run_stage(way: str, work: Work, **variables: str) -> tuple[float, float]:
    """CPU and wall seconds of one of the commands next to this file: zstd in, .bin and .idx out."""
    script = Path(__file__).with_name(f"{way}_way.py")
    output = work.output / way
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    command = [sys.executable, script, work.model, str(work.workers), output / "all", *work.files]
    # Neither calls numpy's BLAS, whose threads are started again in every fork.
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "OPENBLAS_NUM_THREADS": "1"} | variables
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled once, not at every start
    started = time.perf_counter()
    process = os.spawnve(os.P_NOWAIT, sys.executable, command, environment)
    _, status, usage = os.wait4(process, 0)  # of the process and of the children that it waited for
    if status:
        raise DataError(f"{script} failed (wait status {status}): see its message above")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - started


def identical(work: Work) -> bool:
    """Whether each of our ids is SentencePiece's, and the two stages' files agree."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(work.model))
    ours = IndexedDataset(work.output / "our" / "all")
    texts = list(texts_of(work.files))
    same = len(ours) == len(texts) and all(
        ours[i].tolist() == [*reference.encode(text), reference.eos_id()] for i, text in enumerate(texts)
    )
    files = [[(work.output / way / f"all.{kind}").read_bytes() for way in ("our", "neox")] for kind in ("bin", "idx")]
    return same and all(first == second for first, second in files)


def _timed(encode: Callable[[str], Any], texts: list[str]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    for text in texts:
        encode(text)
    return time.process_time() - cpu, time.perf_counter() - wall


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
    shared = _ROOT.parent / "shared" / "data"
    parser.add_argument("text", type=Path, nargs="?", default=shared / "mini-proof-pile", help="<source>/train/*.zst")
    parser.add_argument("model", type=Path, nargs="?", default=shared / "tokenizers" / "mistral-v1.model")
    parser.add_argument("--megabytes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    files, size = _choose(arguments.text, arguments.megabytes)
    out = sys.stdout
    out.write(f"{size / _MB:.1f} MB of text in {len(files)} files, {arguments.workers} workers\n")
    out.write(f"{'':24} MB per CPU second  MB per second\n")
    with tempfile.TemporaryDirectory() as folder:
        work = Work(files, arguments.model, arguments.workers, Path(folder))
        contestants: dict[str, Callable[[], tuple[float, float]]] = {
            "encode, SentencePiece": partial(_in_fresh_process, encode_sentencepiece, work),
            "encode, ours": partial(_in_fresh_process, encode_ours, work),
            "stage, GPT-NeoX's way": partial(run_stage, "neox", work),
            "the same, torch imported": partial(run_stage, "neox", work, IMPORT_TORCH="1"),
            "stage, ours": partial(run_stage, "our", work),
        }
        turns = [[contest() for contest in contestants.values()] for _ in range(arguments.repeats)]
        cpu, walls = ([median(runs) for runs in zip(*kind, strict=True)] for kind in _by_kind(turns))
        for name, cpu_seconds, wall in zip(contestants, cpu, walls, strict=True):
            out.write(f"{name:24} {size / _MB / cpu_seconds:17.1f} {size / _MB / wall:14.1f}\n")
        out.write(f"by the wall: encode {walls[0] / walls[1]:.2f} times, stage {walls[2] / walls[4]:.2f} times\n")
        out.write(f"stage, to GPT-NeoX's way with torch imported: {cpu[3] / cpu[4]:.2f} times\n")
        result = {
            "encode_vs_sentencepiece": round(cpu[0] / cpu[1], 2),
            "stage_vs_neox": round(cpu[2] / cpu[4], 2),
            "identical_ids": identical(work),
        }
    out.write(json.dumps(result) + "\n")


def _by_kind(turns: list[list[tuple[float, float]]]) -> Iterator[list[list[float]]]:
    """The turns' CPU seconds, then their seconds by the wall."""
    return ([[times[kind] for times in turn] for turn in turns] for kind in (0, 1))
