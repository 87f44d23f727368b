"""Start-up of the training data against index arrays as Megatron and GPT-NeoX build them, and the time of a read.

`locate_us` is the time to find a sequence's documents in the largest index, at places that were not looked at before.

    python benchmarks/sampler.py [--documents 100000000] [--tokens 1000000000000] [--folder /tmp]

It makes a synthetic dataset (a true .idx of 20 bytes a document, a sparse .bin), opens it in fresh processes at three
sizes, builds the index arrays at the two smaller ones, removes everything, and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SEQUENCE = 4096
CHUNK = 4_000_000
HEADER = struct.Struct("<9sQBQQ")
U16 = 8
READ_TOKENS = 32_000_000
READS = 5_000
LOCATED = 4_000
REPEATS = 3


def make_dataset(prefix: Path, documents: int, tokens: int) -> None:
    """Documents of even length but for a random part, `tokens` in all; the ids are holes in a sparse file."""
    generator = np.random.default_rng(0)
    mean = tokens // documents
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(HEADER.pack(b"MMIDIDX\x00\x00", 1, U16, documents, documents + 1))
        file.truncate(HEADER.size + documents * 20 + 8)
        offset = 0
        for first in range(0, documents, CHUNK):
            count = min(CHUNK, documents - first)
            sizes = generator.integers(1, 2 * mean, count, dtype=np.int64)
            ends = offset + np.cumsum(sizes) * 2
            for place, values in (
                (4 * first, sizes.astype("<i4")),
                (4 * documents + 8 * first, (ends - sizes * 2).astype("<i8")),
                (12 * documents + 8 * first, np.arange(first, first + count, dtype="<i8")),
            ):
                file.seek(HEADER.size + place)
                values.tofile(file)
            offset = int(ends[-1])
        file.seek(HEADER.size + 20 * documents)
        np.array([documents], dtype="<i8").tofile(file)
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(offset)


def open_ours(prefix: Path) -> dict[str, Any]:
    """Open a mixture of the dataset with itself and take the first and a late batch."""
    started = time.perf_counter()
    from neox_core.data.dataset import MixtureDataset, SequenceDataset
    from neox_core.data.mixture import Mixture

    imported = time.perf_counter()
    sources = {name: SequenceDataset(prefix, SEQUENCE, key=f"1234/{name}/train") for name in ("a", "b")}
    dataset = MixtureDataset(Mixture({"a": 2, "b": 1}), sources)
    batches = [np.arange(first, first + 4) for first in (0, 10**8)]
    for indices in batches:
        dataset.sequences(indices)
    done, peak = time.perf_counter(), memory()["VmHWM"]
    for indices in batches:
        dataset.positions(indices)
    found = {
        "import_seconds": imported - started,
        "open_seconds": done - imported,
        "peak_mb": peak,
        # Mapped pages of the .bin, which are page cache that all processes share, count as file-backed memory.
        "masked_peak_mb": memory()["VmHWM"],
        "private_mb": memory()["RssAnon"],
        **usage(),
    }
    last = sources["a"].num_tokens // SEQUENCE
    places = np.random.default_rng(2).integers(0, last, LOCATED).tolist()
    return {**found, "locate_us": _median_us(sources["a"].documents, places)}


def usage() -> dict[str, float]:
    """The time now, and the CPU seconds of this process up to now."""
    return {"ended": time.time(), "cpu_seconds": time.process_time()}


def memory() -> dict[str, float]:
    """This process's resident memory in MB: VmHWM (peak), RssAnon (private), ..."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 / 1e6 for line in lines if line[0].startswith(("VmHWM", "Rss"))}


