"""Proof that weights mean the same model in two layouts: they compute the same.

Only results show it: a conversion of grouped queries can be right in every shape and wrong in every head. Ours
are computed from the tensor-parallel shards as they are, in one process: each rank's narrow model on the same hidden
state, the partial results added, as the ranks' all-reduce would. The other side is transformers' Llama
from the other layout's files.

Large models are compared layer by layer, with one layer in memory: each on the hidden states that transformers' layers
before it made, and what attention and MLP add to them apart, so that a large hidden state cannot hide a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox_core.checkpoint.conversion.reference import (
    Reference,
    decoder_layer,
    open_reference,
    transformers_class,
    whole_llama,
)
from neox_core.checkpoint.formats.neox import NeoxCheckpoint
from neox_core.config import ModelConfig
from neox_core.errors import CheckpointError
from neox_core.model import FinalNorm, ModelDimensions, OutputHead, TokenEmbedding, TransformerBlock
from neox_core.planning.memory import parameter_count
from neox_core.progress import Progress, silent
from neox_core.storage.folders import Location
from neox_core.storage.tensor_reader import StoredTensor

TOLERANCE = 1e-4
"""Largest difference between two logits; fp32 alone makes about 1e-6."""
LAYER_TOLERANCE = 1e-5
"""Largest difference within a layer, relative to its largest value."""
SMALL_MODEL = 300_000_000
"""Parameters up to which the logits of the whole model are compared too."""
_BATCH, _POSITIONS = 2, 96
"""Long enough for wrong RoPE to show at distances beyond a few tokens."""

ToTensor = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shards:
    """Our model as its tensor-parallel ranks have it, in fp32, a part of a layer in memory at a time."""

    checkpoint: NeoxCheckpoint
    model: ModelConfig

    @property
    def dims(self) -> ModelDimensions:
        """A rank's; with more ranks than KV heads, neighbours have the same KV head."""
        return ModelDimensions.of(self.model, _positions(self.model)).shard(self.checkpoint.tensor_parallel)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """[B,T] -> [B,T,D]"""
        parts = [
            _embed(module, rank, ids_BT)
            for rank, module in enumerate(self._ranks(0, TokenEmbedding, ("word_embeddings.",)))
        ]
        return torch.stack(parts).sum(0)

    def attention(self, number: int, x_BTD: Tensor) -> Tensor:
        """What a layer's attention adds to its input, [B,T,D]."""
        names = ("input_layernorm", "attention", "post_attention_layernorm")
        if self.model.differences.qk_norm != "projection":
            return self._added(number, names, x_BTD)
        means: list[Tensor] = []

        def keep(own_BT2: Tensor) -> Tensor:
            means.append(own_BT2)
            return own_BT2

        self._added(number, names, x_BTD, keep)  # with each rank's own means, which are wrong, but known then
        return self._added(number, names, x_BTD, lambda _: torch.stack(means).mean(0))

    def mlp(self, number: int, x_BTD: Tensor) -> Tensor:
        """What a layer's MLP adds to its input, [B,T,D]."""
        before = "" if self.model.differences.norms_after else "post_attention_layernorm"
        return self._added(number, (before, "mlp", "post_feedforward_layernorm"), x_BTD)

    def _added(
        self, number: int, names: tuple[str, str, str], x_BTD: Tensor, of_all_heads: ToTensor | None = None
    ) -> Tensor:
        """The sum of what each rank's part of a block gives, with the norm before it or after it; by their names."""
        before, part, after = names
        parts: list[Tensor] = []
        block: Any = None
        for block in self._ranks(number + 2, TransformerBlock, tuple(f"{name}." for name in names if name)):
            block.attention.of_all_heads = of_all_heads
            if (bias := block.attention.dense.bias) is not None:
                bias.data /= self.checkpoint.tensor_parallel  # each rank has all of it, and it counts once
            parts.append(getattr(block, part)(x_BTD if block.norms_after else getattr(block, before)(x_BTD)))
        total = torch.stack(parts).sum(0)
        return getattr(block, after)(total) if block.norms_after else total

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Final norm and output head, [B,T,V]."""
        layers = self.model.num_layers
        norms = self._ranks(layers + 3, FinalNorm, ("norm.",))
        heads = self._ranks(layers + 4, OutputHead, ("final_linear.",))
        return torch.cat([head(norm(x_BTD)) for norm, head in zip(norms, heads, strict=True)], dim=-1)

    def _ranks(self, index: int, build: type[nn.Module], prefixes: tuple[str, ...]) -> Iterator[Any]:
        """Each rank's module of the layer at `index`, with the weights whose names start so."""
        for rank in range(self.checkpoint.tensor_parallel):
            with torch.device("meta"):
                module = build(self.dims.of_layer(index - 2))
            stored = self.checkpoint.stored_layer(index, rank)
            self._check(index, rank, stored, module)
            state = {name: value.whole().float() for name, value in stored.items() if name.startswith(prefixes)}
            module.load_state_dict(state, strict=False, assign=True)
            yield module.eval()

    def _check(self, index: int, rank: int, stored: dict[str, StoredTensor], module: nn.Module) -> None:
        found = {name: value.shape for name, value in stored.items()}
        needed = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        if wrong := sorted(name for name in found.keys() | needed.keys() if found.get(name) != needed.get(name)):
            raise CheckpointError(
                f"{self.checkpoint.folder}: layer {index} of rank {rank} does not fit: {wrong[0]} has shape "
                f"{found.get(wrong[0])}, but the model needs {needed.get(wrong[0])}"
            )


