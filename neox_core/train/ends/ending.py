"""How a training's last save is brought to where it is safe, and which error ends the job."""

from __future__ import annotations

import json
import time

import torch.distributed as dist

from neox_core.checkpoint.lease import SupersededError
from neox_core.checkpoint.writer import CheckpointWriter
from neox_core.errors import LlemmaError, StoppedError, StorageError
from neox_core.parallel.ranks.shared_store import shared_store
from neox_core.storage.patient_store import PatientStore
from neox_core.train.ends.stopping import StopAtBoundary
from neox_core.train.job import TrainJob
from neox_core.train.observe.watchdog import Watchdog

_LOOK_SECONDS = 0.05
_LAST_SECONDS = 60.0
"""For which rank 0 waits for the others to have heard."""


def ended(
    stopped: StopAtBoundary, job: TrainJob, store: PatientStore, writer: CheckpointWriter, watchdog: Watchdog
) -> LlemmaError:
    """Bring the last save to where it is safe; the error that ends the job. Collective over all ranks."""
    reason = stopped.stop.reason
    if stopped.stop.kind == "superseded":
        store.stopped.set()
        writer.abandon()
        return SupersededError(reason)
    if stopped.stop.kind == "storage":
        problems = _exchange(_problem_on_disk(writer))
        store.stopped.set()  # not before all have written: then nothing is waited for any more
        writer.abandon()
        if problem := next(filter(None, problems), ""):
            return StorageError(f"{reason}; and {problem}")
        return StorageError(f"{reason}; step {stopped.step} is saved in {job.output}: run again when the store is back")
    last_upload(writer, watchdog)
    return StoppedError(f"stopped after step {stopped.step}, which is saved: {reason}; run again to go on")


def last_upload(writer: CheckpointWriter, watchdog: Watchdog) -> None:
    """Wait for it. Collective over all ranks: rank 0 publishes the manifest, and nobody leaves before.

    Raises:
        SupersededError: another job is at work, so that it was not published.
        StorageError: it was given up.
    """
    watchdog.beat("last upload")
    problem, superseded = _problem_on_disk(writer), False
    try:
        writer.wait()
    except (LlemmaError, OSError) as error:  # the others must hear of it
        superseded = isinstance(error, SupersededError)
        given_up = f"{error}; the last save is on local disk: run again when the store is back"
        problem = str(error) if superseded else problem or given_up
    problems = [json.loads(text) for text in _exchange(json.dumps([problem, superseded]))]
    writer.abandon()
    for text, other_job in sorted(problems, key=lambda entry: not entry[1]):
        if other_job:
            raise SupersededError(text)
        if text:
            raise StorageError(text)


def _problem_on_disk(writer: CheckpointWriter) -> str:
    """Why the last save is not on local disk; empty if it is."""
    try:
        return writer.wait_for_disk()
    except (LlemmaError, OSError) as error:
        return str(error)


def _exchange(own: str) -> list[str]:
    """All ranks' texts, by rank. The last thing that they do together, so that no rank may end before all have heard.

    By the ranks' store: in a collective, a rank that is through closes connections that others still listen to.
    """
    channel, rank, world_size = shared_store("ending"), dist.get_rank(), dist.get_world_size()
    channel.set(str(rank), own or " ")
    texts = [channel.get(str(other)).decode().strip() for other in range(world_size)]
    heard, deadline = channel.add("heard", 1), time.monotonic() + _LAST_SECONDS
    while rank == 0 and heard < world_size and time.monotonic() < deadline:  # which may hold the store
        time.sleep(_LOOK_SECONDS)
        heard = channel.add("heard", 0)
    return texts
