"""Likelihoods on two tensor-parallel ranks against transformers on each text alone, in fp32."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from neox_core.checkpoint.conversion.convert import convert
from neox_core.checkpoint.conversion.reference import llama_from_meta
from neox_core.checkpoint.conversion.toy_base import make_random_base
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import EvaluateConfig, EvaluationTask, ModelConfig, ParallelConfig, RunConfig
from neox_core.errors import DataError
from neox_core.evaluation.items import Item
from neox_core.evaluation.lengths import check_item_sets
from neox_core.evaluation.perplexity import _build_layers
from neox_core.evaluation.task_scores import _record, score_tasks
from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
from tests.distributed import run_ranks
from tests.neox_core.train.small_training import config_for

SEQUENCE = 160
MODEL = ModelConfig(
    num_layers=2, hidden_size=64, num_attention_heads=8, num_kv_heads=2, intermediate_size=96, vocab_size=2048,
    rope_theta=1e4,
)  # fmt: skip
SUMS = [
    {
        "id": f"sum/{a}",
        "question": f"Tom has {a} pens and buys {b}. How many are there?",
        "solution": f"{a}+{b}={a + b}",
    }
    for a, b in [(3, 4), (10, 5), (7, 7), (1, 12)]
]
FACTS = [
    {"id": "f/0", "question": "Which is prime?", "options": ["4", "7", "9", "one hundred"], "answer": "B"},
    {"id": "f/1", "question": "Which is even?", "options": ["3", "8"], "answer": 1},
]
TOO_LONG = {"id": "sum/long", "question": "How many?", "solution": "one more " * 400}


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def config_of(folder: Path, mask_documents: bool) -> RunConfig:
    sums, facts = write(folder / "sums.jsonl", [*SUMS, TOO_LONG]), write(folder / "facts.jsonl", FACTS)
    choices = "{question}\n{options}\nAnswer:"
    tasks = {
        "sums": EvaluationTask(items=sums),
        "shown": EvaluationTask(items=sums, shots_from=sums, shots=2, limit=3),
        "cut": EvaluationTask(items=sums, shots_from=sums, shots=4, limit=2),
        "letters": EvaluationTask(items=facts, kind="choices", prompt=choices),
        "texts": EvaluationTask(items=facts, kind="choices", prompt="{question}\nAnswer:", score="texts"),
    }
    config = config_for("gqa", 2, 1, 1, sequence_length=SEQUENCE, mask_documents=mask_documents)
    return config.model_copy(update={"model": MODEL, "evaluate": EvaluateConfig(micro_batch_size=2, tasks=tasks)})


def scored(config: RunConfig, shards: Path) -> dict[str, dict[str, Any]]:
    mesh = build_mesh(ParallelConfig(tensor=2, sequence=False), init_distributed(config.launch))
    return score_tasks(config, _build_layers(config, NeoxCheckpoint(shards).layer, mesh), mesh)


class Reference:
    """transformers' model, and SentencePiece's own ids."""

    def __init__(self, base: Path, config: RunConfig) -> None:
        self._llama = llama_from_meta(base, MODEL, SEQUENCE)
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(config.tokenizer.model))

    def log_likelihood(self, prompt: str, text: str) -> float:
        ids = [self._model.bos_id(), *self._model.encode(prompt + text)]
        start = 1 + len(self._model.encode(prompt.rstrip()))
        ids, start = ids[-SEQUENCE - 1 :], start - max(0, len(ids) - SEQUENCE - 1)
        with torch.no_grad():
            logits = self._llama(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
        return float(sum(logits[place - 1, ids[place]] for place in range(start, len(ids))))


@pytest.mark.parametrize("mask_documents", [False, True])
def test_likelihoods_are_transformers(tmp_path: Path, mask_documents: bool) -> None:
    make_random_base(MODEL, tmp_path / "base", seed=3)
    convert(tmp_path / "base", tmp_path / "shards", MODEL, ParallelConfig(tensor=2))
    config = config_of(tmp_path, mask_documents)
    found, other = run_ranks(scored, 2, config, tmp_path / "shards")
    for name in found:
        assert found[name]["records"] == other[name]["records"]
    reference = Reference(tmp_path / "base", config)

    records = found["sums"]["records"]
    assert (found["sums"]["items"], found["sums"]["left_out"]) == (4, 1)
    assert records[-1]["left_out"]
    assert (found["sums"]["cut"], found["cut"]["cut"]) == (0, 2)
    bits, size = 0.0, 0
    for item, record in zip(SUMS, records, strict=False):
        expected = reference.log_likelihood(f"Question: {item['question']}\nAnswer:", f" {item['solution']}")
        assert record["log_likelihood"] == pytest.approx(expected, abs=1e-4)
        bits, size = bits - expected / math.log(2), size + len(item["solution"]) + 1
    assert found["sums"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits / size, rel=1e-5)

    shots = "".join(f"Question: {item['question']}\nAnswer: {item['solution']}\n\n" for item in SUMS[:2])
    for item, record in zip(SUMS[:3], found["shown"]["records"], strict=True):
        expected = reference.log_likelihood(f"{shots}Question: {item['question']}\nAnswer:", f" {item['solution']}")
        assert record["log_likelihood"] == pytest.approx(expected, abs=1e-4)

    shots = "".join(f"Question: {item['question']}\nAnswer: {item['solution']}\n\n" for item in SUMS)
    expected = reference.log_likelihood(f"{shots}Question: {SUMS[0]['question']}\nAnswer:", f" {SUMS[0]['solution']}")
    assert found["cut"]["records"][0]["log_likelihood"] == pytest.approx(expected, abs=1e-4)

    prompt = "Which is prime?\nA. 4\nB. 7\nC. 9\nD. one hundred\nAnswer:"
    check_choices(reference, found["letters"]["records"][0], prompt, ["A", "B", "C", "D"])
    check_choices(reference, found["texts"]["records"][0], "Which is prime?\nAnswer:", FACTS[0]["options"])
    assert [record["gold"] for record in found["texts"]["records"]] == [1, 1]


def check_choices(reference: Reference, record: dict[str, Any], prompt: str, texts: list[str]) -> None:
    expected = [reference.log_likelihood(prompt, f" {text}") for text in texts]
    alone = [reference.log_likelihood("Answer:", f" {text}") for text in texts]
    assert record["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
    assert record["unconditional"] == pytest.approx(alone, abs=1e-4)
    assert record["picked"] == max(range(len(texts)), key=expected.__getitem__)
    assert record["picked_calibrated"] == max(range(len(texts)), key=lambda n: expected[n] - alone[n])


def test_a_set_of_which_nothing_fits(tmp_path: Path) -> None:
    make_random_base(MODEL, tmp_path / "base", seed=3)
    convert(tmp_path / "base", tmp_path / "shards", MODEL, ParallelConfig(tensor=2))
    config = config_of(tmp_path, mask_documents=False)
    check_item_sets(config)
    tasks = {name: config.evaluate.tasks[name] for name in ("letters",)}
    tasks |= {"sums": EvaluationTask(items=write(tmp_path / "long.jsonl", [TOO_LONG]))}
    config = config.model_copy(update={"evaluate": EvaluateConfig(tasks=tasks)})
    message = r"tasks.sums: all 1 items are longer than train.sequence_length 160; the shortest has \d{3,} tokens"
    with pytest.raises(DataError, match=message):
        check_item_sets(config)
    found, _ = run_ranks(scored, 2, config, tmp_path / "shards")
    assert (found["sums"]["items"], found["sums"]["left_out"], found["sums"]["metrics"]) == (0, 1, {})
    assert found["letters"]["metrics"]


def test_likelihoods_that_are_no_number() -> None:
    item, task = Item("a", "1+1?", (" A", " B"), 1), EvaluationTask(items=Path("-"), kind="choices")
    record = _record(item, task, [math.nan, -1.0, -1.0, -1.0])
    assert record["left_out"] == "its likelihood is not a number"
    assert "picked" not in record
