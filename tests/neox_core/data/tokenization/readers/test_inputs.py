"""Which files are read: folders, globs and S3 prefixes, sorted; and what is no text is never passed over."""

from __future__ import annotations

import errno
import glob
from pathlib import Path
from typing import Any

import pytest

from neox_core.config import DataConfig, StorageConfig
from neox_core.data.tokenization.readers import open_input, source_files
from neox_core.data.tokenization.readers.inputs import _key_matches, content_digest, is_gone
from neox_core.errors import DataError, StorageError
from neox_core.storage.object_store import ObjectInfo, ObjectStore

STORAGE = StorageConfig(url="s3://unused/x")


def write(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def data_config(folder: Path | str, *evaluated: str, files: dict[str, str] | None = None, **data: Any) -> DataConfig:
    sources = {name: {"weight": 1} for name in ("a", "b")}
    sources["a"] |= {"files": files or {}}  # type: ignore[dict-item]
    return DataConfig.model_validate({"input": folder, "sources": sources, "eval_sources": evaluated, **data})


def names(config: DataConfig, storage: StorageConfig = STORAGE, split: str = "train") -> list[str]:
    return [file.name for file in source_files(config, storage, "a", split)]


def test_folder_is_sorted_by_name(tmp_path: Path) -> None:
    for name in ("2.jsonl", "10.jsonl.zst", "1.jsonl.gz", "3.parquet", ".hidden"):
        write(tmp_path / "a" / "train" / name)
    assert names(data_config(tmp_path)) == ["1.jsonl.gz", "10.jsonl.zst", "2.jsonl", "3.parquet"]


def test_what_tools_and_people_leave_with_text_is_ignored(tmp_path: Path) -> None:
    left = ("README.md", "README", "readme.txt", "LICENSE", "_SUCCESS", "_committed_1", ".1.jsonl.crc", ".DS_Store")
    text = ("_1.jsonl", "README.jsonl", "2.json.gz", "3.ndjson", "4.jsonl.zstd")
    for name in left + text:
        write(tmp_path / "a" / "train" / name)
    assert names(data_config(tmp_path)) == sorted(text)
    assert names(data_config(tmp_path, files={"train": f"{tmp_path}/a/train/*"})) == sorted(text)


def test_glob_names_files_below_its_fixed_part(tmp_path: Path) -> None:
    for name in ("y/2.jsonl", "x/1.jsonl", "x/deep/3.jsonl", "x/notes.txt"):
        write(tmp_path / "raw" / name)
    assert names(data_config(tmp_path, files={"train": f"{tmp_path}/raw/*/*.jsonl"})) == ["x/1.jsonl", "y/2.jsonl"]
    everything = data_config(tmp_path, files={"train": f"{tmp_path}/raw/**/*.jsonl"})
    assert names(everything) == ["x/1.jsonl", "x/deep/3.jsonl", "y/2.jsonl"]
    assert names(data_config(tmp_path, files={"train": f"{tmp_path}/raw/**/**/*.jsonl"})) == names(everything)
    assert names(data_config(tmp_path, files={"train": f"{tmp_path}/raw/y"})) == ["2.jsonl"]
    assert names(data_config(tmp_path, files={"train": f"{tmp_path}/raw/y/2.jsonl"})) == ["2.jsonl"]
    with pytest.raises(DataError, match=r"source 'a' has no train text: .*/raw/\*\.zst holds no \.jsonl"):
        names(data_config(tmp_path, files={"train": f"{tmp_path}/raw/*.zst"}))


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    for name in ("in[1]/p[1].jsonl", "in[1]/p1.jsonl", "in[1]/p2.jsonl", "in1/p1.jsonl", "in2/p1.jsonl"):
        write(tmp_path / name)
    for given, expected in (
        ("in[1]/p[1].jsonl", ["p[1].jsonl"]),
        ("in[1]/p[2].jsonl", ["p2.jsonl"]),
        ("in[1]/p[12].jsonl", ["p1.jsonl", "p2.jsonl"]),
        ("in[1]", ["p1.jsonl", "p2.jsonl", "p[1].jsonl"]),
        ("in?/p[1].jsonl", ["in1/p1.jsonl", "in2/p1.jsonl"]),
        ("in[2]/*.jsonl", ["in2/p1.jsonl"]),
    ):
        config = data_config(tmp_path, files={"train": f"{tmp_path}/{given}"})
        assert names(config) == expected
        assert not is_gone(f"{tmp_path}/{given}", STORAGE)
    for given in ("in[1]/p[3].jsonl", "in[3]", "in[1]/p[2]"):
        assert is_gone(f"{tmp_path}/{given}", STORAGE)


def test_a_prefix_that_exists_is_no_pattern(store: ObjectStore, storage_config: StorageConfig) -> None:
    for key in ("in[1]/a/train/0.jsonl", "in1/a/train/1.jsonl", "in2/a/train/2.jsonl"):
        store.put_text(key, "text")
    assert names(data_config(f"{storage_config.url}/in[1]"), storage_config) == ["0.jsonl"]
    for given, expected in (("in[1]/a/train", ["0.jsonl"]), ("in[2]/a/train/*", ["in2/a/train/2.jsonl"])):
        place = f"{storage_config.url}/{given}"
        assert names(data_config("unused", files={"train": place}), storage_config) == expected
        assert not is_gone(place, storage_config)
    assert is_gone(f"{storage_config.url}/in[3]", storage_config)


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    config = data_config(tmp_path, "a")
    with pytest.raises(DataError, match=r"source 'a' has no train text: .*/a/train does not exist"):
        names(config)
    write(tmp_path / "a" / "train" / "0.jsonl", b"")
    assert names(config) == ["0.jsonl"]  # a shard that nothing fell into
    packed = write(tmp_path / "a" / "train" / "1.jsonl.gz", b"")
    with pytest.raises(DataError, match=r"1\.jsonl\.gz is empty \(0 bytes\)"):
        names(config)
    assert names(data_config(tmp_path, "a", skip_damaged_files=True)) == ["0.jsonl", "1.jsonl.gz"]
    packed.unlink()
    write(tmp_path / "a" / "train" / "1.txt")
    with pytest.raises(DataError, match=r"1\.txt is not a"):
        names(config)


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "a" / "train" / "0.jsonl").parent
    by_folder, by_glob = data_config(tmp_path), data_config(tmp_path, files={"train": f"{folder}/*.jsonl"})
    (folder / "1.jsonl").mkdir()
    with pytest.raises(DataError, match=r"a/train/1\.jsonl is a folder, not a \.jsonl.* file: move it away"):
        names(by_folder)
    assert names(by_glob) == ["0.jsonl"]  # as a pattern with ** matches folders, too
    (folder / "1.jsonl").rmdir()
    (folder / "1.jsonl").symlink_to("gone")
    for config in (by_folder, by_glob):
        with pytest.raises(DataError, match=r"a/train/1\.jsonl cannot be read \(No such file or directory\): correct"):
            names(config)
    (folder / "1.jsonl").unlink()

    def refuse(path: Path, *arguments: Any) -> None:  # root may read everything
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    for config in (by_folder, by_glob):
        with pytest.raises(DataError, match=r"a/train/0\.jsonl cannot be read \(Permission denied\)"):
            names(config)


