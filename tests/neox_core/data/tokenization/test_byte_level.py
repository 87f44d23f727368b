"""Byte-level BPE in a tokenizer.json: ids are those of Hugging Face's library, and special tokens in texts are text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers

from neox_core.config.schema import TokenizerConfig
from neox_core.data.tokenization import tokenizer as ours
from neox_core.errors import ConfigError, DataError
from tests.byte_level import END, make_byte_level

TEXTS = ["", " ", "Let  $x^2$.\n\n\tThen", "naïve ∀ε>0 数学 🙂\r\n", "\x00\x7f\u0301e\u0301", "x" * 5000]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A tokenizer of 300 pieces, with NFC and ids above 65,535."""
    made = Tokenizer.from_file(str(make_byte_level(tmp_path)))
    made.normalizer = normalizers.NFC()
    made.add_tokens([AddedToken(f"<extra{number}>", normalized=False) for number in range(66_000)])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_ids_are_the_library_s(path: Path) -> None:
    tokenizer = ours.Tokenizer(TokenizerConfig(model=path, end_of_document=END))
    oracle = Tokenizer.from_file(str(path))
    assert tokenizer.dtype == np.dtype("<i4")
    for text in [*TEXTS, "a <extra65999> b"]:
        assert tokenizer.encode(text).tolist() == oracle.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode_document(text)[-1] == oracle.token_to_id(END)
    assert tokenizer.encode("<extra65999>").max() > 65_535


def test_a_special_token_in_a_text_is_text(path: Path) -> None:
    tokenizer = ours.Tokenizer(TokenizerConfig(model=path, end_of_document=END))
    end = Tokenizer.from_file(str(path)).token_to_id(END)
    assert end not in tokenizer.encode(f"one{END}two")
    assert end in Tokenizer.from_file(str(path)).encode(f"one{END}two").ids  # which the library would not do by itself


def test_the_end_of_a_document_must_be_named(path: Path) -> None:
    with pytest.raises(ConfigError, match="name the special token that ends a text"):
        ours.Tokenizer(TokenizerConfig(model=path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "it is a git-lfs pointer"),
        (
            "tokenizer.model",
            b"IQ== 0\nIg== 1\n",
            "has 2 ranks.*known for Llama 3's 128000 only: give the same tokenizer's tokenizer.json",
        ),
        ("tokenizer.model", b"IQ== 0\nIg== x\n", "is not a tiktoken file of Llama 3.*no token with its rank"),
        ("tokenizer.model", b'{"model": {}}', "is not a tokenizer.json.*it is JSON"),
        ("tokenizer.json", b"{}", "is not a tokenizer.json.*lacks 'model'"),
        ("tokenizer.json", b"<!DOCTYPE html>", "it is a web page"),
    ],
)
def test_files_of_the_wrong_kind_say_what_they_are(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        ours.Tokenizer(TokenizerConfig(model=tmp_path / name))


def test_a_bpe_without_all_bytes_is_refused(tmp_path: Path) -> None:
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="byte-level BPE is due"):
        ours.Tokenizer(TokenizerConfig(model=tmp_path / "tokenizer.json"))
