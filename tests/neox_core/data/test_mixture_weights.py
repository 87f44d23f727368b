"""Weights, tokens and epochs of sources, and changes of them: each against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest

from neox_core.config import RunConfig, load_config
from neox_core.data.mixture_weights import training_mixture, validation_mixture
from neox_core.errors import ConfigError

TOKENS = {"a": 102_400, "b": 1_000_000}


def config(a: dict[str, Any], b: dict[str, Any], *changes: dict[str, Any]) -> RunConfig:
    """100 steps x 16 sequences of 256 tokens = 409,600 tokens."""
    base = load_config("configs/toy.yml")
    content = {"input": base.data.input, "sources": {"a": a, "b": b}, "weight_changes": changes}
    return base.model_copy(update={"data": type(base.data).model_validate(content)})


def taken(a: dict[str, Any], b: dict[str, Any], *changes: dict[str, Any], steps: int = 100) -> tuple[int, int]:
    consumed = training_mixture(config(a, b, *changes), TOKENS.__getitem__).consumed(16 * steps)
    return consumed["a"], consumed["b"]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"weight": 1}, {"weight": 3}),
        ({"weight": 0.5}, {"weight": 1.5}),
        ({"tokens": 102_400}, {"weight": 9}),
        ({"epochs": 1}, {"weight": 9}),
        ({"tokens": 102_400}, {"tokens": 307_200}),
        ({"epochs": 1.0}, {"tokens": 307_200}),
        ({"epochs": 1}, {"epochs": 0.3072}),
    ],
)
def test_a_quarter_in_every_form(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert taken(a, b) == (400, 1200)


def test_amounts_that_do_not_fit_the_run() -> None:
    with pytest.raises(
        ConfigError, match=r"steps 1 to 100 take 409,600 tokens.*asks for 512,000.*nothing is left for b"
    ):
        taken({"epochs": 5}, {"weight": 1})
    with pytest.raises(
        ConfigError, match=r"amounts in data.sources sum to 204,800: set train.steps to 50, or give one"
    ):
        taken({"epochs": 1}, {"tokens": 102_400})
    # rounding to whole batches is no reason to refuse
    assert taken({"epochs": 1}, {"tokens": 305_000}) == (402, 1198)
    assert taken({"tokens": 409_600}, {"weight": 0}) == (1600, 0)


def test_amounts_of_a_change_are_of_the_steps_from_there() -> None:
    """Steps 51 to 100 take 204,800 tokens; half of an epoch of a is 51,200 of them."""
    change = {"from_step": 51, "sources": {"a": {"epochs": 0.5}, "b": {"weight": 1}}}
    assert taken({"weight": 1}, {"weight": 0}, change, steps=50) == (800, 0)
    assert taken({"weight": 1}, {"weight": 0}, change) == (800 + 200, 600)
    # what holds before does not depend on later changes
    later = {"from_step": 76, "sources": {"a": {"weight": 0}, "b": {"weight": 1}}}
    assert taken({"epochs": 1}, {"weight": 1}, change, later, steps=50) == taken({"epochs": 1}, {"weight": 1}, steps=50)
    assert taken({"weight": 1}, {"weight": 0}, change, later, steps=75) == (800 + 100, 300)
    assert taken({"weight": 1}, {"weight": 0}, change, later) == (800 + 100, 300 + 400)


def long_config(small: dict[str, Any], order: int | None = None) -> RunConfig:
    """12,397 steps x 1,024 sequences of 4,096 tokens: 52 billion."""
    base = load_config("configs/toy.yml")
    sources = {"small": small, "tiny": {"epochs": 1}, "large": {"weight": 1}}
    data = {"input": base.data.input, "sources": sources, "order": order}
    train = {"sequence_length": 4096, "global_batch_tokens": 4096 * 1024, "steps": 12_397}
    return base.model_copy(
        update={"data": type(base.data).model_validate(data), "train": base.train.model_copy(update=train)}
    )


@pytest.mark.parametrize("tokens", [600_000, 1_000_000, 1_999_999])
@pytest.mark.parametrize("small", [{"epochs": 1}, {"tokens": 1_500_000}, {"epochs": 2.5}])
def test_small_amounts_of_a_long_run_are_exact_to_a_sequence(tokens: int, small: dict[str, Any]) -> None:
    found = {"small": tokens, "tiny": 9_000, "large": 0}
    config, total = long_config(small), 12_397 * 1024
    consumed = training_mixture(config, found.__getitem__).consumed(total)
    asked = small.get("tokens", small.get("epochs", 0) * tokens)
    assert abs(consumed["small"] - asked / 4096) < 1
    assert abs(consumed["tiny"] - 9_000 / 4096) < 1
    assert sum(consumed.values()) == total


def test_the_older_order_rounds_amounts_as_it_did() -> None:
    """Trainings that began in it end in it: 1 of 65,536 draws, where 146 of 12,694,528 sequences were asked for."""
    found = {"small": 600_000, "tiny": 600_000, "large": 0}
    consumed = training_mixture(long_config({"epochs": 1}, order=2), found.__getitem__).consumed(12_397 * 1024)
    assert consumed["small"] > 1.3 * 600_000 / 4096


def test_an_amount_below_a_sequence_is_named_as_it_was_written() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.tiny\.epochs 1 is 1,000 tokens .* less than a sequence"):
        training_mixture(long_config({"epochs": 1}), {"small": 10**6, "tiny": 1000}.__getitem__)
    with pytest.raises(ConfigError, match=r"data\.sources\.small\.tokens 500 is 500 tokens"):
        training_mixture(long_config({"tokens": 500}), {"small": 10**6, "tiny": 10**6}.__getitem__)


def test_validation_holds_sources_that_are_a_tiny_part_of_the_training() -> None:
    found = {"small": 30_000, "tiny": 9_000, "large": 0}
    mixture = validation_mixture(long_config({"epochs": 1}), found.__getitem__)
    assert mixture.drawn == ("large", "small", "tiny")
