"""What all ranks must agree on before they build anything: configuration, code, data and weights.

Ranks that differ would hang in a collective or, worse, train on different things without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

import neox_core
from neox_core.artifact import read_artifact, software
from neox_core.config import RunConfig
from neox_core.data.dataset import token_prefix
from neox_core.data.indexed import bin_path
from neox_core.errors import CheckpointError, LaunchError

Facts = Mapping[str, str]
"""What is compared, by name."""

_SHOWN = 8
_PLACES = ("data.input", "data.evaluation_sets")
"""Paths that are not of type Path: all of them may differ between hosts."""


def check_ranks_agree(facts: Facts) -> None:
    """Compare this rank's facts with all others'. Collective over all ranks, which must have the same names of facts.

    Costs one exchange of 32 bytes per rank; the facts themselves travel only when they differ.

    Raises:
        LaunchError: they differ; on every rank, with the ranks and the values.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return
    all_facts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_facts, dict(facts))
    raise LaunchError(explain_differences(all_facts))


def explain_differences(facts: Sequence[Facts]) -> str:
    """One line that says which ranks (the indices of `facts`) have which value of what."""
    names = sorted({name for own in facts for name in own})
    different = [name for name in names if len({own.get(name) for own in facts}) > 1]
    lines = []
    for name in different[:_SHOWN]:
        holders = defaultdict(list)
        for rank, own in enumerate(facts):
            holders[own.get(name, "absent")].append(rank)
        lines.append(f"{name} is " + " and ".join(f"{value} on {rank_list(ranks)}" for value, ranks in holders.items()))
    more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    return (
        f"the ranks differ: {'; '.join(lines)}{more}. Start all of them from the same installation, with the same "
        "configuration, data and weights"
    )


def rank_list(ranks: Sequence[int]) -> str:
    """'rank 3' or 'ranks 0-2, 5', of rising numbers."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"


def startup_facts(config: RunConfig, identity: str, data: Path, weights: Path) -> dict[str, str]:
    """What this rank would train: every setting, the software, and what it finds in its folders.

    Args:
        identity: the training's fingerprint.
        data, weights: folders of prepare-data's and convert's artifacts.
    """
    return {
        **{f"setting {key}": value for key, value in _settings(config.model_dump())},
        **{f"version of {name}": version for name, version in software().items()},
        "source code": _source_digest(Path(neox_core.__file__).parent),
        "training": identity,
        "data": _artifact(data),
        "weights": _artifact(weights),
        **{
            f"size of {name}'s tokens": _size(bin_path(token_prefix(data, name, "train")))
            for name in config.data.sources
        },
    }


def _settings(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys and values, without those that are places."""
    found: list[tuple[str, str]] = []
    for name, value in section.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found += _settings(value, f"{key}.")
        elif not isinstance(value, Path) and key not in _PLACES and ".files." not in key:
            found.append((key, json.dumps(value, default=str)))
    return found


def _source_digest(folder: Path) -> str:
    """Of all Python files: a checkout may be changed without a new version."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _artifact(folder: Path) -> str:
    try:
        return read_artifact(folder).fingerprint
    except CheckpointError:
        return "no artifact"


def _size(path: Path) -> str:
    return f"{path.stat().st_size} bytes" if path.is_file() else "absent"
