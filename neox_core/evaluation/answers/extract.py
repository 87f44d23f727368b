r"""The final answer of a sample.

Looked for in this order: the sentence that Minerva's prompt asks for ("Final Answer: The final answer is X. I hope it
is correct."), the last \boxed{X}, GSM8K's line "#### X", "The answer is X", and where wanted the last number.
"""

from __future__ import annotations

import re

SEARCHED_CHARACTERS = 20_000
"""Only the end of a sample is read: an answer that comes earlier is no final one."""

_OPENING, _CLOSING = re.compile(r"[Ff]inal answer is:?"), "I hope it is correct"
"""Looked for one by one: a pattern for both takes minutes for a sample of blanks."""
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_PHRASE = re.compile(r"answer is:?[ \t]*((?:(?!answer is)[^\n])+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_STOP = re.compile(r"\.\s")
_WORDS_AROUND = re.compile(r"[^-+/^\\=_{}()√−×π]*")
_MULTIPLES = re.compile(r"hundred|thousand|million|billion|trillion|dozen|[kK]\b", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")


def extract_answer(sample: str, last_number: bool = False) -> str | None:
    """The final answer as it stands in the text; None where there is none.

    Args:
        sample: what a model wrote.
        last_number: take the last number where no other sign of an answer is found (GSM8K's flexible rule).
    """
    end = sample[-SEARCHED_CHARACTERS:]
    if (sentence := _last_sentence(end)) is not None:
        return _unboxed(sentence)
    if (boxed := last_boxed(end)) is not None:
        return boxed.strip()
    if found := _HASHES.findall(end) or _PHRASE.findall(end):
        answer = _without_stop(_STOP.split(found[-1])[0])
        if not last_number:
            return answer
        if _NUMBER.search(answer):
            return _number_alone(answer)
    if last_number and (found := _NUMBER.findall(end)):
        return _without_stop(found[-1]).rstrip(",")
    return None


def _last_sentence(text: str) -> str | None:
    """What Minerva's prompt asks for, between its opening and its closing words."""
    end = text.rfind(_CLOSING)
    openings = [match.end() for match in _OPENING.finditer(text, 0, max(end, 0))]
    return (_without_stop(text[openings[-1] : end]) or None) if openings else None


def _number_alone(answer: str) -> str:
    """`12 apples` as 12; an answer of more than a number and words is left as it is."""
    numbers = list(_NUMBER.finditer(answer))
    before, after = answer[: numbers[0].start()], answer[numbers[0].end() :]
    words = before + after
    if len(numbers) > 1 or after[:1].isalpha() or not _WORDS_AROUND.fullmatch(words) or _MULTIPLES.search(words):
        return answer
    return numbers[0].group().rstrip(",")


def _unboxed(text: str) -> str:
    boxed = last_boxed(text)
    return _without_stop(text if boxed is None else boxed)


def _without_stop(text: str) -> str:
    text = text.strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def last_boxed(text: str) -> str | None:
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
