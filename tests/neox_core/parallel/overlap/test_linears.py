"""A block whose ranks exchange alongside their products computes what one with collectives does, in every mode."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist

from neox_core.config import ActivationCheckpointing
from neox_core.model import ModelDimensions
from tests.distributed import run_ranks
from tests.neox_core.parallel.overlap.blocks import run_block
from tests.neox_core.parallel.overlap.collectives import CollectiveExchange

MODES: tuple[ActivationCheckpointing, ...] = get_args(ActivationCheckpointing)
DIMS = ModelDimensions(
    hidden_size=24, num_heads=6, num_kv_heads=6, head_dim=4, intermediate_size=36, vocab_size=8,
    rope_theta=1e4, norm_eps=1e-5, sequence_length=12, qkv_bias=True,
)  # fmt: skip
NORMS = {"before": DIMS, "after": replace(DIMS, norms_after=True, qk_norm="head", output_bias=True)}
ALTERNATING = ["gather", "scatter"] * 2


def modes(norms: str) -> dict[str, Any]:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    found: dict[str, Any] = {"norms": norms}
    for mode in MODES:
        exchange, case = CollectiveExchange(group), (NORMS[norms], mode)
        found[mode] = (
            run_block(*case, None, "cpu", torch.float32),
            run_block(*case, exchange, "cpu", torch.float32),
            exchange.begun,
        )
    return found


@pytest.fixture(scope="module", params=[(2, "before"), (3, "before"), (2, "after"), (3, "after")], ids=str)
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    count, norms = request.param
    return run_ranks(partial(modes, norms), count)


@pytest.mark.parametrize("mode", MODES)
def test_results_and_gradients(ranks: list[dict[str, Any]], mode: str) -> None:
    for found in ranks:
        expected, overlapped, _ = found[mode]
        assert expected.keys() == overlapped.keys()
        assert "attention.query_key_value.bias" in expected
        for name in expected.keys() - {"called"}:
            torch.testing.assert_close(overlapped[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
        assert overlapped["called"] == expected["called"]


@pytest.mark.parametrize("mode", MODES)
def test_exchanges_take_turns(ranks: list[dict[str, Any]], mode: str) -> None:
    """A pass begins with a gather and ends with a sum, so that memory is used again safely (symmetric.py).

    What is computed again ends before its last product, or with it where a norm comes after.
    """
    norms = ranks[0]["norms"]
    again = {"none": [], "selective": [], "full": ALTERNATING if norms == "after" else ALTERNATING[:-1]}[mode]
    assert all(found[mode][2] == [*ALTERNATING, *again, *ALTERNATING, *ALTERNATING] for found in ranks)
