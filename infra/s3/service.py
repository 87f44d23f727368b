"""The object store that a run's configuration asks for, ready to use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from infra.s3.embedded import embedded_s3
from infra.s3.server import REGION
from neox_core.config import EMBEDDED, StorageConfig
from neox_core.storage.object_store import ObjectStore


@contextlib.contextmanager
def storage_service(config: StorageConfig, workdir: Path) -> Iterator[StorageConfig]:
    """Yield `config` with a real endpoint; 'embedded' starts or joins the server in `workdir`/s3 and makes the bucket.

    While the context lasts, the embedded server's keys are in this process's environment, where boto3 and child
    processes find them. Any other configuration passes through unchanged, and its credentials are the user's own.

    Raises:
        StorageError: the server cannot be started, or the bucket cannot be made.
    """
    if config.endpoint_url != EMBEDDED:
        yield config
        return
    with embedded_s3(workdir / "s3") as endpoint:
        resolved = config.model_copy(update={"endpoint_url": endpoint.url, "region": REGION})
        keys = {
            "AWS_ACCESS_KEY_ID": endpoint.access_key,
            "AWS_SECRET_ACCESS_KEY": endpoint.secret_key,
            "AWS_SESSION_TOKEN": None,  # would be sent along with keys that it doesn't belong to
            "AWS_PROFILE": None,
        }
        with environment(keys):
            ObjectStore(resolved).check(create_bucket=True)
            yield resolved


@contextlib.contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables (None: unset) for this process and its children; restored afterwards."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
