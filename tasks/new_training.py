"""Says that a training begins at step 0: in what it is another than the last one of its workdir, or that its
checkpoints are gone.

Whoever changed a setting that does not look as if it mattered, such as a source of validation, or another place of the
store, may have meant to go on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from neox_core.errors import StorageError
from neox_core.train.ends.saving import SAVED_FILE
from neox_core.train.identity import NOT_LOGICAL
from tasks.identity.training import Training
from tasks.jobs.node.plan import Restarts

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
"""In the scratch folder: the configuration of the training that has it, for those who look in."""
_MOST = 6
"""Settings that are named."""
_SECTIONS = ("seed", "data", "tokenizer", "model", "base_model", "train")
"""Of a configuration, those on which a training may depend."""
_UNRELATED = {("data", name) for name in ("workers", "max_epochs", "max_damaged", "slurm")}
_UNRELATED |= {("train", name) for name in NOT_LOGICAL}


def say_if_new(training: Training) -> None:
    """Log it, if the store has nothing of the training, and the workdir has another one or has seen its checkpoints."""
    saved = Restarts(0, training.scratch / SAVED_FILE).saved_so_far()
    if saved and not _is_stored(training):
        logger.warning(
            "%s has saved step %d, but %s holds no checkpoint of it: unless one lies on a local disk, it begins at "
            "step 0 again. Is storage.url still the same?",
            training.spec.folder.name,
            saved,
            training.config.storage.url,
        )
    others = list(training.scratch.parent.glob(f"train-*/{CONFIG_FILE}"))
    if not others or training.scratch.exists() or training.was_begun() or _is_stored(training):
        return
    last = max(others, key=lambda path: path.stat().st_mtime)
    logger.warning(
        "%s begins at step 0. It is another training than %s, the last one in this workdir: %s",
        training.spec.folder.name,
        last.parent.name,
        _difference(last, training),
    )


def _is_stored(training: Training) -> bool:
    try:
        return bool(training.lineage_checkpoints())
    except StorageError:  # the job will say so
        return True


def _difference(path: Path, training: Training) -> str:
    before = dict(_settings(json.loads(path.read_text(encoding="utf-8"))))
    now = dict(_settings(training.config.model_dump(mode="json")))
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if not names:
        return "prepare-data or convert has made something else since, of another text, tokenizer or base"
    shown = [f"{name} was {json.dumps(before.get(name))}, is {json.dumps(now.get(name))}" for name in names[:_MOST]]
    return "; ".join([*shown, *([f"and {len(names) - _MOST} more"] if len(names) > _MOST else [])])


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of what a training may depend on."""
    for section in _SECTIONS:
        for name, value in _leaves(section, config.get(section)):
            if tuple(name.split(".")[:2]) not in _UNRELATED:
                yield name, value


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item)
    else:
        yield name, value
