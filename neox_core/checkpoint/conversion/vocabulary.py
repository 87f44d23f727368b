"""Vocabularies: rows that the base model lacks, and whether a tokenizer fits the model."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from neox_core.checkpoint.formats.model_weights import ModelWeights, NewRows
from neox_core.config import ModelConfig
from neox_core.data.tokenization.tokenizer_file import load_model
from neox_core.errors import ConfigError

NewTokens = Literal["mean", "normal", "zeros"]
_STD = 0.02
_CHUNK_ROWS = 1024
_EMBEDDING = "model.embed_tokens.weight"


def new_rows(method: NewTokens, weights: ModelWeights) -> NewRows:
    """How rows of the embedding and of the output are made that the base model lacks; the same for equal weights.

    mean: the mean of the base's rows, with which a new token is as likely as the average one (Hewitt 2021); normal:
    standard deviation 0.02, as at initialisation, different for each row; zeros.
    """
    mean = lru_cache(partial(_mean_row, weights))

    def fill(whole: str, rows: range, out: Tensor) -> None:
        if method == "mean":
            out.copy_(mean(whole).expand_as(out))
        elif method == "zeros":
            out.zero_()
        else:
            name = _EMBEDDING if weights.model.tied_embeddings else whole
            for number, row in enumerate(rows):
                generator = torch.Generator().manual_seed(row + len(name) * 2**32)
                out[number].copy_(torch.randn(out.shape[1], generator=generator) * _STD)

    return fill


def _mean_row(weights: ModelWeights, whole: str) -> Tensor:
    """Mean over a whole tensor's rows, summed in float64."""
    height, width = weights.shape(whole)
    total = torch.zeros(width, dtype=torch.float64)
    chunk = torch.empty(_CHUNK_ROWS, width, dtype=weights.dtype)
    for start in range(0, height, _CHUNK_ROWS):
        rows = range(start, min(start + _CHUNK_ROWS, height))
        weights.read(whole, rows, range(width), chunk[: len(rows)])
        total += chunk[: len(rows)].double().sum(0)
    return total / height


def check_tokenizer(path: Path, model: ModelConfig) -> None:
    """Check that every piece of a tokenizer, and so every special id, has a row.

    Raises:
        DataError: the tokenizer cannot be loaded.
        ConfigError: it has more pieces than the model has tokens, or a special id beyond them.
    """
    count = load_model(path).vocab_size
    if count > model.num_tokens:
        raise ConfigError(
            f"tokenizer {path} has {count} pieces, more than the {model.num_tokens} tokens of "
            f"model.vocab_size {model.vocab_size}: use the base's tokenizer, or raise it and say the base's own "
            "vocabulary in base_model.vocab_size"
        )
