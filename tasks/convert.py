"""convert: Meta's weights to NeoX shards, proven against transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neox_core.config import RunConfig
from neox_core.progress import Progress
from tasks.specs import convert_spec
from tasks.stage import StageResult, run_stage


def convert(config: RunConfig, progress: Progress) -> StageResult:
    """Cut the base weights for TP x PP, or find it done. The artifact's summary holds the largest logit difference.

    Raises:
        CheckpointError: the weights are damaged, or the shards' logits are not the original's.
        ConfigError: the weights are of another architecture.
    """

    def build(folder: Path) -> Mapping[str, Any]:
        from neox_core.checkpoint.convert import convert as convert_weights
        from neox_core.checkpoint.neox import NeoxCheckpoint
        from neox_core.checkpoint.proof import prove_conversion

        base = config.base_model
        convert_weights(base.path, folder, config.model, config.parallel, progress, base.rope_theta)
        progress(1.0, "comparing logits with transformers")
        return prove_conversion(base.path, NeoxCheckpoint(folder), config.model)

    return run_stage(convert_spec(config), build, progress)
