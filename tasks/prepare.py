"""prepare-data: text to token datasets and the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neox_core.config import RunConfig
from neox_core.data.ledger import run_ledger
from neox_core.progress import Progress
from tasks.specs import prepare_spec
from tasks.stage import StageResult, run_stage
from tasks.tokenize import prepare_data


def prepare(config: RunConfig, progress: Progress) -> StageResult:
    """Tokenize every source, or find it done. The artifact's summary holds the counts per source, what was
    left out and why, and which engine encoded.

    Raises:
        DataError: an input is missing or bad, or the run would repeat a source too often; in the latter case the
            artifact is there, since the mixture may change without a new tokenization.
    """

    def build(folder: Path) -> Mapping[str, Any]:
        return prepare_data(config, folder, progress)

    result = run_stage(prepare_spec(config), build, progress)
    ledger(config, result)
    return result


def ledger(config: RunConfig, prepared: StageResult) -> dict[str, Any]:
    """Counts per source and split, and what the run takes of each.

    Raises:
        DataError: the run would repeat a source more than data.max_epochs times.
    """
    return run_ledger(prepared.artifact.summary["sources"], config)
