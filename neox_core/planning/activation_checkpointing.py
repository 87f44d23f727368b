"""Which layers compute what again: the least work that fits the memory."""

from __future__ import annotations

from collections.abc import Sequence

from neox_core.config import ActivationCheckpointing, BatchGeometry, RunConfig
from neox_core.parallel.stages import defers
from neox_core.planning.memory import rank_dimensions, stage_layers, stage_memory


def layer_modes(
    config: RunConfig, geometry: BatchGeometry, stage: int, available: float | None
) -> tuple[ActivationCheckpointing, ...]:
    """Activation checkpointing of each layer of a pipeline stage, first to last.

    With `auto`: none in the first layers, selective in the next, full in the rest, so that the work that is repeated is
    the least whose memory fits; all full if nothing fits.

    Args:
        available: bytes for all that a rank holds; None: without limit.
    """

    def fits(modes: Sequence[ActivationCheckpointing]) -> bool:
        return available is None or stage_memory(config, geometry, stage, modes).total <= available

    layers, mode = stage_layers(config, stage), config.train.activation_checkpointing
    if mode != "auto":
        return (mode,) * layers
    none, selective, full = _modes(layers, 0, layers), _modes(0, layers, layers), _modes(0, 0, layers)
    if fits(none):
        return none
    if not (defers(config, stage) or fits(selective) or fits(full)):
        return full  # a mixture needs at least what that of its modes needs alone which keeps the least
    costs = _costs(config)
    choices = [_modes(first, next_, layers) for first in range(layers + 1) for next_ in range(layers + 1 - first)]
    cheapest_first = sorted(choices, key=lambda modes: sum(costs[mode] for mode in modes))
    return next(filter(fits, cheapest_first), full)


def describe_modes(modes: Sequence[ActivationCheckpointing]) -> str:
    """Such as `none in 20, selective in 12 layers`."""
    counts = [(mode, modes.count(mode)) for mode in dict.fromkeys(modes)]
    return ", ".join(f"{mode} in {count}" for mode, count in counts) + " layers"


def _modes(none: int, selective: int, layers: int) -> tuple[ActivationCheckpointing, ...]:
    counts: dict[ActivationCheckpointing, int] = {
        "none": none,
        "selective": selective,
        "full": layers - none - selective,
    }
    return tuple(mode for mode, count in counts.items() for _ in range(count))


def _costs(config: RunConfig) -> dict[ActivationCheckpointing, float]:
    """Work that a layer repeats, in FLOPs per token on one rank: attention, and all products but w2's.

    Elementwise functions are counted as a tenth of the attention.
    """
    dims = rank_dimensions(config)
    attention = 2 * dims.num_heads * dims.head_dim * config.train.sequence_length
    heads = 2 * dims.num_heads + 2 * dims.num_kv_heads
    products = 2 * dims.hidden_size * (heads * dims.head_dim + 2 * dims.intermediate_size)
    return {"none": 0.0, "selective": 1.1 * attention, "full": 1.1 * attention + products}
