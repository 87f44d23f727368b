"""Text to ids with SentencePiece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import sentencepiece

from neox_core.config import TokenizerConfig
from neox_core.data.indexed import Tokens, token_dtype
from neox_core.errors import ConfigError, DataError

_CONTROL_TEXTS = ("<s>", "</s>", "<unk>")


class Tokenizer:
    """A SentencePiece model and the id that ends a document."""

    def __init__(self, config: TokenizerConfig) -> None:
        """Load the model.

        Raises:
            ConfigError: the model file is missing, or has no piece for the configured end of document.
            DataError: the file is not a SentencePiece model, or takes literal `</s>` in a text for its control piece.
        """
        self._model = _load(config.model)
        self.vocab_size: int = self._model.vocab_size()
        self.dtype = token_dtype(self.vocab_size)
        self.end_of_document_id = self._end_of_document(config)
        self._begin = self._begin_of_document(config)
        self._refuse_control_texts(config.model)

    def encode(self, text: str) -> Tokens:
        """Ids of a text, [tokens], in `dtype`; no begin or end is added, and `</s>` in the text is text."""
        return np.array(self._model.encode(text), dtype=self.dtype)

    def encode_document(self, text: str) -> Tokens:
        """Ids of a whole document: the begin-of-document id if configured, its text, the end-of-document id."""
        return np.array([*self._begin, *self._model.encode(text), self.end_of_document_id], dtype=self.dtype)

    def _begin_of_document(self, config: TokenizerConfig) -> list[int]:
        if not config.begin_of_document:
            return []
        if self._model.bos_id() < 0:
            raise ConfigError(
                f"tokenizer.begin_of_document is true, but {config.model} has no <s> piece: set it to false"
            )
        return [self._model.bos_id()]

    def _end_of_document(self, config: TokenizerConfig) -> int:
        # Llemma's data ends in <unk>, because the seed asked for "<|endoftext|>", which Llama's vocabulary lacks.
        found: int = self._model.eos_id() if config.end_of_document == "eos" else self._model.unk_id()
        if found < 0:
            raise ConfigError(
                f"tokenizer.end_of_document is {config.end_of_document!r}, but {config.model} has no such piece"
            )
        return found

    def _refuse_control_texts(self, path: Path) -> None:
        # SentencePiece never matches control pieces in a text, unless the model declares them user-defined.
        for text in _CONTROL_TEXTS:
            controls = [
                i for i in self._model.encode(text) if self._model.is_control(i) or self._model.IdToPiece(i) == text
            ]
            if controls:
                raise DataError(
                    f"tokenizer {path} turns the literal text {text!r} into the special id {controls[0]}: "
                    "use a model in which it is a control piece, not a user-defined one"
                )


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    if not path.is_file():
        raise ConfigError(f"tokenizer.model {path} does not exist: correct the path")
    try:
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"tokenizer.model {path} is not a SentencePiece model ({_one_line(error)}): fetch it again"
        ) from None
    if model.vocab_size() == 0:
        raise DataError(f"tokenizer.model {path} is not a SentencePiece model (no pieces): fetch it again")
    return model


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
