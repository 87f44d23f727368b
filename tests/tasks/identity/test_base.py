"""A toy's base weights: random ones are made only where none are, or where they were being made before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neox_core.checkpoint.conversion import toy_base
from neox_core.checkpoint.formats.meta import MetaCheckpoint
from neox_core.config import RunConfig
from neox_core.errors import ConfigError
from tasks.identity.base import check_base, make_toy_base
from tests.neox_core.train.small_training import CONFIG
from tests.tasks.identity.test_specs import changed

SMALL: dict[str, Any] = {"num_layers": 1, "hidden_size": 16, "head_dim": 2, "vocab_size": 32, "intermediate_size": 32}


def small(folder: Path, **model: Any) -> RunConfig:
    """The demo's settings with a seed, a very small model and the base weights in `folder`."""
    config = changed(changed(CONFIG, "base_model.path", folder), "base_model.random_seed", 3)
    for key, value in (SMALL | model).items():
        config = changed(config, f"model.{key}", value)
    return config


@pytest.mark.parametrize("name", ["consolidated.00.pth", "model.safetensors", "pytorch_model.bin"])
def test_what_someone_else_put_there_is_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    for use in (check_base, make_toy_base):
        with pytest.raises(ConfigError, match=rf"base_model\.path .* holds {name}, but neither params\.json nor"):
            use(small(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_other_files_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / ".gitkeep").touch()
    (tmp_path / "tokenizer.model").write_text("mine")
    assert make_toy_base(small(tmp_path))
    assert (tmp_path / "tokenizer.model").read_text() == "mine"


def test_a_file_is_no_folder_for_weights(tmp_path: Path) -> None:
    (tmp_path / "base").write_text("precious")
    with pytest.raises(ConfigError, match=r"base cannot be read: Not a directory: give a folder"):
        make_toy_base(small(tmp_path / "base"))


def test_an_empty_folder_takes_weights(tmp_path: Path) -> None:
    check_base(small(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert make_toy_base(small(tmp_path))
    assert not make_toy_base(small(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3


def test_weights_are_made_anew_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, content: str) -> None:
        (path.parent / ".consolidated.00.pth.0123456789ab.tmp").write_text("half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(toy_base, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            make_toy_base(small(tmp_path))
    assert (tmp_path / "consolidated.01.pth").exists()
    config = small(tmp_path, intermediate_size=33)  # has one shard
    check_base(config)
    assert make_toy_base(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["consolidated.00.pth", "params.json"]
    assert MetaCheckpoint(tmp_path).model.intermediate_size == 33


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "qwen2"}, r"random_seed cannot make weights of this model: .*, not qwen2 with heads of 2: change"),
        ({"tied_embeddings": True}, "no word for tied embeddings: change the model, or leave random_seed out"),
        ({"attention_bias": True}, r"no word for the biases of model\.attention_bias"),
    ],
)
def test_a_model_that_is_none_of_metas(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    for use in (check_base, make_toy_base):
        with pytest.raises(ConfigError, match=message):
            use(small(tmp_path / "base", **change))
    assert not (tmp_path / "base").exists()
