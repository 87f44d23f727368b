"""Where documents begin, for attention that stays within them."""

from __future__ import annotations

from bisect import bisect_left
from functools import partial

import numpy as np

from neox_core.data.indexed import IndexedDataset, Tokens


def document_starts(dataset: IndexedDataset, start: int, stop: int) -> Tokens:
    """Places of the tokens in [start, stop) that begin a document, in order, int64.

    Found by bisection in the mapped index, so that the cost grows with the logarithm of the number of documents.
    """
    documents = range(len(dataset.document_index) - 1)
    token_of = partial(_first_token, dataset)
    first = bisect_left(documents, start, key=token_of)
    last = bisect_left(documents, stop, lo=first, key=token_of)
    return np.array([token_of(document) for document in range(first, last)], dtype=np.int64)


def _first_token(dataset: IndexedDataset, document: int) -> int:
    """Place of a document's first token."""
    sequence = int(dataset.document_index[document])
    return int(dataset.offsets[sequence]) // dataset.dtype.itemsize if sequence < len(dataset) else len(dataset.tokens)


def restarting_positions(starts: Tokens, length: int) -> Tokens:
    """Position of each of `length` tokens within its document, int64 [length]; `starts` are where documents begin.

    The first token has position 0 also when its document began earlier, since nothing before it is seen.
    """
    begin = np.zeros(length, dtype=np.int64)
    begin[starts] = starts
    return np.arange(length) - np.maximum.accumulate(begin)
