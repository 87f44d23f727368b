"""Automatic activation checkpointing: the least work that fits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from neox_core.config import ActivationCheckpointing, RunConfig, batch_geometry, load_config
from neox_core.planning.activation_checkpointing import describe_modes, layer_modes
from neox_core.planning.memory import stage_layers, stage_memory
from neox_core.planning.plan import plan
from tests.paths import CONFIGS

CONFIG = load_config(CONFIGS / "llemma_34b.yml")
GIB = 2**30


def with_mode(mode: str, pipeline: int = 1) -> RunConfig:
    return CONFIG.model_copy(
        update={
            "train": CONFIG.train.model_copy(update={"activation_checkpointing": mode}),
            "parallel": CONFIG.parallel.model_copy(update={"pipeline": pipeline}),
        }
    )


@pytest.mark.parametrize("pipeline", [1, 4])
def test_more_memory_means_less_work(pipeline: int) -> None:
    """From all full to none; each choice fits, and one step less work would not."""
    config = with_mode("auto", pipeline)
    geometry = batch_geometry(config)
    seen = []
    for stage in range(pipeline):
        for available in range(8, 160, 4):
            modes = layer_modes(config, geometry, stage, available * GIB)
            needed = stage_memory(config, geometry, stage, modes).total
            if needed > available * GIB:
                assert set(modes) == {"full"}, "nothing fits"
            order = [("none", "selective", "full").index(mode) for mode in modes]
            assert order == sorted(order)
            for at, mode in enumerate(modes):
                better = {"full": "selective", "selective": "none"}.get(mode)
                if better and needed <= available * GIB:
                    changed = (*modes[:at], better, *modes[at + 1 :])
                    assert stage_memory(config, geometry, stage, changed).total > available * GIB
            seen.append(frozenset(modes))
    assert {frozenset({"full"}), frozenset({"none"})} < set(seen)
    assert any(len(modes) > 1 for modes in seen)


def test_where_weights_gradients_wait_a_mixture_can_fit_alone() -> None:
    """The last layers keep little as the loss needs most, and what the first compute again does not come on top of all
    that waits."""
    config = load_config(CONFIGS / "llama3_8b.yml")
    train = {
        "activation_checkpointing": "auto",
        "micro_batch_size": 2,
        "sequence_length": 4096,
        "loss_chunk_tokens": 8192,
    }
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"vocab_size": 2**18}),
            "train": config.train.model_copy(update=train),
            "parallel": config.parallel.model_copy(update={"tensor": 1, "pipeline": 2, "pipeline_schedule": "zb-h1"}),
        }
    )
    geometry = batch_geometry(config)

    def needed(modes: Sequence[ActivationCheckpointing]) -> float:
        return stage_memory(config, geometry, 1, modes).total

    pure: list[ActivationCheckpointing] = ["none", "selective", "full"]
    available = min(needed((mode,) * stage_layers(config, 1)) for mode in pure) - 2**20
    modes = layer_modes(config, geometry, 1, available)
    assert len(set(modes)) > 1
    assert needed(modes) <= available
    assert set(layer_modes(config, geometry, 1, available / 2)) == {"full"}, "nothing fits"


def test_fixed_modes_and_no_limit() -> None:
    geometry = batch_geometry(CONFIG)
    assert set(layer_modes(with_mode("selective"), geometry, 0, 0.0)) == {"selective"}
    assert set(layer_modes(with_mode("auto"), geometry, 0, None)) == {"none"}
    assert describe_modes(("none", "none", "full")) == "none in 2, full in 1 layers"


def test_the_plan_fills_the_gpu() -> None:
    """On 80 GB all is kept; on 40 GB as much as fits in them; below, all is computed again."""
    config = with_mode("auto")
    ample, enough, little = (plan(config, gpu_memory_gib=size) for size in (128, 40, 20))
    assert ample.stages[0].activation_checkpointing == "none in 48 layers"
    assert 0 <= enough.spare < 0.5 * GIB
    assert little.stages[0].activation_checkpointing == "full in 48 layers"
    assert little.spare < 0
