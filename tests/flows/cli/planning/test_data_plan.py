"""`llemma data plan`: what there is of each source, what the run takes, and its refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from neox_core.artifact import Artifact, DigestCache, publish
from neox_core.config import load_config
from neox_core.config.load import merge
from tasks.identity.current import note_current
from tasks.identity.specs import prepare_spec
from tasks.identity.stage import StageResult
from tests.flows.cli.command import run_command
from tests.paths import ROOT

TRAIN = {"arxiv": 300_000, "open-web-math": 1_000_000}
ABSENT = ("algebraic-stack", "pile-sample", "code")

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Plan:
    """Runs the command on 100 steps of 4,096 tokens; `prepared`: with an artifact of prepare-data in place."""

    def run(data: dict[str, Any], prepared: bool = True) -> tuple[int, str, str]:
        unused = {name: {"weight": 0} for name in ABSENT}
        content = {
            "include": str(ROOT / "configs/toy.yml"),
            "workdir": "run",
            "tokenizer": {"model": str(ROOT / "data/tokenizers/demo-2048.model")},
            "data": {"input": str(ROOT / "data/tiny-proof-pile"), "eval_sources": ["arxiv"], "sources": unused},
            "base_model": {"path": "base"},
        }
        path = tmp_path / "run.yml"
        path.write_text(yaml.safe_dump(merge(content, {"data": data})))
        if prepared:
            put_artifact(path)
        return run_command(monkeypatch, capsys, "data", "plan", str(path))

    return run


def put_artifact(path: Path) -> None:
    """An artifact of prepare-data without token files, which the command does not read."""
    spec = prepare_spec(load_config(path))
    counts = {name: {"documents": 10, "bytes": 3 * tokens, "tokens": tokens} for name, tokens in TRAIN.items()}
    empty = {"documents": 0, "bytes": 0, "tokens": 0}
    sources = {name: {"train": counts.get(name, empty)} for name in (*TRAIN, *ABSENT)}
    spec.folder.mkdir(parents=True, exist_ok=True)
    draft = Artifact(spec.name, spec.fingerprint, spec.inputs, {}, (), {"sources": sources, "seconds": 1.0})
    artifact = publish(draft, spec.folder, DigestCache(path.parent / "digests.json"))
    note_current(spec.config, StageResult(artifact, skipped=False))


def rows(output: str) -> dict[str, list[str]]:
    """The cells of each row by its first one."""
    cut = ([cell.strip() for cell in line.strip("│┃").split("│")] for line in output.splitlines() if "│" in line)
    return {first: rest for first, *rest in cut}


def test_table(plan: Plan) -> None:
    status, out, err = plan({"sources": {"arxiv": {"weight": None, "epochs": 0.5}, "open-web-math": {"weight": 1}}})
    assert (status, err) == (0, "")
    table = rows(out)
    # an epoch's half is 150,000 of the run's 409,600 tokens: 586 of its 1,600 sequences
    assert table["arxiv"] == ["10", "900,000", "300,000", "3.000", "36.62%", "150,016", "0.500"]
    assert table["open-web-math"] == ["10", "3,000,000", "1,000,000", "3.000", "63.38%", "259,584", "0.260"]
    assert table["code"] == ["0", "0", "0", "-", "0.00%", "0", "0.000"]
    assert table["all"] == ["20", "3,900,000", "1,300,000", "3.000", "100.00%", "409,600", "0.315"]


def test_too_many_epochs_fail_after_the_table(plan: Plan) -> None:
    status, out, err = plan({"max_epochs": 1, "sources": {"arxiv": {"weight": 3}, "open-web-math": {"weight": 1}}})
    assert status == 1
    assert rows(out)["arxiv"][-1] == "1.024"
    assert "error: source 'arxiv' would be repeated 1.02 times" in err
    assert "lower data.sources.arxiv.weight (3) to 2.737, lower train.steps (100) to 97" in err


def test_changes_of_weights_are_shown(plan: Plan) -> None:
    unused = {name: {"weight": 0} for name in ABSENT}
    change = {"from_step": 51, "sources": {"arxiv": {"weight": 0}, "open-web-math": {"weight": 1}, **unused}}
    sources = {"arxiv": {"weight": 1}, "open-web-math": {"weight": 0}}
    status, out, _ = plan({"sources": sources, "weight_changes": [change]})
    assert status == 0
    assert rows(out)["arxiv"][-2:] == ["204,800", "0.683"]
    assert sorted(rows(out)["51"]) == ["0.00%", "0.00%", "0.00%", "0.00%", "100.00%"]


def test_before_prepare_data(plan: Plan) -> None:
    status, out, err = plan({"sources": {"arxiv": {"weight": 1}, "open-web-math": {"weight": 1}}}, prepared=False)
    assert (status, out) == (1, "")
    assert "run it first, with `llemma run CONFIG prepare-data`" in err
