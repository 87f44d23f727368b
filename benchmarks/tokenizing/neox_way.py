"""What GPT-NeoX's preprocess_data does (SPMTokenizer, --append-eod), without its progress bar.

    python benchmarks/tokenizing/neox_way.py MODEL WORKERS PREFIX FILE.jsonl.zst ...

preprocess_data also imports torch, which it needs for nothing here; this does so if IMPORT_TORCH is in the environment.

The main process builds the tokenizer, for the size of its vocabulary, then each encoder its own. One process reads and
parses; a pool of forked encoders takes texts in batches of 25 and sends lists of ids back; one
writer makes an array of each document's list (`add_item`), appends it to the .bin and keeps its length for the .idx.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import struct
import sys
from collections.abc import Iterator
from threading import Semaphore

import numpy as np
import sentencepiece
import zstandard


class _Encoder:
    """Holds what a worker of the pool needs."""

    tokenizer: sentencepiece.SentencePieceProcessor

    @classmethod
    def start(cls, model: str) -> None:
        cls.tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)

    @classmethod
    def encode(cls, text: str) -> tuple[dict[str, list[list[int]]], int]:
        ids = cls.tokenizer.encode(text)
        ids.append(cls.tokenizer.eos_id())
        return {"text": [ids]}, len(text)


def _texts(paths: list[str], ahead: Semaphore) -> Iterator[str]:
    for path in paths:
        with open(path, "rb") as file:
            for line in io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file)):
                if text := json.loads(line)["text"]:
                    ahead.acquire()
                    yield text


def main() -> None:
    """Write PREFIX.bin and PREFIX.idx of the files' texts."""
    model, workers, prefix, *paths = sys.argv[1:]
    if "IMPORT_TORCH" in os.environ:
        import torch  # noqa: F401
    dtype = np.uint16 if sentencepiece.SentencePieceProcessor(model_file=model).vocab_size() < 65500 else np.int32
    ahead = Semaphore(10_000 + int(workers))
    sizes: list[int] = []
    with multiprocessing.Pool(int(workers), _Encoder.start, (model,)) as pool, open(f"{prefix}.bin", "wb") as file:
        for document, _ in pool.imap(_Encoder.encode, _texts(paths, ahead), chunksize=25):
            ahead.release()
            for ids in document["text"]:
                item = np.array(ids, dtype=dtype)
                file.write(item.tobytes(order="C"))
                sizes.append(item.size)
        pool.close()
        pool.join()
    starts = np.cumsum([0, *sizes[:-1]], dtype=np.int64) * np.dtype(dtype).itemsize
    with open(f"{prefix}.idx", "wb") as file:
        file.write(
            struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8 if dtype is np.uint16 else 4, len(sizes), len(sizes) + 1)
        )
        file.write(np.array(sizes, np.int32).tobytes() + starts.tobytes() + np.arange(len(sizes) + 1).tobytes())


if __name__ == "__main__":
    main()
