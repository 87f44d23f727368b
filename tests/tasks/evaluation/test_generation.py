"""`evaluate.generate`: which checkpoints write answers, what is kept, and that a killed job goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from neox_core.config import EvaluateConfig, GenerationConfig, ModelConfig, ParallelConfig, RunConfig
from neox_core.errors import ConfigError, DataError
from tasks.evaluation import generation
from tasks.evaluation.contamination import without_overlap
from tasks.evaluation.generation import GenerationJob, answers_so_far, check_generation, finish, steps_to_generate
from tasks.evaluation.kept_items import GENERATED, compare, generated_folder, load_items
from tasks.evaluation.show import checkpoint_rows
from tasks.identity.specs import evaluate_spec
from tests.neox_core.train.small_training import CONFIG

MODEL = ModelConfig(
    num_layers=1, hidden_size=32, num_attention_heads=4, num_kv_heads=2, intermediate_size=48, vocab_size=2048,
    rope_theta=1e4,
)  # fmt: skip
TASK = "gsm8k_cot, written"


def configured(data: Path, **others: Any) -> RunConfig:
    generate = GenerationConfig(every=50, tasks=("gsm8k_cot",), data=data, max_tokens=4, batch_size=2, **others)
    return CONFIG.model_copy(update={"model": MODEL, "evaluate": EvaluateConfig(generate=generate)})


def write_items(data: Path) -> None:
    items = [
        {"id": f"s/{n}", "question": f"{n}+1?", "solution": f"{n}+1\n#### {n + 1}", "answer": f"{n + 1}"}
        for n in range(3)
    ]
    (data / "gsm8k_test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def test_chosen_checkpoints(tmp_path: Path) -> None:
    config = configured(tmp_path)
    results: dict[int, dict[str, Any]] = {step: {"step": step} for step in (0, 25, 50, 75, 100)}
    assert steps_to_generate(config, results, range(101)) == [0, 50, 100]
    assert steps_to_generate(config, results | {50: {GENERATED: {}}}, (50, 100)) == [100]  # 0 is gone from the store
    last = config.model_copy(update={"train": config.train.model_copy(update={"steps": 75})})
    assert steps_to_generate(last, results, range(101)) == [0, 50, 75, 100]
    assert steps_to_generate(CONFIG, results, range(101)) == []


def test_what_is_missing_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate.generate: .*gsm8k_test.jsonl does not exist"):
        check_generation(configured(tmp_path))
    write_items(tmp_path)
    check_generation(configured(tmp_path))
    items = tmp_path / "gsm8k_test.jsonl"
    items.write_text(items.read_text() + json.dumps({"question": "How many?", "solution": "Two."}) + "\n")
    with pytest.raises(DataError, match=r"gsm8k_test.jsonl, line \d+ has no text 'answer': correct it"):
        check_generation(configured(tmp_path))
    unknown = GenerationConfig(every=1, tasks=("sums",), data=tmp_path)
    with pytest.raises(ConfigError, match="unknown task 'sums'"):
        check_generation(CONFIG.model_copy(update={"evaluate": EvaluateConfig(generate=unknown)}))
    with pytest.raises(ValueError, match="a majority vote needs 2 or more"):
        configured(tmp_path, samples=1)


def test_other_answers_are_another_evaluation(tmp_path: Path) -> None:
    write_items(tmp_path)
    first = evaluate_spec(configured(tmp_path).model_copy(update={"workdir": tmp_path}), "t").fingerprint
    other = configured(tmp_path, samples=4).model_copy(update={"workdir": tmp_path})
    assert evaluate_spec(other, "t").fingerprint != first
    (tmp_path / "gsm8k_test.jsonl").write_text("{}")
    assert evaluate_spec(configured(tmp_path).model_copy(update={"workdir": tmp_path}), "t").fingerprint != first


def test_a_killed_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra")
    from neox_core.checkpoint.conversion.convert import convert
    from neox_core.checkpoint.conversion.toy_base import make_random_base

    write_items(tmp_path)
    config = configured(tmp_path)
    make_random_base(MODEL, tmp_path / "base", seed=3)
    convert(tmp_path / "base", tmp_path / "shards", MODEL, ParallelConfig())
    folder = tmp_path / "evaluation"
    job = GenerationJob(
        0, tmp_path / "shards", "", config.tokenizer.file, {}, tmp_path / "scratch", generated_folder(folder, 0)
    )

    class KilledError(Exception):
        pass

    def killed(path: Path, text: str) -> None:
        if "batch 1" in text:
            raise KilledError

    for name in generation._RANK_VARIABLES:
        monkeypatch.setenv(name, "0")
    with monkeypatch.context() as patch:
        patch.setattr(generation, "write_atomically", killed)
        with pytest.raises(KilledError):
            generation.generate_rank(config, job)
    assert answers_so_far(job.out) == 1
    first = (job.out / "gsm8k_cot" / "greedy.jsonl").read_bytes()
    kept = finish(folder, 0, generation.generate_rank(config, job))
    assert (job.out / "gsm8k_cot" / "greedy.jsonl").read_bytes().startswith(first)
    assert "RANK" not in os.environ
    assert not job.scratch.exists()
    assert sorted(path.name for path in job.out.iterdir()) == ["gsm8k_cot", "results.json", "settings.json", "tasks"]
    assert kept[TASK]["items"] == 3
    assert [record["id"] for record in load_items(folder, TASK, 0)] == ["s/0", "s/1", "s/2"]
    assert len(checkpoint_rows(folder, "gsm8k_cot", 0, None, wrong=False)) == 3


def test_written_answers_are_compared(tmp_path: Path) -> None:
    results: dict[int, dict[str, Any]] = {25: {"step": 25}}
    for step, right in ((0, "10000"), (50, "11110")):
        path = generated_folder(tmp_path, step) / "gsm8k_cot" / "items.jsonl"
        path.parent.mkdir(parents=True)
        answers = [[{"text": "", "answer": "", "correct": mark == "1", "reason": "text"}] for mark in right]
        records = [{"id": f"s/{n}", "prompt": "", "gold": "1", "greedy": greedy} for n, greedy in enumerate(answers)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        scored = without_overlap(tmp_path, step, {TASK: {"items": 5, "metrics": {}}}, {TASK: {"s/4"}})
        results[step] = {"step": step, GENERATED: scored}
    assert results[50][GENERATED][TASK]["without_overlap"]["metrics"]["greedy"]["value"] == 1.0
    change = compare(tmp_path, results)[50][GENERATED][TASK]["from_base"]["greedy"]
    assert change["value"] == pytest.approx(0.6)
    assert 0 < change["p"] < 0.05
