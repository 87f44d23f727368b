"""Proof that weights mean the same model in two layouts: their logits are equal.

Only logits tell: a conversion of grouped queries can be right in every shape and wrong in every head. Ours are computed
from the tensor-parallel shards as they are, in one process: each rank's narrow model on the same hidden state, the
partial results added, as the ranks' all-reduce would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neox_core.checkpoint.meta import MetaCheckpoint
from neox_core.checkpoint.neox import NeoxCheckpoint
from neox_core.checkpoint.reference import llama_from_meta
from neox_core.config import ModelConfig
from neox_core.errors import CheckpointError
from neox_core.model import FinalNorm, ModelDimensions, OutputHead, TokenEmbedding, TransformerBlock

TOLERANCE = 1e-4
"""Largest difference between two logits; fp32 alone makes about 1e-6."""
_BATCH, _POSITIONS = 2, 96
"""Long enough for wrong RoPE to show at distances beyond a few tokens."""


@torch.inference_mode()
def logits_from_shards(shards: NeoxCheckpoint, model: ModelConfig, ids_BT: Tensor) -> Tensor:
    """fp32 logits [B,T,V] of our model, from the shards as they are, one layer in memory at a time.

    Raises:
        CheckpointError: a file is missing, or its tensors do not fit the model.
    """
    dims = ModelDimensions.of(model, ids_BT.shape[1]).shard(shards.tensor_parallel)
    x_BTD = torch.stack(
        [_embed(embedding, rank, ids_BT) for rank, embedding in _ranks(shards, 0, TokenEmbedding, dims)]
    )
    x_BTD = x_BTD.sum(0)
    for number in range(model.num_layers):
        blocks = [block for _, block in _ranks(shards, number + 2, TransformerBlock, dims)]
        x_BTD = x_BTD + sum(block.attention(block.input_layernorm(x_BTD)) for block in blocks)
        x_BTD = x_BTD + sum(block.mlp(block.post_attention_layernorm(x_BTD)) for block in blocks)
    norms = [norm for _, norm in _ranks(shards, model.num_layers + 3, FinalNorm, dims)]
    heads = [head for _, head in _ranks(shards, model.num_layers + 4, OutputHead, dims)]
    return torch.cat([head(norm(x_BTD)) for norm, head in zip(norms, heads, strict=True)], dim=-1)


def _ranks(
    shards: NeoxCheckpoint, index: int, build: Callable[[ModelDimensions], nn.Module], dims: ModelDimensions
) -> Iterator[tuple[int, Any]]:
    """Each rank with its module of the layer at `index`, loaded, in fp32."""
    for rank in range(shards.tensor_parallel):
        module = build(dims)
        try:
            module.load_state_dict(shards.layer(index, rank), strict=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{shards.folder}: layer {index} of rank {rank} does not fit: {reason}") from None
        yield rank, module.float().eval()


def _embed(embedding: TokenEmbedding, rank: int, ids_BT: Tensor) -> Tensor:
    """Vectors of the ids that lie in this rank's part of the vocabulary; zeros for the others."""
    rows = embedding.word_embeddings.num_embeddings
    local = ids_BT - rank * rows
    mine = (local >= 0) & (local < rows)
    return embedding(local.where(mine, 0)) * mine.unsqueeze(-1)


def sample_ids(vocab_size: int) -> Tensor:
    """Fixed pseudo-random token ids [B,T] that reach every part of the vocabulary."""
    return torch.randint(vocab_size, (_BATCH, _POSITIONS), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def compare_logits(shards: NeoxCheckpoint, reference: nn.Module, model: ModelConfig) -> float:
    """Largest absolute difference between our fp32 logits and those of a transformers model; NaN counts as infinite.

    Raises:
        CheckpointError: a file is missing, or its tensors do not fit the model.
    """
    ids_BT = sample_ids(model.vocab_size)
    ours = logits_from_shards(shards, model, ids_BT)
    theirs = reference(input_ids=ids_BT, use_cache=False).logits.float()
    return float((ours - theirs).abs().nan_to_num(nan=float("inf")).max())


def prove_conversion(
    source: Path, shards: NeoxCheckpoint, model: ModelConfig, tolerance: float = TOLERANCE
) -> dict[str, Any]:
    """Compare the shards with transformers' Llama built from Meta's files; yields a summary.

    Both use the RoPE base of the source, whatever the run will train with.

    Raises:
        CheckpointError: the logits differ by more than `tolerance`.
    """
    theta = MetaCheckpoint(source).model.rope_theta
    reference = llama_from_meta(source, model, sequence_length=_POSITIONS)
    difference = compare_logits(shards, reference, model.model_copy(update={"rope_theta": theta}))
    return judge(difference, tolerance, f"the shards in {shards.folder} and transformers' Llama from {source}")


def judge(difference: float, tolerance: float, what: str) -> dict[str, Any]:
    """A summary of a comparison.

    Raises:
        CheckpointError: the difference exceeds the tolerance.
    """
    if not difference <= tolerance:
        raise CheckpointError(f"logits of {what} differ by {difference:.3g}, more than {tolerance:g}: do not use them")
    return {"largest_logit_difference": difference, "tokens": _BATCH * _POSITIONS, "tolerance": tolerance}
