"""The state of a training, and how it comes back: from the newest checkpoint, after a stop or after an incident."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from neox_core.artifact import software
from neox_core.checkpoint.manifest import MANIFEST_FILE, Manifest, download_checkpoint
from neox_core.checkpoint.partitions import Layout, Place
from neox_core.checkpoint.resharding import Resharding
from neox_core.checkpoint.writer import CheckpointWriter
from neox_core.config import RunConfig
from neox_core.data.dataset import MixtureDataset, open_training_data
from neox_core.data.skipped import SkippedSequences, first_sequence
from neox_core.errors import CheckpointError, TrainingError
from neox_core.parallel.ranks.mesh import Mesh
from neox_core.parallel.stages import pipeline_layers
from neox_core.storage.object_store import ObjectStore
from neox_core.train.engine.step_engine import StepEngine
from neox_core.train.guards import Incident
from neox_core.train.job import TrainJob, local_checkpoints
from neox_core.train.resuming.lineage import check_consumed, inherit_records, newest_checkpoint
from neox_core.train.resuming.local_copy import here_on_all_ranks, newest_local, remove_others, upload_shares

logger = logging.getLogger(__name__)

_SKIPPED_FILE = "skipped.json"
"""Lies with the checkpoints: what a training that went back to one of them left out after it."""


@dataclass(frozen=True)
class TrainingState:
    """The state after a step, without the weights."""

    step: int
    data: MixtureDataset
    skipped: tuple[SkippedSequences, ...] = ()
    guard: Mapping[str, Any] = field(default_factory=dict)
    """What `Guard.state` returned."""


@dataclass(frozen=True)
class TrainCheckpoints:
    """Saves and loads the training's checkpoints. All methods are collective over all ranks."""

    config: RunConfig
    job: TrainJob
    store: ObjectStore
    mesh: Mesh
    engine: StepEngine
    writer: CheckpointWriter
    heartbeat: Callable[[], None] = lambda: None
    """Called as a download makes progress."""
    attempt: int = 0
    """Number of this job among the training's; 0: it has none."""
    check_lease: Callable[[], None] = lambda: None
    """Called on rank 0 before anything but a save is written; raises if this job must not."""

    def save(self, state: TrainingState, upload: bool = True) -> None:
        """Save the state after a step, and start its upload if there is to be one."""
        sequences = first_sequence(self.config.train, state.step + 1, state.skipped)
        manifest = Manifest(
            step=state.step,
            sequences_consumed=sequences,
            files=(),
            layout=self._layout.to_manifest(),
            fingerprint=self.job.fingerprint,
            config=self.config.model_dump(mode="json"),
            consumed=state.data.consumed(sequences),
            software=software(),
            skipped=[asdict(window) for window in state.skipped],
            guard=state.guard,
            attempt=self.attempt,
        )
        notes = {"sequences_consumed": sequences}
        hand_over = partial(self.engine.save_state, self._folder, manifest.name, notes)
        last = state.step == self.config.train.steps
        self.writer.save(manifest, hand_over, self._folder / manifest.name, upload, last)

    def resume(self) -> TrainingState:
        """Load the newest complete checkpoint, if there is one, and return its state. If it is damaged, the one before.

        Raises:
            CheckpointError: it is of other data; or all that there are, are damaged; or there is none to extend.
        """
        found, damage = self._newest(), ""
        if found is None:
            self._check_extends()
            return TrainingState(0, open_training_data(self.job.data, self.config))
        while found:
            prefix, manifest = found
            state = self._state(manifest)
            self._check(prefix, manifest, state)
            resharding = self._resharding(manifest)
            damage = self._fetch(prefix, manifest, resharding)
            if not damage:
                break
            logger.error("%s; the checkpoint before it is taken", damage)
            found = self._newest(before=manifest.step)
        if damage:
            raise CheckpointError(f"{damage}; nor is there an earlier checkpoint that is whole")
        self._load(manifest, resharding)
        self._upload_unless_stored(prefix, manifest)
        if self.mesh.local_rank == 0:
            remove_others(self._folder, manifest.name)
        if prefix != self.job.prefix and self.mesh.rank == 0:
            inherit_records(self.store, self.job.prefix, prefix, manifest.step, self.job.output)
        consumed = first_sequence(self.config.train, state.step + 1, state.skipped)
        logger.info("resumed from step %d, the next sequence is %d", manifest.step, consumed)
        return state

    def go_back(self, incident: Incident) -> TrainingState:
        """Load the newest complete checkpoint, and leave out the sequences from there to the end of the incident's.

        Where training goes on is written down first, so that a job that is killed afterwards goes on the same way.

        Raises:
            TrainingError: there is no checkpoint yet.
        """
        self.writer.wait()
        dist.barrier()  # the last upload is published by rank 0
        found = self._newest()
        if found is None:
            raise TrainingError(
                f"step {incident.outcome.step}: {incident.problem}, and there is no checkpoint to go back to: lower "
                "train.checkpoint_interval, or set train.guard to skip"
            )
        manifest = found[1]
        skipped = self._state(manifest).skipped
        first = first_sequence(self.config.train, manifest.step + 1, skipped)
        end = incident.batch.first + incident.batch.count
        skipped = (*skipped, SkippedSequences(manifest.step, first, end - first))
        if self.mesh.rank == 0:
            windows = [asdict(window) for window in skipped]
            record = {"step": manifest.step, "attempt": manifest.attempt, "skipped": windows}
            self.check_lease()
            self.store.put_text(f"{self.job.prefix}/{_SKIPPED_FILE}", json.dumps(record))
        dist.barrier()
        return self.resume()

    def _newest(self, before: float = float("inf")) -> tuple[str, Manifest] | None:
        """Of steps before that one. Rank 0 decides for all, so that no two ranks resume from different steps.

        What was skipped after the checkpoint, by this training or by the one whose it is, is in the manifest.
        """
        found: list[Any] = [None, None]
        if dist.get_rank() == 0:
            if newest := newest_checkpoint(self.store, self.job.fingerprint, self.job.ancestors, before):
                found[0] = (newest[0], self._with_skipped(*newest))
            local = newest_local(self._folder, self.job.fingerprint)
            if local and local.step < before and (newest is None or local.step > newest[1].step):
                found[1] = (self.job.prefix, self._with_skipped(self.job.prefix, local))
        dist.broadcast_object_list(found, src=0)
        stored: tuple[str, Manifest] | None = found[0]
        on_disk: tuple[str, Manifest] | None = found[1]
        if on_disk is None:
            return stored
        folder, wanted = self._folder / on_disk[1].name, self._wanted(on_disk[1])
        if not here_on_all_ranks(folder, [record for record in on_disk[1].files if wanted(record.path)]):
            logger.warning("%s is not whole on local disk: not used", folder)
            return stored
        logger.info("%s is newer than what the store has", folder)
        return on_disk

    def _wanted(self, manifest: Manifest) -> Callable[[str], bool]:
        """Says whether this rank wants a file on its node: weights and metadata, and the optimizer state that it goes
        on from, which is its own or, of another layout, that of some ranks."""
        resharding, tensor_size = self._resharding(manifest), manifest.layout["tensor"]
        places = resharding.files() if resharding else {self._place}

        def wanted(name: str) -> bool:
            own = any(self.engine.optimizer_file(name, place, tensor_size) for place in places)
            return own or (self.mesh.local_rank == 0 and self.engine.shared_file(name))

        return wanted

    def _upload_unless_stored(self, prefix: str, manifest: Manifest) -> None:
        """Bring a checkpoint to the store that was on local disk only, under this job's number."""
        folder = self._folder / manifest.name
        is_local: list[bool] = [prefix == self.job.prefix and (folder / MANIFEST_FILE).is_file()]
        dist.broadcast_object_list(is_local, src=0)
        if is_local[0]:
            self.writer.upload(replace(manifest, attempt=self.attempt), folder, upload_shares(folder, manifest))

    def _with_skipped(self, prefix: str, manifest: Manifest) -> Manifest:
        for key in dict.fromkeys((self.job.prefix, prefix)):
            text = self.store.get_text(f"{key}/{_SKIPPED_FILE}")
            if text is None:
                continue
            record = json.loads(text)  # of a version up to 0.2, without the job's number
            if (record["step"], record.get("attempt", manifest.attempt)) == (manifest.step, manifest.attempt):
                return replace(manifest, skipped=record["skipped"])
        return manifest

    def _check_extends(self) -> None:
        """Nobody who asks for a training to go on wants one from step 0."""
        if extends := self.config.train.extends:
            raise CheckpointError(
                f"train.extends is {list(extends)}, but {self.store.url()} has no checkpoint of such a training that "
                "had the learning rates of this one: keep the cosine's end where it was (train.schedule.decay_steps), "
                "or look for the checkpoints; without train.extends, training starts from step 0"
            )

    def _state(self, manifest: Manifest) -> TrainingState:
        skipped = tuple(SkippedSequences(**window) for window in manifest.skipped)
        data = open_training_data(self.job.data, self.config, skipped)
        return TrainingState(manifest.step, data, skipped, manifest.guard)

    def _check(self, prefix: str, manifest: Manifest, state: TrainingState) -> None:
        before = [window for window in state.skipped if window.after_step < manifest.step]
        expected = first_sequence(self.config.train, manifest.step + 1, before)
        where = f"checkpoint {self.store.url(prefix)}/{manifest.name}"
        if manifest.sequences_consumed != expected:
            raise CheckpointError(
                f"{where} had consumed {manifest.sequences_consumed} sequences, but this configuration takes "
                f"{expected} up to there: change the batch with train.changes only, and only for steps to come"
            )
        check_consumed(state.data, manifest)

    @property
    def _layout(self) -> Layout:
        return Layout(self.mesh.tensor_size, self.mesh.data_size, pipeline_layers(self.config))

    @property
    def _place(self) -> Place:
        return Place(self.mesh.pipeline_rank, self.mesh.data_rank, self.mesh.tensor_rank)

    def _fetch(self, prefix: str, manifest: Manifest, resharding: Resharding | None) -> str:
        """Bring here what this node needs, each file once per node: weights and metadata, where the layout is the same,
        and the optimizer's files of some ranks, by the first rank here that needs them.

        Returns:
            What is damaged, as the first rank says that has found something; the same on all ranks. Nothing: empty.
        """
        places = resharding.files() if resharding else {self._place}
        host, tensor_size = socket.gethostname(), manifest.layout["tensor"]
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, (host, sorted(places)))
        before = {place for other, wanted in everyones[: self.mesh.rank] if other == host for place in wanted}

        def wanted(name: str) -> bool:
            own = any(self.engine.optimizer_file(name, place, tensor_size) for place in places - before)
            return own or (resharding is None and self.mesh.local_rank == 0 and self.engine.shared_file(name))

        damage = ""
        try:
            download_checkpoint(self.store, prefix, manifest, self._folder, wanted, self.heartbeat)
        except CheckpointError as error:
            damage = str(error)
        dist.all_gather_object(everyones, damage)
        return next(filter(None, everyones), "")

    def _load(self, manifest: Manifest, resharding: Resharding | None) -> None:
        key = manifest.name
        if resharding:
            logger.info(
                "checkpoint of step %d was written by %s, and is read as %s",
                manifest.step,
                resharding.saved,
                self._layout,
            )
            self.engine.load_resharded(self._folder, key, manifest.step, resharding)
        else:
            self.engine.load_state(self._folder, key)

    def _resharding(self, manifest: Manifest) -> Resharding | None:
        """How to read a checkpoint of another layout; None: it has this one."""
        saved = Layout.of_manifest(manifest.layout, self.config.model)
        return None if saved == self._layout else Resharding(self.config.model, saved, self._layout, self._place)

    @property
    def _folder(self) -> Path:
        return local_checkpoints(self.config, self.job.output)
