"""Which files hold a source's text: a folder, a glob or an S3 prefix, plain or compressed."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from neox_core.data.tokenization.readers.formats import format_of, source_formats
from neox_core.data.tokenization.readers.lines import COMPRESSIONS
from neox_core.errors import DataError
from neox_core.storage.digest import sha256_of

if TYPE_CHECKING:
    from neox_core.config import DataConfig, StorageConfig
    from neox_core.storage.object_store import ObjectStore

SPLITS = ("train", "validation", "test")


def splits_of(config: DataConfig, source: str) -> tuple[str, ...]:
    """The splits of a source that are tokenized: train, and what evaluation reads."""
    evaluated = source in config.validation_sources
    return tuple(split for split in SPLITS if split == "train" or (evaluated and (split != "test" or config.test)))


_ABOUT = ("README", "LICENSE", "LICENCE")


@dataclass(frozen=True)
class InputFile:
    """One unit of work: a file of text."""

    source: str
    split: str
    name: str
    """Its name below the folder, glob or prefix that it was found by; unique within the split."""
    location: str
    """A path, or s3://bucket/key."""
    size: int
    """Bytes, as stored."""
    etag: str = ""
    """Of an S3 object: the store's mark of its content."""

    @property
    def logical_name(self) -> str:
        """The same wherever the data lies."""
        return f"{self.source}/{self.split}/{self.name}"


def source_files(config: DataConfig, storage: StorageConfig, source: str, split: str) -> list[InputFile]:
    """The files of one split of a source, sorted by name: `files.<split>` of the source, else
    `<input>/<source>/<split>/`.

    Returns an empty list only for a split that the source need not have, if no place is given for it: test, validation
    of a source that is not used for evaluation, and train of one that is left out by weight 0.

    Raises:
        DataError: there are none, or one is of another kind, not readable or, though packed, empty.
        StorageError: the object store cannot be listed.
    """
    given = next((where for name, where in config.sources[source].files.items() if name == split), None)
    location = given or f"{config.input}/{source}/{split}"
    if location.startswith("s3://"):
        found = _listed(location, storage)
    else:
        found = _found_locally(location, is_pattern=given is not None)
    needed = {"train": config.drawn_sources, "validation": config.validation_sources, "test": ()}[split]
    if not found and (source in needed or given is not None):
        missing = given is None and not location.startswith("s3://") and not Path(location).is_dir()
        lack = "does not exist" if missing else f"holds no {_kinds()} file"
        without = ", or name the sources that have it in data.eval_sources"
        hint = without if split != "train" else " (weight: 0 leaves a source out)" if source in needed else ""
        raise DataError(
            f"source {source!r} has no {split} text: {location} {lack}; correct data.input or data.sources{hint}"
        )
    formats = source_formats()
    for name, where, size, _ in found:
        if format_of(name, formats) is None:
            raise DataError(f"{where} is not a {_kinds()} file: convert it or move it away")
        if odd := {"", ".", ".."}.intersection(name.split("/")):  # an object's: no path of a part is made of it
            raise DataError(
                f"{where} has {odd.pop()!r} between slashes in its key: copy it to a key without, or move it"
            )
        # A plain file may be a shard that nothing fell into; of these, the smallest has some bytes.
        if size == 0 and name.endswith((*COMPRESSIONS, ".parquet")) and not config.skip_damaged_files:
            raise DataError(f"{where} is empty (0 bytes): fetch it again or remove it, or set data.skip_damaged_files")
    return [InputFile(source, split, *file) for file in sorted(found)]


@contextmanager
def open_input(file: InputFile, storage: StorageConfig | None, scratch: Path) -> Iterator[Path]:
    """The file as a local path; an S3 object is fetched into `scratch` and removed afterwards.

    Raises:
        StorageError: the object cannot be fetched.
        DataError: it has changed since it was listed.
    """
    if not file.location.startswith("s3://"):
        yield Path(file.location)
        return
    assert storage is not None, "s3:// inputs come with the settings of their store"
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch, prefix=".fetch-") as folder:
        url, _, key = file.location.rpartition("/")
        path = Path(folder, key)
        _store(url, storage).get_file(key, path)
        if path.stat().st_size != file.size:
            raise DataError(f"{file.location} has changed while it was read ({file.size} bytes before): run again")
        yield path


def is_gone(location: str, storage: StorageConfig) -> bool:
    """Whether nothing lies where raw inputs were: at a path, a pattern of paths, or s3://bucket/prefix.

    Raises:
        StorageError: the object store does not answer.
    """
    if not location.startswith("s3://"):
        return not (Path(location).exists() or (glob.has_magic(location) and _matches(*_split_pattern(location))))
    if not _is_pattern(location, storage):
        return _store(location, storage).is_empty()
    return _store(_before_pattern(location), storage).is_empty() or not _listed(location, storage)


