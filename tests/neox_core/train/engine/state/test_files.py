"""A checkpoint's files are tensors and plain values; code in them is not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.tensor_fragment import fragment_address

from neox_core.errors import CheckpointError
from neox_core.train.engine.state.files import StateFiles, read_state


class Code:
    """Unpickled by an ordinary load, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_what_a_rank_saves_is_read(tmp_path: Path) -> None:
    state = {"step": 3, "slices": [{"a": fragment_address(numel=2, start=4)}], "names": {"b"}, "moments": torch.ones(2)}
    torch.save(state, tmp_path / "state.pt")
    found = read_state(tmp_path / "state.pt", mmap=True)
    assert torch.equal(found.pop("moments"), state.pop("moments"))
    assert found == state


def test_code_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"state": torch.zeros(2), "step": Code(tmp_path / "ran")}, tmp_path / "state.pt")
    files = StateFiles(lambda content, path: None)
    for load in (read_state, lambda path: files.load(str(path))):
        with pytest.raises(CheckpointError, match=r"state\.pt is not loaded, since it holds more than tensors"):
            load(tmp_path / "state.pt")
    assert not (tmp_path / "ran").exists()


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    torch.save({"state": torch.zeros(1000)}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:1500])
    with pytest.raises(CheckpointError, match=r"cut\.pt is not loaded"):
        read_state(tmp_path / "cut.pt")
