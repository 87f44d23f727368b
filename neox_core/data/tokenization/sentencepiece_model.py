"""A SentencePiece model: it says which ids are right."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from functools import cached_property
from itertools import pairwise, product
from typing import Any

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from neox_core.data.indexed import Tokens

_MARK = "\u2581"  # what SentencePiece writes for a blank
_INFILL = re.compile(f"{_MARK}?<(PRE|MID|SUF|EOT)>")
_SEGMENT = 1 << 16
"""Characters. SentencePiece needs some 70 bytes of memory for each, and slows down with the length."""
_NEAR = 1 << 12
"""Characters in which a blank or line feed is looked for before other borders."""
_BLANKS = frozenset(f" {_MARK}\n")
_BORDER = re.compile(rf"[^ {_MARK}\n](?= [\s\S])|(?=\n)")
_CROSSING = re.compile(rf"[^{_MARK}]{_MARK}|[ \n]")
_BPE = 2  # TrainerSpec.ModelType

Piece = tuple[str, float, int]
"""Text, score and type."""
_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_NEVER_MERGED = frozenset((_Piece.CONTROL, _Piece.UNKNOWN, _Piece.BYTE))
_SPECIAL = frozenset((_Piece.CONTROL, _Piece.UNKNOWN, _Piece.USER_DEFINED))


class SentencePieceModel:
    """Encodes texts of any length; long ones in segments where the vocabulary makes that exact."""

    def __init__(self, content: bytes) -> None:
        """Load a .model file's content.

        Code Llama's `<PRE>` and its kin become control pieces if they are user-defined ones, so that they never match
        in a text.

        Raises:
            ValueError, RuntimeError: it is none.
        """
        proto = _parsed(content)
        unusual = [piece for piece in proto.pieces if piece.type in _SPECIAL]
        for piece in unusual:
            if piece.type == _Piece.USER_DEFINED and _INFILL.fullmatch(piece.piece):
                piece.type = _Piece.CONTROL
        self.content: bytes = proto.SerializeToString()
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(self.content)
        self.vocab_size: int = self._model.vocab_size()
        if self.vocab_size == 0:
            raise ValueError("no pieces")
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.unk_id: int = self._model.unk_id()
        self.pieces: list[Piece] = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
        """By id."""
        self.unknown_text: str = proto.trainer_spec.unk_piece
        self.special_texts = [piece.piece for piece in unusual]
        """Pieces that other engines may treat in another way when they stand in a text."""
        self.is_plain_bpe = _is_plain_bpe(proto) and not any(kind == _Piece.UNUSED for _, _, kind in self.pieces)
        """BPE with byte fallback whose only normalisation is of blanks, with all pieces in use, as Llama's."""
        self._cuts = self.is_plain_bpe and not any(_CROSSING.search(text) for text, _, _ in self.pieces)
        self._ids_before_line_feed = len(self._model.encode("\n")) - 1

    def encode(self, text: str) -> Tokens:
        """Ids of a text, [tokens]."""
        return self.encode_segments(text, _SEGMENT, self._model.encode)

    def encode_segments(self, text: str, length: int, encode: Callable[[str], Sequence[int] | Tokens]) -> Tokens:
        """Encode a text longer than `length` characters in segments of about that length.

        BPE never merges over a pair of letters that no piece contains. In Llama's vocabularies none holds a blank after
        another letter, or a line feed, so a segment may begin at either, or between two letters that no piece holds one
        after the other. An encoder puts a blank before each text: it stands for the blank that is cut off, and its ids
        are taken away before a line feed, which itself may stand for what went before.
        """
        starts = self._segment_starts(text, length) if self._cuts else []
        if not starts:
            return _array(encode(text))
        parts = [_array(encode(text[: starts[0]]))]
        for start, end in pairwise([*starts, len(text)]):
            if text[start] == " ":
                parts.append(_array(encode(text[start + 1 : end])))
            elif text[start] == "\n":
                parts.append(_array(encode(text[start:end]))[self._ids_before_line_feed :])
            else:
                parts.append(_array(encode("\n" + text[start:end]))[self._ids_before_line_feed + 1 :])
        return np.concatenate(parts)

    def _segment_starts(self, text: str, length: int) -> list[int]:
        """Where segments but the first begin."""
        starts: list[int] = []
        while len(text) - (last := starts[-1] if starts else 0) > length:
            after = last + length
            border = _BORDER.search(text, after, after + _NEAR)
            start = border.end() if border else self._next_border(text, after)
            if start is None:
                break
            starts.append(start)
        return starts

    def _next_border(self, text: str, after: int) -> int | None:
        """The next place where a segment may begin, of any kind."""
        border = _BORDER.search(text, after)
        end = border.end() if border else len(text)
        pairs = self._pairs
        for place in range(after, end):
            if (pair := text[place - 1 : place + 1]) not in pairs and _BLANKS.isdisjoint(pair):
                return place
        return end if border else None

    @cached_property
    def _pairs(self) -> frozenset[str]:
        """Letters that stand one after the other in a piece that a text may be put together from."""
        texts = (text for text, _, kind in self.pieces if kind not in _NEVER_MERGED)
        return frozenset(text[i : i + 2] for text in texts for i in range(len(text) - 1))

    def specials_in(self, text: str) -> list[int]:
        """Ids of control pieces in the text's encoding, or of pieces that are the text itself."""
        return [i for i in self._model.encode(text) if self._model.is_control(i) or self._model.IdToPiece(i) == text]


