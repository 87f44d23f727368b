"""What belongs to a tokenizer.json goes with it, unchanged; transformers then ends texts where the base does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from neox_core.checkpoint.formats.special_ids import SpecialIds
from neox_core.checkpoint.formats.tokenizer_folder import tokenizer_folder
from neox_core.data.tokenization.tokenizer_file import companions
from tests.byte_level import BEGIN, END, make_byte_level
from tests.paths import ROOT

SPECIAL = SpecialIds({"bos_token_id": 1, "eos_token_id": [0, 1]})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_byte_level(tmp_path / "base")


def written(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def test_files_of_the_base_are_given_as_they_are(path: Path, tmp_path: Path) -> None:
    theirs = {
        "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": BEGIN}),
        "chat_template.jinja": "{{ messages }}",
        "merges.txt": "#version: 0.2\n",
    }
    for name, text in theirs.items():
        path.with_name(name).write_text(text)
    path.with_name("model.safetensors").write_bytes(b"weights")
    files = tokenizer_folder(path, SPECIAL)
    assert files.pop("tokenizer.json") == path.read_bytes()
    assert {name: content.decode() for name, content in files.items()} == theirs


def test_without_a_configuration_the_base_s_ids_name_the_tokens(path: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(written(tokenizer_folder(path, SPECIAL), tmp_path / "export"))
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END, 0)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == (BEGIN, 1)
    text = "the  theorem∀\n\tof x"
    ids = Tokenizer.from_file(str(path)).encode(text).ids
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.decode(ids) == text


def test_no_token_is_made_up(path: Path) -> None:
    config = json.loads(tokenizer_folder(path, SpecialIds({"eos_token_id": 299}))["tokenizer_config.json"])
    assert not [key for key in config if key.endswith("_token")]


def test_a_sentencepiece_model_has_no_companions(tmp_path: Path) -> None:
    model = tmp_path / "tokenizer.model"
    model.write_bytes((ROOT / "data/tokenizers/demo-2048.model").read_bytes())
    model.with_name("tokenizer_config.json").write_text("{}")
    assert companions(model) == []
