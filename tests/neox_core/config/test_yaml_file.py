"""YAML values are what was written, or are refused with the spelling to use."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox_core.config import read_yaml
from neox_core.errors import ConfigError


def read(folder: Path, text: str) -> dict[str, object]:
    path = folder / "values.yml"
    path.write_text(text)
    return read_yaml(path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("24:00:00", "24:00:00 without quotes is 86400 in YAML: write that number, .* in quotes: '24:00:00'"),
        ("1:30.5", "without quotes is 90.5"),
        ("010", "010 without quotes is octal, 8 in YAML: write 8 or 10, or put it in quotes: '010'"),
        ("-0_17", "is octal, -15"),
        ("yes", "yes without quotes is yes or no in YAML: write true or false"),
        ("Off", "write true or false"),
        ("2026-01-01", "is a date"),
        ("[1, {a: no}]", "no without quotes"),
    ],
)
def test_surprises_are_refused_with_the_spelling_to_use(value: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"values\.yml, line 2: .*{expected}"):
        read(tmp_path, f"a: 1\nb: {value}\n")


def test_quoted_and_plain_values_are_as_written(tmp_path: Path) -> None:
    text = (
        "a: '24:00:00'\nb: \"010\"\nc: 'no'\nd: true\ne: 1_000\nf: 0\ng: 01:30:00\nh: 0x1f\ni: 08\nj: False\nk: 1.5\n"
    )
    expected = ["24:00:00", "010", "no", True, 1000, 0, "01:30:00", 31, "08", False, 1.5]
    assert list(read(tmp_path, text).values()) == expected


def test_merge_keys_are_read(tmp_path: Path) -> None:
    text = "base: &base {lr: 1, decay: 2}\nother: &other {clip: 3}\n"
    text += "run:\n  <<: [*base, *other]\n  lr: 4\nplain: {<<: *base}\n"
    content = read(tmp_path, text)
    assert content["run"] == {"lr": 4, "decay": 2, "clip": 3}
    assert content["plain"] == {"lr": 1, "decay": 2}
    with pytest.raises(ConfigError, match="key 'lr' is given more than once"):
        read(tmp_path, "base: &base {lr: 1}\nrun: {<<: *base, lr: 2, lr: 3}\n")


def test_a_file_that_contains_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nested too deeply"):
        read(tmp_path, "a: " + "[" * 5000 + "]" * 5000)
