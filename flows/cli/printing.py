"""What commands show in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from neox_core.artifact import Artifact
from neox_core.progress import Progress

_WIDTH = 130
"""Columns that wide tables need."""
_WIDTH_OF_FILES = 500
"""Where the output is no terminal nothing is folded, so that whoever reads it finds paths in one piece."""


@contextmanager
def bar(what: str) -> Iterator[Progress]:
    """A bar on standard error: share, what is being done, and the time. Without a terminal, a line now and then."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 10.0
    form = "{desc} {percentage:3.0f}%|{bar:24}| {elapsed} {postfix}"
    with tqdm(total=1.0, desc=what, bar_format=form, mininterval=interval, maxinterval=interval) as shown:

        def progress(share: float, text: str) -> None:
            shown.set_postfix_str(text, refresh=False)
            shown.update(share - shown.n)

        yield progress
        shown.update(1.0 - shown.n)


def wide_console() -> Console:
    """For tables of many columns."""
    return Console(highlight=False, width=max(_width(), _WIDTH))


def _width() -> int:
    return Console().width if sys.stdout.isatty() else _WIDTH_OF_FILES


def print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A table of names and values."""
    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    print_table(table)


def print_table(table: Table) -> None:
    """A table as wide as the terminal lets it be."""
    Console(width=_width()).print(table)


def print_records(title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """A table with a row per record and a column per key; of none the title alone.

    Cells are shown as they are: `[n]` of a formula is no markup.
    """
    if not records:
        wide_console().print(Text(title))
        return
    columns = list(dict.fromkeys(key for record in records for key in record))
    table = Table(title=Text(title), title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, no_wrap=place == 0, overflow="fold")
    for record in records:
        table.add_row(*(Text(_cell(record.get(column))) for column in columns))
    wide_console().print(table)


def print_artifact(artifact: Artifact) -> None:
    """What a conversion or an export has made."""
    from flows.tables import checkpoint_rows

    print_rows(f"{artifact.name}: {artifact.folder}", checkpoint_rows(artifact))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
