"""Finds out what of the surroundings would keep a run from working, and says how to mend it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from neox_core.config import EMBEDDED, RunConfig
from neox_core.errors import LlemmaError
from neox_core.optimizer import update_rule
from neox_core.optimizer.rule import STATE_BYTES
from neox_core.planning.memory import parameter_count
from neox_core.storage.object_store import ObjectStore
from tasks.jobs.launch import check_launch
from tasks.jobs.registry import choose_executor
from tasks.jobs.slurm import commands as slurm
from tasks.preflight import check_run, check_workdir

_PACKAGES = ("torch", "deepspeed", "prefect", "submitit", "sentencepiece", "boto3", "wandb", "transformers")
_COPIES = 3
"""Checkpoints that may lie on local disk at a time: one that is written, one that waits, one that is uploaded."""
_CLOCK_SECONDS = 60.0
"""Apart from the store's clock; at 15 minutes S3 refuses all requests."""
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """What was found of one thing."""

    what: str
    state: Literal["good", "warning", "fault"]
    text: str
    """With a way out, where it is not good."""


def examine(config: RunConfig) -> Iterator[Finding]:
    """One finding after the other. Takes seconds, changes nothing, and leaves nothing behind."""
    for what, check in _CHECKS.items():
        try:
            yield check(what, config)
        except LlemmaError as error:
            yield Finding(what, "fault", str(error))


def checkpoint_bytes(config: RunConfig) -> int:
    """Of one checkpoint: weights, master weights and what the optimizer keeps."""
    weight = 2 if config.train.precision == "bf16" else 4
    state = STATE_BYTES * len(update_rule(config.train.optimizer).state_names)
    return parameter_count(config.model) * (weight + 4 + state)


def _packages(what: str, config: RunConfig) -> Finding:
    versions = {name: _version(name) for name in _PACKAGES}
    if missing := [name for name, version in versions.items() if version is None]:
        return Finding(what, "fault", f"{', '.join(missing)} missing: run `pip install -e .` in the repository")
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    flash = _version("flash-attn") or _version("flash-attn-4")
    if config.launch.device == "cuda" and flash is None:
        return Finding(what, "warning", f"{shown}; no flash-attn: cuDNN's or torch's attention is used")
    return Finding(what, "good", shown)


def _disk(what: str, config: RunConfig) -> Finding:
    check_workdir(config.workdir)
    free, need = shutil.disk_usage(config.workdir).free, _COPIES * checkpoint_bytes(config)
    text = f"{free / _GIB:,.1f} GiB free in {config.workdir}, checkpoints need up to {need / _GIB:,.1f}"
    return Finding(what, "good", text) if free > need else Finding(what, "fault", f"{text}: choose a larger disk")


def _launcher(what: str, config: RunConfig) -> Finding:
    name = choose_executor(config.launch.executor)
    check_launch(config.launch)
    if name != "slurm":
        return Finding(what, "good", f"jobs run by executor {name!r}")
    if not slurm.has_accounting():
        text = "SLURM takes the job, but keeps no accounting: why a job ended is then often not known"
        return Finding(what, "warning", f"{text}; ask the cluster's administrators for slurmdbd")
    return Finding(what, "good", "SLURM takes the job, and accounting answers")


def _gpus(what: str, config: RunConfig) -> Finding:
    if config.launch.device != "cuda":
        return Finding(what, "good", "none needed: launch.device is cpu")
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        text = "no nvidia-smi here: as on a login node; run `srun ... llemma doctor CONFIG` on a GPU node"
        return Finding(what, "warning", text)
    if answer.returncode:
        return Finding(what, "fault", f"nvidia-smi: {' '.join(answer.stdout.split())}: mend the driver")
    cards = answer.stdout.strip().splitlines()
    return Finding(what, "good", f"{len(cards)} x {cards[0]}" if cards else "no cards on this machine")


def _store(what: str, config: RunConfig) -> Finding:
    if config.storage.endpoint_url == EMBEDDED:
        return Finding(what, "good", "embedded: a server on loopback, which flows start")
    store = ObjectStore(config.storage)
    store.check()
    key, text = f"doctor/{uuid.uuid4().hex}", "written and read by llemma doctor"
    started = time.monotonic()
    store.put_text(key, text)
    try:
        read = store.get_text(key)
    finally:
        store.delete([key])
    if read != text:
        return Finding(what, "fault", f"{store.url(key)} came back as {read!r}: do not use this store")
    milliseconds = 1000 * (time.monotonic() - started)
    skew = time.time() - store.clock()
    shown = f"{store.url()} at {store.endpoint}: written, read and deleted in {milliseconds:.0f} ms"
    if abs(skew) > _CLOCK_SECONDS:
        return Finding(what, "warning", f"{shown}; this clock is {skew:+.0f} s from the store's: set it by NTP")
    return Finding(what, "good", shown)


def _wandb(what: str, config: RunConfig) -> Finding:
    if config.wandb.mode != "online":
        return Finding(what, "good", config.wandb.mode)
    if "WANDB_API_KEY" in os.environ:
        return Finding(what, "good", "online, with WANDB_API_KEY")
    return Finding(what, "warning", "online, but WANDB_API_KEY is not set: set it, or log in with `wandb login`")


def _run(what: str, config: RunConfig) -> Finding:
    check_run(config)
    return Finding(what, "good", "inputs, tokenizer, base weights, batch and schedule pass the checks of a start")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_CHECKS: dict[str, Callable[[str, RunConfig], Finding]] = {
    "packages": _packages,
    "disk": _disk,
    "launcher": _launcher,
    "GPUs": _gpus,
    "object store": _store,
    "W&B": _wandb,
    "run": _run,
}