def build_index_arrays(prefix: Path) -> dict[str, Any]:
    """What Megatron's GPTDataset builds and keeps on disk for one epoch, in vectorised numpy.

    The shuffled document index, the sample index (document and offset at which each sequence starts; a compiled loop
    there, a cumulative sum and a binary search here), and the shuffled order of the samples.
    """
    from neox_core.data.indexed import IndexedDataset

    started = time.perf_counter()
    dataset = IndexedDataset(prefix)
    sizes = np.array(dataset.sizes)
    generator = np.random.RandomState(1234)
    documents = np.arange(len(sizes), dtype=np.int32)
    generator.shuffle(documents)
    ends = np.cumsum(sizes[documents], dtype=np.int64)
    starts = np.arange((int(ends[-1]) - 1) // SEQUENCE + 1, dtype=np.int64) * SEQUENCE
    rows = np.searchsorted(ends, starts, side="right")
    samples = np.stack([rows, starts - (ends[rows] - sizes[documents[rows]])], axis=1)
    order = np.arange(len(samples) - 1, dtype=np.int64)
    generator.shuffle(order)
    for name, array in (("documents", documents), ("samples", samples), ("order", order)):
        np.save(prefix.with_suffix(f".{name}.npy"), array)
    return {"open_seconds": time.perf_counter() - started, "array_mb": _megabytes(documents, samples, order)}


def _megabytes(*arrays: np.ndarray) -> float:
    return sum(array.nbytes for array in arrays) / 1e6


def in_fresh_process(what: str, prefix: Path) -> dict[str, Any]:
    """The fastest of some runs, each in a process of its own, with the time from its start and its peak memory."""
    command = [sys.executable, __file__, "--measure", what, "--prefix", str(prefix)]
    results = []
    for _ in range(REPEATS):
        started = time.time()
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        results.append({**result, "process_seconds": result["ended"] - started})
    return min(results, key=lambda result: result["process_seconds"])


def measure(what: str, prefix: Path) -> dict[str, Any]:
    """In the fresh process."""
    result = open_ours(prefix) if what == "ours" else build_index_arrays(prefix)
    return {"peak_mb": memory()["VmHWM"], **usage(), **result}


def time_reads(folder: Path) -> dict[str, float]:
    """Median microseconds to read one sequence, and its positions, at random places of real files in page cache.

    The files have documents of 1,000 tokens, of 10 and of a million.
    """
    from neox_core.data.dataset import SequenceDataset
    from neox_core.data.indexed import IndexedWriter
    from neox_core.data.order_version import ORDER_VERSIONS

    generator, found = np.random.default_rng(1), {}
    for name, size in (("", 1_000), ("_of_tiny", 10), ("_of_long", 1_000_000)):
        with IndexedWriter(folder / f"read{name}", np.dtype("<u2")) as writer:
            for document in generator.integers(0, 32_000, (READ_TOKENS // size, size), dtype=np.uint16):
                writer.add_document(document)
        indices = generator.integers(0, 10 * READ_TOKENS // SEQUENCE, READS).tolist()
        for order in ORDER_VERSIONS:
            dataset = SequenceDataset(folder / f"read{name}", SEQUENCE, key="1234/read/train", order=order)
            found[f"read{name}_us_of_order_{order}"] = _median_us(dataset.__getitem__, indices)
        found[f"positions{name}_us"] = _median_us(dataset.positions, indices)
    return found


def _median_us(call: Any, indices: list[int]) -> float:
    times = []
    for index in indices:
        started = time.perf_counter()
        call(index)
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def compare(documents: int, tokens: int, folder: Path) -> dict[str, Any]:
    """Measure at 1/100, 1/10 and the whole of the documents; index arrays at the first two."""
    ours, arrays = {}, {}
    for divisor in (100, 10, 1):
        prefix = folder / f"synthetic-{divisor}"
        count = documents // divisor
        make_dataset(prefix, count, tokens // divisor)
        ours[count] = in_fresh_process("ours", prefix)
        _say(f"{count:>13,} documents, {tokens // divisor:.0e} tokens: ours   ", ours[count])
        if divisor > 1:
            arrays[count] = in_fresh_process("arrays", prefix)
            _say(f"{count:>13,} documents, {tokens // divisor:.0e} tokens: arrays ", arrays[count])
        for path in folder.glob(f"{prefix.name}.*"):
            path.unlink()
    largest, smaller = ours[documents], arrays[documents // 10]
    return {
        "documents": documents,
        "tokens": tokens,
        "startup_seconds": round(largest["process_seconds"], 3),
        "startup_cpu_seconds": round(largest["cpu_seconds"], 3),
        "open_seconds": round(largest["open_seconds"], 3),
        "peak_mb": round(largest["peak_mb"], 1),
        "private_mb": round(largest["private_mb"], 1),
        "masked_peak_mb": round(largest["masked_peak_mb"], 1),
        "locate_us": round(largest["locate_us"], 1),
        "growth_of_open_seconds_over_100_times_the_documents": round(
            largest["open_seconds"] / ours[documents // 100]["open_seconds"], 2
        ),
        "index_arrays_at_a_tenth": {
            name: round(smaller[name], 2) for name in ("process_seconds", "cpu_seconds", "peak_mb", "array_mb")
        },
        "index_arrays_vs_ours_at_a_tenth": round(
            smaller["process_seconds"] / ours[documents // 10]["process_seconds"], 1
        ),
        **{name: round(value, 1) for name, value in time_reads(folder).items()},
    }


def _say(what: str, result: dict[str, Any]) -> None:
    sys.stdout.write(
        f"{what} {result['process_seconds']:7.2f} s from process start ({result['cpu_seconds']:6.2f} s of CPU), "
        f"{result['open_seconds']:7.3f} s of it to open, {result['peak_mb']:8.1f} MB peak\n"
    )
    sys.stdout.flush()


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--tokens", type=int, default=10**12)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--measure", choices=("ours", "arrays"), help=argparse.SUPPRESS)
    parser.add_argument("--prefix", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        sys.stdout.write(json.dumps(measure(arguments.measure, arguments.prefix)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = compare(arguments.documents, arguments.tokens, Path(folder))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
