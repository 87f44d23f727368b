"""What each stage's result depends on, and so what makes it run again.

Only the first two stages look at raw inputs. The others depend on fingerprints, which flow down from them.
"""

from __future__ import annotations

from typing import Any, Literal

from neox_core.config import VALIDATION, RunConfig
from neox_core.errors import ConfigError
from neox_core.train.identity import shards_logic, training_inputs, training_logic
from tasks.harness.catalogue import set_files
from tasks.identity.base import base_digests
from tasks.identity.stage import StageSpec, digest_cache
from tasks.tokenization.tokenize import input_digests

STAGES = ("prepare-data", "convert", "train", "evaluate", "export")
"""In their order."""
StageName = Literal["prepare-data", "convert", "train", "evaluate", "export"]
PREPARE_DATA, CONVERT, TRAIN, EVALUATE, EXPORT = STAGES
_DATA_NEWER = ("near_duplicates", "deduplicate_across", "drop_validation_duplicates")
"""Settings that older artifacts lack: named where they are used, so that those keep their identity."""
_DATA_LOGICAL = ("text_key", "max_rejected", "skip_damaged_files", "deduplicate", "overlap_words", "decontaminate")


def stages_between(first: str, last: str) -> tuple[str, ...]:
    """The stages from one to another, both included.

    Raises:
        ConfigError: they are in the wrong order.
    """
    start, stop = STAGES.index(first), STAGES.index(last)
    if start > stop:
        raise ConfigError(f"stop_after {last} comes before start_at {first}: the order is {', '.join(STAGES)}")
    return STAGES[start : stop + 1]


def prepare_logic(config: RunConfig) -> dict[str, Any]:
    """The config values that change token datasets."""
    return {
        "end_of_document": config.tokenizer.end_of_document,
        "begin_of_document": config.tokenizer.begin_of_document,
        "sources": sorted(config.data.sources),
        "eval_sources": sorted(config.data.validation_sources),
        **{name: getattr(config.data, name) for name in _DATA_LOGICAL},
        **{name: value for name in _DATA_NEWER if (value := getattr(config.data, name))},
        **({"overlap_min_words": config.data.overlap_min_words} if config.data.evaluation_sets else {}),
    }


def convert_logic(config: RunConfig) -> dict[str, Any]:
    """The config values that change shards."""
    sections = config.model_dump(mode="json", include={"model", "base_model", "parallel"})
    parallel = {key: sections["parallel"][key] for key in ("tensor", "pipeline")}
    return shards_logic(sections["model"], sections["base_model"], parallel)


def prepare_spec(config: RunConfig) -> StageSpec:
    """Token datasets depend on the text, the tokenizer, the end-of-document id and what is left out; not on weights,
    steps, workers or the engine that encodes.

    Raises:
        DataError, ConfigError, StorageError: see `input_digests`.
    """
    inputs = input_digests(config, digest_cache(config.workdir))
    return StageSpec(PREPARE_DATA, config, prepare_logic(config), inputs)


def convert_spec(config: RunConfig) -> StageSpec:
    """Shards depend on the base weights, the architecture and the layout.

    Raises:
        ConfigError, StorageError: see `base_digests`.
    """
    return StageSpec(CONVERT, config, convert_logic(config), base_digests(config))


def train_spec(config: RunConfig, data: str, weights: str) -> StageSpec:
    """Training depends on the token datasets (their fingerprint), the base weights (their identity, in any layout),
    the mixture and the recipe."""
    return StageSpec(TRAIN, config, training_logic(config), training_inputs(data, weights))


def evaluate_spec(config: RunConfig, training: str) -> StageSpec:
    """Evaluations depend on the training (its fingerprint), on how much of which validation split is read, and on the
    evaluation sets."""
    logical: dict[str, Any] = {
        "max_sequences": config.evaluate.max_sequences,
        "checkpoint_interval": config.train.checkpoint_interval,
    }
    tasks = config.evaluate.tasks
    if tasks:
        logical["tasks"] = {
            name: task.model_dump(mode="json", exclude={"items", "shots_from"}) for name, task in tasks.items()
        }
    if generate := config.evaluate.generate:
        logical["generate"] = generate.model_dump(mode="json", exclude={"data", "batch_size"})
    return StageSpec(EVALUATE, config, logical, {TRAIN: training} | _item_digests(config))


def _item_digests(config: RunConfig) -> dict[str, str]:
    """Digests of the evaluation sets' files that are there; preflight looks for the others."""
    paths = {
        f"evaluate.tasks.{name}.{key}": path
        for name, task in config.evaluate.tasks.items()
        for key, path in (("items", task.items), ("shots_from", task.shots_from))
        if path is not None and path.is_file()
    }
    if generate := config.evaluate.generate:
        paths |= {f"evaluate.generate.{path.name}": path for path in set_files(generate) if path.is_file()}
    digests = digest_cache(config.workdir).digests(paths.values()) if paths else []
    return dict(zip(paths, digests, strict=True))


def export_spec(config: RunConfig, training: str) -> StageSpec:
    """The exported model depends on the training (its fingerprint), and through it on the tokenizer; the best one by a
    score on the evaluation too."""
    if config.export.checkpoint == "last":
        return StageSpec(EXPORT, config, {}, {TRAIN: training})
    best_by = config.checkpoints.best_by
    scored = {} if best_by == VALIDATION else {EVALUATE: evaluate_spec(config, training).fingerprint}
    return StageSpec(EXPORT, config, {"best_by": best_by}, {TRAIN: training} | scored)
