"""Which rows a node of several GPUs gets, and how a second call goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import node
from benchmarks.commands import run_json
from benchmarks.node_rows import Row, planned_bytes, rows
from neox_core.planning.hardware import CARDS
from neox_core.planning.memory import RESERVED_BYTES

H100 = CARDS["h100"]


def test_every_layout_of_eight_gpus_in_what_fits() -> None:
    found = list(rows(8, H100, ("34b-slice",), toy=False))
    layouts = {(row.gpus, row.config.parallel.tensor, row.config.parallel.pipeline) for row in found}
    eight = {(8, tensor, pipeline) for tensor in (1, 2, 4, 8) for pipeline in (1, 2, 4, 8) if tensor * pipeline <= 8}
    assert layouts == {(1, 1, 1), *eight}
    for row in found:
        assert planned_bytes(row) + RESERVED_BYTES <= H100.memory_gib * 2**30
    switches = {(row.config.train.cuda_graphs, row.config.parallel.overlap) for row in found}
    assert switches == {("auto", "auto"), ("off", "auto"), ("auto", "off")}
    schedules = {(row.config.parallel.pipeline > 1, row.config.parallel.pipeline_schedule) for row in found}
    assert schedules == {(False, "1f1b"), (True, "1f1b"), (True, "zb-h1")}
    assert len({row.key for row in found}) == len(found)


def test_a_second_call_measures_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, measured = tmp_path / "rows.jsonl", list[str]()
    H100.save(tmp_path / "rows.hardware.json")

    def measure(row: Row) -> dict[str, Any]:
        measured.append(row.key)
        if len(measured) == 2:
            return {"key": row.key, "failed": "no luck"}
        figures = {"tokens_per_second": 1e6, "ratio_to_gemm": 0.8, "step_seconds": 1.0, "peak_memory_gib": 1.0}
        return figures | {"key": row.key, "gpus": row.gpus, "arguments": row.arguments}

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["node", str(path), "--toy", "--gpus", "2", *words])
        node.main()
        return capsys.readouterr().out

    monkeypatch.setattr(node, "_measure", measure)
    assert "10 rows are left" in call("--minutes", "1")
    shown = call()
    assert len(measured) == len(set(measured)) == len(path.read_text().splitlines()) == 10
    assert "| 1,000,000 |" in shown
    assert "no luck" in shown
    with path.open("a") as file:
        file.write('{"key": "cut')
    call()
    assert len(measured) == 10
    call("--retry")
    assert measured[10:] == [measured[1]]
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1])["key"] == measured[1]


def test_a_command_gives_its_last_line_of_json_or_how_it_failed() -> None:
    good = run_json([sys.executable, "-c", "print('{\"a\": 1}'); print('done')"], 60)
    assert good == {"a": 1}
    assert "oh no" in run_json([sys.executable, "-c", "raise SystemExit('oh no')"], 60)["failed"]
    late = run_json([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert "ended after 0.5 s" in late["failed"]
