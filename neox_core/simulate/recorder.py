"""Records memory and collectives of a program on tensors without data."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neox_core.planning.communication import Collective

_KINDS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}
_VALUES: dict[torch.dtype, Any] = {torch.bool: True, torch.float32: 1.0, torch.float64: 1.0, torch.bfloat16: 1.0}
_ANSWERS: dict[Any, Callable[[Tensor], Any]] = {
    torch.ops.aten._local_scalar_dense.default: lambda x: _VALUES.get(x.dtype, 0),
    torch.ops.aten.equal.default: lambda x: True,
    torch.ops.aten.nonzero.default: lambda x: x.new_empty((0, x.ndim), dtype=torch.long),
}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes of living tensors as an allocator would, and bytes of collectives.

    Where the program reads values from tensors, all is finite and nothing differs: it gets 1.0, True or 0, tensors are
    equal, and no element is other than zero.

    Args:
        groups: name of each group by its ranks. Groups of one rank are not recorded.
    """

    def __init__(self, groups: Mapping[tuple[int, ...], str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._groups = groups or {}
        self._known: dict[int, Any] = {}
        self._in_kernel = False
        self.bytes = 0
        """Of tensors that were made under this mode and are alive."""
        self.peak_bytes = 0
        """Most of them since `restart`."""
        self.collective_bytes: Counter[Collective] = Counter()
        """Size of the whole tensor: a reduction's input, a gathering's output."""
        self.collective_calls: Counter[Collective] = Counter()

    def restart(self) -> None:
        """Forget collectives and the peak; living tensors are still known."""
        self.peak_bytes = self.bytes
        self.collective_bytes.clear()
        self.collective_calls.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ANSWERS:
            return _ANSWERS[func](args[0])
        if func.namespace == "c10d":
            self._record_collective(func, args)
        result = func(*args, **(kwargs or {}))
        if not self._in_kernel:
            self._record_results(result, but=(args, kwargs))
        return result

    def as_kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose results alone take memory, as those of one compiled kernel."""

        def call(*args: Any) -> Any:
            self._in_kernel = True
            try:
                result = function(*args)
            finally:
                self._in_kernel = False
            self._record_results(result)
            return result

        return call

    def _record_results(self, result: Any, but: Any = ()) -> None:
        """Take note of new memory: results that are views of arguments have none."""
        storages = {s._cdata: s for s in _storages(result) if s._cdata not in self._known}
        if storages:
            given = {s._cdata for s in _storages(but)}
            for address, storage in storages.items():
                if address not in given:
                    self._record_memory(address, storage)

    def _record_memory(self, address: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known[address] = weakref.ref(storage, self._release(address, size))
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _release(self, address: int, size: int) -> Callable[[Any], None]:
        def release(_: Any) -> None:
            del self._known[address]
            self.bytes -= size

        return release

    def _record_collective(self, func: Any, args: tuple[Any, ...]) -> None:
        kind = _KINDS.get(func._schema.name.removeprefix("c10d::"))
        group = next(
            a for a in tree_leaves(args) if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
        )
        ranks = tuple(dist.get_process_group_ranks(ProcessGroup.unbox(group)))
        if kind is None or len(ranks) == 1:
            return
        size = max(x.numel() * x.element_size() for x in tree_leaves(args) if isinstance(x, Tensor))
        group_name = "pipeline" if kind in ("send", "receive") else self._groups.get(ranks, "other")
        key = (group_name, kind)
        self.collective_bytes[key] += size
        self.collective_calls[key] += 1


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
