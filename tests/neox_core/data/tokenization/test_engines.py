"""The fast engine and segments give SentencePiece's ids, on real text and on text made to break them."""

from __future__ import annotations

import logging
import os
import random
import string
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from neox_core.checkpoint.formats.huggingface_tokenizer import tokenizer_problem
from neox_core.config import TokenizerConfig
from neox_core.data.tokenization import fast_engine, sentencepiece_model
from neox_core.data.tokenization.fast_engine import FastEngine
from neox_core.data.tokenization.sentencepiece_model import SentencePieceModel
from neox_core.data.tokenization.tokenizer import Tokenizer
from neox_core.errors import DataError
from tests.paths import SHARED

DEMO = Path("data/tokenizers/demo-2048.model")
TOKENIZERS = SHARED / "data" / "tokenizers"
MODELS = [DEMO, *(TOKENIZERS / f"mistral-{version}.model" for version in ("v1", "v3"))]
Type = sentencepiece_model_pb2.ModelProto.SentencePiece

ALPHABETS = [
    "ab \n",
    " \t\n\r\x0b\x0c",
    "▁ a\n",
    "\x00 a\x01\x7f\x80",
    "é ñ́e\u0301",
    "日本語 。\u3000",
    "\u2028\u2029\u00a0\ufeff a",
    "😀👩\u200d👧 ",
    "<>/sunkPRE▁ ",
    "0123456789. ",
    "\\frac{x}^_$ ",
    "ﬀ①ａＡ",
    "\U0010ffff\ue000\ufffd\ufffe a",
]
SPECIAL = ["<s>", "</s>", "<unk>", "a</s>b <s><unk>", "▁<s>", "<PRE>", "x <PRE> y", "[INST] [/INST]", "<0x0A>"]


