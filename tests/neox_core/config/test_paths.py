"""Places: expanded as a shell would, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox_core.config import load_config
from neox_core.config.paths import expanded, local_path
from neox_core.errors import ConfigError
from neox_core.storage.folders import open_folder
from neox_core.storage.targets import open_target
from tests.paths import ROOT


def test_variables_and_home_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("RUN", "seven")
    assert expanded("$HOME/x") == "/home/ada/x"
    assert expanded("${HOME}/$RUN") == "/home/ada/seven"
    assert local_path("~/x") == Path("/home/ada/x")
    assert expanded("s3://bucket/$RUN#1") == "s3://bucket/seven#1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$NOWHERE_AT_ALL/x", r"\$NOWHERE_AT_ALL, which is not set"),
        ("~no-such-user/x", "there is no such user's home"),
        ("", "it is empty"),
        ("  ", "it is empty"),
        ("${NOWHERE_AT_ALL:-/tmp}/x", r"holds \$\{NOWHERE_AT_ALL:-/tmp\}, which only a shell computes"),
        ("$(pwd)/x", r"holds \$\(pwd\), which only a shell computes"),
    ],
)
def test_what_cannot_be_expanded(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expanded(text)
    for opened in (open_folder, open_target):
        with pytest.raises(ConfigError, match=message):
            opened(text)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("workdir: s3://bucket/x", "s3://bucket/x is no folder or file on a disk"),
        ("workdir: $NOWHERE_AT_ALL/x", "NOWHERE_AT_ALL, which is not set"),
        ("workdir: s3:/bucket/x", "s3:/bucket/x is no folder or file on a disk"),
        ("workdir: ''", "it is empty"),
        ("workdir: ~no-such-user/x", "no such user's home"),
        ("tokenizer: {model: 'https://example.org/x.model'}", "is no folder or file on a disk"),
        ("base_model: {path: 'gs://bucket/x'}", "is no folder or file on a disk"),
        ("data: {input: 'gs://bucket/x'}", "is no folder or file on a disk"),
        ("storage: {url: 's3://bu?cket/x'}", "String should match pattern"),
        ("data: {sources: {arxiv: {weight: 1e308}, code: {weight: 1e308}}}", "the sum of the weights is too large"),
    ],
)
def test_places_of_a_configuration(extra: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text(f"include: {ROOT / 'configs/toy.yml'}\n{extra}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_variable_in_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH_DISK", str(tmp_path))
    path = tmp_path / "run.yml"
    extra = "workdir: $SCRATCH_DISK/runs\nstorage: {url: 's3://b/run#1'}"
    path.write_text(f"include: {ROOT / 'configs/toy.yml'}\n{extra}\n")
    loaded = load_config(path)
    assert loaded.workdir == tmp_path.resolve() / "runs"
    assert loaded.storage.url == "s3://b/run#1"
