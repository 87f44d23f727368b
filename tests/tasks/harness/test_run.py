"""lm-evaluation-harness on a small exported model: equal to the harness called directly, and goes on after a kill."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neox_core.config import ModelConfig, ParallelConfig
from neox_core.errors import CheckpointError, ConfigError, DataError
from neox_core.progress import silent
from neox_core.storage.claims import try_claim_name
from tasks.harness.catalogue import write_task_files
from tasks.harness.model import batch_for
from tasks.harness.responses import answer_all
from tasks.harness.run import evaluate_model
from tasks.harness.settings import HarnessSettings
from tests.full_disk import Disk, put_on_disk
from tests.neox_core.train.small_training import CONFIG

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra")
HARNESS = Path(lm_eval.__file__).parent / "tasks"
MODEL = ModelConfig(
    num_layers=1, hidden_size=32, num_attention_heads=4, num_kv_heads=2, intermediate_size=48, vocab_size=2048,
    rope_theta=1e4,
)  # fmt: skip
SUMS = [
    {
        "id": f"sum/{a}",
        "question": f"Ann has {a} pens and buys {b}. How many?",
        "solution": f"{a}+{b}={a + b}\n#### {a + b}",
        "answer": str(a + b),
    }
    for a, b in [(3, 4), (10, 5), (7, 7), (1, 12), (6, 60)]
]
PROBLEMS = [{"id": "p/0", "problem": "Halve $x$.", "solution": r"It is $\boxed{\frac{x}{2}}$."}]
FACTS = [
    {"id": "f/0", "question": "Which is prime?", "options": ["4", "7", "9", "one hundred"], "answer": "B"},
    {"id": "f/1", "question": "Which is even?", "options": ["3", "8", "11", "21"], "answer": "B"},
    {"id": "f/2", "question": "Which is a square?", "options": ["3", "8", "11", "25"], "answer": "D"},
]
THEOREM = {
    "informal_statement": "Show that $1+1=2$.",
    "informal_proof": "By counting.",
    "formal_statement": 'theorem "1 + 1 = (2::nat)"',
}
TASKS = ("gsm8k_cot", "minerva_math", "mmlu_stem", "gsm8k_solutions")


def write(path: Path, items: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model, and data."""
    from neox_core.checkpoint.conversion.convert import convert
    from neox_core.checkpoint.conversion.toy_base import make_random_base
    from tasks.checkpoints import export_folder

    folder = tmp_path_factory.mktemp("harness")
    make_random_base(MODEL, folder / "base", seed=3)
    convert(folder / "base", folder / "shards", MODEL, ParallelConfig())
    export_folder(
        str(folder / "shards"), str(folder / "model"), "huggingface", MODEL, 1, CONFIG.tokenizer.model, 4096, silent
    )
    (folder / "data").mkdir()
    write(folder / "data" / "gsm8k_test.jsonl", SUMS)
    write(folder / "data" / "math_test.jsonl", PROBLEMS)
    write(folder / "data" / "mmlu_stem_test.jsonl", FACTS)
    return folder


def settings(folders: Path, out: Path, **others: Any) -> HarnessSettings:
    defaults: dict[str, Any] = {"tasks": TASKS, "samples": 2, "batch_size": 2, "max_tokens": 12, "limit": 4}
    return HarnessSettings(folders / "model", folders / "data", out, **defaults | others)


