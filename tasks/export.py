"""export: the last checkpoint as a Hugging Face model, proven to compute the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from neox_core.checkpoint.manifest import download_checkpoint
from neox_core.config import RunConfig
from neox_core.data.tokenization.readers import Document, open_input, read_records, source_files
from neox_core.progress import Progress
from tasks.specs import export_spec, train_spec
from tasks.stage import StageResult, digest_cache, require, run_stage
from tasks.train import last_manifest

_SAMPLE_DOCUMENTS = 3


def export(config: RunConfig, progress: Progress) -> StageResult:
    """Write the model of the last step in Hugging Face's format, or find it done.

    Raises:
        CheckpointError: the checkpoint is missing, or the exported model's logits or token ids differ.
    """
    require(train_spec(config))

    def build(folder: Path) -> Mapping[str, Any]:
        from neox_core.checkpoint.conversion.export import export_huggingface, prove_export
        from neox_core.checkpoint.formats.neox import NeoxCheckpoint
        from neox_core.checkpoint.formats.outputs import journal_records
        from neox_core.checkpoint.formats.special_ids import special_ids_of
        from neox_core.storage.folders import open_folder
        from neox_core.storage.targets import open_target

        with _last_weights(config, progress) as weights:
            texts = _sample_texts(config)
            summary = export_huggingface(
                weights,
                folder,
                config.model,
                config.tokenizer.model,
                config.train.sequence_length,
                progress,
                special=special_ids_of(open_folder(config.base_model.path, config.storage)),
                prove=lambda target: prove_export(NeoxCheckpoint(weights), target, config.model, texts, progress),
            )
            digest_cache(config).remember(folder, journal_records(open_target(folder)))
            return summary

    return run_stage(export_spec(config), build, progress)


@contextmanager
def _last_weights(config: RunConfig, progress: Progress) -> Iterator[Path]:
    """Folder of the last step's weights, fetched from the store and removed afterwards."""
    store, prefix, manifest = last_manifest(config)
    scratch = config.workdir / "scratch" / export_spec(config).folder.name
    progress(0.0, f"fetching step {manifest.step}")
    try:
        yield download_checkpoint(store, prefix, manifest, scratch, lambda name: name.startswith("layer_"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sample_texts(config: RunConfig) -> list[str]:
    """The first documents of each source's training text."""
    texts: list[str] = []
    for source in config.data.sources:
        first = source_files(config.data, config.storage, source, "train")[0]
        with open_input(first, config.storage, config.workdir / "scratch") as path:
            records = read_records(path, config.data.text_key)
            documents = (record.text for record in records if isinstance(record, Document))
            texts += islice(documents, _SAMPLE_DOCUMENTS)
    return texts
