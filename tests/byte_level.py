"""A small tokenizer.json with byte-level BPE."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BEGIN, END = "<|im_start|>", "<|endoftext|>"


def make_byte_level(folder: Path) -> Path:
    """A tokenizer.json of 300 pieces; the first ends a text, the second begins a message."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END, BEGIN], initial_alphabet=alphabet)
    made.train_from_iterator(["the derivative of x is the theorem of the thing"] * 9, trainer)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
