"""The tables in which stages show their results."""

from __future__ import annotations

from typing import Any

from neox_core.artifact import Artifact
from neox_core.config import RunConfig
from tasks.evaluation.kept_items import scored_tasks
from tasks.identity.stage import StageResult
from tasks.prepare import ledger

Row = dict[str, Any]

_LARGEST = 5
"""Differences that are shown; the artifact has all."""


def ledger_table(config: RunConfig, result: StageResult) -> list[Row]:
    """prepare-data's: a row per source, what there is, and what the run takes of it."""
    data = ledger(config, result)
    used = {name: {f"run {what}": value for what, value in use.items()} for name, use in data["run"].items()}
    return [{"source": name, **splits["train"], **used.get(name, {})} for name, splits in data["sources"].items()]


def summary_table(config: RunConfig, result: StageResult) -> list[Row]:
    """What a stage found out, and the files that it made."""
    found = [{"what": name, "value": value} for name, value in result.artifact.summary.items()]
    return found + [{"what": file.path, "value": f"{file.size:,} bytes"} for file in result.artifact.files]


def perplexity_table(config: RunConfig, result: StageResult) -> list[Row]:
    """evaluate's: a row per checkpoint and source, and per score of an evaluation set, with its 95% interval."""
    rows = []
    for evaluation in result.artifact.summary["evaluations"]:
        step = evaluation["step"]
        rows += [{"step": step, "source": source, **values} for source, values in evaluation["sources"].items()]
        for task, scored in scored_tasks(evaluation).items():
            for metric, score in scored["metrics"].items():
                change = scored.get("from_base", {}).get(metric, {})
                compared = {"from base": change["value"], "p": change["p"]} if change else {}
                rows.append({"step": step, "source": task, "score": metric, **score, **compared})
    return rows


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
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1e-2 else str(value)
