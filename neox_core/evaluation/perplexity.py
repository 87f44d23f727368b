"""Perplexity of checkpoints on each source's validation split, and their scores on evaluation sets.

Tensor parallel; needs no optimizer and no pipeline.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.checkpoint.manifest import download_checkpoint, list_checkpoints
from neox_core.config import ParallelConfig, RunConfig
from neox_core.data.dataset import validation_positions, validation_windows
from neox_core.errors import CheckpointError
from neox_core.evaluation.task_scores import score_tasks
from neox_core.model import ModelDimensions
from neox_core.parallel.build import LayerWeights, build_layer, layer_types
from neox_core.parallel.layers import ChunkedHead
from neox_core.parallel.loss import IGNORE_INDEX, token_losses
from neox_core.parallel.parallelize import Parallelism
from neox_core.parallel.precision import parameter_dtype
from neox_core.parallel.ranks.mesh import Mesh, build_mesh, init_distributed
from neox_core.storage.object_store import ObjectStore

logger = logging.getLogger(__name__)

BASE_STEP = 0
"""The step that stands for the weights training starts from."""


@dataclass(frozen=True)
class EvaluateJob:
    """What one evaluation job reads."""

    data: Path
    """Folder of token datasets."""
    base_weights: Path
    """Folder of the NeoX shards that training starts from: step 0."""
    prefix: str
    """Key of the training's checkpoints in the store."""
    steps: tuple[int, ...]
    """Checkpoints to evaluate."""
    counts: dict[str, dict[str, int]]
    """Tokens and bytes of each source's validation split."""
    scratch: Path
    """Folder for downloaded weights; emptied afterwards."""


def evaluate_checkpoints(config: RunConfig, job: EvaluateJob) -> list[dict[str, Any]]:
    """Evaluate checkpoints one after the other. Collective over `parallel.tensor` ranks.

    Returns:
        One entry per step: `{"step": ..., "sources": {name: {tokens, bytes, loss, perplexity, bits_per_byte}}}`, with
        the loss in nats per token, and next to the sources `tasks`; see `score_tasks`.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    device = init_distributed(config.launch)
    mesh = build_mesh(ParallelConfig(tensor=config.parallel.tensor, sequence=False), device)
    store = ObjectStore(config.storage)
    results = []
    for step in job.steps:
        folder = job.base_weights if step == BASE_STEP else _download(store, job, step, mesh)
        weights = NeoxCheckpoint(folder).layer_of(config.model, mesh.tensor_size)
        results.append({"step": step} | _evaluate(config, job, weights, mesh))
        dist.barrier()
        if step != BASE_STEP and mesh.local_rank == 0:
            shutil.rmtree(folder)
    dist.destroy_process_group()
    return results


def _download(store: ObjectStore, job: EvaluateJob, step: int, mesh: Mesh) -> Path:
    """Fetch a checkpoint's weights, once per node."""
    manifests = {manifest.step: manifest for manifest in list_checkpoints(store, job.prefix)}
    if step not in manifests:
        raise CheckpointError(
            f"no complete checkpoint of step {step} below {store.url(job.prefix)}: there are {sorted(manifests)}"
        )
    if mesh.local_rank == 0:
        download_checkpoint(store, job.prefix, manifests[step], job.scratch, lambda name: name.startswith("layer_"))
    dist.barrier()
    return job.scratch / manifests[step].name


def _evaluate(config: RunConfig, job: EvaluateJob, weights: LayerWeights, mesh: Mesh) -> dict[str, Any]:
    layers = _build_layers(config, weights, mesh)
    sources = config.data.validation_sources
    perplexities = {source: _evaluate_source(config, job, source, layers, mesh) for source in sources}
    return {"sources": perplexities, "tasks": score_tasks(config, layers, mesh)}


def _build_layers(config: RunConfig, weights: LayerWeights, mesh: Mesh) -> nn.Sequential:
    place = Parallelism(mesh, ModelDimensions.of(config.model, config.train.sequence_length))
    dtype = parameter_dtype(config)
    return nn.Sequential(
        *(
            build_layer(layer_type, index, place, weights, dtype)
            for index, layer_type in enumerate(layer_types(config.model.num_layers))
            if layer_type is not None
        )
    )


@torch.inference_mode()
def _evaluate_source(
    config: RunConfig, job: EvaluateJob, source: str, layers: nn.Sequential, mesh: Mesh
) -> dict[str, float]:
    length, limit = config.train.sequence_length, config.evaluate.max_sequences
    windows = validation_windows(job.data, source, length, limit)
    positions = validation_positions(job.data, source, length, limit) if config.train.mask_documents else None
    total, tokens = 0.0, 0
    head = layers[-1]
    assert isinstance(head, ChunkedHead)
    for inputs, targets in _batches(windows, positions, config.evaluate.micro_batch_size, mesh.device):
        losses = token_losses(head.project(layers(inputs)), targets, mesh.tensor_group, mesh.tensor_rank)
        total += float(losses.double().sum())
        tokens += int((targets != IGNORE_INDEX).sum())
    loss = total / tokens
    counts = job.counts[source]
    result = {
        "tokens": tokens,
        "bytes": counts["bytes"],
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss * counts["tokens"] / counts["bytes"] / math.log(2),
    }
    logger.info("%s: perplexity %.3f over %d tokens", source, result["perplexity"], tokens)
    return result


def perplexity(loss: float) -> float:
    """e to the mean loss; infinite where that is too large for a float, as of a training that has diverged."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _batches(
    windows: np.ndarray, positions: np.ndarray | None, size: int, device: torch.device
) -> Iterator[tuple[Tensor | tuple[Tensor, Tensor], Tensor]]:
    """Inputs and targets [B,T]; a padded position's input is id 0, which causal attention hides from the others."""
    for first in range(0, len(windows), size):
        ids = torch.from_numpy(windows[first : first + size]).to(device)
        inputs, targets = ids[:, :-1].clamp(min=0), ids[:, 1:].contiguous()
        if positions is None:
            yield inputs, targets
        else:
            yield (inputs, torch.from_numpy(positions[first : first + size]).to(device)), targets
