"""What people do in Prefect's pages, done in Chromium: the chain on SLURM, a killed job, Retry, overrides, Cancel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import waiting
from tests.e2e.runs import Run, copy_text, write_run
from tests.infra.test_prefect_deployments import Prefect

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'")

from tests.browser.pages import PrefectPages, chromium  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.slurm, pytest.mark.timeout(6000)]

PATIENCE_SECONDS = 1800.0

ENDLESS = {"steps": 100_000, "checkpoint_interval": 100_000, "validation": {"interval": 100_000}}
"""A training that does not end by itself."""

wait_for = partial(waiting.wait_for, seconds=PATIENCE_SECONDS, pause=1.0)


@pytest.fixture(scope="module")
def pages(prefect_on_slurm: Prefect, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectPages]:
    program = chromium()
    if program is None:
        pytest.skip("there is no Chromium: apt-get install chromium, or name one in CHROMIUM")
    shots = Path(os.environ.get("LLEMMA_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    shots.mkdir(parents=True, exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        yield PrefectPages(page, f"http://127.0.0.1:{prefect_on_slurm.port}", shots)
        browser.close()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Run]:
    """Makes a run of the small configuration, on SLURM, of which no failed job restarts by itself."""

    def write(**changes: Any) -> Run:
        copy_text(tmp_path)
        launch = {"executor": "slurm", "max_restarts": 0, "restarts_in_place": 0, "slurm_parameters": {"mem": "4G"}}
        return Run(write_run(tmp_path, {"launch": launch} | changes))

    return write


def deployment(prefect: Prefect, name: str) -> str:
    """The id of flow/deployment."""
    flow, _, wanted = name.partition("/")
    (found,) = prefect.find("flows", flows={"name": {"any_": [flow]}})
    (entry,) = prefect.find(
        "deployments", deployments={"name": {"any_": [wanted]}}, flows={"id": {"any_": [found["id"]]}}
    )
    return str(entry["id"])


def newest(prefect: Prefect, run: Run, flow: str) -> dict[str, Any]:
    """The newest flow run of a flow; empty before there is one."""
    found = [
        entry
        for entry in prefect.find("flow_runs", flows={"name": {"any_": [flow]}})
        if entry["parameters"].get("config") == str(run.path)
    ]
    return found[-1] if found else {}


def has_ended(prefect: Prefect, run: Run, flow: str, state: str) -> bool:
    """Whether it has come to that state.

    Raises:
        AssertionError: it has ended otherwise.
    """
    found = newest(prefect, run, flow)
    kind = found["state_type"] if found else ""
    assert kind == state or kind not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"), found["state"]["message"]
    return bool(kind == state)


def rank_process(run: Run, rank: int) -> psutil.Process | None:
    """A rank of the training job that runs."""
    (attempt,) = run.attempts("train")[-1:]
    for process in psutil.process_iter():
        try:
            ours = str(attempt) in process.cmdline() and process.name().startswith("python")
            if ours and process.environ().get("SUBMITIT_LOCAL_GLOBALID") == str(rank):
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return None


def test_the_chain_survives_a_killed_job(
    prefect_on_slurm: Prefect, pages: PrefectPages, write: Callable[..., Run]
) -> None:
    train_settings = {"steps": 24, "checkpoint_interval": 6, "validation": {"interval": 6}}
    prefect, run = prefect_on_slurm, write(train=train_settings)
    pages.start(deployment(prefect, "llemma-pretrain/toy"), run.path, shot="form")
    wait_for(lambda: list(run.workdir.glob("scratch/train-*/metrics.jsonl")))
    metrics = next(run.workdir.glob("scratch/train-*/metrics.jsonl"))
    wait_for(lambda: '"step": 8,' in metrics.read_text())  # the checkpoint of step 6 is under way
    victim = rank_process(run, 1)
    assert victim is not None
    victim.suspend()  # the training must not end while the page is looked at
    train = newest(prefect, run, "train")
    pages.open_run(train["id"], "Artifacts")
    pages.shows("train-progress")
    pages.shoot("training")
    victim.kill()

    wait_for(lambda: has_ended(prefect, run, "train", "FAILED"))
    wait_for(lambda: has_ended(prefect, run, "llemma-pretrain", "FAILED"))
    pages.open_run(train["id"])
    pages.shows("rank 1 first: .*[Kk]illed")
    pages.shoot("failed")
    pages.act("Retry", shot="retry")
    wait_for(lambda: newest(prefect, run, "train")["state_type"] not in ("FAILED",))
    wait_for(lambda: has_ended(prefect, run, "train", "COMPLETED"))

    chain = newest(prefect, run, "llemma-pretrain")
    pages.open_run(chain["id"])
    pages.act("Retry")
    wait_for(lambda: newest(prefect, run, "llemma-pretrain")["state_type"] not in ("FAILED",))
    wait_for(lambda: has_ended(prefect, run, "llemma-pretrain", "COMPLETED"))
    counts = {
        flow: newest(prefect, run, flow)["run_count"] for flow in ("prepare-data", "convert", "train", "evaluate")
    }
    assert counts == {"prepare-data": 1, "convert": 1, "train": 2, "evaluate": 2}
    assert newest(prefect, run, "train")["id"] == train["id"]
    pages.open_run(chain["id"], "Artifacts")
    pages.shows("llemma-pretrain-small")
    pages.shoot("completed")
    steps = [row["step"] for row in run.rows() if "train/loss" in row]
    assert steps[-1] == 24
    assert steps.count(1) == 1  # the second job went on from a checkpoint


def test_a_stage_from_its_form_with_an_override_then_from_there_on(
    prefect_on_slurm: Prefect, pages: PrefectPages, write: Callable[..., Run]
) -> None:
    prefect, run = prefect_on_slurm, write()
    pages.start(deployment(prefect, "convert/toy"), run.path)
    wait_for(lambda: has_ended(prefect, run, "convert", "COMPLETED"))
    pages.start(deployment(prefect, "prepare-data/toy"), run.path, overrides=["data.worker=1"])
    wait_for(lambda: has_ended(prefect, run, "prepare-data", "FAILED"))
    pages.open_run(newest(prefect, run, "prepare-data")["id"])
    pages.shows("did you mean .*workers")
    pages.start(deployment(prefect, "prepare-data/toy"), run.path)
    wait_for(lambda: newest(prefect, run, "prepare-data")["state_type"] == "COMPLETED")

    chain = deployment(prefect, "llemma-pretrain/toy")
    choices = {"start_at": "train", "stop_after": "train"}
    pages.start(chain, run.path, overrides=["train.steps=4"], choices=choices, shot="start-at")
    wait_for(lambda: has_ended(prefect, run, "llemma-pretrain", "COMPLETED"))
    assert newest(prefect, run, "train")["parameters"]["overrides"] == ["train.steps=4"]
    assert not newest(prefect, run, "evaluate")
    assert [row["step"] for row in run.rows() if "train/loss" in row][-1] == 4


def test_cancel_reaches_the_job(prefect_on_slurm: Prefect, pages: PrefectPages, write: Callable[..., Run]) -> None:
    prefect, run = prefect_on_slurm, write(train=ENDLESS, data={"max_epochs": 1_000_000})
    pages.start(deployment(prefect, "llemma-pretrain/toy"), run.path, choices={"stop_after": "train"})
    wait_for(lambda: list(run.workdir.glob("scratch/train-*/metrics.jsonl")))
    train = newest(prefect, run, "train")
    pages.open_run(train["id"])
    pages.act("Cancel", shot="cancel")
    wait_for(lambda: has_ended(prefect, run, "train", "CANCELLED"))
    wait_for(lambda: not run.processes())
    pages.open_run(train["id"])
    pages.shows("Cancelled")
