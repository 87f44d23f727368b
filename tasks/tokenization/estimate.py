"""What a mixture would take of each source, by the sizes of its files, before anything is tokenized."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from neox_core.config import RunConfig, sequences_before
from neox_core.data.dataset import consumption
from neox_core.data.mixture_weights import training_mixture
from neox_core.data.tokenization.readers import Document, InputFile, open_input, read_records
from neox_core.data.tokenization.readers.lines import COMPRESSIONS
from neox_core.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_BYTES_PER_TOKEN = 3.0
"""Of English text and code; fewer for mathematics. An estimate errs by half."""
_PACKED = 3.5
"""Bytes of text in a byte of a compressed file."""
_NO_BOUND = 1 << 62


def check_repeats(files: Sequence[InputFile], config: RunConfig) -> None:
    """Look for sources that the run would repeat more than data.max_epochs times, by the size of their files.

    Where an estimate says so, it is a warning: the ledger refuses it when the tokens are counted.

    Raises:
        ConfigError: even with a token for each byte, which is the most that there can be.
        DataError: such a source has no text at all, or less than a sequence.
    """
    limit = config.data.max_epochs
    for name, epochs in _epochs(files, config, most_tokens).items():
        if epochs > limit:
            _check_text(files, name, config)
            raise ConfigError(
                f"source {name!r}: its files hold {most_tokens(files, name):,} bytes, so that the run would repeat it "
                f"at least {epochs:.3g} times, more than data.max_epochs {limit:g}: lower its weight or train.steps, "
                "add text, or raise data.max_epochs"
            )
    for name, epochs in _epochs(files, config, estimated_tokens).items():
        if epochs > limit:
            logger.warning(
                "source %r holds about %s tokens by the size of its files, and the run would repeat it about %.3g "
                "times, more than data.max_epochs %g: unless the estimate is far off, prepare-data will end with an "
                "error; lower its weight or train.steps, or raise data.max_epochs",
                name,
                f"{estimated_tokens(files, name):,}",
                epochs,
                limit,
            )


def _epochs(
    files: Sequence[InputFile], config: RunConfig, tokens_of: Callable[[Sequence[InputFile], str], int]
) -> dict[str, float]:
    """How often the run would repeat each source; empty where amounts add up only when tokens are counted."""
    tokens = {name: tokens_of(files, name) for name in config.data.sources}
    total = sequences_before(config.train, config.train.steps + 1)
    try:
        taken = training_mixture(config, tokens.__getitem__).consumed(total)
    except (ConfigError, DataError):
        return {}
    return {
        name: consumption(sequences, config.train.sequence_length, tokens[name])["epochs"]
        for name, sequences in taken.items()
    }


def _check_text(files: Sequence[InputFile], source: str, config: RunConfig) -> None:
    """Refuse a source of less than a sequence, or without a single document that holds text.

    A file that cannot be read may hold some.
    """
    found, length = _training(files, source), config.train.sequence_length
    if (most := most_tokens(files, source)) <= length:
        raise DataError(
            f"source {source!r}: its train files hold {most:,} bytes, fewer than the tokens of one sequence, {length} "
            "+ 1: add text, leave it out, or lower train.sequence_length"
        )
    scratch = config.workdir / ".fetch"
    for file in found:
        try:
            with open_input(file, config.storage, scratch) as path:
                records = read_records(path, config.data.text_key)
                if any(isinstance(record, Document) and not record.is_empty for record in records):
                    return
        except (DataError, OSError):
            return
    raise DataError(
        f"source {source!r} has no text: none of the records of its {len(found)} train files holds any "
        f"({sum(file.size for file in found):,} bytes): correct data.text_key or the files, or leave the source out"
    )


def most_tokens(files: Sequence[InputFile], source: str) -> int:
    """More than a source's training split can hold; no bound for packed files, whose text may be of any size."""
    sizes = [(_NO_BOUND if _is_packed(file) else file.size) for file in _training(files, source)]
    return max(1, sum(sizes))


def estimated_tokens(files: Sequence[InputFile], source: str) -> int:
    """Tokens of a source's training split; at least 1."""
    sizes = (file.size * (_PACKED if _is_packed(file) else 1.0) for file in _training(files, source))
    return max(1, int(sum(sizes) / _BYTES_PER_TOKEN))


def _training(files: Sequence[InputFile], source: str) -> list[InputFile]:
    return [file for file in files if (file.source, file.split) == (source, "train")]


def _is_packed(file: InputFile) -> bool:
    return file.name.endswith((*COMPRESSIONS, ".parquet"))
