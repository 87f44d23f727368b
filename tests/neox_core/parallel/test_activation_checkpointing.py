"""Activation checkpointing: what is kept, that nothing else changes, and that no product is repeated needlessly."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neox_core.config import ActivationCheckpointing, ParallelConfig, RunConfig, load_config
from neox_core.kernels.arithmetic import arithmetic_type
from neox_core.kernels.dispatch import stand_ins
from neox_core.model import ModelDimensions, TransformerBlock
from neox_core.model.document_attention import dense_mask
from neox_core.parallel.activation_checkpointing import checkpointing_of
from neox_core.parallel.layers import FusedBlock
from neox_core.parallel.weight_gradients import accept_accumulators, accumulate_gradients
from neox_core.planning.activations import block_bytes
from neox_core.simulate.recorder import Recorder
from tests.paths import CONFIGS

MODES: tuple[ActivationCheckpointing, ...] = get_args(ActivationCheckpointing)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = 48
POSITIONS = torch.tensor([[*range(30), *range(18)], [*range(1), *range(47)]])


def dimensions(kv_heads: int) -> ModelDimensions:
    return ModelDimensions(
        hidden_size=64, num_heads=8, num_kv_heads=kv_heads, head_dim=8, intermediate_size=96, vocab_size=8,
        rope_theta=1e4, norm_eps=1e-5, sequence_length=TOKENS,
    )  # fmt: skip


def make_block(dims: ModelDimensions, mode: ActivationCheckpointing, dtype: torch.dtype) -> FusedBlock:
    torch.manual_seed(1)
    plain = TransformerBlock(dims).to(dtype)
    accept_accumulators(plain)
    block = FusedBlock(plain)
    block.checkpointing = checkpointing_of(mode)
    return block


def config_with(precision: str, mode: ActivationCheckpointing, masked: bool = False) -> RunConfig:
    config = load_config(CONFIGS / "toy.yml")
    changes = {
        "precision": precision,
        "activation_checkpointing": mode,
        "micro_batch_size": 2,
        "sequence_length": TOKENS,
        "mask_documents": masked,
    }
    return config.model_copy(update={"train": config.train.model_copy(update=changes), "parallel": ParallelConfig()})


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_kept_bytes_are_the_formulas(mode: ActivationCheckpointing, precision: str, tensor: int) -> None:
    # The CPU's attention copies k and v for each query head where they are grouped, unless it is computed again.
    dims = dimensions(kv_heads=8 if mode == "none" else 2).shard(tensor)
    block, dtype = make_block(dims, mode, DTYPES[precision]), DTYPES[precision]
    for positions in (None, POSITIONS) if mode != "none" else (None,):
        if positions is not None:
            dense_mask(positions)  # made once for all layers
        with stand_ins({arithmetic_type: lambda x: x.dtype}), Recorder() as recorder:  # as on a GPU
            x = torch.randn(2, TOKENS, 64).to(dtype).requires_grad_()
            y = block.compute(x, positions)
            del x
            kept = recorder.bytes - y.untyped_storage().nbytes()
        config = config_with(precision, mode, masked=positions is not None)
        assert kept == block_bytes(config, dims, mode, compiled=False)


def stand_in(parameters: list[torch.nn.Parameter], buffers: list[Tensor]) -> Any:
    """An optimizer that has accumulators."""
    return SimpleNamespace(
        bf16_groups=[parameters], fp32_groups_gradients=[buffers], on_gradient=lambda group, index: None
    )


def gradients(
    mode: ActivationCheckpointing, dtype: torch.dtype, positions: Tensor | None, accumulate: bool
) -> tuple[list[Tensor], list[int]]:
    """Outputs and gradients of two micro batches, and how many bytes stayed after each."""
    block = make_block(dimensions(kv_heads=2), mode, dtype)
    parameters = list(block.parameters())
    buffers = [torch.zeros(p.numel()) for p in parameters]
    if accumulate:
        optimizer = stand_in(parameters, buffers)
        accumulate_gradients(block, optimizer)
    found: list[Tensor] = []
    left: list[int] = []
    with Recorder() as recorder:
        for seed in (2, 3):
            x = torch.randn(2, TOKENS, 64, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
            y = block.compute(x, positions)
            y.float().square().sum().backward()
            assert x.grad is not None
            found += [y.detach().clone(), x.grad.clone()]
            del x, y
            left.append(recorder.bytes)
    return [*found, *buffers, *(p.grad for p in parameters if p.grad is not None)], left


@pytest.mark.parametrize("accumulate", [False, True], ids=["gradients", "accumulated by products"])
@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["one document", "documents"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_modes_agree_bit_for_bit_and_leave_nothing(
    dtype: torch.dtype, positions: Tensor | None, accumulate: bool
) -> None:
    expected, kept = gradients("none", dtype, positions, accumulate)
    for mode in ("selective", "full"):
        found, left = gradients(mode, dtype, positions, accumulate)
        assert len(found) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert left[1] - left[0] == kept[1] - kept[0], "memory that a micro batch leaves behind"


def test_accumulators_get_what_autograd_gives() -> None:
    """Of all parameters, norms' scales too."""
    found, _ = gradients("none", torch.float32, None, accumulate=True)
    expected, _ = gradients("none", torch.float32, None, accumulate=False)
    buffers = found[4:]  # after outputs and inputs' gradients of two micro batches
    of_autograd = expected[len(expected) - len(buffers) :]
    assert len(expected) == 4 + 2 * len(buffers)
    for one, other in zip(buffers, of_autograd, strict=True):
        torch.testing.assert_close(one.view(other.shape), other, rtol=1e-5, atol=1e-6)


class CountProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.calls["mm" if name.startswith(("mm", "addmm")) else "attention" if "dot_product" in name else "other"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "products", "attentions"), [("none", 0, 0), ("selective", 0, 1), ("full", 4, 1)])
def test_what_is_computed_again(mode: ActivationCheckpointing, products: int, attentions: int) -> None:
    """Full checkpointing computes four of five products again: what w2 gives is not needed."""
    block = make_block(dimensions(kv_heads=8), mode, torch.float32)
    parameters = list(block.parameters())
    buffers = [torch.zeros(p.numel()) for p in parameters]
    optimizer = stand_in(parameters, buffers)
    accumulate_gradients(block, optimizer)
    y = block(torch.randn(2, TOKENS, 64, requires_grad=True))
    with CountProducts() as counted:
        y.sum().backward()
    assert counted.calls["mm"] == 10 + products  # an input's and a weight's gradient of five products
    assert counted.calls["attention"] == 1 + attentions


def test_nothing_is_kept_without_gradients() -> None:
    block = make_block(dimensions(kv_heads=2), "selective", torch.float32)
    with torch.no_grad(), Recorder() as recorder:
        y = block(torch.randn(2, TOKENS, 64))
    assert recorder.bytes == y.untyped_storage().nbytes()
