"""Stand-ins take a kernel's place, wherever it is called from, and give it back."""

from __future__ import annotations

import pytest
import torch

from neox_core.kernels.dispatch import Kernel, stand_ins
from neox_core.model import elementwise
from neox_core.model.llama import RMSNorm


def doubled(x: int) -> int:
    """Twice x."""
    return 2 * x


def test_the_implementation_runs_and_the_plain_function_stays() -> None:
    kernel = Kernel(doubled, lambda x: x + x + 100)
    assert (kernel(3), kernel.function(3)) == (106, 6)
    assert kernel.__doc__ == "Twice x."


def test_stand_ins_nest_and_end() -> None:
    one, other = Kernel(doubled), Kernel(doubled)
    with stand_ins({one: lambda x: -x}):
        assert (one(3), other(3)) == (-3, 6)
        with stand_ins({other: lambda x: 0}):
            assert (one(3), other(3)) == (-3, 0)
        assert (one(3), other(3)) == (-3, 6)
    with pytest.raises(KeyError), stand_ins({one: lambda x: -x}):
        raise KeyError
    assert one(3) == 6


def test_the_model_calls_a_stand_in() -> None:
    norm, x = RMSNorm(4, 1e-5), torch.ones(2, 4)
    with stand_ins({elementwise.rms_norm: lambda x, scale, eps: x + 1}):
        assert torch.equal(norm(x), x + 1)
    torch.testing.assert_close(norm(x), x)
