"""Parameters and memory per rank, counted from the configuration and the model's own layers.

Symbols: L layers, D hidden size, N query heads, K key-value heads, H head width, F intermediate size, V vocabulary,
each one rank's; TP, PP, DP degrees of tensor, pipeline and data parallelism; B micro batch, T sequence length; e bytes
per element. `llemma plan --simulate` measures the same in the real engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from neox_core.config import ActivationCheckpointing, BatchGeometry, ModelConfig, RunConfig
from neox_core.model import FinalNorm, ModelDimensions, OutputHead, TokenEmbedding, TransformerBlock
from neox_core.optimizer import update_rule
from neox_core.optimizer.rule import STATE_BYTES
from neox_core.parallel.sharding import mark_parameters, sharding_of
from neox_core.parallel.stages import pipeline_layers
from neox_core.planning.activations import DTYPE_BYTES, kept_bytes, working_bytes

RESERVED_BYTES = 4 * 2**30
"""What is not counted: the CUDA context, code and workspaces of kernels (2.4 GiB on an H200), the allocator's fragments
(0.4), and NCCL's buffers (about 1)."""

_FP32 = 4
_MASTER_BYTES = {"fp32": 4, "packed": 2}


def parameter_count(model: ModelConfig, input_embedding: bool = True) -> int:
    """Number of parameters. Llama's: 2·V·D + L·(D·H·(N + 2K) + N·H·D + 3·D·F + 2·D) + D.

    Q, K, V; attention output; three matrices of SwiGLU; two norms a layer and one at the end; input embedding and
    output head, which count once where they are tied; no biases (arXiv 2302.13971, 2307.09288).

    Args:
        input_embedding: count the input embedding's V·D too. FLOPs are counted without it: a lookup costs none.
    """
    embedding = int(input_embedding and not model.tied_embeddings)
    layers = {TokenEmbedding: embedding, TransformerBlock: model.num_layers, FinalNorm: 1, OutputHead: 1}
    return sum(count * _parameters(model, layer, 1).all for layer, count in layers.items())


class _Parameters(NamedTuple):
    """One tensor-parallel rank's parameters, by their marks."""

    all: int
    replicated: int
    """That all ranks of the group have."""
    vectors: int
    """Norms and biases."""


@cache
def _parameters(model: ModelConfig, layer_type: type[nn.Module], ranks: int) -> _Parameters:
    """Those of a layer."""
    dims = ModelDimensions.of(model, 1)
    with torch.device("meta"):
        layer = layer_type(dims.shard(ranks))
    mark_parameters(layer, dims, ranks, tokens_split=False)
    marked = [(parameter.numel(), sharding_of(parameter)) for parameter in layer.parameters()]
    return _Parameters(
        all=sum(size for size, _ in marked),
        replicated=sum(size for size, mark in marked if mark.replicated),
        vectors=sum(size for size, mark in marked if not mark.decays),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part. The CUDA context, the communicators and fragmentation come on top."""

    weights: int
    """Parameters in train.precision."""
    gradients: int
    """The fp32 buffer in which micro batches accumulate."""
    master: int
    """fp32 master weights, or their low half, split among the data-parallel ranks (ZeRO stage 1, arXiv 1910.02054)."""
    optimizer: int
    """What the optimizer keeps, split likewise: two fp32 moments for AdamW."""
    tables: int
    """Cosines and sines of the rotary positions, fp32, in each layer."""
    activations: int
    """Kept for the backward pass, for all micro batches in flight, and for weights' gradients that are deferred."""
    working: int
    """The most that a backward pass needs besides: a block's gradients and what it computes again, or logits."""

    @property
    def state(self) -> int:
        """What is there between steps."""
        return self.total - self.activations - self.working

    @property
    def total(self) -> int:
        """Sum of the parts, in bytes."""
        return sum(getattr(self, part.name) for part in fields(self))


def stage_memory(
    config: RunConfig, geometry: BatchGeometry, stage: int, modes: Sequence[ActivationCheckpointing]
) -> Memory:
    """Memory of each rank of one pipeline stage, in bytes.

    Args:
        stage: 0 holds the embedding, the last one the final norm and the output head.
        modes: activation checkpointing of each of its layers.
    """
    dims = rank_dimensions(config)
    parameters, copied = rank_parameters(config, stage), copied_parameters(config, stage)
    shard = -(-parameters // geometry.data_parallel)
    layers = stage_layers(config, stage)
    return Memory(
        weights=DTYPE_BYTES[config.train.precision] * (parameters + copied),
        gradients=_FP32 * (parameters + copied),
        # In fp32 the parameters are their own master weights.
        master=0 if config.train.precision == "fp32" else _MASTER_BYTES[config.train.master_weights] * shard,
        optimizer=len(update_rule(config.train.optimizer).state_names) * STATE_BYTES * shard,
        tables=layers * _FP32 * dims.head_dim * config.train.sequence_length,
        activations=kept_bytes(config, dims, geometry, stage, modes),
        working=working_bytes(config, dims, geometry, stage, modes),
    )


def memory_limit(config: RunConfig, gpu_memory: float) -> float:
    """Bytes that a rank may fill: what `train.memory_gib` says, or a GPU's memory less what is not counted."""
    given = config.train.memory_gib
    return gpu_memory - RESERVED_BYTES if given is None else given * 2**30


def stage_layers(config: RunConfig, stage: int) -> int:
    """Transformer layers on one pipeline stage."""
    return pipeline_layers(config)[stage]


def rank_dimensions(config: RunConfig) -> ModelDimensions:
    """What one tensor-parallel rank computes."""
    return ModelDimensions.of(config.model, config.train.sequence_length).shard(config.parallel.tensor)


def rank_parameters(config: RunConfig, stage: int) -> int:
    """Parameters that the optimizer has on each rank of one pipeline stage."""
    return _stage_parameters(config, stage).all


def copied_parameters(config: RunConfig, stage: int) -> int:
    """Parameters on each rank of a stage that another stage's optimizer has: a tied head far from the embedding."""
    if not config.model.tied_embeddings or not 0 < stage == config.parallel.pipeline - 1:
        return 0
    return _parameters(config.model, OutputHead, config.parallel.tensor).all


def replicated_parameters(config: RunConfig, stage: int) -> int:
    """Those of them that are the same on all tensor-parallel ranks."""
    return _stage_parameters(config, stage).replicated


def vector_parameters(config: RunConfig, stage: int) -> int:
    """Those of them that are norms and biases."""
    return _stage_parameters(config, stage).vectors


def _stage_parameters(config: RunConfig, stage: int) -> _Parameters:
    last = int(stage == config.parallel.pipeline - 1)
    blocks = stage_layers(config, stage)
    head = 0 if config.model.tied_embeddings else last
    layers = {TokenEmbedding: int(stage == 0), TransformerBlock: blocks, FinalNorm: last, OutputHead: head}
    each = [(count, _parameters(config.model, layer, config.parallel.tensor)) for layer, count in layers.items()]
    return _Parameters(*(sum(count * sizes[i] for count, sizes in each) for i in range(len(_Parameters._fields))))
