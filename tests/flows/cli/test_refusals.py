"""Options without effect, numbers that cannot be, and files that exist are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import app
from neox_core.errors import ConfigError, LlemmaError
from tests.neox_core.config.neox.test_yaml_import import WHOLE
from tests.paths import ROOT


def refused(*arguments: object) -> str:
    """What a command says that is refused, by its options or by itself."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code != 0, result.output
    if isinstance(result.exception, LlemmaError):
        return str(result.exception)
    return " ".join(result.output.replace("\u2502", " ").split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "meta", "--tokenizer", "x.model"), "--tokenizer: without effect with --format meta"),
        (("--format", "meta", "--sequence-length", 64), "--sequence-length: without effect with --format meta"),
        (("--shards", 2), "--shards: without effect with --format huggingface"),
        (("--sequence-length", -5), "should be greater than or equal to 1"),
        (("--tokenizer", "/nowhere/x.model"), "tokenizer /nowhere/x.model does not exist"),
    ],
)
def test_export(options: tuple[object, ...], message: str, tmp_path: Path) -> None:
    assert message in refused("export", "--from", tmp_path, "--to", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--nodes", "--gpu-memory", "--peak-tflops", "--utilisation"])
def test_plan(option: str) -> None:
    assert "uld be greater than or equal to" in refused("plan", ROOT / "configs/toy.yml", option, 0)


def test_empty_places(tmp_path: Path) -> None:
    assert "--to is empty" in refused("convert", "--from", tmp_path, "--to", "")
    assert "it is empty" in refused("convert", "--from", "", "--to", tmp_path / "out")
    assert "it is empty" in refused("inspect", "")
    assert f"{tmp_path}/nowhere does not exist" in refused("inspect", tmp_path / "nowhere")


def test_a_value_of_set_is_what_was_written() -> None:
    assert "010 without quotes is octal, 8" in refused("plan", ROOT / "configs/toy.yml", "--set", "seed=010")


@pytest.mark.parametrize(
    "command",
    [
        ("config", "import", "neox.yml", "-o"),
        ("checkpoint", "fetch", "run.yml", "--to"),
        ("plan", "run.yml", "--calibrate"),
        ("evaluate", "--model", "model", "--out"),
        ("evaluate", "proofs", "proofs.jsonl", "--command", "true", "--out"),
        ("up", "--workdir"),
    ],
)
@pytest.mark.parametrize("place", ["s3://bucket/x", "$NOWHERE_AT_ALL/x"])
def test_places_that_would_be_folders_of_that_name(
    command: tuple[str, ...], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = "is no folder or file on a disk" if place.startswith("s3") else "which is not set in the environment"
    assert said in refused(*command, place)
    assert not list(tmp_path.iterdir())


def test_config_import_replaces_nothing_without_a_word(tmp_path: Path) -> None:
    files = tmp_path / "neox.yml"
    files.write_text(yaml.safe_dump(WHOLE))
    output = tmp_path / "run.yml"
    output.write_text("mine")
    assert f"{output} exists" in refused("config", "import", files, "-o", output)
    assert output.read_text() == "mine"
    result = CliRunner().invoke(app, ["config", "import", str(files), "-o", str(output), "--overwrite"])
    assert result.exit_code == 0, result.output
    assert "Imported from GPT-NeoX" in output.read_text()
    with pytest.raises(ConfigError, match="cannot be written"):
        CliRunner().invoke(app, ["config", "import", str(files), "-o", "/proc/no/run.yml"], catch_exceptions=False)