def _kinds() -> str:
    """The kinds of files that can be read, by the ends of their names."""
    suffixes = [suffix for kind in source_formats() for suffix in kind.suffixes]
    plain = [suffix for suffix in suffixes if not suffix.endswith(COMPRESSIONS)]
    return f"{', '.join(plain[:-1])} or {plain[-1]}"


def content_digest(file: InputFile) -> str:
    """What identifies the file's content: SHA-256, or, of an S3 object, its ETag and size."""
    if file.location.startswith("s3://"):
        return hashlib.sha256(f"{file.etag} {file.size}".encode()).hexdigest()
    return sha256_of(Path(file.location))


_Found = list[tuple[str, str, int, str]]


def _found_locally(location: str, *, is_pattern: bool) -> _Found:
    try:
        return _matching(location) if is_pattern and not Path(location).is_dir() else _in_folder(Path(location))
    except OSError as error:
        raise DataError(
            f"{error.filename or location} cannot be read ({error.strerror}): correct the link or the permissions, or "
            "move it away"
        ) from None


def _in_folder(folder: Path) -> _Found:
    if not folder.is_dir():
        return []
    return [_local(path, folder) for path in folder.iterdir() if not _is_ignored(path.name)]


def _matching(pattern: str) -> _Found:
    """Files that match; a name begins below the last folder without a wildcard."""
    root, rest = _split_pattern(pattern)
    return [_local(path, root) for path in _matches(root, rest) if not path.is_dir() and not _is_ignored(path.name)]


def _split_pattern(location: str) -> tuple[Path, str]:
    """The last folder without a wildcard, and the pattern below it. What exists by its name is no wildcard: run[1]."""
    parts = PurePosixPath(location).parts
    fixed = 0
    while fixed < len(parts) - 1 and (not glob.has_magic(parts[fixed]) or Path(*parts[: fixed + 1]).exists()):
        fixed += 1
    rest = glob.escape(parts[-1]) if Path(location).exists() else "/".join(parts[fixed:])
    return Path(*parts[:fixed]), rest


def _matches(root: Path, pattern: str) -> set[Path]:
    return {root / match for match in glob.glob(pattern, root_dir=root, recursive=True)}  # **/** finds one repeatedly


def _local(path: Path, root: Path) -> tuple[str, str, int, str]:
    """A file below `root`. That it can be opened is found out here, and not when a worker comes to it."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise DataError(f"{path} is {kind}, not a {_kinds()} file: move it away, or give a pattern of the files' names")
    with path.open("rb"):
        return path.relative_to(root).as_posix(), str(path), status.st_size, ""


def _listed(location: str, storage: StorageConfig) -> _Found:
    """Objects below a prefix, or those that match a pattern."""
    url, pattern = location, ""
    if _is_pattern(location, storage):
        url = _before_pattern(location)
        pattern = location[len(url) + 1 :]
    objects = _store(url, storage).list()
    root = url.rstrip("/")
    return [
        (item.key, f"{root}/{item.key}", item.size, item.etag)
        for item in objects
        if _is_file(item.key) and (not pattern or _key_matches(item.key.split("/"), pattern.split("/")))
    ]


def _is_pattern(location: str, storage: StorageConfig) -> bool:
    """Whether a URL with wildcards is one: no prefix has it as its name."""
    return glob.has_magic(location) and _store(location, storage).is_empty()


def _before_pattern(location: str) -> str:
    """The part of a URL above its first wildcard."""
    head = location[: next(i for i, letter in enumerate(location) if letter in "*?[")]
    return head.rpartition("/")[0]


def _is_file(key: str) -> bool:
    """Neither ignored nor the mark of a folder, which some tools leave."""
    name = key.rpartition("/")[2]  # empty if the key is the prefix itself, too
    return bool(name) and not _is_ignored(name)


def _is_ignored(name: str) -> bool:
    """Hidden, or of what tools and people leave with text: README.md, LICENSE, _SUCCESS."""
    if name.startswith("."):
        return True
    about = name.startswith("_") or name.partition(".")[0].upper() in _ABOUT
    return about and format_of(name, source_formats()) is None


def _key_matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """As glob.glob(recursive=True) would match a file of these path components: ** is any number of folders, and at
    the end all that they hold; neither it nor a wildcard takes hidden ones."""
    if not pattern:
        return not parts
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        hidden = next((place for place, part in enumerate(parts) if part.startswith(".")), len(parts))
        if not rest:
            return 0 < len(parts) == hidden
        return any(_key_matches(parts[skipped:], rest) for skipped in range(hidden + 1))
    if not parts or (parts[0].startswith(".") and not first.startswith(".")):
        return False
    return fnmatch.fnmatchcase(parts[0], first) and _key_matches(parts[1:], rest)


def _store(url: str, storage: StorageConfig) -> ObjectStore:
    from neox_core.storage.object_store import ObjectStore  # boto3 takes a while to import

    return ObjectStore(storage.model_copy(update={"url": url.rstrip("/")}))