def test_only_sources_for_evaluation_need_validation(tmp_path: Path) -> None:
    config = data_config(tmp_path, "a")
    assert source_files(config, STORAGE, "b", "validation") == []
    with pytest.raises(DataError, match=r"a/validation.*data\.eval_sources"):
        names(config, split="validation")
    with pytest.raises(DataError, match="b/train"):
        source_files(config, STORAGE, "b", "train")


KEYS = (
    "train.jsonl", "x/train.jsonl", "x/pretrain.jsonl", "x/deep/er/train.jsonl", "x/deep/1.jsonl", "x/10.jsonl",
    ".cache/train.jsonl", "x/.hidden/train.jsonl", "x/.train.jsonl", "y/[1].jsonl", "y/a.b.jsonl",
)  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    [
        "**/train.jsonl", "**", "x/**", "*/*.jsonl", "*", "*.jsonl", "x/**/*.jsonl", "**/deep/**/train.jsonl", "x*/*/*",
        "?/?.jsonl", "?/??.jsonl", "**/[0-9]*.jsonl", "y/[[]1].jsonl", "[!x]/*", "**/**/1.jsonl", "**train.jsonl",
        ".cache/*", "x/.*/*.jsonl", "**/.train.jsonl", "x/deep/**", "z/**", "**/",
    ],
)  # fmt: skip
def test_a_pattern_means_the_same_on_a_disk_and_in_a_store(tmp_path: Path, pattern: str) -> None:
    for key in KEYS:
        write(tmp_path / key)
    matches = {path for path in glob.glob(pattern, root_dir=tmp_path, recursive=True) if (tmp_path / path).is_file()}
    assert {key for key in KEYS if _key_matches(key.split("/"), pattern.split("/"))} == matches


