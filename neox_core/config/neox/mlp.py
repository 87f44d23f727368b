"""The width of the MLP, which GPT-NeoX's files give in two ways.

Until 2024 `mlp_type: llama` with `activation: silu` was SwiGLU, and `intermediate_size` its width. Since then
`mlp_type` is gone: a gated activation (`swiglu`) selects it, and `intermediate_size` (4 x hidden if it is absent) is
scaled by 2/3 and halved, so that the width is a third of it (GPT-NeoX's megatron/model/transformer.py).
"""

from __future__ import annotations

from neox_core.config.neox.settings import NeoxSettings
from neox_core.errors import ConfigError

_OLD_MULTIPLE = 256


def intermediate_size(settings: NeoxSettings, hidden: int) -> int:
    """Width of the SwiGLU MLP.

    Raises:
        ConfigError: the files ask for another MLP, or for one in both ways.
    """
    activation = settings.get("activation")
    if settings.today:
        if activation != "swiglu":
            source = "" if activation else " (GPT-NeoX's default, as the files don't set it)"
            raise ConfigError(
                f"GPT-NeoX key 'activation' is {activation or 'gelu'!r}{source} without mlp_type, which is another "
                "MLP: SwiGLU is the only one here (activation: swiglu, or in files until 2024 mlp_type: llama with "
                "activation: silu)"
            )
        return _gated(settings, hidden)
    if settings.get("mlp_type") != "llama" or activation not in ("silu", "swish"):
        raise ConfigError(
            f"GPT-NeoX keys 'mlp_type' {settings.get('mlp_type')!r} and 'activation' {activation!r} are not supported "
            "together: SwiGLU is the only MLP here, which is mlp_type: llama with activation: silu, or activation: "
            "swiglu without mlp_type, where intermediate_size means three times the width"
        )
    if settings.get("expansion_factor") is not None:
        raise ConfigError("GPT-NeoX key 'expansion_factor' came when mlp_type went: remove one of them")
    multiple = settings.whole("mlp_multiple_of") or _OLD_MULTIPLE
    return settings.whole("intermediate_size") or _up(hidden * 8 // 3, multiple)


def _gated(settings: NeoxSettings, hidden: int) -> int:
    size, factor = settings.whole("intermediate_size"), settings.number("expansion_factor")
    if size and factor:
        raise ConfigError("GPT-NeoX keys intermediate_size and expansion_factor are both set: keep one")
    total = size or (int(factor * hidden) if factor else 4 * hidden)
    width = _up(int(total * 2 / 3) // 2, settings.whole("mlp_multiple_of") or 1)
    settings.todo.append(
        (
            "model.intermediate_size",
            f"compare {width} with the base model's: GPT-NeoX's gated MLP is a third as wide as its intermediate_size "
            f"{total}, rounded up to a multiple of mlp_multiple_of",
        )
    )
    if settings.get("use_bias_in_mlp") is None:
        settings.todo.append(
            ("model", "there are no biases in the MLP, as in Llama: GPT-NeoX adds some where use_bias_in_mlp is absent")
        )
    return width


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
