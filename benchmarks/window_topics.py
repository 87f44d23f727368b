"""How much the topics of windows vary in the order that a training reads, against documents in a full shuffle.

    python benchmarks/window_topics.py [--text FOLDER --tokenizer FILE]

A document's topics are the shares of 64 groups of its token ids; a window's are those of its tokens. The variance of a
window's topics over many windows is what a step's gradient noise gains or loses by the order; 1.0 is that of documents
in uniformly random order. Measured on synthetic sources that are sorted by topic (in long stretches and in groups of 20
documents), and on the text of every source in FOLDER (<source>/train/). Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from neox_core.data.document_order import DocumentOrder
from neox_core.data.indexed import IndexedDataset, IndexedWriter
from neox_core.data.order_version import ORDER_VERSIONS

SEQUENCE, TOPICS, WINDOWS, EPOCHS = 4096, 64, 400, 6
SYNTHETIC = {
    "sorted, 700 tokens": (20_000, 700, 2_000),
    "in groups of 20, 700 tokens": (20_000, 700, 20),
    "sorted, 50 tokens": (200_000, 50, 20_000),
}
"""Documents, their mean length, and how many neighbours share a topic."""
Array = np.ndarray[Any, np.dtype[Any]]
Spans = Callable[[int, int], tuple[Array, Array]]
"""Documents, and how many of their tokens, of a range of an epoch's tokens."""


def make_sorted(prefix: Path, documents: int, mean: int, group: int) -> None:
    """Documents of one topic each, whose id is their only token."""
    generator, topic = np.random.default_rng(1), 0
    with IndexedWriter(prefix, np.dtype("<u2")) as writer:
        for document in range(documents):
            if document % group == 0:
                topic = int(generator.integers(TOPICS))
            writer.add_document(np.full(max(1, int(generator.exponential(mean))), topic, dtype=np.uint16))


def make_tokens(prefix: Path, folder: Path, model: Path) -> None:
    """A source's text as tokens."""
    from neox_core.data.tokenization.part_settings import TokenizerSettings
    from neox_core.data.tokenization.readers import documents
    from neox_core.data.tokenization.tokenizer import Tokenizer

    tokenizer = Tokenizer(TokenizerSettings(model))
    with IndexedWriter(prefix, tokenizer.dtype) as writer:
        for path in sorted(folder.iterdir()):
            for document in documents(path):
                writer.add_document(tokenizer.encode_document(document.text))


def variances(prefix: Path) -> dict[str, float]:
    """By version of the order, the variance of a window's topics in parts of that after a full shuffle."""
    dataset = IndexedDataset(prefix)
    topics = np.stack(
        [np.bincount(dataset[i] % TOPICS, minlength=TOPICS) / len(dataset[i]) for i in range(len(dataset))]
    )
    starts = np.arange(0, len(dataset.tokens) - SEQUENCE, SEQUENCE)
    starts = starts[:: max(1, len(starts) // WINDOWS)]

    def variance(spans_of: Callable[[int], Spans]) -> float:
        found = []
        for epoch in range(EPOCHS):
            pieces = [spans_of(epoch)(start, start + SEQUENCE) for start in starts.tolist()]
            shares = [(topics[documents] * lengths[:, None]).sum(axis=0) / SEQUENCE for documents, lengths in pieces]
            found.append(np.array(shares).var(axis=0).sum())
        return float(np.mean(found))

    shuffled = variance(lambda epoch: full_shuffle(dataset, epoch))
    return {
        str(number): round(variance(in_order(DocumentOrder(dataset, "1", *version[:2]))) / shuffled, 3)
        for number, version in ORDER_VERSIONS.items()
    }


def in_order(order: DocumentOrder) -> Callable[[int], Spans]:
    """The spans of an order's epochs."""

    def of_epoch(epoch: int) -> Spans:
        def spans(start: int, stop: int) -> tuple[Array, Array]:
            found = order.spans(epoch, start, stop)
            return found.documents, found.lengths

        return spans

    return of_epoch


def full_shuffle(dataset: IndexedDataset, epoch: int) -> Spans:
    """The spans of an epoch whose documents are permuted at random, all of them."""
    order = np.random.default_rng(100 + epoch).permutation(len(dataset))
    sizes = dataset.sizes[order].astype(np.int64)
    ends = sizes.cumsum()

    def spans(start: int, stop: int) -> tuple[Array, Array]:
        first, last = int(ends.searchsorted(start, "right")), int(ends.searchsorted(stop))
        places = np.arange(first, last + 1)
        begins = np.maximum(ends[places] - sizes[places], start)
        return order[places], np.minimum(ends[places], stop) - begins

    return spans


def main() -> None:
    """Make the sources, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "tokens")
        for name, sizes in SYNTHETIC.items():
            make_sorted(prefix, *sizes)
            results[name] = variances(prefix)
            sys.stdout.write(f"{name}: {results[name]}\n")
        for source in sorted(arguments.text.iterdir()) if arguments.text else ():
            if (source / "train").is_dir():
                make_tokens(prefix, source / "train", arguments.tokenizer)
                results[source.name] = variances(prefix)
                sys.stdout.write(f"{source.name}: {results[source.name]}\n")
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
