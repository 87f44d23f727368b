"""`llemma plan`: the predicted step, figures from a file, and the fastest layouts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from neox_core.planning.hardware import CARDS
from tests.flows.cli.command import run_command
from tests.paths import ROOT

CONFIG = str(ROOT / "configs/llemma_7b.yml")


Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Plan:
    """Its status, output and errors."""
    return lambda *words: run_command(monkeypatch, capsys, "plan", CONFIG, *words)


def rate(shown: str) -> float:
    (found,) = re.findall(r"= ([\d,]+) tokens/s on each GPU", shown)
    return float(found.replace(",", ""))


def test_the_step_is_predicted_for_the_hardware(plan: Plan, tmp_path: Path) -> None:
    status, shown, err = plan("--hardware", "h200")
    assert status == 0, err
    assert "a step on h200, predicted" in shown
    assert f"of 989 TFLOP/s = {rate(shown):,.0f} tokens/s" in shown, "the plan's time is the prediction's"
    replace(CARDS["h200"], gemm=2 * CARDS["h200"].gemm, name="mine").save(tmp_path / "mine.json")
    assert rate(plan("--hardware", str(tmp_path / "mine.json"))[1]) > 1.1 * rate(shown)
    assert "40% of 989 TFLOP/s" in plan("--hardware", "h200", "--utilisation", "0.4")[1]


def test_the_fastest_layouts_are_shown_beside_llemmas(plan: Plan) -> None:
    status, shown, _ = plan("--best")
    assert status == 0
    assert "the fastest layouts on 256 a100-40gb" in shown
    assert len(re.findall(r"│ (?:10|[1-9]) +│", shown)) == 10
    assert "as configured" in shown
    assert "Llemma reached 2,416 tokens/s/GPU" in shown


@pytest.mark.parametrize(
    ("words", "problem", "gpus"),
    [
        (("--nodes", "1", "--set", "launch.ranks_per_node=7"), "world size 7, which parallel.tensor 2 x", 7),
        (("--nodes", "1", "--set", "parallel.tensor=3"), "parallel.tensor 3 does not divide model.num_attention", 8),
        (("--nodes", "1", "--set", "train.micro_batch_size=3"), "is not divisible by micro batch 3", 8),
    ],
)
def test_the_fastest_layouts_where_the_configured_one_cannot_be_run(
    plan: Plan, words: tuple[str, ...], problem: str, gpus: int
) -> None:
    status, shown, err = plan(*words, "--gpu-memory", "80", "--best")
    assert status == 0, err
    assert shown.startswith("not as configured: ")
    assert problem in " ".join(shown.split())
    assert f"the fastest layouts on {gpus} a100-40gb" in shown
    assert "as configured" not in shown.partition("the fastest")[2]
    for further in ((), ("--best", "--simulate")):
        status, _, err = plan(*words, *further)
        assert status == 1
        assert problem in err


def test_what_no_layout_mends_is_an_error_with_best_too(plan: Plan) -> None:
    for words, problem in (
        (("--set", "train.sequence_length=4095"), "train.global_batch_tokens"),
        (("--set", "parallel.tensor=3", "--gpu-memory", "1"), "parallel.tensor 3 does not divide"),
    ):
        status, shown, err = plan(*words, "--best")
        assert (status, shown) == (1, "")
        assert problem in err


def test_a_file_of_figures_is_not_replaced(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "figures"
    path.write_text("mine")
    status, _, err = plan("--calibrate", str(path))
    assert status != 0
    assert "exists: give another file" in err
    assert path.read_text() == "mine"


def test_unknown_hardware(plan: Plan) -> None:
    status, _, err = plan("--hardware", "abacus")
    assert status != 0
    assert "abacus: neither a file nor one of a100-40gb" in err


def test_a_step_in_fp32_is_said_to_be_slower(plan: Plan) -> None:
    slower = "predicted at the rates of bf16, which fp32 does not reach"
    assert slower in " ".join(plan("--set", "train.precision=fp32")[1].split())
    assert slower not in " ".join(plan()[1].split())


@pytest.mark.parametrize("option", ["--gpu-memory", "--peak-tflops"])
def test_figures_without_end_are_refused(plan: Plan, option: str) -> None:
    status, _, err = plan(option, "inf")
    assert status != 0
    assert f"Invalid value for '{option}': Input should be less than" in err


def test_a_sequence_beyond_the_window_is_refused(plan: Plan) -> None:
    window = ("--set", "model.family=mistral", "--set", "model.sliding_window=2048")
    status, _, err = plan(*window)
    assert status != 0
    assert "train.sequence_length 4096 exceeds model.sliding_window 2048" in err
