"""Where the fp32 master weights live: in full, or as what bf16 rounding cut off from them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_PIECE, _PIECE_ON_CPU = 1 << 24, 1 << 18
"""Numbers that are converted at a time: few launches on a GPU; a core's cache on a CPU, where that is faster by far."""

_TIE = 0x8000
"""Low half of an fp32 number that lies midway between two bf16 numbers."""


def pack(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 numbers into their bf16 rounding (to nearest, ties to even) and the low 16 bits.

    From the two, `unpack` finds the number again: the rounding went up if the low bits are above the tie. At a tie
    that cannot be told, so such a number is first moved by one fp32 ulp towards the side it rounds to.

    Returns:
        bf16 and int16 tensors in the input's shape.
    """
    low_precision = master.to(torch.bfloat16)
    bits = master.view(torch.int32)
    rounded_up = (low_precision.view(torch.int16).int() - (bits >> 16)) & 1
    is_tie = (bits & 0xFFFF) == _TIE
    bits = torch.where(is_tie, torch.where(rounded_up == 1, bits + 1, bits - 1), bits)
    return low_precision, bits.to(torch.int16)


def unpack(low_precision: Tensor, low_bits: Tensor) -> Tensor:
    """The fp32 numbers that `pack` split."""
    low = low_bits.int() & 0xFFFF
    high = low_precision.view(torch.int16).int() - (low > _TIE).int()
    return ((high << 16) | low).view(torch.float32)


class MasterWeights:
    """Master weights of one flat partition of parameters.

    Args:
        low_precision: the bf16 parameters, which the optimizer keeps equal to the rounded master weights; or fp32
            parameters, which are the master weights.
        packed: keep 2 bytes per parameter instead of 4.
    """

    def __init__(self, low_precision: Tensor, packed: bool) -> None:
        self.low_precision, self.packed = low_precision, packed
        self.storage = torch.zeros_like(low_precision, dtype=torch.int16) if packed else low_precision.float()
        """int16 low bits if packed, fp32 numbers otherwise: of fp32 parameters, their own memory."""

    def read(self, start: int, stop: int) -> Tensor:
        """fp32 numbers of a range; a copy."""
        if self.packed:
            return unpack(self.low_precision[start:stop], self.storage[start:stop])
        return self.storage[start:stop].clone()

    def write(self, start: int, stop: int, master: Tensor) -> None:
        """Replace a range, and the parameters with it."""
        if self.packed:
            low_precision, low_bits = pack(master)
            self.low_precision[start:stop] = low_precision
            self.storage[start:stop] = low_bits
        else:
            self.storage[start:stop] = master
            self.low_precision[start:stop] = master.to(self.low_precision.dtype)

    def numel(self) -> int:
        """Number of parameters."""
        return self.low_precision.numel()

    def copy_to(self, host: Tensor) -> None:
        """Fill a flat fp32 tensor in host memory, or have the current stream do so if that is pinned."""
        if not self.packed:
            host.copy_(self.storage, non_blocking=True)
            return
        for start, stop in self._ranges():
            host[start:stop].copy_(self.read(start, stop), non_blocking=True)

    def to_host(self) -> Tensor:
        """All fp32 numbers, in host memory."""
        host = torch.empty(self.numel(), dtype=torch.float32)
        self.copy_to(host)
        return host

    def load(self, master: Tensor) -> None:
        """Take over saved fp32 numbers, and set the parameters to their rounding."""
        for start, stop in self._ranges():
            self.write(start, stop, master[start:stop].to(self.low_precision.device))

    def reset(self) -> None:
        """Forget the master weights: the parameters' own values are the master weights."""
        for start, stop in self._ranges():
            self.write(start, stop, self.low_precision[start:stop].float())

    def count_differences(self, rounded: bool) -> int:
        """Elements whose parameter is not the master weight; or not its rounding. NaN is as NaN."""
        dtype = self.low_precision.dtype if rounded else torch.float32
        count = 0
        for start, stop in self._ranges():
            master = self.read(start, stop) if self.packed else self.storage[start:stop]
            master, parameter = master.to(dtype), self.low_precision[start:stop].to(dtype)
            if _same_bits(master, parameter):
                continue
            count += int(((master != parameter) & ~(master.isnan() & parameter.isnan())).sum())
        return count

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Pieces that fit on a card that is almost full."""
        size, piece = self.low_precision.numel(), _PIECE if self.low_precision.is_cuda else _PIECE_ON_CPU
        for start in range(0, size, piece):
            yield start, min(start + piece, size)


def _same_bits(*flats: Tensor) -> bool:
    """Whether two are the same bit for bit: compared as whole words, which is several times as fast on CPUs."""
    if all(flat.nbytes % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0 for flat in flats):
        flats = tuple(flat.view(torch.int64) for flat in flats)
    return torch.equal(*flats)
