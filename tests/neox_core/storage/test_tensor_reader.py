"""Files of tensors that are not as they should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from neox_core.errors import CheckpointError
from neox_core.storage.tensor_reader import LocalContent, open_tensors


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(3, 4)}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_bytes_after_the_tensors_are_refused_as_safetensors_itself_does(file: Path) -> None:
    assert open_tensors(LocalContent(file))["a"].shape == (3, 4)
    size = file.stat().st_size
    with file.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(CheckpointError, match=rf"\({size + 4} bytes\) is damaged.*its tensors end at byte {size}"):
        open_tensors(LocalContent(file))


def test_a_folder_under_a_files_name(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").mkdir()
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth cannot be read: Is a directory"):
        open_tensors(LocalContent(tmp_path / "consolidated.00.pth"))


def test_a_git_lfs_pointer_says_what_to_do(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 8\n")
    with pytest.raises(CheckpointError, match=r"is a git-lfs pointer, not the file itself: run `git lfs pull`"):
        open_tensors(LocalContent(file))
