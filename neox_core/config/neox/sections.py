"""GPT-NeoX's settings renamed into the sections of our configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from posixpath import normpath
from typing import Any

from neox_core.config.neox.mlp import intermediate_size
from neox_core.config.neox.names import source_names
from neox_core.config.neox.recipe import optimizer, precision, schedule
from neox_core.config.neox.settings import NeoxSettings, as_number
from neox_core.errors import ConfigError

_LLEMMA_NODES, _LLEMMA_GPUS_PER_NODE = 32, 8


def model_section(settings: NeoxSettings, folder: Path) -> dict[str, Any]:
    """The architecture. GPT-NeoX does not keep the vocabulary's size: it is read from the tokenizer if that is there.

    Args:
        folder: where a relative vocab_file is looked for.
    """
    hidden = settings.need_whole("hidden_size")
    return {
        "num_layers": settings.need("num_layers"),
        "hidden_size": hidden,
        "num_attention_heads": settings.need("num_attention_heads"),
        "num_kv_heads": _kv_heads(settings),
        "intermediate_size": intermediate_size(settings, hidden),
        "vocab_size": _vocab_size(settings, folder),
        "rope_theta": settings.default("rotary_emb_base", "model.rope_theta"),
        "norm_eps": as_number("rms_norm_epsilon", settings.default("rms_norm_epsilon", "model.norm_eps")),
    }


def _kv_heads(settings: NeoxSettings) -> int:
    heads, kv_heads = settings.need_whole("num_attention_heads"), settings.whole("num_kv_heads")
    kind = settings.get("attention_type")
    expected = {"multihead": heads, "multiquery": 1, "groupedquery": kv_heads, None: kv_heads or heads}
    if kind not in expected:
        raise ConfigError(f"GPT-NeoX key 'attention_type' is {kind!r}: accepted: multihead, groupedquery, multiquery")
    found = expected[kind]
    if found is None or kv_heads not in (None, found):
        raise ConfigError(
            f"GPT-NeoX keys attention_type {kind!r}, num_attention_heads {heads} and num_kv_heads {kv_heads} disagree"
        )
    return found


def _vocab_size(settings: NeoxSettings, folder: Path) -> int:
    """The tokenizer's size, rounded up as GPT-NeoX pads it."""
    if padded := settings.whole("padded_vocab_size"):
        return padded
    size = 32000
    tokenizer = folder / str(settings.get("vocab_file") or "")
    if tokenizer.is_file():
        from sentencepiece import SentencePieceProcessor

        try:
            size = SentencePieceProcessor(model_file=str(tokenizer)).vocab_size()
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"GPT-NeoX key 'vocab_file' names {tokenizer}, which is no SentencePiece model ({error}): correct it"
            ) from None
    else:
        settings.todo.append(
            (
                "model.vocab_size",
                "32000 is a placeholder, since vocab_file was not found: take the tokenizer's size "
                "(CodeLlama 7B and 13B: 32016; 34B: 32000)",
            )
        )
    divisor = _divisor(settings) * _tensor(settings)
    return int(-(-size // divisor) * divisor)


def _divisor(settings: NeoxSettings) -> int:
    given = settings.whole("make_vocab_size_divisible_by")
    return given or int(settings.default("make_vocab_size_divisible_by", "model.vocab_size"))


def _tensor(settings: NeoxSettings) -> int:
    return settings.whole("model_parallel_size") or 1


def parallel_section(settings: NeoxSettings) -> dict[str, Any]:
    """Degrees of parallelism; GPT-NeoX writes 0 for no pipeline."""
    return {"tensor": _tensor(settings), "pipeline": settings.whole("pipe_parallel_size", least=0) or 1}


def launch_section(settings: NeoxSettings) -> dict[str, Any]:
    """Nodes and GPUs. GPT-NeoX's files seldom name them; then a run of Llemma's size is assumed."""
    ranks = settings.whole("num_gpus") or _LLEMMA_GPUS_PER_NODE
    nodes, world = settings.whole("num_nodes", least=-1), settings.whole("world_size", "global_num_gpus")
    if nodes is None or nodes < 1:
        nodes = world // ranks if world else None
    if nodes is None:
        nodes = _LLEMMA_NODES
        settings.todo.append(
            (
                "launch.nodes",
                f"{nodes} nodes x {ranks} GPUs are Llemma's: GPT-NeoX's batch grows with the number of "
                "GPUs; if yours was another, train.global_batch_tokens changes in proportion",
            )
        )
    if world and world != nodes * ranks:
        raise ConfigError(f"GPT-NeoX's num_nodes {nodes} x num_gpus {ranks} is not its world size {world}")
    executor = "slurm" if settings.get("launcher") == "slurm" else "auto"
    return {"executor": executor, "nodes": nodes, "ranks_per_node": ranks}


def train_section(settings: NeoxSettings, launch: dict[str, Any], parallel: dict[str, Any]) -> dict[str, Any]:
    """The recipe. The batch becomes tokens: sequence x micro batch x accumulation x data-parallel ranks."""
    steps, length = settings.need_whole("train_iters"), settings.need_whole("seq_length")
    micro = settings.need_whole("train_micro_batch_size_per_gpu", "batch_size")
    checkpointing = settings.default("checkpoint_activations", "train.activation_checkpointing")
    return {
        "steps": steps,
        "sequence_length": length,
        "global_batch_tokens": _sequences(settings, micro, launch, parallel) * length,
        "micro_batch_size": micro,
        "optimizer": optimizer(settings),
        "schedule": schedule(settings, steps),
        "validation": {
            "interval": settings.default("eval_interval", "train.validation.interval"),
            "iterations": settings.default("eval_iters", "train.validation.iterations"),
        },
        "checkpoint_interval": settings.need("checkpoint_factor", "save_interval"),
        "precision": precision(settings),
        "gradient_clip": settings.default("gradient_clipping", "train.gradient_clip", "clip_grad"),
        "activation_checkpointing": "full" if checkpointing else "none",
        "log_interval": settings.default("log_interval", "train.log_interval"),
    }


def _sequences(settings: NeoxSettings, micro: int, launch: dict[str, Any], parallel: dict[str, Any]) -> int:
    """Sequences of a global batch."""
    total, accumulation = settings.whole("train_batch_size"), settings.whole("gradient_accumulation_steps", "gas")
    model_ranks, world = parallel["tensor"] * parallel["pipeline"], launch["nodes"] * launch["ranks_per_node"]
    if world % model_ranks:
        raise ConfigError(
            f"{launch['nodes']} nodes x {launch['ranks_per_node']} GPUs are not divisible by model_parallel_size x "
            f"pipe_parallel_size {model_ranks}: set num_nodes and num_gpus in the GPT-NeoX file"
        )
    if total and not accumulation:
        return int(total)
    accumulation = accumulation or settings.default("gradient_accumulation_steps", "train.global_batch_tokens")
    sequences = int(micro * accumulation * world // model_ranks)
    if total and total != sequences:
        raise ConfigError(
            f"GPT-NeoX's train_batch_size {total} is not micro batch {micro} x accumulation {accumulation} x "
            f"{world // model_ranks} data-parallel ranks = {sequences}: set num_nodes and num_gpus in the GPT-NeoX file"
        )
    return sequences


def _paths(written: Sequence[str]) -> list[str]:
    """Of two spellings of one path, a//b and ./a/b, one."""
    return [normpath(path) for path in written]


def data_section(settings: NeoxSettings) -> dict[str, Any]:
    """Sources and weights. Token files become source names; the text they were made from must be supplied."""
    if settings.get("train_data_paths") and settings.get("data_path"):
        raise ConfigError("GPT-NeoX keys data_path and train_data_paths are both set: keep one")
    paths = _paths(settings.get("train_data_paths") or [settings.need("data_path")])
    weights = settings.get("train_data_weights") or [1.0] * len(paths)
    if len(weights) != len(paths):
        raise ConfigError(f"GPT-NeoX has {len(paths)} train_data_paths but {len(weights)} train_data_weights")
    known = source_names(paths)
    sources: dict[str, dict[str, float]] = {name: {"weight": 0} for name in known.values()}
    for path, weight in zip(paths, weights, strict=True):  # a path that is given twice counts twice
        sources[known[path]]["weight"] += as_number("train_data_weights", weight)
    validation, test = (
        list(source_names(_paths(settings.get(key) or []), known).values())
        for key in ("valid_data_paths", "test_data_paths")
    )
    evaluated = list(dict.fromkeys([*validation, *test]))
    if set(validation) != set(test):
        settings.todo.append(("data.eval_sources", f"check it: GPT-NeoX validates on {validation} and tests on {test}"))
    sources |= {name: {"weight": 0} for name in evaluated if name not in sources}
    settings.todo.append(
        (
            "data.input",
            f"put the text of {', '.join(sources)} into <data.input>/<source>/<split>/: prepare-data makes "
            "the token files that GPT-NeoX's data paths point to",
        )
    )
    return {"input": "../data/text", "sources": sources, "eval_sources": evaluated}


def wandb_section(settings: NeoxSettings) -> dict[str, Any]:
    """W&B is on, off, or left to what is logged in."""
    wanted = settings.get("use_wandb")
    if wanted not in (True, False, None):
        raise ConfigError(f"GPT-NeoX key 'use_wandb' is {wanted!r}: give true or false")
    mode = "offline" if wanted is None else ("online" if wanted else "disabled")
    section = {"mode": mode, "project": settings.get("wandb_project"), "entity": settings.get("wandb_team")}
    return {key: value for key, value in section.items() if value is not None}
