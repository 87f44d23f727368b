"""Meta's weights to NeoX's shards for a tensor- and pipeline-parallel layout."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from torch import Tensor

from neox_core.checkpoint.layout import Layer, cut, to_neox
from neox_core.checkpoint.meta import MetaCheckpoint
from neox_core.checkpoint.neox import write_neox
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.errors import ConfigError
from neox_core.progress import Progress, silent


def convert(
    source: Path,
    target: Path,
    model: ModelConfig,
    parallel: ParallelConfig,
    progress: Progress = silent,
    base_rope_theta: float | None = None,
) -> None:
    """Convert a folder in Meta's format to NeoX's layout in `target`; the tensors' values are kept bit for bit.

    Args:
        source: folder with params.json and consolidated.NN.pth.
        target: folder for latest and global_step0; an earlier attempt in it is replaced.
        model: architecture of the run.
        parallel: ranks to cut for; pipeline > 1 gives one file per layer.
        progress: told how far it is.
        base_rope_theta: RoPE base of the source, where the run changes it on purpose (Llemma 7B: 1e6 to 1e4).

    Raises:
        CheckpointError: the source is missing, damaged or inconsistent.
        ConfigError: the source is another architecture than `model`, or the layout does not divide it.
    """
    meta = MetaCheckpoint(source)
    check_architecture(meta, model, base_rope_theta)
    _check_divides(model, parallel)

    # The files are written per rank and layer: keep the last layer, so that the next rank's cut does not read it again.
    @lru_cache(maxsize=1)
    def whole(layer: Layer) -> dict[str, Tensor]:
        return to_neox(layer, meta.tensor, meta.model)

    def part(layer: Layer, rank: int) -> dict[str, Tensor]:
        return cut(whole(layer), parallel.tensor, rank)

    write_neox(target, model.num_layers, parallel, part, progress)


def check_architecture(meta: MetaCheckpoint, model: ModelConfig, base_rope_theta: float | None = None) -> None:
    """Compare the source's architecture with the run's, field by field.

    Raises:
        ConfigError: naming every field that differs, with both values.
    """
    expected = model if base_rope_theta is None else model.model_copy(update={"rope_theta": base_rope_theta})
    differences = [
        f"{name} {getattr(expected, name)} (source: {getattr(meta.model, name)})"
        for name in ModelConfig.model_fields
        if getattr(expected, name) != getattr(meta.model, name)
    ]
    if differences:
        raise ConfigError(f"model differs from the base model in {meta.folder}: {'; '.join(differences)}")


def _check_divides(model: ModelConfig, parallel: ParallelConfig) -> None:
    for name in ("num_attention_heads", "num_kv_heads", "intermediate_size", "vocab_size"):
        if getattr(model, name) % parallel.tensor:
            raise ConfigError(f"parallel.tensor {parallel.tensor} does not divide model.{name} {getattr(model, name)}")
