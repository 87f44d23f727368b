"""Which artifacts of prepare-data and convert are current: those that their last runs in a workdir made or found.

A small record per stage and configuration names the artifact. Later stages read it, never the raw text or the base
weights, which may be edited or removed meanwhile: that changes nothing until their own stage is run again.
"""

from __future__ import annotations

import glob
import json
import logging
from pathlib import Path

from neox_core.artifact import fingerprint
from neox_core.config import RunConfig
from neox_core.errors import LlemmaError
from neox_core.storage.atomic import write_atomically
from tasks.specs import CONVERT, convert_logic, prepare_logic
from tasks.stage import StageIdentity, StageResult, find, how_to_run

logger = logging.getLogger(__name__)

_RECORDS = ".current"
_EARLIER = 20
"""Artifacts that a record remembers beyond the current one."""


def note_current(config: RunConfig, result: StageResult) -> None:
    """Write down what a run of prepare-data or convert has made or found."""
    artifact, record = result.artifact, _record(config, result.artifact.name)
    before = [known for known in _fingerprints(record) if known != artifact.fingerprint][:_EARLIER]
    write_atomically(record, json.dumps({"fingerprint": artifact.fingerprint, "earlier": before}))


def find_current(config: RunConfig, stage: str) -> StageIdentity | None:
    """The artifact that is current for this configuration, if the stage was ever finished; it is not looked at."""
    return next(iter(find_all(config, stage)), None)


def find_all(config: RunConfig, stage: str) -> list[StageIdentity]:
    """The artifact that is current for this configuration and those that were before, from the newest to the oldest:
    a job may still be at work on what was made of a text that was changed since."""
    known = _fingerprints(_record(config, stage))
    return [StageIdentity(stage, fingerprint, config.workdir) for fingerprint in known]


def current(config: RunConfig, stage: str) -> StageIdentity:
    """As `find_current`.

    Raises:
        LlemmaError: the stage was never finished with this configuration.
    """
    if (identity := find_current(config, stage)) is None:
        raise LlemmaError(f"stage {stage} was never finished in {config.workdir} as configured: {how_to_run(stage)}")
    return identity


def outlived(config: RunConfig, stage: str) -> StageResult | None:
    """The current artifact of a stage whose raw inputs are gone as a whole, if it is intact."""
    gone = [place for place in _places(config, stage) if _is_gone(place)]
    identity = find_current(config, stage) if gone else None
    artifact = find(identity) if identity else None
    if artifact is None:
        return None
    logger.warning("%s does not exist any more: %s stays what it was, %s", gone[0], stage, artifact.folder)
    return StageResult(artifact, skipped=True)


def _fingerprints(record: Path) -> list[str]:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return [content["fingerprint"], *content.get("earlier", ())]


def _record(config: RunConfig, stage: str) -> Path:
    """Where things lie counts too: configurations that differ in nothing else may share a workdir."""
    if stage == CONVERT:
        logic = convert_logic(config) | {"random_seed": config.base_model.random_seed}
    else:
        logic = prepare_logic(config)
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


def _is_gone(place: str) -> bool:
    return not place.startswith("s3://") and not glob.has_magic(place) and not Path(place).exists()
