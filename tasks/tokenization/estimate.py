"""What a mixture would take of each source, by the sizes of its files, before anything is tokenized."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from neox_core.config import RunConfig, sequences_before
from neox_core.data.dataset import consumption
from neox_core.data.mixture_weights import training_mixture
from neox_core.data.tokenization.readers import InputFile
from neox_core.data.tokenization.readers.lines import COMPRESSIONS
from neox_core.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_BYTES_PER_TOKEN = 3.0
"""Of English text and code; fewer for mathematics. An estimate errs by half."""
_PACKED = 3.5
"""Bytes of text in a byte of a compressed file."""


def warn_of_repeats(files: Sequence[InputFile], config: RunConfig) -> None:
    """Warn of each source that the run would, by the size of its files, repeat more than data.max_epochs times.

    The ledger refuses it when the tokens are counted.
    """
    tokens = {name: estimated_tokens(files, name) for name in config.data.sources}
    total = sequences_before(config.train, config.train.steps + 1)
    try:
        taken = training_mixture(config, tokens.__getitem__).consumed(total)
    except (ConfigError, DataError):
        return  # amounts in epochs that add up only when tokens are counted
    for name, sequences in taken.items():
        epochs = consumption(sequences, config.train.sequence_length, tokens[name])["epochs"]
        if epochs > config.data.max_epochs:
            logger.warning(
                "source %r holds about %s tokens by the size of its files, and the run would repeat it about %.3g "
                "times, more than data.max_epochs %g: unless the estimate is far off, prepare-data will end with an "
                "error; lower its weight or train.steps, or raise data.max_epochs",
                name,
                f"{tokens[name]:,}",
                epochs,
                config.data.max_epochs,
            )


def estimated_tokens(files: Sequence[InputFile], source: str) -> int:
    """Tokens of a source's training split; at least 1."""
    sizes = (
        file.size * (_PACKED if file.name.endswith((*COMPRESSIONS, ".parquet")) else 1.0)
        for file in files
        if (file.source, file.split) == (source, "train")
    )
    return max(1, int(sum(sizes) / _BYTES_PER_TOKEN))
