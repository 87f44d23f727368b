"""What each stage's result depends on, and so what makes it run again."""

from __future__ import annotations

from neox_core.config import RunConfig
from neox_core.errors import ConfigError
from tasks.stage import StageSpec, digest_cache
from tasks.tokenize import input_digests

# How the result is computed, seen or kept, but not what it is: these may change between a stop and a resume.
_TRAIN_NOT_LOGICAL = {
    "micro_batch_size",
    "activation_checkpointing",
    "log_interval",
    "checkpoint_interval",
    "validation",
}


def prepare_spec(config: RunConfig) -> StageSpec:
    """Token datasets depend on the text, the tokenizer and the end-of-document id; not on weights or steps."""
    logical = {
        "end_of_document": config.tokenizer.end_of_document,
        "sources": sorted(config.data.sources),
        "eval_sources": sorted(config.data.validation_sources),
    }
    return StageSpec("prepare-data", config, logical, input_digests(config, digest_cache(config)))


def convert_spec(config: RunConfig) -> StageSpec:
    """Shards depend on the base weights, the architecture and the layout."""
    logical = {
        "model": config.model.model_dump(mode="json"),
        "parallel": config.parallel.model_dump(mode="json"),
        "base_rope_theta": config.base_model.rope_theta,
    }
    return StageSpec("convert", config, logical, _base_digests(config))


def train_spec(config: RunConfig) -> StageSpec:
    """Training depends on the shards, the token datasets, the mixture and the recipe."""
    logical = {
        "seed": config.seed,
        "train": config.train.model_dump(mode="json", exclude=_TRAIN_NOT_LOGICAL),
        "weights": {name: source.weight for name, source in config.data.sources.items()},
    }
    inputs = {"prepare-data": prepare_spec(config).fingerprint, "convert": convert_spec(config).fingerprint}
    return StageSpec("train", config, logical, inputs)


def evaluate_spec(config: RunConfig) -> StageSpec:
    """Evaluations depend on the training, and on how much of which validation split is read."""
    logical = {
        "max_sequences": config.evaluate.max_sequences,
        "checkpoint_interval": config.train.checkpoint_interval,
    }
    return StageSpec("evaluate", config, logical, {"train": train_spec(config).fingerprint})


def export_spec(config: RunConfig) -> StageSpec:
    """The exported model depends on the training and the tokenizer's file."""
    tokenizer = digest_cache(config).digest(config.tokenizer.model)
    return StageSpec("export", config, {}, {"train": train_spec(config).fingerprint, "tokenizer": tokenizer})


def _base_digests(config: RunConfig) -> dict[str, str]:
    """SHA-256 of each file of the base weights; a toy's weights are made here if they are missing."""
    folder = config.base_model.path
    if not (folder / "params.json").is_file():
        if config.base_model.random_seed is None:
            raise ConfigError(
                f"base_model.path {folder} holds no params.json: give the folder of Meta's weights "
                "(params.json and consolidated.NN.pth)"
            )
        from neox_core.checkpoint.toy_base import make_random_base

        make_random_base(config.model, folder, config.base_model.random_seed)
    paths = sorted([folder / "params.json", *folder.glob("consolidated.*.pth")])
    digests = digest_cache(config).digests(paths)
    return {path.name: digest for path, digest in zip(paths, digests, strict=True)}
