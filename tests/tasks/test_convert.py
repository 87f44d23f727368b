"""The convert stage with its base weights in the object store."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ParallelConfig
from neox_core.errors import ConfigError
from neox_core.progress import silent
from neox_core.storage.object_store import ObjectStore
from tasks.convert import convert
from tasks.identity.specs import convert_spec
from tasks.preflight import check_run
from tests.neox_core.train.small_training import CONFIG


def test_base_weights_in_the_object_store(store: ObjectStore, tmp_path: Path) -> None:
    base = CONFIG.base_model.model_copy(update={"path": f"{store.url()}base", "rope_theta": None, "vocab_size": None})
    config = CONFIG.model_copy(
        update={
            "workdir": tmp_path / "work",
            "storage": store.config,
            "base_model": base,
            "parallel": ParallelConfig(tensor=2),
        }
    )
    with pytest.raises(ConfigError, match=r"base_model\.path: checkpoint folder s3://.*/base does not exist"):
        convert_spec(config)
    make_random_base(config.model, tmp_path / "base", seed=3)
    for path in (tmp_path / "base").iterdir():
        store.put_file(path, f"base/{path.name}")
    result = convert(config, silent)
    assert result.artifact.summary["largest_layer_difference"] < 1e-5
    assert NeoxCheckpoint(result.artifact.folder).tensor_parallel == 2
    assert convert(config, silent).skipped
    # Nothing of the base was copied to the disk.
    assert not list((tmp_path / "work").rglob("*.pth"))
    make_random_base(config.model, tmp_path / "base", seed=4)
    store.put_file(tmp_path / "base/consolidated.00.pth", "base/consolidated.00.pth")
    assert convert_spec(config).fingerprint != result.artifact.fingerprint


def test_base_weights_that_are_gone_from_the_object_store(store: ObjectStore, tmp_path: Path) -> None:
    base = CONFIG.base_model.model_copy(update={"path": f"{store.url()}base", "rope_theta": None, "vocab_size": None})
    config = CONFIG.model_copy(update={"workdir": tmp_path / "work", "storage": store.config, "base_model": base})
    make_random_base(config.model, tmp_path / "base", seed=3)
    for path in (tmp_path / "base").iterdir():
        store.put_file(path, f"base/{path.name}")
    made = convert(config, silent)
    store.delete([info.key for info in store.list("base/")])
    check_run(config, ["convert"])
    again = convert(config, silent)
    assert (again.skipped, again.artifact) == (True, made.artifact)
    (made.artifact.folder / made.artifact.files[0].path).unlink()
    with pytest.raises(ConfigError, match=r"base_model\.path: checkpoint folder s3://.*/base does not exist"):
        convert(config, silent)
