"""A NeoX or training checkpoint to a folder that transformers loads, and the proof that it is the same model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from neox_core.artifact import write_atomically
from neox_core.checkpoint.files import write_file
from neox_core.checkpoint.huggingface import config_files
from neox_core.checkpoint.huggingface_tokenizer import (
    TOKENIZER_MODEL,
    compare_tokenizers,
    load_sentencepiece,
    tokenizer_files,
)
from neox_core.checkpoint.layout import Layer, iterate_layers, to_huggingface
from neox_core.checkpoint.neox import NeoxCheckpoint
from neox_core.checkpoint.proof import TOLERANCE, compare_logits, judge
from neox_core.config import ModelConfig
from neox_core.errors import ConfigError
from neox_core.progress import Progress, silent

_MAX_FILE_BYTES = 5_000_000_000
_INDEX_FILE = "model.safetensors.index.json"
_PROBES = (
    "",
    " ",
    "   Let  $x\\in\\mathbb{R}$.\n\n\tThen   ",
    "<s>text</s> <unk> <0x0A>",
    "naïve ∀ε>0 ∃δ, 数学 🙂\r\n",
    "def f(n):\n        return n ** 2  # 1234567890\n",
    "=" * 41 + " " * 37 + "-" * 23,
)
"""Texts on which tokenizers tend to part ways."""


def export_huggingface(
    source: Path,
    target: Path,
    model: ModelConfig,
    tokenizer: Path,
    sequence_length: int,
    progress: Progress = silent,
    max_file_bytes: int = _MAX_FILE_BYTES,
) -> None:
    """Write `target`: safetensors (several with an index above `max_file_bytes`), tokenizer, and config.json last.

    Args:
        source: folder of a NeoX checkpoint or of a training checkpoint, any tensor and pipeline parallelism.
        target: folder to write; an earlier export in it is replaced.
        model: the checkpoint's architecture.
        tokenizer: SentencePiece model.
        sequence_length: longest sequence that the model was trained on.
        progress: told how far it is.
        max_file_bytes: size that a file of weights is kept under where one layer allows it.

    Raises:
        CheckpointError: the checkpoint or the tokenizer is missing, damaged or does not fit the model.
        ConfigError: the tokenizer has more pieces than the model's vocabulary.
    """
    checkpoint = NeoxCheckpoint(source)
    pieces = load_sentencepiece(tokenizer)
    if pieces.vocab_size() > model.vocab_size:
        raise ConfigError(
            f"tokenizer {tokenizer} has {pieces.vocab_size()} pieces, more than model.vocab_size {model.vocab_size}"
        )
    texts = tokenizer_files(tokenizer, sequence_length)
    dtype = next(iter(checkpoint.layer(0, 0).values())).dtype
    texts |= config_files(model, sequence_length, dtype, pieces.bos_id(), pieces.eos_id())
    _remove_earlier(target)
    _write_weights(checkpoint, target, model, dtype, max_file_bytes, progress)
    write_file(target / TOKENIZER_MODEL, lambda temporary: shutil.copyfile(tokenizer, temporary))
    for name in sorted(texts, key="config.json".__eq__):
        write_atomically(target / name, texts[name])


def prove_export(
    checkpoint: NeoxCheckpoint, folder: Path, model: ModelConfig, texts: Sequence[str] = ()
) -> dict[str, Any]:
    """Load the folder as its users will and compare logits (fp32) and token ids; yields a summary.

    `texts` are encoded beside some that are known to be hard.

    Raises:
        CheckpointError: logits differ by more than 1e-4, or a text's ids are not SentencePiece's.
    """
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    difference = compare_logits(checkpoint, loaded, model)
    summary = judge(difference, TOLERANCE, f"the checkpoint {checkpoint.folder} and the export {folder}")
    samples = [*_PROBES, *texts]
    return summary | {"tokenizer_texts": len(samples), "tokenizer_tokens": compare_tokenizers(folder, samples)}


def _remove_earlier(target: Path) -> None:
    """Remove an earlier export's config first, so that what is left is no model."""
    for pattern in ("config.json", _INDEX_FILE, "model*.safetensors"):
        for path in target.glob(pattern):
            path.unlink()


def _write_weights(
    checkpoint: NeoxCheckpoint, target: Path, model: ModelConfig, dtype: torch.dtype, limit: int, progress: Progress
) -> None:
    groups = list(_group(list(iterate_layers(model.num_layers)), model, dtype.itemsize, limit))
    places: dict[str, str] = {}
    size = 0
    for number, layers in enumerate(groups, start=1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for layer in layers:
            tensors |= to_huggingface(layer, checkpoint.full_layer(layer.index), model)
        content = {key: tensor.contiguous() for key, tensor in tensors.items()}
        _save(target / name, content)
        places |= dict.fromkeys(content, name)
        size += sum(tensor.nbytes for tensor in content.values())
        progress(number / len(groups), f"{number} of {len(groups)} files, {size / 1e9:.2f} GB")
    if len(groups) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_atomically(target / _INDEX_FILE, json.dumps(index, indent=2, sort_keys=True))


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def _group(layers: list[Layer], model: ModelConfig, itemsize: int, limit: int) -> Iterator[list[Layer]]:
    """Layers in order, in groups that stay under `limit` bytes where a single layer does."""
    group: list[Layer] = []
    size = 0
    for layer in layers:
        more = itemsize * sum(prod(tensor.shape(model)) for tensor in layer.tensors)
        if group and size + more > limit:
            yield group
            group, size = [], 0
        group.append(layer)
        size += more
    yield group
