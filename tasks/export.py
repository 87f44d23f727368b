"""export: the last checkpoint as a Hugging Face model, proven to compute the same."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neox_core.checkpoint.manifest import Manifest, download_checkpoint
from neox_core.checkpoint.scores import ranking
from neox_core.config import VALIDATION, RunConfig
from neox_core.data.dataset import token_prefix
from neox_core.data.indexed import IndexedDataset
from neox_core.data.tokenization.tokenizer_file import TokenizerKind, kind_of_file, tokenizer_in
from neox_core.errors import CheckpointError
from neox_core.progress import Progress
from neox_core.train.observe.metrics import METRICS_FILE, validation_losses
from tasks.evaluation.kept_items import BASE_STEP, scored_tasks
from tasks.identity.specs import evaluate_spec, export_spec
from tasks.identity.stage import StageResult, digest_cache, require, run_stage
from tasks.identity.training import Training
from tasks.train import last_manifest

_SAMPLE_DOCUMENTS = 3


def export(training: Training, progress: Progress) -> StageResult:
    """Write the model of the last step, or of the best, in Hugging Face's format, or find it done.

    Raises:
        LlemmaError: the training or prepare-data is not finished.
        CheckpointError: the checkpoint is missing, or the exported model's logits or token ids differ.
    """
    require(training.spec.identity)
    config = training.config
    spec = export_spec(config, training.fingerprint)

    def build(folder: Path) -> Mapping[str, Any]:
        from neox_core.checkpoint.conversion.export import export_huggingface, prove_export
        from neox_core.checkpoint.formats.neox import NeoxCheckpoint
        from neox_core.checkpoint.formats.outputs import journal_records
        from neox_core.checkpoint.formats.special_ids import from_json
        from neox_core.storage.targets import open_target

        data = require(training.data)
        tokenizer = tokenizer_in(data.folder)
        with _weights(training, config.workdir / "scratch" / spec.folder.name, progress) as weights:
            texts = sample_texts(data.folder, tokenizer, config)
            summary = export_huggingface(
                weights,
                folder,
                config.model,
                tokenizer,
                config.train.sequence_length,
                progress,
                special=from_json(require(training.weights).summary.get("special_ids") or {}),
                prove=lambda target: prove_export(NeoxCheckpoint(weights), target, config.model, texts, progress),
            )
            digest_cache(config.workdir).remember(folder, journal_records(open_target(folder)))
            return summary

    return run_stage(spec, build, progress)


@contextmanager
def _weights(training: Training, scratch: Path, progress: Progress) -> Iterator[Path]:
    """Folder of the chosen checkpoint's weights, fetched from the store and removed afterwards."""
    prefix, manifest = _chosen(training)
    progress(0.0, f"fetching step {manifest.step}")
    try:
        yield download_checkpoint(training.store, prefix, manifest, scratch, lambda name: name.startswith("layer_"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _chosen(training: Training) -> tuple[str, Manifest]:
    """The checkpoint that `export.checkpoint` names, and its training's key."""
    if training.config.export.checkpoint == "last":
        return training.prefix, last_manifest(training)
    best_by, found = training.config.checkpoints.best_by, training.lineage_checkpoints()
    ranks = _ranks(training, best_by, found)
    if not ranks:
        raise CheckpointError(f"export.checkpoint is best, and no checkpoint has the score {best_by}: give last")
    step = min(sorted(ranks), key=ranks.__getitem__)
    if step not in found:
        raise CheckpointError(
            f"the best checkpoint by {best_by} is that of step {step}, which is not in the store; there are "
            f"{sorted(found)}: set checkpoints.keep_best next time, and export.checkpoint to last now"
        )
    return found[step]


def _ranks(training: Training, best_by: str, found: Collection[int]) -> dict[int, float]:
    """By step, the lower the better; of validation, steps that have a checkpoint or had one, as `found` has those that
    are in the store."""
    if best_by == VALIDATION:
        train = training.config.train
        losses = validation_losses(require(training.spec.identity).folder / METRICS_FILE)
        due = {step for step in losses if step % train.checkpoint_interval == 0 or step == train.steps}
        saved = due.union(found) - {BASE_STEP}
        return {step: loss for step, loss in losses.items() if step in saved}
    evaluated = require(evaluate_spec(training.config, training.fingerprint).identity)
    scores = {result["step"]: scored_tasks(result) for result in evaluated.summary["evaluations"]}
    return {step: rank for step, rank in ranking(best_by, scores).items() if step != BASE_STEP}


def sample_texts(data: Path, tokenizer: Path, config: RunConfig) -> list[str]:
    """The first documents of each source's training text, decoded from its token files."""
    from neox_core.checkpoint.formats.huggingface_tokenizer import load_sentencepiece

    if kind_of_file(tokenizer) is not TokenizerKind.SENTENCEPIECE:  # which is exported as it is
        return []
    pieces, begin = load_sentencepiece(tokenizer), int(config.tokenizer.begin_of_document)
    texts: list[str] = []
    for source in config.data.sources:
        documents = IndexedDataset(token_prefix(data, source, "train"))
        # Without the ids that were put before and after the text.
        ids = [documents[index][begin:-1].tolist() for index in range(min(_SAMPLE_DOCUMENTS, len(documents)))]
        texts += pieces.decode(ids)
    return texts
