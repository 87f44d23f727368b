"""Activation checkpointing, applied to a transformer block from outside.

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
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from neox_core.model import TransformerBlock

Recompute = Literal["none", "selective", "full"]


Gather = Callable[[Tensor], Tensor]
"""A rank's part of the tokens -> all of them."""


def apply_recompute(block: TransformerBlock, mode: Recompute, gather: Gather | None = None) -> None:
    """Let a block whose residuals are joined keep less for its backward pass. Results and gradients stay the same.

    Args:
        gather: how the norms' results are gathered before attention and MLP, where ranks have a part of the tokens.
    """
    if mode == "full":
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    elif mode == "selective":
        results = _Results()
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.fork = results.normalized_again(norm)  # type: ignore[assignment]
        if gather is not None:
            block.attention.register_forward_pre_hook(results.gathered_again(gather))
            block.mlp.register_forward_pre_hook(results.gathered_again(gather))
        block.attention.attend = results.recomputed(block.attention.attend)  # type: ignore[method-assign]
        block.mlp.activate = results.recomputed(block.mlp.activate)  # type: ignore[method-assign]
        block.forward = results.replaced(block.forward)  # type: ignore[method-assign]


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
            self._result = self._function(*self._kept)


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


class _Results:
    """Tensors of one forward pass of a block that can be made again, by their memory."""

    def __init__(self) -> None:
        self._recipes: dict[int, tuple[StorageWeakRef, _Recipe]] = {}
        self._normed: _Recipe | None = None

    def recomputed(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function whose arguments alone are kept."""

        def run(*args: Any) -> Tensor:
            if not torch.is_grad_enabled():
                return function(*args)
            call = _Call(function, args)
            return self._add(call.run(args), call)

        return run

    def normalized_again(self, norm: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        """A norm's `fork`, which keeps the sum for its own backward pass: the norm can be made from that."""
        fork = norm.fork

        def run(x: Tensor, addend: Tensor | None = None) -> tuple[Tensor, Tensor]:
            total, normed = fork(x, addend)
            self._normed = _Recipe(norm.forward, (total,))
            return total, self._add(normed, self._normed)

        return run

    def gathered_again(self, gather: Gather) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A hook on a module that gets the last norm's result after it was gathered."""

        def run(_: nn.Module, args: tuple[Any, ...]) -> None:
            normed = self._normed
            assert normed is not None
            self._add(args[0], _Recipe(lambda: gather(normed.result()), ()))

        return run

    def _add(self, result: Tensor, recipe: _Recipe) -> Tensor:
        memory = StorageWeakRef(result.untyped_storage())  # type: ignore[no-untyped-call]
        self._recipes[memory.cdata] = memory, recipe  # the weak reference keeps the address from being used again
        return result

    def replaced(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The block's forward pass, whose saved tensors are replaced where they are known results."""

        def run(*args: Any) -> Tensor:
            try:
                with saved_tensors_hooks(self._pack, _unpack):
                    return forward(*args)
            finally:
                self._recipes.clear()
                self._normed = None

        return run

    def _pack(self, tensor: Tensor) -> Tensor | _ViewOfResult:
        found = self._recipes.get(tensor.untyped_storage()._cdata)
        if found is None:
            return tensor
        return _ViewOfResult(found[1], tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: Tensor | _ViewOfResult) -> Tensor:
    return kept.tensor() if isinstance(kept, _ViewOfResult) else kept
