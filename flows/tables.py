"""The tables in which stages show their results: rounded, with units, and with the change against the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neox_core.artifact import Artifact
from neox_core.config import RunConfig
from neox_core.evaluation.scores import as_text
from tasks.evaluation.kept_items import scored_apart, scored_tasks
from tasks.identity.stage import StageResult
from tasks.prepare import ledger
from tasks.report.formats import format_bytes, format_change, format_count, format_duration

Row = dict[str, Any]

_LARGEST = 5
"""Differences that are shown; the artifact has all."""


def ledger_table(config: RunConfig, result: StageResult) -> list[Row]:
    """prepare-data's: a row per source, what there is, and what the run takes of it."""
    data = ledger(config, result)
    rows = []
    for name, splits in data["sources"].items():
        train, use = splits["train"], data["run"].get(name)
        row = {
            "source": name,
            "documents": f"{train['documents']:,}",
            "text": format_bytes(train["bytes"]),
            "tokens": format_count(train["tokens"]),
            "left out": f"{train.get('documents_in', train['documents']) - train['documents']:,}",
        }
        taken = {
            "share of the run": f"{use['share']:.1%}" if use else "",
            "tokens in the run": format_count(use["tokens"]) if use else "",
            "epochs in the run": f"{use['epochs']:.3g}" if use else "",
        }
        rows.append(row | taken)
    return rows


def training_table(config: RunConfig, result: StageResult) -> list[Row]:
    """train's: how the loss went, how fast, and where the checkpoints are."""
    found = result.artifact.summary
    rows = [
        ("training loss", f"{found['first_loss']:.3f} → {found['last_loss']:.3f}"),
        ("steps", f"{found['steps']:,} of {config.train.steps:,}"),
        ("speed", f"{found['tokens_per_second']:,.0f} tokens/s, median"),
        ("model FLOPs utilisation", f"{found['mfu']:.1%}, median"),
        ("time", format_duration(result.seconds)),
        ("checkpoints", ", ".join(f"{step:,}" for step in found["checkpoints"])),
        ("checkpoints lie in", str(found["prefix"])),
        ("steps that were not done", f"{len(found['incidents']):,}"),
    ]
    return [{"what": what, "value": value} for what, value in rows]


def perplexity_table(config: RunConfig, result: StageResult) -> list[Row]:
    """evaluate's: a row per checkpoint and source, and per score of an evaluation set, with its 95% interval; each
    with the change against the base weights."""
    evaluations = result.artifact.summary["evaluations"]
    base = evaluations[0]["sources"] if evaluations else {}
    rows = []
    for evaluation in evaluations:
        for source, values in evaluation["sources"].items():
            change = format_change(values["perplexity"], base.get(source, {}).get("perplexity"))
            row = _score_row(evaluation["step"], source, "perplexity", f"{values['perplexity']:.2f}", change)
            rows.append(row | {"bits per byte": f"{values['bits_per_byte']:.3f}"})
        for task, scored in scored_tasks(evaluation).items():
            if not scored["metrics"]:
                rows.append(_score_row(evaluation["step"], task, "none", "all items were left out", "–"))
            for metric, score in scored["metrics"].items():
                change = _difference(scored.get("from_base", {}).get(metric))
                name = metric.replace("_", " ")
                rows.append(_score_row(evaluation["step"], task, name, as_text(score), change))
                if (apart := scored_apart(scored)) and metric in apart[1]:
                    others, metrics = apart
                    rows.append(
                        _score_row(evaluation["step"], task, f"{name}, {others}", as_text(metrics[metric]), "–")
                    )
    return rows


def _score_row(step: int, what: str, score: str, value: str, change: str) -> Row:
    return {"step": f"{step:,}" if step else "base", "of": what, "score": score, "value": value, "against base": change}


def _difference(found: Mapping[str, float] | None) -> str:
    return as_text({key: found[key] for key in ("value", "p") if key in found}, "+.4f") if found else "–"


def checkpoint_table(config: RunConfig, result: StageResult) -> list[Row]:
    """A conversion's or an export's: sizes, rates, largest differences, files."""
    return [{"what": what, "value": value} for what, value in checkpoint_rows(result.artifact)]


def checkpoint_rows(artifact: Artifact) -> list[tuple[str, str]]:
    """A conversion's or an export's: what, and its value with its unit."""
    summary = dict(artifact.summary)
    count, size, seconds = (summary.pop(name) for name in ("files", "bytes", "write_seconds"))
    rows = [("weights", f"{size:,} bytes in {count} file{'s' if count > 1 else ''}")]
    rate = summary.pop("bytes_per_second", None)
    rows.append(("written", f"at {rate / 1e6:,.0f} MB/s, in {seconds:.1f} s" if rate else "by an earlier attempt"))
    summary.pop("special_ids", None)
    differences = summary.pop("layer_differences", {})
    bound = summary.get("layer_tolerance")
    for part in sorted(differences, key=differences.__getitem__, reverse=True)[:_LARGEST]:
        rows.append((f"difference in {part}", f"{differences[part]:.1e} of its largest value; bound {bound:g}"))
    rows += [(name.replace("_", " "), _text(value)) for name, value in summary.items()]
    return rows + [(file.path, f"{file.size:,} bytes, SHA-256 {file.sha256}") for file in artifact.files]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
