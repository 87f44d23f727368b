"""The object store (S3) that holds checkpoints: files and small texts under one prefix of one bucket."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from neox_core.config import StorageConfig
from neox_core.errors import StorageError
from neox_core.storage.atomic import atomic_file
from neox_core.storage.errors import error_code, explain

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PAGE = 1000  # S3's limit per request, for lists and deletions
MOST_PARTS = 1000
"""Of an upload: all that Swift allows, a tenth of what AWS does."""
_PART_BYTES = 8 << 20
_DOWNLOADED_BYTES = 32 << 20
"""At a time of a large object: a quarter faster than parts of an upload's size."""
_ANSWER_SECONDS = 30.0
"""For the answer to a first question; a store on a busy machine takes more than a moment."""


@dataclass(frozen=True)
class ObjectInfo:
    """One object; the key is relative to the store's prefix, the size in bytes."""

    key: str
    size: int
    etag: str = field(default="", compare=False)
    """The store's own mark of the content: of this object only, and not its digest."""


ObjectInfos = list[ObjectInfo]


class ObjectStore:
    """Objects below `config.url`. Keys are relative to it. Credentials come from the environment, as boto3 reads them.

    One store may be used by many threads; pickling it yields a new connection in the other process. Every failure is a
    StorageError that names the object and the endpoint.

    Args:
        read_timeout: seconds that the store may let a request wait.
        attempts: of each request.
    """

    def __init__(self, config: StorageConfig, read_timeout: float = 60.0, attempts: int = 5) -> None:
        self.config = config
        # Not urlsplit, which would cut a key off at # or ?.
        self.bucket, _, prefix = config.url.removeprefix("s3://").partition("/")
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        with self._errors():
            self._client = _connect(config, connect_timeout=5, read_timeout=read_timeout, retries=attempts)

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[StorageConfig]]:
        return ObjectStore, (self.config,)

    @property
    def endpoint(self) -> str:
        """Where the requests go."""
        return str(self._client.meta.endpoint_url)

    def url(self, key: str = "") -> str:
        """The object's full name, s3://bucket/..."""
        return f"s3://{self.bucket}/{self.full_key(key)}"

    def put_file(self, path: Path, key: str, on_bytes: Callable[[int], None] | None = None) -> None:
        """Upload a file, in parts if it is large; `on_bytes` is called with the size of each piece that went out."""
        with self._errors(key):
            transfer = _transfer(path.stat().st_size)
            self._client.upload_file(str(path), self.bucket, self.full_key(key), Config=transfer, Callback=on_bytes)

    def get_file(self, key: str, path: Path, on_bytes: Callable[[int], None] | None = None) -> None:
        """Download an object; `path` appears when it is complete. `on_bytes` as for `put_file`."""
        with atomic_file(path, durable=False) as temporary, self._errors(key), temporary.open("wb") as file:
            self._client.download_fileobj(
                self.bucket, self.full_key(key), file, Config=_in_parts(_DOWNLOADED_BYTES), Callback=on_bytes
            )

    def put_text(self, key: str, text: str) -> None:
        """Write a small object in one atomic request."""
        self.put_bytes(key, text.encode())

    def put_bytes(self, key: str, content: bytes) -> None:
        """Write a small object in one atomic request. Pages (.html) are kept as such, so that browsers show them."""
        kind = "text/html; charset=utf-8" if key.endswith(".html") else "binary/octet-stream"
        with self._errors(key):
            self._client.put_object(Bucket=self.bucket, Key=self.full_key(key), Body=content, ContentType=kind)

    def get_text(self, key: str) -> str | None:
        """Read a small object; None if there is none."""
        found = self._text_and_etag(key)
        return found and found[0]

    def _text_and_etag(self, key: str) -> tuple[str, str] | None:
        with self._errors(key):
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=self.full_key(key))
            except ClientError as error:
                if error_code(error) == "NoSuchKey":
                    return None
                raise
            return answer["Body"].read().decode(), answer["ETag"]

    def get_range(self, key: str, start: int, count: int) -> bytes:
        """`count` bytes of an object from `start`; fewer where it ends."""
        with self._errors(key):
            wanted = f"bytes={start}-{start + count - 1}"
            return self._client.get_object(Bucket=self.bucket, Key=self.full_key(key), Range=wanted)["Body"].read()

    @contextlib.contextmanager
    def uploading(self, key: str, part_bytes: int) -> Iterator[Callable[[memoryview], None]]:
        """Takes an object's bytes and sends them in parts; the object appears when the block ends without an error."""
        where: Any = {"Bucket": self.bucket, "Key": self.full_key(key)}
        buffer = bytearray()
        parts: list[Any] = []
        with self._errors(key):
            where["UploadId"] = self._client.create_multipart_upload(**where)["UploadId"]

        def send() -> None:
            with self._errors(key):
                number = len(parts) + 1
                answer = self._client.upload_part(**where, PartNumber=number, Body=bytes(buffer))
                parts.append({"PartNumber": number, "ETag": answer["ETag"]})
            buffer.clear()

        def put(data: memoryview) -> None:
            buffer.extend(data)
            if len(buffer) >= part_bytes:
                send()

        try:
            yield put
            if buffer or not parts:
                send()
            with self._errors(key):
                self._client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
        except BaseException:
            with contextlib.suppress(BotoCoreError, ClientError):
                self._client.abort_multipart_upload(**where)
            raise

    def copy(self, key: str, to: str) -> None:
        """Copy an object within the store, in parts if it is large; no byte passes through this machine."""
        with self._errors(to):
            source: Any = {"Bucket": self.bucket, "Key": self.full_key(key)}
            transfer = _transfer(self._client.head_object(**source)["ContentLength"])
            self._client.copy(source, self.bucket, self.full_key(to), Config=transfer)

    def abort_uploads(self, prefix: str) -> None:
        """Drop the parts of uploads to keys that start with `prefix` and never ended."""
        with self._errors(prefix):
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.full_key(prefix)):
                for upload in page.get("Uploads", ()):
                    self._client.abort_multipart_upload(
                        Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )

    def list(self, prefix: str = "") -> ObjectInfos:
        """All objects whose key starts with `prefix`, sorted by key."""
        found: ObjectInfos = []
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2")
            settings: Any = {"PageSize": _PAGE}
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.full_key(prefix), PaginationConfig=settings):
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(self._prefix)
                    found.append(ObjectInfo(key, entry["Size"], entry.get("ETag", "").strip('"')))
        return sorted(found, key=lambda info: info.key)

    def is_empty(self) -> bool:
        """Whether there is no object under the prefix; in a bucket that does not exist, there is none."""
        with self._errors():
            try:
                found = self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._prefix, MaxKeys=1)
            except ClientError as error:
                if error_code(error) == "NoSuchBucket":
                    return True
                raise
            return not found.get("Contents")

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; keys that do not exist are no error."""
        names = [self.full_key(key) for key in keys]
        for start in range(0, len(names), _PAGE):
            batch = names[start : start + _PAGE]
            with self._errors(batch[0].removeprefix(self._prefix)):
                answer = self._client.delete_objects(
                    Bucket=self.bucket, Delete={"Objects": [{"Key": name} for name in batch], "Quiet": True}
                )
            for error in answer.get("Errors", ()):
                raise StorageError(
                    f"cannot delete s3://{self.bucket}/{error.get('Key')} at {self.endpoint}: {error.get('Message')}"
                )

    def check(self, create_bucket: bool = False) -> None:
        """Find out whether the store can be used: within seconds, unless it takes the question and does not answer.

        Raises:
            StorageError: endpoint unreachable, credentials missing or refused, or no such bucket.
        """
        with self._errors():
            client = _connect(self.config, connect_timeout=3, read_timeout=_ANSWER_SECONDS, retries=1)
            try:
                client.list_objects_v2(Bucket=self.bucket, Prefix=self._prefix, MaxKeys=1)
            except ClientError as error:
                if not create_bucket or error_code(error) != "NoSuchBucket":
                    raise
                self._create_bucket(client)

    def clock(self) -> float:
        """The store's own time, unix seconds, to a second."""
        with self._errors():
            answer = self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._prefix, MaxKeys=1)
            return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def _create_bucket(self, client: S3Client) -> None:
        # AWS wants the region repeated, but for its first one; other servers want nothing.
        if self.config.endpoint_url is None and self.config.region != "us-east-1":
            where: Any = {"LocationConstraint": self.config.region}
            client.create_bucket(Bucket=self.bucket, CreateBucketConfiguration=where)
            return
        try:
            client.create_bucket(Bucket=self.bucket)
        except ClientError as error:
            if error_code(error) != "BucketAlreadyOwnedByYou":  # another process was quicker
                raise

    def full_key(self, key: str) -> str:
        """The key within the bucket."""
        return self._prefix + key

    @contextlib.contextmanager
    def _errors(self, key: str = "") -> Iterator[None]:
        """Turn the client's errors into ours."""
        try:
            yield
        except (BotoCoreError, ClientError, Boto3Error, ResponseParserError, OSError, ValueError) as error:
            raise StorageError(explain(error, self.config, self.url(key))) from error


def _transfer(size: int) -> TransferConfig:
    """Settings for an object of `size` bytes, whose parts grow where there would be too many."""
    return _in_parts(max(_PART_BYTES, -(-size // MOST_PARTS)))


def _in_parts(size: int) -> TransferConfig:
    # The CRT client would ignore the endpoint.
    return TransferConfig(multipart_threshold=size, multipart_chunksize=size, preferred_transfer_client="classic")


def _connect(config: StorageConfig, *, connect_timeout: float, read_timeout: float, retries: int) -> S3Client:
    """A client with a session of its own, because boto3's default session is not made for threads. Times in seconds."""
    host = urlsplit(config.endpoint_url or "").hostname
    settings = Config(
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
        retries={"mode": "standard", "total_max_attempts": retries},
        max_pool_connections=max(32, 2 * (os.cpu_count() or 1)),
        # A server that isn't AWS's seldom has a DNS name per bucket.
        s3={"addressing_style": "path" if config.endpoint_url else "auto"},
        # A proxy of the environment is not for loopback.
        proxies={} if host in ("127.0.0.1", "localhost", "::1") else None,
    )
    session = boto3.session.Session()
    return session.client("s3", endpoint_url=config.endpoint_url, region_name=config.region, config=settings)
