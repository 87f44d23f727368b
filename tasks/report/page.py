"""report.html: one self-contained page that shows a run, and the short table that the command line ends with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from neox_core.data.ledger import LEFT_OUT
from neox_core.errors import DataError
from neox_core.storage.atomic import write_atomically
from tasks.report.figures import (
    consumed_figure,
    evaluation_figure,
    gradient_norm_figure,
    loss_figure,
    metric_figure,
    mixture_figure,
    source_colours,
    source_loss_figure,
    time_figure,
)
from tasks.report.formats import format_bytes, format_count, format_duration
from tasks.report.tasks_section import task_context, task_figures

_TEMPLATE = "report.html.j2"
_STEP_METRICS = (
    ("train/lr", "learning rate", ".3~e"),
    ("train/gradient_norm", "gradient norm", ".4~g"),
    ("train/tokens_per_second", "tokens/s", ",.0f"),
    ("train/mfu", "model FLOPs utilisation", ".1%"),
    ("memory/allocated_gib", "peak memory, GiB", ".1f"),
    ("memory/resident_gib", "peak memory, GiB", ".2f"),
)


_ACCOUNT = ("documents_in", "documents", *LEFT_OUT)


@dataclass(frozen=True)
class ReportData:
    """What a report shows. Any part may be empty: what is not known yet is left out."""

    title: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration; plain JSON values."""
    ledger: Mapping[str, Any] = field(default_factory=dict)
    """{'sources': {name: {split: counts}}, 'run': {name: share, sequences, tokens, epochs}, 'changes': [...]}, see
    `plan_ledger`."""
    metrics: Sequence[Mapping[str, Any]] = ()
    """Rows of metrics.jsonl, from `read_metrics`."""
    evaluations: Sequence[Mapping[str, Any]] = ()
    """evaluations.json: per checkpoint its step and, per source, tokens, bytes, loss, perplexity, bits_per_byte."""
    flipped: Sequence[Mapping[str, str]] = ()
    """Items that were right at one of the base and the last checkpoint alone, from `flipped_rows`."""
    stages: Sequence[Mapping[str, Any]] = ()
    """{'stage', 'seconds', 'skipped'} in order."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """train's summary: first_loss, last_loss, steps, tokens_per_second, mfu, checkpoints, prefix, and consumed: per
    checkpoint its step and, per source, sequences, tokens and epochs; incidents and changes, as train records them."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Name -> path or URL of what the run left behind."""
    addresses: Mapping[str, str] = field(default_factory=dict)
    """By the same names, what a browser opens where the link itself is none."""
    software: Mapping[str, str] = field(default_factory=dict)


def write_report(path: Path, data: ReportData) -> None:
    """Write the page, atomically. It works offline: scripts and styles are within it."""
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    with suppress(Exception):  # plotly takes what another thread has begun to import, as W&B's table does, for whole
        import_module("pandas")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"count": format_count, "duration": format_duration, "bytes": format_bytes}
    colours = source_colours(_source_names(data))
    charts = {name: Markup(html) for name, html in _charts(data, colours).items() if html}  # plotly escapes its JSON
    page = environment.get_template(_TEMPLATE).render(
        data=data,
        cards=headline(data),
        charts=charts,
        **task_context(data.evaluations, charts),
        accounts=_accounts(data.ledger.get("sources", {})),
        step_charts=[f"step-{key}" for key, _, _ in _STEP_METRICS if f"step-{key}" in charts],
        colours=colours,
        total_seconds=total_seconds(data.stages),
        longest_seconds=max((stage["seconds"] for stage in data.stages), default=0),
        config_yaml=yaml.safe_dump(_plain(data.config), sort_keys=False, default_flow_style=None, width=100),
        plotly_js=Markup(get_plotlyjs()) if charts else "",
    )
    write_atomically(path, page)


def headline(data: ReportData) -> list[tuple[str, str, str]]:
    """The numbers at the top of the page: (what, value, note)."""
    train, cards = data.train, []
    if train.get("first_loss") is not None:
        cards.append(("training loss", f"{train['last_loss']:.3f}", f"from {train['first_loss']:.3f}"))
    before_after = [(before["perplexity"], after["perplexity"]) for _, before, after in _before_after(data)]
    if before_after:
        improved = sum(after < before for before, after in before_after)
        gain = sum(1 - after / before for before, after in before_after) / len(before_after)
        change = f"{-gain:+.0%}".replace("-", "\u2212")
        cards.append(("perplexity", change, f"lower on {improved} of {len(before_after)} sources"))
    if train.get("steps") is not None:
        tokens = sum(entry["tokens"] for entry in data.ledger.get("run", {}).values())
        cards.append(("steps", f"{train['steps']:,}", f"{format_count(tokens)} tokens" if tokens else ""))
    if train.get("tokens_per_second") is not None:
        mfu = f"{train['mfu']:.1%} of peak FLOPs" if train.get("mfu") else ""
        cards.append(("tokens/s", f"{train['tokens_per_second']:,.0f}", mfu))
    if train.get("checkpoints"):
        cards.append(("checkpoints", str(len(train["checkpoints"])), f"last at step {max(train['checkpoints']):,}"))
    if data.stages:
        skipped = sum(bool(stage["skipped"]) for stage in data.stages)
        total = format_duration(total_seconds(data.stages))
        cards.append(("time", total, f"{skipped} of {len(data.stages)} stages skipped" if skipped else "all stages"))
    return cards


