"""Verdicts on answers, from a process of its own that is bounded in time and memory and replaced when it is not."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Literal

from neox_core.evaluation.answers.equality import same_text

Reason = Literal["text", "symbolic", "different", "unreadable", "too long", "time limit", "memory", "no answer"]

MAX_CHARACTERS = 1_000
"""A longer answer is compared as raw text alone."""
CPU_SECONDS = 3.0
"""For one pair, of the process's own time: a busy machine changes no verdict."""
WALL_SECONDS = 60.0
"""After which the process is ended: it is stuck in one long operation, in which it hears no signal."""
_MEMORY_BYTES = 2 << 30
_START_SECONDS = 300.0


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and how that was found."""

    correct: bool
    reason: Reason


class Judge:
    """Compares answers with gold ones: normalised text first, then SymPy in a child process."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS, wall_seconds: float = WALL_SECONDS) -> None:
        self._cpu_seconds, self._wall_seconds = cpu_seconds, wall_seconds
        self._known: dict[tuple[str, str], Verdict] = {}
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def verdict(self, gold: str, given: str | None) -> Verdict:
        """Compare one answer; None is a sample without one."""
        if given is None or not given.strip():
            return Verdict(False, "no answer")
        if max(len(gold), len(given)) > MAX_CHARACTERS:
            return Verdict(gold.strip() == given.strip(), "too long")
        if same_text(gold, given):
            return Verdict(True, "text")
        if (gold, given) not in self._known:
            self._known[gold, given] = self._ask(gold, given)
        return self._known[gold, given]

    def verdicts(self, pairs: Iterable[tuple[str, str | None]]) -> list[Verdict]:
        """Compare pairs of a gold answer and a given one, in order."""
        return [self.verdict(gold, given) for gold, given in pairs]

    def majority(self, answers: Iterable[str | None]) -> str | None:
        """The answer that most samples give, equal ones counted together; of equally many the one that came first."""
        groups: list[tuple[str, int]] = []
        for answer in answers:
            if answer is None or not answer.strip():
                continue
            for index, (known, count) in enumerate(groups):
                if self.verdict(known, answer).correct:
                    groups[index] = (known, count + 1)
                    break
            else:
                groups.append((answer, 1))
        return max(groups, key=lambda group: group[1])[0] if groups else None

    def _ask(self, gold: str, given: str) -> Verdict:
        pipe = self._pipe or self._start()
        reason: Reason = "memory"
        try:
            pipe.send((gold, given))
            if pipe.poll(self._wall_seconds):
                return Verdict(*pipe.recv())
            reason = "time limit"
        except (EOFError, OSError):
            pass  # the process's only other end: out of memory, by its own limit or the system's
        self._end()
        return Verdict(False, reason)

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of whoever calls
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._cpu_seconds), daemon=True)
        with theirs:
            process.start()
        self._pipe, self._process = ours, process
        if not self._pipe.poll(_START_SECONDS):
            self._end()
            raise TimeoutError(f"the process that compares answers did not start in {_START_SECONDS:.0f} s")
        try:
            self._pipe.recv()
        except EOFError:
            self._end()
            raise RuntimeError(
                "the process that compares answers ended as it started: its own error stands above; a script that "
                "calls this needs `if __name__ == '__main__':`, since the process imports it"
            ) from None
        return self._pipe

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


class _CpuTimeError(BaseException):
    """Not an Exception, so that no handler within SymPy takes it."""


def _serve(pipe: Connection, cpu_seconds: float) -> None:
    """The child process: one reply per pair, until the other end closes."""
    from neox_core.evaluation.answers.equality import equal
    from neox_core.evaluation.answers.latex import UnreadableError

    def stop(number: int, frame: FrameType | None) -> None:
        raise _CpuTimeError

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    pipe.send("ready")
    while True:
        try:
            gold, given = pipe.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds)
        try:
            correct = equal(gold, given)
            reply = (correct, "symbolic" if correct else "different")
        except _CpuTimeError:
            reply = (False, "time limit")
        except MemoryError:
            reply = (False, "memory")
        except UnreadableError:
            reply = (False, "unreadable")
        except Exception:  # SymPy raises nearly anything on strange input; such an answer equals nothing
            reply = (False, "unreadable")
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        pipe.send(reply)
