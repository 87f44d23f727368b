"""A NeoX or training checkpoint to Hugging Face's or Meta's format, and the proof that it is the same model."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from neox_core.checkpoint.conversion.convert import sizes
from neox_core.checkpoint.conversion.proof import prove
from neox_core.checkpoint.conversion.replacement import replacing
from neox_core.checkpoint.conversion.vocabulary import check_tokenizer
from neox_core.checkpoint.formats.huggingface import huggingface_files, index_file
from neox_core.checkpoint.formats.huggingface_config import config_files
from neox_core.checkpoint.formats.huggingface_tokenizer import (
    PLAIN_TOKENIZER,
    compare_tokenizers,
    tokenizer_files,
    tokenizer_problem,
)
from neox_core.checkpoint.formats.meta import meta_files
from neox_core.checkpoint.formats.meta_params import meta_params
from neox_core.checkpoint.formats.model_files import CONFIG_FILE, INDEX_FILE, PARAMS_FILE
from neox_core.checkpoint.formats.model_weights import ModelWeights
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.checkpoint.formats.outputs import OutputFile, finished_files, write_files
from neox_core.checkpoint.formats.special_ids import GENERATION_FILE, SpecialIds, config_differences
from neox_core.checkpoint.formats.tokenizer_folder import tiktoken_folder, tokenizer_folder
from neox_core.config import ModelConfig
from neox_core.config.families import FamilyName
from neox_core.data.tokenization.tokenizer_file import (
    COMPANIONS,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    TokenizerKind,
    kind_of_file,
    load_model,
)
from neox_core.progress import Progress, silent
from neox_core.storage.folders import Location, small_files
from neox_core.storage.targets import Target, open_target

ExportProof = Callable[[Location], Mapping[str, Any]]
"""Compares an export with the checkpoint, raises CheckpointError if it is not the same model, and yields a summary."""
_MODEL_FILES = (
    *("model*.safetensors", "consolidated.[0-9]*.pth", INDEX_FILE, CONFIG_FILE, PARAMS_FILE, GENERATION_FILE),
    *(TOKENIZER_JSON, *COMPANIONS, TOKENIZER_MODEL, PLAIN_TOKENIZER),
)
"""What is left of another model would be taken for a part of this one."""
_MAX_FILE_BYTES = 5_000_000_000
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
    source: Location,
    target: Location,
    model: ModelConfig,
    tokenizer: Path | None,
    sequence_length: int,
    progress: Progress = silent,
    max_file_bytes: int = _MAX_FILE_BYTES,
    special: SpecialIds | None = None,
    prove: ExportProof | None = None,
) -> dict[str, Any]:
    """Write `target`: safetensors (several with an index above `max_file_bytes`), tokenizer, and config.json last.

    Padding of the vocabulary is cut off. An interrupted export continues with the next file. Yields a summary.

    Args:
        source: folder of a NeoX checkpoint or of a training checkpoint, any tensor and pipeline parallelism.
        target: folder to write; an export of something else in it is replaced.
        model: the checkpoint's architecture.
        tokenizer: its file, of any kind that is read; None: the folder gets none. A tokenizer.json is exported as it
            is, with the files next to it that belong to it; a SentencePiece model as an equal tokenizer.json. One that
            has no equal in Hugging Face's format is exported as it is, and the summary says so.
        sequence_length: longest sequence that the model was trained on.
        progress: called with how far it is.
        max_file_bytes: size that a file of weights is kept under where one layer allows it.
        special: the base's special ids and generation settings; None or empty: the tokenizer's ids.
        prove: called with the folder before it takes the place of an older export.

    Raises:
        CheckpointError: the checkpoint or the tokenizer is missing, damaged or does not fit the model.
        ConfigError: the tokenizer has more pieces than the model has tokens.
    """
    checkpoint = NeoxCheckpoint(source)
    if tokenizer is not None:
        check_tokenizer(tokenizer, model)
    known = _special_ids(tokenizer, special)
    weights, exported = checkpoint.weights(model), without_padding(model)
    texts = config_files(exported, sequence_length, weights.dtype, known)
    files = huggingface_files(weights, exported, weights.dtype, max_file_bytes)
    note: dict[str, str] = {}
    if special is not None and special.config is not None:
        changes = config_differences(special.config, json.loads(texts[CONFIG_FILE]))
        note["changes_in_config.json"] = changes or "none"
    others = {name: text.encode() for name, text in texts.items() if name != CONFIG_FILE}
    if len(files) > 1:
        others[INDEX_FILE] = index_file(files).encode()
    if tokenizer is not None:
        others |= _tokenizer(tokenizer, model.family, sequence_length, known, note)
    others[CONFIG_FILE] = texts[CONFIG_FILE].encode()
    return _write(open_target(target), weights, files, others, progress, prove) | note


def _special_ids(tokenizer: Path | None, base: SpecialIds | None) -> SpecialIds:
    """The base's special ids, or where it gives none those of the tokenizer."""
    if tokenizer is None or (base is not None and base.ids):
        return base or SpecialIds()
    pieces = load_model(tokenizer)
    ids = {"bos_token_id": pieces.bos_id, "eos_token_id": pieces.eos_id}
    return SpecialIds({key: value for key, value in ids.items() if value >= 0}, base.generation if base else None)


