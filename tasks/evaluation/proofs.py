"""Formal proofs, checked by a command of the user's: it is given a file, and exits with 0 if the proof holds.

No prover comes with this package. For Isabelle, the command is a script of yours that builds the theory file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from neox_core.errors import ConfigError, DataError
from neox_core.evaluation.items import read_record
from neox_core.progress import Progress
from neox_core.storage.atomic import write_atomically

_SHOWN = 2_000
"""Characters of a command's output that are kept, from its end."""
_LAST_OUTPUT_SECONDS = 1.0
"""For reading what a command wrote before it ended."""
_NOT_RUN = 126
"""From here on a shell's exit status means that a command could not be run, or that a signal ended it."""
_LONGEST_NAME = 200
"""Bytes; a file's name has 255 at most."""


@dataclass(frozen=True)
class ProofVerdict:
    """What the command said of one proof."""

    id: str
    verdict: Literal["accepted", "rejected", "time limit", "no verdict"]
    output: str


@dataclass(frozen=True)
class ProofChecker:
    """A command, to which a theory file's path is added as the last argument."""

    command: str
    time_limit: float
    """Seconds for one proof."""

    def __post_init__(self) -> None:
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise ConfigError(f"proof checker {self.command!r} cannot be read ({error}): correct --command") from None
        if not words or shutil.which(words[0]) is None:
            raise ConfigError(f"proof checker {self.command!r} is no command that can be run: correct --command")
        if not 0 < self.time_limit < math.inf:
            raise ConfigError(f"--time-limit {self.time_limit}: give the seconds for one proof, more than 0")

    def check(self, identity: str, name: str, theory: str) -> ProofVerdict:
        """Check one proof. The command runs where it was called; the file lies in a folder that is removed.

        Args:
            name: of the theory, which Isabelle wants to be the file's.
            theory: the file's content.

        Raises:
            ConfigError: the command cannot be run.
        """
        with tempfile.TemporaryDirectory(prefix="proof-") as folder:
            path = Path(folder) / f"{name}.thy"
            path.write_text(theory, encoding="utf-8")
            process = self._started(path)
            tail = _Tail(process)
            try:
                code = process.wait(self.time_limit)
            except subprocess.TimeoutExpired:
                return ProofVerdict(identity, "time limit", "")
            finally:
                _end_session(process)
            return ProofVerdict(identity, _verdict(code), tail.text())

    def _started(self, path: Path) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [*shlex.split(self.command), str(path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(
                f"proof checker {self.command!r} cannot be run ({error}): correct --command, or the script's first line"
            ) from None


def _verdict(code: int) -> Literal["accepted", "rejected", "no verdict"]:
    """What an exit status says: of a command that a signal ended, or that its shell could not run, nothing."""
    if code == 0:
        return "accepted"
    return "rejected" if 0 < code < _NOT_RUN else "no verdict"


class _Tail(threading.Thread):
    """The end of what a command writes, however much it is; read apart, for what it started may hold the pipe open."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self._process, self._kept = process, b""
        self.start()

    def run(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        with pipe:
            while chunk := os.read(pipe.fileno(), 1 << 16):
                self._kept = (self._kept + chunk)[-4 * _SHOWN :]  # a character has four bytes at most

    def text(self) -> str:
        """The last characters, once the command has ended."""
        self.join(_LAST_OUTPUT_SECONDS)
        return self._kept.decode(errors="replace")[-_SHOWN:]


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End the command and what it started; a prover is often a script around others."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check_proofs(path: Path, out: Path, checker: ProofChecker, progress: Progress) -> list[ProofVerdict]:
    """Check the proofs of JSON lines with `header`, `formal_statement` and `proof`; verdicts are written to `out`.

    Raises:
        ConfigError, DataError: the file is missing or empty, a line lacks a field, or the command cannot be run.
    """
    proofs = list(_proofs(path))
    if not proofs:
        raise DataError(f"{path} holds no proof: correct the path or the file")
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
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        _, record = read_record(line, where, number)
        try:
            theory = "\n".join((record["header"], record["formal_statement"], record["proof"], "end\n"))
        except (KeyError, TypeError) as error:
            raise DataError(f"{where} is no proof ({error!r}): correct it") from None
        name = str(record.get("name") or f"line_{number}")
        if not name.replace("_", "").isalnum() or len(name.encode()) > _LONGEST_NAME:
            raise DataError(
                f"{where}: {name[:80]!r} cannot name a theory: use letters, digits and _, {_LONGEST_NAME} at most"
            )
        yield str(record.get("id") or name), name, theory
