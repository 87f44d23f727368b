"""Trainings that begin as another one: a change of weights, of learning rate, of batch size or of length is a training
of its own. It takes up the one before it.

So nothing that was trained is overwritten, both can be compared, and taking the change back finds the old training.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neox_core.checkpoint.manifest import Manifest, list_checkpoints, training_prefix
from neox_core.config import RunConfig, TrainConfig
from neox_core.data.dataset import MixtureDataset
from neox_core.errors import CheckpointError
from neox_core.storage.atomic import write_atomically
from neox_core.storage.object_store import ObjectStore
from neox_core.train.identity import training_fingerprint
from neox_core.train.observe.metrics import INCIDENTS_FILE, METRICS_FILE
from neox_core.train.schedule import learning_rate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ancestor:
    """A training that is the same up to and with a step."""

    fingerprint: str
    last_step: int


def ancestors(config: RunConfig, data: str, weights: str, shards: str | None = None) -> tuple[Ancestor, ...]:
    """The trainings of `earlier_configs`, on what `training_fingerprint` takes.

    Args:
        shards: fingerprint of convert's artifact. Up to version 0.2 trainings were named after it, and so after
            their layout: these are the same ones under those names.
    """
    earlier = earlier_configs(config)
    found = [Ancestor(training_fingerprint(config, data, weights), last) for config, last in earlier]
    if shards and shards != weights:
        own = (config, config.train.steps)
        found += [Ancestor(training_fingerprint(config, data, shards), last) for config, last in (own, *earlier)]
    return tuple(found)


def earlier_configs(config: RunConfig) -> list[tuple[RunConfig, int]]:
    """Configurations of trainings that begin like this one, and the last step that is the same with each, latest first.

    They lack the last changes, those and the ones before, and so on; or are shorter (train.extends), with or without
    changes of their own. Changes are those of data.weight_changes and of train.changes; those from the same step are
    one.
    """
    steps = {change.from_step for change in config.data.weight_changes}
    steps |= {change.from_step for change in config.train.changes}
    found = [(_without_changes(config, step), step - 1) for step in steps]
    for shorter in (same for length in config.train.extends for same in _shortened(config, length)):
        common = _last_common_step(shorter.train, config.train)
        found += [(shorter, common), *((earlier, min(last, common)) for earlier, last in earlier_configs(shorter))]
    return sorted(found, key=lambda pair: pair[1], reverse=True)


def _without_changes(config: RunConfig, from_step: int) -> RunConfig:
    """The configuration without changes from this step on."""
    weight_changes = tuple(change for change in config.data.weight_changes if change.from_step < from_step)
    changes = tuple(change for change in config.train.changes if change.from_step < from_step)
    data = config.data.model_copy(update={"weight_changes": weight_changes})
    return config.model_copy(update={"data": data, "train": config.train.model_copy(update={"changes": changes})})


def _shortened(config: RunConfig, steps: int) -> list[RunConfig]:
    """The configuration of a training of this many steps, and the same one that leaves `decay_steps` to its default."""
    cut = _without_changes(config, steps + 1)
    given = cut.train.model_copy(update={"steps": steps, "extends": ()})
    default = given.model_copy(update={"schedule": given.schedule.model_copy(update={"decay_steps": None})})
    same = [given, default] if default != given and _last_common_step(default, given) == steps else [given]
    return [cut.model_copy(update={"train": train}) for train in same]


def _last_common_step(shorter: TrainConfig, longer: TrainConfig) -> int:
    """Up to which the learning rates are the same."""
    steps = range(1, shorter.steps + 1)
    apart = (step for step in steps if learning_rate(step, shorter) != learning_rate(step, longer))
    return next(apart, shorter.steps + 1) - 1


def lineage_checkpoints(
    store: ObjectStore, fingerprint: str, lineage: Sequence[Ancestor]
) -> dict[int, tuple[str, Manifest]]:
    """Complete checkpoints by step: the training's own, and those that it shares with an ancestor.

    The own one of two of the same step. A shared one can be newer where an ancestor was named after a first start.

    Returns:
        For each step the key below which its checkpoint lies, and its manifest.
    """
    own = training_prefix(fingerprint)
    found = {manifest.step: (own, manifest) for manifest in list_checkpoints(store, own)}
    for ancestor in lineage:
        prefix = training_prefix(ancestor.fingerprint)
        for manifest in list_checkpoints(store, prefix):
            if manifest.step <= ancestor.last_step:
                found.setdefault(manifest.step, (prefix, manifest))
    return dict(sorted(found.items()))


def newest_checkpoint(
    store: ObjectStore, fingerprint: str, lineage: Sequence[Ancestor], before: float = float("inf")
) -> tuple[str, Manifest] | None:
    """The last of `lineage_checkpoints` before a step, if there is any."""
    found = lineage_checkpoints(store, fingerprint, lineage)
    return next((found[step] for step in reversed(found) if step < before), None)


def check_consumed(data: MixtureDataset, manifest: Manifest) -> None:
    """Check that the mixture took from every source what the checkpoint says.

    Raises:
        CheckpointError: it did not, so that going on would lose or repeat sequences.
    """
    for name, expected in data.consumed(manifest.sequences_consumed).items():
        found = manifest.consumed.get(name)
        if found != expected:
            raise CheckpointError(
                f"{manifest.name} was trained on {found} of source {name!r}, but the mixture of this "
                f"configuration takes {expected} up to there: state changes of weights in data.weight_changes only, "
                "and only for steps to come; where a source's amount is in tokens or epochs, its share is of the whole "
                "run's tokens, so that train.changes cannot change the batch of a training that has begun"
            )


def inherit_records(store: ObjectStore, own: str, prefix: str, step: int, folder: Path) -> None:
    """Begin the metrics and the incidents with an ancestor's, up to the step that is resumed from.

    Not if there are some below the training's own key: those began with the ancestor's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (METRICS_FILE, INCIDENTS_FILE):
        path, text = folder / name, store.get_text(f"{prefix}/{name}")
        if text is None or path.exists() or store.get_text(f"{own}/{name}") is not None:
            continue
        lines = text.splitlines(keepends=True)
        write_atomically(path, "".join(line for line in lines if json.loads(line)["step"] <= step))
    logger.info("goes on from step %d of %s", step, store.url(prefix))
