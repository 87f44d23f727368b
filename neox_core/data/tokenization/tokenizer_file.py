"""What kind of file a tokenizer is and what belongs to it: the one place that looks, and that loads it."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from neox_core.data.tokenization.byte_level import ByteLevelModel
from neox_core.data.tokenization.sentencepiece_model import SentencePieceModel
from neox_core.data.tokenization.tiktoken_model import TiktokenModel
from neox_core.errors import ConfigError, DataError
from neox_core.storage.stand_ins import stand_in

TokenizerModel = SentencePieceModel | ByteLevelModel | TiktokenModel

TOKENIZER_MODEL, TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
COMPANIONS = (
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What tokenizers of transformers keep in a folder, besides tokenizer.json and tokenizer.model."""


class TokenizerKind(Enum):
    """The formats that are read."""

    SENTENCEPIECE = "SentencePiece model"
    JSON = "tokenizer.json"
    TIKTOKEN = "tiktoken file of Llama 3"


_MODELS: dict[TokenizerKind, type[TokenizerModel]] = {
    TokenizerKind.SENTENCEPIECE: SentencePieceModel,
    TokenizerKind.JSON: ByteLevelModel,
    TokenizerKind.TIKTOKEN: TiktokenModel,
}


def kind_of(content: bytes) -> TokenizerKind:
    """By the first bytes, not by the name, which a copy among the token files has not; SentencePiece's, if no other."""
    if content[:200].lstrip().startswith(b"{"):
        return TokenizerKind.JSON
    words = content[:200].split(b"\n")[0].split()
    if len(words) == 2 and words[1].isdigit() and words[0].isascii():
        return TokenizerKind.TIKTOKEN
    return TokenizerKind.SENTENCEPIECE


def kind_of_file(path: Path) -> TokenizerKind:
    """The kind of a tokenizer's file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return kind_of(file.read(200))
    except OSError as error:
        raise DataError(f"tokenizer {path} cannot be read: {error.strerror}: correct the path") from None


def companions(tokenizer: Path) -> list[Path]:
    """The files in the folder of a tokenizer.json, or of its copy, that belong to it; none for another kind's file.

    Raises:
        DataError: the file cannot be read.
    """
    if kind_of_file(tokenizer) is not TokenizerKind.JSON:
        return []
    return [path for name in COMPANIONS if (path := tokenizer.with_name(name)).is_file()]


def tokenizer_in(prepared: Path) -> Path:
    """The copy of the tokenizer's file that lies among the token files."""
    return prepared / TOKENIZER_MODEL


def load_model(path: Path) -> TokenizerModel:
    """Load a tokenizer of any kind.

    Raises:
        ConfigError: there is no such file.
        DataError: it is of no kind that is read.
    """
    if path.is_dir():
        raise ConfigError(f"tokenizer.model {path} holds neither tokenizer.model nor tokenizer.json: correct the path")
    if not path.is_file():
        raise ConfigError(f"tokenizer.model {path} does not exist: correct the path")
    content = path.read_bytes()
    kind = kind_of(content)
    try:
        return _MODELS[kind](content)
    except Exception as error:  # `tokenizers` raises Exception itself
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"tokenizer.model {path} is not a {kind.value} ({reason}); it is {description(content)}"
        ) from None


def description(content: bytes) -> str:
    """What a file that should be a tokenizer is, by its first bytes."""
    if instead := stand_in(content[:200]):
        return instead
    if (kind := kind_of(content)) is TokenizerKind.SENTENCEPIECE:
        return "of an unknown kind: fetch it again"
    return "JSON" if kind is TokenizerKind.JSON else "a tiktoken file"
