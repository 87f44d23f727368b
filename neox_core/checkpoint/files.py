"""Files of tensors: opened without unpickling code or filling memory, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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


def load_file(path: Path) -> dict[str, Any]:
    """Open a file of torch.save; tensors stay on disk (mmap) until they are used, and no code in it is run.

    Raises:
        CheckpointError: the file is missing, truncated, holds anything but plain data and tensors, or is not a dict.
    """
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint file {path} does not exist") from None
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ValueError ... for damaged files
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"checkpoint file {path} ({path.stat().st_size} bytes) is damaged, truncated or not a file of tensors: "
            f"copy it again ({reason})"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint file {path} holds a {type(content).__name__}, not named tensors")
    return content


def save_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write named tensors so that `path` is either absent or complete. Views are copied, so that no more is written."""
    write_file(path, lambda temporary: torch.save(_compact(content), temporary))


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


def _compact(content: Any) -> Any:
    """The same content with every tensor in storage of its own; torch.save would write a view's whole storage."""
    if isinstance(content, torch.Tensor):
        return content.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(content, Mapping):
        return {key: _compact(value) for key, value in content.items()}
    return content
