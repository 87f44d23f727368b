"""The ledger: what the run takes of each source, and what it refuses to start."""

from __future__ import annotations

from typing import Any

import pytest

from neox_core.config import RunConfig, load_config
from neox_core.data.ledger import run_ledger
from neox_core.errors import DataError


def config(**data: Any) -> RunConfig:
    """100 steps x 16 sequences of 256 tokens."""
    base = load_config("configs/toy.yml")
    content = {"input": base.data.input, "sources": {"a": {"weight": 3}, "b": {"weight": 1}, "z": {"weight": 0}}} | data
    return base.model_copy(update={"data": type(base.data).model_validate(content)})


def counts(**tokens: int) -> dict[str, dict[str, dict[str, int]]]:
    return {name: {"train": {"documents": 3, "bytes": 4 * n, "tokens": n}} for name, n in tokens.items()}


def test_shares_sequences_tokens_and_epochs() -> None:
    given = counts(a=256 * 600, b=256 * 800, z=5)
    ledger = run_ledger(given, config())
    assert ledger["sources"] == given
    assert ledger["changes"] == []
    assert ledger["run"] == {
        "a": {"share": 0.75, "sequences": 1200, "tokens": 1200 * 256, "epochs": 2.0},
        "b": {"share": 0.25, "sequences": 400, "tokens": 400 * 256, "epochs": 0.5},
        "z": {"share": 0.0, "sequences": 0, "tokens": 0, "epochs": 0.0},
    }


def test_too_many_epochs_says_what_to_change() -> None:
    given = counts(a=256 * 300, b=256 * 800, z=5)
    with pytest.raises(DataError) as caught:
        run_ledger(given, config(max_epochs=3.9))
    message = str(caught.value)
    for part in ("'a'", "4.00 times", "76,800 tokens", "max_epochs 3.9"):
        assert part in message
    assert "lower data.sources.a.weight (3) to 2.721, lower train.steps (100) to 97, or raise" in message
    sources = {"a": {"weight": 2.721}, "b": {"weight": 1}, "z": {"weight": 0}}
    assert run_ledger(given, config(max_epochs=3.9, sources=sources))["run"]["a"]["epochs"] == pytest.approx(
        3.9, rel=1e-3
    )
    assert run_ledger(given, config(max_epochs=4.0))["run"]["a"]["epochs"] == 4.0


def test_source_shorter_than_a_sequence() -> None:
    with pytest.raises(DataError, match=r"'b' has 256 train tokens, fewer than one sequence of 256 \+ 1"):
        run_ledger(counts(a=10**6, b=256, z=0), config())


def test_validation_shorter_than_a_sequence() -> None:
    given = counts(a=10**6, b=10**6, z=0)
    given["b"]["validation"] = {"documents": 1, "bytes": 9, "tokens": 9}
    with pytest.raises(DataError, match="'b' has 9 validation tokens"):
        run_ledger(given, config(eval_sources=["a", "b"]))
    assert run_ledger(given, config(eval_sources=["a"]))["run"]["b"]["sequences"] == 400


@pytest.mark.parametrize(
    ("sources", "advice"),
    [
        ({"a": {"tokens": 307_200}, "b": {"weight": 1}, "z": {"weight": 0}}, r"a\.tokens \(307,200\) to 76,800"),
        ({"a": {"epochs": 4}, "b": {"weight": 1}, "z": {"weight": 0}}, r"lower data\.sources\.a\.epochs \(4\)"),
        (
            {"a": {"weight": 4}, "b": {"weight": 0}, "z": {"weight": 0}},
            r"give other sources a weight too, not only .*\.a,",
        ),
    ],
)
def test_advice_fits_how_the_source_is_given(sources: dict[str, Any], advice: str) -> None:
    with pytest.raises(DataError, match=advice):
        run_ledger(counts(a=256 * 300, b=256 * 8000, z=5), config(max_epochs=1.0, sources=sources))


def test_change_of_weights_is_in_the_ledger() -> None:
    change = {"from_step": 76, "sources": {"a": {"weight": 1}, "b": {"weight": 1}, "z": {"weight": 2}}}
    ledger = run_ledger(counts(a=256 * 1000, b=256 * 500, z=256 * 500), config(weight_changes=[change]))
    taken = {name: use["sequences"] for name, use in ledger["run"].items()}
    assert taken == {"a": 900 + 100, "b": 300 + 100, "z": 200}
    assert ledger["run"]["a"] == {"share": 0.625, "sequences": 1000, "tokens": 256_000, "epochs": 1.0}
    assert ledger["changes"] == [{"from_step": 76, "shares": {"a": 0.25, "b": 0.25, "z": 0.5}}]
    with pytest.raises(DataError, match=r"'z' would be repeated .* lower its part in .* by 75%"):
        run_ledger(counts(a=256 * 1000, b=256 * 500, z=256 * 50), config(weight_changes=[change], max_epochs=1.0))


@pytest.mark.parametrize("tokens", [9_999, 12_345, 67_891, 76_801])
def test_epochs_that_were_asked_for_are_not_refused_for_their_rounding(tokens: int) -> None:
    sources = {"a": {"epochs": 4}, "b": {"weight": 1}, "z": {"weight": 0}}
    given = counts(a=tokens, b=256 * 800_000, z=256 * 50)
    assert run_ledger(given, config(max_epochs=4.0, sources=sources))["run"]["a"]["epochs"] == pytest.approx(4, rel=0.3)