def need(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


def recorder(calls: list[str], encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """Encodes, and notes what it was given."""

    def recorded(part: str) -> list[int]:
        calls.append(part)
        return encode(part)

    return recorded


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    everything = "".join(ALPHABETS)
    texts = []
    for _ in range(count):
        alphabet = rng.choice([*ALPHABETS, everything])
        texts.append("".join(rng.choice(alphabet) for _ in range(rng.randint(0, 60))))
    return texts


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_engine_gives_sentencepieces_ids(path: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(need(path)))
    tokenizer = Tokenizer(TokenizerConfig(model=path))
    assert tokenizer.engine.startswith("gigatoken ")
    pieces = [reference.id_to_piece(i).replace("▁", " ") for i in range(reference.vocab_size())]
    rng = random.Random(2)
    texts = [*random_texts(6000), *SPECIAL]
    texts += ["".join(rng.choice(pieces) for _ in range(rng.randint(1, 20))) for _ in range(3000)]
    assert [text for text in texts if tokenizer.encode(text).tolist() != reference.encode(text)] == []


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_segments_are_exact(path: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(need(path)))
    model = SentencePieceModel(path.read_bytes())
    rng = random.Random(3)
    prose = Path("README.md").read_text()
    texts = [*random_texts(2000), *(prose[start : start + 3000] for start in range(0, len(prose), 1500))]
    cut = 0
    for text in texts:
        length = rng.randint(2, 40)
        calls: list[str] = []
        ids = model.encode_segments(text, length, recorder(calls, reference.encode))
        assert ids.tolist() == reference.encode(text), (text, length)
        cut += len(calls) > 1
    assert cut > 500


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_segments_without_blanks_are_exact(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut between letters that no piece joins, and not at all where every pair is joined by some piece."""
    monkeypatch.setattr(sentencepiece_model, "_NEAR", 8)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(need(path)))
    model = SentencePieceModel(path.read_bytes())
    rng = random.Random(5)
    alphabets = [*ALPHABETS, string.ascii_letters + string.digits + "+/", string.digits, "éèα日本😀ab", "▁ab", "e"]
    for alphabet in alphabets:
        for _ in range(40):
            text = "".join(rng.choice(alphabet.replace(" ", "").replace("\n", "")) for _ in range(300))
            calls: list[str] = []
            ids = model.encode_segments(text, 20, recorder(calls, reference.encode))
            assert ids.tolist() == reference.encode(text), text
            assert alphabet != string.digits or len(calls) > 1
            assert alphabet != "e" or len(calls) == 1


def changed(**pieces: int) -> bytes:
    """The demo's model with the types of some pieces changed, or with pieces added."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(DEMO.read_bytes())
    known = {piece.piece: piece for piece in proto.pieces}
    for text, kind in pieces.items():
        piece = known[text] if text in known else proto.pieces.add(piece=text, score=-1e4)
        piece.type = kind
    content: bytes = proto.SerializeToString()
    return content


def extended(folder: Path, added: Mapping[str, float]) -> Path:
    """A file of the demo's model with pieces appended, of these scores."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(DEMO.read_bytes())
    for piece, score in added.items():
        proto.pieces.add(piece=piece, score=score, type=Type.NORMAL)
    path = folder / "extended.model"
    path.write_bytes(proto.SerializeToString())
    return path


def check_merges_say_the_same(path: Path, texts: Iterable[str]) -> None:
    """Gigatoken encodes, to SentencePiece's ids, and an equal tokenizer.json can be written."""
    tokenizer = Tokenizer(TokenizerConfig(model=path))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.engine.startswith("gigatoken ")
    assert tokenizer_problem(path, "llama") is None
    for text in texts:
        assert tokenizer.encode(text).tolist() == reference.encode(text)


def test_no_segments_where_a_piece_holds_a_border(monkeypatch: pytest.MonkeyPatch) -> None:
    for piece in ("a▁b", "a\nb"):
        calls: list[str] = []
        model = SentencePieceModel(changed(**{piece: Type.NORMAL}))
        model.encode_segments("a b a\nb " * 9, 3, recorder(calls, lambda part: [1]))
        assert len(calls) == 1


@pytest.mark.parametrize("kind", [Type.NORMAL, Type.CONTROL, Type.USER_DEFINED])
@pytest.mark.parametrize("piece", ["▁<PRE>", "<MID>"])
def test_code_llamas_infill_pieces_are_text(tmp_path: Path, kind: int, piece: str) -> None:
    (tmp_path / "m.model").write_bytes(changed(**{piece: kind}))
    tokenizer = Tokenizer(TokenizerConfig(model=tmp_path / "m.model"))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(DEMO))  # has no such piece
    for text in ("<PRE>", "x <PRE> y<MID>z", "▁<PRE>▁<MID>"):
        assert tokenizer.encode(text).tolist() == reference.encode(text)


def test_user_defined_pieces_are_sentencepieces(tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(changed(**{"<table>": Type.USER_DEFINED, "<td": Type.USER_DEFINED}))
    tokenizer = Tokenizer(TokenizerConfig(model=tmp_path / "m.model"))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert tokenizer.engine.startswith("gigatoken ")
    for text in ("a <table> b", "<table><td>x", "x<td", "<tab <t"):
        assert tokenizer.encode(text).tolist() == reference.encode(text)


def test_engine_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = SentencePieceModel(DEMO.read_bytes())
    monkeypatch.setattr(FastEngine, "encode", lambda self, text: model.encode(text.replace("\t", " ")))
    with caplog.at_level(logging.WARNING):
        assert FastEngine.load(model) is None
    assert "gigatoken differs" in caplog.text
    tokenizer = Tokenizer(TokenizerConfig(model=DEMO))
    assert tokenizer.engine.startswith("sentencepiece ")
    assert tokenizer.encode("a\tb").tolist() == model.encode("a\tb").tolist()


def test_missing_engine_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    assert Tokenizer(TokenizerConfig(model=DEMO)).engine.startswith("sentencepiece ")


def test_other_models_are_sentencepieces(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("a small corpus <of> text / with a few unknown words\n" * 50)
    for kind in ("unigram", "bpe"):  # the latter without byte fallback, with normalisation
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "corpus.txt"),
            model_prefix=str(tmp_path / kind),
            vocab_size=45,
            model_type=kind,
            minloglevel=2,
            hard_vocab_limit=False,
        )
        tokenizer = Tokenizer(TokenizerConfig(model=tmp_path / f"{kind}.model"))
        reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / f"{kind}.model"))
        text = "a  small ﬁ corpus\n" * 9000
        assert tokenizer.engine.startswith("sentencepiece ")
        assert tokenizer.encode(text).tolist() == reference.encode(text)


