r"""Mathematics in LaTeX or plain text to SymPy, by recursive descent.

Of LaTeX it reads what final answers hold. Numbers stay exact: 0.5 is 1/2. Nothing is computed that could be large:
digits, depth, powers and factorials have bounds, so that reading takes milliseconds whatever the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import sympy
from sympy import Expr, Integer, Rational, Symbol

MAX_DIGITS = 300
MAX_DEPTH = 40
MAX_POWER_BITS = 20_000
MAX_FACTORIAL = 300

_PLAIN_WORDS = (
    "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln",
    "exp", "cis", "pi", "infinity", "inf",
)  # fmt: skip
_TOKEN = re.compile(
    rf"\s+|(\\[a-zA-Z]+|\\.|\d+\.\d*|\d+|\.\d+|{'|'.join(_PLAIN_WORDS)}|[a-zA-Z]+|\*\*|[-+*/^_!(){{}}\[\]|])"
)
_CONSTANTS = {
    "\\pi": sympy.pi, "pi": sympy.pi, "e": sympy.E, "i": sympy.I, "\\infty": sympy.oo, "infinity": sympy.oo,
    "inf": sympy.oo,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[[Expr], Expr]] = {
    **{name: getattr(sympy, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc", "exp")},
    **{name: getattr(sympy, name) for name in ("sinh", "cosh", "tanh")},
    **{name: getattr(sympy, name.replace("arc", "a")) for name in ("arcsin", "arccos", "arctan")},
    "cis": lambda value: sympy.cos(value) + sympy.I * sympy.sin(value),
    "lg": lambda value: sympy.log(value, 10), "ln": sympy.log, "log": sympy.log, "sqrt": sympy.sqrt,
}  # fmt: skip
_GREEK = frozenset({
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "kappa", "lambda", "mu",
    "nu", "xi", "rho", "sigma", "tau", "phi", "varphi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda",
    "Sigma", "Phi", "Psi", "Omega", "ell", "hbar", "iota", "upsilon", "vartheta", "Xi", "Upsilon",
})  # fmt: skip
_ACCENTS = frozenset({"hat", "vec", "dot", "ddot", "tilde", "bar"})
"""They make another name of a name."""
_TIMES = frozenset({"*", "\\cdot", "\\times", "\\ast"})
_DIVIDE = frozenset({"/", "\\div"})
_CLOSE = {"(": ")", "[": "]", "{": "}", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "\\{": "\\}"}


class UnreadableError(ValueError):
    """The text is not mathematics of the kind that is read here."""


def parse(text: str) -> Expr:
    """Read an expression.

    Raises:
        UnreadableError: it is not one, or larger than the bounds.
    """
    parser = _Parser(_tokens(text))
    value = parser.sum()
    if parser.peek() is not None:
        raise UnreadableError(f"unexpected {parser.peek()!r}")
    return value


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise UnreadableError(f"unexpected {text[place]!r}")
        place = match.end()
        if token := match.group(1):
            tokens += _letters(token) if token[0].isalpha() and token not in _PLAIN_WORDS else [token]
    return tokens


def _letters(word: str) -> list[str]:
    if len(word) > 3:
        raise UnreadableError(f"{word!r} is a word")
    return list(word)


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._next, self._depth, self._bars = tokens, 0, 0, 0

    def peek(self) -> str | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if token is None or (expected is not None and token != expected):
            raise UnreadableError(f"{token!r} where {expected!r} is due")
        self._next += 1
        return token

    def sum(self) -> Expr:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnreadableError("nested too deep")
        value = self._product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value = value + sign * self._product()
        self._depth -= 1
        return value

    def _product(self) -> Expr:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        value = self._power()
        while (token := self.peek()) is not None:
            if token in _TIMES:
                self.take()
                value = value * self._signed_power()
            elif token in _DIVIDE:
                self.take()
                value = value / self._signed_power()
            elif token == "\\frac" and isinstance(value, Integer) and self._tokens[self._next - 1].isdigit():
                part = self._power()
                value = value + _mixed_part(part) if isinstance(part, Rational) else value * part
            elif self._begins_factor(token):
                value = value * self._power()
            else:
                break
        return sign * value

    def _signed_power(self) -> Expr:
        if self.peek() in ("+", "-"):
            return (-1 if self.take() == "-" else 1) * self._signed_power()
        return self._power()

    def _begins_factor(self, token: str) -> bool:
        if token == "|":
            return self._bars == 0
        return token in "({[" or token[0].isalnum() or token in _CLOSE or self._is_command(token)

    def _is_command(self, token: str) -> bool:
        name = token[1:]
        return token in _CONSTANTS or name in _FUNCTIONS or name in _GREEK | _ACCENTS | {"frac", "binom"}

    def _power(self) -> Expr:
        base = self._atom()
        while self.peek() == "!":
            self.take()
            base = _factorial(base)
        if self.peek() in ("^", "**"):
            self.take()
            base = _power_of(base, self._exponent())
        return base

    def _exponent(self) -> Expr:
        if self.peek() in ("+", "-"):
            return (-1 if self.take() == "-" else 1) * self._exponent()
        return self._power() if self.peek() != "{" else self._enclosed()

    def _argument(self, split: bool) -> Expr:
        """What follows \\frac or \\sqrt: a group, or a token; of a number the first digit only, if `split`."""
        token = self.peek()
        if token is not None and token.isdigit() and split and len(token) > 1:
            self._tokens[self._next : self._next + 1] = [token[0], token[1:]]
        return self._enclosed() if self.peek() == "{" else self._atom()

    def _enclosed(self) -> Expr:
        token = self.take()
        self._bars, bars = int(token == "|"), self._bars
        value = self.sum()
        self.take(_CLOSE[token])
        self._bars = bars
        if token == "|":
            return sympy.Abs(value)
        return {"\\lfloor": sympy.floor, "\\lceil": sympy.ceiling}.get(token, lambda same: same)(value)

    def _atom(self) -> Expr:
        token = self.peek()
        if token is None:
            raise UnreadableError("it ends too early")
        if token in ("(", "[", "{", "|", "\\lfloor", "\\lceil"):
            return self._enclosed()
        self.take()
        if token[0].isdigit() or token[0] == ".":
            return self._number(token)
        if token in ("\\frac", "\\binom"):
            above, below = self._argument(True), self._argument(True)
            return above / below if token == "\\frac" else _binomial(above, below)
        name = token.removeprefix("\\")
        if name == "sqrt":
            return self._root()
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        if name in _FUNCTIONS:
            return self._function(name)
        if len(token) == 1 or name in _GREEK:
            return self._symbol(name)
        if name in _ACCENTS:
            return self._symbol(f"{name} {self._argument(False)}")
        raise UnreadableError(f"unexpected {token!r}")

    def _number(self, digits: str) -> Expr:
        if len(digits) > MAX_DIGITS:
            raise UnreadableError(f"a number of {len(digits)} characters")
        if self.peek() == "\\overline" and "." in digits:
            return self._repeating(digits)
        if self.peek() == "_":  # 101_2: the base is part of the answer
            self.take()
            return sympy.Function("base")(Integer(int(digits)), self._argument(False))
        return Rational(digits)

    def _repeating(self, digits: str) -> Expr:
        self.take()
        self.take("{")
        period = self.take()
        self.take("}")
        if not period.isdigit() or len(period) > MAX_DIGITS:
            raise UnreadableError(f"{period!r} does not repeat")
        places = len(digits.partition(".")[2])
        return Rational(digits) + Rational(int(period), (10 ** len(period) - 1) * 10**places)

    def _root(self) -> Expr:
        index: Expr = Integer(2)
        if self.peek() == "[":
            index = self._enclosed()
        value = self._argument(False)
        if isinstance(index, Integer) and int(index) % 2 and isinstance(value, Rational) and value < 0:
            return -_power_of(-value, 1 / index)  # the real root
        return _power_of(value, 1 / index)

    def _function(self, name: str) -> Expr:
        base, power = None, None
        while self.peek() in ("_", "^"):
            if self.take() == "_":
                base = self._argument(False)
            else:
                power = self._exponent()
        argument = self._enclosed() if self.peek() in ("(", "{") else self._bare_argument()
        value = sympy.log(argument, base) if name == "log" and base is not None else _FUNCTIONS[name](argument)
        if power is None:
            return value
        return _FUNCTIONS[f"arc{name}"](argument) if power == -1 else _power_of(value, power)

    def _bare_argument(self) -> Expr:
        """`\\sin 2x`: numbers, letters and fractions up to the next sign or function."""
        value = self._power()
        while (token := self.peek()) is not None and ((len(token) == 1 and token.isalpha()) or token in _CONSTANTS):
            value = value * self._power()
        return value

    def _symbol(self, name: str) -> Expr:
        if self.peek() == "_":
            self.take()
            name += f"_{self._argument(False)}"
        return Symbol(name)


def _mixed_part(part: Rational) -> Expr:
    """`2\\frac{1}{3}` is 2 + 1/3, not a product, where the fraction is one of numbers."""
    if not 0 < part < 1:
        raise UnreadableError("a number before a fraction that is no part of a mixed number")
    return part


def _power_of(base: Expr, exponent: Expr) -> Expr:
    """A power, unless it would be a number of too many digits."""
    if base.is_number and exponent.is_number:
        size = float(abs(sympy.N(exponent, 5))) * max(1, abs(float(sympy.log(abs(base) + 2, 2).evalf(5))))
        if not size <= MAX_POWER_BITS:
            raise UnreadableError("a power of too many digits")
    return base**exponent


def _factorial(value: Expr) -> Expr:
    if value.is_number and not (isinstance(value, Integer) and 0 <= int(value) <= MAX_FACTORIAL):
        raise UnreadableError("the factorial of a large number, or of none")
    return sympy.factorial(value)


def _binomial(above: Expr, below: Expr) -> Expr:
    numbers = [part for part in (above, below) if part.is_number]
    if any(not isinstance(part, Integer) or abs(int(part)) > MAX_FACTORIAL for part in numbers):
        raise UnreadableError("a binomial coefficient of large numbers")
    return sympy.binomial(above, below)
