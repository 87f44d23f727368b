"""What one rank keeps for the backward pass, and what it needs in addition to that, by arithmetic.

Symbols as in memory.py; t is the tokens of a micro batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from neox_core.config import ActivationCheckpointing, BatchGeometry, RunConfig
from neox_core.kernels.aligned import aligned_width
from neox_core.model.dimensions import ModelDimensions
from neox_core.parallel.stages import defers

DTYPE_BYTES = {"bf16": 2, "fp32": 4}
_FP32 = 4


def block_bytes(config: RunConfig, dims: ModelDimensions, mode: ActivationCheckpointing, compiled: bool = True) -> int:
    """Bytes that autograd keeps for one transformer block and one micro batch, on one rank.

    Per token (after arXiv 2205.05198, section 4.1, for this architecture; S is the number of ranks among which sequence
    parallelism splits the tokens between attention and MLP, or 1):

    - full keeps the block's input: e·D/S.
    - selective keeps the outputs of matrix products: the input and the sum after attention, 2·e·D/S; the fused
      projection, e·H·(N + 2K); gate and up, 2·e·F.
    - none keeps the norms' results too, of all tokens, 2·e·D; rotated q and k, and v, and attention's result,
      e·H·(2N + 2K), and the softmax's fp32 log-sum, 4·N (arXiv 2205.14135); SwiGLU's result, 3·e·F in all, and its
      silu too where it is not compiled. With positions of documents, a row of cosines and sines in fp32, 4·H. Where
      queries and keys are normalized, the fused projection as well.
    - with norms after attention and MLP, what these give as well, 2·e·D/S; none does not need what they add to.

    Args:
        dims: one rank's.
        mode: its activation checkpointing.
        compiled: elementwise functions are compiled, as on GPUs.
    """
    size, split = DTYPE_BYTES[config.train.precision], _token_split(config)
    hidden, heads, kv_heads, width = dims.hidden_size, dims.num_heads, dims.num_kv_heads, dims.head_dim
    residual, fused = 2 * size * hidden // split, size * width * (heads + 2 * kv_heads)
    per_token = {
        "full": residual // 2,
        "selective": (1 + dims.norms_after) * residual + fused + size * 2 * dims.intermediate_size,
        "none": residual
        + size * (2 * hidden + width * (2 * heads + 2 * kv_heads) + (4 - compiled) * dims.intermediate_size)
        + (fused if dims.qk_norm else 0)
        + _FP32 * heads
        + _FP32 * width * config.train.mask_documents,
    }
    return micro_batch_tokens(config) * per_token[mode]


def kept_bytes(
    config: RunConfig,
    dims: ModelDimensions,
    geometry: BatchGeometry,
    stage: int,
    modes: Sequence[ActivationCheckpointing],
) -> int:
    """Bytes that a stage keeps for its micro batches in flight, and for those whose weights' gradients are deferred.

    Args:
        modes: activation checkpointing of the stage's layers.
    """
    flying, blocks = in_flight(config, geometry, stage), sum(block_bytes(config, dims, mode) for mode in modes)
    # Where few micro batches come, those that are backward before the last one is forward: from then on each is added.
    waiting = min(stage, geometry.accumulation_steps - flying) if defers(config, stage) else 0
    return flying * blocks + waiting * len(modes) * _deferred_bytes(config, dims)


def _deferred_bytes(config: RunConfig, dims: ModelDimensions) -> int:
    """What a block's weights' gradients are made of: inputs of its linear layers and gradients of their outputs.

    Per token e·(4·D + H·(2·N + 2·K) + 3·F), of all tokens where tensor-parallel ranks split these.
    """
    heads = dims.head_dim * (2 * dims.num_heads + 2 * dims.num_kv_heads)
    per_token = 4 * dims.hidden_size + heads + 3 * dims.intermediate_size
    return micro_batch_tokens(config) * DTYPE_BYTES[config.train.precision] * per_token


def working_bytes(
    config: RunConfig,
    dims: ModelDimensions,
    geometry: BatchGeometry,
    stage: int,
    modes: Sequence[ActivationCheckpointing],
) -> int:
    """The most that a step needs in addition to what is kept and the state.

    That is when a block goes backward (its own gradients, the stage's, and what it computes again), or, on the last
    stage, when the loss has its gradients and a chunk of logits, or, on the others, when the next stage's gradients
    arrive; on the first, also when the embedding goes backward. DeepSpeed keeps the results of a stage, and where it
    sends them whole, its inputs, apart from what autograd keeps; where tensor-parallel ranks have the same, it sends
    parts and puts them together.

    Args:
        modes: activation checkpointing of the stage's layers.
    """
    forward = max(_block_forward(config, dims, mode) for mode in set(modes))
    if defers(config, stage):
        backward = _deferring_backward(config, dims, modes, receives=stage < config.parallel.pipeline - 1)
    else:
        backward = max(_block_backward(config, dims, mode) for mode in set(modes))
    most = _working_bytes(config, dims, geometry, stage, forward, backward)
    if stage > 0:
        return most
    return max(
        most, _embedding_backward(config, dims, geometry) - sum(block_bytes(config, dims, mode) for mode in modes)
    )


def _working_bytes(
    config: RunConfig, dims: ModelDimensions, geometry: BatchGeometry, stage: int, forward: int, backward: int
) -> int:
    stages = config.parallel.pipeline
    hidden = _hidden(config, dims)
    puts_together = _puts_together(config)
    flying = in_flight(config, geometry, stage)
    passed = hidden // config.parallel.tensor
    received = passed + (0 if puts_together else flying * passed) if stage > 0 else 0
    if stage == stages - 1:
        return received + _last_stage_working(config, dims, geometry, forward, backward, stage > 0)
    if puts_together:
        backward = max(3 * hidden, 2 * hidden + backward)
    # The buffer for gradients is there from the first backward pass on.
    first = flying - (flying == geometry.accumulation_steps)
    return received + max(first * passed + forward, (flying + 1) * passed + backward)


def _embedding_backward(config: RunConfig, dims: ModelDimensions, geometry: BatchGeometry) -> int:
    """When the embedding goes backward, all that the micro batch's blocks kept is gone.

    Its gradient has a row for every token of the vocabulary, and DeepSpeed adds an fp32 copy of it.
    """
    size = DTYPE_BYTES[config.train.precision]
    gradient = dims.vocab_size * dims.hidden_size * (size if size == _FP32 else size + _FP32)
    hidden = _hidden(config, dims)
    if config.parallel.pipeline == 1:  # what the head was given, and for the micro batch before
        return gradient + min(2, geometry.accumulation_steps) * hidden
    # What goes to the next stage, the gradients that came from it, and both once more where they are put together.
    passed = (in_flight(config, geometry, 0) + 1) * hidden // config.parallel.tensor
    return gradient + passed + 2 * hidden * _puts_together(config)


def _last_stage_working(
    config: RunConfig, dims: ModelDimensions, geometry: BatchGeometry, forward: int, backward: int, receives: bool
) -> int:
    """DeepSpeed keeps the results of the last two micro batches, whose graphs hold their inputs and gradients of these.

    One of them is replaced before the loss, which takes all tokens' hidden states.
    """
    hidden = _hidden(config, dims)
    part = hidden // _token_split(config)
    result = hidden + 2 * part * receives
    old = min(2, geometry.accumulation_steps - 1)
    logits, earlier = _chunk_logits(config, dims), max(0, micro_batch_tokens(config) - config.train.loss_chunk_tokens)
    # The gradients of all chunks' hidden states, twice when they are joined; or those of earlier chunks, and logits.
    loss = part + max(2 * hidden, hidden * earlier // micro_batch_tokens(config) + logits)
    return max(old * result + forward, min(1, old) * result + hidden + max(loss, part + backward))


def _block_forward(config: RunConfig, dims: ModelDimensions, mode: ActivationCheckpointing) -> int:
    """The most that a block's forward pass needs in addition to what it keeps: w2's result, and its sum over the ranks.

    Selective checkpointing has the norm's result of this rank's tokens then, and w2's input before. (Full has less than
    going backward.)
    """
    hidden, part, width = _hidden(config, dims), _hidden(config, dims) // _token_split(config), _width(config, dims)
    summed = part if config.parallel.sequence else hidden
    if mode == "selective":
        return hidden + part + max(width, summed)
    return hidden + summed


def _block_backward(config: RunConfig, dims: ModelDimensions, mode: ActivationCheckpointing) -> int:
    """The most that a block's backward pass needs in addition to its result's gradient, in the MLP.

    That is the gradients of gate, up and their product, when the product itself has gone unless it was computed again.
    Where tensor parallelism makes the MLP narrow, all tokens' hidden states can be more: the result's gradient that was
    gathered, the norm's result and its gradient, or what w2 gives when all is computed again.
    """
    hidden, width, split = _hidden(config, dims), _width(config, dims), _token_split(config)
    gathered, part = (hidden, hidden // split) if split > 1 else (0, 0)
    if mode == "selective":
        return max(4 * width, gathered + 2 * width, 2 * hidden + part)
    if mode == "none":
        return max(2 * width, gathered + width)
    again = block_bytes(config, dims, "none") - block_bytes(config, dims, "full")
    return again + max(2 * width, hidden + gathered + part)


def _deferring_backward(
    config: RunConfig, dims: ModelDimensions, modes: Sequence[ActivationCheckpointing], receives: bool
) -> int:
    """As `_block_backward`, for a stage that defers weights' gradients, in addition to what all its blocks had kept.

    A block exchanges what it kept for what these are made of: in its MLP, w2's input and its result's gradient stay; in
    its attention, all of the MLP's do, next to attention's results and gradients; at its end, the gradients of its
    input come to these. A stage receives gradients in a place of their own; that of one rank is w2's already.

    Args:
        receives: gradients from the next stage.
    """
    hidden, width, split = _hidden(config, dims), _width(config, dims), _token_split(config)
    size = DTYPE_BYTES[config.train.precision] * micro_batch_tokens(config) * dims.head_dim
    attention = size * (2 * dims.num_heads + 2 * dims.num_kv_heads)
    gathered, part = (hidden, hidden // split) if split > 1 else (0, hidden)
    within = {
        "none": max(gathered + 3 * width, gathered + hidden + attention),
        "selective": max(gathered + 4 * width, gathered + 2 * hidden + part + width + 2 * attention),
    }
    within["full"] = block_bytes(config, dims, "none") - block_bytes(config, dims, "full") + within["none"]
    most = growth = 0
    for mode in reversed(modes):
        most = max(most, growth + within[mode])
        growth += _deferred_bytes(config, dims) - block_bytes(config, dims, mode)
        most = max(most, growth + hidden + part * min(2, split))
    return most + (part if receives and split > 1 else 0)


def _chunk_logits(config: RunConfig, dims: ModelDimensions) -> int:
    """A chunk's logits with their gradient; or that, its copy where its rows are not aligned, and its product."""
    tokens, width = min(micro_batch_tokens(config), config.train.loss_chunk_tokens), aligned_width(dims.vocab_size)
    product = dims.hidden_size if width > dims.vocab_size else 0
    return DTYPE_BYTES[config.train.precision] * tokens * (2 * width + product)


def in_flight(config: RunConfig, geometry: BatchGeometry, stage: int) -> int:
    """Micro batches whose activations a stage holds: 1F1B keeps up to PP - stage (arXiv 2104.04473)."""
    return min(config.parallel.pipeline - stage, geometry.accumulation_steps)


def micro_batch_tokens(config: RunConfig) -> int:
    """Tokens of a micro batch."""
    return config.train.micro_batch_size * config.train.sequence_length


def _hidden(config: RunConfig, dims: ModelDimensions) -> int:
    """Bytes of a micro batch's hidden states."""
    return DTYPE_BYTES[config.train.precision] * dims.hidden_size * micro_batch_tokens(config)


def _width(config: RunConfig, dims: ModelDimensions) -> int:
    """Bytes of a micro batch's gates."""
    return DTYPE_BYTES[config.train.precision] * dims.intermediate_size * micro_batch_tokens(config)


def _puts_together(config: RunConfig) -> bool:
    """Tensor-parallel ranks have the same hidden states, which stages send in parts."""
    return config.parallel.tensor > 1 and not config.parallel.sequence


def _token_split(config: RunConfig) -> int:
    """Ranks among which the tokens are split between attention and MLP."""
    return config.parallel.tensor if config.parallel.sequence else 1
