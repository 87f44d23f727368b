"""Which rows go where between any number of ranks; what the GPUs' streams add is in tests/gpu/test_overlap.py."""

from __future__ import annotations

import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from neox_core.parallel.overlap import symmetric
from neox_core.parallel.overlap.symmetric import SymmetricExchange, groups, others, rows_of, shared_memory, why_not
from tests.neox_core.parallel.overlap.shared_memory import SharedMemory, exchange_of

RANKS = [2, 3, 4, 6, 8]
ROWS, WIDTH = 3, 5


@pytest.mark.parametrize(("rows", "sizes"), [(8192, [1] * 7), (4096, [1] * 7), (2048, [2, 2, 2, 1]), (1500, [3, 3, 1])])
def test_groups_of_peers(rows: int, sizes: list[int]) -> None:
    peers = others(5, 8)
    assert peers == [6, 7, 0, 1, 2, 3, 4]
    found = groups(peers, rows)
    assert [len(group) for group in found] == sizes
    assert [peer for group in found for peer in group] == peers, "each once, in their order"


def test_rows_after_the_last_rank_begin_again() -> None:
    assert rows_of([1, 2], 10) == [slice(10, 30)]
    assert rows_of([6, 7, 0, 1], 10) == [slice(60, 80), slice(0, 20)]
    assert rows_of([7, 0], 10) == [slice(70, 80), slice(0, 10)]


class Memory(SharedMemory):
    """Of threads, which wait for each other."""

    def __init__(self, parts: list[Tensor], barriers: dict[int, threading.Barrier]) -> None:
        super().__init__(parts)
        self._barriers = barriers

    def barrier(self, channel: int) -> None:
        self._barriers[channel].wait(timeout=60)


class Stream:
    """One that does all at once."""

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self) -> None: ...


@contextmanager
def using(_: Stream) -> Iterator[None]:
    yield


@pytest.fixture
def on_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[SymmetricExchange], Any]], list[Any]]:
    """Runs a function on ranks that are threads, each with its exchange."""
    cuda = SimpleNamespace(current_stream=Stream, stream=using, Event=None, Stream=lambda _: Stream())
    monkeypatch.setattr(symmetric, "torch", SimpleNamespace(cuda=cuda, empty=torch.empty, uint8=torch.uint8))

    def run(ranks: int, function: Callable[[SymmetricExchange], Any]) -> list[Any]:
        lock, made = threading.Lock(), dict[tuple[int, int], tuple[list[Tensor], Any]]()

        def memory_of(rank: int) -> Callable[[int], Memory]:
            count = iter(range(1000))

            def shared(size: int) -> Memory:
                key = next(count), size
                with lock:
                    parts = [torch.full((size,), 255, dtype=torch.uint8) for _ in range(ranks)]
                    return Memory(*made.setdefault(key, (parts, defaultdict(lambda: threading.Barrier(ranks)))))

            return shared

        results: dict[int, Any] = {}

        def one(rank: int) -> None:
            results[rank] = function(exchange_of(rank, ranks, Stream(), memory_of(rank)))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        return [results[rank] for rank in range(ranks)]

    return run


def part_of(rank: int, turn: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(100 * turn + rank))


def partial_of(rank: int, turn: int, ranks: int) -> Tensor:
    """What a rank adds to all ranks' rows of a sum."""
    return torch.randn(ranks * ROWS, WIDTH, generator=torch.Generator().manual_seed(7000 + 100 * turn + rank))


@pytest.mark.parametrize("together", [1, 2, 3, 8])
@pytest.mark.parametrize("ranks", RANKS)
def test_every_rank_gets_all_rows_and_the_sum_of_its_own(
    ranks: int, together: int, on_threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathers and sums in turn and several in a row, with memory that is used again."""
    monkeypatch.setattr(symmetric, "ROWS", together * ROWS)

    def run(exchange: SymmetricExchange) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
        found = []
        for turn in range(3):
            gathering = exchange.begin_gather(part_of(exchange.rank, turn))
            arrived = torch.full((ranks * ROWS, WIDTH), torch.nan)
            for rows, values in gathering.arrivals():
                assert arrived[rows].isnan().all(), "each comes once"
                arrived[rows] = values
            sums = []
            for _ in range(turn + 1):
                mine = partial_of(exchange.rank, turn, ranks)
                scattering = exchange.begin_scatter(ROWS, WIDTH, torch.float32)
                for rows, place in scattering.sends():
                    place.copy_(mine[rows])
                sums.append(sum(scattering.others(), mine.tensor_split(ranks)[exchange.rank]))
            found.append((arrived, gathering.whole_ND, sums))
        return found

    results = on_threads(ranks, run)
    for turn in range(3):
        whole = torch.cat([part_of(rank, turn) for rank in range(ranks)])
        total = torch.stack([partial_of(rank, turn, ranks) for rank in range(ranks)]).sum(0)
        for rank in range(ranks):
            arrived, gathered, sums = results[rank][turn]
            assert torch.equal(arrived, whole)
            assert torch.equal(gathered, whole)
            for found in sums:
                torch.testing.assert_close(found, total.tensor_split(ranks)[rank], rtol=1e-5, atol=1e-5)


HOSTS = ["one", "one"]


@pytest.mark.parametrize(
    ("hosts", "numbers", "reads", "reason"),
    [
        (HOSTS, [0, 1], [True, True], None),
        (["one", "other"], [0, 1], [True, True], "the ranks are on 2 hosts"),
        (HOSTS, [0, 0], [True, True], "ranks do not see each other's GPUs"),
        (HOSTS, [0, 1], [True, False], "cannot read each other's memory"),
    ],
)
def test_what_keeps_ranks_from_exchanging(
    hosts: list[str], numbers: list[int], reads: list[bool], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second rank asks, of which a launcher may have hidden the first one's GPU."""

    def gather(found: list[Any], own: Any, group: Any) -> None:
        found[:] = zip(hosts, numbers, reads, strict=True)
        assert own == found[1]

    monkeypatch.delenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: numbers[1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: numbers[1] + 1)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, peer: reads[1])
    monkeypatch.setattr(socket, "gethostname", lambda: hosts[1])
    monkeypatch.setattr(dist, "get_world_size", lambda _: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    found = why_not(SimpleNamespace(), torch.device("cuda", 0))  # type: ignore[arg-type]
    assert (found is None) if reason is None else (found is not None and reason in found)
    if numbers == [0, 0]:
        monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        assert why_not(SimpleNamespace(), torch.device("cuda", 0)) is None  # type: ignore[arg-type]


def test_memory_is_shared_while_no_work_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch writes to it, and to blocks of its allocator, in the order of another stream."""
    import torch.distributed._symmetric_memory as symmetric_memory

    called: list[str] = []
    monkeypatch.setattr(symmetric_memory, "empty", lambda *_, **named: called.append("empty"))
    monkeypatch.setattr(symmetric_memory, "rendezvous", lambda *_: called.append("rendezvous"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: called.append("synchronize"))
    shared_memory(SimpleNamespace(), torch.device("cpu"), 16)  # type: ignore[arg-type]
    assert called == ["empty", "synchronize", "rendezvous", "synchronize"]
