"""Text to ids. The library of the tokenizer's format says what is right; a faster engine may do SentencePiece's work
where its ids are the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece

from neox_core.data.indexed import Tokens, token_dtype
from neox_core.data.tokenization.byte_level import ByteLevelModel
from neox_core.data.tokenization.fast_engine import FastEngine
from neox_core.data.tokenization.sentencepiece_model import SentencePieceModel
from neox_core.data.tokenization.tokenizer_file import load_model
from neox_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from neox_core.config import TokenizerConfig
    from neox_core.data.tokenization.part_settings import TokenizerSettings

_CONTROL_TEXTS = ("<s>", "</s>", "<unk>")
_RARE = "\x00\n一𒀀\U0010fffd"
"""Of these, a vocabulary without bytes lacks some."""


class Tokenizer:
    """A tokenizer's model, the engine that encodes with it, and the id that ends a document."""

    def __init__(self, config: TokenizerConfig | TokenizerSettings) -> None:
        """Load the model.

        Raises:
            ConfigError: the model file is missing, or has no piece for the configured end of document, or one that
                texts have as well.
            DataError: the file is no tokenizer (tokenizer_file.py), or takes literal `</s>` in a text for its control
                piece.
        """
        self._model = load_model(config.file)
        self.vocab_size: int = self._model.vocab_size
        self.dtype = token_dtype(self.vocab_size)
        self.end_of_document_id = self._end_of_document(config)
        self.start_id: int = self._model.bos_id if self._model.bos_id >= 0 else self.end_of_document_id
        """What a model is given before a text that it is to continue: <s>, or where there is none an ended document."""
        self._begin = self._begin_of_document(config)
        self._refuse_control_texts(config.file)
        if self.end_of_document_id in self._model.encode(_RARE):
            raise ConfigError(
                f"tokenizer.end_of_document is {config.end_of_document!r}, which {config.file} also gives to "
                "characters that its vocabulary lacks: documents would end within a text. Name another one, such as eos"
            )
        model, own = self._model, f"sentencepiece {sentencepiece.__version__}"
        self._fast: FastEngine | None = None
        if not isinstance(model, SentencePieceModel):
            own = model.engine
        elif config.engine == "auto":
            self._fast = FastEngine.load(model)
        self.lost: Sequence[str] = model.lost if isinstance(model, ByteLevelModel) else ()
        """Characters without an id, which are left out of texts."""
        self.engine: str = self._fast.name if self._fast else own
        """Name and version of what encodes."""

    def encode(self, text: str) -> Tokens:
        """Ids of a text, [tokens], in `dtype`; no begin or end is added, and `</s>` in the text is text."""
        ids = self._fast.encode(text) if self._fast else self._model.encode(text)
        return np.asarray(ids, dtype=self.dtype)

    def encode_document(self, text: str) -> Tokens:
        """Ids of a whole document: the begin-of-document id if configured, its text, the end-of-document id."""
        return self._document(self._fast.encode(text) if self._fast else self._model.encode(text))

    def _document(self, ids: Tokens) -> Tokens:
        begin = len(self._begin)
        document = np.empty(begin + len(ids) + 1, dtype=self.dtype)
        document[:begin] = self._begin
        document[begin:-1] = ids
        document[-1] = self.end_of_document_id
        return document

    def verify_document(self, text: str, ids: Tokens) -> None:
        """Compare a document's ids with SentencePiece's.

        Raises:
            DataError: one differs.
        """
        expected = self._document(self._model.encode(text))
        if not np.array_equal(ids, expected):
            shorter = min(len(ids), len(expected))
            differing = np.flatnonzero(ids[:shorter] != expected[:shorter])
            at = int(differing[0]) if len(differing) else shorter
            raise DataError(
                f"{self.engine} and SentencePiece differ from token {at} of {len(expected)} "
                f"on ({ids[at : at + 4].tolist()}, not {expected[at : at + 4].tolist()}): set tokenizer.engine: "
                "sentencepiece"
            )

    def _begin_of_document(self, config: TokenizerConfig | TokenizerSettings) -> list[int]:
        if not config.begin_of_document:
            return []
        if self._model.bos_id < 0:
            raise ConfigError(
                f"tokenizer.begin_of_document is true, but {config.model} names no token that begins a text: set it to "
                "false"
            )
        return [self._model.bos_id]

    def _end_of_document(self, config: TokenizerConfig | TokenizerSettings) -> int:
        # Llemma's data ends in <unk>, because the seed asked for "<|endoftext|>", which Llama's vocabulary lacks.
        model, name = self._model, config.end_of_document
        named = not isinstance(model, SentencePieceModel)
        if isinstance(model, SentencePieceModel):
            found = {"eos": model.eos_id, "unk": model.unk_id}.get(name, -1)
        else:
            found = model.special_id(name)
        if found < 0:
            raise ConfigError(
                f"tokenizer.end_of_document is {config.end_of_document!r}, but {config.model} has no such piece"
                + (": name the special token that ends a text, such as <|endoftext|>" if named else "")
            )
        return found

    def _refuse_control_texts(self, path: Path) -> None:
        # SentencePiece never matches control pieces in a text, unless the model declares them user-defined; of other
        # tokenizers, one that takes whole words from its vocabulary may take a special token for a word.
        model = self._model
        own = () if isinstance(model, SentencePieceModel) else model.special_texts
        for text in (*_CONTROL_TEXTS, *own):
            if controls := model.specials_in(text):
                raise DataError(
                    f"tokenizer {path} turns the literal text {text!r} into the special id {controls[0]}: "
                    "use a model in which it is a control piece, not a user-defined one or a word of the vocabulary"
                )
