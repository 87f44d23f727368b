"""Numbers as people read them: four digits, and the largest unit that leaves them at or above 1."""

from __future__ import annotations

_BYTES = (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10))
_FLOPS = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
_COUNTS = (("billion", 1e9), ("million", 1e6), ("thousand", 1e3))
_TIMES = (("hours", 3600.0), ("minutes", 60.0), ("s", 1.0), ("ms", 1e-3))


def _scaled(value: float, units: tuple[tuple[str, float], ...]) -> str:
    """The value in the largest unit that leaves it at or above 1."""
    unit, size = next((entry for entry in units if value >= entry[1]), units[-1])
    return f"{format_digits(value / size)} {unit}"


def format_digits(value: float) -> str:
    """Four digits, or a whole number."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def format_bytes(size: float) -> str:
    """A size in bytes."""
    return _scaled(size, _BYTES)


def format_flop(count: int) -> str:
    """A number of floating-point operations."""
    return _scaled(count, _FLOPS)


def format_seconds(seconds: float) -> str:
    """A time in seconds."""
    return _scaled(seconds, _TIMES)


def format_count(count: float) -> str:
    """A number of things."""
    return _scaled(count, _COUNTS)
