"""How soon a training goes on in its own job when a rank is killed: until the rank is named, and until the next step.

    python -m benchmarks.restart                                a small model on two CPU ranks
    python -m benchmarks.restart --device cuda --layers 4       layers of the 7B on all GPUs, as tensor-parallel ranks

A job as the pipeline runs it: a controller (tasks/jobs/node), its ranks, checkpoints that are hashed, and a store, here
a folder that holds the same files. Some steps after a checkpoint is whole, the last rank is killed with
SIGKILL. The controller names it, starts all ranks again, and they go on from the copy on this disk. A checkpoint is 14
bytes a parameter; --folder has room for four. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from submitit.core.utils import DelayedSubmission
from tqdm import tqdm

from benchmarks.train_step import CONFIGS, report
from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.config import (
    CheckpointsConfig,
    DataConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    StorageConfig,
    load_config,
)
from neox_core.data.indexed import IndexedWriter
from neox_core.planning.memory import parameter_count
from neox_core.train.ends.saving import SAVED_FILE
from neox_core.train.job import TrainJob
from neox_core.train.observe.metrics import METRICS_FILE
from tasks.jobs.node.plan import NodePlan, Restarts
from tasks.jobs.node.report import ControllerReport
from tasks.jobs.rank import RankTask
from tests.gpu.folder_store import FolderStore, jobs_use

INTERVAL, KILLED_AFTER = 10, 4
"""Steps between checkpoints, and from when one is whole until the rank is killed."""
SMALL = {"hidden_size": 512, "head_dim": 64, "num_attention_heads": 8, "num_kv_heads": 8, "intermediate_size": 1376}
SMALL |= {"vocab_size": 4096}
PATIENCE_SECONDS = 900.0
SOURCES = {"random": SourceConfig(weight=1)}


class LinkedFolder(FolderStore):
    """A store of the same disk, whose objects are the files themselves."""

    def put_file(self, path: Path, key: str, on_bytes: Callable[[int], None] | None = None) -> None:
        """Link it."""
        self._link(path, self._folder / key)

    def get_file(self, key: str, path: Path, on_bytes: Callable[[int], None] | None = None) -> None:
        """Link it."""
        self._link(self._folder / key, path)

    @staticmethod
    def _link(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        os.link(source, target)


def train_in_folder(config: RunConfig, job: TrainJob) -> dict[str, Any]:
    """What each rank runs."""
    from neox_core.train.run import train

    with jobs_use(LinkedFolder):
        return train(config, job)


def main() -> None:
    """Run the training, kill its last rank, and print the figures."""
    options = _options()
    ranks = torch.cuda.device_count() if options.device == "cuda" else 2
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="restart-") as temporary:
        folder = Path(temporary)
        config = _config(options, ranks, folder)
        figures = _measure(config, _prepare(config, folder), folder, ranks)
    figures |= {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {os.cpu_count()} cores",
        "ranks": ranks,
        "layers": config.model.num_layers,
        "parameters": parameter_count(config.model),
    }
    report(figures)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="for the files: a local disk")
    return parser.parse_args()


def _config(options: argparse.Namespace, ranks: int, folder: Path) -> RunConfig:
    cuda = options.device == "cuda"
    config = load_config(CONFIGS / ("llemma_7b.yml" if cuda else "toy.yml"))
    length = 4096 if cuda else 32
    train = {
        "steps": 100_000,  # it is ended when all is measured
        "checkpoint_interval": INTERVAL,
        "sequence_length": length,
        "global_batch_tokens": 8 * length,
        "micro_batch_size": 1,
        "precision": "bf16",
        "dry_run": False,
    }
    validation = config.train.validation.model_copy(update={"interval": 1000, "iterations": 1})
    launch = {"nodes": 1, "ranks_per_node": ranks, "device": options.device, "scratch": None, "executor": "local"}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"num_layers": options.layers} | ({} if cuda else SMALL)),
            "train": config.train.model_copy(update=train | {"validation": validation}),
            "parallel": ParallelConfig(tensor=ranks),
            "launch": config.launch.model_copy(update=launch),
            "data": DataConfig(input=config.data.input, sources=SOURCES, max_epochs=1_000_000),
            "storage": StorageConfig(url=f"s3://folder{folder / 'store'}"),
            "checkpoints": CheckpointsConfig(keep_last=1),
            "wandb": config.wandb.model_copy(update={"mode": "disabled"}),
        }
    )


def _prepare(config: RunConfig, folder: Path) -> TrainJob:
    """Random weights and tokens."""
    job = TrainJob(folder / "data", folder / "weights", folder / "train", "a" * 64)
    make_random_base(config.model, folder / "base", seed=1)
    convert(folder / "base", job.weights, config.model, config.parallel)
    (job.data / "random").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        with IndexedWriter(job.data / "random" / split, np.dtype("<u2")) as writer:
            for _ in range(0, 50 * config.train.global_batch_tokens, 1000):
                writer.add_document(generator.integers(config.model.vocab_size, size=1000))
    return job


def _measure(config: RunConfig, job: TrainJob, folder: Path, ranks: int) -> dict[str, Any]:
    submission = folder / "job"
    submission.mkdir()
    restarts = Restarts(1, job.output / SAVED_FILE)
    DelayedSubmission(RankTask(train_in_folder, (config, job), submission, restarts=restarts)).dump(
        submission / "7_submitted.pkl"
    )
    plan = NodePlan(submission, "7", ranks, restarts=restarts, is_told_to_stop=True)
    variables = os.environ | ({} if config.launch.device == "cuda" else {"DS_ACCELERATOR": "cpu"})
    with (submission / "controller.log").open("ab") as log, tqdm(desc="training", unit=" steps") as bar:
        command = [sys.executable, "-m", "tasks.jobs.node.controller", plan.to_json()]
        controller = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
        try:
            return _watch(job, plan, controller, bar)
        except AssertionError as error:
            logs = "\n".join(path.read_text()[-3000:] for path in sorted(submission.glob("*.*[gt]")))
            raise SystemExit(f"{error}\n{logs}") from error
        finally:
            controller.kill()  # its ranks end with it
            controller.wait()


def _watch(job: TrainJob, plan: NodePlan, controller: Any, bar: Any) -> dict[str, Any]:
    def wait(condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (found := condition()):
            if (done := max((row["step"] for row in _rows(job)), default=0)) > bar.n:
                bar.update(done - bar.n)
            assert controller.poll() is None or condition(), f"the job ended before there was {what}"
            assert time.monotonic() < deadline, f"there was not {what} in {PATIENCE_SECONDS:.0f} s"
            time.sleep(0.02)
        return found

    def processes() -> ControllerReport | None:
        return ControllerReport.read(plan.folder)

    assert plan.restarts is not None
    started = time.time()
    saved = wait(plan.restarts.saved_so_far, "a checkpoint")
    since = len(_rows(job))
    before = wait(lambda: len(found := _rows(job)) >= since + KILLED_AFTER and found, "a step")
    ranks = wait(processes, "a report").ranks
    killed = time.time()
    os.kill(ranks[-1].pid, signal.SIGKILL)
    wait(lambda: (found := processes()) and (found.exits or found.restarts), "the rank's name")
    named = time.time()
    going_on = wait(lambda: [row for row in _rows(job) if row["time"] > named], "a step of the next life")[0]
    assert going_on["step"] in range(saved + 1, before[-1]["step"] + 2), f"it goes on with step {going_on['step']}"
    return {
        "first_step_seconds": round(before[0]["time"] - started, 2),
        "step_seconds": round(median(row["time/step"] for row in before if "time/step" in row), 3),
        "killed_after_step": before[-1]["step"],
        "goes_on_with_step": going_on["step"],
        "rank_named_seconds": round(named - killed, 2),
        "next_step_seconds": round(going_on["time"] - killed, 2),
    }


def _rows(job: TrainJob) -> list[dict[str, Any]]:
    """Rows of training steps, repeated ones included, as far as lines are whole."""
    path = job.output / METRICS_FILE
    text = path.read_text() if path.exists() else ""
    return [row for row in map(json.loads, text[: text.rfind("\n") + 1].splitlines()) if "train/loss" in row]


if __name__ == "__main__":
    main()
