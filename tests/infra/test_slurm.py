"""infra/slurm/up and down: safe to run again, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest

from infra.processes import ProcessRecord
from tests.paths import ROOT
from tests.waiting import wait_for

UP = ROOT / "infra" / "slurm" / "up"


def processes_of(folder: Path) -> list[str]:
    """Those that a SLURM has started, jobs included."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == str(folder / "etc" / "slurm.conf"):
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.slurm
def test_up_again_starts_only_what_is_missing(slurm: Path) -> None:
    def pids() -> dict[str, int]:
        names = ("munged", "mariadbd", "slurmdbd", "slurmctld", "node1", "node2", "node3", "node4", "lift-holds")
        return {name: int((slurm / "run" / f"{name}.pid").read_text()) for name in names}

    before = pids()
    os.kill(before["slurmdbd"], 9)
    subprocess.run([UP, slurm], check=True, capture_output=True)
    after = pids()
    assert [name for name in before if after[name] != before[name]] == ["slurmdbd"]
    listening = {
        (connection.laddr.ip, process.name())
        for process in map(psutil.Process, after.values())
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {ip for ip, _ in listening} == {"127.0.0.1"}
    assert len(listening) >= 4
    rows = subprocess.run(["sacct", "--noheader", "--allusers"], check=True, capture_output=True, text=True)
    assert rows.stderr == ""


@pytest.mark.slurm
def test_down_ends_its_own_processes_only(slurm: Path) -> None:
    """A second SLURM next to the first."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not below pytest's: all users must reach munge's socket
    subprocess.run([UP, folder], check=True, capture_output=True)
    files = [path for path in (folder / "run").glob("*.pid") if ".own." not in path.name]
    daemons = [ProcessRecord.of(int(path.read_text())) for path in files]
    environment = os.environ | {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}
    job = ["sbatch", "--output=/dev/null", f"--wrap=trap '' TERM; touch {folder}/runs; setsid sleep 600"]
    subprocess.run(job, check=True, env=environment)
    wait_for((folder / "runs").exists, seconds=300.0)
    subprocess.run([UP.with_name("down"), folder], check=True)
    assert processes_of(folder) == []
    assert len(daemons) == 9
    assert not any(daemon.is_alive() for daemon in daemons)
    assert subprocess.run(["scontrol", "ping"], check=True, capture_output=True, text=True).stdout.count(" UP") == 1
    subprocess.run([UP.with_name("down"), folder], check=True)  # there is nothing to do
    shutil.rmtree(folder)
