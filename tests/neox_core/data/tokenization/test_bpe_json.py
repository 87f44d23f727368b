"""The engine's model is the one that gigatoken itself would make of a .model file."""

from __future__ import annotations

import json

from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

from neox_core.data.tokenization.bpe_json import tokenizer_json
from neox_core.data.tokenization.sentencepiece_model import SentencePieceModel
from tests.neox_core.data.tokenization.test_engines import DEMO, Type, changed


def test_equals_the_engines_own_conversion() -> None:
    # a user-defined piece has score 0, as the control pieces and bytes: ties are put in order
    content = changed(**{"<table>": Type.USER_DEFINED, "<t": Type.USER_DEFINED, "ta": Type.USER_DEFINED})
    for model in (DEMO.read_bytes(), content):
        expected = json.loads(sentencepiece_to_tokenizer_json(model))
        made = json.loads(tokenizer_json(SentencePieceModel(model)))
        assert made["model"] == {key: expected["model"][key] for key in made["model"]}
        assert {key: made[key] for key in made if key != "model"} == {
            key: expected[key] for key in made if key != "model"
        }