@pytest.mark.parametrize("piece", ["ing", "\u2581the"])
def test_a_model_with_unused_pieces_is_sentencepieces(tmp_path: Path, piece: str) -> None:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(DEMO.read_bytes())
    (found,) = [entry for entry in proto.pieces if entry.piece == piece]
    found.type = found.UNUSED
    (tmp_path / "unused.model").write_bytes(proto.SerializeToString())
    tokenizer = Tokenizer(TokenizerConfig(model=tmp_path / "unused.model"))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "unused.model"))
    text = "the theorem of equations is interesting"
    assert tokenizer.engine.startswith("sentencepiece ")
    assert tokenizer.encode(text).tolist() == reference.encode(text)


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        # as people extend Llama's vocabulary: pieces are appended, all with score 0
        ({"cgh": 0.0, "ghb": 0.0}, "the same score"),
        ({"ghb": 0.0, "cgh": 0.0}, "the same score"),
        ({"\u5b9a\u7406": -5000.0}, "has the piece '\u5b9a\u7406', but none for the character '\u5b9a' alone"),
    ],
)
def test_a_model_that_merges_cannot_express_is_sentencepieces(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, added: dict[str, float], reason: str
) -> None:
    path = extended(tmp_path, added)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    text = "a bdcghb bcghb \u5b9a\u7406"
    assert Tokenizer(TokenizerConfig(model=path)).encode(text).tolist() == reference.encode(text)
    assert reason in caplog.text
    problem = tokenizer_problem(path, "llama")
    assert problem is not None
    assert reason in problem


def test_runs_of_one_character_may_score_alike(tmp_path: Path) -> None:
    """As Llama's runs of blanks, which all have the score -1e9."""
    path = extended(tmp_path, {"~" * length: -1e9 for length in (5, 7, 11, 2, 3)})
    check_merges_say_the_same(path, (f"a{'~' * length} {'~' * (60 - length)}" for length in range(60)))


def test_appended_pieces_that_never_meet_may_score_alike(tmp_path: Path) -> None:
    """A few marks at the score 0, which is the default, took tokenizer.json and gigatoken from a vocabulary."""
    marks = ("\u2581<S", "\u2581<S>", "\u2581<E", "\u2581<E>", "qxz")
    path = extended(tmp_path, dict.fromkeys(marks, 0.0))
    check_merges_say_the_same(path, ("a <S> <E><S> qxzqx <SE>", "  <S <E> qxz<S>", "<S>text <E>  <Eq>x"))


def test_one_wrong_id_is_found() -> None:
    tokenizer = Tokenizer(TokenizerConfig(model=DEMO))
    ids = tokenizer.encode_document("some text")
    tokenizer.verify_document("some text", ids)
    for wrong in (ids[:-1], np.append(ids, 2), np.where(np.arange(len(ids)) == 1, ids + 1, ids)):
        with pytest.raises(DataError, match=r"differ from token \d+ of \d+ on .*set tokenizer.engine: sentencepiece"):
            tokenizer.verify_document("some text", wrong)


def test_memory_of_the_engine_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    renewed = []
    original = FastEngine._renew
    monkeypatch.setattr(FastEngine, "_renew", lambda self: (renewed.append(1), original(self))[1])
    monkeypatch.setattr(fast_engine, "_CACHE_BYTES", -1)
    monkeypatch.setattr(fast_engine, "_LOOK_EVERY", 1000)
    model = SentencePieceModel(DEMO.read_bytes())
    engine = FastEngine(model)
    for _ in range(3):
        text = "x y " * 300
        assert engine.encode(text).tolist() == model.encode(text).tolist()
    assert len(renewed) == 4


def test_memory_is_that_of_the_fork_which_encodes() -> None:
    """Workers are forks of the process that has loaded the engine."""
    engine = FastEngine(SentencePieceModel(DEMO.read_bytes()))
    before = engine._encode
    engine._resident = 1 << 40  # of a parent that was far larger than its forks
    fork = os.fork()
    if fork == 0:
        engine._bound_memory(100 << 20)
        grown = bytearray(os.urandom(1 << 20) * 200)
        engine._bound_memory(100 << 20)
        os._exit(int(engine._encode is before or not grown))
    assert os.waitpid(fork, 0)[1] == 0


def test_long_texts() -> None:
    tokenizer = Tokenizer(TokenizerConfig(model=DEMO))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(DEMO))
    rng = random.Random(4)
    for text in ("a" * 200_000, "".join(rng.choice("abcdefghij∀") for _ in range(200_000)), "word\n " * 300_000):
        ids = tokenizer.encode_document(text)
        assert ids[:-1].tolist() == reference.encode(text)
        tokenizer.verify_document(text, ids)