def _tokenizer(
    tokenizer: Path, family: FamilyName, sequence_length: int, special: SpecialIds, note: dict[str, str]
) -> dict[str, bytes]:
    """The tokenizer's files; `note` gets a line where only its own file is exported."""
    kind = kind_of_file(tokenizer)
    if kind is TokenizerKind.JSON:
        return tokenizer_folder(tokenizer, special)
    if kind is TokenizerKind.TIKTOKEN:
        return tiktoken_folder(tokenizer, special)
    if problem := tokenizer_problem(tokenizer, family):
        note["tokenizer"] = (
            f"it {problem}, so no equal tokenizer.json can be written: {PLAIN_TOKENIZER} is its own file, to be read "
            "with sentencepiece"
        )
        return {PLAIN_TOKENIZER: tokenizer.read_bytes()}
    texts = {name: text.encode() for name, text in tokenizer_files(tokenizer, sequence_length).items()}
    return texts | {TOKENIZER_MODEL: tokenizer.read_bytes()}


def export_meta(
    source: Location,
    target: Location,
    model: ModelConfig,
    shards: int,
    progress: Progress = silent,
    prove: ExportProof | None = None,
) -> dict[str, Any]:
    """Write `target` in Meta's format: consolidated.NN.pth, and params.json last. Yields a summary.

    Padding of the vocabulary is cut off. An interrupted export continues with the next file.

    Args:
        source: folder of a NeoX checkpoint or of a training checkpoint, any tensor and pipeline parallelism.
        target: folder to write; an export of something else in it is replaced.
        model: the checkpoint's architecture.
        shards: number of files; Meta has 1 for 7B, 2 for 13B, 4 for 34B, 8 for 70B.
        progress: called with how far it is.
        prove: called with the folder before it takes the place of an older export.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or does not fit the model.
        ConfigError: the model cannot be cut into that many shards, or its positions are scaled in a way that Meta's
            format has no words for.
    """
    exported = without_padding(model)
    params = json.dumps(meta_params(exported), indent=1)
    weights = NeoxCheckpoint(source).weights(model)
    files = meta_files(weights, exported, shards, weights.dtype)
    return _write(open_target(target), weights, files, {PARAMS_FILE: params.encode()}, progress, prove)


def without_padding(model: ModelConfig) -> ModelConfig:
    """The architecture with the vocabulary's padding cut off."""
    return model.model_copy(update={"vocab_size": model.num_tokens, "unpadded_vocab_size": None})


def _write(
    output: Target,
    weights: ModelWeights,
    files: list[OutputFile],
    others: Mapping[str, bytes],
    progress: Progress,
    prove: ExportProof | None,
) -> dict[str, Any]:
    """Write the weights and then the others; the last one makes the folder a model, so it goes if anything changes."""
    started = time.monotonic()
    identity, last = _identity(weights, files, others), list(others)[-1]
    with output.locked(), replacing(output, identity, last, _is_model_file) as folder:
        finished = finished_files(folder, identity, files)
        if len(finished) < len(files):
            folder.remove(last)
        records = write_files(folder, identity, files, progress, finished, list(others))
        for name, content in others.items():
            folder.write(name, content)
        proof = {} if prove is None else dict(prove(folder))
    progress(1.0, f"{len(records)} files written")
    return sizes(records, finished, time.monotonic() - started) | proof


def _is_model_file(path: str) -> bool:
    return "/" not in path and any(fnmatch(path, pattern) for pattern in _MODEL_FILES)


def _identity(weights: ModelWeights, files: list[OutputFile], others: Mapping[str, bytes]) -> str:
    """What a half-finished attempt must have been about to be continued."""
    contents = {place.stored.content for places in weights.places.values() for place in places}
    logical = {
        "source": sorted([content.name, content.version] for content in contents),
        "model": weights.model.model_dump(mode="json"),
        "files": [[file.path, [[tensor.name, tensor.shape] for tensor in file.tensors]] for file in files],
        "others": {name: hashlib.sha256(content).hexdigest() for name, content in others.items()},
    }
    return hashlib.sha256(json.dumps(logical, sort_keys=True).encode()).hexdigest()


def prove_export(
    checkpoint: NeoxCheckpoint,
    folder: Location,
    model: ModelConfig,
    texts: Sequence[str] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare an export with the checkpoint: every layer, small models' logits, and token ids; yields a summary.

    `texts` are encoded, and some that are known to be hard.

    Raises:
        CheckpointError: they differ (see `prove`), or a text's ids are not SentencePiece's.
    """
    summary = prove(checkpoint, folder, model, progress=progress)
    samples = [*_PROBES, *texts]
    with small_files(folder) as local:
        path = local / TOKENIZER_MODEL
        if not path.is_file():  # none, or a tokenizer.json as it was
            return summary
        return summary | {"tokenizer_texts": len(samples), "tokenizer_tokens": compare_tokenizers(local, samples)}
