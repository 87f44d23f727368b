"""Progress of a stage, in the terminal and in Prefect."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException
from tqdm import tqdm

from flows.flow_runs.interruption import raise_if_interrupted
from neox_core.progress import Progress

logger = logging.getLogger(__name__)

_ARTIFACT_SECONDS = 2.0
_BAR = "{desc:<13} {percentage:3.0f}%|{bar:24}| {elapsed} {postfix}"


@contextmanager
def stage_progress(stage: str, key: str) -> Iterator[Progress]:
    """A bar on standard error and a progress artifact, which follow the same calls.

    Stages that run at the same time get a line each. Without a terminal, a bar's line is written every few seconds.
    A call also ends the stage when its flow has been interrupted (see `side_by_side`).

    Args:
        key: the artifact's; each configuration has its own.
    """
    artifact = create_progress_artifact(progress=0.0, key=key, description=stage)
    assert isinstance(artifact, UUID)
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=1.0, desc=stage, bar_format=_BAR, mininterval=interval, maxinterval=interval) as bar:
        sent, shown = time.monotonic(), (0.0, "")

        def progress(share: float, text: str) -> None:
            nonlocal sent, shown
            raise_if_interrupted()
            bar.set_postfix_str(text, refresh=False)
            bar.update(share - bar.n)
            if (share, text) != shown and time.monotonic() - sent >= _ARTIFACT_SECONDS:
                _update(artifact, share, f"{stage}: {text}")
                sent, shown = time.monotonic(), (share, text)

        yield progress
        bar.update(1.0 - bar.n)
        _update(artifact, 1.0, stage)


def _update(artifact: UUID, share: float, description: str) -> None:
    """Progress is worth a warning, not a run of weeks, when the server is away for a while."""
    try:
        update_progress_artifact(artifact_id=artifact, progress=100 * share, description=description)
    except (httpx.HTTPError, PrefectException) as error:
        logger.warning("progress was not reported (%s): %s", error or type(error).__name__, description)
