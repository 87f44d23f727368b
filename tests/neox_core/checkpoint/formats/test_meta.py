from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neox_core.checkpoint.formats.meta import MetaCheckpoint
from neox_core.checkpoint.formats.meta_params import intermediate_size
from neox_core.config import ModelConfig
from neox_core.errors import CheckpointError

WriteBase = Callable[..., Any]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a file of torch.save."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_tensors_are_merged_over_shards(write_base: WriteBase, shards: int) -> None:
    base = write_base(shards=shards)
    meta = MetaCheckpoint(base.folder)
    assert (meta.model, meta.num_shards) == (base.model, shards)
    assert all(torch.equal(meta.tensor(name), weight) for name, weight in base.weights.items())


def test_absent_values_of_params(write_base: WriteBase, model_of: Callable[..., ModelConfig]) -> None:
    base = write_base(model_of(num_kv_heads=8), n_kv_heads=None, rope_theta=None, vocab_size=None, norm_eps=None)
    model = MetaCheckpoint(base.folder).model
    assert (model.num_kv_heads, model.rope_theta, model.vocab_size, model.norm_eps) == (8, 10000.0, 128, 1e-5)


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "size"),
    [(4096, 256, 1.0, 11008), (5120, 256, None, 13824), (8192, 256, 1.0, 22016), (8192, 4096, 1.3, 28672)],
    ids=["7B", "13B", "34B", "70B"],
)
def test_intermediate_sizes_of_real_models(dim: int, multiple_of: int, multiplier: float | None, size: int) -> None:
    assert intermediate_size(dim, multiple_of, multiplier) == size


def test_rope_tables_are_ignored_wherever_they_are(write_base: WriteBase) -> None:
    base = write_base()
    edit(base.folder / "consolidated.00.pth", lambda shard: shard.update({"rope.freqs": torch.ones(4)}))
    table = {"layers.0.attention.inner_attention.rope.freqs": torch.ones(4)}
    edit(base.folder / "consolidated.01.pth", lambda shard: shard.update(table))
    assert MetaCheckpoint(base.folder).model == base.model


def test_missing_parts(write_base: WriteBase, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        MetaCheckpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty holds no params\.json"):
        MetaCheckpoint(tmp_path / "empty")
    base = write_base(shards=4)
    (base.folder / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"lacks consolidated\.01\.pth of 4 shards"):
        MetaCheckpoint(base.folder)
    for path in base.folder.glob("*.pth"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"holds no consolidated\.00\.pth"):
        MetaCheckpoint(base.folder)


def test_wrong_number_of_shards(write_base: WriteBase) -> None:
    base = write_base()
    shutil.copy(base.folder / "consolidated.01.pth", base.folder / "consolidated.02.pth")
    with pytest.raises(
        CheckpointError, match=r"in one of 3 shards, but params\.json says .*: shards are missing or surplus"
    ):
        MetaCheckpoint(base.folder)
    (base.folder / "consolidated.02.pth").unlink()
    (base.folder / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"has shape \(128, 32\) in one of 1 shards"):
        MetaCheckpoint(base.folder)


def test_truncated_shard(write_base: WriteBase) -> None:
    path = write_base().folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth \(\d+ bytes\) is damaged, truncated"):
        MetaCheckpoint(path.parent)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth \(0 bytes\) is damaged, truncated"):
        MetaCheckpoint(path.parent)


class _Touch:
    """Unpickles by creating a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_shard_is_not_run(write_base: WriteBase, tmp_path: Path, save: Callable[..., object]) -> None:
    base = write_base()
    save({"norm.weight": _Touch(tmp_path / "touched")}, base.folder / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth .* not a file of tensors"):
        MetaCheckpoint(base.folder)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"dim": None}, "lacks 'dim'"),
        ({"dim": "wide"}, r'dim is "wide": give a whole number from 1'),
        ({"n_heads": 7}, "hidden_size 64 is not divisible by num_attention_heads 7"),
        ({"multiple_of": 256}, r"w1\.weight has shape \(96, 64\) in one of 2 shards.* says \(256, 64\)"),
        ({"n_kv_heads": 2}, r"wk\.weight has shape .* says \(16, 64\)"),
        ({"vocab_size": 200}, r"tok_embeddings\.weight has shape .* says \(200, 64\)"),
        ({"n_layers": 3}, r"lacks layers\.2\..* and 6 more, which 3 layers need"),
        ({"n_layers": 1}, r"holds layers\.1\..* and 6 more, unknown in a Llama of 1 layers"),
    ],
)
def test_params_that_do_not_fit(write_base: WriteBase, params: dict[str, Any], message: str) -> None:
    folder = write_base(**params).folder
    with pytest.raises(CheckpointError, match=message):
        MetaCheckpoint(folder)


def test_params_that_are_not_json(write_base: WriteBase) -> None:
    folder = write_base().folder
    (folder / "params.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"params\.json cannot be read as JSON"):
        MetaCheckpoint(folder)
    (folder / "params.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"params\.json must hold a JSON object, not list"):
        MetaCheckpoint(folder)
    (folder / "params.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(CheckpointError, match=r"params\.json is a git-lfs pointer, not the file itself"):
        MetaCheckpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({"layers.0.attention.bias": s["norm.weight"]}),
            r"holds layers\.0\.attention\.bias, unknown",
        ),
        (lambda s: s.pop("norm.weight"), r"lacks norm\.weight"),
        (lambda s: s.update({"norm.weight": 1}), r"norm\.weight is int, not a tensor"),
        (lambda s: s.update({"norm.weight": s["norm.weight"].int()}), r"norm\.weight is torch\.int32; weights must be"),
        (
            lambda s: s.update({"output.weight": s["output.weight"].t().contiguous().t()}),
            r"output\.weight is not contiguous",
        ),
    ],
)
def test_tensors_that_do_not_belong(write_base: WriteBase, change: Callable[..., object], message: str) -> None:
    folder = write_base().folder
    edit(folder / "consolidated.01.pth", change)
    with pytest.raises(CheckpointError, match=message):
        MetaCheckpoint(folder)


def test_shards_of_two_models(write_base: WriteBase) -> None:
    folder = write_base().folder
    edit(folder / "consolidated.01.pth", lambda shard: shard["norm.weight"].mul_(2))
    meta = MetaCheckpoint(folder)
    with pytest.raises(CheckpointError, match=r"norm\.weight must be the same in every shard"):
        meta.tensor("norm.weight")
