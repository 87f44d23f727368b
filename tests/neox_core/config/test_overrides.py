"""Overrides from the command line: typed as YAML, checked as the file is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neox_core.config import load_config
from neox_core.config.overrides import parse_overrides
from neox_core.errors import ConfigError
from tests.paths import CONFIGS

TOY = CONFIGS / "toy.yml"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.steps=5", {"train": {"steps": 5}}),
        ("name=x=y", {"name": "x=y"}),
        ("train.optimizer.betas=[0.9, 0.99]", {"train": {"optimizer": {"betas": [0.9, 0.99]}}}),
        ("launch.partition=null", {"launch": {"partition": None}}),
        ("launch.partition=", {"launch": {"partition": None}}),
        ("data.deduplicate=true", {"data": {"deduplicate": True}}),
    ],
)
def test_values_are_yaml(text: str, expected: dict[str, Any]) -> None:
    assert parse_overrides([text]) == expected


def test_several_of_a_section_and_the_last_of_a_key() -> None:
    assert parse_overrides(["a.b=1", "a.c.d=2", "a.b=3"]) == {"a": {"b": 3, "c": {"d": 2}}}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["train.steps"], "'train.steps' is not of the form section.key=value, such as train.steps=100"),
        (["=5"], "is not of the form"),
        (["train..steps=5"], "is not of the form"),
        (["train.steps=[1"], "the value is not YAML"),
        (["train=5", "train.steps=5"], "sets a key below 'train', which another --set gives a value"),
    ],
)
def test_bad_texts(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_overrides(texts)
    assert message in str(error.value)


def test_they_override_the_file_and_keep_the_rest() -> None:
    config = load_config(TOY, ["train.steps=7", "train.optimizer.lr=1e-3", "workdir=elsewhere"])
    assert (config.train.steps, config.train.optimizer.lr) == (7, 1e-3)
    assert config.train.sequence_length == load_config(TOY).train.sequence_length
    assert config.workdir == Path(CONFIGS, "elsewhere")  # as in the file, relative to its folder


def test_an_empty_section_changes_nothing_and_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.sources is \{\}, which changes nothing of the data\.sources below it"
    ):
        load_config(TOY, ["data.sources={}"])
    assert load_config(TOY, ["notify={}"]) == load_config(TOY)  # the file has none


def test_unknown_keys_and_wrong_types_are_refused_as_in_a_file() -> None:
    with pytest.raises(ConfigError, match=r"toy\.yml with train\.stepz=5: unknown key .*did you mean 'train\.steps'"):
        load_config(TOY, ["train.stepz=5"])
    with pytest.raises(ConfigError, match=r"train\.steps is 'many'"):
        load_config(TOY, ["train.steps=many"])
