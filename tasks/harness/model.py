"""The harness's language model on a local folder, and how many requests it takes at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neox_core.errors import CheckpointError, ConfigError
from tasks.harness.catalogue import TASKS
from tasks.harness.settings import HarnessSettings, read_json

_INSTALL = "install it with `pip install 'llemma-pretrain[harness]'`"
_CPU_BATCH = 8
_LARGEST_BATCH = 256
_MEMORY_SHARE = 0.5
"""Of the free memory that may be filled so; activations take of the rest."""
_BYTES = 4
"""Of a key's or value's number, in fp32."""
_LOGIT_BYTES = 12
"""A logit, its copy in fp32 and its log-probability."""


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


def load_model(settings: HarnessSettings) -> Any:
    """The harness's model.

    Raises:
        ConfigError: the answer's length leaves no room for a prompt, the backend is not installed, or the tokenizer
            has no token that ends a text.
        CheckpointError: the model is not whole, or computes no numbers.
    """
    import torch
    from lm_eval.api.registry import get_model

    length = _number(model_config(settings.model), settings.model, "max_position_embeddings", "n_positions")
    if settings.max_tokens >= length:
        raise ConfigError(
            f"--max-tokens {settings.max_tokens} leaves no room for a prompt in the model's {length}: give fewer"
        )
    arguments = {"pretrained": str(settings.model), "max_length": length, "dtype": settings.dtype}
    if settings.backend == "vllm":
        try:
            return _loaded(settings.model, get_model("vllm"), **arguments, batch_size="auto", seed=settings.seed)
        except ImportError as error:
            raise ConfigError(f"backend vllm is missing ({error}): `pip install vllm`, or --backend hf") from None
    _check_whole(settings.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # In bf16 a log-probability has three digits.
    model = _loaded(settings.model, get_model("hf"), **arguments, device=device, batch_size=1, softmax_dtype="float32")
    _check_tokenizer(settings, model.tokenizer)
    _check_numbers(settings, model)
    model.model.generation_config = _plain(model.model.generation_config)
    return model


def _check_whole(folder: Path) -> None:
    """Whether there are weights for all that config.json describes: transformers draws the others at random.

    Reads their names and shapes alone.

    Raises:
        CheckpointError: there are not.
    """
    from transformers import AutoModelForCausalLM

    if "quantization_config" in model_config(folder):  # its tensors have other names, and want a device
        return
    arguments = {"pretrained_model_name_or_path": str(folder), "device_map": "meta", "output_loading_info": True}
    _, found = _loaded(folder, AutoModelForCausalLM.from_pretrained, **arguments)
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{folder} cannot be loaded: it has no weights for {len(missing)} tensors of its config.json, among them "
            f"{missing[0]}: export the model again, or fetch what is missing"
        )


def _check_tokenizer(settings: HarnessSettings, tokenizer: Any) -> None:
    """Whether it names the tokens that the harness asks for: what ends a written answer, and what likelihoods begin
    with.

    Raises:
        ConfigError: it does not.
    """
    written = any(TASKS[name].kind == "written" for name in settings.tasks)
    if tokenizer.eos_token_id is None and (written or tokenizer.bos_token_id is None):
        raise ConfigError(
            f"the tokenizer in {settings.model} names no token that ends a text: give eos_token in its "
            "tokenizer_config.json"
        )


def _plain(found: Any) -> Any:
    """A model's generation_config.json with nothing but its tokens: its penalties, beams and lengths are for chats, and
    would change greedy answers and the length that was asked for."""
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=found.bos_token_id, eos_token_id=found.eos_token_id, pad_token_id=found.pad_token_id
    )


def _loaded(folder: Path, kind: Callable[..., Any], **arguments: Any) -> Any:
    """The harness's model.

    Raises:
        CheckpointError: what lies in the folder is no whole model.
    """
    from safetensors import SafetensorError

    try:
        return kind(**arguments)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded ({type(error).__name__}: {error}): export the model again, or fetch what is "
            "missing"
        ) from error


def _check_numbers(settings: HarnessSettings, model: Any) -> None:
    """Whether the model computes numbers, now and whenever it is called: what is written without them looks like an
    answer. Of other texts the likelihood tells.

    Raises:
        CheckpointError: it does not.
    """
    import torch

    def check(module: Any, arguments: Any, output: Any) -> None:
        # Of one place alone when a token is written; what a likelihood's batch is padded with may have none.
        if output.logits.shape[1] == 1 and bool(output.logits.isnan().any()):
            raise CheckpointError(
                f"{settings.model}: there are logits that are not a number: the weights are damaged, or --dtype "
                f"{settings.dtype} cannot hold what it computes; try --dtype float32, or export the model again"
            )

    model.model.register_forward_hook(check)
    model._model_call(torch.tensor([[model.prefix_token_id]], device=model.device))


def model_config(model: Path) -> dict[str, Any]:
    """What config.json says.

    Raises:
        ConfigError: it is not a JSON object.
    """
    return read_json(model / "config.json", "export the model again")


def _number(config: dict[str, Any], model: Path, *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise ConfigError(f"{model}/config.json has no {names[0]}: give a causal language model's folder")


def fitting_batch(settings: HarnessSettings, tokens: int, written: bool) -> int:
    """How many requests go through the model at once: as many as the device's free memory holds.

    Args:
        tokens: of the longest request.
        written: an answer is generated; otherwise each token's logits are needed.
    """
    import torch

    if settings.backend == "vllm":  # it makes batches of its own
        return _LARGEST_BATCH
    if not torch.cuda.is_available():
        return _CPU_BATCH
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return batch_for(model_config(settings.model), free, tokens + settings.max_tokens * written, logits=not written)


def batch_for(config: dict[str, Any], free: int, tokens: int, logits: bool) -> int:
    """Sequences of so many tokens whose keys and values, and logits if wanted, fill half of `free` bytes."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kept = 2 * _BYTES * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * head_dim
    kept += _LOGIT_BYTES * config["vocab_size"] * logits
    return max(1, min(_LARGEST_BATCH, int(free * _MEMORY_SHARE) // (kept * tokens)))
