"""How the tensor-parallel ranks hold each parameter. Optimizer, norms, and checks of replicas read it; none guesses.

The model knows nothing of ranks, so the table below says it per layer, by the parameter's name. A new parameter needs a
line here: without one, a training does not start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from neox_core.errors import ConfigError
from neox_core.model import FinalNorm, ModelDimensions, OutputHead, TokenEmbedding, TransformerBlock

_ATTRIBUTE = "sharding"


@dataclass(frozen=True)
class Sharding:
    """How the ranks of a tensor-parallel group hold a parameter."""

    kind: Literal["matrix", "norm"]
    """Biases count as norms: a vector, without decay."""
    split: int | None = None
    """Dimension that they split; None: each has the whole parameter."""
    partial_gradient: bool = False
    """Each computes a part of a replicated parameter's gradient: the gradient is the sum over them. Otherwise each
    computes all of it."""
    shared_rows: tuple[range, ...] = ()
    """Rows of a split parameter that some of the ranks have in common, each with a part of their gradient."""

    tied: bool = False
    """Another layer's parameter, by which alone the optimizer knows it."""

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to norms and biases."""
        return self.kind == "matrix"

    @property
    def replicated(self) -> bool:
        """Whether each rank has the whole parameter."""
        return self.split is None


ROWS = Sharding("matrix", split=0)
COLUMNS = Sharding("matrix", split=1)
TOKEN_NORM = Sharding("norm")
"""A norm or bias of hidden states, outside of the split regions: each rank has them all, or, where ranks split the
tokens, a part of them, and then a part of the gradient."""
HEAD_NORM = Sharding("norm", partial_gradient=True)
"""A norm within a split region, such as that of each head's queries and keys: a rank has its own heads' part of the
gradient."""
ROW_BIAS = Sharding("norm", split=0)
"""The bias of a matrix whose rows are split."""

SHARDINGS: Mapping[type[nn.Module], Mapping[str, Sharding]] = {
    TokenEmbedding: {"word_embeddings.weight": ROWS},
    TransformerBlock: {
        "input_layernorm.scale": TOKEN_NORM,
        "attention.query_key_value.weight": ROWS,
        "attention.query_key_value.bias": ROW_BIAS,
        "attention.q_norm.scale": HEAD_NORM,
        "attention.k_norm.scale": HEAD_NORM,
        "attention.dense.weight": COLUMNS,
        "attention.dense.bias": TOKEN_NORM,
        "post_attention_layernorm.scale": TOKEN_NORM,
        "post_feedforward_layernorm.scale": TOKEN_NORM,
        "mlp.w1.weight": ROWS,
        "mlp.w2.weight": COLUMNS,
        "mlp.w3.weight": ROWS,
    },
    FinalNorm: {"norm.scale": TOKEN_NORM},
    OutputHead: {"final_linear.weight": ROWS},
}

_OF_ALL_HEADS: Mapping[str, Sharding] = dict.fromkeys(("attention.q_norm.scale", "attention.k_norm.scale"), ROW_BIAS)
"""Where one norm is over the queries or keys of all heads, instead: its scale is split as they are."""


def set_sharding(parameter: Tensor, sharding: Sharding) -> None:
    """Mark a parameter. DeepSpeed is told what it asks for."""
    setattr(parameter, _ATTRIBUTE, sharding)
    parameter.tensor_model_parallel = not sharding.replicated  # type: ignore[attr-defined]


def sharding_of(parameter: Tensor, name: str = "") -> Sharding:
    """A parameter's mark.

    Raises:
        ConfigError: it has none.
    """
    found: Sharding | None = getattr(parameter, _ATTRIBUTE, None)
    if found is None:
        raise ConfigError(
            f"parameter {name or '(unnamed)'} of shape {list(parameter.shape)} does not say how tensor-parallel ranks "
            "hold it: add it to SHARDINGS in neox_core/parallel/sharding.py"
        )
    return found


def mark_parameters(layer: nn.Module, dims: ModelDimensions, ranks: int, tokens_split: bool) -> None:
    """Mark all parameters of a layer of the model that was built in one rank's dimensions.

    Args:
        dims: the whole model's.
        ranks: size of the tensor-parallel group.
        tokens_split: its ranks split the tokens outside of attention and MLP.

    Raises:
        ConfigError: the table lacks a parameter.
    """
    table = {**SHARDINGS.get(type(layer), {}), **(_OF_ALL_HEADS if dims.qk_norm == "projection" else {})}
    for name, parameter in layer.named_parameters():
        if name in table:
            sharding = table[name]
            if isinstance(layer, OutputHead):
                sharding = replace(sharding, tied=dims.tied_embeddings)
            if sharding.replicated:
                sharding = replace(sharding, partial_gradient=sharding.partial_gradient or tokens_split)
            set_sharding(parameter, sharding)
        sharding_of(parameter, f"{type(layer).__name__}.{name}")
    if isinstance(layer, TransformerBlock) and ranks > dims.num_kv_heads:
        for fused in layer.attention.query_key_value.parameters():
            set_sharding(fused, replace(sharding_of(fused), shared_rows=key_value_rows(dims.shard(ranks))))
        if dims.qk_norm == "projection":
            scale = layer.attention.k_norm.scale
            set_sharding(scale, replace(sharding_of(scale), shared_rows=(range(len(scale)),)))


def key_value_rows(dims: ModelDimensions) -> tuple[range, ...]:
    """Rows of a block's fused projection that are k and v.

    Args:
        dims: one rank's.
    """
    groups = dims.num_kv_heads if dims.grouped_qkv else dims.num_heads
    q_rows = dims.head_dim * dims.num_heads // groups
    stride = q_rows + 2 * dims.head_dim * dims.num_kv_heads // groups
    return tuple(range(group * stride + q_rows, (group + 1) * stride) for group in range(groups))
