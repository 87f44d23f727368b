"""The order of documents by plain loops over all of them, for tests: shares no code with the one that is tested."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from neox_core.data.indexed import IndexedDataset


def write(prefix: Path, sizes: Sequence[int], documents: Sequence[int] | None = None) -> IndexedDataset:
    """Files made by hand, in i32, where each id is its place: sequences of these sizes.

    Documents begin at the sequences `documents`; without them, each sequence is one.
    """
    documents = range(len(sizes)) if documents is None else documents
    offsets = np.cumsum([0, *sizes[:-1]], dtype=np.int64) * 4
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, len(sizes), len(documents) + 1)
    index += np.array(sizes, "<i4").tobytes() + offsets.astype("<i8").tobytes()
    prefix.with_suffix(".idx").write_bytes(index + np.array([*documents, len(sizes)], "<i8").tobytes())
    prefix.with_suffix(".bin").write_bytes(np.arange(sum(sizes), dtype="<i4").tobytes())
    return IndexedDataset(prefix)


def texts(dataset: IndexedDataset) -> list[list[int]]:
    """The places of each document's tokens."""
    ends = dataset.document_index.tolist()
    sequences = [
        list(range(int(o) // 4, int(o) // 4 + int(n))) for o, n in zip(dataset.offsets, dataset.sizes, strict=True)
    ]
    return [list(itertools.chain.from_iterable(sequences[first:stop])) for first, stop in itertools.pairwise(ends)]


def documents_of_epoch(count: int, key: str, epoch: int, lanes: int, run: int) -> list[int]:
    """The documents in their order."""
    blocks = max(1, -(-count // (lanes * run)))
    runs = lanes * blocks
    members = [list(range(number * count // runs, (number + 1) * count // runs)) for number in range(runs)]
    slots = -(-count // runs)
    order = []
    for block in range(blocks):
        drawn = []
        for lane in range(lanes):
            shift = splitmix(f"{key}/{epoch}/shifts", lane) % blocks
            for column, document in enumerate(members[lane * blocks + (shift + block) % blocks]):
                drawn.append((splitmix(f"{key}/{epoch}/{block}", lane * slots + column), document))
        order += [document for _, document in sorted(drawn)]
    return order


def splitmix(key: str, number: int) -> int:
    """An output of the generator that begins with a key's hash."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    x = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)
