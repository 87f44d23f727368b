"""`llemma run CONFIG STAGE ... --set KEY=VALUE`: stages without a server."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from neox_core.artifact import read_artifact
from neox_core.errors import ConfigError, LlemmaError
from tests.e2e.runs import Run, copy_text, write_run


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def run(tmp_path: Path) -> Run:
    copy_text(tmp_path)
    return Run(write_run(tmp_path))


def test_stages_run_and_are_skipped(run: Run) -> None:
    shown = invoke("run", str(run.path), "convert", "prepare-data", "--set", "data.max_epochs=99")
    assert shown.index("prepare-data took") < shown.index("convert took")  # in the chain's order
    assert "open-web-math" in shown
    artifact = read_artifact(run.stage_folder("prepare-data"))
    assert artifact.config["data"]["max_epochs"] == 99
    again = invoke("run", str(run.path), "prepare-data", "convert", "--set", "data.max_epochs=98")
    assert again.count("was finished before") == 2
    assert not (run.workdir / "prefect").exists()
    assert run.processes() == []
    shown = invoke("data", "plan", str(run.path), "--set", "train.steps=2")
    assert "2 steps" in " ".join(shown.split())  # a long path breaks the title


def test_a_stage_whose_inputs_were_never_made(run: Run) -> None:
    for stage in ("train", "evaluate", "export"):
        with pytest.raises(LlemmaError, match=r"prepare-data was never finished .*`llemma run CONFIG prepare-data`"):
            invoke("run", str(run.path), stage)


def test_unknown_stages_and_keys(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"unknown stage 'trian': did you mean 'train'\?"):
        invoke("run", str(run.path), "trian")
    with pytest.raises(ConfigError, match=r"did you mean 'train\.steps'"):
        invoke("run", str(run.path), "train", "--set", "train.step=1")


def test_set_reaches_plan_and_make_base(run: Run, tmp_path: Path) -> None:
    assert invoke("plan", str(run.path), "--set", "train.steps=9000") != invoke("plan", str(run.path))
    invoke("make-base", str(run.path), "--set", f"base_model.path={tmp_path / 'other'}")
    assert (tmp_path / "other" / "params.json").is_file()
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_in_one_line(run: Run, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.prepare.prepare_spec", lambda *_: signal.raise_signal(number))
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has in the background
    before = signal.getsignal(number)
    try:
        ended = CliRunner().invoke(app, ["run", str(run.path), "prepare-data"])
        assert signal.getsignal(number) is before
    finally:
        signal.signal(signal.SIGINT, outside)
    assert ended.exit_code == 128 + number
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("interrupted")]
    assert "the same command goes on from there" in line
