"""Formal proofs, checked by a command of the user's: it is given a file, and exits with 0 if the proof holds.

No prover comes with this package. For Isabelle, the command is a script of yours that builds the theory file.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from neox_core.errors import ConfigError, DataError
from neox_core.progress import Progress
from neox_core.storage.atomic import write_atomically

_SHOWN = 2_000
"""Characters of a command's output that are kept, from its end."""


@dataclass(frozen=True)
class ProofVerdict:
    """What the command said of one proof."""

    id: str
    verdict: Literal["accepted", "rejected", "time limit"]
    output: str


@dataclass(frozen=True)
class ProofChecker:
    """A command, to which a theory file's path is added as the last argument."""

    command: str
    time_limit: float
    """Seconds for one proof."""

    def __post_init__(self) -> None:
        words = shlex.split(self.command)
        if not words or shutil.which(words[0]) is None:
            raise ConfigError(f"proof checker {self.command!r} is no command that can be run: correct --command")

    def check(self, identity: str, name: str, theory: str) -> ProofVerdict:
        """Check one proof, in a folder of its own that is removed.

        Args:
            name: of the theory, which Isabelle wants to be the file's.
            theory: the file's content.
        """
        with tempfile.TemporaryDirectory(prefix="proof-") as folder:
            path = Path(folder) / f"{name}.thy"
            path.write_text(theory, encoding="utf-8")
            process = subprocess.Popen(
                [*shlex.split(self.command), str(path)],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                output, _ = process.communicate(timeout=self.time_limit)
            except subprocess.TimeoutExpired:
                _end_session(process)
                return ProofVerdict(identity, "time limit", "")
        text = output.decode(errors="replace")[-_SHOWN:]
        return ProofVerdict(identity, "accepted" if process.returncode == 0 else "rejected", text)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End the command and what it started; a prover is often a script around others."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def check_proofs(path: Path, out: Path, checker: ProofChecker, progress: Progress) -> list[ProofVerdict]:
    """Check the proofs of JSON lines with `header`, `formal_statement` and `proof`; verdicts are written to `out`.

    Raises:
        ConfigError, DataError: the file is missing, or a line lacks a field.
    """
    proofs = list(_proofs(path))
    verdicts = []
    for place, (identity, name, theory) in enumerate(proofs):
        progress(place / len(proofs), f"{place} of {len(proofs)}")
        verdicts.append(checker.check(identity, name, theory))
        write_atomically(out, "".join(json.dumps(asdict(verdict)) + "\n" for verdict in verdicts))
    return verdicts


def _proofs(path: Path) -> Iterator[tuple[str, str, str]]:
    """Each line's id, its theory's name and its content."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: give a file of proofs, JSON lines")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record: dict[str, Any] = json.loads(line)
            theory = "\n".join((record["header"], record["formal_statement"], record["proof"], "end\n"))
            name = str(record.get("name", f"line_{number}"))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number} is no proof ({error!r}): correct it") from None
        if not name.replace("_", "").isalnum():
            raise DataError(f"{path}, line {number}: {name!r} cannot name a theory: use letters, digits and _")
        yield str(record.get("id", name)), name, theory
