"""What evaluation found of a checkpoint, in `scores.json` next to its manifest, and which are the best by that."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from neox_core.checkpoint.manifest import Manifest, object_key
from neox_core.config import WRITTEN
from neox_core.errors import StorageError
from neox_core.storage.object_store import ObjectStore

logger = logging.getLogger(__name__)

SCORES_FILE = "scores.json"
_LOWER_IS_BETTER = ("bits_per_byte",)
Tasks = Mapping[str, Mapping[str, Any]]
"""By task the items and the metrics, each with value and, where there are several items, low and high."""


def publish_scores(store: ObjectStore, prefix: str, checkpoint: str, tasks: Tasks) -> None:
    """Put a checkpoint's scores next to its manifest. What cannot be written now is logged: evaluation keeps it too."""
    try:
        store.put_text(object_key(prefix, checkpoint, SCORES_FILE), json.dumps(tasks, indent=1, sort_keys=True))
    except StorageError as error:
        logger.warning("the scores of %s are not next to its manifest: %s", checkpoint, error)


def read_scores(store: ObjectStore, prefix: str, manifests: Iterable[Manifest]) -> dict[int, Tasks]:
    """By step the scores of those checkpoints that have any.

    Raises:
        StorageError: the store cannot be reached.
    """
    texts = {found.step: store.get_text(object_key(prefix, found.name, SCORES_FILE)) for found in manifests}
    return {step: json.loads(text) for step, text in texts.items() if text is not None}


def has_answers(tasks: Tasks) -> bool:
    """Whether what was scored includes answers that the checkpoint wrote."""
    return any(name.endswith(WRITTEN) for name in tasks)


def ranking(best_by: str, scores: Mapping[int, Tasks]) -> dict[int, float]:
    """A number by step, of those that have the score TASK/METRIC: the lower, the better; NaN is the worst."""
    task, _, metric = best_by.rpartition("/")
    sign = 1 if metric in _LOWER_IS_BETTER else -1
    found = {step: tasks.get(task, {}).get("metrics", {}).get(metric) for step, tasks in scores.items()}
    ranks = {step: sign * float(score["value"]) for step, score in found.items() if score is not None}
    return {step: math.inf if math.isnan(rank) else rank for step, rank in ranks.items()}
