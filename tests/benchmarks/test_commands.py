"""What a benchmark refuses before it begins, and that what it began ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import families, node, peers, torchtitan_step, train_step
from benchmarks.commands import ROOT, run_json, torchrun
from neox_core.planning.hardware import CARDS
from tests.processes import is_running
from tests.waiting import wait_for

AS_TORCHRUN = """
import os, pathlib, signal, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
def end(*_):
    rank.kill()
    os._exit(1)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1]).write_text(str(rank.pid))
rank.wait()
"""
"""A rank in a session of its own, which ends when this is asked to."""


def written(pid: Path) -> bool:
    return pid.exists() and bool(pid.read_text())


def test_ranks_end_with_the_command_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = tmp_path / "pid"

    class Begun(subprocess.Popen[str]):
        """Its time begins when it has started its rank."""

        def communicate(self, *args: Any, **options: Any) -> tuple[str, str]:
            wait_for(lambda: written(pid), 300)
            return super().communicate(*args, **options)

    monkeypatch.setattr("benchmarks.commands.subprocess.Popen", Begun)
    found = run_json([sys.executable, "-c", AS_TORCHRUN, str(pid)], 0.5)
    assert "ended after 0.5 s" in found["failed"]
    wait_for(lambda: not is_running(int(pid.read_text())), 60)


def test_a_row_says_what_its_ranks_said() -> None:
    command = torchrun(2, "benchmarks.train_step", "tiny", "--tokens", "6000", "--sequence-length", "4096")
    line, *printed = run_json(command)["failed"].splitlines()
    assert "12000 is not divisible by train.sequence_length 4096" in line
    assert "exit code 1; rank" in line
    assert not any("Root Cause" in other for other in printed)


def test_the_first_error_is_that_of_a_rank() -> None:
    written = (
        "W1 torch/distributed/run.py:852] one thread each\n"
        "[rank3]: torch.OutOfMemoryError: CUDA out of memory\n"
        "ValueError: later\n"
        "W1 torch/distributed/elastic/multiprocessing/api.py:998] process 7 closing signal SIGTERM\n"
        "E1 torch/distributed/elastic/multiprocessing/api.py:987] failed (exitcode: -9) local_rank: 3 (pid: 8)\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
    )
    program = "import sys; sys.stderr.write(sys.argv[1]); print('{no JSON}'); sys.exit(1)"
    failed = run_json([sys.executable, "-c", program, written])["failed"]
    assert failed.startswith("exit code 1; rank 3's is -9, [rank3]: torch.OutOfMemoryError: CUDA out of memory\n")
    assert failed.endswith("ValueError: later")


def test_output_that_is_no_text_spoils_nothing() -> None:
    program = r"import sys; sys.stdout.buffer.write(b'\xff\n{\"rate\": 2}\n')"
    assert run_json([sys.executable, "-c", program]) == {"rate": 2}


def test_ranks_end_with_a_benchmark_that_is_ended(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = (
        f"from benchmarks.commands import run_json; run_json([{sys.executable!r}, '-c', {AS_TORCHRUN!r}, {str(pid)!r}])"
    )
    benchmark = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    wait_for(lambda: written(pid), 300)
    os.kill(benchmark.pid, signal.SIGTERM)
    benchmark.wait()
    wait_for(lambda: not is_running(int(pid.read_text())), 60)


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (train_step.main, ["7b"], "start it with torchrun"),
        (torchtitan_step.main, ["7b"], "start it with torchrun"),
        (train_step.main, ["7b", "--steps", "2"], "2 is not a whole number from 3 on"),
        (train_step.main, ["7b", "--layers", "0"], "0 is not a whole number from 1 on"),
        (peers.main, ["7b", "--micro-batch", "3"], "3 does not divide the 16 sequences"),
        (peers.main, ["7b", "--gpus", "-1"], "-1 is not a whole number from 1 on"),
        (peers.main, ["34b-slice", "--gpus", "2"], "34b-slice needs 2 GPUs here, and torch finds 0"),
        (families.main, [], "7b needs 1 GPU here, and torch finds 0"),
        (node.main, ["rows.jsonl"], "7b needs 1 GPU here, and torch finds 0"),
        (node.main, ["missing/rows.jsonl", "--toy"], "must be a file, in a folder that is there"),
        (node.main, ["rows.jsonl", "--minutes", "nan"], "nan is not a number above 0"),
        (node.main, ["rows.jsonl", "--minutes", "inf"], "inf is not a number above 0"),
        (node.main, ["rows.jsonl", "--minutes", "0"], "0 is not a number above 0"),
        (node.main, ["rows.jsonl", "--minutes", "long"], "long is not a number above 0"),
        (node.main, ["rows.jsonl", "--table"], "rows.hardware.json, the node's figures, is missing"),
        (node.main, ["list.jsonl", "--toy"], "a line that is no row of this benchmark: [1]"),
        (node.main, ["keys.jsonl", "--toy"], 'a line that is no row of this benchmark: {"key": ["a"]}'),
        (
            node.main,
            ["moved.jsonl", "--toy"],
            "moved.jsonl holds a row of NVIDIA H200 (b), and the figures here are of cpu",
        ),
        (
            node.main,
            ["other.jsonl", "--table"],
            "other.jsonl holds a row of NVIDIA H200 (b), and the figures here are of h100",
        ),
        (
            node.main,
            ["other.jsonl", "--toy"],
            "other.hardware.json is of h100, and this node has cpu: give another file",
        ),
        (node.main, ["cut.jsonl", "--toy"], "without this file, the same command measures them again"),
        (node.main, ["linked.jsonl", "--toy"], "linked.jsonl cannot be written (No such file or directory)"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(
    main: object,
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["benchmark", *words])
    Path("list.jsonl").write_text("[1]\n")
    Path("keys.jsonl").write_text('{"key": ["a"]}\n')
    for name in ("moved", "other"):
        Path(f"{name}.jsonl").write_text('{"key": "a", "failed": "no"}\n{"key": "b", "device": "NVIDIA H200"}\n')
    CARDS["h100"].save(Path("other.hardware.json"))
    Path("cut.hardware.json").write_text('{"name": "cp')
    Path("linked.jsonl").symlink_to("missing/rows.jsonl")
    assert callable(main)
    with pytest.raises(SystemExit) as ended:
        main()
    assert message in f"{ended.value.code} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("words", "ranks", "message"),
    [
        (["7b", "--tp", "3"], 3, "parallel.tensor 3 does not divide model.num_attention_heads 32"),
        (["7b", "--tp", "2"], 3, "does not divide"),
        (["7b", "--tokens", "6000"], 1, "6000 is not divisible by train.sequence_length 4096"),
        (["7b", "--pp", "4", "--layers", "2"], 4, "parallel.pipeline 4 exceeds model.num_layers 2"),
        (["7b", "--tokens", "12288", "--micro-batch", "2"], 2, "3 micro batches are not the same number on each of 2"),
    ],
)
def test_a_step_that_cannot_be_run_is_refused(words: list[str], ranks: int, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        train_step.checked(train_step.run_config(train_step.parse_options(words), ranks))
