"""Formal proofs, checked by a command of the user's: it is given a file, and exits with 0 if the proof holds.

No prover comes with this package. For Isabelle, the command is a script of yours that builds the theory file.
A check that was killed goes on with the proofs that are left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from neox_core.errors import ConfigError, DataError
from neox_core.evaluation.items import read_record
from neox_core.progress import Progress
from neox_core.storage.atomic import write_atomically
from neox_core.storage.claims import try_claim_name
from neox_core.storage.digest import sha256_of
from neox_core.storage.full_disk import room_below

_SHOWN = 2_000
"""Characters of a command's output that are kept, from its end."""
_LOOK_SECONDS = 0.1
_LAST_READS = 16
"""Of what a command wrote before it ended, which a pipe holds; what it left behind may write for ever."""
_NOT_RUN = 126
"""From here on a shell's exit status means that a command could not be run, or that a signal ended it."""
_LONGEST_NAME = 200
"""Bytes; a file's name has 255 at most."""


_NO_VERDICT: Literal["no verdict"] = "no verdict"
Theory = tuple[str, str, str]
"""A proof's id, its theory's name and its content."""


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
                tail.end()
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
    return "rejected" if 0 < code < _NOT_RUN else _NO_VERDICT


class _Tail(threading.Thread):
    """The end of what a command writes, however much it is; read apart, for what it started may hold the pipe open."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self._process, self._kept, self._ended = process, b"", threading.Event()
        self.start()

    def run(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        look, reads = select.poll(), _LAST_READS
        look.register(pipe, select.POLLIN)
        with pipe:
            while reads:
                ended = self._ended.is_set()  # asked before the pipe is: what is there now is all of it
                if look.poll(0 if ended else 1000 * _LOOK_SECONDS):
                    if not (chunk := os.read(pipe.fileno(), 1 << 16)):
                        return
                    self._kept = (self._kept + chunk)[-4 * _SHOWN :]  # a character has four bytes at most
                    reads -= ended
                elif ended:
                    return

    def end(self) -> None:
        """The command has ended: what the pipe holds is the last."""
        self._ended.set()

    def text(self) -> str:
        """The last characters, once the command has ended."""
        self.join()
        return self._kept.decode(errors="replace")[-_SHOWN:]


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End the command and what it started; a prover is often a script around others."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check_proofs(path: Path, out: Path, checker: ProofChecker, progress: Progress) -> list[ProofVerdict]:
    """Check the proofs of JSON lines with `header`, `formal_statement` and `proof`; verdicts are written to `out`.

    Of a call that was killed, verdicts are used; a proof of which the command said nothing is checked again.

    Raises:
        ConfigError, DataError: the file is missing or empty, a line lacks a field, the command cannot be run, or `out`
            holds something else than verdicts on these proofs by this command, or another call is at work on it.
    """
    proofs = list(_proofs(path))
    if not proofs:
        raise DataError(f"{path} holds no proof: correct the path or the file")
    with try_claim_name(out.parent, out.name) as claimed:
        if not claimed:
            raise ConfigError(f"another call is at work on {out}: wait for it, or give another --out")
        asked = _digest(proofs, checker)
        verdicts = _verdicts(out, asked)
        for place, proof in enumerate(proofs):
            progress(place / len(proofs), f"{place} of {len(proofs)}")
            if place < len(verdicts) and verdicts[place].verdict != _NO_VERDICT:
                continue
            verdicts[place : place + 1] = [checker.check(*proof)]
            lines = [json.dumps(asdict(verdict) | {"asked": asked}) + "\n" for verdict in verdicts]
            with room_below(out.parent):
                write_atomically(out, "".join(lines))
    return verdicts


def _digest(proofs: Sequence[Theory], checker: ProofChecker) -> str:
    """What verdicts depend on: the proofs, the time limit, the command, and the files that this names."""
    found = [shutil.which(word) or word for word in shlex.split(checker.command)]
    files = [sha256_of(Path(name)) for name in found if Path(name).is_file()]
    content = json.dumps([proofs, checker.time_limit, checker.command, files])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _verdicts(out: Path, asked: str) -> list[ProofVerdict]:
    """What an earlier call found, in the order of the proofs.

    Raises:
        ConfigError: the file holds something else; it is not written over.
    """
    if not out.exists():
        return []
    try:
        records = [json.loads(line) for line in out.read_bytes().splitlines()]
        known = [record.pop("asked") for record in records]
        verdicts = [ProofVerdict(**record) for record in records]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        known, verdicts = [""], []
    if set(known) - {asked}:
        raise ConfigError(
            f"{out} holds something else than verdicts on these proofs, by this command as it is now and within this "
            "time limit: give another --out, or remove it"
        )
    return verdicts


def _proofs(path: Path) -> Iterator[Theory]:
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
