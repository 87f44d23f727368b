from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import sentencepiece
import torch
import transformers
import zstandard
from safetensors.torch import load_file, save_file

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.export import export_huggingface, prove_export
from neox_core.checkpoint.formats.huggingface_tokenizer import compare_tokenizers, load_sentencepiece, tokenizer_files
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ModelConfig, ParallelConfig
from neox_core.errors import CheckpointError, ConfigError
from tests.paths import ROOT

TOKENIZER = ROOT / "data/tokenizers/demo-2048.model"


def real_texts() -> list[str]:
    """The validation documents of every source."""
    texts: list[str] = []
    for path in sorted((ROOT / "data/tiny-proof-pile").glob("*/validation/*.jsonl.zst")):
        with path.open("rb") as file:
            lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8")
            texts += [json.loads(line)["text"] for line in lines]
    return texts


@pytest.fixture
def converted(
    write_base: Callable[..., Any], model_of: Callable[..., ModelConfig], tmp_path: Path
) -> Callable[..., Any]:
    """Converts a tiny base with the demo's vocabulary; yields the base and the NeoX folder."""

    def make(tensor: int = 2, pipeline: int = 1, **changes: Any) -> Any:
        base = write_base(model_of(vocab_size=2048, **changes))
        convert(base.folder, tmp_path / "neox", base.model, ParallelConfig(tensor=tensor, pipeline=pipeline))
        return base, tmp_path / "neox"

    return make


@pytest.mark.parametrize(("tensor", "pipeline", "kv_heads"), [(1, 1, 8), (2, 1, 4), (4, 2, 4), (2, 2, 8)])
def test_transformers_loads_the_same_model(
    converted: Callable[..., Any], tmp_path: Path, tensor: int, pipeline: int, kv_heads: int
) -> None:
    base, neox = converted(tensor, pipeline, num_kv_heads=kv_heads, rope_theta=54321.0)
    shares: list[float] = []
    export_huggingface(neox, tmp_path / "hf", base.model, TOKENIZER, 512, lambda share, _: shares.append(share))
    assert shares[-1] == 1.0
    summary = prove_export(NeoxCheckpoint(neox), tmp_path / "hf", base.model, ["Let $x$ be."])
    assert summary["largest_logit_difference"] < 1e-5
    assert summary["tokenizer_texts"] > 5

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.rope_parameters["rope_theta"] == 54321.0
    assert loaded.config.max_position_embeddings == 512
    assert (loaded.config.bos_token_id, loaded.generation_config.eos_token_id) == (1, 2)
    # Independent of our layout: rows of wq of the source, even ones of each head first.
    wq = base.weights["layers.1.attention.wq.weight"].view(8, 8, 64)
    expected = torch.cat([wq[:, 0::2], wq[:, 1::2]], dim=1).reshape(64, 64)
    assert torch.equal(loaded.model.layers[1].self_attn.q_proj.weight, expected)
    # transformers 4 and tools like it read the top level.
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (54321.0, "bfloat16")


