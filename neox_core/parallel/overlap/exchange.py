"""How rows of a tensor travel between tensor-parallel ranks while these compute.

A product of gathered rows can begin with the rank's own; a product whose rows are summed over the ranks can begin with
those that others wait for (the ring of Megatron-LM's and of arXiv 2409.15241, over copies in place of collectives).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor

Kind = Literal["gather", "scatter"]


class Gathering(Protocol):
    """All ranks' rows, on their way."""

    whole_ND: Tensor
    """[ranks x rows, D], to be read when all have arrived."""

    def arrivals(self) -> Iterator[tuple[slice, Tensor]]:
        """(which rows, their values) that may be read now: a rank's own first. To be exhausted."""


class Scattering(Protocol):
    """A sum over the ranks, of which each gets its rows."""

    def sends(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows that others get, where to write this rank's part of their sum), of one rank or more at a time.

        Sent when others are asked for. To be exhausted.
        """

    def others(self) -> tuple[Tensor, ...]:
        """What the other ranks sent, to be summed, [rows, D] each; the caller's own to change."""


class Exchange(Protocol):
    """Moves rows between the ranks. All ranks begin the same exchanges in the same order."""

    rank: int
    """This rank's place among those that exchange."""
    size: int
    """How many they are."""
    last: Kind | None
    """What was begun last, on all ranks. To be set back where that is never done, as it could not be recorded."""

    def begin_gather(self, rows_MD: Tensor) -> Gathering:
        """Begin to fetch all ranks' rows."""

    def begin_scatter(self, rows: int, width: int, dtype: torch.dtype) -> Scattering:
        """Begin a sum of which each rank gets `rows`."""

    def rejoin(self) -> None:
        """Have the current stream wait for what others were to do for it, where both are being recorded."""