def total_seconds(stages: Sequence[Mapping[str, Any]]) -> float:
    """Time in which any stage was at work: stages that ran at the same time count once."""
    total, until = 0.0, float("-inf")
    known = [stage for stage in stages if stage.get("ended") is not None]
    for begun, ended in sorted((stage["ended"] - stage["seconds"], stage["ended"]) for stage in known):
        total += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    return total + sum(stage["seconds"] for stage in stages if stage.get("ended") is None)


def summary_rows(data: ReportData) -> list[tuple[str, str]]:
    """The table that the command line shows at the end: (what, value)."""
    rows = [(f"tokens: {name}", text) for name, text in _token_rows(data)]
    train = data.train
    if train.get("first_loss") is not None:
        rows.append(
            ("training loss", f"{train['first_loss']:.3f} → {train['last_loss']:.3f} in {train['steps']:,} steps")
        )
    for name, before, after in _before_after(data):
        rows.append((f"validation perplexity: {name}", f"{before['perplexity']:.2f} → {after['perplexity']:.2f}"))
    if train.get("tokens_per_second") is not None:
        mfu = f", {train['mfu']:.1%} model FLOPs utilisation" if train.get("mfu") else ""
        rows.append(("throughput", f"{train['tokens_per_second']:,.0f} tokens/s{mfu}"))
    return rows + list(data.links.items())


def _token_rows(data: ReportData) -> Iterator[tuple[str, str]]:
    run = data.ledger.get("run", {})
    for name, splits in data.ledger.get("sources", {}).items():
        text = f"{splits.get('train', {}).get('tokens', 0):,} to train on"
        if use := run.get(name):
            text += f", {use['tokens']:,} used ({use['share']:.1%} of the run, {use['epochs']:.3g} epochs)"
        yield name, text


def _accounts(sources: Mapping[str, Any]) -> dict[str, list[int]]:
    """Per source, and of all, the records of all its splits by what became of them; empty if that was not counted.

    Raises:
        DataError: records that came in are missing among those that are accounted for.
    """
    accounts = {
        name: [sum(counts.get(unit, 0) for counts in splits.values()) for unit in _ACCOUNT]
        for name, splits in sources.items()
        if all("documents_in" in counts for counts in splits.values())
    }
    for name, (found, *accounted) in accounts.items():
        if found != sum(accounted):
            raise DataError(
                f"source {name!r}: {found} records came in, {sum(accounted)} are accounted for: make prepare-data's "
                "artifact again"
            )
    return accounts | ({"all": [sum(column) for column in zip(*accounts.values(), strict=True)]} if accounts else {})


def _before_after(data: ReportData) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Each source's first and last evaluation; nothing with fewer than two."""
    ordered = sorted(data.evaluations, key=lambda evaluation: int(evaluation["step"]))
    if len(ordered) < 2:
        return []
    first, last = ordered[0]["sources"], ordered[-1]["sources"]
    return [(name, first[name], last[name]) for name in first if name in last]


def _source_names(data: ReportData) -> list[str]:
    """All sources, in the ledger's order, so that each keeps its colour."""
    names = [*data.ledger.get("run", {}), *data.ledger.get("sources", {})]
    names += [name for entry in data.train.get("consumed", ()) for name in entry["sources"]]
    names += [name for evaluation in data.evaluations for name in evaluation["sources"]]
    names += [key.removeprefix("loss/") for row in data.metrics for key in row if key.startswith("loss/")]
    return list(dict.fromkeys(names))


def _charts(data: ReportData, colours: Mapping[str, str]) -> dict[str, str | None]:
    evaluations = sorted(data.evaluations, key=lambda evaluation: int(evaluation["step"]))
    charts = {
        "loss": loss_figure(data.metrics),
        "source_loss": source_loss_figure(data.metrics, colours),
        "gradient_norms": gradient_norm_figure(data.metrics),
        "time": time_figure(data.metrics),
        "perplexity": evaluation_figure(evaluations, "perplexity", "perplexity", colours),
        "bits_per_byte": evaluation_figure(evaluations, "bits_per_byte", "bits per byte", colours),
        "mixture": mixture_figure(data.ledger.get("run", {}), colours),
        "consumed": consumed_figure(data.train.get("consumed", ()), colours),
    }
    charts |= task_figures(evaluations)
    charts |= {f"step-{key}": metric_figure(data.metrics, key, label, form) for key, label, form in _STEP_METRICS}
    return charts


def _plain(value: Any) -> Any:
    """Nested mappings and sequences as dicts and lists, for YAML."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
