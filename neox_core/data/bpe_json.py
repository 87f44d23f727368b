"""A plain byte-pair SentencePiece model as a tokenizer.json, the form that other engines read fastest."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import Any

import orjson
from sentencepiece import sentencepiece_model_pb2

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_MARK = "\u2581"


def tokenizer_json(proto: Any) -> bytes:
    """The model, whose normalisation is of blanks alone (see `SentencePieceModel.is_plain_bpe`)."""
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    normalizers = [
        {"type": "Prepend", "prepend": _MARK},
        {"type": "Replace", "pattern": {"String": " "}, "content": _MARK},
    ]
    model = {
        "type": "BPE",
        "unk_token": proto.trainer_spec.unk_piece,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": vocab,
        "merges": _merges(proto, vocab),
    }
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": piece.piece, "normalized": False, "special": piece.type == _Piece.CONTROL}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for number, piece in enumerate(proto.pieces)
            if piece.type in (_Piece.CONTROL, _Piece.USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "model": model,
    }
    return orjson.dumps(content)


def _merges(proto: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Ways to put a piece together from two, by the score of the result, then the left part's length, both falling."""
    ranked = sorted(((piece.score, piece.piece) for piece in proto.pieces), key=itemgetter(0), reverse=True)
    merges: list[tuple[str, str]] = []
    for _, group in groupby(ranked, key=itemgetter(0)):
        first, pieces = len(merges), 0
        for _, piece in group:
            pieces += 1
            for cut in range(len(piece) - 1, 0, -1):
                if (left := piece[:cut]) in vocab and (right := piece[cut:]) in vocab:
                    merges.append((left, right))
        if pieces > 1:
            merges[first:] = sorted(merges[first:], key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
    return merges
