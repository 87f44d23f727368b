"""A training's identity, resolved once and passed on to all that ask about it: its job, evaluation, export, cancel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from neox_core.checkpoint.manifest import Manifest, list_checkpoints, training_prefix
from neox_core.config import RunConfig
from neox_core.data.order_version import DATA_ORDER, ORDER_VERSIONS, data_order
from neox_core.storage.object_store import ObjectStore
from neox_core.train.resuming.lineage import Ancestor, ancestors, lineage_checkpoints
from tasks.identity.current import current, find_all
from tasks.identity.specs import CONVERT, PREPARE_DATA, TRAIN, train_spec
from tasks.identity.stage import StageIdentity, StageSpec


@dataclass(frozen=True)
class Training:
    """The training of a configuration on the artifacts that were current when it was resolved."""

    spec: StageSpec
    data: StageIdentity
    """prepare-data's artifact."""
    weights: StageIdentity
    """convert's artifact."""
    ancestors: tuple[Ancestor, ...]
    """The trainings that begin like it."""

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return self.spec.config

    @property
    def fingerprint(self) -> str:
        """The training's identity."""
        return self.spec.fingerprint

    @property
    def prefix(self) -> str:
        """Key below which its checkpoints lie in the store."""
        return training_prefix(self.fingerprint)

    @property
    def scratch(self) -> Path:
        """Where the job writes while it runs: metrics, W&B's files, checkpoints on their way to the store."""
        return self.config.workdir / "scratch" / self.spec.folder.name

    @cached_property
    def store(self) -> ObjectStore:
        """The object store that holds its checkpoints."""
        return ObjectStore(self.config.storage)

    def was_begun(self) -> bool:
        """Whether it, or a training that it takes up, was started in this workdir."""
        identities = [self.fingerprint, *(ancestor.fingerprint for ancestor in self.ancestors)]
        return any(StageIdentity(TRAIN, identity, self.config.workdir).folder.exists() for identity in identities)

    def checkpoints(self) -> list[Manifest]:
        """Its own complete checkpoints, by step."""
        return list_checkpoints(self.store, self.prefix)

    def lineage_checkpoints(self) -> dict[int, tuple[str, Manifest]]:
        """See `neox_core.train.resuming.lineage.lineage_checkpoints`."""
        return lineage_checkpoints(self.store, self.fingerprint, self.ancestors)

    def consumed_history(self) -> list[dict[str, Any]]:
        """What the checkpoints' ledgers say: {"step", "sources": {name: {"sequences", "tokens", "epochs"}}} by step."""
        found = self.lineage_checkpoints().items()
        return [{"step": step, "sources": manifest.consumed} for step, (_, manifest) in found]


def resolve_training(config: RunConfig) -> Training:
    """The training on the current artifacts of prepare-data and convert, which are not looked at.

    Raises:
        LlemmaError: one of the two was never finished with this configuration.
    """
    return _training(config, current(config, PREPARE_DATA), current(config, CONVERT))


def find_training(config: RunConfig) -> Training | None:
    """As `resolve_training`; None where that raises."""
    return next(find_trainings(config), None)


def find_trainings(config: RunConfig) -> Iterator[Training]:
    """The training on the current artifacts, if they are known, then those on artifacts that were current before."""
    for data, weights in itertools.product(find_all(config, PREPARE_DATA), find_all(config, CONVERT)):
        yield _training(config, data, weights)


def _training(config: RunConfig, data: StageIdentity, weights: StageIdentity) -> Training:
    """In the order of the data that the configuration names; else in an older one that it or one that begins like it
    was begun in; else in the newest."""
    for order in ORDER_VERSIONS if config.data.order is None else ():
        training = _in_order(config, order, data, weights)
        if order != DATA_ORDER and training.was_begun():
            return training
    return _in_order(config, data_order(config), data, weights)


def _in_order(config: RunConfig, order: int, data: StageIdentity, weights: StageIdentity) -> Training:
    config = config.model_copy(update={"data": config.data.model_copy(update={"order": order})})
    content = weights.weights or weights.fingerprint
    lineage = ancestors(config, data.fingerprint, content, weights.fingerprint)
    return Training(train_spec(config, data.fingerprint, content), data, weights, lineage)
