"""Progress of a stage, in the terminal and in Prefect."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from tqdm import tqdm

from neox_core.progress import Progress

_ARTIFACT_SECONDS = 2.0
_BAR = "{desc:<13} {percentage:3.0f}%|{bar:24}| {elapsed} {postfix}"


@contextmanager
def stage_progress(stage: str) -> Iterator[Progress]:
    """A bar on standard error and a progress artifact, which follow the same calls.

    Stages that run at the same time get a line each. Without a terminal, a bar's line is written every few seconds.
    """
    artifact = create_progress_artifact(progress=0.0, key=f"{stage}-progress", description=stage)
    assert isinstance(artifact, UUID)
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=1.0, desc=stage, bar_format=_BAR, mininterval=interval, maxinterval=interval) as bar:
        sent = time.monotonic()

        def progress(share: float, text: str) -> None:
            nonlocal sent
            bar.set_postfix_str(text, refresh=False)
            bar.update(share - bar.n)
            if time.monotonic() - sent >= _ARTIFACT_SECONDS:
                update_progress_artifact(artifact_id=artifact, progress=100 * share, description=f"{stage}: {text}")
                sent = time.monotonic()

        yield progress
        bar.update(1.0 - bar.n)
        update_progress_artifact(artifact_id=artifact, progress=100.0, description=stage)
