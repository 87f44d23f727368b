"""What a job uses of an object store, in a folder: the server is not what the tests of GPUs are about."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from neox_core.config import RunConfig, StorageConfig
from neox_core.storage.atomic import atomic_file
from neox_core.storage.conditional_store import VersionedText
from neox_core.storage.object_store import ObjectInfo
from neox_core.train.job import TrainJob
from tests.neox_core.train.small_jobs import train_job


class FolderStore:
    """A ConditionalStore in the folder that the URL ends with."""

    def __init__(self, config: StorageConfig, *others: Any, **named: Any) -> None:
        self.config, self.stopped = config, threading.Event()
        self.on_behind: Callable[[str], None] = lambda _: None
        self._folder = Path("/" + config.url.removeprefix("s3://folder/"))

    def url(self, key: str = "") -> str:
        return str(self._folder / key)

    def put_file(self, path: Path, key: str, on_bytes: Callable[[int], None] | None = None) -> None:
        self.put_bytes(key, path.read_bytes())

    def get_file(self, key: str, path: Path, on_bytes: Callable[[int], None] | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._folder / key, path)

    def put_text(self, key: str, text: str) -> None:
        self.put_bytes(key, text.encode())

    def put_bytes(self, key: str, content: bytes) -> None:
        with atomic_file(self._folder / key, durable=False) as temporary:
            temporary.write_bytes(content)

    def get_text(self, key: str) -> str | None:
        return (self._folder / key).read_text() if (self._folder / key).is_file() else None

    def read(self, key: str) -> VersionedText | None:
        text = self.get_text(key)
        return None if text is None else VersionedText(text, hashlib.sha256(text.encode()).hexdigest())

    def replace(self, key: str, text: str, etag: str | None) -> str | None:
        present = self.read(key)
        return self.overwrite(key, text) if etag == (present and present.etag) else None

    def overwrite(self, key: str, text: str) -> str:
        self.put_text(key, text)
        return hashlib.sha256(text.encode()).hexdigest()

    def is_conditional(self, key: str) -> bool:
        return True  # one rank alone writes

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        files = [path for path in sorted(self._folder.rglob("*")) if path.is_file()]
        found = [ObjectInfo(str(path.relative_to(self._folder)), path.stat().st_size) for path in files]
        return [info for info in found if info.key.startswith(prefix)]

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            (self._folder / key).unlink(missing_ok=True)

    def abort_uploads(self, prefix: str) -> None:
        """There are none."""

    def check(self, create_bucket: bool = False) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def jobs_use(store: type[FolderStore]) -> Iterator[None]:
    """Training jobs of this process keep their checkpoints in such a store, in the block."""
    places = ("neox_core.train.run.PatientStore", "neox_core.checkpoint.lease.ConditionalStore")
    with patch(places[0], store), patch(places[1], store):
        yield


def run_job(config: RunConfig, job: TrainJob, kill_at: int | None, port: int) -> Any:
    """As `train_job`, with checkpoints in a folder."""
    with jobs_use(FolderStore):
        return train_job(config, job, kill_at, port)
