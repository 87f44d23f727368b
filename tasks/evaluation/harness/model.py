"""The harness's language model on a local folder, and how many items it takes at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from neox_core.errors import ConfigError
from tasks.evaluation.harness.settings import HarnessSettings

_INSTALL = "install it with `pip install 'llemma-pretrain[harness]'`"
_CPU_BATCH = 8
_LARGEST_BATCH = 256
_MEMORY_SHARE = 0.5
"""Of the free memory that keys and values may fill; logits and activations take of the rest."""


def go_offline(cache: Path) -> None:
    """Before the harness is imported: nothing is fetched, and what data sets are turned into lies in `cache`.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"lm-evaluation-harness is missing ({error}): {_INSTALL}") from None


def load_model(settings: HarnessSettings) -> tuple[Any, int]:
    """The harness's model and its batch size.

    Raises:
        ConfigError: the answer's length leaves no room for a prompt, or the backend is not installed.
    """
    import torch
    from lm_eval.api.registry import get_model

    length = int(json.loads((settings.model / "config.json").read_text())["max_position_embeddings"])
    if settings.max_tokens >= length:
        raise ConfigError(
            f"--max-tokens {settings.max_tokens} leaves no room for a prompt in the model's {length}: give fewer"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = {"pretrained": str(settings.model), "max_length": length, "dtype": "auto"}
    if settings.backend != "hf":
        try:
            return get_model(settings.backend)(**arguments, batch_size="auto"), settings.batch_size or _LARGEST_BATCH
        except ImportError as error:
            raise ConfigError(f"backend {settings.backend} is missing ({error}): install it, or use hf") from None
    model = get_model("hf")(**arguments, device=device, batch_size=settings.batch_size or _CPU_BATCH)
    batch = settings.batch_size or (_fitting_batch(settings.model, length) if device == "cuda" else _CPU_BATCH)
    model.batch_size_per_gpu = batch
    return model, batch


def _fitting_batch(model: Path, length: int) -> int:
    """Sequences of full length whose keys and values fit."""
    import torch

    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    per_token = 2 * 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * head_dim
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(_LARGEST_BATCH, int(free * _MEMORY_SHARE) // (per_token * length)))
