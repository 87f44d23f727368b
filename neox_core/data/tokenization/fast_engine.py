"""gigatoken: byte-pair encoding many times faster than SentencePiece, used where it gives the same ids."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from neox_core.data.indexed import Tokens
from neox_core.data.tokenization.bpe_json import tokenizer_json
from neox_core.data.tokenization.sentencepiece_model import SentencePieceModel, merge_problem

_log = logging.getLogger(__name__)

_SEGMENT = 1 << 20
"""Characters encoded at a time."""
_CACHE_BYTES = 150 << 20
"""Memory that the engine may add for what it remembers of earlier text; it has no limit of its own."""
_CACHE_BYTES_BESIDE_LONG = 30 << 20
"""The same before a text longer than a segment, which needs much memory itself if it cannot be cut."""
_LOOK_EVERY = 1 << 20
"""Characters between two looks at the memory."""
_PROBES = (
    "",
    " ",
    "\n",
    "  two  blanks \n\n\t and a tab\r\n",
    "Let $x \\in \\mathbb{R}^{2}$; then \\frac{1}{2} ≤ |x|.",
    "def f(x):\n    return x  # 1234567890",
    "∀ε>0 ∃δ 你好，世界 😀👩‍👩‍👧 \u0301e\u0301 \u2028\u00a0\ufeff\ufffd",
    "\x00\x01\x7f\u2581 literal \u2581\u2581marks<0x0A>",
    "a" * 300,
)


class FastEngine:
    """Encodes with gigatoken; texts that hold a special piece's name go to SentencePiece."""

    def __init__(self, model: SentencePieceModel) -> None:
        self.name = f"gigatoken {_version()}"
        self._model = model
        self._specials = _matcher(model.special_texts)
        self._json = tokenizer_json(model)
        self._process, self._resident, self._until_look = 0, 0, _LOOK_EVERY
        self._renew()

    @classmethod
    def load(cls, model: SentencePieceModel) -> FastEngine | None:
        """The engine, or None if it is not installed or is not SentencePiece's equal for this model."""
        if not model.is_plain_bpe:
            _log.info("SentencePiece encodes: the model is not a plain byte-pair one")
            return None
        if problem := merge_problem(model.pieces):
            _log.warning("SentencePiece encodes, as gigatoken would give other ids: the model %s", problem)
            return None
        try:
            engine = cls(model)
        except Exception as error:  # whatever it cannot read, SentencePiece can
            _log.warning("SentencePiece encodes: gigatoken is missing or does not take the model (%s)", error)
            return None
        if differing := [text for text in _PROBES if not np.array_equal(engine.encode(text), model.encode(text))]:
            _log.warning("SentencePiece encodes: gigatoken differs from it on %r", differing[0])
            return None
        return engine

    def encode(self, text: str) -> Tokens:
        """Ids of a text, [tokens]."""
        if self._specials.search(text):
            return self._model.encode(text)
        if len(text) > _SEGMENT:
            self._bound_memory(_CACHE_BYTES_BESIDE_LONG)
        ids = self._model.encode_segments(text, _SEGMENT, self._encode)
        self._until_look -= len(text)
        if self._until_look <= 0:
            self._bound_memory(_CACHE_BYTES)
        return ids

    def _bound_memory(self, limit: int) -> None:
        self._until_look = _LOOK_EVERY
        if self._process != os.getpid():  # a fork of the process that loaded the engine
            self._process, self._resident = os.getpid(), _resident_bytes()
        if _resident_bytes() - self._resident > limit:
            self._renew()

    def _renew(self) -> None:
        import gigatoken

        self._encode: Any = None  # the old one's memory goes first
        self._encode = gigatoken.Tokenizer.from_json(self._json).encode
        self._process, self._resident = os.getpid(), _resident_bytes()
        self._until_look = _LOOK_EVERY


def _version() -> str:
    """Of gigatoken, by its metadata's folder: importlib.metadata costs a process as much as half a megabyte of text."""
    import gigatoken

    found = sorted(Path(gigatoken.__file__).parents[1].glob("gigatoken-*.dist-info"))
    return found[-1].stem.removeprefix("gigatoken-") if found else "of unknown version"


def _resident_bytes() -> int:
    """Of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _matcher(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the texts, as fast for a thousand as for three."""
    return re.compile(_alternatives(set(texts) - {""}) or r"(?!)")


def _alternatives(texts: Iterable[str]) -> str:
    """A pattern in which texts that begin alike share their beginning; of two, the shorter one will do."""
    rests: dict[str, set[str]] = {}
    for text in texts:
        if not text:
            return ""
        rests.setdefault(text[0], set()).add(text[1:])
    return "|".join(f"{re.escape(first)}(?:{_alternatives(rests[first])})" for first in sorted(rests))
