"""The configuration reference says what every key is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import Field

from neox_core.config.reference import keys, reference_page
from neox_core.config.section import Section
from tests.paths import ROOT


def test_every_key_has_a_description() -> None:
    assert not [key.path for key in keys() if not key.description]


def test_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference_page(), "the configuration has changed: run `make docs` and commit docs/configuration.md"


class Inner(Section):
    """What is inside.

    And more."""

    number: float = Field(1.5, ge=0, description="a number")


class Outer(Section):
    """All."""

    one: Inner = Inner()
    optional: Inner | None = None
    several: tuple[Inner, ...] = ()
    named: dict[str, Inner]
    bare: int = 3


@pytest.fixture
def found() -> Callable[[str], str]:
    descriptions = {key.path: key.description for key in keys(Outer)}
    return lambda path: descriptions[path]


def test_keys_are_found_below_sections_lists_and_names(found: Callable[[str], str]) -> None:
    for path in ("one.number", "optional.number", "several[].number", "named.<name>.number"):
        assert found(path) == "a number"


def test_sections_are_described_by_themselves_and_others_are_not(found: Callable[[str], str]) -> None:
    assert found("one") == "What is inside."
    assert found("bare") == ""


@pytest.mark.parametrize(
    "row",
    [
        "| `storage.endpoint_url` | text | `null` |",
        "| `train.precision` | `bf16`, `fp32` | `bf16` |",
        "| `train.optimizer.betas` | list of: number, at least 0, below 1 | `[0.9, 0.95]` |",
        "| `train.dry_run` | true, false | `true` |",
        "| `train.steps` | integer, above 0 |  |",
    ],
)
def test_rows_have_value_and_default(row: str) -> None:
    assert row in reference_page()
