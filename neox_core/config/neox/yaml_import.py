"""Import of GPT-NeoX's YAML files: every key is mapped, listed as without effect, or an error."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neox_core.config.batch import batch_geometry
from neox_core.config.load import parse_config
from neox_core.config.neox.ineffective import Ineffective, ineffective_keys
from neox_core.config.neox.refusals import require_supported
from neox_core.config.neox.sections import (
    data_section,
    launch_section,
    model_section,
    parallel_section,
    train_section,
    wandb_section,
)
from neox_core.config.neox.settings import NeoxSettings, read_settings


@dataclass(frozen=True)
class NeoxImport:
    """A GPT-NeoX configuration in our form."""

    config: dict[str, Any]
    """Nested, as in our YAML files; complete and valid."""
    ineffective: tuple[Ineffective, ...]
    """GPT-NeoX's keys that change nothing here: key, value, reason."""
    todo: tuple[tuple[str, str], ...]
    """Our keys whose values are placeholders or need a look, and what to do."""


def import_neox(paths: Sequence[Path]) -> NeoxImport:
    """Read one or several GPT-NeoX files as one configuration, as GPT-NeoX's launcher merges them.

    A key that is absent has GPT-NeoX's default, which matters: its defaults are another architecture.

    Raises:
        ConfigError: a key is unknown (with the nearest known one), differs between files, or asks for something that
            is not done here; or the result is not a configuration that can be run.
    """
    settings = read_settings(paths)
    require_supported(settings)
    ineffective = ineffective_keys(settings)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", paths[0].stem).lstrip("._-") or "run"
    settings.todo.append(("workdir", "name a folder that all nodes share"))
    parallel, launch = parallel_section(settings), launch_section(settings)
    config = {
        "name": name,
        "workdir": f"../runs/{name}",
        "seed": settings.default("seed", "seed"),
        "storage": {"url": _storage_url(settings, name)},
        "tokenizer": _tokenizer(settings),
        "data": data_section(settings),
        "base_model": _base_model(settings),
        "model": model_section(settings, paths[0].parent),
        "parallel": parallel,
        "train": train_section(settings, launch, parallel),
        "launch": launch,
        "wandb": wandb_section(settings),
    }
    batch_geometry(parse_config(config, base=paths[0].parent, origin=", ".join(map(str, paths))))
    return NeoxImport(config, tuple(ineffective), tuple(settings.todo))


def to_yaml(result: NeoxImport) -> str:
    """Our YAML file: what is left to do and what had no effect as comments, then the configuration."""
    lines = ["Imported from GPT-NeoX.", "", "To do:", *(f"- {key}: {what}" for key, what in result.todo)]
    lines += ["", "GPT-NeoX keys without effect here:"]
    lines += [f"- {key}: {value!r} ({reason})" for key, value, reason in result.ineffective]
    wrapped = [piece for line in lines for piece in _wrap(line)]
    comment = "\n".join(f"# {line}".rstrip() for line in wrapped)
    body = yaml.safe_dump(result.config, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    return f"{comment}\n\n{body}"


def _wrap(line: str) -> list[str]:
    return textwrap.wrap(line, width=116, subsequent_indent="  ", break_long_words=False) or [""]


def _storage_url(settings: NeoxSettings, name: str) -> str:
    url = settings.get("s3_path")
    if url:
        return str(url)
    settings.todo.append(("storage.url", "name the bucket for checkpoints: GPT-NeoX saves to a folder"))
    return f"s3://llemma/{name}"


def _tokenizer(settings: NeoxSettings) -> dict[str, Any]:
    todo = "check it: a relative path is relative to this file's folder"
    settings.todo.append(("tokenizer.model", todo))
    settings.todo.append(
        (
            "tokenizer.end_of_document",
            "set it to unk to continue token files of GPT-NeoX's own: it ends documents with <|endoftext|>, which "
            "Llama's vocabulary lacks, so that they end in <unk>",
        )
    )
    return {"model": str(settings.need("vocab_file")), "end_of_document": "eos"}


def _base_model(settings: NeoxSettings) -> dict[str, Any]:
    load = settings.get("load")
    found = f"; GPT-NeoX's 'load' names its converted form, {load}" if load else ""
    settings.todo.append(("base_model.path", f"name the folder with Meta's params.json and consolidated.*.pth{found}"))
    settings.todo.append(("base_model.rope_theta", "add it if it is not model.rope_theta (CodeLlama: 1000000)"))
    return {"path": "../models/base"}
