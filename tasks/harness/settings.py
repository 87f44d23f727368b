"""What `llemma evaluate --model` is asked to do, and the folder that it may go on in."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neox_core.errors import ConfigError
from neox_core.storage.atomic import write_atomically

SETTINGS_FILE = "settings.json"
TASK_FILES = "tasks"
"""In the folder for records: what the harness reads."""
BACKENDS = ("hf", "vllm")
_EARLIER = {"dtype": "auto"}
"""Of settings that older evaluations do not name."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class HarnessSettings:
    """One evaluation of one model."""

    model: Path
    """Folder in Hugging Face's format."""
    data: Path
    """Folder of the sets' JSON lines."""
    out: Path
    """Folder for records and scores."""
    tasks: tuple[str, ...]
    samples: int = 0
    """Samples per item for the majority vote, in addition to the greedy one."""
    temperature: float = 0.6
    """Of the samples."""
    seed: int = 1234
    limit: int | None = None
    """The first so many items of each task."""
    batch_size: int | None = None
    """Items at a time; None: what the device's memory holds."""
    max_tokens: int = 512
    """Of a generated answer."""
    backend: str = "hf"
    """lm-evaluation-harness's name of it: hf or vllm."""
    identity: str | None = None
    """What stands for the model's content; None: its files' names, sizes and times."""
    dtype: str = "auto"
    """In which the model computes: auto is that of its weights; or float32, bfloat16, float16."""


def check_settings(settings: HarnessSettings) -> None:
    """Whether the settings can be.

    Raises:
        ConfigError: no model lies there, or a value makes no sense.
    """
    if not (settings.model / "config.json").is_file():
        raise ConfigError(f"{settings.model} holds no config.json: give a folder in Hugging Face's format")
    for name, value, known in (("backend", settings.backend, BACKENDS), ("dtype", settings.dtype, DTYPES)):
        if value not in known:
            raise ConfigError(f"--{name} {value}: give one of {', '.join(known)}")
    counts = {"limit": settings.limit, "batch-size": settings.batch_size, "max-tokens": settings.max_tokens}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"--{name} {count}: give 1 or more")
    if settings.out == settings.model:
        raise ConfigError(f"{settings.out} is the model's own folder: give another --out")
    if settings.samples == 1 or settings.samples < 0 or not 0 < settings.temperature < math.inf:
        raise ConfigError(
            f"{settings.samples} samples at temperature {settings.temperature}: a vote needs 2 or more, at one above 0 "
            "that is finite"
        )


def check_folder(settings: HarnessSettings) -> None:
    """Write down what is evaluated, or find that an earlier call wrote the same. For whoever has the folder's claim.

    Raises:
        ConfigError: the folder holds another evaluation.
    """
    wanted, path = _identity(settings), settings.out / SETTINGS_FILE
    if not path.is_file():
        write_atomically(path, json.dumps(wanted, indent=1))
    found = read_json(path, "give another --out")
    differing = sorted(key for key in wanted if found.get(key, _EARLIER.get(key)) != wanted[key])
    if differing and "weights" in found and not _has_answers(settings.out):  # a call that failed binds nobody
        write_atomically(path, json.dumps(wanted, indent=1))
    elif differing:
        values = ", ".join(f"{key} ({found.get(key, _EARLIER.get(key))}, now {wanted[key]})" for key in differing)
        raise ConfigError(f"{settings.out} holds an evaluation with other values of {values}: give another --out")


def _has_answers(out: Path) -> bool:
    return any(path.stat().st_size for path in out.glob("*/*.jsonl") if path.parent.name != TASK_FILES)


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """What a file that holds a JSON object says.

    Args:
        advice: what to do where it does not.

    Raises:
        ConfigError: it does not.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): {advice}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a JSON object: {advice}")
    return found


def _identity(settings: HarnessSettings) -> dict[str, Any]:
    """What the generated texts depend on. The tasks do not count: others can be added."""
    weights = settings.identity or _weights(settings.model)
    identity = asdict(settings) | {"model": str(settings.model.resolve()), "weights": weights}
    return {key: value for key, value in identity.items() if key not in ("data", "out", "tasks", "identity")}


def _weights(model: Path) -> str:
    """A digest of the files' names, sizes and times: another model under the same name is another evaluation."""
    files = sorted(path for path in model.iterdir() if path.is_file())
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
