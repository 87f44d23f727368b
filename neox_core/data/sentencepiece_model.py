"""A SentencePiece model: it says which ids are right."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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
_BORDER = re.compile(rf"[^ {_MARK}\n](?= [\s\S])|(?=\n)")
_CROSSING = re.compile(rf"[^{_MARK}]{_MARK}|[ \n]")
_BPE = 2  # TrainerSpec.ModelType

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
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
        self.special_texts = [piece.piece for piece in unusual]
        """Pieces that other engines may treat in another way when they stand in a text."""
        self.is_plain_bpe = _is_plain_bpe(proto)
        """BPE with byte fallback whose only normalisation is of blanks, as Llama's."""
        self._cuts = self.is_plain_bpe and not any(_CROSSING.search(piece.piece) for piece in proto.pieces)
        self._ids_before_line_feed = len(self._model.encode("\n")) - 1

    def proto(self) -> Any:
        """The model as a ModelProto."""
        return _parsed(self.content)

    def encode(self, text: str) -> Tokens:
        """Ids of a text, [tokens]."""
        return self.encode_segments(text, _SEGMENT, self._model.encode)

    def encode_segments(self, text: str, length: int, encode: Callable[[str], Sequence[int] | Tokens]) -> Tokens:
        """Encode a text longer than `length` characters in segments of about that length.

        BPE never merges over a pair of letters that no piece contains. In Llama's vocabularies none holds a blank after
        another letter, or a line feed, so a segment may begin at either. An encoder puts a blank before each text: it
        stands for the blank that is cut off, and its ids are taken away before a line feed.
        """
        if len(text) <= length or not self._cuts:
            return np.asarray(encode(text))
        starts = _segment_starts(text, length)
        parts = [np.asarray(encode(text[: starts[1]]))] if len(starts) > 1 else [np.asarray(encode(text))]
        for start, end in zip(starts[1:], [*starts[2:], len(text)], strict=False):
            if text[start] == " ":
                parts.append(np.asarray(encode(text[start + 1 : end])))
            else:
                parts.append(np.asarray(encode(text[start:end]))[self._ids_before_line_feed :])
        return np.concatenate(parts)

    def specials_in(self, text: str) -> list[int]:
        """Ids of control pieces in the text's encoding, or of pieces that are the text itself."""
        return [i for i in self._model.encode(text) if self._model.is_control(i) or self._model.IdToPiece(i) == text]


def _segment_starts(text: str, length: int) -> list[int]:
    starts = [0]
    while len(text) - starts[-1] > length and (border := _BORDER.search(text, starts[-1] + length)):
        starts.append(border.end())
    return starts


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
