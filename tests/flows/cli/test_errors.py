"""Errors that users can mend: one line that names the value and the way out, before any work starts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import cli
from infra.s3.server import S3Endpoint
from neox_core.config.load import merge
from neox_core.errors import LlemmaError
from tests.paths import ROOT
from tests.ports import free_port

Attempt = Callable[..., str]


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Attempt:
    """Runs `llemma run` on the toy configuration with changes, which must fail; returns the error's line."""

    def run(changes: dict[str, Any] | None = None, path: Path | None = None) -> str:
        base = {
            "include": str(ROOT / "configs/toy.yml"),
            "workdir": "run",
            "tokenizer": {"model": str(ROOT / "data/tokenizers/demo-2048.model")},
            "data": {"input": str(ROOT / "data/tiny-proof-pile")},
            "base_model": {"path": "base"},
        }
        (tmp_path / "bad.yml").write_text(yaml.safe_dump(merge(base, changes or {})))
        monkeypatch.setattr(sys, "argv", ["llemma", "run", str(path or tmp_path / "bad.yml")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        assert ended.value.code == 1
        assert output.out == ""
        assert output.err.endswith("\n")
        (line,) = output.err.splitlines()
        assert line.startswith("error: ")
        assert made_folders(tmp_path / "run") == []
        return line

    return run


def made_folders(workdir: Path) -> list[str]:
    """What was started: stages, jobs, servers. (A memory of file digests does not count.)"""
    return [path.name for path in workdir.glob("*") if path.is_dir()]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A copy of the demo's text."""
    return Path(shutil.copytree(ROOT / "data/tiny-proof-pile", tmp_path / "text"))


def test_missing_config_file(attempt: Attempt, tmp_path: Path) -> None:
    assert attempt(path=tmp_path / "none.yml") == f"error: config file {tmp_path}/none.yml does not exist"


def test_bad_key_names_the_nearest(attempt: Attempt) -> None:
    line = attempt({"train": {"sequence_lenght": 64}})
    assert "unknown key 'train.sequence_lenght': did you mean 'train.sequence_length'?" in line


def test_no_yaml(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "broken.yml").write_text("train: {steps: 5\nmodel: [")
    assert "broken.yml is not valid YAML" in attempt(path=tmp_path / "broken.yml")


def test_tensor_parallel_must_divide_heads(attempt: Attempt) -> None:
    line = attempt({"parallel": {"tensor": 3}})
    assert "parallel.tensor 3 does not divide model.num_attention_heads 8: use one of [1, 2]" in line


def test_world_size_must_be_divisible(attempt: Attempt) -> None:
    line = attempt({"parallel": {"pipeline": 2}, "launch": {"ranks_per_node": 2}})
    assert "1 nodes x 2 ranks = world size 2, which parallel.tensor 2 x parallel.pipeline 2 = 4 does not divide" in line
    assert "numbers of nodes that work: 2, 4" in line


def test_world_size_that_no_number_of_nodes_mends(attempt: Attempt) -> None:
    line = attempt({"launch": {"ranks_per_node": 3}, "train": {"micro_batch_size": 16}})
    assert "world size 3" in line
    assert "no number of nodes works with launch.ranks_per_node 3: change it, parallel.tensor" in line


def test_unreachable_endpoint(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    port = free_port()  # where nobody listens
    line = attempt({"storage": {"endpoint_url": f"http://127.0.0.1:{port}"}})
    assert f"http://127.0.0.1:{port}" in line
    assert "storage.endpoint_url" in line


def test_wrong_secret_key(attempt: Attempt, s3_endpoint: S3Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_endpoint.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    line = attempt({"storage": {"endpoint_url": s3_endpoint.url}})
    assert s3_endpoint.url in line
    assert "AWS_SECRET_ACCESS_KEY" in line


def test_missing_bucket(attempt: Attempt, s3_endpoint: S3Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_endpoint.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_endpoint.secret_key)
    line = attempt({"storage": {"endpoint_url": s3_endpoint.url, "url": "s3://no-such-bucket/toy"}})
    assert "no-such-bucket" in line
    assert "storage.url" in line


@pytest.mark.usefixtures("no_aws_files")
def test_missing_credentials(attempt: Attempt, s3_endpoint: S3Endpoint) -> None:
    line = attempt({"storage": {"endpoint_url": s3_endpoint.url}})
    assert "AWS_ACCESS_KEY_ID" in line


def test_empty_source(attempt: Attempt, text: Path) -> None:
    shutil.rmtree(text / "arxiv" / "train")
    (text / "arxiv" / "train").mkdir()
    line = attempt({"data": {"input": str(text)}})
    assert f"source 'arxiv' has no train text: {text}/arxiv/train holds no .jsonl, .json, .ndjson" in line


def test_empty_file(attempt: Attempt, text: Path) -> None:
    (text / "code" / "train" / "empty.jsonl.zst").touch()
    line = attempt({"data": {"input": str(text)}})
    assert f"{text}/code/train/empty.jsonl.zst is empty (0 bytes): fetch it again or remove it" in line


def test_missing_source(attempt: Attempt, text: Path) -> None:
    shutil.rmtree(text / "code")
    line = attempt({"data": {"input": str(text)}})
    assert f"source 'code' has no train text: {text}/code/train does not exist; correct" in line


def test_missing_data_folder(attempt: Attempt, tmp_path: Path) -> None:
    line = attempt({"data": {"input": "none"}})
    assert line == f"error: data.input {tmp_path}/none is not a folder: correct the path"


def test_missing_base_model(attempt: Attempt, tmp_path: Path) -> None:
    line = attempt({"base_model": {"path": "none", "random_seed": None}})
    assert f"base_model.path {tmp_path}/none holds no params.json: give the folder of Meta's weights" in line


def test_base_model_without_weights(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "params.json").write_text("{}")
    line = attempt()
    assert f"base_model.path: {tmp_path}/base holds no consolidated.00.pth: copy Meta's weights there" in line


def test_missing_tokenizer(attempt: Attempt, tmp_path: Path) -> None:
    line = attempt({"tokenizer": {"model": "none.model"}})
    assert f"{tmp_path}/none.model" in line
    assert "tokenizer.model" in line


def test_slurm_without_slurm(attempt: Attempt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "launch.executor is slurm, but sbatch is not on the PATH" in attempt({"launch": {"executor": "slurm"}})
    assert "launch.nodes is 2, but without SLURM there is one: set it to 1" in attempt({"launch": {"nodes": 2}})


def test_error_of_the_installed_command(tmp_path: Path) -> None:
    """What a terminal sees: the same, without a traceback, also where rich would take brackets for markup."""
    folder = tmp_path / "[bold]runs"
    folder.mkdir()
    command = [str(Path(sys.executable).with_name("llemma")), "run", str(folder / "none.yml")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    expected = f"error: config file {folder}/none.yml does not exist\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", expected)


def test_an_error_of_a_file_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device", "/full/disk [1]")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    line = "error: /full/disk [1]: No space left on device: correct the path, its rights or its disk\n"
    assert capsys.readouterr().err == line

    def fail_otherwise() -> None:
        raise OSError("of no file")

    monkeypatch.setattr(cli, "app", fail_otherwise)
    with pytest.raises(OSError, match="of no file"):
        cli.main()


def test_an_error_of_several_lines_is_shown_as_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise LlemmaError('two\n  lines: pip install "llemma-pretrain[s3-server]"')

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == 'error: two lines: pip install "llemma-pretrain[s3-server]"\n'
