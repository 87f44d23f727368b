"""A byte-level tokenizer in a Hugging Face folder: tokenizer.json and what belongs to it, exported as it is.

Without tokenizer_config.json transformers takes a tokenizer for the usual one of the model's class, and knows no token
that ends a text, so that answers never end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neox_core.checkpoint.formats.special_ids import SpecialIds
from neox_core.data.tokenization.tiktoken_model import WORDS, special_tokens
from neox_core.data.tokenization.tokenizer_file import (
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    companions,
)


def tokenizer_folder(tokenizer: Path, special: SpecialIds) -> dict[str, bytes]:
    """The content of a tokenizer.json and its companions, by name.

    Where there is no tokenizer_config.json, one is written that names the class and the tokens of `special`, which are
    the base model's.
    """
    files = {TOKENIZER_JSON: tokenizer.read_bytes()}
    files |= {path.name: path.read_bytes() for path in companions(tokenizer)}
    if TOKENIZER_CONFIG not in files:
        files[TOKENIZER_CONFIG] = _plain_config(files[TOKENIZER_JSON], special.ids)
    return files


def tiktoken_folder(tokenizer: Path, special: SpecialIds) -> dict[str, bytes]:
    """Llama 3's tokenizer.model as it is, and by transformers' converter the tokenizer.json that gives the same ids.

    A run of more than 25,000 blanks, or of other characters, has other ids there: only Meta's code cuts it.
    """
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(str(tokenizer), pattern=WORDS, extra_special_tokens=special_tokens())
    described = converter.converted().to_str().encode()
    return {
        TOKENIZER_MODEL: tokenizer.read_bytes(),
        TOKENIZER_JSON: described,
        TOKENIZER_CONFIG: _plain_config(described, special.ids),
    }


def _plain_config(described: bytes, ids: Mapping[str, Any]) -> bytes:
    texts = {int(token["id"]): str(token["content"]) for token in json.loads(described)["added_tokens"]}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key, value in ids.items():
        first = value[0] if isinstance(value, list) else value
        if first in texts:
            config[key.removesuffix("_id")] = texts[first]
    return (json.dumps(config, indent=2) + "\n").encode()
