"""Small values that all ranks see, also while a collective hangs."""

from __future__ import annotations

from typing import Any

from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store


def shared_store(name: str) -> Any:
    """A torch.distributed store of the process group's ranks, with keys of its own under this name.

    It has a connection of its own: the process group's is locked while a thread waits in it.
    """
    return PrefixStore(name, _get_default_store().clone())  # type: ignore[attr-defined]
