"""The words of a text, as overlap and near-duplicates are looked for: nothing that looks alike hides a word."""

from __future__ import annotations

import html
import re
import unicodedata

_WORD = re.compile(r"\w+")
_LINE_END = re.compile(r"(?<=\w)[-\u2010\u00ad]\s*\n\s*(?=\w)")
_UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
"""Soft hyphen, zero-width spaces and joiners, byte order mark."""


def words(text: str) -> tuple[str, ...]:
    """Runs of letters, digits and underscores in lower case, so that spacing and punctuation hide nothing.

    A word that is hyphenated at a line's end is one word; soft hyphens and zero-width characters are passed over;
    HTML's entities (`&nbsp;`), full-width letters and ligatures count as what they stand for (Unicode's NFKC).
    """
    if "&" in text:
        text = html.unescape(text)
    if "\n" in text:
        text = _LINE_END.sub("", text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_UNSEEN))
    return tuple(_WORD.findall(text.lower()))
