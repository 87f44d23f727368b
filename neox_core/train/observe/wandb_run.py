"""Runs of Weights & Biases: one for a training through all its jobs, another for its evaluation, in one group."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from neox_core.config import RunConfig

logger = logging.getLogger(__name__)

_FOLDER = "wandb"
"""W&B's own, within the folder that it is given."""
_WANDB_URL = "https://api.wandb.ai"
_CONNECT_SECONDS = 5.0
_ID_LENGTH = 16


@dataclass(frozen=True)
class WandbRun:
    """What W&B knows a run by. Credentials are W&B's own business: WANDB_API_KEY, or `wandb login`'s."""

    fingerprint: str
    """Of the training or the evaluation: whoever goes on with it goes on with its run of W&B."""
    kind: str
    """train or evaluate."""
    training: str
    """The training's fingerprint, which groups its run and its evaluation's."""

    @property
    def id(self) -> str:
        """W&B's id."""
        return self.fingerprint[:_ID_LENGTH]


class StartedRun:
    """A run of W&B. Its failures, and those of its process and of the disk, are logged once and end nothing: whoever
    tells it something writes that to a file of ours too.

    Args:
        start: W&B's own run.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        self._run = _borne(start)

    def log(self, row: Mapping[str, Any]) -> None:
        """Record values by name."""
        self._tell(lambda run: run.log(row))

    def note(self, name: str, text: str) -> None:
        """Put a text into the run's summary."""
        self._tell(lambda run: run.summary.update({name: text}))

    def finish(self, exit_code: int = 0) -> None:
        """Nothing more comes."""
        self._tell(lambda run: run.finish(exit_code=exit_code))

    def _tell(self, call: Callable[[Any], object]) -> None:
        def told() -> Any:
            call(self._run)
            return self._run

        if self._run is not None:
            self._run = _borne(told)


def _borne(call: Callable[[], Any]) -> Any:
    """What the call returns; None if it fails."""
    try:
        return call()
    except Exception as error:  # of whatever W&B consists of
        logger.error("W&B has failed, and is told nothing more by this job: %s: %s", type(error).__name__, error)
        return None


def start_wandb(config: RunConfig, folder: Path, run: WandbRun) -> StartedRun:
    """A run of W&B, gone on with if there is one with this id; offline where W&B cannot be reached or refuses.

    Args:
        folder: W&B's files come into its folder `wandb`; the run's address too, for `address_of`.
    """
    return StartedRun(partial(_start, config, folder, run))


def _start(config: RunConfig, folder: Path, run: WandbRun) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    if config.wandb.mode == "online":
        try:
            if _reachable(os.environ.get("WANDB_BASE_URL", _WANDB_URL)):
                return _init(config, folder, run, "online")
            problem = "cannot be reached"
        except wandb.errors.Error as error:  # no key, or not that project's
            problem = f"refuses this job ({error})"
        place = folder / _FOLDER
        logger.warning("W&B %s: this job writes offline, into %s; later: llemma wandb sync CONFIG", problem, place)
    return _init(config, folder, run, "offline")


def _init(config: RunConfig, folder: Path, run: WandbRun, mode: Literal["online", "offline"]) -> Any:
    import wandb

    started = wandb.init(
        mode=mode,
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=config.name if run.kind == "train" else f"{config.name}-{run.kind}",
        id=run.id,
        group=run.training[:_ID_LENGTH],
        job_type=run.kind,
        resume="allow",
        dir=folder,
        config=config.model_dump(mode="json"),
    )
    # W&B's own count of steps only rises, and would drop those that a resumed job takes again.
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    if started.url:
        _address_file(folder, run).write_text(started.url, encoding="utf-8")
    return started


def address_of(folder: Path, run: WandbRun) -> str | None:
    """The address of the run's page; None while it was offline only."""
    path = _address_file(folder, run)
    return path.read_text(encoding="utf-8") if path.is_file() else None


def offline_folders(folder: Path, run: WandbRun) -> Iterator[Path]:
    """What was written of a run while W&B was away or mode offline, a folder per job, the oldest first; without those
    that were uploaded."""
    for path in sorted((folder / _FOLDER).glob(f"offline-run-*-{run.id}")):
        if not list(path.glob("*.wandb.synced")):
            yield path


def _address_file(folder: Path, run: WandbRun) -> Path:
    return folder / _FOLDER / f"{run.id}.url"


def _reachable(url: str) -> bool:
    """Whether a connection to the server, or to the proxy that leads there, can be made."""
    parts = urlsplit(getproxies().get(urlsplit(url).scheme, url))
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 443), timeout=_CONNECT_SECONDS):
            return True
    except OSError:
        return False
