"""`python -m neox_core.train`: training without Prefect, submitit or flows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.s3.service import storage_service
from neox_core.checkpoint.manifest import checkpoint_key, list_checkpoints, object_key
from neox_core.progress import silent
from neox_core.storage.object_store import ObjectStore
from tasks.convert import convert
from tests.e2e.conftest import Chain
from tests.e2e.runs import INTERVAL, STEPS, Run, training_values, write_run

pytestmark = pytest.mark.e2e

ALONE = ["-m", "neox_core.train"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *ALONE]


def start(arguments: list[str], path: Path, data: Path, weights: Path, output: Path) -> Any:
    folders = ["--data", str(data), "--weights", str(weights), "--output", str(output)]
    command = [sys.executable, *arguments, str(path), *folders]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def served(copied: Callable[..., Run]) -> Iterator[tuple[Run, ObjectStore]]:
    """A copy of the finished chain's store and artifacts, and a server for it."""
    run = copied(".current", "prepare-data-*", "convert-*", "s3")
    with storage_service(run.config.storage, run.workdir) as storage:
        yield run, ObjectStore(storage)


def served_config(run: Run, store: ObjectStore, changes: dict[str, Any]) -> Path:
    """The run's configuration with the server's address in place of 'embedded', in a file of its own."""
    source = run.config
    paths = {"data": {"input": str(source.data.input)}, "base_model": {"path": str(source.base_model.path)}}
    return write_run(run.path.parent / "alone", paths | {"storage": {"endpoint_url": store.endpoint}} | changes)


def test_under_torchrun_it_resumes_the_checkpoints_of_the_flow(
    chain: Chain, served: tuple[Run, ObjectStore], tmp_path: Path
) -> None:
    run, store = served
    prefix = chain.run.stage_folder("train").name
    store.delete([info.key for info in store.list(object_key(prefix, checkpoint_key(STEPS), ""))])
    path = served_config(run, store, {})
    data, weights = run.stage_folder("prepare-data"), run.stage_folder("convert")
    ended = start(TORCHRUN, path, data, weights, tmp_path / "output")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["started_from_step"] == INTERVAL
    assert [manifest.step for manifest in list_checkpoints(store, prefix)] == [INTERVAL, STEPS]
    rows = [json.loads(line) for line in (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()]
    assert training_values(rows[len(chain.run.rows()) :], 0) == training_values(chain.run.rows(), INTERVAL + 1)


@pytest.mark.slow
def test_torchrun_that_is_told_to_stop_goes_on_where_it_was(
    chain: Chain, copied: Callable[..., Run], tmp_path: Path
) -> None:
    run = copied(".current", "prepare-data-*", "convert-*")
    data, weights = run.stage_folder("prepare-data"), run.stage_folder("convert")
    metrics = tmp_path / "output" / "metrics.jsonl"
    with storage_service(run.config.storage, run.workdir) as storage:
        path = served_config(run, ObjectStore(storage), {})
        folders = ["--data", str(data), "--weights", str(weights), "--output", str(tmp_path / "output")]
        with (tmp_path / "log").open("wb") as log:
            agent = subprocess.Popen([sys.executable, *TORCHRUN, str(path), *folders], stdout=log, stderr=log)
        while agent.poll() is None and not (metrics.is_file() and "train/loss" in metrics.read_text()):
            time.sleep(0.02)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(400) != 0
        assert "which is saved: rank" in (tmp_path / "log").read_text()
        stopped_after = json.loads(metrics.read_text().splitlines()[-1])["step"]
        assert stopped_after < STEPS
        ended = start(TORCHRUN, path, data, weights, tmp_path / "output")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["started_from_step"] == stopped_after
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert training_values(rows, 0) == training_values(chain.run.rows(), 0)


def test_one_process_is_one_rank(chain: Chain, served: tuple[Run, ObjectStore], tmp_path: Path) -> None:
    run, store = served
    changes = {
        "parallel": {"tensor": 1},
        "launch": {"ranks_per_node": 1},
        "train": {"precision": "fp32", "steps": 2, "schedule": {"decay_steps": STEPS}},
    }
    path = served_config(run, store, changes)
    weights = convert(Run(path).config, silent).artifact.folder
    ended = start(ALONE, path, run.stage_folder("prepare-data"), weights, tmp_path / "output")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["started_from_step"] == 0
    rows = [json.loads(line) for line in (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    # The same data, recipe and weights as the chain's two bf16 ranks, which round.
    expected = [row["train/loss"] for row in chain.run.rows() if "train/loss" in row]
    assert losses == pytest.approx(expected[:2], rel=2e-3)


@pytest.mark.parametrize(
    ("endpoint", "swap", "message"),
    [
        ("embedded", False, "storage.endpoint_url is 'embedded', a server that only the flows start"),
        ("http://127.0.0.1:1", True, "holds the artifact of stage convert, not of prepare-data: give its folder"),
    ],
)
def test_errors_are_one_line(
    chain: Chain, copied: Callable[..., Run], tmp_path: Path, endpoint: str, swap: bool, message: str
) -> None:
    run = copied(".current", "prepare-data-*", "convert-*")
    path = write_run(tmp_path / "alone", {"storage": {"endpoint_url": endpoint}})
    folders = [run.stage_folder("prepare-data"), run.stage_folder("convert")]
    data, weights = reversed(folders) if swap else folders
    ended = start(ALONE, path, data, weights, tmp_path / "output")
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
