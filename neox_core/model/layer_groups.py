"""Groups of layers by which gradients are looked at: few enough that a chart of them can be read."""

from __future__ import annotations

EMBEDDING, HEAD, NORMS = "embedding", "head", "norms"
_BLOCK_GROUPS = 8
"""At most."""


def group_names(num_layers: int) -> tuple[str, ...]:
    """The groups of a model, the same on all ranks: embedding, blocks_00-03, ..., head (matrices), and all norms."""
    blocks = dict.fromkeys(_block_group(layer, num_layers) for layer in range(num_layers))
    return (EMBEDDING, *blocks, HEAD, NORMS)


def layer_group(index: int, num_layers: int) -> str:
    """Group of the matrices of a NeoX layer: embedding 0, transformer layer l at l + 2, output at L + 4."""
    if index == 0:
        return EMBEDDING
    return _block_group(index - 2, num_layers) if index - 2 < num_layers else HEAD


def _block_group(layer: int, num_layers: int) -> str:
    size = -(-num_layers // _BLOCK_GROUPS)
    first = layer // size * size
    last = min(first + size, num_layers) - 1
    return f"blocks_{first:02d}-{last:02d}" if last > first else f"blocks_{first:02d}"
