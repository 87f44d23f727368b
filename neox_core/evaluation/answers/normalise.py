r"""Answers as text: what does not change their value is taken away.

Minerva's list (arXiv 2206.14858, listing 1) takes units and spacing out wherever the letters stand; here they have to
be words of their own, and a one-letter unit has to be set as text (`5\text{ m}`), for `5m` is a product.
"""

from __future__ import annotations

import re
import unicodedata

_SPACING = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|[bB]igg?[lr]?|limits|qquad|quad|hspace\{[^{}]*\}|phantom\{[^{}]*\})"
    r"(?![a-zA-Z])|(?<!\\)\\[!,;: ]|~|\\\$|\$|\\pounds(?![a-z])|\\\(|\\\)|(?<!\\)\\[\[\]]|\\%|%|£|€"
)
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathbb|mbox|operatorname|rm)"
    r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_BOX = re.compile(r"^\\(?:boxed|fbox)\s*\{(.*)\}$", re.DOTALL)
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\\deg(?![a-z])")
_LONG_UNITS = (
    "units?|degrees?|dollars?|cents?|percent|ways|integers|mph|inch(?:es)?|feet|foot|ft|yards?|miles?|hours?|hrs?|"
    "minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?(?: old)?|km|cm|mm|gm|kg|mg|ml|pounds?|lbs?|ounces?|oz|"
    "met(?:er|re)s?|centimet(?:er|re)s?|kilomet(?:er|re)s?|grams?|kilograms?|lit(?:er|re)s?|gallons?|"
    "points?|digits|meals|edges|students|people|tickets|multiples|radians|square|cubic|sq"
)
_SYMBOLS = "[nμmckMG]?(?:m|s|g|L|N|J|W|V|A|K|C|F|T|Hz|Pa|eV|pc|mol|cal|rad)|h|M|AU|atm|bar|ergs?|dynes?|Å"
_UNIT_WORD = rf"(?:{_LONG_UNITS}|{_SYMBOLS}|per)"
_UNIT = re.compile(
    rf"(?<![a-zA-Z\\])(?:{_LONG_UNITS})(?![a-zA-Z])\s*(?:\^\s*\{{?[23]\}}?)?(?:\s*/\s*(?:{_LONG_UNITS})(?![a-zA-Z]))?"
)
_UNIT_JOINT = r"(?:[\s/.·()]|\\cdot|\\times|\^\{?-?\d\}?)"
_UNITS_ONLY = re.compile(rf"^[\s(]*{_UNIT_WORD}(?:{_UNIT_JOINT}+{_UNIT_WORD})*{_UNIT_JOINT}*$")
_BEFORE_UNIT = re.compile(r"(?:\s|/|\\cdot(?![a-z])|\\times(?![a-z])|(?<=[\d\s}])\\mu)+$")
"""What joins a unit with a number or another unit, or stands for a millionth of it."""
_COUNTED = re.compile(
    r"\s*(?!.*\b(?:and|or|to|more|less|than|base|half|halves|thirds?|quarters?|\w+ths?|squared|cubed|factorial|dozen|"
    r"pi|root|radical|sqrt|over|times|"
    r"hundred|thousand|[mbtr]+illion|[ap]m)\b)[a-z]{2,}(?: [a-z]+)*[\s.]*"
)
"""What a number counts, as in `5\text{ apples}`, unless it changes the number."""
_INDEX = re.compile(r"[_^]\s*\{?\s*$")
"""Before what is no unit but part of a name: `T_\\text{h}`."""
_NUMBER = re.compile(r"[-+]?\s*(?:\d[\d,.]*|\d*\s*\\frac\s*\{\d+\}\s*\{\d+\})\s*")
_AFTER_UNIT = re.compile(r"\s*\^\s*(?:\{\s*-?[123]\s*\}|[23])")
_THOUSANDS = re.compile(r"(?<![\d,.(\[{])\d{1,3}(?:,\d{3})+(?![\d,])")
_GROUPS = re.compile(r"(?<![\d,./] )(?<![\d,.])\d{1,3}(?: \d{3})+(?![\d,]| ?[\d/])")
"""Thousands that spaces part, as in `1\\,234\\,567`."""
_VULGAR = re.compile(r"(\d*)([¼½¾⅐-⅞])")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SAME = (
    (re.compile(r"\\[tdc]?(frac|binom)"), r"\\\1"),
    (re.compile(r"\\(?:leq|leqslant)(?![a-z])|≤"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant)(?![a-z])|≥"), r"\\ge "),
    (re.compile(r"\{,\}|,\\!\s*"), ","),
    (re.compile(r"\\lt(?![a-z])"), "<"),
    (re.compile(r"\\gt(?![a-z])"), ">"),
    (re.compile(r"\\neq?(?![a-z])|≠"), r"\\ne "),
    (re.compile(r"\\[lr]?vert(?![a-z])"), "|"),
    (re.compile(r"\\varnothing(?![a-z])|∅|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\{([^{}]+)\\over(?![a-z])([^{}]+)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\{([^{}]+)\\choose(?![a-z])([^{}]+)\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"(?<=\.)(\d*)\\bar(?![a-z])"), r"\1\\overline"),
    (re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?!\w)"), r"\1\\cdot 10^{\2}"),
    (re.compile(r"⁄"), "/"),
    (re.compile(r"π"), r"\\pi "),
    (re.compile(r"∞"), r"\\infty "),
    (re.compile(r"√"), r"\\sqrt "),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"×|·"), r"\\cdot "),
    (re.compile(r"∪"), r"\\cup "),
    (re.compile(r"\\langle(?![a-z])"), "("),
    (re.compile(r"\\rangle(?![a-z])"), ")"),
    (re.compile(r"\\approx(?![a-z])|≈"), "="),
    (re.compile(r"(?<=\d) *thousand(?![a-z])"), r"\\cdot 10^{3}"),
    (re.compile(r"(?<=\d) *million(?![a-z])"), r"\\cdot 10^{6}"),
    (re.compile(r"(?<=\d) *billion(?![a-z])"), r"\\cdot 10^{9}"),
    (re.compile(r"(?<![\d.])(\d+) +(\d+)\s*/\s*(\d+)(?!\d)"), r"\1\\frac{\2}{\3}"),
    (re.compile(r",?(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])"), ","),
)


def normalise(answer: str) -> str:
    r"""An answer's text without units, spacing, dollar signs, text commands and separators of thousands."""
    text = _balanced_end(answer.strip())
    if boxed := _BOX.match(text):
        text = boxed.group(1)
    text = _VULGAR.sub(lambda match: _vulgar(*match.groups()), _DEGREES.sub("", text))
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: f"^{{{match.group().translate(_RAISED)}}}", text)
    text = text.replace("\\mathbb{R}", "(-\\infty,\\infty)")
    # Before the spacing commands go, since `,\!` separates thousands.
    for pattern, replacement in _SAME[:4]:
        text = pattern.sub(replacement, text)
    text = _without_text_commands(_SPACING.sub(" ", text))
    for pattern, replacement in _SAME[4:]:
        text = pattern.sub(replacement, text)
    if re.search(r"\d|\\pi|\\frac|\\sqrt", text):  # a unit alone is the answer itself
        text = _UNIT.sub(" ", text)
    text = _GROUPS.sub(lambda match: match.group().replace(" ", ""), " ".join(text.split()))
    text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    return _balanced_end(" ".join(text.split()))


def _vulgar(whole: str, fraction: str) -> str:
    """`2½` is a mixed number."""
    above, below = unicodedata.normalize("NFKC", fraction).split("⁄")
    return rf"{whole}\frac{{{above}}}{{{below}}}"


def _without_text_commands(text: str) -> str:
    """Units that are set as text go with their power, and so does what a number counts; other texts' words stay."""
    parts, end = [], 0
    for match in _TEXT.finditer(text):
        if match.start() < end:
            continue
        parts.append(text[end : match.start()])
        end = match.end()
        before, words = "".join(parts), match.group(1)
        if before.strip() and _UNITS_ONLY.match(words) and not _INDEX.search(before):
            parts = [_BEFORE_UNIT.sub("", before)]
            if power := _AFTER_UNIT.match(text, end):
                end = power.end()
        elif text[end:].strip() or not _NUMBER.fullmatch(before) or not _COUNTED.fullmatch(words):
            parts.append(f" {words} ")
    return "".join(parts) + text[end:]


def _balanced_end(text: str) -> str:
    text = text.strip()
    while text.endswith((".", ",", ";", ":")) and not text.endswith("..."):
        text = text[:-1].rstrip()
    return text