def test_large_models_are_cut_into_files(converted: Callable[..., Any], tmp_path: Path) -> None:
    base, neox = converted()
    target = tmp_path / "hf"
    export_huggingface(neox, target, base.model, TOKENIZER, 512, max_file_bytes=300_000)
    files = sorted(path.name for path in target.glob("*.safetensors"))
    # embedding 262 kB; two layers of 98 kB with the final norm; head 262 kB
    assert files == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = json.loads((target / "model.safetensors.index.json").read_text())
    tensors = {name: load_file(target / file)[name] for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert len(tensors) == 3 + 2 * 9
    assert prove_export(NeoxCheckpoint(neox), target, base.model)["largest_logit_difference"] < 1e-5
    export_huggingface(neox, target, base.model, TOKENIZER, 512)
    assert [path.name for path in target.glob("*.safetensors*")] == ["model.safetensors"]


def test_an_fp32_training_checkpoint_stays_fp32(converted: Callable[..., Any], tmp_path: Path) -> None:
    base, neox = converted(2, 2)
    for path in (neox / "global_step0").iterdir():
        content = torch.load(path, weights_only=True)
        torch.save({name: tensor.float() + 1e-6 for name, tensor in content.items()}, path)
    export_huggingface(neox / "global_step0", tmp_path / "hf", base.model, TOKENIZER, 512)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.float32
    assert prove_export(NeoxCheckpoint(neox), tmp_path / "hf", base.model)["largest_logit_difference"] < 1e-5


@pytest.mark.parametrize("what", ["weight", "rope_theta"])
def test_a_wrong_export_is_caught(converted: Callable[..., Any], tmp_path: Path, what: str) -> None:
    base, neox = converted()
    target = tmp_path / "hf"
    export_huggingface(neox, target, base.model, TOKENIZER, 512)
    if what == "weight":
        tensors = load_file(target / "model.safetensors")
        gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((target / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 10000.0
        (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"logits of the shards in .* differ by .*, more than 0\.0001"):
        prove_export(NeoxCheckpoint(neox), target, base.model)


def test_the_wrong_tokenizer_is_caught(converted: Callable[..., Any], tmp_path: Path) -> None:
    base, neox = converted()
    target = tmp_path / "hf"
    export_huggingface(neox, target, base.model, TOKENIZER, 512)
    content = json.loads((target / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (target / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"differ from those of tokenizer\.model in text \d+, token \d+, near"):
        prove_export(NeoxCheckpoint(neox), target, base.model)


def test_another_kind_of_tokenizer_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(CheckpointError, match="it is a tiktoken file, where SentencePiece was expected"):
        load_sentencepiece(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1")
    with pytest.raises(CheckpointError, match="it is a git-lfs pointer"):
        load_sentencepiece(tmp_path / "tokenizer.model")


def test_refusals_leave_an_earlier_export_alone(converted: Callable[..., Any], tmp_path: Path) -> None:
    base, neox = converted()
    target = tmp_path / "hf"
    export_huggingface(neox, target, base.model, TOKENIZER, 512)
    small = base.model.model_copy(update={"vocab_size": 1024})
    with pytest.raises(ConfigError, match=r"2048 pieces, more than the 1024 tokens of model\.vocab_size 1024"):
        export_huggingface(neox, target, small, TOKENIZER, 512)
    with pytest.raises(ConfigError, match=r"absent\.model does not exist"):
        export_huggingface(neox, target, base.model, tmp_path / "absent.model", 512)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        export_huggingface(tmp_path / "nowhere", target, base.model, TOKENIZER, 512)
    assert (target / "config.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 1}, r"layer 4"),
        ({"num_layers": 3}, r"layer 4"),
        (
            {"intermediate_size": 96},
            r"mlp\.w1\.weight has shape \(96, 64\), but the model needs \(48, 64\) in each of 2 parts",
        ),
        (
            {"num_kv_heads": 8},
            r"attention\.query_key_value\.weight has shape \(64, 64\), but the model needs \(96, 64\)",
        ),
    ],
)
def test_a_checkpoint_of_another_model(
    converted: Callable[..., Any], tmp_path: Path, change: dict[str, int], message: str
) -> None:
    base, neox = converted()
    with pytest.raises(CheckpointError, match=message):
        export_huggingface(neox, tmp_path / "hf", base.model.model_copy(update=change), TOKENIZER, 512)
    assert not (tmp_path / "hf/config.json").exists()


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    for name, content in tokenizer_files(TOKENIZER, 512).items():
        (tmp_path / name).write_text(content)
    shutil.copy(TOKENIZER, tmp_path / "tokenizer.model")
    return tmp_path


def test_tokenizer_equals_sentencepiece_on_real_text(tokenizer_folder: Path) -> None:
    texts = real_texts()
    assert len({path.parent.parent for path in (ROOT / "data/tiny-proof-pile").glob("*/validation/*.zst")}) == 5
    assert compare_tokenizers(tokenizer_folder, texts) > 50_000


def test_tokenizer_equals_sentencepiece_on_odd_text(tokenizer_folder: Path) -> None:
    choose = random.Random(0)
    parts = [" ", "\u2581", "=", "-", "a", "th", "\n", "\t", "1", "<s>", "</s>", "<unk>", "<0x0A>", "é", "数", "🙂"]
    parts += ["\x00", "\u2028", "\r", ".", "\\", "$"]
    texts = ["".join(choose.choice(parts) * choose.choice([1, 1, 2, 3, 7, 20]) for _ in range(30)) for _ in range(3000)]
    assert compare_tokenizers(tokenizer_folder, texts) > 100_000


def test_ids_that_end_too_early_are_counted(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = Mock(return_value={"input_ids": [404, 312]}, decode=Mock(return_value="Let x"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", Mock(return_value=shorter))
    with pytest.raises(CheckpointError, match=r"in text 0, which has 2 in place of 3 ids, near 'Let x'"):
        compare_tokenizers(tokenizer_folder, ["Let x"])


def test_tokenizer_decodes_and_knows_its_special_ids(tokenizer_folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    text = "  Let <s>\n\tnaïve 数学  "
    ids = tokenizer(text)["input_ids"]
    assert ids == sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER)).encode(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "is not a BPE model"),
        ({"normalization_rule_name": "nfkc"}, "normalizes text"),
        ({"user_defined_symbols": ["qed"]}, "has the user-defined piece 'qed'"),
        ({"bos_id": -1}, "lacks a begin, end or unknown id"),
        ({"model_type": "char"}, "is not a BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text"),
        ({"remove_extra_whitespaces": True}, "normalizes text"),
        ({"treat_whitespace_as_suffix": True}, "puts the blank behind a word"),
    ],
)
def test_tokenizers_that_cannot_be_expressed(
    converted: Callable[..., Any], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """They are exported as they are, under a name that transformers does not take for another tokenizer."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(real_texts()[0].split("\n")[:200]),
        model_prefix=str(tmp_path / "odd"),
        minloglevel=2,
        hard_vocab_limit=False,
        **(
            {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
            | options
        ),
        **(
            {}
            if {"normalization_rule_name", "remove_extra_whitespaces"} & set(options)
            else {"remove_extra_whitespaces": False}
        ),
    )
    with pytest.raises(CheckpointError, match=message):
        tokenizer_files(tmp_path / "odd.model", 512)
    base, neox = converted()
    prove = partial(prove_export, NeoxCheckpoint(neox), model=base.model)
    summary = export_huggingface(neox, tmp_path / "hf", base.model, tmp_path / "odd.model", 512, prove=prove)
    assert message in summary["tokenizer"]
    assert summary["largest_logit_difference"] < 1e-5
    assert (tmp_path / "hf/sentencepiece.model").read_bytes() == (tmp_path / "odd.model").read_bytes()
    assert not list((tmp_path / "hf").glob("tokenizer*"))
    with pytest.raises(ValueError, match="tokenizer"):
        transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None if "bos_id" in options else 1, 2)
