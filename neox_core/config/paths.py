"""Places as users write them: what a shell would have expanded is expanded, or refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
_SHELL = re.compile(r"\$[({][^)}]*[)}]?")
"""What a shell would compute: $(command), ${NAME:-default}."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|(s3|gs|https?|file):", re.IGNORECASE)
"""Also with a slash too few: nobody means a folder called `s3:`."""


def expanded(text: str) -> str:
    """A path or s3://bucket/prefix with its environment variables and `~` replaced.

    Raises:
        ValueError: it is empty, a variable is not set, it holds what only a shell computes, or there is no such user.
    """
    if not text.strip():
        raise ValueError("it is empty: name a place")
    for variable in _VARIABLE.findall(text):
        if variable.strip("{}") not in os.environ:
            raise ValueError(f"{text} names ${variable}, which is not set in the environment: set it, or write it out")
    if shell := _SHELL.search(_VARIABLE.sub("", text)):
        raise ValueError(f"{text} holds {shell[0]}, which only a shell computes: write the place out, or use $NAME")
    text = os.path.expandvars(text)
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise ValueError(f"{text}: there is no such user's home here: write the folder out") from None


def local_path(text: str) -> Path:
    """As `expanded`, for a place that must be on a local or shared disk.

    Raises:
        ValueError: also where it is in an object store or has another scheme.
    """
    if _SCHEME.match(text):
        raise ValueError(f"{text} is no folder or file on a disk, which is needed here")
    return Path(expanded(text))
