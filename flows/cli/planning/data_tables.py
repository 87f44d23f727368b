"""The table of `llemma data plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

COLUMNS = ("documents", "bytes", "tokens", "bytes/token", "share", "run tokens", "epochs")


def plan_table(title: str, ledger: Mapping[str, Any]) -> Table:
    """A row per source: what its training split holds, and what the run takes of it. See `plan_ledger`."""
    table = Table(title=title, title_justify="left", show_footer=True)
    train = {name: ledger["sources"][name]["train"] for name in ledger["run"]}
    total = {unit: sum(counts[unit] for counts in train.values()) for unit in ("documents", "bytes", "tokens")}
    used = sum(use["tokens"] for use in ledger["run"].values())
    whole = {"share": 1.0, "tokens": used, "epochs": used / total["tokens"]}
    table.add_column("source", "all", style="bold", no_wrap=True)
    for column, footer in zip(COLUMNS, _cells(total, whole), strict=True):
        table.add_column(column, footer, justify="right", no_wrap=True)
    for name, use in ledger["run"].items():
        table.add_row(name, *_cells(train[name], use))
    return table


def changes_table(ledger: Mapping[str, Any]) -> Table:
    """A row per change of weights: from when, and each source's share of the sequences from there to the next."""
    table = Table(title="changes of weights", title_justify="left")
    table.add_column("from step", justify="right", style="bold")
    for name in ledger["run"]:
        table.add_column(name, justify="right", no_wrap=True)
    for change in ledger["changes"]:
        table.add_row(f"{change['from_step']:,}", *(f"{share:.2%}" for share in change["shares"].values()))
    return table


def _cells(counts: Mapping[str, int], use: Mapping[str, float]) -> list[str]:
    return [
        *(f"{counts[unit]:,}" for unit in ("documents", "bytes", "tokens")),
        f"{counts['bytes'] / counts['tokens']:.3f}" if counts["tokens"] else "-",
        f"{use['share']:.2%}",
        f"{use['tokens']:,}",
        f"{use['epochs']:.3f}",
    ]
