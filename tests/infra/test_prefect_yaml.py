"""prefect.yaml promises what the flows can keep."""

from __future__ import annotations

import importlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow

from flows.flow_runs.cancellation import cancel_jobs_of_run
from flows.flow_runs.deployed import cancel_stages
from neox_core.config import load_config
from tests.paths import ROOT

ALL: list[dict[str, Any]] = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
DEPLOYMENTS, (WATCH,) = [it for it in ALL if it["tags"] == ["llemma"]], [it for it in ALL if it["tags"] == ["watch"]]
FLOWS = ("llemma-pretrain", "prepare-data", "convert", "train", "evaluate", "export")
CONFIGS = {"toy": "toy", "7b": "llemma_7b", "34b": "llemma_34b"}


def flow_of(deployment: dict[str, Any]) -> Flow[Any, Any]:
    path, name = deployment["entrypoint"].split(":")
    assert (ROOT / path).is_file()
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    assert isinstance(flow, Flow)
    return flow


def test_every_flow_is_deployed_at_every_size() -> None:
    names = [f"{flow_of(deployment).name}/{deployment['name']}" for deployment in DEPLOYMENTS]
    assert sorted(names) == sorted(f"{flow}/{size}" for flow in FLOWS for size in CONFIGS)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda it: f"{Path(it['entrypoint']).stem[:-3]}/{it['name']}")
def test_a_deployment_runs_its_flow_on_its_config(deployment: dict[str, Any]) -> None:
    assert set(deployment) == {"name", "entrypoint", "parameters", "work_pool", "tags"}
    assert (deployment["work_pool"], deployment["tags"]) == ({"name": "llemma"}, ["llemma"])
    config = f"configs/{CONFIGS[deployment['name']]}.yml"
    given = flow_of(deployment).validate_parameters(deployment["parameters"])
    plan = {"start_at": "prepare-data", "stop_after": "export"} if flow_of(deployment).name == "llemma-pretrain" else {}
    assert given == {"config": config, "overrides": None, "force": False, **plan}
    assert load_config(ROOT / config).name == CONFIGS[deployment["name"]]


@pytest.mark.parametrize("deployment", DEPLOYMENTS[::3], ids=lambda deployment: deployment["entrypoint"].split(":")[1])
def test_cancelling_a_flow_that_submits_jobs_cancels_them(deployment: dict[str, Any]) -> None:
    flow = flow_of(deployment)
    submits = flow.name in ("llemma-pretrain", "prepare-data", "train", "evaluate")
    parents = [cancel_stages] if flow.name == "llemma-pretrain" else []
    hooks = [*parents, *([cancel_jobs_of_run] if submits else [])]
    assert flow.on_cancellation_hooks == hooks


def test_the_environment_is_found_from_anywhere_and_keeps_what_is_set(tmp_path: Path) -> None:
    def source(shell: str, **environment: str) -> dict[str, str]:
        command = [shell, "-euc", f'. "{ROOT}/infra/prefect/env.sh"; env']
        clean = {"PATH": os.environ["PATH"], "PREFECT_HOME": str(tmp_path / "a" / "home"), **environment}
        answer = subprocess.run(command, env=clean, cwd=tmp_path, capture_output=True, text=True, check=True)
        return dict(line.split("=", 1) for line in answer.stdout.splitlines() if "=" in line)

    default = source("bash")
    assert default["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert default["PATH"].startswith(f"{ROOT}/.venv/bin:")
    assert (default["PREFECT_SERVER_ANALYTICS_ENABLED"], default["DO_NOT_TRACK"]) == ("false", "1")
    assert (tmp_path / "a" / "home").is_dir()
    assert source("bash", PREFECT_SERVER_API_PORT="4300")["PREFECT_API_URL"] == "http://127.0.0.1:4300/api"
    assert source("bash", PREFECT_API_URL="http://other/api")["PREFECT_API_URL"] == "http://other/api"


def test_one_watcher_at_a_time_looks_each_minute() -> None:
    assert flow_of(WATCH).name == "watch"
    assert (WATCH["work_pool"], WATCH["schedules"]) == ({"name": "llemma"}, [{"interval": 60}])
    assert WATCH["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert flow_of(WATCH).validate_parameters({}) == {"grace_seconds": 90.0}


@pytest.mark.parametrize("deployment", [*DEPLOYMENTS[::3], WATCH], ids=lambda it: it["entrypoint"].split(":")[1])
def test_every_parameter_is_described_in_the_form(deployment: dict[str, Any]) -> None:
    properties = flow_of(deployment).parameters.properties
    assert {name for name, field in properties.items() if not field.get("description")} == set()
