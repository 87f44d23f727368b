"""What a conversion may write over: its own earlier output, and that only once the new one is complete and proven."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from neox_core.artifact import ARTIFACT_FILE, Artifact, FileRecord, parse_artifact
from neox_core.checkpoint.formats.model_files import some
from neox_core.checkpoint.formats.outputs import JOURNAL_FILE, read_journal
from neox_core.errors import CheckpointError
from neox_core.storage.folders import Folder
from neox_core.storage.targets import Target


def recorded_artifact(folder: Folder) -> Artifact | None:
    """What a folder's artifact.json says; None: there is none that can be read."""
    try:
        return parse_artifact(folder.read_text(ARTIFACT_FILE), Path(str(folder)))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def check_target(target: Target, command: str, overwrite: bool) -> None:
    """Refuse a folder or prefix that holds anything but the command's own earlier output, finished or not.

    Raises:
        CheckpointError: it does, and `overwrite` is false; or its hidden folder `incoming` holds anything else, which
            nobody can have meant to be overwritten. The message names the files.
        StorageError: nothing can be written there.
    """
    target.check_usable()
    incoming = target.incoming()
    mine = {path for place in (incoming, target) for path in read_journal(place).get("planned", ())}
    if foreign := [path for path in incoming.files() if path not in mine]:
        raise CheckpointError(
            f"{incoming}, where what replaces a model is made, holds {some(foreign)}, which llemma {command} did not "
            "write: move that away, or choose another place"
        )
    if overwrite:
        return
    foreign, changed = _foreign_files(target, command)
    advice = "choose another place, or let it replace the model that is there with --overwrite"
    if foreign:
        raise CheckpointError(f"{target} holds {some(foreign)}, which llemma {command} did not write: {advice}")
    if changed:
        raise CheckpointError(f"{target} holds {some(changed)}, changed since llemma {command} wrote it: {advice}")


def _foreign_files(target: Target, command: str) -> tuple[list[str], list[str]]:
    """What is not of the command's own earlier output, and what of a finished output has another content by now."""
    present = target.files()
    artifact = recorded_artifact(target) if ARTIFACT_FILE in present else None
    mine = set(read_journal(target).get("planned", ()))
    if artifact is not None:
        mine = {ARTIFACT_FILE, *(mine or (record.path for record in artifact.files))}
        mine = mine if artifact.name == command else set()
    foreign = [path for path in present if path not in mine]
    if artifact is None or foreign:  # an unfinished output's files are replaced by those of the same name at any time
        return foreign, []
    marks = read_journal(target).get("marks", {})
    written = [record for record in artifact.files if record.path in present]
    return [], [record.path for record in written if not _as_written(target, record, marks.get(record.path))]


def _as_written(target: Target, record: FileRecord, mark: str | None) -> bool:
    """By the mark that was kept, which spares an object's content, else by the content."""
    return target.mark(record.path) == mark or target.digest(record.path) == (record.size, record.sha256)


@contextmanager
def replacing(target: Target, identity: str, last: str, belongs: Callable[[str], bool]) -> Iterator[Target]:
    """Yields where to write: the target itself, or a place next to it where a complete model of another kind is there.

    What was written there takes the old files' places when the block ends without an error; an interrupted attempt
    is continued there.

    Args:
        identity: of the attempt, see `write_files`.
        last: the file that makes the folder a model, written last.
        belongs: whether a path is one of a model's files, to be removed where the new model has none of that name.
    """
    present = target.files()
    journal = read_journal(target)
    unfinished = bool(journal) and last not in present
    if not present or unfinished or journal.get("identity") == identity:
        for path in present if journal.get("identity") != identity else []:
            if belongs(path):
                target.remove(path)
        target.clear_beside()
        yield target
        return
    incoming = target.incoming()
    yield incoming
    new = incoming.files()
    for path in (last, ARTIFACT_FILE, *(old for old in present if belongs(old) and old not in new)):
        target.remove(path)
    for path in (JOURNAL_FILE, *(path for path in new if path != last), last):
        target.take_over(path)
    target.clear_beside()
