"""Files written whole or not at all, and what is wrong with descriptions of architectures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from neox_core.errors import CheckpointError


@contextmanager
def described_by(path: str) -> Iterator[None]:
    """Turn what is wrong with an architecture's values, as they are read from `path`, into CheckpointError."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, problem['loc']))} {problem['msg']}".strip()) from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} has a value that is not a number of the right kind: {error}") from None


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it; a failure leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
