"""Whether two answers are equal. It runs in a process that may be ended; see judge.py."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

import sympy
from sympy import Expr

from neox_core.evaluation.answers.latex import UnreadableError
from neox_core.evaluation.answers.normalise import normalise
from neox_core.evaluation.answers.structure import Answer, Group, read_answer

DIGITS = 40
"""Precision of a comparison by value."""
_IDLE_SPACE = re.compile(r"(?<!\d) | (?!\d)")
"""One that does not part two numbers."""
_WORD = re.compile(r"[A-Z]?[a-z]{2,}|No|NO|YES|TRUE|FALSE")
"""Such as `Yes`, whose capital says nothing; a letter, or two in capitals, may name something."""
_EQUATIONS = ("equation", "named")
_INTERVALS = ("()", "(]", "[)", "[]")
_COLUMN = re.compile(r"matrix (?:[2-9]|\d\d+)x1")
_PROBES = 4
_NO_NUMBERS = (sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)
_SMALL = sympy.Float("1e-25", DIGITS)


def same_text(gold: str, given: str) -> bool:
    """Whether the normalised texts are equal, but for spaces."""
    return _bare(gold) == _bare(given)


def _bare(answer: str) -> str:
    bare = _IDLE_SPACE.sub("", normalise(answer))
    return bare.lower() if _WORD.fullmatch(bare) else bare


def equal(gold: str, given: str) -> bool:
    """Whether two answers have the same value.

    Raises:
        UnreadableError: one is not mathematics.
    """
    right, answer = read_answer(normalise(gold)), read_answer(normalise(given))
    if isinstance(right, Group) and right.kind == "equation" and not isinstance(answer, Group):
        left, value = right.items
        if isinstance(left, sympy.Add) and value == 0:  # of x - 2y = 0, unlike of x = 0, the 0 alone is no answer
            return False
    return _equal(right, answer)


def _equal(first: Answer, second: Answer) -> bool:
    if isinstance(first, Group) and isinstance(second, Group):
        return _equal_groups(first, second)
    if isinstance(first, Group) or isinstance(second, Group):
        return _equal_to_group(first, second)
    return equal_expressions(first, second)


def _equal_to_group(first: Answer, second: Answer) -> bool:
    """An equation equals its right side, as in Minerva's protocol; a set of one equals its member."""
    group, other = (first, second) if isinstance(first, Group) else (second, first)
    assert isinstance(group, Group)
    if group.kind in _EQUATIONS:
        return _equal(group.items[-1], other)
    return group.kind == "set" and len(group.items) == 1 and _equal(group.items[0], other)


def _equal_groups(first: Group, second: Group) -> bool:
    if first.kind in _EQUATIONS and second.kind in _EQUATIONS:
        return _equal_equations(first, second)
    if first.kind in _EQUATIONS or second.kind in _EQUATIONS:
        return _equal_to_group(*((first, second) if first.kind in _EQUATIONS else (second, first)))
    if {first.kind, second.kind} == {"set", "union"}:  # x < 1 or x > 2, and intervals with commas between
        first, second = (Group("union", group.items) if _are_intervals(group) else group for group in (first, second))
    if _as_vector(first.kind) != _as_vector(second.kind) or len(first.items) != len(second.items):
        return False
    if first.ordered:
        return all(_equal(one, other) for one, other in zip(first.items, second.items, strict=True))
    if _are_named(first) and _are_named(second):
        return _equal_named(first, second)
    left = list(second.items)
    for item in first.items:
        found = next((index for index, other in enumerate(left) if _equal(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _are_intervals(group: Group) -> bool:
    return all(isinstance(item, Group) and len(item.items) == 2 and item.kind in _INTERVALS for item in group.items)


def _as_vector(kind: str) -> str:
    """A column's kind as that of a tuple: both write the same vector."""
    return "()" if _COLUMN.fullmatch(kind) else kind


def _are_named(group: Group) -> bool:
    """Whether all members say which of several names has the value, as `x=2, y=3`."""
    items = [item for item in group.items if isinstance(item, Group) and item.kind == "named"]
    return len(items) == len(group.items) and len({str(item.items[0]) for item in items}) > 1


def _equal_named(first: Group, second: Group) -> bool:
    values = [{str(item.items[0]): item.items[1] for item in group.items} for group in (first, second)]
    return values[0].keys() == values[1].keys() and all(_equal(values[0][name], values[1][name]) for name in values[0])


def _equal_equations(first: Group, second: Group) -> bool:
    """Equal right sides of names, as in Minerva's protocol, or equal up to a factor: y = 2x is 2y = 4x."""
    if first.kind == second.kind == "named" and _equal(first.items[1], second.items[1]):
        return True
    one, other = (_difference(*group.items) for group in (first, second))
    point = _point(random.Random(1), one.free_symbols | other.free_symbols)
    factor = one.subs(point) / other.subs(point)  # not by algebra: to multiply out (x+1)^700 takes seconds
    if factor == 0 or factor.has(*_NO_NUMBERS):
        factor = sympy.S.One
    return equal_expressions(one, factor * other)


def _difference(left: Expr, right: Expr) -> Expr:
    return left - right


def _point(draw: random.Random, symbols: Iterable[Expr]) -> dict[Expr, Expr]:
    """A value for each symbol."""
    return {symbol: sympy.Rational(draw.randint(-4000, 4000), 997) for symbol in sorted(symbols, key=str)}


def equal_expressions(first: Expr, second: Expr) -> bool:
    """Whether the difference is zero: exactly, or to 40 digits at points drawn for the symbols."""
    if first == second:
        return True
    if first.has(*_NO_NUMBERS) or second.has(*_NO_NUMBERS):
        return False
    symbols = first.free_symbols | second.free_symbols
    if not symbols:
        return _vanishes(first, second)
    draw = random.Random(0)
    for _ in range(_PROBES):
        point = _point(draw, symbols)
        if not _vanishes(first.subs(point), second.subs(point)):
            return False
    return True


def _vanishes(first: Expr, second: Expr) -> bool:
    if isinstance(first, sympy.Rational) and isinstance(second, sympy.Rational):
        return bool(first == second)  # 40 digits do not tell 4^100 + 1 from 4^100
    one, other = sympy.N(first, DIGITS), sympy.N(second, DIGITS)
    if not (one.is_number and other.is_number and one.is_finite and other.is_finite):
        raise UnreadableError("no value at a point")
    if one.has(sympy.Function) or other.has(sympy.Function):
        return bool(one == other)
    return bool(abs(one - other) <= _SMALL * (1 + abs(one)))
