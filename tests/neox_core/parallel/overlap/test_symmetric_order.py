"""No rank reads rows before they are there, or writes over what is still read, however late any stream of any GPU is.

The exchanges run on CPUs, rank after rank, and what each would do on its streams is noted: which memory is read and
written, and what it comes after, by a stream's order, a wait or a barrier. Two uses of a place of which one is a write
must come one after the other.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neox_core.parallel.overlap import symmetric
from neox_core.parallel.overlap.symmetric import SymmetricExchange
from tests.neox_core.parallel.overlap.shared_memory import SharedMemory, exchange_of

WIDTH = 2
Turn = tuple[str, int]
"""A gather or a sum, of so many rows on each rank."""
IN_TURN: list[Turn] = [("gather", 3), ("scatter", 3)] * 3
TWO_OF_A_KIND: list[Turn] = [("gather", 3), ("gather", 3), ("scatter", 3), ("scatter", 3), ("scatter", 3)]
GROWING: list[Turn] = [("gather", 1), ("gather", 3), ("scatter", 1), ("scatter", 3), ("gather", 2), ("scatter", 2)]


@dataclass
class Access:
    """An operation's use of memory."""

    node: int
    start: int
    end: int
    writes: bool
    name: str


@dataclass
class Order:
    """What all ranks do, and what comes before each of it."""

    before: list[set[int]] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    """All memory, so that none has an address for the second time."""

    def node(self) -> int:
        self.before.append(set())
        return len(self.before) - 1

    def races(self) -> set[tuple[str, str]]:
        """Names of operations that use the same memory in no order."""
        reached: dict[int, int] = {}
        for node in self._sorted():
            reached[node] = 1 << node
            for earlier in self.before[node]:
                reached[node] |= reached[earlier]
        return {
            (a.name, b.name)
            for index, a in enumerate(self.accesses)
            for b in self.accesses[:index]
            if (a.writes or b.writes) and a.start < b.end and b.start < a.end
            if not (reached[a.node] >> b.node & 1 or reached[b.node] >> a.node & 1)
        }

    def _sorted(self) -> list[int]:
        after, missing = defaultdict[int, list[int]](list), [len(earlier) for earlier in self.before]
        for node, earlier in enumerate(self.before):
            for each in earlier:
                after[each].append(node)
        ready, found = [node for node, count in enumerate(missing) if not count], list[int]()
        while ready:
            found.append(node := ready.pop())
            for later in after[node]:
                missing[later] -= 1
                ready += [later] * (not missing[later])
        assert len(found) == len(missing), "barriers that wait for each other"
        return found


