"""A chain on SLURM, with Prefect's server, worker and watcher, comes to its end by itself whoever meets kill -9.

`make soak`, as root. SOAK_MINUTES says how long the training would take undisturbed; a kill comes every two minutes.
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from neox_core.train.observe.metrics import METRICS_FILE
from neox_core.train.observe.rows import read_metrics
from tests.e2e.runs import Run, copy_text, write_run
from tests.infra.test_prefect_deployments import Prefect, serving
from tests.soak.chain_kills import ChainKills, sbatch_that_kills, training_jobs, wait_for
from tests.soak.test_soak import SEED, say

pytestmark = [pytest.mark.soak, pytest.mark.slurm, pytest.mark.timeout(0)]

MINUTES = float(os.environ.get("SOAK_MINUTES", "60"))
PAUSE_SECONDS = 120.0
PACE_STEPS = 20
INTERVAL = 20
TRAIN = {"checkpoint_interval": INTERVAL, "validation": {"interval": 5 * INTERVAL}}
CHAIN_FLOWS = ("llemma-pretrain", "prepare-data", "convert", "train", "evaluate", "export")


@dataclass
class Seen:
    """What a look at SLURM, twice a second, has found."""

    jobs: set[str] = field(default_factory=set)
    """SLURM's numbers of all trainings."""
    most_at_once: int = 0


@pytest.fixture
def chain(slurm: Path, tmp_path: Path) -> Iterator[ChainKills]:
    """A chain that could begin, whose training takes MINUTES at the pace that it has here without SLURM."""
    for folder in (tmp_path, tmp_path / "pace"):
        copy_text(folder)
    (tmp_path / "prefect").mkdir()
    launch = {"executor": "slurm", "max_restarts": 5, "slurm_parameters": {"mem": "4G"}}
    settings = {"data": {"max_epochs": 1_000_000}, "launch": launch}
    with sbatch_that_kills(tmp_path / "bin") as told, serving(tmp_path / "prefect") as prefect:
        seconds = pace(prefect, write_run(tmp_path / "pace", settings | {"train": TRAIN}))
        steps = max(10 * INTERVAL, round(60 * MINUTES / seconds / INTERVAL) * INTERVAL)
        say(f"\n{steps} steps of {seconds:.2f} s")
        config = write_run(tmp_path, settings | {"train": TRAIN | {"steps": steps, "dry_run": False}})
        yield ChainKills(prefect, Run(config), slurm, told)


def pace(prefect: Prefect, config: Path) -> float:
    """Seconds that a step takes, of a short training without SLURM."""
    words = (f"train.steps={PACE_STEPS}", "launch.executor=local", "train.dry_run=false")
    prefect.llemma("run", str(config), "prepare-data", "convert", "train", *(f"--set={word}" for word in words))
    rows = read_metrics(Run(config).stage_folder("train") / METRICS_FILE)
    return statistics.median(row["time/step"] for row in rows if "time/step" in row)


def test_ten_points(chain: ChainKills) -> None:
    points: dict[str, Callable[[], None]] = {
        "before sbatch": partial(chain.at_sbatch, "before"),
        "between sbatch and its answer": partial(chain.at_sbatch, "between"),
        "after sbatch": partial(chain.engine, "train"),
        "the chain's flow": partial(chain.engine, "llemma-pretrain"),
        "the worker": partial(chain.service, "worker"),
        "the server": partial(chain.service, "server"),
        "the watcher": chain.watcher,
        "the controller": chain.controller,
        "a rank": partial(chain.rank, 1),
        "the node": chain.node,
    }
    with watched() as seen, running(chain):
        for point, (name, kill) in enumerate(points.items()):
            killed(chain, name, kill, waits=point >= 2)  # of the first two, each ends the way to the first step
    check(chain, seen)


def test_an_hour_of_random_kills(chain: ChainKills) -> None:
    generator, kills = random.Random(f"{SEED}-chain"), Counter[str]()
    victims: dict[str, Callable[[], None]] = {
        "chain's flow": partial(chain.engine, "llemma-pretrain"),
        "train's flow": partial(chain.engine, "train"),
        "worker": partial(chain.service, "worker"),
        "server": partial(chain.service, "server"),
        "watcher": chain.watcher,
        "controller": chain.controller,
        "rank 0": partial(chain.rank, 0),
        "rank 1": partial(chain.rank, 1),
        "node": chain.node,
    }
    with watched() as seen, running(chain):
        wait_for(chain.step)
        started = time.monotonic()
        while time.monotonic() - started < 60 * MINUTES and chain.step() < chain.run.config.train.steps:
            name = generator.choice(list(victims))
            killed(chain, name, victims[name], waits=False)
            kills[name] += 1
            time.sleep(PAUSE_SECONDS)
    check(chain, seen)
    say(f"seed {SEED}: {sum(kills.values())} kills: {', '.join(f'{count} {name}' for name, count in kills.items())}")


def killed(chain: ChainKills, name: str, kill: Callable[[], None], waits: bool) -> None:
    """Kill, and if `waits`, look on until the chain goes on."""
    kill()
    since, started = chain.step(), time.monotonic()
    say(f"killed: {name}, at step {since}")
    if waits:
        wait_for(lambda: chain.goes_on(since))
        say(f"goes on after {time.monotonic() - started:.0f} s")


def has_ended(chain: ChainKills) -> bool:
    return chain.state() in ("COMPLETED", "FAILED", "CANCELLED")


@contextmanager
def running(chain: ChainKills) -> Iterator[None]:
    """Start the chain, and at the end wait for its."""
    started = chain.prefect.run("deployment", "run", "llemma-pretrain/toy", "--param", f"config={chain.run.path}")
    assert started.returncode == 0, started.stderr
    yield
    wait_for(lambda: has_ended(chain), seconds=7200)


@contextmanager
def watched() -> Iterator[Seen]:
    """Look at SLURM while the block lasts."""
    seen, over = Seen(), threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            jobs = training_jobs()
            seen.jobs |= set(jobs)
            seen.most_at_once = max(seen.most_at_once, len(jobs))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def check(chain: ChainKills, seen: Seen) -> None:
    """The chain has completed; each step was done, with the same loss if again; never were two jobs at work, and
    nothing is left."""
    states = {flow: state["type"] for flow, state in chain.prefect.runs(chain.run.path).items()}
    assert states == dict.fromkeys(CHAIN_FLOWS, "COMPLETED")
    rows = [row for row in chain.run.rows() if "train/loss" in row]
    steps = chain.run.config.train.steps
    useful = steps * statistics.median(row["time/step"] for row in rows if "time/step" in row)
    whole = rows[-1]["time"] - rows[0]["time"]
    say(
        f"{len(seen.jobs)} SLURM jobs, {len(chain.run.attempts('train'))} submissions with work; {len(rows) - steps} "
        f"of {steps} steps were done again; {useful:.0f} s of steps in {whole:.0f} s: {useful / whole:.0%}"
    )
    losses: dict[int, set[float]] = {}
    for row in rows:
        losses.setdefault(row["step"], set()).add(row["train/loss"])
    assert sorted(losses) == list(range(1, steps + 1))
    assert [step for step, found in losses.items() if len(found) > 1] == []
    assert seen.most_at_once == 1
    wait_for(lambda: not chain.run.processes(), seconds=60)
