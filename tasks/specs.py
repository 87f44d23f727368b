"""What each stage's result depends on, and so what makes it run again."""

from __future__ import annotations

from neox_core.config import ModelConfig, RunConfig
from neox_core.errors import CheckpointError, ConfigError
from neox_core.storage.folders import Location
from neox_core.train.identity import training_inputs, training_logic
from tasks.stage import StageSpec, digest_cache
from tasks.tokenization.tokenize import input_digests

_DATA_LOGICAL = ("text_key", "max_rejected", "skip_damaged_files", "deduplicate", "overlap_words", "decontaminate")


def prepare_spec(config: RunConfig) -> StageSpec:
    """Token datasets depend on the text, the tokenizer, the end-of-document id and what is left out; not on weights,
    steps, workers or the engine that encodes."""
    logical = {
        "end_of_document": config.tokenizer.end_of_document,
        "begin_of_document": config.tokenizer.begin_of_document,
        "sources": sorted(config.data.sources),
        "eval_sources": sorted(config.data.validation_sources),
        **{name: getattr(config.data, name) for name in _DATA_LOGICAL},
    }
    return StageSpec("prepare-data", config, logical, input_digests(config, digest_cache(config)))


def convert_spec(config: RunConfig) -> StageSpec:
    """Shards depend on the base weights, the architecture and the layout."""
    logical = {
        "model": config.model.model_dump(mode="json"),
        "parallel": config.parallel.model_dump(mode="json", include={"tensor", "pipeline"}),
        "base_rope_theta": config.base_model.rope_theta,
        "base_vocab_size": config.base_model.vocab_size,
        "new_tokens": config.base_model.new_tokens,
    }
    return StageSpec("convert", config, logical, _base_digests(config))


def train_spec(config: RunConfig) -> StageSpec:
    """Training depends on the shards, the token datasets, the mixture and the recipe."""
    inputs = training_inputs(prepare_spec(config).fingerprint, convert_spec(config).fingerprint)
    return StageSpec("train", config, training_logic(config), inputs)


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
    """What tells the content of each file of the base weights: SHA-256, or an S3 object's ETag and size, hashed.

    A toy's weights are made here if they are missing.
    """
    folder = config.base_model.path
    if isinstance(folder, str):
        return _remote_digests(folder, config)
    meta, huggingface = folder / "params.json", folder / "config.json"
    if not meta.is_file() and not huggingface.is_file():
        if config.base_model.random_seed is None:
            raise ConfigError(
                f"base_model.path {folder} holds no params.json: give the folder of Meta's weights "
                "(params.json and consolidated.NN.pth) or Hugging Face's (config.json and safetensors)"
            )
        from neox_core.checkpoint.conversion.toy_base import make_random_base

        make_random_base(_base_architecture(config), folder, config.base_model.random_seed)
    paths = [folder / name for name in sorted(_base_files(folder))]
    digests = digest_cache(config).digests(paths)
    return {path.name: digest for path, digest in zip(paths, digests, strict=True)}


def _base_files(folder: Location) -> tuple[str, ...]:
    """The files of the base model: those that the conversion reads, and no others that lie beside them."""
    from neox_core.checkpoint.formats.model_files import model_files
    from neox_core.storage.folders import open_folder

    try:
        return model_files(open_folder(folder)).names
    except CheckpointError as error:
        raise ConfigError(f"base_model.path: {error}") from None


def _remote_digests(url: str, config: RunConfig) -> dict[str, str]:
    from neox_core.storage.folders import file_versions, open_folder

    folder = open_folder(url, config.storage)
    return file_versions(folder, _base_files(folder))


def _base_architecture(config: RunConfig) -> ModelConfig:
    """The model before the run changes its RoPE base or its vocabulary."""
    base, model = config.base_model, config.model
    return model.model_copy(
        update={
            "rope_theta": base.rope_theta or model.rope_theta,
            "vocab_size": base.vocab_size or model.num_tokens,
            "unpadded_vocab_size": None,
        }
    )
