"""Activation checkpointing of a transformer block (layers.py's FusedBlock, which calls what is here).

full: only the block's input is kept, and all of it is computed again in the backward pass (arXiv 1604.06174).

selective: norms, rotation, attention and SwiGLU are computed again; the outputs of matrix products are kept
(after arXiv 2205.05198). A plain checkpoint around a norm would save nothing, since the linear layer behind it keeps
the norm's result for its weight gradient. So the *result* of a recomputed function is replaced too, wherever autograd
keeps it: the first that the backward pass asks for, of the result or of what is kept inside the function, runs the
function once more. No matrix product is repeated; with sequence parallelism, a norm's result is gathered once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from neox_core.config import ActivationCheckpointing


class NoCheckpointing:
    """All that autograd asks for is kept. The other classes keep less, to the same results and gradients."""

    keeps_arguments = False
    """`recomputed` reads its function's arguments again, which must stay as they are."""

    def run(self, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        """A block's forward pass, in which the other methods may be called."""
        return forward(*args)

    def recomputed(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """The function's result. Of result and function, the arguments alone need to be kept (see keeps_arguments)."""
        return function(*args)

    def repeatable(self, result: Tensor, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """A result that the function makes again from the arguments, which are kept anyhow or repeatable themselves."""
        return result


class FullCheckpointing(NoCheckpointing):
    """The block's input is kept."""

    def run(self, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        result: Tensor = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)
        return result


class SelectiveCheckpointing(NoCheckpointing):
    """The outputs of matrix products are kept."""

    keeps_arguments = True

    def __init__(self) -> None:
        self._recipes: dict[int, tuple[StorageWeakRef, _Recipe]] = {}
        """How tensors of the forward pass that is under way can be made again, by their memory."""

    def run(self, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                return forward(*args)
        finally:
            self._recipes.clear()

    def recomputed(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*args)
        call = _Call(function, args)
        return self._add(call.run(args), call)

    def repeatable(self, result: Tensor, function: Callable[..., Tensor], *args: Any) -> Tensor:
        if result.untyped_storage()._cdata in self._recipes:
            return result  # a view of one that is known
        kept = tuple(self._pack(arg) if isinstance(arg, Tensor) else arg for arg in args)
        return self._add(result, _Recipe(function, kept))

    def _add(self, result: Tensor, recipe: _Recipe) -> Tensor:
        memory = StorageWeakRef(result.untyped_storage())  # type: ignore[no-untyped-call]
        self._recipes[memory.cdata] = memory, recipe  # the weak reference keeps the address from being used again
        return result

    def _pack(self, tensor: Tensor) -> Tensor | _ViewOfResult:
        found = self._recipes.get(tensor.untyped_storage()._cdata)
        if found is None:
            return tensor
        return _ViewOfResult(found[1], tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def checkpointing_of(mode: ActivationCheckpointing) -> NoCheckpointing:
    """What a block with this mode calls; one for each block."""
    kinds = {"none": NoCheckpointing, "selective": SelectiveCheckpointing, "full": FullCheckpointing}
    return kinds[mode]()


class _Recipe:
    """How to make a tensor again from arguments that are kept; it is made once."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function = function
        # Others as they are: a mask is known by the positions that it was made from.
        self._kept = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.requires_grad else a for a in args]
        self._result: Tensor | None = None

    def result(self) -> Tensor:
        """The function's result, outside of any graph."""
        if self._result is None:
            self._make()
        assert self._result is not None, "functions with several results can only be asked for what they save"
        return self._result

    def _make(self) -> None:
        with torch.no_grad():
            self._result = self._function(*map(_unpack, self._kept))


class _Call(_Recipe):
    """One call of a function that autograd follows, but of which only the arguments are kept."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__(function, args)
        self._saves = 0
        self._saved: list[Tensor] | None = None

    def run(self, args: tuple[Any, ...]) -> Any:
        """The function's result. What autograd saves is numbered, not kept."""

        def number(_: Tensor) -> int:
            self._saves += 1
            return self._saves - 1

        with saved_tensors_hooks(number, self._saved_again):
            return self._function(*args)

    def _saved_again(self, number: int) -> Tensor:
        if self._saved is None:
            self._make()
        assert self._saved is not None
        return self._saved[number]

    def _make(self) -> None:
        saved: list[Tensor] = []
        # Detached, since a tensor that knows the second run's graph would keep that graph, which keeps the tensor.
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: saved.append(tensor.detach()), _never):
            result = self._function(*self._kept)
        assert len(saved) == self._saves, "the second run saved other tensors than the first"
        self._saved = saved
        self._result = result.detach() if isinstance(result, Tensor) else None


def _never(_: Any) -> Tensor:
    raise AssertionError("nothing goes backward through a recomputation: its tensors serve the first run's graph")


@dataclass(frozen=True)
class _ViewOfResult:
    """Stands for a saved tensor that shares a result's memory."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.recipe.result().as_strided(self.size, self.stride, self.offset)


def _unpack(kept: Any) -> Any:
    return kept.tensor() if isinstance(kept, _ViewOfResult) else kept
