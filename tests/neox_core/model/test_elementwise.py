"""Compiled functions take many kinds of arguments, on any thread."""

from __future__ import annotations

import itertools
import threading
from functools import partial

import pytest
import torch
from torch import Tensor

from neox_core.model.elementwise import compile_whole

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64)


def times(x: Tensor, factor: float) -> Tensor:
    return x * factor


def call_in_many_ways(compiled: object, failures: list[BaseException]) -> None:
    assert callable(compiled)
    try:
        for dtype, factor in itertools.product(DTYPES, (1, 2.5, True)):
            compiled(torch.ones(3, dtype=dtype), factor)
    except Exception as error:
        failures.append(error)


@pytest.mark.parametrize("other_thread", [False, True], ids=["forward", "on autograd's thread"])
def test_more_than_eight_kinds_of_arguments(other_thread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own limit is 8 for each thread."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # which needs no compiler
    compiled, failures = compile_whole(times), list[BaseException]()
    if other_thread:
        thread = threading.Thread(target=call_in_many_ways, args=(compiled, failures))
        thread.start()
        thread.join()
    else:
        call_in_many_ways(compiled, failures)
    assert not failures
