"""A random order of range(n) without an index array: a Feistel network with cycle walking.

Each round adds a keyed hash of one half of the index's bits to the other half, which is a bijection of the
2^bits values whatever the hash (Luby and Rackoff 1988). Values outside range(n) go through again until they fall
inside (Black and Rogaway 2002), which needs fewer than two passes on average, as 2^bits < 2n.

Plain integers, since a step of training needs few places: on so few, array arithmetic is 10 times slower.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np

_ROUNDS = 8
_64_BITS = (1 << 64) - 1
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31 = map(np.uint64, (27, 30, 31))
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def permute(index: int, n: int, key: str) -> int:
    """Where a keyed permutation of range(n) sends `index`.

    `key` names the permutation, such as "1234/arxiv/0": the same on every machine and in every process.
    """
    assert 0 <= index < n, f"{index} is not in range({n})"
    round_keys = _round_keys(key)
    bits = max(2, (n - 1).bit_length())
    value = _feistel(index, bits, round_keys)
    while value >= n:
        value = _feistel(value, bits, round_keys)
    return value


def hashes(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The first outputs of SplitMix64 (Steele, Lea and Flood 2014), uint64 [count], all different.

    Sorting them orders range(count) at random: for many places of a short range, faster than `permute` for each.
    """
    values = _counted(count) + np.uint64(seed)
    values ^= values >> _30
    values *= _FIRST
    values ^= values >> _27
    values *= _SECOND
    values ^= values >> _31
    return values


def seed_of(key: str) -> int:
    """64 bits that a key names, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


@lru_cache(maxsize=64)
def _counted(count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """SplitMix64's states from 0 on."""
    states = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    states.flags.writeable = False
    return states


@lru_cache(maxsize=1024)
def _round_keys(key: str) -> tuple[int, ...]:
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[start : start + 8], "little") for start in range(0, len(digest), 8))


def _feistel(value: int, bits: int, round_keys: tuple[int, ...]) -> int:
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    low, high = value & low_mask, value >> low_bits
    for number, key in enumerate(round_keys):
        if number % 2 == 0:
            high ^= _mixed(low ^ key) & high_mask
        else:
            low ^= _mixed(high ^ key) & low_mask
    return (high << low_bits) | low


def _mixed(value: int) -> int:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014): every output bit depends on every input bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return value ^ (value >> 31)
