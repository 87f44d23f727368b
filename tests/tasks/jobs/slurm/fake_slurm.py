"""Stand-ins for SLURM's commands."""

from __future__ import annotations

import stat
from pathlib import Path


class FakeSlurm:
    """sbatch, squeue, sacct, scancel and scontrol that answer from files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._program(
            "sbatch",
            f'case "$1" in --test-only) test ! -s {folder}/refused || {{ cat {folder}/refused >&2; exit 1; }}; '
            f'exit 0;; esac; cp "$1" {folder}/submission.sh; echo x >>{folder}/submissions; '
            'echo "Submitted batch job 42"',
        )
        self._program("srun", "exit 1")
        self._program("scontrol", "echo 'Slurmctld(primary) at head is UP'")
        for name in ("squeue", "sacct"):
            self._program(
                name,
                f'cd {folder}; echo "$@" >>{name}.args; test -s {name}.silent && sed -i 1d {name}.silent && '
                f"{{ echo 'slurm_load_jobs error: Socket timed out' >&2; exit 1; }}; "
                f'case "$*" in *--name=*) cat named.out; exit 0;; esac; '
                f"cat {name}.out; cat {name}.err >&2; exit $(cat {name}.rc)",
            )
            self.answer(name, "")
        (folder / "named.out").touch()
        self._program("scancel", f'echo "$@" >>{folder}/scancel.args')

    def answer(self, name: str, out: str, err: str = "", rc: int = 0) -> None:
        for suffix, content in (("out", out), ("err", err), ("rc", str(rc))):
            (self.folder / f"{name}.{suffix}").write_text(content)

    def refuse(self, reason: str) -> None:
        """What sbatch --test-only says from now on."""
        (self.folder / "refused").write_text(reason)

    def be_silent(self, name: str, times: int) -> None:
        """Leave the next questions unanswered."""
        (self.folder / f"{name}.silent").write_text("x\n" * times)

    def questions(self, name: str) -> int:
        """How often it was asked."""
        path = self.folder / f"{name}.args"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def squeue(self, state: str, reason: str = "None") -> None:
        """Job 42 is known to the controller."""
        self.answer("squeue", f"42|{state}|{reason}\n")

    def squeue_finds(self, *ids: str) -> None:
        """What is there of the name that is asked for."""
        (self.folder / "named.out").write_text("".join(f"{job}\n" for job in ids))

    def sacct(self, state: str, exit_code: str = "0:0", derived: str = "0:0", reason: str = "None") -> None:
        """Job 42 has left the controller's memory."""
        self.answer("squeue", "", "slurm_load_jobs error: Invalid job id specified", 1)
        self.answer("sacct", f"42|{state}|{exit_code}|{derived}|{reason}\n")

    def _program(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
