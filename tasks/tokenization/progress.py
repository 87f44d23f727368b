"""How far the making of parts is."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from neox_core.data.tokenization.part_files import PartPaths
from neox_core.data.tokenization.part_settings import Done
from neox_core.data.tokenization.readers import InputFile
from neox_core.progress import Progress
from tasks.tokenization.pool import MadeParts

_log = logging.getLogger(__name__)


class PartsProgress:
    """Reports files, MB of text and tokens per second, and the time left.

    Parts of an earlier run that are found count as done, but neither in the rates nor, so, in the time left.
    """

    def __init__(self, files: Sequence[InputFile], folder: Path, progress: Progress) -> None:
        """Begin the count, and look which parts there are."""
        self._files, self._folder, self._progress = len(files), folder, progress
        self._size = max(1, sum(file.size for file in files))
        self._earlier = {file: self._version(file) for file in files}
        self._finished = self._found = 0
        self._done = self._made = Done(0, 0, 0)
        self._started = time.monotonic()
        self.update(self._done)

    def update(self, done: Done) -> None:
        """Report what this run has done, parts that are not finished included, where that is known."""
        self._done = Done(*map(max, done, self._made))
        text = f"{self._finished} of {self._files} files"
        if self._done.stored:
            seconds = max(time.monotonic() - self._started, 1e-3)
            left = seconds * (self._size - self._found - self._done.stored) / self._done.stored
            speeds = f"{self._done.bytes / seconds / 1e6:.1f} MB/s, {self._done.tokens / seconds / 1e6:.2f}M tokens/s"
            text += f", {speeds}, {_clock(left)} left"
        self._progress((self._found + self._done.stored) / self._size, text)

    def follow(self, made: MadeParts) -> MadeParts:
        """Pass the parts on, and report each."""
        for file, record in made:
            self._finished += 1
            if self._version(file) == self._earlier[file]:
                self._found += file.size
            else:
                size, text, tokens = self._made
                self._made = Done(size + file.size, text + record.bytes, tokens + record.tokens)
            self.update(self._done)
            _log.info(
                "%s: %d documents, %d tokens, %d rejected",
                file.location,
                record.documents,
                record.tokens,
                record.rejected,
            )
            yield file, record

    def _version(self, file: InputFile) -> tuple[int, int] | None:
        """What distinguishes the record of a file's part from one that is made anew; None if there is none."""
        try:
            status = PartPaths.of(file, self._folder).record.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
