"""Pipeline stages of equal time, against all the ways there are to cut the layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from neox_core.config import RunConfig, load_config
from neox_core.model import FinalNorm, ModelDimensions, OutputHead, TokenEmbedding, TransformerBlock
from neox_core.parallel.build import layer_types
from neox_core.parallel.stages import balance, pipeline_layers, stage_bounds, stage_costs
from neox_core.planning.plan import plan
from tests.paths import CONFIGS


def load(name: str, **parallel: object) -> RunConfig:
    config = load_config(CONFIGS / f"{name}.yml")
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})


@pytest.mark.parametrize("head", [0.0, 0.38, 1.0, 2.4, 30.0])
@pytest.mark.parametrize(("layers", "stages"), [(1, 1), (4, 2), (9, 4), (11, 3), (12, 5), (6, 6)])
def test_no_way_to_cut_is_faster(layers: int, stages: int, head: float) -> None:
    found = balance(layers, stages, head)
    cuts = itertools.combinations(range(1, layers), stages - 1)
    ways = [[stop - start for start, stop in itertools.pairwise((0, *cut, layers))] for cut in cuts]
    assert list(found) in ways

    def slowest(way: list[int]) -> float:
        return max(*way[:-1], way[-1] + head) if stages > 1 else layers + head

    assert slowest(list(found)) == min(slowest(way) for way in ways)
    assert sorted(found[:-1]) == list(found[:-1]), "earlier stages keep more micro batches"


def test_stages_cover_all_layers_and_keep_norm_and_head_together() -> None:
    config = load("llemma_34b", pipeline=5)
    bounds, types = stage_bounds(config), layer_types(48)
    stages = [[kind for kind in types[start:stop] if kind] for start, stop in itertools.pairwise(bounds)]
    assert (bounds[0], bounds[-1]) == (0, len(types))
    assert [stage.count(TransformerBlock) for stage in stages] == list(pipeline_layers(config)) == [9, 10, 10, 10, 9]
    assert stages[0][0] is TokenEmbedding
    assert stages[-1][-2:] == [FinalNorm, OutputHead]
    assert stage_bounds(load("llemma_34b", pipeline=1)) == [0, len(types)]


@pytest.mark.parametrize("name", ["llemma_7b", "llemma_34b"])
def test_the_head_costs_what_torch_counts(name: str) -> None:
    config = load(name, pipeline=2)
    model, length = config.model, config.train.sequence_length
    dims = ModelDimensions.of(model, length)

    def flops(layer: torch.nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            layer.to("meta")(torch.empty(1, length, model.hidden_size, device="meta"))
        return counter.get_total_flops()

    with torch.device("meta"):
        block, head = flops(TransformerBlock(dims)), flops(OutputHead(dims))
    # Torch counts all of the attention's scores, of which a causal kernel computes half.
    block -= 2 * length * length * model.hidden_size
    assert stage_costs(config)[-1] == pytest.approx(pipeline_layers(config)[-1] + head / block, rel=1e-6)


def test_the_plan_shows_stages_and_the_config_decides() -> None:
    config = load("llemma_34b", pipeline=4, pipeline_layers=(13, 13, 12, 10))
    assert stage_bounds(config) == [0, 15, 28, 40, 53]
    rows = dict(plan(config).rows())
    assert rows["layers per stage"] == "13 + 13 + 12 + 10; the slowest stage takes 1.08 times the mean"
    assert "layers per stage" not in dict(plan(load("llemma_34b")).rows())
