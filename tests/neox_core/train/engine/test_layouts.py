"""Every layout computes the same model and the same training as transformers in a plain loop."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.reference import llama_from_meta
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import RunConfig, batch_geometry
from tests.distributed import run_ranks
from tests.golden.losses import GOLDEN, PRECISIONS
from tests.golden.losses import LAYOUTS as GOLDEN_LAYOUTS
from tests.neox_core.train import plain_training
from tests.neox_core.train.small_training import BATCH, MODELS, SEQUENCE, STEPS, config_for, rank_batches, tokens

RECOMPUTE = {(1, 1): "none", (2, 1): "selective", (1, 2): "full", (2, 2): "selective", (4, 1): "full"}
"""Activation checkpointing by tensor and pipeline parallelism: it changes nothing."""
FEW_STEPS = 6
"""Of all but a layout's first training in fp32 and the golden ones: another way to the same gradients shows at once."""
BF16_LAYOUTS = [*itertools.product((1, 2), repeat=3), (4, 1, 1)]


GOLDEN_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
"""Processors sum in other orders and have other bf16 products; on one machine the bits are equal (golden/losses.py)."""


class Variant(NamedTuple):
    """How a layout is trained."""

    precision: str
    split: bool
    """Sequence parallelism."""
    in_products: bool = False
    """Matrix products add the weights' gradients to the buffers, as on GPUs."""

    def steps(self, layout: tuple[int, int, int]) -> int:
        """How many are trained."""
        first = self.split == (layout[0] > 1) and not self.in_products
        return STEPS if first and (self.precision == "fp32" or layout in GOLDEN_LAYOUTS) else FEW_STEPS


def train_rank(configs: dict[Variant, RunConfig], shards: Path) -> dict[Variant, dict[str, Any]]:
    """One rank: the training of each configuration, which have the same shards."""
    from neox_core.parallel.ranks.mesh import build_mesh, init_distributed

    device = init_distributed(next(iter(configs.values())).launch)
    return {
        variant: train_once(config, build_mesh(config.parallel, device), shards, variant)
        for variant, config in configs.items()
    }


def train_once(config: RunConfig, mesh: Any, shards: Path, variant: Variant) -> dict[str, Any]:
    """Logits before training, then the losses and gradient norms of its steps."""
    from neox_core.train.engine.deepspeed_engine import accumulate_in_products, build_engine
    from neox_core.train.schedule import learning_rate

    engine = build_engine(config, mesh, batch_geometry(config), NeoxCheckpoint(shards).layer)
    if variant.in_products:
        accumulate_in_products(engine, batch_geometry(config))
    _, hidden = engine.eval_batch(rank_batches(config, mesh.data_rank), return_logits=True)
    with torch.no_grad():
        logits = None if hidden is None else engine.module.loss_fn.project(hidden)
    batches = rank_batches(config, mesh.data_rank)
    losses, norms = [], []
    steps = variant.steps((mesh.tensor_size, mesh.pipeline_size, mesh.data_size))
    for step in range(1, steps + 1):
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train)
        losses.append(float(engine.train_batch(batches)))
        norms.append(float(engine.get_global_grad_norm()))
    engine.finish_step()
    return {
        "losses": losses,
        "norms": norms,
        "logits": None if logits is None else logits.float().numpy(),
        "place": (mesh.pipeline_rank, mesh.data_rank, mesh.tensor_rank),
        "weights": {name: p.detach().float().numpy() for name, p in engine.module.named_parameters()},
    }