def items(out: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / task / "items.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def evaluated(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("evaluated") / "out"
    return evaluate_model(settings(folders, out), silent), out


def test_items_and_scores(evaluated: tuple[dict[str, Any], Path]) -> None:
    results, out = evaluated
    assert [results[name]["items"] for name in TASKS] == [4, 1, 3, 4]
    found = items(out, "gsm8k_cot")
    assert [record["id"] for record in found] == [item["id"] for item in SUMS[:4]]
    assert found[0]["prompt"].startswith("Q: There are 15 trees")
    assert found[0]["prompt"].endswith("Q: Ann has 3 pens and buys 4. How many?\nA:")
    assert all(len(record["samples"]) == 2 and len(record["greedy"]) == 1 for record in found)
    assert found[0]["samples"][0]["text"] != found[0]["samples"][1]["text"]
    assert items(out, "minerva_math")[0]["gold"] == r"\frac{x}{2}"
    assert set(results["gsm8k_cot"]["scores"]) >= {"greedy", "majority", "sample", "harness strict-match"}


def test_the_harness_called_directly_agrees(folders: Path, evaluated: tuple[dict[str, Any], Path]) -> None:
    results, out = evaluated
    manager = lm_eval.tasks.TaskManager(include_path=str(out / "tasks"), include_defaults=False)
    direct = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(folders / "model"), "dtype": "auto", "max_length": 4096, "softmax_dtype": "float32"
        },
        tasks=["gsm8k_cot", "mmlu_stem", "gsm8k_solutions"], task_manager=manager, batch_size=2, limit=4, device="cpu",
        gen_kwargs={"max_gen_toks": 12}, bootstrap_iters=0,
    )  # fmt: skip
    strict = direct["results"]["gsm8k_cot"]["exact_match,strict-match"]
    assert results["gsm8k_cot"]["scores"]["harness strict-match"]["value"] == strict
    samples = {sample["doc"]["id"]: sample for sample in direct["samples"]["gsm8k_cot"]}
    for record in items(out, "gsm8k_cot"):
        assert record["greedy"][0]["text"] == samples[record["id"]]["resps"][0][0]
    assert results["mmlu_stem"]["scores"]["accuracy"]["value"] == direct["results"]["mmlu_stem"]["acc,none"]
    likelihoods = {sample["doc"]["id"]: sample["filtered_resps"] for sample in direct["samples"]["mmlu_stem"]}
    for record in items(out, "mmlu_stem"):
        expected = [float(likelihood) for likelihood, _ in likelihoods[record["id"]]]
        assert record["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
    solutions = {sample["doc"]["id"]: sample["filtered_resps"][0][0] for sample in direct["samples"]["gsm8k_solutions"]}
    for record in items(out, "gsm8k_solutions"):
        assert record["log_likelihood"] == pytest.approx(float(solutions[record["id"]]), abs=1e-3)
    bits = -sum(map(float, solutions.values())) / math.log(2)
    size = sum(len(f" {item['solution']}".encode()) for item in SUMS[:4])
    assert results["gsm8k_solutions"]["scores"]["bits_per_byte"]["value"] == pytest.approx(bits / size, abs=1e-5)


def test_a_killed_evaluation_goes_on(folders: Path, evaluated: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(share: float, text: str) -> None:
        if "sample-001, batch 1" in text:
            raise KilledError

    out = tmp_path / "out"
    with pytest.raises(KilledError):
        evaluate_model(settings(folders, out, tasks=("gsm8k_cot",)), kill)
    with (out / "gsm8k_cot" / "sample-001.jsonl").open("a") as file:
        file.write('[[1, "cut off by the ki')
    greedy = (out / "gsm8k_cot" / "greedy.jsonl").stat()
    evaluate_model(settings(folders, out, tasks=("gsm8k_cot",)), silent)
    assert (out / "gsm8k_cot" / "greedy.jsonl").stat().st_size == greedy.st_size
    assert items(out, "gsm8k_cot") == items(evaluated[1], "gsm8k_cot")


def test_another_evaluation_in_the_same_folder(folders: Path, evaluated: tuple[dict[str, Any], Path]) -> None:
    with pytest.raises(ConfigError, match=r"seed \(1234, now 7\), temperature \(0.6, now 0.9\): give"):
        evaluate_model(settings(folders, evaluated[1], seed=7, temperature=0.9), silent)


def test_what_is_missing_is_named(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ocw_courses reads .*ocw_courses_test.jsonl, which does not exist"):
        evaluate_model(settings(folders, tmp_path, tasks=("ocw_courses",)), silent)
    with pytest.raises(ConfigError, match="unknown task 'gsm9k': there are gsm8k"):
        evaluate_model(settings(folders, tmp_path, tasks=("gsm9k",)), silent)
    with pytest.raises(ConfigError, match=r"none holds no config.json"):
        evaluate_model(replace(settings(folders, tmp_path), model=tmp_path / "none"), silent)
    with pytest.raises(ConfigError, match=r"--max-tokens 4096 leaves no room"):
        evaluate_model(settings(folders, tmp_path / "other", max_tokens=4096), silent)
    mended = settings(folders, tmp_path / "other", max_tokens=2, limit=1, tasks=("gsm8k_cot",))
    assert evaluate_model(mended, silent)["gsm8k_cot"]["items"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is not a JSON object"),
        ('{"question": "q"}', "line 1 has no list of texts 'options'"),
        (json.dumps(FACTS[0] | {"question": 5}), "line 1 has no text 'question'"),
        (json.dumps(FACTS[0] | {"answer": ""}), "'answer' names none of its 4 options"),
        (json.dumps(FACTS[0] | {"answer": "AB"}), "'answer' names none of its 4 options"),
        (json.dumps(FACTS[0] | {"options": ["1", "2", "3", "4", "5"]}), "5 options, and the harness's prompt shows 4"),
        (json.dumps(FACTS[0] | {"question": "q" * 10_000_000}), r"1 has 10,000,\d+ bytes, 1,048,576 at most"),
        ("", "holds no item"),
    ],
)
def test_bad_items(folders: Path, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "mmlu_stem_test.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        write_task_files(replace(settings(folders, tmp_path, tasks=("mmlu_stem",)), data=tmp_path), HARNESS)


def test_items_that_changed_since(folders: Path, tmp_path: Path) -> None:
    asked = replace(settings(folders, tmp_path / "out", tasks=("minif2f_proofs",)), data=tmp_path)
    write(tmp_path / "minif2f_isabelle_test.jsonl", [THEOREM])
    write_task_files(asked, HARNESS)
    write_task_files(asked, HARNESS)
    write(tmp_path / "minif2f_isabelle_test.jsonl", [THEOREM | {"informal_proof": "By parity."}])
    with pytest.raises(ConfigError, match=r"holds other items than .*: give another --out"):
        write_task_files(asked, HARNESS)


def test_long_solutions_are_left_out(folders: Path, tmp_path: Path) -> None:
    proofs = [THEOREM, THEOREM | {"informal_proof": "By long calculation: " + "1 + " * 9_000}]
    write(tmp_path / "minif2f_isabelle_test.jsonl", proofs)
    asked = settings(folders, tmp_path / "out", tasks=("minif2f_proofs", "minif2f_statements"), samples=0)
    results = evaluate_model(replace(asked, data=tmp_path), silent)
    assert (results["minif2f_proofs"]["items"], results["minif2f_proofs"]["left_out"]) == (1, 1)
    assert results["minif2f_statements"]["items"] == 2
    assert "longer than the model takes" in items(tmp_path / "out", "minif2f_proofs")[1]["left_out"]


def test_impossible_settings(folders: Path, tmp_path: Path) -> None:
    for wrong in ({"limit": 0}, {"batch_size": 0}, {"max_tokens": 0}, {"backend": "onnx"}, {"dtype": "int3"}):
        with pytest.raises(ConfigError, match="give"):
            evaluate_model(settings(folders, tmp_path, **wrong), silent)


def test_settings_that_are_no_numbers_or_name_nothing(folders: Path, tmp_path: Path) -> None:
    for temperature in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="a vote needs 2 or more, at one above 0 that is finite"):
            evaluate_model(settings(folders, tmp_path, temperature=temperature), silent)
    with pytest.raises(ConfigError, match="no task: give one or more of gsm8k"):
        evaluate_model(settings(folders, tmp_path, tasks=()), silent)
    with pytest.raises(ConfigError, match="is the model's own folder"):
        evaluate_model(settings(folders, folders / "model"), silent)


def test_any_seed(folders: Path, tmp_path: Path) -> None:
    asked = settings(folders, tmp_path, tasks=("gsm8k_cot",), seed=20_261_129, limit=1, max_tokens=2)
    assert evaluate_model(asked, silent)["gsm8k_cot"]["items"] == 1


@pytest.mark.parametrize("name", ["settings.json", "results.json"])
def test_damaged_files_of_an_earlier_call(folders: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{")
    with pytest.raises(ConfigError, match=rf"{name} is not JSON"):
        evaluate_model(settings(folders, tmp_path), silent)


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "config.json"])
def test_models_that_are_not_whole(folders: Path, tmp_path: Path, missing: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(folders / "model", model)
    if missing == "config.json":
        (model / missing).write_text("[]")
    else:
        for path in model.glob(f"{missing.partition('.')[0]}*"):
            path.unlink()
    with pytest.raises((CheckpointError, ConfigError), match=r"cannot be loaded|is not a JSON object"):
        evaluate_model(replace(settings(folders, tmp_path / "out"), model=model), silent)


def with_json(folders: Path, model: Path, name: str, **fields: Any) -> Path:
    """A copy of the model, one of whose files says this too."""
    shutil.copytree(folders / "model", model)
    found = json.loads((model / name).read_text(encoding="utf-8"))
    (model / name).write_text(json.dumps(found | fields), encoding="utf-8")
    return model


def test_a_models_own_way_to_generate_does_not_count(
    folders: Path, evaluated: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    own = {"max_new_tokens": 40, "repetition_penalty": 5.0, "num_beams": 2, "min_p": 0.9, "min_new_tokens": 20}
    model = with_json(folders, tmp_path / "model", "generation_config.json", **own)
    evaluate_model(replace(settings(folders, tmp_path / "out", tasks=("gsm8k_cot",)), model=model), silent)
    assert items(tmp_path / "out", "gsm8k_cot") == items(evaluated[1], "gsm8k_cot")


def test_a_tokenizer_without_an_end(folders: Path, tmp_path: Path) -> None:
    model = with_json(folders, tmp_path / "model", "tokenizer_config.json", eos_token=None)
    (model / "special_tokens_map.json").unlink()
    asked = replace(settings(folders, tmp_path / "out", limit=1), model=model)
    with pytest.raises(ConfigError, match="names no token that ends a text: give eos_token"):
        evaluate_model(replace(asked, tasks=("gsm8k_cot",)), silent)
    assert evaluate_model(replace(asked, tasks=("mmlu_stem",)), silent)["mmlu_stem"]["items"] == 1


def test_a_tensor_that_is_missing(folders: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(folders / "model", model)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"no weights for 1 tensors .* model.layers.0.mlp.down_proj.weight: export"
    ):
        evaluate_model(replace(settings(folders, tmp_path / "out"), model=model), silent)


def test_weights_that_are_no_numbers(folders: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(folders / "model", model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="logits that are not a number: the weights are damaged"):
        evaluate_model(replace(settings(folders, tmp_path / "out"), model=model), silent)


def test_a_token_without_numbers(folders: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    shutil.copytree(folders / "model", model)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(model).encode("Ann has")[-1]] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="logits that are not a number: the weights are damaged"):
        evaluate_model(replace(settings(folders, tmp_path / "out", tasks=("gsm8k_cot",)), model=model), silent)


def test_likelihoods_that_are_no_numbers(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(HFLM, "loglikelihood", lambda self, asked, **_: [(math.nan, False)] * len(asked))
    with pytest.raises(CheckpointError, match=r"item f/\d of mmlu_stem is nan"):
        evaluate_model(settings(folders, tmp_path, tasks=("mmlu_stem",)), silent)
    assert not (tmp_path / "mmlu_stem" / "likelihoods.jsonl").read_text()


@pytest.mark.parametrize(
    "solution",
    ["It is 5.", r"\boxed{}", r"\boxed{\frac{1}", r"\boxed{5} and \boxed", "\\boxed\t{5}", r"\boxed{5} \boxed"],
)
def test_solutions_without_an_answer(folders: Path, tmp_path: Path, solution: str) -> None:
    write(tmp_path / "math_test.jsonl", [PROBLEMS[0] | {"solution": solution}])
    with pytest.raises(DataError, match=r"line 1: 'solution' does not end in \\boxed\{answer\}"):
        write_task_files(replace(settings(folders, tmp_path, tasks=("minerva_math",)), data=tmp_path), HARNESS)


def test_boxes_of_every_kind(folders: Path, tmp_path: Path) -> None:
    solutions = [
        r"\fbox{5}",
        r"$\boxed 5$",
        r"\boxed{\text{if } \{5\}}",
        r"\boxed{x=2, y=3}",
        r"$\boxed{0.\overline{3}}$",
    ]
    write(tmp_path / "math_test.jsonl", [{"problem": "p", "solution": solution} for solution in solutions])
    asked = settings(folders, tmp_path / "out", tasks=("minerva_math",), samples=0, max_tokens=2, limit=None)
    evaluate_model(replace(asked, data=tmp_path), silent)
    gold = [record["gold"] for record in items(tmp_path / "out", "minerva_math")]
    assert gold == ["5", "5", r"\text{if } \{5\}", "x=2, y=3", r"0.\overline{3}"]


def test_texts_that_look_like_dates(folders: Path, tmp_path: Path) -> None:
    write(tmp_path / "gsm8k_test.jsonl", [SUMS[0] | {"id": "2024-01-01", "answer": "2024-05-05"}])
    dates = [f"2024-01-0{day} 10:00:00" for day in range(1, 5)]
    write(tmp_path / "mmlu_stem_test.jsonl", [FACTS[0] | {"options": dates}])
    asked = settings(folders, tmp_path / "out", tasks=("gsm8k_cot", "mmlu_stem"), samples=0, max_tokens=2)
    evaluate_model(replace(asked, data=tmp_path), silent)
    (record,) = items(tmp_path / "out", "gsm8k_cot")
    assert (record["id"], record["gold"]) == ("2024-01-01", "2024-05-05")
    assert items(tmp_path / "out", "mmlu_stem")[0]["choices"] == dates


def test_an_answer_that_is_no_number(folders: Path, tmp_path: Path) -> None:
    for answer in (math.nan, math.inf, True, None, ""):
        write(tmp_path / "gsm8k_test.jsonl", [SUMS[0] | {"answer": answer}])
        with pytest.raises(DataError, match="line 1 has no text 'answer'"):
            write_task_files(replace(settings(folders, tmp_path, tasks=("gsm8k_cot",)), data=tmp_path), HARNESS)


def test_too_few_solved_items(folders: Path, tmp_path: Path) -> None:
    for name in ("gsm8k_test.jsonl", "gsm8k_fewshot.jsonl"):
        write(tmp_path / name, SUMS[:4])
    with pytest.raises(DataError, match=r"gsm8k_fewshot.jsonl holds 4 items, and task gsm8k needs 5"):
        write_task_files(replace(settings(folders, tmp_path, tasks=("gsm8k",)), data=tmp_path), HARNESS)


def test_a_task_of_which_nothing_fits(folders: Path, tmp_path: Path) -> None:
    # 2,900 characters, and each is three tokens or so.
    write(tmp_path / "minif2f_isabelle_test.jsonl", [THEOREM | {"informal_proof": "\u8bc1" * 2_900}])
    asked = settings(folders, tmp_path / "out", tasks=("minif2f_proofs",), samples=0)
    with pytest.raises(DataError, match="all 1 items are left out, the first because it is longer than the model"):
        evaluate_model(replace(asked, data=tmp_path), silent)
    others = replace(asked, data=tmp_path, tasks=("minif2f_proofs", "minif2f_statements"))
    results = evaluate_model(others, silent)
    assert (results["minif2f_proofs"]["items"], results["minif2f_proofs"]["scores"]) == (0, {})
    assert results["minif2f_statements"]["scores"]


@pytest.mark.parametrize("content", [b"\x00\x00\n", b"5\n", b"[[1]]\n", b'{"1": "a"}\n', b"\xff\n"])
def test_damaged_answers(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "greedy.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"greedy.jsonl is damaged .*: remove it, and its answers are asked again"):
        answer_all(path, [[0]], lambda numbers: ["text"], lambda count, asked: None)


def test_two_calls_at_once(folders: Path, tmp_path: Path) -> None:
    with try_claim_name(tmp_path, "evaluation"), pytest.raises(ConfigError, match="another call is at work"):
        evaluate_model(settings(folders, tmp_path), silent)
    assert not (tmp_path / "settings.json").exists()  # whoever has the folder says what is evaluated in it


def test_a_disk_that_is_full(
    folders: Path, evaluated: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(folders, tmp_path, tasks=("gsm8k_cot",))
    with monkeypatch.context() as patch:
        put_on_disk(patch, lambda path: path.name == "sample-002.jsonl", lambda: Disk(free=100))
        with pytest.raises(ConfigError, match=r"is full: it has .* make room and give the same command again"):
            evaluate_model(asked, silent)
    evaluate_model(asked, silent)
    assert items(tmp_path, "gsm8k_cot") == items(evaluated[1], "gsm8k_cot")


def test_batches_fit_the_memory() -> None:
    config = {
        "num_attention_heads": 8, "hidden_size": 512, "num_hidden_layers": 10, "num_key_value_heads": 4,
        "vocab_size": 1000,
    }  # fmt: skip
    kept = 2 * 4 * 10 * 4 * 64  # bytes per token of keys and values in fp32
    assert batch_for(config, free=2 * 50 * kept * 100, tokens=100, logits=False) == 50
    assert batch_for(config, free=2 * 50 * (kept + 12_000) * 100, tokens=100, logits=True) == 50
    assert batch_for(config, free=1, tokens=100, logits=True) == 1
