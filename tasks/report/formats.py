"""Numbers as the report writes them."""

from __future__ import annotations


def format_count(number: float) -> str:
    """1.5B"""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"


def format_bytes(number: float) -> str:
    """1.5 GB"""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def format_duration(seconds: float) -> str:
    """1.5 h"""
    if seconds >= 5400:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"


def format_change(value: float, base: float | None) -> str:
    """−12.3%, of a value against another one; a dash without that, or where both are one."""
    if not base or value == base:
        return "–"
    return f"{value / base - 1:+.1%}".replace("-", "\u2212")
