"""Trainings that are killed at random moments while their store fails at random times lose nothing.

`make soak`. The seed is printed; SOAK_SEED repeats it, SOAK_KILLS and SOAK_FAULTS say how many of each a training gets.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.manifest import MANIFEST_FILE, checkpoint_step, list_checkpoints
from neox_core.config import DataConfig, ParallelConfig, RunConfig, StorageConfig, ValidationConfig
from neox_core.storage.object_store import ObjectStore
from neox_core.train.identity import training_fingerprint
from neox_core.train.job import TrainJob
from tests.faulty_s3 import faulty_s3
from tests.neox_core.train.small_jobs import SOURCES, rows, write_data
from tests.neox_core.train.small_training import config_for
from tests.soak.faults import RandomFaults
from tests.soak.kills import KillList, random_kills
from tests.soak.training import Lives, run_to_end, still_there

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

SEED = int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(10**6))
KILLS = int(os.environ.get("SOAK_KILLS", "30"))
FAULTS = int(os.environ.get("SOAK_FAULTS", "9"))
LONG, LONG_SECONDS, SHORT_SECONDS = 1, 60.0, (1.0, 4.0)
"""So many of a training's faults last a minute."""
INTERVAL = 2
Layout = tuple[int, int, int]
"""Tensor, pipeline and data parallel."""
LAYOUTS: tuple[Layout, ...] = ((1, 1, 1), (2, 1, 2), (2, 2, 1))
CASES = [(precision, layouts) for precision in ("fp32", "bf16") for layouts in (*((one,) for one in LAYOUTS), LAYOUTS)]
"""Layouts of a training change from job to job, if there are several."""


def named(value: str | tuple[Layout, ...]) -> str:
    """Of a case, as pytest shows it: fp32-212, bf16-changing."""
    if isinstance(value, str):
        return value
    return "changing" if len(value) > 1 else "".join(map(str, value[0]))


@dataclass
class Totals:
    """Over all trainings."""

    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    rows: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def totals() -> Iterator[Totals]:
    """What has happened, said at the end and after each training."""
    found = Totals()
    say(f"\nseed {SEED}: {KILLS} kills and {FAULTS} store faults for each training")
    yield found
    say("", *found.rows)
    say(f"{sum(found.kills.values())} kills: " + counts(found.kills))
    say(f"{sum(found.faults.values())} store faults: " + counts(found.faults))


def say(*lines: str) -> None:
    """On the terminal at once, or in pytest's report."""
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items()))


def config(storage: StorageConfig, precision: str, layout: Layout, scratch: Path, steps: int) -> RunConfig:
    base = config_for("gqa", *layout, precision=precision)
    validation = ValidationConfig(interval=1000, iterations=1)
    values: dict[str, Any] = {"steps": steps, "validation": validation, "checkpoint_interval": INTERVAL}
    train = base.train.model_copy(update=values | {"dry_run": False})
    data = DataConfig.model_validate(
        {"input": str(base.data.input), "sources": {name: {"weight": 1} for name in SOURCES}}
    )
    launch = base.launch.model_copy(update={"scratch": scratch, "hang_timeout_minutes": 0.5, "device": "cpu"})
    wandb = base.wandb.model_copy(update={"mode": "disabled"})
    updates = {"train": train, "data": data, "storage": storage, "wandb": wandb, "launch": launch}
    return base.model_copy(update=updates)


