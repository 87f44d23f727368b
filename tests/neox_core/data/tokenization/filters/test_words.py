"""What looks alike has the same words."""

from __future__ import annotations

import pytest

from neox_core.data.tokenization.filters.words import words


@pytest.mark.parametrize(
    "text",
    [
        "The definition of a field",
        "the, DEFINITION (of) a -- field!",
        "The defi\u00adnition of a field",
        "The defi-\nnition of a field",
        "The defi\u00ad\n  nition of a field",
        "The defi\u2010\r\nnition of a field",
        "The&nbsp;definition of&#160;a\u00a0field",
        "\uff34\uff48\uff45 \uff44\uff45\uff46inition of a field",
        "The de\ufb01nition of a field",
        "The defini\u200btion of a\ufeff field",
    ],
)
def test_of_one_text_in_many_disguises(text: str) -> None:
    assert words(text) == ("the", "definition", "of", "a", "field")


def test_what_differs_stays_different() -> None:
    assert words("well-known x_1 été 3.5 &") == ("well", "known", "x_1", "été", "3", "5")
    assert words("a -\n b") == ("a", "b")  # a dash
    assert words("") == ()
