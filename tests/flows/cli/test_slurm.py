"""`llemma slurm render CONFIG`."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from flows.cli import app
from tests.paths import ROOT


def test_the_script_of_34b_asks_for_all_that_a_cluster_must_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # SLURM need not be there
    settings = ["launch.account=math", "launch.partition=gpu", "launch.slurm_parameters={qos: high}"]
    overrides = [argument for setting in settings for argument in ("--set", setting)]
    shown = CliRunner().invoke(app, ["slurm", "render", str(ROOT / "configs" / "llemma_34b.yml"), *overrides])
    assert shown.exit_code == 0, shown.output
    flags = {line.removeprefix("#SBATCH ") for line in shown.output.splitlines() if line.startswith("#SBATCH")}
    assert {
        "--nodes=32",
        "--ntasks-per-node=1",  # the controller of a node, which starts its ranks
        "--cpus-per-task=48",
        "--gpus-per-node=8",
        "--requeue",
        "--open-mode=append",
        "--signal=USR2@90",
        "--account=math",
        "--partition=gpu",
        "--qos=high",
        "--job-name=llemma-train-llemma_34b",
    } <= flags
    (command,) = [line for line in shown.output.splitlines() if line.startswith("srun ")]
    assert "--kill-on-bad-exit=1" in command
