"""params.json, Meta's description of a model, read and written."""

from __future__ import annotations

from typing import Any

from neox_core.checkpoint.formats.description import Values, described_by
from neox_core.config import ModelConfig, RopeScalingConfig
from neox_core.errors import CheckpointError, ConfigError

_DEFAULT_NORM_EPS = 1e-5
_DEFAULT_MULTIPLE_OF = 256
_DEFAULT_ROPE_THETA = 10000.0
_LLAMA3 = RopeScalingConfig(
    rope_type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192
)
"""What Meta's code has as constants."""
_WITHOUT_EFFECT = "max_seq_len max_batch_size model_parallel_size"
_COMPUTED = """dim n_layers n_heads n_kv_heads head_dim multiple_of ffn_dim_multiplier vocab_size norm_eps rope_theta
    use_scaled_rope rope_scaling_factor high_freq_factor"""
_KNOWN = frozenset(f"{_COMPUTED} {_WITHOUT_EFFECT}".split())
"""Meta's own code refuses any other key."""


def intermediate_size(hidden_size: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Width of the MLP as Meta's model computes it: 2/3 of 4·hidden, scaled, rounded up to a multiple."""
    size = int(2 * (4 * hidden_size) / 3)
    size = size if ffn_dim_multiplier is None else int(ffn_dim_multiplier * size)
    return multiple_of * ((size + multiple_of - 1) // multiple_of)


def read_params(path: str, content: dict[str, Any], embedding_rows: int) -> ModelConfig:
    """The model that params.json describes.

    Args:
        path: its name in messages.
        embedding_rows: the vocabulary where params.json leaves it open (absent or -1).

    Raises:
        CheckpointError: a value is missing or of the wrong kind, or asks for something that is not computed here.
    """
    values = Values(path, content)
    values.check_known(_KNOWN)
    with described_by(path):
        hidden, heads = values.whole("dim"), values.whole("n_heads")
        scaled = values.content.get("ffn_dim_multiplier") is not None
        multiple_of = values.whole("multiple_of", _DEFAULT_MULTIPLE_OF)
        stated = values.whole("vocab_size", -1, least=-1)
        model = ModelConfig(
            num_layers=values.whole("n_layers"),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_kv_heads=values.whole("n_kv_heads", heads, nullable=True),
            intermediate_size=intermediate_size(
                hidden, multiple_of, values.number("ffn_dim_multiplier") if scaled else None
            ),
            vocab_size=embedding_rows if stated == -1 else stated,
            rope_theta=values.number("rope_theta", _DEFAULT_ROPE_THETA),
            rope_scaling=_rope_scaling(values),
            norm_eps=values.number("norm_eps", _DEFAULT_NORM_EPS),
        )
    if values.whole("head_dim", model.head_dim, nullable=True) != model.head_dim:
        raise CheckpointError(
            f"{path}: head_dim is {content['head_dim']}, but only dim / n_heads = {model.head_dim} is supported"
        )
    return model


def meta_problem(model: ModelConfig) -> str | None:
    """Why Meta's format cannot hold a model; None: it can."""
    if model.tied_embeddings:
        return "Meta's format has no word for tied embeddings"
    if model.attention_bias:
        return "Meta's format has no word for the biases of model.attention_bias"
    if model.family != "llama" or model.head_dim * model.num_attention_heads != model.hidden_size:
        return (
            f"Meta's format holds Llama with heads of hidden_size / num_attention_heads, not {model.family} with heads "
            f"of {model.head_dim}"
        )
    if scaling := model.rope_scaling:
        same = {"factor": scaling.factor, "high_freq_factor": scaling.high_freq_factor}
        if scaling != _LLAMA3.model_copy(update=same):
            return f"Meta's format cannot say that positions are scaled by {scaling}"
    return None


def meta_params(model: ModelConfig) -> dict[str, Any]:
    """The params.json of a model.

    Raises:
        ConfigError: Meta's format has no words for it.
    """
    if problem := meta_problem(model):
        raise ConfigError(f"{problem}: export to Hugging Face's format")
    return {
        "dim": model.hidden_size,
        "n_layers": model.num_layers,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": model.num_kv_heads,
        **_mlp_params(model),
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "vocab_size": model.vocab_size,
        **_scaling_params(model),
    }


def _mlp_params(model: ModelConfig) -> dict[str, int | float]:
    """Values of Meta's formula that give the model's intermediate size; it has no entry of its own in params.json."""
    for multiple_of in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if intermediate_size(model.hidden_size, multiple_of, None) == model.intermediate_size:
            return {"multiple_of": multiple_of}
    unscaled = intermediate_size(model.hidden_size, 1, None)
    # The formula rounds down: aim at the middle of the unit, so that no float error can reach a neighbour.
    return {"multiple_of": 1, "ffn_dim_multiplier": (model.intermediate_size + 0.5) / unscaled}


def _rope_scaling(values: Values) -> RopeScalingConfig | None:
    """Llama 3's scaling of positions, of which params.json has a switch and not always the numbers."""
    if not values.flag("use_scaled_rope"):
        return None
    if "rope_scaling_factor" not in values.content:
        raise CheckpointError(
            f"{values.path} says use_scaled_rope without rope_scaling_factor: add it (Llama 3.1: 8, 3.2: 32)"
        )
    numbers = {
        "factor": values.number("rope_scaling_factor"),
        "high_freq_factor": values.number("high_freq_factor", _LLAMA3.high_freq_factor, nullable=True),
    }
    return _LLAMA3.model_copy(update=numbers)


def _scaling_params(model: ModelConfig) -> dict[str, Any]:
    """The entries of params.json that say how positions are scaled, if they are."""
    scaling = model.rope_scaling
    if scaling is None:
        return {}
    return {
        "use_scaled_rope": True,
        "rope_scaling_factor": scaling.factor,
        "high_freq_factor": scaling.high_freq_factor,
    }
