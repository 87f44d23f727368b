"""Parameters and memory per rank, counted from the configuration.

Symbols: L layers, D hidden size, N query heads, K key-value heads, H head width, F intermediate size, V vocabulary;
TP, PP, DP degrees of tensor, pipeline and data parallelism; B micro batch, T sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from neox_core.config import BatchGeometry, ModelConfig, RunConfig
from neox_core.parallel.stages import pipeline_layers

_FP32 = 4
_DTYPE_BYTES = {"bf16": 2, "fp32": 4}
_MASTER_BYTES = {"fp32": 4, "packed": 2}
_LOSS_FP32_COPIES = 3
"""Of the logits, at the peak of the loss's backward pass: probabilities, their difference, the gradient."""


def parameter_count(model: ModelConfig, input_embedding: bool = True) -> int:
    """Number of parameters: 2·V·D + L·(D·H·(N + 2K) + N·H·D + 3·D·F + 2·D) + D.

    Q, K, V; attention output; three matrices of SwiGLU; two norms a layer and one at the end; untied input
    embedding and output head, no biases (arXiv 2302.13971, 2307.09288).

    Args:
        input_embedding: count the input embedding's V·D too. FLOPs are counted without it: a lookup costs none.
    """
    embeddings = 2 if input_embedding else 1
    layers = model.num_layers * _layer_parameters(model, tensor=1)
    return embeddings * model.vocab_size * model.hidden_size + layers + model.hidden_size


def _layer_parameters(model: ModelConfig, tensor: int) -> int:
    """One rank's part of one transformer layer; norms are replicated, and so are KV heads where ranks exceed them."""
    heads = 2 * model.num_attention_heads + 2 * max(model.num_kv_heads, tensor)
    attention = heads * model.head_dim * model.hidden_size
    mlp = 3 * model.hidden_size * model.intermediate_size
    return (attention + mlp) // tensor + 2 * model.hidden_size


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part. Temporary workspace, the CUDA context and fragmentation come on top."""

    weights: int
    """Parameters in train.precision."""
    gradients: int
    """The fp32 buffer in which micro batches accumulate."""
    master: int
    """fp32 master weights, split among the data-parallel ranks (ZeRO stage 1, arXiv 1910.02054)."""
    adam: int
    """Two fp32 moments, split likewise."""
    activations: int
    """Kept for the backward pass, for all micro batches in flight."""
    logits: int
    """Logits and the loss's copies of them."""

    @property
    def total(self) -> int:
        """Sum of the parts, in bytes."""
        return sum(getattr(self, part.name) for part in fields(self))


def stage_memory(config: RunConfig, geometry: BatchGeometry, stage: int) -> Memory:
    """Memory of each rank of one pipeline stage, in bytes.

    Args:
        stage: 0 holds the embedding, the last one the final norm and the output head.
    """
    last = stage == config.parallel.pipeline - 1
    parameters = _rank_parameters(config, stage)
    shard = -(-parameters // geometry.data_parallel)
    dtype_bytes = _DTYPE_BYTES[config.train.precision]
    return Memory(
        weights=dtype_bytes * parameters,
        gradients=_FP32 * parameters,
        master=_MASTER_BYTES[config.train.master_weights] * shard,
        adam=2 * _FP32 * shard,
        activations=_stage_activations(config, geometry, stage),
        logits=_logits(config) if last else 0,
    )


def fullest_stage(config: RunConfig, geometry: BatchGeometry) -> tuple[int, Memory]:
    """The pipeline stage whose ranks need the most memory, and how much."""
    stages = [(stage, stage_memory(config, geometry, stage)) for stage in range(config.parallel.pipeline)]
    return max(stages, key=lambda entry: entry[1].total)


def stage_layers(config: RunConfig, stage: int) -> int:
    """Transformer layers on one pipeline stage."""
    return pipeline_layers(config)[stage]


def _rank_parameters(config: RunConfig, stage: int) -> int:
    model, tensor = config.model, config.parallel.tensor
    vocabulary = model.vocab_size * model.hidden_size // tensor
    parameters = stage_layers(config, stage) * _layer_parameters(model, tensor)
    if stage == 0:
        parameters += vocabulary
    if stage == config.parallel.pipeline - 1:
        parameters += vocabulary + model.hidden_size
    return parameters


def block_activation_bytes(config: RunConfig) -> int:
    """Bytes that autograd keeps for one transformer block and one micro batch, on one rank, without checkpointing.

    Per token, with e bytes per element, after arXiv 2205.05198 (section 4.1), for this architecture: each of two norms
    keeps its fp32 input (4D), its rounded result and its scaled output (2·e·D); attention keeps rotated q and k, v and
    its output (e·H·(2N + 2K)) and the softmax's fp32 log-sum (4N), as flash kernels do (arXiv 2205.14135); SwiGLU keeps
    gate, silu(gate), up and their product (4·e·F). Tensor parallelism divides all but the norms' share.
    """
    model, size = config.model, _DTYPE_BYTES[config.train.precision]
    norms = 2 * (_FP32 + 2 * size) * model.hidden_size
    kv_heads = max(model.num_kv_heads, config.parallel.tensor)
    attention = size * model.head_dim * 2 * (model.num_attention_heads + kv_heads)
    attention += _FP32 * model.num_attention_heads
    mlp = 4 * size * model.intermediate_size
    return _micro_batch_tokens(config) * (norms + (attention + mlp) // config.parallel.tensor)


def _stage_activations(config: RunConfig, geometry: BatchGeometry, stage: int) -> int:
    """Activations of a stage: 1F1B keeps up to PP - stage micro batches in flight (arXiv 2104.04473).

    Full checkpointing keeps only each block's input (arXiv 1604.06174), and all of one block while it is recomputed.
    """
    in_flight = min(config.parallel.pipeline - stage, geometry.accumulation_steps)
    layers, block = stage_layers(config, stage), block_activation_bytes(config)
    if config.train.activation_checkpointing == "none":
        return in_flight * layers * block
    ranks = config.parallel.tensor if config.parallel.sequence else 1
    block_input = _micro_batch_tokens(config) * config.model.hidden_size * _DTYPE_BYTES[config.train.precision] // ranks
    return in_flight * layers * block_input + block


def _logits(config: RunConfig) -> int:
    """A rank's part of one chunk's logits, their gradient (both in the model's precision), and fp32 copies."""
    bytes_per_logit = 2 * _DTYPE_BYTES[config.train.precision] + _LOSS_FP32_COPIES * _FP32
    tokens = min(_micro_batch_tokens(config), config.train.loss_chunk_tokens)
    return tokens * config.model.vocab_size // config.parallel.tensor * bytes_per_logit


def _micro_batch_tokens(config: RunConfig) -> int:
    return config.train.micro_batch_size * config.train.sequence_length
