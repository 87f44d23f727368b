"""Which layers a pipeline stage has: stages of equal time, by the products that a token costs; and which defer work."""

from __future__ import annotations

from itertools import accumulate

from neox_core.config import ModelConfig, RunConfig


def pipeline_layers(config: RunConfig) -> tuple[int, ...]:
    """Transformer layers on each stage, first to last: `parallel.pipeline_layers`, or else what balances them.

    The first stage has the embedding too, whose lookup costs no product; the last one the output head and the loss.
    """
    if config.parallel.pipeline_layers is not None:
        return config.parallel.pipeline_layers
    block, head = _block_flops(config.model, config.train.sequence_length), _head_flops(config.model)
    return balance(config.model.num_layers, config.parallel.pipeline, head / block)


def stage_costs(config: RunConfig) -> tuple[float, ...]:
    """Time of each stage in units of a transformer layer's, estimated by FLOPs."""
    head = _head_flops(config.model) / _block_flops(config.model, config.train.sequence_length)
    *others, last = pipeline_layers(config)
    return (*map(float, others), last + head)


def stage_bounds(config: RunConfig) -> list[int]:
    """Index in NeoX's sequence at which each stage begins, and the sequence's length.

    The sequence is the embedding, a step that NeoX has for itself, the transformer layers, such a step again, the final
    norm and the output head.
    """
    *starts, total = accumulate(pipeline_layers(config), initial=2)
    return [0, *starts[1:], total + 3]


def defers(config: RunConfig, stage: int) -> bool:
    """Whether a stage adds weights' gradients later (ZB-H1), as all do but the first, which owes nobody anything."""
    return config.parallel.pipeline_schedule == "zb-h1" and stage > 0


def balance(layers: int, stages: int, head: float) -> tuple[int, ...]:
    """Layers per stage so that the slowest stage is as fast as can be, where the last one also has the head.

    Among equals, stages differ as little as can be, and earlier stages, which keep more micro batches, have no more
    layers than later ones.

    Args:
        head: the head's cost in units of a layer's.
    """
    if stages == 1:
        return (layers,)

    def unevenness(last: int) -> tuple[float, float]:
        slowest_other = -(-(layers - last) // (stages - 1))
        return max(last + head, slowest_other), abs(last + head - (layers + head) / stages)

    last = min(range(1, layers - stages + 2), key=unevenness)
    each, remainder = divmod(layers - last, stages - 1)
    return (*(each + (stage >= stages - 1 - remainder) for stage in range(stages - 1)), last)


def _block_flops(model: ModelConfig, sequence_length: int) -> int:
    """Forward products of one layer per token; a causal kernel computes half of the attention's."""
    heads = 2 * model.num_attention_heads + 2 * model.num_kv_heads
    parameters = model.hidden_size * (heads * model.head_dim + 3 * model.intermediate_size)
    return 2 * parameters + 2 * model.num_attention_heads * model.head_dim * sequence_length


def _head_flops(model: ModelConfig) -> int:
    return 2 * model.vocab_size * model.hidden_size
