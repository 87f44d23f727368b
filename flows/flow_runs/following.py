"""The progress of a training whose flow is away, as the flow itself would show it."""

from __future__ import annotations

from prefect.artifacts import update_progress_artifact
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort

from flows.flow_runs.names import artifact_key
from neox_core.config import RunConfig
from neox_core.storage.claims import is_claimed
from neox_core.train.observe.metrics import METRICS_FILE
from tasks.follow import share_done
from tasks.identity.specs import TRAIN
from tasks.identity.training import find_training
from tasks.overview import training_view


def show_progress(client: SyncPrefectClient, config: RunConfig) -> None:
    """Renew the newest progress artifact of the training, unless it is being followed or no job is at work.

    Raises:
        LaunchError: a local job belongs to another host.
    """
    training = find_training(config)
    if training is None or is_claimed(config.workdir, training.spec.folder.name):
        return
    view = training_view(training)
    key = artifact_key(config, f"{TRAIN}-progress")
    newest = client.read_artifacts(
        artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])), sort=ArtifactSort.CREATED_DESC, limit=1
    )
    if view.state == "at work" and newest:
        share = share_done(config, training.scratch / METRICS_FILE)
        update_progress_artifact(newest[0].id, progress=100 * share, description=f"{TRAIN}: {view.text}")