@pytest.mark.parametrize(("precision", "layouts"), CASES, ids=named)
def test_nothing_is_lost(
    precision: str, layouts: tuple[Layout, ...], storage_config: StorageConfig, tmp_path: Path, totals: Totals
) -> None:
    generator = random.Random(f"{SEED}-{precision}-{layouts}")
    steps = INTERVAL * (KILLS + 4)
    scratch = tmp_path / "scratch"
    configs = [config(storage_config, precision, layout, scratch, steps) for layout in layouts]
    job = prepare(configs[0], tmp_path)
    world_size = min(run.launch.world_size for run in configs)
    kills = KillList(tmp_path / "soaked" / "kills")
    kills.write(random_kills(generator, KILLS, world_size, hangs=world_size > 1))
    lengths = [generator.uniform(*SHORT_SECONDS) for _ in range(FAULTS)]
    for place in generator.sample(range(FAULTS), min(LONG, FAULTS)):
        lengths[place] = LONG_SECONDS

    whole = undisturbed(configs[0], tmp_path)
    started = time.monotonic()
    with faulty_s3(str(storage_config.endpoint_url)) as proxy:
        behind = storage_config.model_copy(update={"endpoint_url": proxy.url})
        runs = [run.model_copy(update={"storage": behind}) for run in configs]
        faults = RandomFaults(proxy, generator, lengths)
        with faults.happening():
            lives = run_to_end(runs, job, tmp_path / "soaked", kills)
    happened = Counter(f"{kill.who} in {kill.moment}" for kill in kills.done())
    totals.kills += happened
    totals.faults += faults.met
    totals.rows.append(
        f"{precision} {'changing' if len(layouts) > 1 else layouts[0]}: {len(kills.done())} kills, "
        f"{sum(faults.met.values())} faults, {len(lives.jobs)} jobs, {lives.restarts} restarts in place, "
        f"{len(lives.reasons)} jobs given up, {time.monotonic() - started:.0f} s"
    )
    say(totals.rows[-1], counts(happened), counts(faults.met), *lives.reasons)
    check_losses(rows(whole), rows(job), exact=len(layouts) == 1, precision=precision)
    check_left(ObjectStore(storage_config), job, lives, scratch, tmp_path, steps)


def prepare(run: RunConfig, folder: Path) -> TrainJob:
    """Shards for tensor parallelism of two; another one cuts them anew."""
    make_random_base(run.model, folder / "base", seed=7)
    convert(folder / "base", folder / "shards", run.model, ParallelConfig(tensor=2))
    write_data(folder / "data")
    return TrainJob(folder / "data", folder / "shards", folder / "output", training_fingerprint(run, "d", "w"))


def undisturbed(run: RunConfig, folder: Path) -> TrainJob:
    """The same training without kills and faults, elsewhere in the store."""
    storage = run.storage.model_copy(update={"url": f"{run.storage.url}/whole"})
    launch = run.launch.model_copy(update={"scratch": folder / "whole-scratch"})
    alone = run.model_copy(update={"storage": storage, "launch": launch})
    job = TrainJob(folder / "data", folder / "shards", folder / "whole", training_fingerprint(run, "d", "w"))
    kills = KillList(folder / "alone" / "kills")
    kills.write([])
    assert run_to_end([alone], job, folder / "alone", kills).jobs == [0]
    return job


def check_losses(whole: dict[int, Any], found: dict[int, Any], exact: bool, precision: str) -> None:
    assert sorted(found) == sorted(whole)
    for name in ("train/sequences_consumed", "train/lr"):
        assert [found[step][name] for step in whole] == [row[name] for row in whole.values()]
    tolerance = 0.0 if exact else 1e-6 if precision == "fp32" else 5e-3
    for name, times in (("train/loss", 1), ("train/gradient_norm", 10)):
        values = [found[step][name] for step in whole], [row[name] for row in whole.values()]
        np.testing.assert_allclose(*values, rtol=times * tolerance)


def check_left(store: ObjectStore, job: TrainJob, lives: Lives, scratch: Path, folder: Path, steps: int) -> None:
    """Of processes, files and objects."""
    assert still_there(lives.processes, str(folder)) == []
    assert [path for path in scratch.rglob("*") if path.is_file()] == []
    assert [path for path in job.output.rglob("*") if ".tmp" in path.name or "checkpoints" in path.parts] == []
    assert list_checkpoints(store, job.prefix)[-1].step == steps
    names = [info.key.removeprefix(f"{job.prefix}/").split("/") for info in store.list(f"{job.prefix}/")]
    folders = {parts[0] for parts in names if checkpoint_step(parts[0]) is not None}
    assert folders == {parts[0] for parts in names if parts[-1] == MANIFEST_FILE}
    assert {parts[0] for parts in names if len(parts) == 1} == {"lease.json", "metrics.jsonl"}
    answer = store._client.list_multipart_uploads(Bucket=store.bucket)
    assert answer.get("Uploads", []) == []
