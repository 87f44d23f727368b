"""A Hugging Face tokenizer.json with byte-level BPE: the library that defines the format says which ids are right."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from neox_core.data.indexed import Tokens

_OTHERS = "ĀŀƀǀȀɀʀˀ\u0300ͰΆπЀрҀӀԀՀրאؠـڀۀܐݍހߊࠀကⁱ々䀀倀怀瀀耀退ꀀ뀀쀀퀀\ufa0e🙂"
"""A printable character for each further byte with which characters in use begin in UTF-8."""
_PROBE = bytes(range(256)).decode("latin-1") + _OTHERS


class ByteLevelModel:
    """Encodes texts with Hugging Face's `tokenizers`. A special token that is spelled out in a text is text."""

    bos_id = eos_id = unk_id = -1
    """The file does not say which token is which: a configuration names the one that it means."""

    def __init__(self, content: bytes) -> None:
        """Load a tokenizer.json's content.

        Raises:
            ValueError: it is none, its BPE is not byte-level, so that some texts would have no ids, or it is random.
        """
        import tokenizers

        self.engine = f"tokenizers {tokenizers.__version__}"
        described = _parsed(content)
        self._tokenizer: Any = tokenizers.Tokenizer.from_str(content.decode())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._special = {token["content"]: int(token["id"]) for token in described["added_tokens"] if token["special"]}
        if described["model"]["type"] == "BPE" and described["model"].get("unk_token") in self._special:
            # A byte that the vocabulary lacks would else become, say, the end of a document in the midst of it.
            self._tokenizer.model.unk_token = None
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        """One more than the largest id."""
        if described["model"].get("dropout"):
            raise ValueError(
                f"its model's dropout is {described['model']['dropout']}, by which a text's ids are others each time: "
                "set it to null"
            )
        self.special_texts = list(self._special)
        """Special tokens' texts, which are text where a text has them."""
        self.lost: list[str] = self._lost(described["model"]["type"])
        """Control characters whose bytes the vocabulary lacks: the library gives them no id."""

    def _lost(self, kind: str) -> list[str]:
        # Where a blank is put before every text, the decoder may leave it.
        kept = self._tokenizer.decode(self.encode(_PROBE).tolist()).removeprefix(" ")
        lost = sorted(set(_PROBE) - set(kept))
        if kind != "BPE" or kept != "".join(c for c in _PROBE if c not in lost) or any(map(_matters, lost)):
            some = f" ({''.join(lost[:8])!a})" if lost else ""
            raise ValueError(f"its {kind} model loses or changes characters{some}: byte-level BPE is due")
        if controls := self.specials_in(_PROBE):
            raise ValueError(f"it gives a character of a text the special id {controls[0]}: byte-level BPE is due")
        return lost

    def encode(self, text: str) -> Tokens:
        """Ids of a text, [tokens]; nothing is put before or after it."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def special_id(self, text: str) -> int:
        """Id of a special token by its text; -1: there is none."""
        return self._special.get(text, -1)

    def specials_in(self, text: str) -> list[int]:
        """Special ids in the text's encoding."""
        return [i for i in self.encode(text).tolist() if i in self._special.values()]


def _matters(character: str) -> bool:
    return character.isprintable() or character in "\t\n\r"


def _parsed(content: bytes) -> Any:
    try:
        described = json.loads(content)
        if not isinstance(described["model"]["type"], str) or not isinstance(described["added_tokens"], list):
            raise ValueError("no model or no added tokens")
    except (KeyError, TypeError) as error:
        raise ValueError(f"it lacks {error}") from None
    return described
