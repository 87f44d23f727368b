"""The seam through which all that is one kernel on a GPU is called, so that a stand-in can take its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import update_wrapper
from types import MappingProxyType
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Kernel(Generic[P, R]):
    """A function of tensors. Called as such, it runs its implementation, or the stand-in that `stand_ins` set.

    Args:
        function: what it computes, in plain operations.
        implementation: what runs instead of the plain operations, such as a compiled function.
    """

    def __init__(self, function: Callable[P, R], implementation: Callable[P, R] | None = None) -> None:
        self.function = function
        self._implementation = implementation or function
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        run: Callable[P, R] = _STAND_INS.get().get(self, self._implementation)
        return run(*args, **kwargs)


_STAND_INS: ContextVar[Mapping[Kernel[..., Any], Callable[..., Any]]] = ContextVar(
    "stand_ins", default=MappingProxyType({})
)


@contextmanager
def stand_ins(replaced: Mapping[Kernel[..., Any], Callable[..., Any]]) -> Iterator[None]:
    """Within it, these functions run instead of the kernels, in this thread (where a CPU's backward pass runs too)."""
    token = _STAND_INS.set({**_STAND_INS.get(), **replaced})
    try:
        yield
    finally:
        _STAND_INS.reset(token)
