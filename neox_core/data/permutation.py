"""A random order of range(n) without an index array: a Feistel network with cycle walking.

Each round adds a keyed hash of one half of the index's bits to the other half, which is a bijection of the
2^bits values whatever the hash (Luby and Rackoff 1988). Values outside range(n) go through again until they fall
inside (Black and Rogaway 2002), which needs fewer than two passes on average, as 2^bits < 2n.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

Indices = np.ndarray[Any, np.dtype[Any]]

_ROUNDS = 8


def permute(indices: Indices, n: int, key: str) -> Indices:
    """Where a keyed permutation of range(n) sends each index; int64, of the same shape.

    `key` names the permutation, such as "1234/arxiv/0": the same on every machine and in every process.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if len(indices) == 0:
        return indices
    assert indices.min() >= 0, "an index is negative"
    assert indices.max() < n, "an index exceeds the permutation"
    round_keys = _round_keys(key)
    bits = max(2, (n - 1).bit_length())
    values = _feistel(indices.astype(np.uint64), bits, round_keys)
    while (outside := values >= n).any():
        values[outside] = _feistel(values[outside], bits, round_keys)
    return values.astype(np.int64)


def _round_keys(key: str) -> Indices:
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(values: Indices, bits: int, round_keys: Indices) -> Indices:
    low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << high_bits) - np.uint64(1)
    low, high = values & low_mask, values >> low_bits
    for number, key in enumerate(round_keys):
        if number % 2 == 0:
            high = high ^ (_mixed(low ^ key) & high_mask)
        else:
            low = low ^ (_mixed(high ^ key) & low_mask)
    return (high << low_bits) | low


def _mixed(values: Indices) -> Indices:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014): every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
