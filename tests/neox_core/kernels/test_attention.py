"""Attention kernels: the names in the table, the choice among them, and one more that a caller registers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from neox_core.config import RunConfig, TrainConfig, batch_geometry
from neox_core.errors import ConfigError
from neox_core.kernels import attention, scaled_dot_product
from neox_core.kernels.attention import AttentionKernel
from tests.distributed import run_ranks
from tests.neox_core.train.small_training import config_for, rank_batches

Choose = Any  # the cached function


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[Choose]:
    """The choice of the kernel on a Hopper GPU, without what was chosen before."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    attention.attention_function.cache_clear()
    yield attention.attention_function
    attention.attention_function.cache_clear()


def installed(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, modules.get(name.replace(".", "_")))  # None makes the import fail


def test_only_sdpa_runs_on_cpus_and_in_fp32(choose: Choose) -> None:
    assert choose("auto", "cpu", torch.bfloat16) is scaled_dot_product.sdpa
    assert choose("auto", "cuda", torch.float32) is scaled_dot_product.sdpa
    with pytest.raises(ConfigError, match=r"train\.attention cudnn runs on CUDA devices in bf16 only, and this is cpu"):
        choose("cudnn", "cpu", torch.bfloat16)


def test_fastest_that_is_installed(
    choose: Choose, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed(monkeypatch)
    with caplog.at_level("INFO"):
        assert choose("auto", "cuda", torch.bfloat16) is scaled_dot_product.cudnn_or_sdpa
        assert choose("cudnn", "cuda", torch.bfloat16) is scaled_dot_product.cudnn
        choose("auto", "cpu", torch.bfloat16)
    assert caplog.messages == ["attention: cudnn or sdpa", "attention: cudnn", "attention: sdpa"]
    installed(monkeypatch, flash_attn=Flash(), flash_attn_cute=Flash())
    choose.cache_clear()
    with caplog.at_level("INFO"):
        choose("auto", "cuda", torch.bfloat16)
    assert "attention: flash_attn_4" in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    choose.cache_clear()
    with caplog.at_level("INFO"):
        choose("auto", "cuda", torch.bfloat16)
    assert caplog.messages[-1] == "attention: flash_attn"


def test_flash_attn_4_is_refused_on_older_gpus(choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, flash_attn=Flash(), flash_attn_cute=Flash())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match=r"flash_attn_4 needs a Hopper GPU"):
        choose("flash_attn_4", "cuda", torch.bfloat16)


@pytest.mark.parametrize("backend", ["flash_attn_4", "flash_attn"])
def test_demanded_backend(backend: str, choose: Choose, monkeypatch: Any) -> None:
    installed(monkeypatch)
    with pytest.raises(ConfigError, match=f"train.attention {backend} cannot be imported .* pip install"):
        choose(backend, "cuda", torch.bfloat16)
    flash = Flash(pair=backend == "flash_attn_4")
    installed(monkeypatch, flash_attn=flash, flash_attn_cute=flash)
    q, k, v = torch.ones(3, 1, 2, 2, 4)
    assert choose(backend, "cuda", torch.bfloat16)(q, k, v) is q
    assert flash.settings == [{"causal": True}]


class Flash:
    """Stands for flash_attn; version 4 returns the log-sum-exp too."""

    def __init__(self, pair: bool = False) -> None:
        self.pair = pair
        self.settings: list[dict[str, Any]] = []

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
        self.settings.append(settings)
        return (q, None) if self.pair else q


def with_attention(name: str) -> RunConfig:
    """A small training's configuration, checked as one that is read from a file."""
    config = config_for("gqa", 1, 1, 1, activation_checkpointing="none")
    train = TrainConfig.model_validate(config.train.model_dump() | {"attention": name})
    return config.model_copy(update={"train": train})


def test_names_that_no_kernel_has_are_refused() -> None:
    for name in attention.names():
        assert with_attention(name).train.attention == name
    message = "no attention kernel 'linear': use one of auto, flash_attn_4, flash_attn, cudnn, sdpa"
    with pytest.raises(ValidationError, match=message):
        with_attention("linear")
    with pytest.raises(ValueError, match="there is an attention kernel 'sdpa' already"):
        attention.register(AttentionKernel("sdpa", lambda: scaled_dot_product.sdpa))


def test_a_registered_kernel_can_be_taken_back() -> None:
    attention.register(AttentionKernel("counted", lambda: scaled_dot_product.sdpa))
    assert with_attention("counted").train.attention == "counted"
    with pytest.raises(ConfigError, match=r"train\.attention counted runs on CUDA devices in bf16 only"):
        attention.attention_function("counted", "cpu", torch.float32)
    attention.unregister("counted")
    with pytest.raises(ValidationError, match="no attention kernel 'counted'"):
        with_attention("counted")


def train_with_a_kernel_of_ones_own() -> tuple[float, int, int]:
    """Loss of a step, calls of the kernel, and those that were expected."""
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
    from neox_core.train.dry_run import zero_weights
    from neox_core.train.engine.deepspeed_engine import build_engine

    calls = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape)
        return scaled_dot_product.sdpa(q, k, v)

    attention.register(AttentionKernel("counted", lambda: counted, anywhere=True))
    config = with_attention("counted")
    geometry = batch_geometry(config)
    mesh = build_mesh(config.parallel, init_distributed(config.launch))
    engine = build_engine(config, mesh, geometry, zero_weights(config))
    loss = float(engine.train_batch(rank_batches(config, 0)))
    return loss, len(calls), config.model.num_layers * geometry.accumulation_steps


def test_training_runs_a_registered_kernel() -> None:
    ((loss, calls, expected),) = run_ranks(train_with_a_kernel_of_ones_own, 1)
    assert loss == pytest.approx(float(torch.tensor(128.0).log()))
    assert calls == expected
