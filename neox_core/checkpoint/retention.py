"""Which checkpoints are kept, and what is removed from the store: only what a newer complete checkpoint supersedes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from neox_core.checkpoint.manifest import (
    MANIFEST_FILE,
    checkpoint_key,
    checkpoint_step,
    complete_among,
    list_checkpoints,
    listing_key,
    object_key,
)
from neox_core.checkpoint.scores import has_answers, ranking, read_scores
from neox_core.config import VALIDATION, CheckpointsConfig, RunConfig
from neox_core.errors import StorageError
from neox_core.storage.object_store import ObjectStore

logger = logging.getLogger(__name__)


def superseded(steps: Sequence[int], keep: CheckpointsConfig, losses: Mapping[int, float]) -> list[int]:
    """The steps whose checkpoints may go.

    Args:
        steps: of the complete checkpoints. The last one always stays.
        losses: by step, what `best_by` names: the lower, the better. Steps without a validation do not count among
            the best; those that are not scored yet stay.
    """
    if keep.keep_last is None:
        return []
    steps = sorted(steps)
    kept = set(steps[-keep.keep_last :])
    if keep.keep_every is not None:
        kept |= {step for step in steps if step % keep.keep_every == 0}
    if keep.keep_best and keep.best_by != VALIDATION:
        kept |= {step for step in steps if step not in losses}
    ranked = sorted((losses[step], step) for step in steps if step in losses)
    kept |= {step for _, step in ranked[: keep.keep_best]}
    return [step for step in steps if step not in kept]


def apply_retention(store: ObjectStore, prefix: str, config: RunConfig, losses: Mapping[int, float]) -> None:
    """Remove a training's superseded checkpoints. What cannot be removed now is removed another time.

    The newest one was looked at before: its files are all there, with their sizes. Those that are to write answers
    (`evaluate.generate`) stay until they have.

    Args:
        losses: validation losses by step, for `checkpoints.best_by: validation`; scores lie in the store.
    """
    keep = config.checkpoints
    if keep.keep_last is None:
        return
    try:
        complete = list_checkpoints(store, prefix)
        steps, by_score = [manifest.step for manifest in complete], keep.keep_best and keep.best_by != VALIDATION
        scores = read_scores(store, prefix, complete) if by_score or config.evaluate.generate else {}
        if by_score:
            losses = ranking(keep.best_by, scores)
        for step in superseded(steps, keep, losses):
            if config.evaluate.is_to_generate(step, config.train.steps) and not has_answers(scores.get(step, {})):
                continue
            remove_checkpoint(store, prefix, step)
            logger.info("removed the checkpoint of step %d, as checkpoints.keep_last and others say", step)
    except StorageError as error:
        logger.warning("old checkpoints are not removed: %s", error)


def remove_checkpoint(store: ObjectStore, prefix: str, step: int) -> int:
    """Remove a step's checkpoint, whichever jobs have saved it: manifests first, so that it does not exist while its
    files go. Returns the bytes."""
    found = [
        info
        for info in store.list(object_key(prefix, checkpoint_key(step), ""))
        if checkpoint_step(info.key.removeprefix(listing_key(prefix)).split("/")[0]) == step
    ]
    manifests = [info.key for info in found if info.key.endswith(f"/{MANIFEST_FILE}")]
    store.delete(manifests)
    store.delete([info.key for info in found if info.key not in manifests])
    return sum(info.size for info in found)


def remove_remains(store: ObjectStore, prefix: str) -> None:
    """Remove what dead jobs left of a training: unfinished multipart uploads, and files of checkpoints that never were.

    Files without a manifest go if a checkpoint of the same step or of a later one is complete: nobody is going to
    complete them. What cannot be removed now is removed another time.
    """
    try:
        store.abort_uploads(f"{prefix}/")
        listed = store.list(listing_key(prefix))
        newest = max((manifest.step for manifest in complete_among(store, prefix, listed)), default=0)
        keys = [info.key for info in listed]
        stray = [key for step, key in _incomplete(prefix, keys) if step <= newest or "/reports/" in key]
        store.delete(stray)
        if stray:
            logger.info("removed %d files of checkpoints that were never complete", len(stray))
    except StorageError as error:
        logger.warning("what earlier jobs left is not removed: %s", error)


def _incomplete(prefix: str, keys: Sequence[str]) -> list[tuple[int, str]]:
    """Steps and keys of files below folders that have no manifest, and of reports below any."""
    found = []
    for key in keys:
        folder, inside, name = key.removeprefix(listing_key(prefix)).partition("/")
        if inside and (step := checkpoint_step(folder)) is not None:
            found.append((step, folder, name, key))
    whole = {folder for _, folder, name, _ in found if name == MANIFEST_FILE}
    return [(step, key) for step, folder, name, key in found if folder not in whole or name.startswith("reports/")]
