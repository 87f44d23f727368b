"""What makes two trainings the same, so that one may resume the other's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neox_core.artifact import Artifact, fingerprint
from neox_core.config import RunConfig, SourceAmount
from neox_core.data.order_version import data_order

# How the result is computed, seen or kept, but not what it is: these may change between a stop and a resume.
NOT_LOGICAL = {
    "micro_batch_size",
    "activation_checkpointing",
    "memory_gib",
    "loss_chunk_tokens",
    "attention",
    "master_weights",
    "dry_run",
    "cuda_graphs",
    "log_interval",
    "profile",
    "checkpoint_interval",
    "validation",
    "extends",  # what it goes on from is what it would have been at that step
    # A training that stopped at an incident goes on with another policy; what it then did is in its checkpoints.
    "guard",
}


def training_logic(config: RunConfig) -> dict[str, Any]:
    """The config values that change what is trained, and the version of the data's order, as plain JSON."""
    return {
        "seed": config.seed,
        "data_order": data_order(config),
        "train": config.train.model_dump(mode="json", exclude=NOT_LOGICAL),
        "sources": _amounts(config.data.sources),
        "weight_changes": [
            {"from_step": change.from_step, "sources": _amounts(change.sources)}
            for change in config.data.weight_changes
        ],
    }


def _amounts(sources: Mapping[str, SourceAmount]) -> dict[str, Any]:
    return {name: {key: getattr(source, key) for key in SourceAmount.model_fields} for name, source in sources.items()}


def weights_identity(shards: Artifact) -> str:
    """What convert's artifact holds, in whatever layout: the fingerprint that it has, or would have, for one rank."""
    model, base = shards.config["model"], shards.config["base_model"]
    return fingerprint(shards.name, shards_logic(model, base, {"tensor": 1, "pipeline": 1}), shards.inputs)


def shards_logic(model: Mapping[str, Any], base: Mapping[str, Any], parallel: Mapping[str, int]) -> dict[str, Any]:
    """The config values that change convert's shards, from sections as plain JSON."""
    return {
        "model": model,
        "parallel": parallel,
        "base_rope_theta": base["rope_theta"],
        "base_vocab_size": base["vocab_size"],
        "new_tokens": base["new_tokens"],
    }


def training_inputs(data: str, weights: str) -> dict[str, str]:
    """The inputs of a training by name: prepare-data's fingerprint and the weights' identity (`weights_identity`)."""
    return {"prepare-data": data, "convert": weights}


def training_fingerprint(config: RunConfig, data: str, weights: str) -> str:
    """Identity of the training of `config`: the same for every layout.

    Args:
        data: fingerprint of prepare-data's artifact.
        weights: the base weights', see `weights_identity`.
    """
    return fingerprint("train", training_logic(config), training_inputs(data, weights))
