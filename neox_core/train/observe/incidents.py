"""A record of each step whose update was not done: in incidents.jsonl next to the metrics, the log and W&B."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from neox_core.parallel.ranks.mesh import Mesh
from neox_core.storage.object_store import ObjectStore
from neox_core.train.guards import Incident
from neox_core.train.observe.metrics import INCIDENTS_FILE, MetricsLog
from neox_core.train.observe.row_file import RowFile, restore

logger = logging.getLogger(__name__)


class IncidentLog:
    """Writes the records, on rank 0, to the folder and at once to the store, from where they come back if it is lost.

    Args:
        folder: the metrics' folder.
        store, prefix: where the training's checkpoints lie.
        metrics: gets them too, for charts.
        groups: names of the groups of layers in an outcome.
        mesh: the grid of ranks.
        in_background: calls what brings the file to the store, so that training need not wait for the store.
    """

    def __init__(
        self,
        folder: Path,
        store: ObjectStore,
        prefix: str,
        metrics: MetricsLog,
        groups: Sequence[str],
        mesh: Mesh,
        in_background: Callable[[str, Callable[[], None]], None],
    ) -> None:
        self._in_background = in_background
        self._store, self._key = store, f"{prefix}/{INCIDENTS_FILE}"
        self._metrics, self._groups, self._mesh = metrics, tuple(groups), mesh
        self._path = folder / INCIDENTS_FILE
        self._rows: RowFile | None = None
        if mesh.rank == 0:
            restore(self._path, store.get_text(self._key))

    def record(self, incident: Incident) -> None:
        """Write an incident down. Collective over all ranks."""
        outcome = incident.outcome
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (self._mesh.data_rank, outcome.own_loss_finite, outcome.own_finite))
        if self._mesh.rank != 0:
            return
        record = describe(incident, self._groups, suspects(found))
        self._rows = self._rows or RowFile(self._path)  # a training without incidents has no such file
        self._rows.add(record)
        copy = partial(self._store.put_text, self._key, self._rows.text())
        self._in_background("incidents", copy)
        self._metrics.log(record["step"], **{f"guard/{record['action']}": 1.0})
        self._metrics.note(f"incident/step_{record['step']}", json.dumps(record))
        shown = {name: record[name] for name in ("loss", "gradient_norm", "ranks", "gradient_norms", "sources")}
        logger.warning("step %d: %s, %s: %s", record["step"], record["problem"], record["action"], shown)


def suspects(found: Sequence[tuple[int, bool, bool]]) -> list[int]:
    """Ranks that a number which is not finite may come from.

    The reduction brings one replica's gradient to all others. If a loss is not finite, it comes from that replica;
    else the owners of the parts of the gradient which are not finite are all that is known.

    Args:
        found: of each rank its data-parallel rank, whether its loss is finite, and whether everything it has is.
    """
    replicas = {replica for replica, loss_finite, _ in found if not loss_finite} or {replica for replica, *_ in found}
    return [rank for rank, (replica, _, finite) in enumerate(found) if replica in replicas and not finite]


def describe(incident: Incident, groups: Sequence[str], ranks: Sequence[int]) -> dict[str, Any]:
    """An incident as JSON values.

    Args:
        groups: names of the groups of layers.
        ranks: its suspects.
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
        "sources": {name: len(sequences) for name, sequences in documents.items()},
        "documents": documents,
    }


def _json(number: float) -> float | str:
    """JSON has no numbers that are not finite."""
    return number if math.isfinite(number) else str(number)
