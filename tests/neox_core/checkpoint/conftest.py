"""Small models and a writer of Meta's format that shares no code with the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neox_core.config import ModelConfig


@dataclass(frozen=True)
class RawBase:
    """A checkpoint in Meta's format on disk, and its whole tensors."""

    folder: Path
    model: ModelConfig
    weights: dict[str, Tensor]


def _model(num_kv_heads: int = 4, num_attention_heads: int = 8, **changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": num_attention_heads,
        "num_kv_heads": num_kv_heads,
        "intermediate_size": 192,
        "vocab_size": 128,
        "rope_theta": 1e6,
    }
    return ModelConfig(**(values | changes))


def _whole_weights(model: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden, ffn, vocab = model.hidden_size, model.intermediate_size, model.vocab_size
    kv = model.num_kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, hidden), "output.weight": (vocab, hidden)}
    for number in range(model.num_layers):
        attention, mlp = f"layers.{number}.attention", f"layers.{number}.feed_forward"
        shapes |= {f"{attention}.wq.weight": (hidden, hidden), f"{attention}.wo.weight": (hidden, hidden)}
        shapes |= {f"{attention}.wk.weight": (kv, hidden), f"{attention}.wv.weight": (kv, hidden)}
        shapes |= {f"{mlp}.w{i}.weight": (hidden, ffn) if i == 2 else (ffn, hidden) for i in (1, 2, 3)}
        shapes |= {f"layers.{number}.{norm}.weight": (hidden,) for norm in ("attention_norm", "ffn_norm")}
    shapes["norm.weight"] = (hidden,)
    return {
        # Norms away from 1 and from each other, so that none can take another's place unseen.
        name: (torch.randn(shape, generator=generator) * 0.1 + (len(shape) == 1)).to(torch.bfloat16)
        for name, shape in shapes.items()
    }


def _shard(name: str, weight: Tensor, shards: int, shard: int) -> Tensor:
    if weight.dim() == 1:
        return weight.clone()
    row_parallel = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
    return weight.chunk(shards, dim=1 if row_parallel else 0)[shard].clone()


@pytest.fixture
def model_of() -> Callable[..., ModelConfig]:
    """Builds a model: 2 layers, hidden 64, 8 heads of width 8, 4 KV heads unless told otherwise."""
    return _model


@pytest.fixture
def write_base(tmp_path: Path) -> Callable[..., RawBase]:
    """Writes a model in Meta's format; `params` changes params.json (None removes a key)."""

    def write(model: ModelConfig | None = None, shards: int = 2, **params: Any) -> RawBase:
        model = model or _model()
        folder = tmp_path / "base"
        folder.mkdir(exist_ok=True)
        weights = _whole_weights(model)
        for shard in range(shards):
            content = {name: _shard(name, weight, shards, shard) for name, weight in weights.items()}
            torch.save(content, folder / f"consolidated.{shard:02d}.pth")
        # 192 = 2/3 of 4 · 64 rounded up to a multiple of 64
        values = {"dim": model.hidden_size, "n_layers": model.num_layers, "n_heads": model.num_attention_heads}
        values |= {"n_kv_heads": model.num_kv_heads, "multiple_of": 64, "norm_eps": model.norm_eps}
        values |= {"rope_theta": model.rope_theta, "vocab_size": -1} | params
        content = {key: value for key, value in values.items() if value is not None}
        (folder / "params.json").write_text(json.dumps(content))
        return RawBase(folder, model, weights)

    return write
