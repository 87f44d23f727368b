"""Combinations that no other test names: drawn, trained, saved and gone on with elsewhere, as a plain loop trains them.

Four trainings for each seed; more seeds with `pytest -m slow`. A failure names what was drawn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neox_core.checkpoint.conversion.convert import convert, open_source
from neox_core.config import ModelConfig, ParallelConfig, RunConfig, batch_geometry
from tests.distributed import run_ranks
from tests.neox_core.checkpoint.conversion.test_families import CASES, write_model
from tests.neox_core.train import plain_training
from tests.neox_core.train.engine.test_resharding import SAVED, Degrees, Run
from tests.neox_core.train.small_training import BATCH, SEQUENCE, config_for, rank_batches, tokens

RANKS, TRAININGS = 4, 4
LAYOUTS: list[Degrees] = [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]
GOES_ON = 2
RATE = 1e-4
"""Adam's first updates of gradients near 0 depend on their rounding: small, so that this does not grow."""
FAMILIES = [name for name in CASES if not name.endswith(("7:1", "7:1, wide heads", "short window"))]
"""Those whose heads four ranks can share; a window shorter than a sequence is refused."""


@dataclass(frozen=True)
class Drawn:
    """A training: its model, how it is trained in a layout, and in which it goes on."""

    family: str
    model: dict[str, Any]
    train: dict[str, Any]
    parallel: dict[str, Any]
    in_products: bool
    layouts: tuple[Degrees, Degrees]

    def config(self, model: ModelConfig, degrees: Degrees) -> RunConfig:
        """In a layout."""
        settings = self.parallel if degrees[1] > 1 else self.parallel | {"pipeline_schedule": "1f1b"}
        parallel = ParallelConfig.model_validate({"tensor": degrees[0], "pipeline": degrees[1]} | settings)
        config = config_for("gqa", *degrees, **self.train)
        return config.model_copy(update={"model": model, "parallel": parallel})


Training = tuple[Drawn, ModelConfig, Path]
"""What was drawn, its base's model, and a folder with its shards and its state."""


def draw(generator: random.Random) -> Drawn:
    choose = generator.choice
    family = choose(FAMILIES)
    model = dict(CASES[family])
    heads = model.get("num_attention_heads", 8)
    model["num_key_value_heads"] = choose([number for number in (1, 2, 4) if heads % number == 0])
    model["intermediate_size"] = choose([64, 96, 160])
    if "smollm3" not in family:  # whose layers with and without positions are listed
        model |= {"num_hidden_layers": choose([4, 5]), "tie_word_embeddings": choose([False, True])}
    first, second = generator.sample(LAYOUTS, 2)
    return Drawn(
        family,
        model,
        {
            "activation_checkpointing": choose(["none", "selective", "full"]),
            "loss_chunk_tokens": choose([7, 24, 1000]),
            "mask_documents": choose([False, True]),
        },
        {"sequence": choose([True, False]), "pipeline_schedule": choose(["1f1b", "zb-h1"])},
        choose([False, True]),
        (first, second),
    )


def lengths(step: int) -> list[list[int]]:
    """Of the documents in each sequence of a step's batch."""
    generator = random.Random(step)
    cuts = [sorted(generator.sample(range(1, SEQUENCE), 3)) for _ in range(BATCH)]
    return [np.diff([0, *row, SEQUENCE]).tolist() for row in cuts]


def steps(run: Run, in_products: bool, first: int, count: int) -> list[tuple[float, float]]:
    """Losses and gradient norms."""
    from neox_core.train.engine.deepspeed_engine import accumulate_in_products

    engine = run.engine
    if in_products:
        accumulate_in_products(engine, batch_geometry(run.config))
    masks = run.config.train.mask_documents
    data, found = rank_batches(run.config, run.mesh.data_rank, first, lengths if masks else None), []
    for _ in range(count):
        engine.set_learning_rate(RATE)
        found.append((float(engine.train_batch(data)), float(engine.get_global_grad_norm())))
    return found


def train_rank(trainings: list[Training]) -> list[list[tuple[float, float]]]:
    """One rank: each training's steps, up to its save and on from it in the other layout."""
    found = []
    for drawn, model, folder in trainings:
        configs, (before, after) = partial(drawn.config, model), drawn.layouts
        run = Run(configs, before, folder / "shards")
        rows = steps(run, drawn.in_products, 1, SAVED)
        run.save(folder / "state")
        run = Run(configs, after, None).load(folder / "state", before)
        found.append(rows + steps(run, drawn.in_products, SAVED + 1, GOES_ON))
    return found


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 40))])
def test_any_combination_trains_as_a_plain_loop(seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    trainings, expected = [], []
    for number in range(TRAININGS):
        drawn, folder = draw(generator), tmp_path / str(number)
        write_model(folder / "base", **drawn.model)
        model = open_source(folder / "base").model
        tensor, pipeline, _ = drawn.layouts[0]
        convert(folder / "base", folder / "shards", model, ParallelConfig(tensor=tensor, pipeline=pipeline))
        trainings.append((drawn, model, folder))
        batches = (
            (torch.from_numpy(tokens(step)), lengths(step) if drawn.train["mask_documents"] else None)
            for step in range(1, SAVED + GOES_ON + 1)
        )
        expected.append(plain_training.train(folder / "base", RATE, batches))
    for rank in run_ranks(train_rank, RANKS, trainings):
        for (drawn, *_), found, plain in zip(trainings, rank, expected, strict=True):
            np.testing.assert_allclose(found, plain, rtol=1e-5, err_msg=str(drawn))
