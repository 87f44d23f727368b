"""Which artifacts of prepare-data and convert are current: those that their last runs in a workdir made or found.

A small record per stage and configuration names the artifact. Later stages read it, never the raw text or the base
weights, which may be edited or removed meanwhile: that changes nothing until their own stage is run again.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

from neox_core.artifact import ARTIFACT_FILE, fingerprint, read_artifact
from neox_core.config import RunConfig
from neox_core.data.tokenization.readers.inputs import is_gone
from neox_core.errors import LlemmaError
from neox_core.storage.atomic import write_atomically
from neox_core.train.identity import weights_identity
from tasks.identity.specs import CONVERT, convert_logic, prepare_logic
from tasks.identity.stage import StageIdentity, StageResult, find, how_to_run

logger = logging.getLogger(__name__)

_RECORDS = ".current"
_EARLIER = 20
"""Artifacts that a record remembers beyond the current one."""


def note_current(config: RunConfig, result: StageResult) -> None:
    """Write down what a run of prepare-data or convert has made or found."""
    artifact, path = result.artifact, _record(config, result.artifact.name)
    record = {"fingerprint": artifact.fingerprint}
    if artifact.name == CONVERT:
        record["weights"] = weights_identity(artifact)
    before = [known for known in _records(path) if known["fingerprint"] != artifact.fingerprint][:_EARLIER]
    write_atomically(path, json.dumps(record | {"earlier": before}))


def find_current(config: RunConfig, stage: str) -> StageIdentity | None:
    """The artifact that is current for this configuration, if the stage was ever finished; it is not looked at."""
    return next(iter(find_all(config, stage)), None)


def find_all(config: RunConfig, stage: str) -> list[StageIdentity]:
    """The artifact that is current for this configuration and those that were before, from the newest to the oldest:
    a job may still be at work on what was made of a text that was changed since."""
    return [_identity(config, stage, record) for record in _records(_record(config, stage))]


def current(config: RunConfig, stage: str) -> StageIdentity:
    """As `find_current`.

    Raises:
        LlemmaError: the stage was never finished with this configuration.
    """
    if (identity := find_current(config, stage)) is None:
        raise LlemmaError(f"stage {stage} was never finished in {config.workdir} as configured: {how_to_run(stage)}")
    return identity


def outlived(config: RunConfig, stage: str) -> StageResult | None:
    """The current artifact of a stage whose raw inputs are gone as a whole, if it is intact.

    Raises:
        StorageError: an object store does not answer.
    """
    if (identity := find_current(config, stage)) is None:
        return None
    gone = [place for place in _places(config, stage) if is_gone(place, config.storage)]
    artifact = find(identity) if gone else None
    if artifact is None:
        return None
    logger.warning("%s does not exist any more: %s stays what it was, %s", gone[0], stage, artifact.folder)
    return StageResult(artifact, skipped=True)


def _identity(config: RunConfig, stage: str, record: dict[str, str]) -> StageIdentity:
    identity = StageIdentity(stage, record["fingerprint"], config.workdir, record.get("weights"))
    if stage == CONVERT and identity.weights is None and (identity.folder / ARTIFACT_FILE).is_file():
        return replace(identity, weights=weights_identity(read_artifact(identity.folder)))  # an older record
    return identity


def _records(path: Path) -> list[dict[str, str]]:
    """What was noted down, from the newest to the oldest."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    earlier = content.pop("earlier", [])
    return [content, *earlier]


def _record(config: RunConfig, stage: str) -> Path:
    """Where things lie counts too: configurations that differ in nothing else may share a workdir."""
    if stage == CONVERT:
        logic = convert_logic(config) | {"random_seed": config.base_model.random_seed}
    else:
        logic = prepare_logic(config) | ({"test": True} if config.data.test else {})  # else the others' name stays
    key = fingerprint(stage, logic | {"places": _places(config, stage)}, {})
    return config.workdir / _RECORDS / f"{stage}-{key[:16]}.json"


def _places(config: RunConfig, stage: str) -> list[str]:
    """Where the stage's raw inputs lie: paths, globs and s3:// prefixes."""
    if stage == CONVERT:
        return [str(config.base_model.path)]
    data = config.data
    in_folders = any("train" not in source.files for source in data.sources.values())
    files = [where for _, source in sorted(data.sources.items()) for _, where in sorted(source.files.items())]
    return [*([data.input] if in_folders else []), *files, str(config.tokenizer.model), *map(str, data.evaluation_sets)]
