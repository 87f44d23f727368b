"""A plain byte-pair SentencePiece model as a tokenizer.json, the form that other engines read fastest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

import orjson
from sentencepiece import sentencepiece_model_pb2

from neox_core.data.tokenization.sentencepiece_model import Piece, SentencePieceModel

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_MARK = "\u2581"


def tokenizer_json(source: SentencePieceModel) -> bytes:
    """The model, whose normalisation is of blanks alone (see `SentencePieceModel.is_plain_bpe`)."""
    vocab = {text: number for number, (text, _, _) in enumerate(source.pieces)}
    normalizers = [
        {"type": "Prepend", "prepend": _MARK},
        {"type": "Replace", "pattern": {"String": " "}, "content": _MARK},
    ]
    added = (_Piece.CONTROL, _Piece.USER_DEFINED)
    model = {
        "type": "BPE",
        "unk_token": source.unknown_text,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": vocab,
        "merges": _merges(source.pieces, vocab),
    }
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": text, "normalized": False, "special": kind == _Piece.CONTROL}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for number, (text, _, kind) in enumerate(source.pieces)
            if kind in added
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "model": model,
    }
    return orjson.dumps(content)


def _merges(pieces: Sequence[Piece], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Ways to put a piece together from two, by the score of the result, then the left part's length, both falling."""
    score = itemgetter(1)
    shared = {value for value, count in Counter(map(score, pieces)).items() if count > 1}
    merges: list[tuple[str, str]] = []
    ranked = sorted(pieces, key=score, reverse=True)
    # Pieces with a score of their own, nearly all, make long groups.
    for tied, group in groupby(ranked, key=lambda piece: piece[1] if piece[1] in shared else None):
        alike = [
            (left, right)
            for text, _, _ in group
            for cut in range(len(text) - 1, 0, -1)
            if (left := text[:cut]) in vocab and (right := text[cut:]) in vocab
        ]
        if tied is not None:
            alike.sort(key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
        merges += alike
    return merges
