"""`llemma evaluate`: exported models on evaluation sets, their items, and the paper's scores next to ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.options import SetOption, place_option
from flows.cli.printing import bar, print_records
from neox_core.errors import ConfigError

evaluate_app = typer.Typer(help="Evaluate exported models; look at the items of any evaluation.")

_NO_SHARES = {"bits_per_byte": "bits per byte", "log_likelihood": "log-likelihood, nats"}
"""Scores that are not shares of items, and their names."""
_TaskList = Annotated[str, typer.Option(help="Names with commas between, such as gsm8k_cot,minerva_math,mmlu_stem.")]


@evaluate_app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    model: Annotated[Path | None, typer.Option(help="Folder in Hugging Face's format.")] = None,
    tasks: _TaskList = "gsm8k_cot",
    data: Annotated[Path, typer.Option(help="Folder of the sets' JSON lines.")] = Path("data/eval"),
    out: Annotated[Path | None, place_option(help="Folder for items and scores; default: MODEL-evaluation.")] = None,
    samples: Annotated[int, typer.Option(help="Samples per item for a majority vote; 0: greedy alone.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of the samples.")] = 0.6,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 1234,
    limit: Annotated[int | None, typer.Option(help="The first so many items of each task.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Items at a time; default: what the memory holds.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Of a written answer.")] = 512,
    backend: Annotated[str, typer.Option(help="hf, or vllm where it is installed.")] = "hf",
    dtype: Annotated[str, typer.Option(help="auto: that of the weights; or float32, bfloat16, float16.")] = "auto",
) -> None:
    """Evaluate an exported model with lm-evaluation-harness's prompts, offline; called again, it goes on."""
    if context.invoked_subcommand is not None:
        return
    if model is None:
        raise ConfigError("no model: give --model FOLDER, or a command; see `llemma evaluate --help`")
    from tasks.harness.run import evaluate_model
    from tasks.harness.settings import HarnessSettings

    settings = HarnessSettings(
        model=model.resolve(),
        data=data.resolve(),
        out=(out or model.resolve().with_name(f"{model.resolve().name}-evaluation")).resolve(),
        tasks=tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip())),
        samples=samples,
        temperature=temperature,
        seed=seed,
        limit=limit,
        batch_size=batch_size,
        max_tokens=max_tokens,
        backend=backend,
        dtype=dtype,
    )
    with bar("evaluate") as progress:
        results = evaluate_model(settings, progress)
    print_records(f"evaluation: {settings.out}", _score_rows(results))


def _score_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    nothing = [
        {"task": task, "score": "none", "value": "–", "95% interval": f"all {result['left_out']} items were left out"}
        | {"items": 0}
        for task, result in results.items()
        if not result["scores"]
    ]
    return nothing + [
        {"task": task, "score": _label(name), "value": _shown(name, score["value"])}
        | {"95% interval": _interval(name, score), "items": result["items"]}
        for task, result in results.items()
        for name, score in result["scores"].items()
    ]


def _interval(name: str, score: Mapping[str, float]) -> str:
    return f"{_shown(name, score['low'])} to {_shown(name, score['high'])}" if "low" in score else "none"


def _label(score: str) -> str:
    return _NO_SHARES.get(score, f"{score}, %")


def _shown(score: str, value: float) -> str:
    return f"{value:.4f}" if score in _NO_SHARES else f"{100 * value:.1f}"


@evaluate_app.command()
def show(
    what: Annotated[Path, typer.Argument(metavar="CONFIG|FOLDER", help="The run's YAML file, or an --out folder.")],
    task: Annotated[str, typer.Argument(help="Which evaluation set.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint; default: the last of the run.")] = None,
    against: Annotated[int | None, typer.Option(help="Another checkpoint, shown next to it.")] = None,
    other: Annotated[Path | None, typer.Option(help="Another --out folder, shown next to it.")] = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="Only wrong answers; of solutions the least likely.")] = False,
    first: Annotated[int, typer.Option(help="Number of the first row.", min=1)] = 1,
    count: Annotated[int, typer.Option(help="Rows.", min=1)] = 10,
    overrides: SetOption = None,
) -> None:
    """Page through the items of an evaluation, at two checkpoints side by side."""
    from tasks.evaluation.show import checkpoint_rows, generated_items, rows

    if what.is_dir():
        if step is not None or against is not None or overrides:
            raise ConfigError(f"{what} is a folder: --step, --against and --set are for a run's file; use --other")
        found = rows(generated_items(what, task), generated_items(other, task) if other else (), wrong)
    else:
        if other is not None:
            raise ConfigError(f"{what} is a run's file: --other is for a folder; use --against STEP")
        from neox_core.config import load_config
        from tasks.identity.specs import evaluate_spec
        from tasks.identity.training import resolve_training

        config = load_config(what, overrides or ())
        folder = evaluate_spec(config, resolve_training(config).fingerprint).folder
        found = checkpoint_rows(folder, task, config.train.steps if step is None else step, against, wrong)
    shown = found[first - 1 : first - 1 + count]
    place = f"{first} to {first - 1 + len(shown)}" if shown else f"no row from {first} on"
    print_records(f"{task}: {place} of {len(found)}", shown)


@evaluate_app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="The --out folder of an evaluation.")],
    paper: Annotated[str, typer.Option(help="The paper's model.")] = "llemma-7b",
) -> None:
    """Our scores next to the Llemma paper's, and which differences are within noise."""
    from tasks.evaluation.paper import compare_with_paper
    from tasks.harness.run import RESULTS_FILE, read_results

    path = folder / RESULTS_FILE
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: run `llemma evaluate --model MODEL --out {folder}` first")
    rows = compare_with_paper(read_results(folder), paper)
    print_records(f"{folder} and {paper}", rows)


@evaluate_app.command()
def proofs(
    file: Annotated[Path, typer.Argument(help="JSON lines with header, formal_statement and proof.")],
    command: Annotated[str, typer.Option(help="Gets a theory file as its last argument; exits with 0 if it holds.")],
    out: Annotated[Path | None, place_option(help="For the verdicts; default: next to the file.")] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds for one proof.")] = 120.0,
) -> None:
    """Check formal proofs with a prover of yours."""
    from collections import Counter

    from tasks.evaluation.proofs import ProofChecker, check_proofs

    written = out or file.with_suffix(".verdicts.jsonl")
    with bar("proofs") as progress:
        verdicts = check_proofs(file, written, ProofChecker(command, time_limit), progress)
    counts = Counter(verdict.verdict for verdict in verdicts)
    print_records(f"{len(verdicts)} proofs: {written}", [{"verdict": name, "proofs": counts[name]} for name in counts])
