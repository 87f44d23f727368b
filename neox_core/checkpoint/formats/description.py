"""What is wrong with descriptions of architectures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