def test_marks_of_folders_in_a_store_are_passed_over(store: ObjectStore, storage_config: StorageConfig) -> None:
    for key in ("a/train/", "a/train/deep/"):
        store.put_text(key, "")
    for key in ("a/train/train.jsonl", "a/train/deep/pretrain.jsonl"):
        store.put_text(key, "text")
    everything = ["deep/pretrain.jsonl", "train.jsonl"]
    assert names(data_config(storage_config.url), storage_config) == everything
    for pattern, expected in (("**", everything), ("**/*", everything), ("**/train.jsonl", ["train.jsonl"])):
        config = data_config("unused", files={"train": f"{storage_config.url}/a/train/{pattern}"})
        assert names(config, storage_config) == expected


@pytest.mark.parametrize("key", ["/1.jsonl", "deep//1.jsonl", "../1.jsonl", "deep/./1.jsonl"])
def test_a_key_that_would_be_another_files_path_is_refused(
    store: ObjectStore, storage_config: StorageConfig, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Its part would lie outside the workdir, or be another file's."""
    monkeypatch.setattr(ObjectStore, "list", lambda self, prefix="": [ObjectInfo(key, 4, "x")])
    with pytest.raises(DataError, match=r"a/train/.*1\.jsonl has '\.{0,2}' between slashes in its key"):
        names(data_config(storage_config.url), storage_config)


def test_s3_prefix_and_pattern(tmp_path: Path, store: ObjectStore, storage_config: StorageConfig) -> None:
    for name in ("a/train/2.jsonl", "a/train/1.jsonl", "a/train/deep/3.jsonl", "a/other/4.jsonl"):
        store.put_text(name, f"text of {name}")
    config = data_config(storage_config.url)
    files = source_files(config, storage_config, "a", "train")
    assert [file.name for file in files] == ["1.jsonl", "2.jsonl", "deep/3.jsonl"]
    pattern = data_config("unused", files={"train": f"{storage_config.url}/a/*/*.jsonl"})
    assert names(pattern, storage_config) == ["other/4.jsonl", "train/1.jsonl", "train/2.jsonl"]
    with open_input(files[0], storage_config, tmp_path) as path:
        assert path.read_text() == "text of a/train/1.jsonl"
        assert path.name == "1.jsonl"
    assert not list(tmp_path.iterdir())
    before = content_digest(files[0])
    assert before == content_digest(source_files(config, storage_config, "a", "train")[0])
    store.put_text("a/train/1.jsonl", "Text of a/train/1.jsonl")
    assert before != content_digest(source_files(config, storage_config, "a", "train")[0])


def test_what_is_gone(tmp_path: Path, store: ObjectStore) -> None:
    places = {"folder": "a", "pattern": "a/**/*.jsonl", "file": "a/b/1.jsonl"}
    for place in places.values():
        assert is_gone(f"{tmp_path}/{place}", STORAGE)
    write(tmp_path / "a" / "b" / "1.jsonl")
    for place in places.values():
        assert not is_gone(f"{tmp_path}/{place}", STORAGE)
    url = store.url()
    for place in ("a", "a/**/*.jsonl"):
        assert is_gone(f"{url}{place}", store.config)
        assert is_gone(f"s3://no-such-{store.bucket}/{place}", store.config)
    store.put_text("a/b/1.jsonl", "x")
    assert not is_gone(f"{url}a", store.config)
    assert not is_gone(f"{url}a/**/*.jsonl", store.config)
    assert is_gone(f"{url}a/*.parquet", store.config)


def test_a_store_that_does_not_answer_is_not_empty(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="refuses the credentials"):
        is_gone(f"{store.url()}a", store.config)
