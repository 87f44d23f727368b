"""Llama 3's tokenizer.model: ids are those of Meta's own code, and special tokens in texts are text."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from transformers import AutoTokenizer

from neox_core.checkpoint.conversion.convert import convert, open_source
from neox_core.checkpoint.conversion.export import export_huggingface, prove_export
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ParallelConfig
from neox_core.config.schema import TokenizerConfig
from neox_core.data.tokenization.tokenizer import Tokenizer
from tests.neox_core.checkpoint.conversion.test_families import write_model
from tests.paths import ROOT

INSTALL = "pip install --no-deps llama-models==0.3.0"
PACKAGE = find_spec("llama_models")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason=f"needs the package of Llama 3's tokenizer: {INSTALL}")
HOSTILE = [
    "", " ", "<|begin_of_text|>a<|end_of_text|><|eot_id|><|reserved_special_token_7|>", "it's I'LL 1234567 ½",
    "\x00\x7f\ufeff\u2028\x85\u00a0e\u0301 ∀ε>0 数学 👩‍👩‍👧\r\n\r\n \t\n  x", "a" * 60_000, " " * 60_000,
    "ab 1\n" * 90_000 + "\n" * 26_000 + "z" * 25_001,
]  # fmt: skip


@pytest.fixture(scope="module")
def path() -> Path:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    return Path(PACKAGE.origin).parent / "llama3" / "tokenizer.model"


@pytest.fixture(scope="module")
def oracle(path: Path) -> Any:
    from llama_models.llama3.tokenizer import Tokenizer as Metas

    return Metas(path)


def documents() -> list[str]:
    """The first texts of each file of the demo's corpus."""
    lines: list[str] = []
    for file in sorted((ROOT / "data" / "tiny-proof-pile").rglob("*.jsonl.zst")):
        lines += zstd.decompress(file.read_bytes()).decode().splitlines()[:4]
    return [json.loads(line)["text"] for line in lines]


def test_ids_are_metas(path: Path, oracle: Any) -> None:
    tokenizer = Tokenizer(TokenizerConfig(model=path))
    texts = documents()
    assert len(texts) > 8
    for text in [*texts, *HOSTILE]:
        expected = oracle.encode(text, bos=False, eos=False)
        assert tokenizer.encode(text).tolist() == expected, text[:40]
        assert tokenizer.encode_document(text).tolist() == [*expected, oracle.eos_id]
        assert max(expected, default=0) < 128_000, "a special token is text"
    assert max(tokenizer.encode("".join(texts))) > 65_535
    assert (tokenizer.vocab_size, tokenizer.start_id) == (oracle.n_words, oracle.bos_id)


def test_documents_may_end_in_a_named_special_token(path: Path, oracle: Any) -> None:
    tokenizer = Tokenizer(TokenizerConfig(model=path, end_of_document="<|eot_id|>", begin_of_document=True))
    assert tokenizer.encode_document("a").tolist() == [
        oracle.bos_id,
        *oracle.encode("a", bos=False, eos=False),
        oracle.eot_id,
    ]


def test_it_is_exported_as_it_is_and_as_transformers_reads_it(path: Path, tmp_path: Path, oracle: Any) -> None:
    write_model(tmp_path / "base", model_type="llama", vocab_size=128_256)
    model = open_source(tmp_path / "base").model
    convert(tmp_path / "base", tmp_path / "neox", model, ParallelConfig())
    export_huggingface(tmp_path / "neox", tmp_path / "hf", model, path, 256)
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == path.read_bytes()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (128_000, 128_001)
    texts = [*documents(), *(text for text in HOSTILE if len(text) < 25_000)]
    proof = prove_export(NeoxCheckpoint(tmp_path / "neox"), tmp_path / "hf", model, texts)
    assert proof["tokenizer_texts"] >= len(texts)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|end_of_text|>", "<|begin_of_text|>")
    assert len(tokenizer) == oracle.n_words
    for name in ("<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_0|>"):
        assert tokenizer.convert_tokens_to_ids(name) == oracle.special_tokens[name]
