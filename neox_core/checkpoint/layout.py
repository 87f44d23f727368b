"""One description of where every tensor lives in Meta's, NeoX's and Hugging Face's layouts.

Each conversion, in any direction, reads this table; none has rules of its own. Weights are [rows = outputs,
columns = inputs], as torch.nn.Linear keeps them. Only views, copies and integer arithmetic: every function is exact.

Two things differ between the layouts beside names:

* RoPE pairs. Meta rotates rows (2i, 2i+1) of a head (interleaved), NeoX and Hugging Face rows (i, i + head_dim/2)
  (halves), so the rows of wq and wk are permuted within each head.
* NeoX fuses q, k and v: for each query head its head_dim rows of q, then the next head_dim·kv_heads/heads rows of k,
  then as many of v. Those cuts fall together with the cuts between tensor-parallel ranks, so a rank's fused tensor is
  a plain slice of the whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_core.config import ModelConfig
from neox_core.errors import CheckpointError

QKV = "attention.query_key_value.weight"


@dataclass(frozen=True)
class TensorLayout:
    """One tensor as Meta and Hugging Face have it, and where NeoX puts it. Names lack the layer's prefix."""

    neox: str
    meta: str
    huggingface: str
    axes: tuple[str, ...]
    """What each dimension counts: vocab, hidden, query, key_value or ffn."""
    meta_split: int | None
    """Dimension that Meta's shards cut; None: every shard has the whole tensor."""
    neox_split: int | None
    """Dimension that NeoX's tensor-parallel ranks cut (of the fused tensor, for q, k and v); None: replicated."""
    rotary: bool = False
    """Rows are RoPE pairs, so their order differs between Meta and the others."""

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        sizes = {
            "vocab": model.vocab_size,
            "hidden": model.hidden_size,
            "query": model.num_attention_heads * model.head_dim,
            "key_value": model.num_kv_heads * model.head_dim,
            "ffn": model.intermediate_size,
        }
        return tuple(sizes[axis] for axis in self.axes)


_EMBEDDING = (
    TensorLayout("word_embeddings.weight", "tok_embeddings.weight", "embed_tokens.weight", ("vocab", "hidden"), 1, 0),
)
_TRANSFORMER = (
    TensorLayout("input_layernorm.scale", "attention_norm.weight", "input_layernorm.weight", ("hidden",), None, None),
    TensorLayout(QKV, "attention.wq.weight", "self_attn.q_proj.weight", ("query", "hidden"), 0, 0, rotary=True),
    TensorLayout(QKV, "attention.wk.weight", "self_attn.k_proj.weight", ("key_value", "hidden"), 0, 0, rotary=True),
    TensorLayout(QKV, "attention.wv.weight", "self_attn.v_proj.weight", ("key_value", "hidden"), 0, 0),
    TensorLayout("attention.dense.weight", "attention.wo.weight", "self_attn.o_proj.weight", ("hidden", "query"), 1, 1),
    TensorLayout(
        "post_attention_layernorm.scale",
        "ffn_norm.weight",
        "post_attention_layernorm.weight",
        ("hidden",),
        None,
        None,
    ),
    TensorLayout("mlp.w1.weight", "feed_forward.w1.weight", "mlp.gate_proj.weight", ("ffn", "hidden"), 0, 0),
    TensorLayout("mlp.w2.weight", "feed_forward.w2.weight", "mlp.down_proj.weight", ("hidden", "ffn"), 1, 1),
    TensorLayout("mlp.w3.weight", "feed_forward.w3.weight", "mlp.up_proj.weight", ("ffn", "hidden"), 0, 0),
)
_FINAL_NORM = (TensorLayout("norm.scale", "norm.weight", "norm.weight", ("hidden",), None, None),)
_OUTPUT = (TensorLayout("final_linear.weight", "output.weight", "lm_head.weight", ("vocab", "hidden"), 0, 0),)
KINDS = (_EMBEDDING, _TRANSFORMER, _FINAL_NORM, _OUTPUT)
"""What a layer can hold."""
NEOX_SPLITS = {tensor.neox: tensor.neox_split for kind in KINDS for tensor in kind}
"""Dimension that tensor-parallel ranks cut, by NeoX's name; None: replicated."""


@dataclass(frozen=True)
class Layer:
    """One layer of NeoX's sequence and the tensors in it."""

    index: int
    """Position in NeoX's sequence: embedding 0, transformer layer l at l + 2, final norm L + 3, output L + 4."""
    tensors: tuple[TensorLayout, ...]
    meta_prefix: str
    huggingface_prefix: str

    @property
    def neox_names(self) -> tuple[str, ...]:
        """Names in NeoX's files, each once."""
        return tuple(dict.fromkeys(tensor.neox for tensor in self.tensors))

    def meta_name(self, tensor: TensorLayout) -> str:
        """Full name in Meta's files."""
        return self.meta_prefix + tensor.meta

    def huggingface_name(self, tensor: TensorLayout) -> str:
        """Full name in Hugging Face's files."""
        return self.huggingface_prefix + tensor.huggingface


