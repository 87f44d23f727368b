"""A SentencePiece model as the files that transformers' AutoTokenizer reads, with the same ids for every text.

transformers builds a tokenizer from tokenizer.model by rules of its own that give other ids for most documents. So the
BPE is written out here: SentencePiece merges the neighbours whose union has the highest score, which is a list of
merges ordered by score.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from neox_core.config.families import FAMILIES, FamilyName
from neox_core.data.tokenization.sentencepiece_model import merge_problem
from neox_core.data.tokenization.tokenizer_file import (
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    TokenizerKind,
    description,
    kind_of_file,
    load_model,
)
from neox_core.errors import CheckpointError

PLAIN_TOKENIZER = "sentencepiece.model"
"""Of a model that has no equal tokenizer.json: under tokenizer.model, transformers would make one by its own rules."""
_SPACE = "\u2581"
"""SentencePiece's mark for a blank."""
_Piece = proto.ModelProto.SentencePiece


def load_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model.

    Raises:
        CheckpointError: the file is missing or not a SentencePiece model.
    """
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        found = f": it is {description(path.read_bytes())}, where SentencePiece was expected" if path.is_file() else ""
        raise CheckpointError(f"tokenizer {path} cannot be loaded ({reason}){found}") from None


def tokenizer_files(path: Path, sequence_length: int) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json of a SentencePiece model, by name.

    As in the training data, nothing is put before or after a text, and a text that spells `<s>` is text.

    Raises:
        CheckpointError: the model is missing, or is of a kind that cannot be expressed exactly.
    """
    processor = load_sentencepiece(path)
    model = proto.ModelProto.FromString(processor.serialized_model_proto())
    if problem := _problem(model):
        raise CheckpointError(f"tokenizer {path} {problem}: an equal tokenizer.json cannot be written for it")
    special = {
        "bos_token": processor.id_to_piece(processor.bos_id()),
        "eos_token": processor.id_to_piece(processor.eos_id()),
        "unk_token": processor.id_to_piece(processor.unk_id()),
    }
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {
        TOKENIZER_JSON: _build(model).to_str(pretty=True),
        TOKENIZER_CONFIG: json.dumps(config, indent=2) + "\n",
        SPECIAL_TOKENS_MAP: json.dumps(special, indent=2) + "\n",
    }


def tokenizer_problem(path: Path, family: FamilyName) -> str | None:
    """Why no tokenizer.json can be written that is equal to a SentencePiece model; None: one can.

    Raises:
        CheckpointError: the model is missing or damaged.
    """
    if FAMILIES[family].own_tokenizer:
        return f"is a SentencePiece model, and transformers reads every tokenizer of the family {family} as byte-level"
    return _problem(proto.ModelProto.FromString(load_sentencepiece(path).serialized_model_proto()))


def _problem(model: Any) -> str | None:
    """What a list of merges cannot express."""
    spec = model.trainer_spec
    kinds = {_Piece.USER_DEFINED: "user-defined", _Piece.UNUSED: "unused"}
    odd = next((piece for piece in model.pieces if piece.type in kinds), None)
    if spec.model_type != proto.TrainerSpec.BPE:
        return "is not a BPE model"
    if model.normalizer_spec.precompiled_charsmap or model.normalizer_spec.remove_extra_whitespaces:
        return f"normalizes text ({model.normalizer_spec.name}, remove_extra_whitespaces)"
    if odd is not None:
        return f"has the {kinds[odd.type]} piece {odd.piece!r}"
    if spec.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces:
        return "puts the blank behind a word, or leaves it as it is"
    if min(spec.bos_id, spec.eos_id, spec.unk_id) < 0:
        return "lacks a begin, end or unknown id"
    return merge_problem([(piece.piece, piece.score, piece.type) for piece in model.pieces])


def _build(model: Any) -> Any:
    """The tokenizers.Tokenizer that gives SentencePiece's ids."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    unknown = next(piece.piece for piece in model.pieces if piece.type == _Piece.UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=list(_merges(model)),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    prefix = model.normalizer_spec.add_dummy_prefix
    prepend = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(model: Any) -> Iterator[tuple[str, str]]:
    """Every way to put a normal piece together from two, the highest score first."""
    normal = {piece.piece: number for number, piece in enumerate(model.pieces) if piece.type == _Piece.NORMAL}
    for piece in sorted(normal, key=lambda piece: (-model.pieces[normal[piece]].score, normal[piece])):
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [(left, right) for left, right in halves if left in normal and right in normal]
        yield from sorted(known, key=lambda pair: (normal[pair[0]], normal[pair[1]]))


def compare_tokenizers(folder: Path, texts: Sequence[str]) -> int:
    """Encode texts with the folder's AutoTokenizer and with its tokenizer.model; yields the number of tokens.

    Raises:
        CheckpointError: the ids of a text differ; the message says where.
    """
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encode, settings = _original(folder / TOKENIZER_MODEL)
    tokens = 0
    for number, text in enumerate(texts):
        expected, found = encode(text), ours(text, verbose=False, **settings)["input_ids"]
        if expected != found:
            pairs = enumerate(zip(expected, found, strict=False))
            shorter = min(len(expected), len(found))
            place = next((i for i, pair in pairs if pair[0] != pair[1]), shorter)
            where = f"token {place}" if place < shorter else f"which has {len(found)} in place of {len(expected)} ids"
            near = ours.decode(expected[max(0, place - 3) : place + 5])
            raise CheckpointError(
                f"{folder}: the tokenizer's ids differ from those of {TOKENIZER_MODEL} in text {number}, {where}, "
                f"near {near!r}"
            )
        tokens += len(expected)
    return tokens


def _original(path: Path) -> tuple[Callable[[str], list[int]], dict[str, Any]]:
    """What encodes a text with tokenizer.model, and how the other is asked for the same."""
    if kind_of_file(path) is TokenizerKind.SENTENCEPIECE:
        return load_sentencepiece(path).encode, {}
    model = load_model(path)
    # In text; in a chat, special tokens are meant, so that its files do not say so.
    return lambda text: model.encode(text).tolist(), {"split_special_tokens": True}
