from __future__ import annotations

import pickle
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from infra.s3.server import S3Endpoint
from neox_core.config import StorageConfig
from neox_core.errors import StorageError
from neox_core.storage.object_store import ObjectInfo, ObjectStore


def plain_client(endpoint: S3Endpoint):  # type: ignore[no-untyped-def]
    """What another S3 program sees."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint.url,
        aws_access_key_id=endpoint.access_key,
        aws_secret_access_key=endpoint.secret_key,
        region_name="us-east-1",
    )


def test_files_and_texts_are_what_another_client_reads_and_writes(
    store: ObjectStore, s3_endpoint: S3Endpoint, tmp_path: Path
) -> None:
    content = bytes(range(256)) * (12 << 12)  # 12 MiB: goes up in parts
    (tmp_path / "weights.pt").write_bytes(content)
    store.put_file(tmp_path / "weights.pt", "a/weights.pt")
    store.put_text("a/note", "Größe ≤ 5")

    client = plain_client(s3_endpoint)
    stored = client.get_object(Bucket=store.bucket, Key="some/prefix/a/weights.pt")
    assert stored["Body"].read() == content
    assert store.get_text("a/note") == "Größe ≤ 5"
    assert store.url("a/note") == f"s3://{store.bucket}/some/prefix/a/note"

    client.put_object(Bucket=store.bucket, Key="some/prefix/b/theirs", Body=b"their bytes")
    store.get_file("b/theirs", tmp_path / "new" / "mine")
    assert (tmp_path / "new" / "mine").read_bytes() == b"their bytes"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine"]


def test_parts_grow_where_there_would_be_too_many(
    store: ObjectStore, s3_endpoint: S3Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neox_core.storage.object_store.MOST_PARTS", 2)
    content = bytes(range(256)) * (20 << 12) + b"more"  # three parts of 8 MiB
    (tmp_path / "weights.pt").write_bytes(content)
    store.put_file(tmp_path / "weights.pt", "weights.pt")
    store.copy("weights.pt", "copied.pt")
    client = plain_client(s3_endpoint)
    for name in ("weights.pt", "copied.pt"):
        stored = client.get_object(Bucket=store.bucket, Key=f"some/prefix/{name}")
        assert stored["ETag"].strip('"').endswith("-2")
        assert stored["Body"].read() == content


def test_list_and_delete_go_over_pages_and_stay_below_the_prefix(
    store: ObjectStore, s3_endpoint: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neox_core.storage.object_store._PAGE", 10)
    plain_client(s3_endpoint).put_object(Bucket=store.bucket, Key="some/other", Body=b"not ours")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.put_text(f"many/{i:04d}", "x" * (i % 7)), range(35)))
    store.put_text("few/1", "12345")

    assert store.list("few/") == [ObjectInfo("few/1", 5)]
    assert store.list("many/") == [ObjectInfo(f"many/{i:04d}", i % 7) for i in range(35)]
    assert len(store.list()) == 36

    store.delete([info.key for info in store.list("many/")] + ["never/there"])
    assert store.list() == [ObjectInfo("few/1", 5)]
    plain_client(s3_endpoint).head_object(Bucket=store.bucket, Key="some/other")


def test_what_is_not_there(store: ObjectStore, tmp_path: Path) -> None:
    assert store.get_text("nothing") is None
    assert store.list("nothing") == []
    with pytest.raises(StorageError, match=rf"no object s3://{store.bucket}/some/prefix/nothing"):
        store.get_file("nothing", tmp_path / "file")
    assert list(tmp_path.glob("*file*")) == []
    with pytest.raises(StorageError, match="missing-file"):
        store.put_file(tmp_path / "missing-file", "key")


def test_a_store_travels_to_another_process(store: ObjectStore) -> None:
    store.put_text("key", "text")
    assert pickle.loads(pickle.dumps(store)).get_text("key") == "text"


def test_check_accepts_a_good_store_and_makes_a_bucket_once(store: ObjectStore, storage_config: StorageConfig) -> None:
    store.check()
    other = ObjectStore(storage_config.model_copy(update={"url": storage_config.url.replace("test-", "more-")}))
    with pytest.raises(StorageError, match=f"no bucket {other.bucket} at http://127.0.0.1"):
        other.check()
    other.check(create_bucket=True)
    other.check(create_bucket=True)
    other.check()


def test_wrong_secret(storage_config: StorageConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = ObjectStore(storage_config)
    with pytest.raises(StorageError, match=f"127.0.0.1.* refuses the credentials for bucket {store.bucket}") as caught:
        store.check()
    assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"refuses the credentials.*SignatureDoesNotMatch"):
        store.put_file(tmp_path / "file", "key")
    with pytest.raises(StorageError, match="refuses the credentials"):
        store.get_file("key", tmp_path / "copy")


@pytest.mark.usefixtures("no_aws_files")
def test_missing_credentials(s3_endpoint: S3Endpoint) -> None:
    store = ObjectStore(StorageConfig(url="s3://bucket/x", endpoint_url=s3_endpoint.url))
    with pytest.raises(StorageError, match=r"no credentials for s3://bucket/x.*set AWS_ACCESS_KEY_ID"):
        store.check()


def test_nobody_listens(storage_config: StorageConfig) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        store = ObjectStore(storage_config.model_copy(update={"endpoint_url": url}))
        with pytest.raises(StorageError, match=rf"cannot reach the object store at {url}.*storage\.endpoint_url"):
            store.check()


def test_a_server_that_never_answers_is_given_up(
    storage_config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neox_core.storage.object_store._ANSWER_SECONDS", 0.5)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        store = ObjectStore(storage_config.model_copy(update={"endpoint_url": url}))
        with pytest.raises(StorageError, match="cannot reach the object store"):
            store.check()


def test_an_endpoint_that_is_no_address(storage_config: StorageConfig) -> None:
    with pytest.raises(StorageError, match=r"endpoint_url somewhere is not an address such as https://"):
        ObjectStore(storage_config.model_copy(update={"endpoint_url": "somewhere"}))


def test_a_damaged_download_leaves_the_old_file(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    store.put_text("key", "new")

    def torn(bucket: str, key: str, file: object, Config: object, Callback: object) -> None:
        file.write(b"ne")  # type: ignore[attr-defined]
        raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr(store._client, "download_fileobj", torn)
    with pytest.raises(StorageError, match=r"some/prefix/key.*connection reset"):
        store.get_file("key", path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