def iterate_layers(num_layers: int) -> Iterator[Layer]:
    """All layers that hold weights, in the order of computation."""
    yield Layer(0, _EMBEDDING, "", "model.")
    for number in range(num_layers):
        yield Layer(number + 2, _TRANSFORMER, f"layers.{number}.", f"model.layers.{number}.")
    yield Layer(num_layers + 3, _FINAL_NORM, "", "model.")
    yield Layer(num_layers + 4, _OUTPUT, "", "")


def interleaved_to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from Meta's pairs (2i, 2i+1) to halves (i, i + head_dim/2). [heads·head_dim, columns]."""
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).flatten(0, 2)


def halves_to_interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Inverse of `interleaved_to_halves`."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).flatten(0, 2)


def fuse_qkv(query: Tensor, key: Tensor, value: Tensor, head_dim: int) -> Tensor:
    """Fuse q [heads·head_dim, h] with k and v [kv_heads·head_dim, h] of one rank (or of the whole model)."""
    heads = query.shape[0] // head_dim
    per_head = [part.reshape(heads, -1, part.shape[1]) for part in (query, key, value)]
    return torch.cat(per_head, dim=1).flatten(0, 1)


def split_qkv(fused: Tensor, head_dim: int, queries_per_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `fuse_qkv`."""
    share = head_dim // queries_per_kv
    per_head = fused.reshape(-1, head_dim + 2 * share, fused.shape[1])
    query, key, value = (part.flatten(0, 1) for part in torch.split(per_head, [head_dim, share, share], dim=1))
    return query, key, value


def to_neox(layer: Layer, read_meta: Callable[[str], Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """One layer's whole tensors under NeoX's names; `read_meta` gives a whole tensor by Meta's name."""
    parts: dict[str, list[Tensor]] = {}
    for tensor in layer.tensors:
        weight = read_meta(layer.meta_name(tensor))
        weight = interleaved_to_halves(weight, model.head_dim) if tensor.rotary else weight
        parts.setdefault(tensor.neox, []).append(weight)
    return {
        name: fuse_qkv(part[0], part[1], part[2], model.head_dim) if name == QKV else part[0]
        for name, part in parts.items()
    }


def to_huggingface(layer: Layer, neox: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """One layer's whole NeoX tensors under Hugging Face's full names."""
    weights = _unfused(layer, neox, model)
    return {layer.huggingface_name(tensor): weight for tensor, weight in zip(layer.tensors, weights, strict=True)}


def to_meta(layer: Layer, neox: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """One layer's whole NeoX tensors under Meta's full names: inverse of `to_neox`."""
    weights = _unfused(layer, neox, model)
    return {
        layer.meta_name(tensor): halves_to_interleaved(weight, model.head_dim) if tensor.rotary else weight
        for tensor, weight in zip(layer.tensors, weights, strict=True)
    }


def _unfused(layer: Layer, neox: Mapping[str, Tensor], model: ModelConfig) -> list[Tensor]:
    """The layer's tensors in the table's order, with q, k and v apart."""
    _check_shapes(layer, neox, model)
    weights: list[Tensor] = []
    for name in layer.neox_names:
        fused = name == QKV
        weights.extend(split_qkv(neox[name], model.head_dim, model.queries_per_kv) if fused else [neox[name]])
    return weights


def _check_shapes(layer: Layer, neox: Mapping[str, Tensor], model: ModelConfig) -> None:
    for name in layer.neox_names:
        shapes = [tensor.shape(model) for tensor in layer.tensors if tensor.neox == name]
        expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        found = tuple(neox[name].shape) if name in neox else None
        if found != expected:
            raise CheckpointError(
                f"layer {layer.index}: {name} has shape {found}, but the model needs {expected}: is the model section "
                "of the configuration this checkpoint's?"
            )


def cut(neox: Mapping[str, Tensor], tensor_parallel: int, rank: int) -> dict[str, Tensor]:
    """A tensor-parallel rank's part of one layer's whole NeoX tensors (views)."""
    return {name: slice_of(weight, NEOX_SPLITS[name], tensor_parallel, rank) for name, weight in neox.items()}


def join(ranks: Sequence[Mapping[str, Tensor]], origin: str) -> dict[str, Tensor]:
    """Inverse of `cut` over all ranks; `origin` is for the error.

    Raises:
        CheckpointError: a replicated tensor is not the same on all ranks.
    """
    return {
        name: concatenate([rank[name] for rank in ranks], NEOX_SPLITS[name], f"{origin}: {name}") for name in ranks[0]
    }


def slice_of(weight: Tensor, dim: int | None, parts: int, part: int) -> Tensor:
    """Part number `part` of `parts` equal ones along `dim` (a view); the whole tensor if `dim` is None."""
    if dim is None:
        return weight
    size = weight.shape[dim] // parts
    return weight.narrow(dim, part * size, size)


def concatenate(parts: Sequence[Tensor], dim: int | None, name: str) -> Tensor:
    """Inverse of `slice_of`; `name` is for the error.

    Raises:
        CheckpointError: `dim` is None (every part is the whole tensor), and the parts are not equal.
    """
    if dim is not None:
        return torch.cat(list(parts), dim=dim) if len(parts) > 1 else parts[0]
    for number, part in enumerate(parts[1:], start=1):
        if not torch.equal(parts[0], part):
            raise CheckpointError(f"{name} must be the same in every shard, but shard {number} differs from shard 0")
    return parts[0]
