"""convert: Meta's or Hugging Face's weights to NeoX shards, proven against transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neox_core.config import RunConfig
from neox_core.progress import Progress
from tasks.identity.base import make_toy_base
from tasks.identity.current import note_current, outlived
from tasks.identity.specs import CONVERT, convert_spec
from tasks.identity.stage import StageResult, digest_cache, run_stage


def convert(config: RunConfig, progress: Progress) -> StageResult:
    """Cut the base weights for TP x PP, or find it done. The summary holds the largest differences.

    A toy's base weights are made first if they are missing. Where the base weights are gone, what was made of them
    last stays current.

    Raises:
        CheckpointError: the weights are damaged, or the shards' logits are not the original's.
        ConfigError: the weights are of another architecture.
    """

    if result := outlived(config, CONVERT):
        return result
    make_toy_base(config)

    def build(folder: Path) -> Mapping[str, Any]:
        from neox_core.checkpoint.conversion.convert import convert as convert_weights
        from neox_core.checkpoint.conversion.proof import prove_conversion
        from neox_core.checkpoint.conversion.vocabulary import check_tokenizer
        from neox_core.checkpoint.formats.outputs import journal_records
        from neox_core.storage.folders import open_folder
        from neox_core.storage.targets import open_target

        base = config.base_model
        check_tokenizer(config.tokenizer.file, config.model)
        summary = convert_weights(
            open_folder(base.path, config.storage),
            folder,
            config.model,
            config.parallel,
            progress,
            base_rope_theta=base.rope_theta,
            base_vocab_size=base.vocab_size,
            new_tokens=base.new_tokens,
            prove=lambda source, shards: prove_conversion(source.folder, shards, config.model, progress),
        )
        digest_cache(config.workdir).remember(folder, journal_records(open_target(folder)))
        of_logits = summary.get("largest_logit_difference")  # large models are compared layer by layer alone
        what = "layer" if of_logits is None else "logit"
        difference = summary["largest_layer_difference"] if of_logits is None else of_logits
        progress(1.0, f"largest {what} difference to transformers {difference:.1e}")
        return summary

    result = run_stage(convert_spec(config), build, progress)
    note_current(config, result)
    return result