def _embed(embedding: Any, rank: int, ids_BT: Tensor) -> Tensor:
    """Vectors of the ids that lie in this rank's part of the vocabulary; zeros for the others."""
    rows = embedding.word_embeddings.num_embeddings
    local = ids_BT - rank * rows
    mine = (local >= 0) & (local < rows)
    return embedding(local.where(mine, 0)) * mine.unsqueeze(-1)


@torch.inference_mode()
def logits_from_shards(checkpoint: NeoxCheckpoint, model: ModelConfig, ids_BT: Tensor) -> Tensor:
    """fp32 logits [B,T,V] of our model, from the shards as they are, one layer in memory at a time.

    Raises:
        CheckpointError: a file is missing, or its tensors do not fit the model.
    """
    shards = Shards(checkpoint, model)
    x_BTD = shards.embed(ids_BT)
    for number in range(model.num_layers):
        x_BTD = x_BTD + shards.attention(number, x_BTD)
        x_BTD = x_BTD + shards.mlp(number, x_BTD)
    return shards.logits(x_BTD)


def sample_ids(vocab_size: int, positions: int = _POSITIONS) -> Tensor:
    """Fixed pseudo-random token ids [B,T] that reach every part of the vocabulary."""
    return torch.randint(vocab_size, (_BATCH, positions), generator=torch.Generator().manual_seed(0))


def _positions(model: ModelConfig) -> int:
    """Length of the compared sequences: not beyond a window, up to which alone attention is full."""
    return min(_POSITIONS, model.sliding_window or _POSITIONS)


@torch.inference_mode()
def compare_logits(shards: NeoxCheckpoint, reference: nn.Module, model: ModelConfig) -> float:
    """Largest absolute difference between our fp32 logits and those of a transformers model; NaN counts as infinite.

    Tokens that the transformers model lacks (padding, new tokens) take no part.

    Raises:
        CheckpointError: a file is missing, or its tensors do not fit the model.
    """
    tokens = int(reference.config.vocab_size)  # type: ignore[union-attr,arg-type]
    ids_BT = sample_ids(tokens, _positions(model))
    ours = logits_from_shards(shards, model, ids_BT)[..., :tokens]
    theirs = reference(input_ids=ids_BT, use_cache=False).logits.float()
    return float((ours - theirs).abs().nan_to_num(nan=float("inf")).max())


@dataclass
class Differences:
    """Relative differences by part, the largest first to be asked for."""

    found: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, ours: Tensor, theirs: Tensor) -> None:
        """Largest difference, relative to the largest value; NaN counts as infinite."""
        difference = (ours - theirs).abs().nan_to_num(nan=float("inf")).max()
        largest = theirs.abs().max()
        self.found[part] = 0.0 if difference == 0 else float(difference / largest)

    @property
    def worst(self) -> str:
        """The part that differs most."""
        return max(self.found, key=self.found.__getitem__)


