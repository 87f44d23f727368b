"""What one rank keeps for the backward pass, and what it needs beside that, by arithmetic.

Symbols as in memory.py; t is the tokens of a micro batch.
"""

from __future__ import annotations

from neox_core.config import BatchGeometry, RunConfig
from neox_core.model.dimensions import ModelDimensions

DTYPE_BYTES = {"bf16": 2, "fp32": 4}
_FP32 = 4


def block_bytes(config: RunConfig, dims: ModelDimensions, mode: str | None = None, compiled: bool = True) -> int:
    """Bytes that autograd keeps for one transformer block and one micro batch, on one rank.

    Per token (after arXiv 2205.05198, section 4.1, for this architecture; D is not divided by tensor parallelism):

    - full keeps the block's input: e·D.
    - selective keeps the outputs of matrix products: the input and the sum after attention, 2·e·D; the fused
      projection, e·H·(N + 2K); gate and up, 2·e·F.
    - none keeps the norms' results too, 4·e·D in all; rotated q and k, and v, and attention's result,
      e·H·(2N + 2K), and the softmax's fp32 log-sum, 4·N (arXiv 2205.14135); SwiGLU's result, 3·e·F in all, and its
      silu too where it is not compiled. With positions of documents, a row of cosines and sines in fp32, 4·H.

    Args:
        dims: one rank's.
        mode: activation checkpointing; default: the configured one.
        compiled: elementwise functions are compiled, as on GPUs.
    """
    size = DTYPE_BYTES[config.train.precision]
    mode = mode or config.train.activation_checkpointing
    hidden, heads, kv_heads, width = dims.hidden_size, dims.num_heads, dims.num_kv_heads, dims.head_dim
    per_token = {
        "full": size * hidden,
        "selective": size * (2 * hidden + width * (heads + 2 * kv_heads) + 2 * dims.intermediate_size),
        "none": size * (4 * hidden + width * (2 * heads + 2 * kv_heads) + (4 - compiled) * dims.intermediate_size)
        + _FP32 * heads
        + _FP32 * width * config.train.mask_documents,
    }
    return micro_batch_tokens(config) * per_token[mode]


def working_bytes(config: RunConfig, dims: ModelDimensions, geometry: BatchGeometry, stage: int) -> int:
    """The most that a step needs beside what is kept and the state.

    That is when a block goes backward (its own gradients, the stage's, and what it computes again), or, on the last
    stage, when the loss has its gradients and a chunk of logits, or, on the others, when the next stage's gradients
    arrive. DeepSpeed keeps the results of a stage, and on one tensor-parallel rank its inputs, beside what autograd
    keeps; on several ranks, it sends parts and puts them together.
    """
    tensor, stages = config.parallel.tensor, config.parallel.pipeline
    hidden = DTYPE_BYTES[config.train.precision] * dims.hidden_size * micro_batch_tokens(config)
    block = _block_working(config, dims, hidden)
    flying = in_flight(config, geometry, stage)
    passed = hidden // tensor
    received = passed + (tensor == 1) * flying * hidden if stage > 0 else 0
    if stage == stages - 1:
        return received + _last_stage_working(config, dims, geometry, stage > 0)
    restored = 2 * hidden if tensor > 1 else 0  # the stage's result and its gradient
    return received + (flying + 1) * passed + max(3 * hidden, restored + block)


def _last_stage_working(config: RunConfig, dims: ModelDimensions, geometry: BatchGeometry, receives: bool) -> int:
    """DeepSpeed keeps the results of the last two micro batches, whose graphs hold their inputs and gradients of these.

    One of them is replaced before the loss.
    """
    hidden = DTYPE_BYTES[config.train.precision] * dims.hidden_size * micro_batch_tokens(config)
    result = (3 if receives else 1) * hidden
    old = min(2, geometry.accumulation_steps - 1)
    forward = old * result + (3 if config.train.activation_checkpointing == "selective" else 2) * hidden
    loss = max(3 * hidden, 2 * hidden + _chunk_logits(config, dims))
    backward = min(1, old) * result + hidden + max(loss, hidden + _block_working(config, dims, hidden))
    return max(forward, backward)


def _block_working(config: RunConfig, dims: ModelDimensions, hidden: int) -> int:
    """The most that a block's backward pass needs beside its result's gradient, in the MLP.

    That is the gradients of gate, up and their product, when the product itself has gone unless it was computed again.
    Where tensor parallelism makes the MLP narrow, the norm's result and its gradient can be more, or what w2 gives when
    all is computed again.
    """
    width = DTYPE_BYTES[config.train.precision] * dims.intermediate_size * micro_batch_tokens(config)
    mode = config.train.activation_checkpointing
    if mode == "selective":
        return max(4 * width, 2 * hidden)
    if mode == "none":
        return 2 * width
    return block_bytes(config, dims, "none") - block_bytes(config, dims, "full") + max(2 * width, hidden)


def _chunk_logits(config: RunConfig, dims: ModelDimensions) -> int:
    """A chunk's logits with their gradient; of a split vocabulary also fp32 probabilities and two products of them."""
    size = DTYPE_BYTES[config.train.precision]
    per_logit = 2 * size if config.parallel.tensor == 1 else 3 * _FP32 + size
    return min(micro_batch_tokens(config), config.train.loss_chunk_tokens) * dims.vocab_size * per_logit


def in_flight(config: RunConfig, geometry: BatchGeometry, stage: int) -> int:
    """Micro batches whose activations a stage holds: 1F1B keeps up to PP - stage (arXiv 2104.04473)."""
    return min(config.parallel.pipeline - stage, geometry.accumulation_steps)


def micro_batch_tokens(config: RunConfig) -> int:
    """Tokens of a micro batch."""
    return config.train.micro_batch_size * config.train.sequence_length
