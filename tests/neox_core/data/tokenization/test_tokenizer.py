"""Text to ids: SentencePiece's own, and control texts are text."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from neox_core.config import TokenizerConfig
from neox_core.data.indexed import token_dtype
from neox_core.data.tokenization.tokenizer import Tokenizer
from neox_core.errors import ConfigError, DataError

MODEL = Path("data/tokenizers/demo-2048.model")


def train_model(folder: Path, **options: object) -> Path:
    (folder / "corpus.txt").write_text("a small corpus <of> text / with a few words like unk s\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "small"),
        model_type="bpe",
        minloglevel=2,
        hard_vocab_limit=False,
        **{"vocab_size": 290, "byte_fallback": True} | options,
    )
    return folder / "small.model"


def test_encodes_as_sentencepiece() -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    tokenizer = Tokenizer(TokenizerConfig(model=MODEL))
    text = "Let $x \\in \\mathbb{R}$.\n\n\tdef f(x):\r\n  return x  ∀ε 你好 \x00"
    ids = tokenizer.encode(text)
    assert ids.tolist() == reference.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.encode_document(text).tolist() == [*reference.encode(text), reference.eos_id()]
    assert tokenizer.vocab_size == 2048


@pytest.mark.parametrize(("choice", "expected"), [("eos", 2), ("unk", 0)])
def test_end_of_document(choice: str, expected: int) -> None:
    tokenizer = Tokenizer(TokenizerConfig(model=MODEL, end_of_document=choice))
    assert tokenizer.end_of_document_id == expected
    assert tokenizer.encode_document("a")[-1] == expected


@pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", "a</s>b <s><unk>"])
def test_control_texts_are_text(text: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    ids = Tokenizer(TokenizerConfig(model=MODEL)).encode(text)
    assert min(ids) > 2  # 0, 1 and 2 are <unk>, <s> and </s>
    assert reference.decode(ids.tolist()) == text


def test_dtype_by_vocabulary() -> None:
    assert token_dtype(65_499) == np.uint16
    assert token_dtype(65_500) == np.int32


def test_missing_model_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.model does not exist"):
        Tokenizer(TokenizerConfig(model=tmp_path / "nowhere.model"))


@pytest.mark.parametrize("content", [b"", b"no model at all", MODEL.read_bytes()[:5000]])
def test_damaged_model_names_the_path(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.model is not a SentencePiece model"):
        Tokenizer(TokenizerConfig(model=tmp_path / "bad.model"))


def test_model_that_matches_control_texts_is_refused(tmp_path: Path) -> None:
    model = train_model(tmp_path, eos_piece="<end>", user_defined_symbols="</s>")
    with pytest.raises(DataError, match="literal text '</s>'"):
        Tokenizer(TokenizerConfig(model=model))


def test_model_without_an_end_is_refused(tmp_path: Path) -> None:
    model = train_model(tmp_path, eos_id=-1)
    with pytest.raises(ConfigError, match="end_of_document is 'eos'"):
        Tokenizer(TokenizerConfig(model=model))
    assert Tokenizer(TokenizerConfig(model=model, end_of_document="unk")).end_of_document_id == 0


def test_an_end_that_texts_have_too_is_refused(tmp_path: Path) -> None:
    """Without bytes to fall back to, <unk> stands for every character that is not in the vocabulary."""
    model = train_model(tmp_path, byte_fallback=False, vocab_size=40)
    Tokenizer(TokenizerConfig(model=model, end_of_document="eos"))
    with pytest.raises(ConfigError, match=r"end_of_document is 'unk', which .* also gives to characters that its"):
        Tokenizer(TokenizerConfig(model=model, end_of_document="unk"))


def test_a_folder_gives_the_tokenizer_that_lies_in_it(tmp_path: Path) -> None:
    config = TokenizerConfig(model=tmp_path)
    with pytest.raises(ConfigError, match=r"holds neither tokenizer\.model nor tokenizer\.json"):
        Tokenizer(config)
    shutil.copy(MODEL, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert config.file == tmp_path / "tokenizer.model"
    ids = [Tokenizer(each).encode("a proof").tolist() for each in (config, TokenizerConfig(model=MODEL))]
    assert ids[0] == ids[1]
    (tmp_path / "tokenizer.model").unlink()
    assert config.file == tmp_path / "tokenizer.json"