@torch.inference_mode()
def compare_layers(
    checkpoint: NeoxCheckpoint, reference: Reference, model: ModelConfig, progress: Progress = silent
) -> Differences:
    """Compare embedding, every layer's attention and MLP, and the logits, each on the same inputs, streaming.

    Raises:
        CheckpointError: a file is missing, or its tensors do not fit the model.
    """
    shards, config, differences = Shards(checkpoint, model), reference.config, Differences()
    tokens = int(config.vocab_size)
    ids_BT = sample_ids(tokens, _positions(model))[: _BATCH if parameter_count(model) <= SMALL_MODEL else 1]
    x_BTD = F.embedding(ids_BT, reference.embedding())
    differences.add("embedding", shards.embed(ids_BT), x_BTD)
    positions = transformers_class(config, "RotaryEmbedding")(config)(x_BTD, torch.arange(ids_BT.shape[1])[None])
    for number in range(model.num_layers):
        attention, mlp, out_BTD = _reference_layer(
            decoder_layer(config, number, reference.layer(number)), x_BTD, positions
        )
        differences.add(f"layer {number} attention", shards.attention(number, x_BTD), attention)
        differences.add(f"layer {number} mlp", shards.mlp(number, x_BTD + attention), mlp)
        x_BTD = out_BTD
        progress((number + 1) / model.num_layers * 0.99, f"layer {number + 1} of {model.num_layers} proven")
    norm = transformers_class(config, "RMSNorm")(config.hidden_size, config.rms_norm_eps)
    norm.load_state_dict({"weight": reference.norm()}, assign=True)
    differences.add("logits", shards.logits(x_BTD)[..., :tokens], F.linear(norm(x_BTD), reference.head()))
    return differences


def _reference_layer(layer: nn.Module, x_BTD: Tensor, positions: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What attention and MLP of transformers' layer add, and the layer's result."""
    seen: list[Tensor] = []
    after = hasattr(layer, "post_feedforward_layernorm")
    for name in ("post_attention_layernorm", "post_feedforward_layernorm") if after else ("self_attn", "mlp"):
        layer.get_submodule(name).register_forward_hook(
            lambda module, args, result: seen.append(result[0] if isinstance(result, tuple) else result)
        )
    result = layer(x_BTD, position_embeddings=positions)
    attention, mlp = seen
    return attention, mlp, result[0] if isinstance(result, tuple) else result


def prove(
    checkpoint: NeoxCheckpoint,
    folder: Location,
    model: ModelConfig,
    tolerance: float = TOLERANCE,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare NeoX shards with a folder in Meta's or Hugging Face's format; yields a summary.

    Every layer is compared; for small models the logits of the whole model too. Weights of another type are rounded to
    the shards' type first, as a conversion rounds them.

    Raises:
        CheckpointError: a logit differs by more than `tolerance`, or a layer relatively by more than 1e-5.
    """
    dtypes = {stored.dtype for index in (0, 2) for stored in checkpoint.stored_layer(index, 0).values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    reference = open_reference(folder, _POSITIONS, dtype)
    what = f"the shards in {checkpoint.folder} and transformers' Llama from {folder}"
    summary: dict[str, Any] = {}
    if parameter_count(model) <= SMALL_MODEL:
        summary = judge(compare_logits(checkpoint, whole_llama(reference), model), tolerance, what)
        summary["tokens"] = _BATCH * _positions(model)
    differences = compare_layers(checkpoint, reference, model, progress)
    largest = differences.found[differences.worst]
    if not largest <= LAYER_TOLERANCE:
        raise CheckpointError(
            f"{differences.worst} of {what} differs by {largest:.3g} of its largest value, more than "
            f"{LAYER_TOLERANCE:g}: do not use them"
        )
    return summary | {
        "largest_layer_difference": largest,
        "worst_layer": differences.worst,
        "layer_tolerance": LAYER_TOLERANCE,
        "layer_differences": differences.found,
    }


def prove_conversion(
    source: Location, shards: NeoxCheckpoint, model: ModelConfig, progress: Progress = silent
) -> dict[str, Any]:
    """Compare the shards with their source in Meta's or Hugging Face's format; yields a summary.

    Both use the RoPE base of the source, whatever the run will train with.

    Raises:
        CheckpointError: they are not the same model.
    """
    theta = open_reference(source, _POSITIONS, torch.bfloat16).config.rope_parameters["rope_theta"]
    return prove(shards, source, model.model_copy(update={"rope_theta": theta}), progress=progress)


def judge(difference: float, tolerance: float, what: str) -> dict[str, Any]:
    """A summary of a comparison.

    Raises:
        CheckpointError: the difference exceeds the tolerance.
    """
    if not difference <= tolerance:
        raise CheckpointError(f"logits of {what} differ by {difference:.3g}, more than {tolerance:g}: do not use them")
    return {"largest_logit_difference": difference, "tolerance": tolerance}
