"""GPT-NeoX's optimizer, schedule and precision in our form."""

from __future__ import annotations

from typing import Any

from neox_core.config.neox.settings import NeoxSettings, as_number
from neox_core.errors import ConfigError


def optimizer(settings: NeoxSettings) -> dict[str, Any]:
    """AdamW's settings.

    Raises:
        ConfigError: another optimizer is asked for, a key is unknown, or two keys disagree.
    """
    section = settings.mapping("optimizer")
    params = section.pop("params", None) or {}
    if not isinstance(params, dict):
        raise ConfigError(f"GPT-NeoX key 'optimizer.params' is {params!r}, which is not a mapping")
    params = dict(params)
    kind = section.pop("type", "Adam")
    if str(kind).lower() not in ("adam", "adamw"):
        raise ConfigError(f"GPT-NeoX key 'optimizer.type' is {kind!r}, which is not supported: use Adam")
    if "lr" not in params:
        raise ConfigError("GPT-NeoX key 'optimizer.params.lr' is not in the files: add it")
    if settings.get("lr") not in (None, params["lr"]):
        raise ConfigError(f"GPT-NeoX keys lr {settings.get('lr')!r} and optimizer.params.lr {params['lr']!r} disagree")
    decay, betas = params.pop("weight_decay", None), params.pop("betas", [0.9, 0.999])
    if decay is not None and settings.get("weight_decay") not in (None, decay):
        raise ConfigError(
            f"GPT-NeoX keys weight_decay {settings.get('weight_decay')!r} and optimizer.params.weight_decay {decay!r} "
            "disagree: keep one"
        )
    if not isinstance(betas, list):
        raise ConfigError(f"GPT-NeoX key 'optimizer.params.betas' is {betas!r}, which is not a list of two numbers")
    found = {
        "lr": as_number("optimizer.params.lr", params.pop("lr")),
        "betas": [as_number("optimizer.params.betas", beta) for beta in betas],
        "eps": as_number("optimizer.params.eps", params.pop("eps", 1e-8)),
    }
    found["weight_decay"] = settings.default("weight_decay", "train.optimizer.weight_decay") if decay is None else decay
    for name, accepted in (("adam_w_mode", True), ("bias_correction", True), ("torch_adam", None), ("amsgrad", False)):
        value = params.pop(name, accepted)
        if accepted is not None and value is not accepted:
            raise ConfigError(f"GPT-NeoX key 'optimizer.params.{name}' is {value!r}, which is not supported: remove it")
    if rest := [*section, *params]:
        raise ConfigError(
            f"GPT-NeoX key 'optimizer' holds {rest}, which are unknown: known are lr, betas, eps, weight_decay"
        )
    return found


def schedule(settings: NeoxSettings, steps: int) -> dict[str, Any]:
    """Warmup and decay in steps, of a run of `steps`."""
    decay_steps = settings.whole("lr_decay_iters") or steps
    warmup_steps = settings.whole("warmup_iters", least=0)
    if warmup_steps is None:
        warmup_steps = round(
            as_number("warmup", settings.default("warmup", "train.schedule.warmup_steps")) * decay_steps
        )
    elif settings.get("warmup") is not None:
        raise ConfigError("GPT-NeoX keys warmup and warmup_iters are both set: keep one")
    ratio = settings.number("decay_lr_to")
    if ratio is None:
        lr = as_number("optimizer.params.lr", settings.mapping("optimizer")["params"]["lr"])
        ratio = as_number("min_lr", settings.default("min_lr", "train.schedule.min_lr_ratio")) / lr
    elif settings.get("min_lr") is not None:
        raise ConfigError("GPT-NeoX keys min_lr and decay_lr_to are both set: keep one")
    return {"warmup_steps": warmup_steps, "decay_steps": decay_steps, "min_lr_ratio": ratio}


def precision(settings: NeoxSettings) -> str:
    """bf16 or fp32, from precision, bf16 and fp16, which must agree."""
    bf16, fp16 = settings.mapping("bf16"), settings.mapping("fp16")
    enabled_fp16 = bool(fp16.get("enabled")) and fp16.get("type") != "bfloat16"
    enabled_bf16 = bool(bf16.get("enabled")) or (bool(fp16.get("enabled")) and not enabled_fp16)
    asked = settings.get("precision")
    if enabled_fp16 or asked == "fp16":
        raise ConfigError("GPT-NeoX files ask for fp16, which is not supported: set precision: bfloat16 and bf16")
    if asked not in (None, "bfloat16", "fp32") or (asked == "fp32" and enabled_bf16):
        raise ConfigError(f"GPT-NeoX keys precision {asked!r}, bf16 {bf16} and fp16 {fp16} disagree: keep one")
    return "bf16" if enabled_bf16 or asked == "bfloat16" else "fp32"
