"""Llama 3's tokenizer.model, a tiktoken file: ids by byte-pair ranks, and neither special tokens nor how text is cut.

Those are Meta's for Llama 3, 3.1, 3.2 and 3.3, and known here. The library that made the file says which ids are right.
"""

from __future__ import annotations

import base64
import re
from itertools import count, pairwise

import numpy as np

from neox_core.data.indexed import Tokens

_RANKS = 128_000
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How text is cut before pairs are merged."""
_NAMED = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|finetune_right_pad_id|>": 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "<|eom_id|>": 8,
    "<|eot_id|>": 9,
    "<|python_tag|>": 10,
}
"""Special tokens that have names, by their place after the ranks."""
_SPECIAL_TOKENS = 256
_SEGMENT = 400_000
_RUN = re.compile(r"\s{25001}|\S{25001}")
"""Blanks or other characters in a row, of which the engine cannot take a million: Meta's code cuts before the last."""


def special_tokens() -> list[str]:
    """The names of Llama 3.1's special tokens, in the order of their ids after the ranks; most are reserved."""
    named = {place: name for name, place in _NAMED.items()}
    reserved = (f"<|reserved_special_token_{number}|>" for number in count())
    return [named[place] if place in named else next(reserved) for place in range(_SPECIAL_TOKENS)]


class TiktokenModel:
    """Encodes texts with tiktoken. A special token that is spelled out in a text is text."""

    unk_id = -1

    def __init__(self, content: bytes) -> None:
        """Load a file's content.

        Raises:
            ValueError: it is none, or not Llama 3's.
        """
        import tiktoken

        self.engine = f"tiktoken {tiktoken.__version__}"
        ranks = _ranks(content)
        if len(ranks) != _RANKS:
            raise ValueError(
                f"it has {len(ranks)} ranks; how text is cut, which is not in the file, is known for Llama 3's "
                f"{_RANKS} only: give the same tokenizer's tokenizer.json"
            )
        self._special = {name: _RANKS + place for name, place in _NAMED.items()}
        self.special_texts = list(self._special)
        """Special tokens' texts, which are text where a text has them."""
        self.bos_id, self.eos_id = self._special["<|begin_of_text|>"], self._special["<|end_of_text|>"]
        self.vocab_size = _RANKS + _SPECIAL_TOKENS
        self._model = tiktoken.Encoding("Llama 3", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=self._special)

    def encode(self, text: str) -> Tokens:
        """Ids of a text, [tokens]; nothing is put before or after it. Very long texts and words are cut as by Meta."""
        ids: list[int] = []
        for start in range(0, max(1, len(text)), _SEGMENT):
            segment = text[start : start + _SEGMENT]
            for begin, end in pairwise(_cuts(segment)):
                ids += self._model.encode_ordinary(segment[begin:end])
        return np.asarray(ids, dtype=np.uint32)

    def special_id(self, text: str) -> int:
        """Id of a special token by its text, or of the one that ends a text (eos); -1: there is none."""
        return self.eos_id if text == "eos" else self._special.get(text, -1)

    def specials_in(self, text: str) -> list[int]:
        """Special ids in the text's encoding."""
        return [i for i in self.encode(text).tolist() if i >= _RANKS]


def _cuts(text: str) -> list[int]:
    cuts = [0]
    while run := _RUN.search(text, cuts[-1]):
        cuts.append(run.end() - 1)
    return [*cuts, len(text)]


def _ranks(content: bytes) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in content.splitlines() if line.strip()]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise ValueError(f"a line is no token with its rank: {error}") from None
