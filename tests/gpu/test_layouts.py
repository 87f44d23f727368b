"""Every layout of all GPUs trains as one GPU does, with and without graphs, overlap and recomputation.

pytest -m multi_gpu tests/gpu
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.config import ParallelConfig
from tests.distributed import run_ranks
from tests.gpu.several import DEVICE, LAYOUTS, MARKS, MODEL, RANKS, Layout, Variant, train

pytestmark = MARKS
ALONE: Layout = (1, 1, 1)
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
Trained = Callable[[Layout], list[dict[Variant, dict[str, Any]]]]
"""What each rank of a layout found."""


def variants(layout: Layout) -> list[Variant]:
    """All that is asked of a layout."""
    if layout == ALONE:
        others = {variant.reference for layout in LAYOUTS for variant in variants(layout)}
        return sorted(others, key=repr)
    found = [
        Variant("fp32", graphs=False, overlap=False),
        Variant("fp32", "full"),
        Variant("fp32", "selective", graphs=False),
        Variant("bf16", graphs=False, overlap=False),
        Variant("bf16"),
        Variant("bf16", "selective"),
        Variant("bf16", "full", overlap=False),
        Variant("bf16", masks=True),
    ]
    if layout[0] > 1:
        found += [
            Variant("fp32", sequence=False),
            Variant("bf16", sequence=False),
            Variant("fp32", kv_heads=layout[0] // 2),  # pairs of ranks have the same
            Variant("bf16", kv_heads=layout[0] // 2),
        ]
    if layout[1] > 1:
        found += [
            Variant("fp32", "selective", graphs=False, schedule="zb-h1"),
            Variant("bf16", schedule="zb-h1"),
            Variant("bf16", "full", overlap=False, schedule="zb-h1"),
            Variant("bf16", masks=True, schedule="zb-h1"),
        ]
    return found


def case(layout: Layout, variant: Variant) -> Any:
    switches = [name for name in ("graphs", "overlap", "sequence", "masks") if getattr(variant, name)]
    values = (*layout, variant.precision, variant.mode, f"kv{variant.kv_heads}", variant.schedule, *switches)
    return pytest.param(layout, variant, id="-".join(map(str, values)))


ALL = [(layout, variant) for layout in LAYOUTS for variant in variants(layout)]
CASES = [case(*pair) for pair in ALL]
SWITCHED = [case(layout, variant) for layout, variant in ALL if variant.reference in variants(layout)]


@pytest.fixture(scope="module")
def asked(request: pytest.FixtureRequest) -> dict[Layout, list[Variant]]:
    """What the chosen tests are about, with what it is compared to: `-k 2-1-1-bf16-none` takes a minute, not ten."""
    found: dict[Layout, set[Variant]] = {layout: set() for layout in [ALONE, *LAYOUTS]}
    for item in request.session.items:
        if item.path != request.path or not isinstance(item, pytest.Function):
            continue
        chosen = getattr(item, "callspec", None)
        layout, variant = (chosen.params.get(name) for name in ("layout", "variant")) if chosen else (None, None)
        variant = variant or Variant("bf16")
        found[layout or ALONE] |= {variant, variant.reference} if layout else {variant.reference}
        found[ALONE].add(variant.reference)
    return {layout: [v for v in variants(layout) if v in chosen] for layout, chosen in found.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, asked: dict[Layout, list[Variant]]) -> Trained:
    """Trains a layout, in all variants that are asked for, when it is first asked for."""
    done: dict[Layout, Any] = {}

    def results(layout: Layout) -> Any:
        if layout not in done:
            done[layout] = AssertionError(f"layout {layout} failed before")
            folder, shards = tmp_path_factory.mktemp("layout"), {}
            parallel = ParallelConfig(tensor=layout[0], pipeline=layout[1])
            for kv_heads in {variant.kv_heads for variant in asked[layout]}:
                model = MODEL.model_copy(update={"num_kv_heads": kv_heads})
                shards[kv_heads] = folder / f"shards {kv_heads}"
                make_random_base(model, folder / f"base {kv_heads}", seed=7)
                convert(folder / f"base {kv_heads}", shards[kv_heads], model, parallel)
            done[layout] = run_ranks(train, math.prod(layout), layout, asked[layout], shards, timeout=500)
        if isinstance(done[layout], AssertionError):
            raise done[layout]
        return done[layout]

    return results


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_a_layout_trains_as_one_gpu_does(trained: Trained, layout: Layout, variant: Variant) -> None:
    (alone,) = trained(ALONE)
    expected = alone[variant.reference]
    ranks = [rank[variant] for rank in trained(layout)]
    for found in ranks:
        for name in ("losses", "norms"):
            np.testing.assert_allclose(found[name], expected[name], rtol=TOLERANCE[variant.precision], err_msg=name)
    assert all(found["losses"] == ranks[0]["losses"] for found in ranks), "all ranks know the same loss"


@pytest.mark.parametrize(("layout", "variant"), SWITCHED)
def test_graphs_overlap_and_recomputation_change_nothing(trained: Trained, layout: Layout, variant: Variant) -> None:
    """Within a layout, where only the order of sums may differ."""
    for found in trained(layout):
        for name in ("losses", "norms", "halved"):
            values = found[variant][name], found[variant.reference][name]
            np.testing.assert_allclose(*values, rtol=TOLERANCE[variant.precision], err_msg=name)


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_graphs_are_replayed_where_they_can_be(trained: Trained, layout: Layout, variant: Variant) -> None:
    whole_states = variant.sequence or layout[0] == 1 or layout[1] == 1  # else stages send parts, see `why_not`
    expected = DEVICE == "cuda" and variant.graphs and whole_states
    assert [rank[variant]["replayed"] for rank in trained(layout)] == [expected] * RANKS


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout[0] == 1])  # else overlap has memory too
def test_graphs_need_no_second_set_of_activations(trained: Trained, layout: Layout) -> None:
    for found in trained(layout):
        assert found[Variant("bf16")]["peak"] <= 1.02 * found[Variant("bf16").reference]["peak"]


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_a_nan_on_one_rank_stops_the_update_on_all(trained: Trained, layout: Layout, variant: Variant) -> None:
    ranks = [rank[variant] for rank in trained(layout)]
    assert [found["applied"] for found in ranks] == [False] * RANKS
    assert all(found["kept"] for found in ranks)


def test_the_model_learns(trained: Trained) -> None:
    """Or equal losses would mean little."""
    (alone,) = trained(ALONE)
    for found in alone.values():
        first, *_, validation = found["losses"]
        assert validation < first
