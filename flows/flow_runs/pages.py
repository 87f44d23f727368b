"""What the page of a stage's run in Prefect shows next to its progress: where things lie, and the loss as an image."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.exceptions import PrefectException

from flows.flow_runs.names import artifact_key
from neox_core.errors import LlemmaError
from neox_core.train.observe.metrics import METRICS_FILE
from neox_core.train.observe.rows import read_metrics
from tasks.identity.specs import TRAIN
from tasks.identity.training import Training
from tasks.report.curve import loss_image
from tasks.report.places import Place, job_place, places

logger = logging.getLogger(__name__)

_SECONDS = 15.0
"""Between looks whether there is something new to show."""


class StagePage:
    """The artifacts of a stage of a training; each is made once it has content, and changed where it lies."""

    def __init__(self, training: Training, stage: str) -> None:
        self._training, self._stage = training, stage
        self._shown: dict[str, tuple[UUID, str]] = {}
        self._due = 0.0

    def renew(self, now: bool = False) -> None:
        """Show what is new, if it is time to. What cannot be shown costs a warning."""
        if not now and time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _SECONDS
        try:
            self._show("places", places_text(self._training, self._stage), _create_markdown)
            if self._stage == TRAIN:
                metrics = read_metrics(self._training.scratch / METRICS_FILE)
                self._show("loss", loss_image(metrics, self._training.config.train.steps), _create_image)
        except (httpx.HTTPError, PrefectException, LlemmaError, OSError) as error:
            logger.warning("the page of %s is not renewed: %s", self._stage, error or type(error).__name__)

    def _show(self, what: str, content: str | None, create: Callable[[str, str], UUID]) -> None:
        if content is None:
            return
        known = self._shown.get(what)
        if known is None:
            key = artifact_key(self._training.config, f"{self._stage}-{what}")
            self._shown[what] = create(key, content), content
        elif known[1] != content:
            with get_client(sync_client=True) as client:
                client.update_artifact(known[0], ArtifactUpdate(data=content))
            self._shown[what] = known[0], content


def places_text(training: Training, stage: str) -> str:
    """Where the stage's job, its logs and the run's results are, as Markdown."""
    job = job_place(training, stage)
    listed = [*([job] if job else []), *places(training)]
    text = "\n\n".join(f"**{place.what}**{_shown(place)}" for place in listed)
    if any(place.what.endswith("not uploaded") for place in listed):
        text += "\n\nRuns of W&B that are not uploaded: `llemma wandb sync CONFIG`."
    return text


def _shown(place: Place) -> str:
    """A link, or a block that scrolls: Prefect's column is narrow, and paths are long."""
    return f": [{place.where}]({place.address})" if place.address else f"\n\n```\n{place.where}\n```"


def _create_markdown(key: str, content: str) -> UUID:
    return _id(create_markdown_artifact(content, key=key, description="where things lie"))


def _create_image(key: str, content: str) -> UUID:
    return _id(create_image_artifact(content, key=key, description="loss so far"))


def _id(created: Any) -> UUID:
    assert isinstance(created, UUID)
    return created
