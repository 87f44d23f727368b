"""The object store as a training uses it: requests that fail are made again until the store is back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from neox_core.config import StorageConfig
from neox_core.errors import StorageError
from neox_core.retry import Failure, RetryPolicy
from neox_core.storage.errors import may_pass
from neox_core.storage.object_store import ObjectInfos, ObjectStore

logger = logging.getLogger(__name__)

_ATTEMPTS = 2
"""Of the client itself, within each attempt of ours, which are logged."""

_Answer = TypeVar("_Answer")


class StoreGivenUp(StorageError):
    """The store failed for longer than patience lasts."""


class PatientStore(ObjectStore):
    """An object store that bears failures for `storage.patience_minutes`, counted from the first one in a row.

    Args:
        on_wait: called before and within each pause, so that waiting is not taken for a hang.
        policy: None: as the configuration has it.
        stopped: once it is set, waiting ends with the last error.
        read_timeout: seconds that the store may let a request wait.
    """

    def __init__(
        self,
        config: StorageConfig,
        on_wait: Callable[[], None] = lambda: None,
        policy: RetryPolicy | None = None,
        stopped: threading.Event | None = None,
        read_timeout: float = 60.0,
    ) -> None:
        super().__init__(config, read_timeout, _ATTEMPTS)
        self._on_wait, self.stopped = on_wait, stopped or threading.Event()
        self._policy = policy or RetryPolicy(60 * config.patience_minutes)
        self.on_behind: Callable[[str], None] = lambda _: None
        """Called with what the store fails at and since when, in words; with an empty text when it works again."""

    def put_file(self, path: Path, key: str, on_bytes: Callable[[int], None] | None = None) -> None:
        """As ObjectStore's."""
        self._patiently(key, lambda: super(PatientStore, self).put_file(path, key, on_bytes))

    def get_file(self, key: str, path: Path, on_bytes: Callable[[int], None] | None = None) -> None:
        """As ObjectStore's."""
        self._patiently(key, lambda: super(PatientStore, self).get_file(key, path, on_bytes))

    def put_bytes(self, key: str, content: bytes) -> None:
        """As ObjectStore's."""
        self._patiently(key, lambda: super(PatientStore, self).put_bytes(key, content))

    def get_text(self, key: str) -> str | None:
        """As ObjectStore's."""
        return self._patiently(key, lambda: super(PatientStore, self).get_text(key))

    def list(self, prefix: str = "") -> ObjectInfos:
        """As ObjectStore's."""
        return self._patiently(prefix, lambda: super(PatientStore, self).list(prefix))

    def delete(self, keys: Iterable[str]) -> None:
        """As ObjectStore's."""
        names = tuple(keys)
        self._patiently(names[0] if names else "", lambda: super(PatientStore, self).delete(names))

    def abort_uploads(self, prefix: str) -> None:
        """As ObjectStore's."""
        self._patiently(prefix, lambda: super(PatientStore, self).abort_uploads(prefix))

    def _patiently(self, key: str, request: Callable[[], _Answer]) -> _Answer:
        attempts = 0

        def failed(failure: Failure) -> None:
            nonlocal attempts
            attempts = failure.attempts
            self._on_wait()
            since = time.strftime("%H:%M:%S", time.localtime(failure.since))
            behind = f"{self.url(key)} is behind since {since} ({failure.attempts} attempts)"
            self.on_behind(behind)
            if failure.wait <= 0 or self.stopped.is_set():
                raise StoreGivenUp(
                    f"gave up after {failure.attempts} attempts since {since} (storage.patience_minutes "
                    f"{self.config.patience_minutes:g}): bucket {self.bucket}, key {self.full_key(key)}, last answer: "
                    f"{failure.error}"
                ) from failure.error
            logger.warning("%s; again in %.0f s: %s", behind, failure.wait, failure.error)

        answer = self._policy.call(request, may_pass, failed, self._pause)
        if attempts:
            logger.info("the store answers again after %d attempts: %s", attempts, self.url(key))
            self.on_behind("")
        return answer

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not self.stopped.wait(min(left, 5.0)):
            self._on_wait()
