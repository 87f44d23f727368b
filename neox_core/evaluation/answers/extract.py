r"""The final answer of a sample.

Looked for in this order: the sentence that Minerva's prompt asks for ("Final Answer: The final answer is X. I hope it
is correct."), the last \boxed{X}, GSM8K's line "#### X", "The answer is X", and where wanted the last number.
"""

from __future__ import annotations

import re

SEARCHED_CHARACTERS = 20_000
"""Only the end of a sample is read: an answer that comes earlier is no final one."""

_SENTENCE = re.compile(r"[Ff]inal answer is:?\s*(.+?)\.?\s*I hope it is correct", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_PHRASE = re.compile(r"answer is:?[ \t]*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")


def extract_answer(sample: str, last_number: bool = False) -> str | None:
    """The final answer as it stands in the text; None where there is none.

    Args:
        sample: what a model wrote.
        last_number: take the last number where no other sign of an answer is found (GSM8K's flexible rule).
    """
    end = sample[-SEARCHED_CHARACTERS:]
    if found := _SENTENCE.findall(end):
        return _unboxed(found[-1])
    if (boxed := _last_boxed(end)) is not None:
        return boxed.strip()
    if found := _HASHES.findall(end) or _PHRASE.findall(end):
        return _without_stop(found[-1])
    if last_number and (found := _NUMBER.findall(end)):
        return _without_stop(found[-1]).rstrip(",")
    return None


def _unboxed(text: str) -> str:
    boxed = _last_boxed(text)
    return _without_stop(text if boxed is None else boxed)


def _without_stop(text: str) -> str:
    text = text.strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def _last_boxed(text: str) -> str | None:
    """What stands in the last box that is closed."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for place, character in enumerate(text):
        if character == "{":
            opened.append(place)
        elif character == "}" and opened:
            closing[opened.pop()] = place
    boxes = [match.end() for match in _BOX.finditer(text) if match.end() in closing]
    return text[boxes[-1] + 1 : closing[boxes[-1]]] if boxes else None
