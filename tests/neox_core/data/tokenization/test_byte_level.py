"""Byte-level BPE in a tokenizer.json: ids are those of Hugging Face's library, and special tokens in texts are text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

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


def described(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A tokenizer.json, changed in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("byte", ["\u00e6", "\u00f0"])
def test_a_byte_level_vocabulary_without_a_byte_beyond_latin_1_is_refused(path: Path, byte: str) -> None:
    """Chinese, or emoji, would be left out of texts."""
    described(path, lambda content: content["model"]["vocab"].pop(byte))
    with pytest.raises(DataError, match="loses or changes characters"):
        ours.Tokenizer(TokenizerConfig(model=path, end_of_document=END))


def write_characters(folder: Path, byte_fallback: bool) -> Path:
    """BPE over characters, all of Latin 1 and those of bytes among them; without fallback, others are <unk>."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = [chr(code) for code in range(0x20, 0x100)]
    made.train_from_iterator(
        ["the theorem"], trainers.BpeTrainer(vocab_size=600, special_tokens=specials, initial_alphabet=alphabet)
    )
    made.save(str(folder / "tokenizer.json"))
    return described(folder / "tokenizer.json", lambda content: content["added_tokens"].__delitem__(slice(2, None)))


def test_a_vocabulary_of_characters_needs_a_fallback(tmp_path: Path) -> None:
    tokenizer = ours.Tokenizer(TokenizerConfig(model=write_characters(tmp_path, True), end_of_document=END))
    oracle = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == oracle.encode(text, add_special_tokens=False).ids
        assert 0 not in tokenizer.encode(text)
    with pytest.raises(DataError, match="loses or changes characters"):
        ours.Tokenizer(TokenizerConfig(model=write_characters(tmp_path, False), end_of_document=END))


def test_an_unknown_token_is_no_character(tmp_path: Path) -> None:
    """A byte that the vocabulary may lack is left out: <unk>, or the end of a document, would stand in the text."""
    path = described(write_characters(tmp_path, True), lambda content: content["model"]["vocab"].pop("<0x04>"))
    tokenizer = ours.Tokenizer(TokenizerConfig(model=path, end_of_document=END))
    assert Tokenizer.from_file(str(path)).encode("a\x04b", add_special_tokens=False).ids.count(0) == 1
    assert tokenizer.encode("a\x04b").tolist() == [i for i in tokenizer.encode("a\x05b").tolist() if i != 2 + 5]


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece"])
def test_another_model_than_bpe_is_refused_for_that(path: Path, kind: str) -> None:
    def words(content: dict[str, Any]) -> None:
        more = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100} if kind == "WordPiece" else {}
        content["model"] = {"type": kind, "vocab": content["model"]["vocab"], "unk_token": END} | more

    described(path, words)
    with pytest.raises(DataError, match=f"its {kind} model loses or changes characters.*byte-level BPE is due"):
        ours.Tokenizer(TokenizerConfig(model=path, end_of_document=END))


def test_random_ids_are_refused(path: Path) -> None:
    described(path, lambda content: content["model"].update(dropout=0.1))
    with pytest.raises(DataError, match=r"dropout is 0\.1.*set it to null"):
        ours.Tokenizer(TokenizerConfig(model=path, end_of_document=END))
    described(path, lambda content: content["model"].update(dropout=0.0))
    ours.Tokenizer(TokenizerConfig(model=path, end_of_document=END))


def test_a_special_token_that_is_also_a_word_is_refused(path: Path) -> None:
    """With ignore_merges, as Llama 3's, whole words are looked up: only how text is cut keeps specials apart."""
    made = Tokenizer.from_file(str(path))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.save(str(path))
    ours.Tokenizer(TokenizerConfig(model=path, end_of_document=END))
    described(path, lambda content: content["model"].update(ignore_merges=True))
    with pytest.raises(DataError, match=r"turns the literal text '<\|endoftext\|>' into the special id 0"):
        ours.Tokenizer(TokenizerConfig(model=path, end_of_document=END))


def test_a_blank_before_every_text(path: Path) -> None:
    made = Tokenizer.from_file(str(path))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.save(str(path))
    tokenizer = ours.Tokenizer(TokenizerConfig(model=path, end_of_document=END))
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == made.encode(text, add_special_tokens=False).ids
