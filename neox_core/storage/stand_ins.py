"""Files that lie where others should: what is left under the name of something that was not fetched."""

from __future__ import annotations

_LFS_POINTER = b"version https://git-lfs"
_PAGES = (b"<!doctype html", b"<html")


def stand_in(start: bytes) -> str | None:
    """What a file is, by its first bytes, that lies in place of another one; None: neither pointer nor web page."""
    if start.startswith(_LFS_POINTER):
        return "a git-lfs pointer, not the file itself: run `git lfs pull`"
    if start.lstrip().lower().startswith(_PAGES):
        return "a web page"
    return None
