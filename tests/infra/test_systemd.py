"""The units for a login node start what `llemma up` starts."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from pathlib import Path

import pytest

from infra.prefect.services import COMMAND, DEPLOY, SERVER, SERVICES, WORKER
from tests.paths import ROOT

UNITS = sorted((ROOT / "infra" / "systemd").glob("*.service"))
PLACE = "/opt/llemma-pretrain"


def lines(unit: str, key: str) -> list[str]:
    text = (ROOT / "infra" / "systemd" / f"llemma-{unit}.service").read_text()
    found = [line.removeprefix(f"{key}=") for line in text.splitlines() if line.startswith(f"{key}=")]
    return [line.replace(PLACE, str(ROOT)) for line in found]


@pytest.mark.parametrize("service", [SERVER, WORKER])
def test_a_unit_runs_the_same_command(service: str) -> None:
    assert lines(service, "ExecStart") == [" ".join(SERVICES[service])]
    assert lines(service, "WorkingDirectory") == [str(ROOT)]
    assert lines(service, "Restart") == ["always"]


def test_the_worker_has_everything_deployed_first() -> None:
    assert lines(WORKER, "ExecStartPre") == [" ".join(command) for command in DEPLOY]
    assert Path(COMMAND).stat().st_mode & 0o111


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    assert len(UNITS) == 2
    for unit in UNITS:
        text = unit.read_text().replace(PLACE, str(ROOT)).replace("User=llemma", f"User={getpass.getuser()}")
        (tmp_path / unit.name).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", *(tmp_path / unit.name for unit in UNITS)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    ours = [line for line in checked.stderr.splitlines() if "llemma" in line]
    assert (checked.returncode, ours) == (0, [])