def merge_problem(pieces: Sequence[Piece]) -> str | None:
    """Why a list of merges cannot say what a byte-pair model does; None: one can.

    Of neighbours whose unions score alike, SentencePiece joins the first in the text, where a list has one order for
    all texts; of runs of one character, such as blanks, both make the same, and of the pieces with the highest score
    where none begins as another ends. And it joins characters without a piece.
    """
    scores = {text: score for text, score, kind in pieces if kind == _Piece.NORMAL}
    joined = [text for text in scores if len(text) > 1]
    if lacking := set("".join(joined)) - scores.keys():
        text = next(text for text in joined if not lacking.isdisjoint(text))
        character = next(character for character in text if character in lacking)
        return f"has the piece {text!r}, but none for the character {character!r} alone"
    highest = max((scores[text] for text in joined), default=0.0)
    first: dict[float, str] = {}
    tied = ((first.setdefault(scores[text], text), text) for text in joined if scores[text] < highest)
    meeting = _meeting([text for text in joined if scores[text] == highest], scores)
    for one, other in (*tied, *meeting):
        if one != other and len({*one, *other}) > 1:
            return f"gives the pieces {one!r} and {other!r} the same score and makes whichever is first in a text"
    return None


def _meeting(texts: Sequence[str], pieces: Container[str]) -> Iterator[tuple[str, str]]:
    """Pairs of them that can want the same piece of a text, as the end of the one and the beginning of the other."""
    beginning, ending = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for text in texts:
        for left, right in ((text[:cut], text[cut:]) for cut in range(1, len(text))):
            if left in pieces and right in pieces:
                beginning[left].append(text)
                ending[right].append(text)
    for piece in beginning.keys() & ending.keys():
        yield from product(ending[piece], beginning[piece])


def _array(ids: Sequence[int] | Tokens) -> Tokens:
    return np.asarray(ids, dtype=np.uint32)


def _parsed(content: bytes) -> Any:
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise ValueError(str(error)) from None
    return proto


def _is_plain_bpe(proto: Any) -> bool:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    return bool(
        trainer.model_type == _BPE
        and trainer.byte_fallback
        and not trainer.treat_whitespace_as_suffix
        and normalizer.add_dummy_prefix
        and normalizer.escape_whitespaces
        and not normalizer.remove_extra_whitespaces
        and not normalizer.precompiled_charsmap
    )
