"""Every file of a GPT-NeoX checkout's configs/ folder imports with each key accounted for, or is refused for a reason.

    NEOX_CONFIGS=/path/to/gpt-neox/configs NEOX_WITH=recipe.yml pytest -s tests/neox_core/config/neox/test_checkout.py

NEOX_WITH names files (separated by colons) that each is merged with: most files give an architecture alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from neox_core.config.neox.keys import MAPPED
from neox_core.config.neox.settings import read_settings
from neox_core.config.neox.yaml_import import import_neox
from neox_core.errors import ConfigError

CONFIGS = os.environ.get("NEOX_CONFIGS", "")
WITH = [Path(name) for name in os.environ.get("NEOX_WITH", "").split(":") if name]


def outcome(path: Path) -> str:
    """What becomes of a file; raises anything but a refusal."""
    try:
        found = import_neox([path, *WITH])
    except ConfigError as error:
        return f"refused: {str(error).removeprefix(str(path)).lstrip(': ')}"
    listed = {key.split(".")[0] for key, _, _ in found.ineffective}
    given = {key for key, value in read_settings([path, *WITH]).values.items() if value is not None}
    unaccounted = sorted(given - listed - MAPPED)
    assert not unaccounted, f"{path}: {unaccounted}"
    return f"imported: {len(given)} keys, {len(listed)} without effect, {len(found.todo)} to look at"


@pytest.mark.skipif(not CONFIGS, reason="NEOX_CONFIGS names no configs/ folder of a GPT-NeoX checkout")
def test_every_file_of_a_checkout() -> None:
    paths = sorted(path for path in Path(CONFIGS).rglob("*.yml") if path not in WITH)
    assert paths
    for path in paths:
        sys.stdout.write(f"{path.relative_to(CONFIGS)}: {outcome(path)}\n")
