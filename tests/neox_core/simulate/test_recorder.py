"""The recorder against memory that is counted by hand, and the stand-ins against what a compiler keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_core.model import elementwise
from neox_core.parallel import loss
from neox_core.simulate.recorder import Recorder


def test_living_bytes_and_their_peak() -> None:
    outside = torch.zeros(1000)
    with Recorder() as recorder:
        first = torch.zeros(256)  # 1024 bytes
        view = first[:10]
        assert recorder.bytes == 1024
        second = first + 1
        assert recorder.bytes == 2048
        del first
        assert recorder.bytes == 2048, "the view keeps it"
        del view
        assert recorder.bytes == 1024
        second.add_(1)
        assert outside[:500].sum() == 0
        assert recorder.bytes == 1024
        assert recorder.peak_bytes >= 2048
        recorder.restart()
        assert recorder.peak_bytes == 1024
        kernel = recorder.as_kernel(lambda x: (x * 2 + 1) * 3)
        result = kernel(second)
        assert recorder.peak_bytes == 2048, "what is between is not seen"
    assert torch.equal(result, torch.full((256,), 15.0))


def kept_by_compiler(function: Callable[..., Any], *args: Any) -> set[int]:
    """Numbers of the arguments that a function compiled as on a GPU keeps; -1 for anything else of their size."""
    compiled = torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True)
    numbers = {a.untyped_storage().data_ptr(): i for i, a in enumerate(args) if isinstance(a, Tensor)}
    smallest = min(a.untyped_storage().nbytes() for a in args if isinstance(a, Tensor) and a.requires_grad)
    kept: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in numbers:
            kept.add(numbers[storage.data_ptr()])
        elif storage.nbytes() >= smallest:
            kept.add(-1)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        compiled(*args)
    return kept


@pytest.mark.parametrize("name", ["swiglu", "split_and_rotate", "losses"])
def test_stand_ins_keep_what_compiled_functions_keep(name: str) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).bfloat16().requires_grad_()

    if name == "swiglu":
        assert kept_by_compiler(elementwise.swiglu.function, random(2, 64, 96), random(2, 64, 96)) == {0, 1}
    elif name == "split_and_rotate":
        cos, sin = torch.rand(64, 4), torch.rand(64, 4)
        scales = random(8), random(8)  # without them, no compiler is asked
        arguments = random(2, 64, 12 * 8), cos, sin, 8, 2, False, scales, 1e-5
        assert kept_by_compiler(elementwise.split_and_rotate.function, *arguments) == {0, 1, 2}
    else:
        targets = torch.randint(96, (2, 64))
        assert kept_by_compiler(loss.whole_vocabulary_losses.function, random(2, 64, 96), targets, 0.0) - {1} == {0}
