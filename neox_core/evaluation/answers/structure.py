r"""What an answer is made of: one expression, or a list, a tuple, an interval, a matrix, an equation of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

import sympy
from sympy import Expr

from neox_core.evaluation.answers.latex import UnreadableError, parse

MAX_PARTS = 64
"""Members of a list, and entries of a matrix."""

_MATRIX = re.compile(
    r"^([^&]*?)([(\[]?)\s*\\begin\{([pbvBV]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\3\}\s*([)\]]?)$", re.DOTALL
)
"""A factor, and brackets around, are not part of every matrix."""
_NAMED = re.compile(r"^(?:[a-zA-Z]|\\[a-z]+)(?:_\{?\w+\}?)?(?:\([a-z]\))?'*$")
_UNEQUAL = re.compile(r"\\ne(?![a-z])")
_BUILDER = re.compile(r"^\\\{\s*([a-zA-Z])\s*(?:\\mid|[|:])(.*)\\\}$", re.DOTALL)
"""`\\{x \\mid x > 3\\}` is what it says of x."""
_MEMBER = re.compile(r"\\in(?![a-zA-Z])")
_RELATION = re.compile(r"(\\le(?![a-z])|\\ge(?![a-z])|<=?|>=?)")
_OPEN, _CLOSED = ("(", "[", "{", "\\{"), (")", "]", "}", "\\}")


@dataclass(frozen=True)
class Group:
    """Answers that belong together."""

    kind: str
    """set, union, equation, named (an equation whose left side is a name), matrix RxC, or the two brackets of a tuple
    or interval, such as `(]`."""
    items: tuple[Answer, ...]

    @property
    def ordered(self) -> bool:
        """Whether the items' order is part of the answer."""
        return self.kind not in ("set", "union")


Answer: TypeAlias = Expr | Group


def read_answer(text: str) -> Answer:
    """Read a normalised answer.

    Raises:
        UnreadableError: it is not mathematics, or larger than the bounds.
    """
    text = _BUILDER.sub(r"\2", text.strip())
    if (matrix := _MATRIX.match(text)) and "=" not in matrix[1] and matrix[2] + matrix[5] in ("", "()", "[]"):
        return _matrix(matrix[4], matrix[1].strip())
    if len(found := _MEMBER.split(text, maxsplit=1)) > 1:
        return read_answer(found[1])
    if len(parts := _split(text, ",")) > 1 or len(parts := _split(text, ";")) > 1:
        return _unordered(parts)
    if len(signed := _signed(text)) > 1 and not text.startswith("\\{"):
        return _unordered(signed)
    if len(parts := _split(text, "\\cup")) > 1:
        return Group("union", tuple(read_answer(part) for part in parts))
    if len(parts := _split(text, "=")) > 1:
        return _equation(parts)
    if len(parts := _UNEQUAL.split(text)) == 2 and _NAMED.match(parts[0].strip()):
        hole = parse(parts[1])
        return Group("union", (Group("()", (-sympy.oo, hole)), Group("()", (hole, sympy.oo))))
    if len(parts := _RELATION.split(text)) > 1:
        return _inequality(parts)
    return _bracketed(text)


def _signed(text: str) -> list[str]:
    """`1 \\pm 2` as both of its values."""
    if "\\pm" not in text and "\\mp" not in text:
        return [text]
    return [text.replace("\\pm", plus).replace("\\mp", minus) for plus, minus in (("+", "-"), ("-", "+"))]


def _unordered(parts: list[str]) -> Answer:
    """Bare lists and sets are one thing: their members, in any order, each once."""
    parts = [value for part in parts for value in _signed(part)]
    if len(parts) > MAX_PARTS:
        raise UnreadableError(f"a list of {len(parts)}")
    return Group("set", tuple(dict.fromkeys(read_answer(part) for part in parts)))


def _bracketed(text: str) -> Answer:
    for opening in _OPEN[::-1]:
        for closing in _CLOSED[::-1]:
            if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
                inner = text[len(opening) : -len(closing)]
                parts = _split(inner, ",")
                if not _encloses(inner) or (len(parts) == 1 and opening != "\\{"):
                    return parse(text)
                if "{" in opening:
                    return _unordered(parts)
                return Group(opening + closing, tuple(read_answer(part) for part in parts[:MAX_PARTS]))
    return parse(text)


def _encloses(inner: str) -> bool:
    """Whether the brackets around are a pair: none inside closes one that opened outside."""
    depth = 0
    for character in inner:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _equation(parts: list[str]) -> Answer:
    """`x = 5`, an equation of expressions, or of a chain `a = b = c` the last part."""
    names = [bool(_NAMED.match(part.strip())) for part in parts]
    if len(parts) == 2 and names == [False, True]:
        parts, names = parts[::-1], names[::-1]
    right = read_answer(parts[-1])
    if len(parts) > 2 or isinstance(right, Group):
        return right
    try:
        left = parse(parts[0])
    except UnreadableError:  # such as `Area = 5`, or a derivative's name
        return right
    return Group("named" if names[0] else "equation", (left, right))


def _inequality(parts: list[str]) -> Answer:
    """`x > 3` is (3, oo), and `2 < x \\le 5` is (2, 5]."""
    values, signs = [part.strip() for part in parts[::2]], [sign.replace("=", "") for sign in parts[1::2]]
    strict = ["=" not in part and "\\" not in part for part in parts[1::2]]
    falling = [sign in (">", "\\ge") for sign in signs]
    if len(values) == 2 and _NAMED.match(values[1]):
        values, falling = values[::-1], [not falling[0]]
    if len(values) == 2 and _NAMED.match(values[0]):
        bound = parse(values[1])
        if falling[0]:
            return Group("()" if strict[0] else "[)", (bound, sympy.oo))
        return Group("()" if strict[0] else "(]", (-sympy.oo, bound))
    if len(values) == 3 and _NAMED.match(values[1]) and falling[0] == falling[1]:
        ends = [(parse(values[0]), strict[0]), (parse(values[2]), strict[1])]
        (low, open_low), (high, open_high) = ends[::-1] if falling[0] else ends
        return Group(("(" if open_low else "[") + (")" if open_high else "]"), (low, high))
    raise UnreadableError("an inequality of this form")


def _matrix(body: str, factor: str) -> Answer:
    rows = [_split(row, "&") for row in body.strip().removesuffix("\\\\").split("\\\\")]
    entries = [entry for row in rows for entry in row]
    if len({len(row) for row in rows}) > 1 or len(entries) > MAX_PARTS:
        raise UnreadableError("a matrix with rows of different lengths, or a large one")
    times = -sympy.S.One if factor == "-" else parse(factor) if factor else sympy.S.One
    return Group(f"matrix {len(rows)}x{len(rows[0])}", tuple(times * parse(entry) for entry in entries))


def _split(text: str, separator: str) -> list[str]:
    """Parts at a separator that stands outside all brackets."""
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        if depth == 0 and text.startswith(separator, place):
            if separator != "=" or text[place - 1 : place] not in ("<", ">"):
                parts.append(text[start:place])
                start = place + len(separator)
            place += len(separator)
            continue
        depth += (text[place] in "([{") - (text[place] in ")]}")
        place += 1
    parts.append(text[start:])
    return [part for part in parts if part.strip()] if separator == "," else parts
