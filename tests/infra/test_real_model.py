"""A pretrained model with tied embeddings, from Hugging Face's folder to shards and back. Minutes, by its marker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infra.real_model import INSTALL, make_real_model, package_folder
from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.export import export_huggingface
from neox_core.config import ParallelConfig, load_config
from tests.paths import CONFIGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_model,
    pytest.mark.skipif(package_folder() is None, reason=f"needs the package of the model: {INSTALL}"),
]


def test_the_export_is_the_base_and_generates(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = load_config(CONFIGS / "smollm2.yml").model
    make_real_model(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "neox", model, ParallelConfig(tensor=3, pipeline=2))
    export_huggingface(tmp_path / "neox", tmp_path / "hf", model, tmp_path / "base" / "tokenizer.json", 8192)
    base, exported = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "hf"))
    assert base.keys() == exported.keys()
    assert "lm_head.weight" not in exported
    assert all(torch.equal(exported[name], value) for name, value in base.items())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is True
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert "Paris" in tokenizer.decode(llama.generate(ids, max_new_tokens=5, do_sample=False)[0])
