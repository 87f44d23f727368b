"""Which rows a node of several GPUs gets, and how a second call goes on."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import node, peers
from benchmarks.commands import run_json
from benchmarks.node_rows import Row, limit_seconds, planned_bytes, predicted_seconds, rows, table
from benchmarks.train_step import checked, parse_options
from neox_core.config import batch_geometry
from neox_core.planning.hardware import CARDS
from neox_core.planning.memory import RESERVED_BYTES

H100 = CARDS["h100"]
WANTED = {
    4: [("7b", 32, 1, 1), ("7b", 32, 2, 1), ("7b", 32, 4, 1)],
    8: [
        *[("34b-slice", 8, tensor, pipeline) for tensor, pipeline in ((8, 1), (4, 1), (2, 2), (1, 8))],
        *[("7b", 32, tensor, 1) for tensor in (1, 2)],
    ],
}
"""By GPUs: model, layers, tensor-parallel ranks and pipeline stages; the rest is data parallelism."""


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


@pytest.mark.parametrize("card", ["a100-80gb", "h100", "h200"])
def test_what_is_wanted_of_a_node_is_measured_first(card: str) -> None:
    for gpus, wanted in WANTED.items():
        found = list(rows(gpus, CARDS[card], ("7b", "34b-slice"), toy=False))
        parallel = [row.config.parallel for row in found]
        layouts = [(row.arguments[0], row.gpus, p.tensor, p.pipeline) for row, p in zip(found, parallel, strict=True)]
        first = layouts[: len(set(layouts))]
        assert len(set(first)) == len(first)
        for model, layers, tensor, pipeline in wanted:
            row = found[first.index((model, gpus, tensor, pipeline))]
            assert row.config.model.num_layers == layers
            geometry = batch_geometry(checked(row.config))
            assert geometry.accumulation_steps >= 8 * (pipeline > 1) * pipeline


@pytest.mark.parametrize("card", CARDS)
def test_each_row_can_be_run_and_fits_a_call(card: str) -> None:
    for gpus in (1, 2, 3, 4, 6, 8):
        for row in rows(gpus, CARDS[card], node.MODELS, toy=False):
            checked(row.config)
            assert limit_seconds(row, CARDS[card]) < 8 * 60


def test_a_row_has_time_for_all_its_steps() -> None:
    """Half as long again as predicted; two more are made, for the loss and the profile."""
    row = next(rows(1, H100, ("7b",), toy=False))
    steps = parse_options(row.arguments).steps + 2
    assert limit_seconds(row, H100) == pytest.approx(120 + 1.5 * steps * predicted_seconds(row, H100))


def test_peers_get_what_fits_one_gpu() -> None:
    commands = {card: next(node._peers("7b", 8, CARDS[card])).command for card in ("h100", "h200")}
    assert commands["h200"][3:] == ("7b", "--layers", "32", "--micro-batch", "2")
    assert commands["h100"][3:] == ("7b", "--layers", "16", "--micro-batch", "2")


def test_peers_that_failed_are_named_beside_those_that_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str]) -> dict[str, Any]:
        good = "Liger" not in command[-1]
        return {"tokens_per_second": 2.0} if good else {"failed": "No module named 'liger_kernel'\nat length"}

    monkeypatch.setattr(peers, "run_json", run)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process is not the benchmark's
    monkeypatch.setattr(sys, "argv", ["peers", "tiny"])
    with pytest.raises(SystemExit, match="compiled, Liger: No module named 'liger_kernel'"):
        peers.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    monkeypatch.setattr(node, "run_json", lambda *_: found)
    result = node._measure_peer(node.Peer("peers", ("peers",), 1.0))
    measured = ["ours", "transformers, compiled", "transformers, compiled, fp32 states"]
    assert result["peers"] == dict.fromkeys(measured, 2.0)
    assert result["failed"] == "transformers, compiled, Liger: No module named 'liger_kernel'"
    rates = ", ".join(f"{name} 2" for name in measured)
    assert {"failed: peers: " + result["failed"], f"peers, tokens/s: {rates}"} <= {*table([result], H100).splitlines()}


@pytest.mark.parametrize(("fits", "again"), [(2, False), (1, True), (4, True)])
def test_a_peer_computes_layers_again_only_where_no_micro_batch_fits_else(
    monkeypatch: pytest.MonkeyPatch, fits: int, again: bool
) -> None:
    def rate(options: Namespace, micro_batch: int, repeats: bool) -> float:
        if micro_batch > fits or repeats < again:
            raise torch.OutOfMemoryError
        return 3.0

    monkeypatch.setattr(peers, "_peer_rate", rate)
    result = peers._measure_peer(Namespace(micro_batch=4))
    assert result == {"micro_batch": fits, "computed_again": again, "tokens_per_second": 3.0}


def test_a_second_call_measures_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, measured = tmp_path / "rows.jsonl", list[str]()
    replace(H100, name="cpu").save(tmp_path / "rows.hardware.json")

    def measure(row: Row, limit: float) -> dict[str, Any]:
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
    assert "10 rows are left: run the same command again, with --minutes 4" in call("--minutes", "1")
    with pytest.raises(SystemExit, match="no row's name contains '--tp 4'"):
        call("--only", "--tp 4")
    call("--only", "2 x tiny")
    assert len(measured) == 8
    shown = call()
    assert len(measured) == len(set(measured)) == len(path.read_text().splitlines()) == 10
    assert "| 1,000,000 |" in shown
    assert "no luck" in shown
    with path.open("a") as file:
        file.write('{"key": "cut')
    call()
    assert len(measured) == 10
    path.write_text("".join(line for line in path.open() if f'"{measured[2]}"' not in line))
    call("--retry")
    assert measured[10:] == [measured[2], measured[1]]
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1])["key"] == measured[1]


def test_a_command_gives_its_last_line_of_json_or_how_it_failed() -> None:
    good = run_json([sys.executable, "-c", "print('{\"a\": 1}'); print('done')"], 60)
    assert good == {"a": 1}
    assert "oh no" in run_json([sys.executable, "-c", "raise SystemExit('oh no')"], 60)["failed"]
    late = run_json([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert "ended after 0.5 s" in late["failed"]
