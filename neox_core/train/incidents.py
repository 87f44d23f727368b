"""A record of each step whose update was not done: incidents.jsonl beside the metrics, the log and W&B."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from neox_core.checkpoint.store import ObjectStore
from neox_core.train.guards import Incident
from neox_core.train.metrics import INCIDENTS_FILE, MetricsLog

logger = logging.getLogger(__name__)


class IncidentLog:
    """Writes the records, on rank 0, to the folder and at once to the store, from where they come back if it is lost.

    Args:
        folder: the metrics' folder.
        store, prefix: where the training's checkpoints lie.
        metrics: is told too, for charts.
        groups: names of the groups of layers in an outcome.
        rank: this rank.
    """

    def __init__(
        self, folder: Path, store: ObjectStore, prefix: str, metrics: MetricsLog, groups: Sequence[str], rank: int
    ) -> None:
        self._path, self._store, self._key = folder / INCIDENTS_FILE, store, f"{prefix}/{INCIDENTS_FILE}"
        self._metrics, self._groups, self._rank = metrics, tuple(groups), rank
        if rank == 0 and not self._path.exists() and (stored := store.get_text(self._key)):
            self._path.write_text(stored, encoding="utf-8")

    def record(self, incident: Incident) -> None:
        """Write an incident down. Collective over all ranks.

        Raises:
            StorageError: the store cannot be reached.
        """
        own: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(own, incident.outcome.own_finite)
        if self._rank != 0:
            return
        record = describe(incident, self._groups, [rank for rank, finite in enumerate(own) if not finite])
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._store.put_text(self._key, self._path.read_text(encoding="utf-8"))
        self._metrics.log(record["step"], **{f"guard/{record['action']}": 1.0})
        shown = {name: record[name] for name in ("loss", "gradient_norm", "ranks", "gradient_norms", "sources")}
        logger.warning("step %d: %s, %s: %s", record["step"], record["problem"], record["action"], shown)


def describe(incident: Incident, groups: Sequence[str], ranks: Sequence[int]) -> dict[str, Any]:
    """An incident as JSON values.

    Args:
        groups: names of the groups of layers.
        ranks: those with a loss or gradient that is not finite.
    """
    outcome, batch = incident.outcome, incident.batch
    documents = batch.data.documents(batch.first + np.arange(batch.count))
    return {
        "step": outcome.step,
        "time": time.time(),
        "problem": incident.problem,
        "action": incident.action,
        "loss": _json(outcome.loss),
        "limit": _json(incident.limit),
        "gradient_norm": _json(outcome.gradient_norm),
        "gradient_norms": {name: _json(norm) for name, norm in zip(groups, outcome.group_norms, strict=True)},
        "ranks": list(ranks),
        "first_sequence": batch.first,
        "sequences": batch.count,
        "sources": {name: len(spans) for name, spans in documents.items()},
        "documents": documents,
    }


def _json(number: float) -> float | str:
    """JSON has no numbers that are not finite."""
    return number if math.isfinite(number) else str(number)
