"""Stand-ins for SLURM's commands."""

from __future__ import annotations

import stat
from pathlib import Path


class FakeSlurm:
    """sbatch, squeue, sacct and scancel that answer from files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._program(
            "sbatch", f'cp "$1" {folder}/submission.sh; echo x >>{folder}/submissions; echo "Submitted batch job 42"'
        )
        self._program("srun", "exit 1")
        for name in ("squeue", "sacct"):
            self._program(
                name,
                f'cd {folder}; echo "$@" >>{name}.args; test -s {name}.silent && sed -i 1d {name}.silent && '
                f"{{ echo 'slurm_load_jobs error: Socket timed out' >&2; exit 1; }}; "
                f"cat {name}.out; cat {name}.err >&2; exit $(cat {name}.rc)",
            )
            self.answer(name, "")
        self._program("scancel", f'echo "$@" >>{folder}/scancel.args')

    def answer(self, name: str, out: str, err: str = "", rc: int = 0) -> None:
        for suffix, content in (("out", out), ("err", err), ("rc", str(rc))):
            (self.folder / f"{name}.{suffix}").write_text(content)

    def be_silent(self, name: str, times: int) -> None:
        """Leave the next questions unanswered."""
        (self.folder / f"{name}.silent").write_text("x\n" * times)

    def questions(self, name: str) -> int:
        """How often it was asked."""
        path = self.folder / f"{name}.args"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def sacct(self, state: str) -> None:
        self.answer("squeue", "", "slurm_load_jobs error: Invalid job id specified", 1)
        self.answer("sacct", f"JobID|State|NodeList\n42|{state}|n1\n42.batch|{state}|n1\n")

    def _program(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