class Rank(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """One rank's streams, and what tensors are used for on the current one.

    Args:
        left_out: the number of a wait or barrier that does not happen.
    """

    def __init__(self, order: Order, barriers: dict[Any, int], number: int, left_out: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.order, self.barriers, self.number, self.left_out = order, barriers, number, left_out
        self.waits = 0
        self.passed: Counter[Any] = Counter()
        self.current = self.main = Stream(self)

    def happens(self) -> bool:
        self.waits += 1
        return self.waits - 1 != self.left_out

    def barrier(self, memory: int, channel: int) -> None:
        if self.happens():
            self.passed[memory, channel] += 1
            key = memory, channel, self.passed[memory, channel]
            if key not in self.barriers:
                self.barriers[key] = self.order.node()
            self.current.add(self.barriers[key])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        if (
            any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
            or "empty" in schema.name
        ):
            self.order.kept += [
                x for x in (result if isinstance(result, (tuple, list)) else (result,)) if x is not None
            ]
            return result
        node = self.current.add(self.order.node())
        for index, argument in enumerate(schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor):
                    self._use(node, tensor, writes, schema.name)
        if isinstance(result, Tensor):
            self._use(node, result, True, schema.name)
        return result

    def _use(self, node: int, tensor: Tensor, writes: bool, name: str) -> None:
        assert tensor.is_contiguous()
        start, where = tensor.data_ptr(), "" if self.current is self.main else " on the copies' stream"
        used = Access(node, start, start + tensor.nbytes, writes, f"{name} of rank {self.number}{where}")
        self.order.accesses.append(used)
        self.order.kept.append(tensor)


class Stream:
    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self.last: set[int] = set()
        """What the next one comes after."""

    def add(self, node: int) -> int:
        self._rank.order.before[node] |= self.last
        self.last = {node}
        return node

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(set(other.last))

    def wait_event(self, event: set[int]) -> None:
        if self._rank.happens():
            self.last |= event

    def record_event(self) -> set[int]:
        return set(self.last)


class Memory(SharedMemory):
    """Of a rank whose barriers are noted."""

    def __init__(self, rank: Rank, number: int, parts: list[Tensor]) -> None:
        super().__init__(parts)
        self._rank, self._number = rank, number

    def barrier(self, channel: int) -> None:
        self._rank.barrier(self._number, channel)


Run = Callable[..., tuple[set[tuple[str, str]], int]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs exchanges: their races, and how many waits and barriers a rank has."""

    def run(ranks: int, turns: list[Turn], left_out: int | None = None, asks: bool = True) -> Any:
        order, barriers, shared = Order(), dict[Any, int](), list[list[Tensor]]()
        for number in range(ranks):
            rank, count = Rank(order, barriers, number, left_out), 0

            @contextmanager
            def using(stream: Stream, rank: Rank = rank) -> Iterator[None]:
                before, rank.current = rank.current, stream
                yield
                rank.current = before

            def memory(size: int, rank: Rank = rank) -> Memory:
                nonlocal count
                count += 1
                if len(shared) < count:
                    shared.append([torch.empty(size, dtype=torch.uint8) for _ in range(ranks)])
                return Memory(rank, count, shared[count - 1])

            cuda = SimpleNamespace(current_stream=lambda rank=rank: rank.current, stream=using, Event=set)
            monkeypatch.setattr(symmetric, "torch", SimpleNamespace(cuda=cuda, empty=torch.empty, uint8=torch.uint8))
            exchange = exchange_of(number, ranks, Stream(rank), memory)
            with rank:
                for kind, rows in turns:
                    exchange.last = exchange.last if asks else None
                    (gather if kind == "gather" else add_up)(exchange, rows)
        return order.races(), rank.waits

    return run


def gather(exchange: SymmetricExchange, rows: int) -> None:
    """As linears.py does, with a product of what arrives and one of the whole."""
    weight = torch.ones(WIDTH, WIDTH)
    gathering = exchange.begin_gather(torch.ones(rows, WIDTH))
    for _, values in gathering.arrivals():
        torch.mm(values, weight)
    torch.mm(gathering.whole_ND, weight)


def add_up(exchange: SymmetricExchange, rows: int) -> None:
    """As linears.py does in a backward pass, which adds a product to what was sent and one to what came."""
    weight, whole = torch.ones(WIDTH, WIDTH), torch.ones(exchange.size * rows, WIDTH)
    scattering = exchange.begin_scatter(rows, WIDTH, torch.float32)
    for part, place in scattering.sends():
        torch.mm(whole[part], weight, out=place)
        place.addmm_(whole[part], weight)
    for other in scattering.others():
        other.addmm_(whole[:rows], weight)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("turns", [IN_TURN, TWO_OF_A_KIND, GROWING], ids=["in turn", "two of a kind", "growing"])
@pytest.mark.parametrize("together", [1, 2, 3])
def test_memory_is_used_in_order(
    ranks: int, turns: list[Turn], together: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symmetric, "ROWS", 3 * together)
    races, _ = run(ranks, turns)
    assert not races


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_turns(ranks: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(ranks)
    for _ in range(10):
        monkeypatch.setattr(symmetric, "ROWS", draw.randint(1, 9))
        turns = [(draw.choice(("gather", "scatter")), draw.randint(1, 4)) for _ in range(8)]
        assert not run(ranks, turns)[0], turns


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("turns", [IN_TURN, TWO_OF_A_KIND], ids=["in turn", "two of a kind"])
def test_each_wait_and_barrier_is_needed(
    ranks: int, turns: list[Turn], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what is noted suffices to find what is missing."""
    monkeypatch.setattr(symmetric, "ROWS", 6)
    _, waits = run(ranks, turns)
    for number in range(waits):
        assert run(ranks, turns, left_out=number)[0], number


def test_two_of_a_kind_need_a_barrier_between_them(run: Run) -> None:
    assert not run(3, IN_TURN, asks=False)[0]
    for turns in (TWO_OF_A_KIND[:2], TWO_OF_A_KIND[2:4]):
        assert not run(3, turns)[0]
        assert run(3, turns, asks=False)[0]