def plain_loop(model: str, base: Path) -> dict[str, Any]:
    """The same training with transformers' model and nothing of ours but the weights' file."""
    torch.manual_seed(0)
    config = config_for(model, 1, 1, 1)
    llama = llama_from_meta(base, MODELS[model], SEQUENCE)
    parameters = list(llama.parameters())
    optimizer = plain_training.adamw(parameters, 1.0)
    ids = torch.from_numpy(tokens(1))[:, :-1]
    with torch.no_grad():
        logits = llama(ids).logits.numpy()
    losses, norms = [], []
    peak, warmup, floor = config.train.optimizer.lr, 5, 0.033
    for step in range(1, STEPS + 1):
        rate = peak * step / warmup
        if step > warmup:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))
            rate = peak * (floor + (1 - floor) * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, norm = plain_training.step(llama, optimizer, torch.from_numpy(tokens(step)))
        losses.append(loss)
        norms.append(norm)
    return {"losses": losses, "norms": norms, "logits": logits}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Per model: the folder of its base weights, and what the plain loop makes of them."""
    made = {}
    for name, model in MODELS.items():
        folder = tmp_path_factory.mktemp(f"base-{name}")
        make_random_base(model, folder, seed=7)
        made[name] = folder, plain_loop(name, folder)
    return made


# Data parallelism does not depend on the kind of attention: GQA alone covers it.
LAYOUTS = [("gqa", *layout) for layout in itertools.product((1, 2), repeat=3)]
LAYOUTS += [("mha", *layout, 1) for layout in itertools.product((1, 2), repeat=2)]
LAYOUTS += [("gqa", 4, 1, 1)]  # in pairs, four ranks have the same of two KV heads


def variants(model: str, layout: tuple[int, ...]) -> dict[Variant, RunConfig]:
    """The trainings of a layout."""
    bf16 = model == "gqa" and layout in BF16_LAYOUTS
    splits = ((True, False) if model == "gqa" else (True,)) if layout[0] > 1 else (False,)
    wanted = [Variant("fp32", split) for split in splits] + [Variant("bf16", split) for split in splits if bf16]
    configs = {}
    for variant in (*wanted, Variant("fp32", splits[0], in_products=True)):
        recompute = RECOMPUTE[layout[:2]]
        config = config_for(model, *layout, precision=variant.precision, activation_checkpointing=recompute)
        parallel = config.parallel.model_copy(update={"sequence": variant.split})
        configs[variant] = config.model_copy(update={"parallel": parallel})
    return configs


Train = Callable[..., list[dict[str, Any]]]
"""(model, tensor, pipeline, data, precision, split, in_products) -> what each rank returned."""


@pytest.fixture(scope="module")
def train(references: dict[str, tuple[Path, dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains a layout when it is first asked for, in all variants that are tested."""
    done: dict[Any, list[dict[str, Any]]] = {}

    def results(
        model: str, *layout: int, precision: str = "fp32", split: bool | None = None, in_products: bool = False
    ) -> list[dict[str, Any]]:
        wanted = Variant(precision, layout[0] > 1 if split is None else split, in_products)
        if (model, layout) not in done:
            configs = variants(model, layout)
            shards = tmp_path_factory.mktemp("shards")
            convert(references[model][0], shards, MODELS[model], configs[wanted].parallel)
            done[model, layout] = run_ranks(train_rank, math.prod(layout), configs, shards)
        return [rank[wanted] for rank in done[model, layout]]

    return results


@pytest.mark.parametrize(("model", "tensor", "pipeline", "data"), LAYOUTS)
def test_layout_equals_plain_loop(
    references: dict[str, tuple[Path, dict[str, Any]]], train: Train, model: str, tensor: int, pipeline: int, data: int
) -> None:
    expected = references[model][1]
    ranks = train(model, tensor, pipeline, data)
    for rank in (*ranks, *train(model, tensor, pipeline, data, in_products=True)):
        steps = len(rank["losses"])
        np.testing.assert_allclose(rank["losses"], expected["losses"][:steps], rtol=1e-5)
        np.testing.assert_allclose(rank["norms"], expected["norms"][:steps], rtol=1e-5)
    # The first data-parallel rank's logits of its last micro batch, put together from tensor-parallel ranks.
    last = sorted((r for r in ranks if r["place"][:2] == (pipeline - 1, 0)), key=lambda r: r["place"][2])
    logits = np.concatenate([rank["logits"] for rank in last], axis=-1)
    rows = slice(BATCH - 2 * data, BATCH - 2 * data + 2)
    np.testing.assert_allclose(logits, expected["logits"][rows], atol=1e-4)


@pytest.mark.parametrize("layout", [layout for model, *layout in LAYOUTS if model == "gqa" and layout[0] > 1])
def test_splitting_the_tokens_changes_nothing(train: Train, layout: list[int]) -> None:
    for split, whole in zip(train("gqa", *layout), train("gqa", *layout, split=False), strict=True):
        np.testing.assert_allclose(split["losses"][:FEW_STEPS], whole["losses"], rtol=1e-5)
        np.testing.assert_allclose(split["norms"][:FEW_STEPS], whole["norms"], rtol=1e-5)


@pytest.mark.parametrize("layout", [layout for layout in BF16_LAYOUTS if layout[0] > 1])
def test_splitting_the_tokens_in_bf16(train: Train, layout: tuple[int, int, int]) -> None:
    split, whole = (train("gqa", *layout, precision="bf16", split=kind) for kind in (True, False))
    for one, other in zip(split, whole, strict=True):
        np.testing.assert_allclose(one["losses"][:FEW_STEPS], other["losses"], rtol=1e-2)
        np.testing.assert_allclose(one["norms"][:FEW_STEPS], other["norms"], rtol=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replicated_weights_stay_the_same(train: Train, precision: str) -> None:
    """Four ranks have all norms and, in pairs, the same KV head of width 8, at 2 query heads' rows of 8 + 4 + 4."""
    ranks = [rank["weights"] for rank in train("gqa", 4, 1, 1, precision=precision)]
    for name, weight in ranks[0].items():
        others = [rank[name] for rank in ranks[1:]]
        if weight.ndim == 1:
            assert all(np.array_equal(weight, other) for other in others), name
            assert not (weight == 1).all()
        elif "query_key_value" in name:
            heads = [rank[name].reshape(2, 16, -1) for rank in ranks]
            for first, second in ((0, 1), (2, 3)):
                assert np.array_equal(heads[first][:, 8:], heads[second][:, 8:]), name
                assert not np.array_equal(heads[first][:, :8], heads[second][:, :8]), name
            assert not np.array_equal(heads[0][:, 8:], heads[2][:, 8:]), name


@pytest.mark.parametrize("layout", BF16_LAYOUTS)
def test_bf16_layouts_agree(
    references: dict[str, tuple[Path, dict[str, Any]]], train: Train, layout: tuple[int, int, int]
) -> None:
    """bf16 rounds differently in each layout, but no layout may lose more than the others."""
    one_rank = train("gqa", 1, 1, 1, precision="bf16")[0]
    for rank in train("gqa", *layout, precision="bf16"):
        steps = len(rank["losses"])
        np.testing.assert_allclose(rank["losses"], one_rank["losses"][:steps], rtol=1e-2)
        np.testing.assert_allclose(rank["norms"], one_rank["norms"][:steps], rtol=1e-2)
        np.testing.assert_allclose(rank["losses"], references["gqa"][1]["losses"][:steps], rtol=1e-2)
        assert rank["losses"] != references["gqa"][1]["losses"][:steps]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", GOLDEN_LAYOUTS)
def test_losses_are_golden(train: Train, layout: tuple[int, int, int], precision: str) -> None:
    golden = json.loads(GOLDEN.read_text())["x".join(map(str, layout)) + f" {precision}"]
    found = train("gqa", *layout, precision=precision)[0]
    for key in ("losses", "norms"):
        np.testing.assert_allclose(found[key], golden[key], rtol=GOLDEN_TOLERANCE[precision])
