"""Finds the places where the host reads a tensor: on a GPU, each would wait for the device."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"}
"""Operators whose result, or its size, is on the host: item(), bool(), float(), ..."""
_METHODS = ("tolist", "numpy", "cpu")
"""Of tensors; on CPUs no operator runs for them."""


class HostReads(TorchDispatchMode):
    """While active, notes the file and function of each read, by the innermost frame outside of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the place of an operator that reads."""
        if function.overloadpacket.__name__ in _READING:
            self.note()
        return function(*args, **(kwargs or {}))

    def note(self) -> None:
        """Note the place that this is called from."""
        frames = [frame for frame in traceback.extract_stack() if not _is_torchs(frame.filename)]
        self.places.add(f"{Path(frames[-1].filename).name}:{frames[-1].name}")

    def __enter__(self) -> HostReads:
        self._methods = {name: getattr(torch.Tensor, name) for name in _METHODS}
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, self._noting(method))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, method)

    def _noting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **named: Any) -> Any:
            self.note()
            return method(*args, **named)

        return noting


def _is_torchs(filename: str) -> bool:
    return "/torch/" in filename or filename == __file__
