"""What ranks tell each other about checkpoints."""

from __future__ import annotations

import threading

import pytest
from torch.distributed import HashStore

from neox_core.checkpoint.reports import Reports
from neox_core.errors import CheckpointError


@pytest.fixture
def ranks() -> list[Reports]:
    channel = HashStore()
    return [Reports(channel, rank, 2, threading.Event(), timeout=60.0) for rank in range(2)]


def test_what_cannot_be_uploaded_is_written_all_the_same(ranks: list[Reports]) -> None:
    """The last save of a training whose store was given up must be whole on local disk, however late a rank is."""
    ranks[1].give_up("uploaded", "the store is gone")
    ranks[0].tell(1, "written", "its files")
    late = threading.Timer(0.5, lambda: ranks[1].tell(1, "written", "others"))
    late.start()
    assert ranks[0].collect(1, "written") == ["its files", "others"]
    late.join()
    with pytest.raises(CheckpointError, match="rank 1: the store is gone"):
        ranks[0].collect(1, "uploaded")


def test_what_cannot_be_written_is_not_uploaded_either(ranks: list[Reports]) -> None:
    ranks[1].give_up("written", "no such folder")
    for stage in ("written", "uploaded"):
        with pytest.raises(CheckpointError, match="rank 1: no such folder"):
            ranks[0].collect(1, stage)  # type: ignore[arg-type]
