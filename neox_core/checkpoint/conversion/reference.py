"""transformers' Llama built straight from Meta's or Hugging Face's files: the other side of a conversion's proof.

It shares the list of files with the conversion, and no other code. Names, splits and the permutation of RoPE rows are
written here once more, after the description of transformers' own Llama conversion, so that a mistake in
tensor_map.py cannot cancel itself out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neox_core.checkpoint.formats.model_files import ModelFiles, model_files
from neox_core.config import ModelConfig
from neox_core.config.families import FAMILIES
from neox_core.errors import CheckpointError
from neox_core.storage.folders import Folder, LocalFolder, Location, open_folder, small_files
from neox_core.storage.tensor_reader import open_tensors

LazyState = Mapping[str, Callable[[], Tensor]]
"""A module's parameters by name, each made when called for."""
_LLAMA3_POSITIONS = 8192


def _open(folder: Folder, name: str) -> Mapping[str, Tensor]:
    """A file's tensors, read when asked for: by torch's and safetensors' own readers where the file is local."""
    if not isinstance(folder, LocalFolder):
        return _Remote(open_tensors(folder.content(name)))
    if not name.endswith(".safetensors"):
        content = torch.load(folder.path / name, map_location="cpu", mmap=True, weights_only=True)
        # Some save nn.Parameters.
        return {key: value.detach() if isinstance(value, Tensor) else value for key, value in content.items()}
    return _Safetensors(folder.path / name)


class _Remote(Mapping[str, Tensor]):
    """The tensors of a file in an object store."""

    def __init__(self, stored: Mapping[str, Any]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._stored[name].whole()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class _Safetensors(Mapping[str, Tensor]):
    """The tensors of a local file in safetensors' format."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._file: Any = safe_open(str(path), framework="pt")

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


class MetaReference:
    """A folder in Meta's format as transformers' parts, each made when asked for, in fp32."""

    def __init__(
        self, folder: Folder, files: ModelFiles, sequence_length: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self._params: dict[str, Any] = json.loads(folder.read_text(files.description))
        self._shards = [_open(folder, file) for file in files.weights]
        self._dtype = dtype
        width = self._shards[0]["tok_embeddings.weight"].shape[1]
        # Llama 3 cuts the embedding by rows, those before it by columns.
        self._embedding_dim = 0 if len(self._shards) > 1 and width == self._params["dim"] else 1
        self.config = self._config(sequence_length)

    def _config(self, sequence_length: int) -> Any:
        from transformers import LlamaConfig

        params, shards = self._params, self._shards
        return LlamaConfig(
            vocab_size=sum(shard["output.weight"].shape[0] for shard in shards),
            hidden_size=params["dim"],
            intermediate_size=sum(shard["layers.0.feed_forward.w1.weight"].shape[0] for shard in shards),
            num_hidden_layers=params["n_layers"],
            num_attention_heads=params["n_heads"],
            num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
            rms_norm_eps=params.get("norm_eps", 1e-5),
            max_position_embeddings=max(sequence_length, 2 * _LLAMA3_POSITIONS),
            rope_parameters=self._rope(),
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )

    def _rope(self) -> dict[str, Any]:
        params = self._params
        theta = float(params.get("rope_theta", 10000.0))
        if not params.get("use_scaled_rope"):
            return {"rope_type": "default", "rope_theta": theta}
        return {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": float(params["rope_scaling_factor"]),
            "low_freq_factor": 1.0,
            "high_freq_factor": float(params.get("high_freq_factor") or 4.0),
            "original_max_position_embeddings": _LLAMA3_POSITIONS,
        }

    def embedding(self) -> Tensor:
        """[V, D]"""
        return self._whole("tok_embeddings.weight", self._embedding_dim)

    def norm(self) -> Tensor:
        """Scale of the last norm, [D]."""
        return self._first("norm.weight")

    def head(self) -> Tensor:
        """[V, D]"""
        return self._whole("output.weight", 0)

    def layer(self, number: int) -> LazyState:
        """A decoder layer's state."""
        heads = self._params["n_heads"]
        kv_heads = self._params.get("n_kv_heads") or heads
        rows, columns, prefix = 0, 1, f"layers.{number}"
        return {
            "input_layernorm.weight": partial(self._first, f"{prefix}.attention_norm.weight"),
            "self_attn.q_proj.weight": partial(self._rotated, f"{prefix}.attention.wq.weight", heads),
            "self_attn.k_proj.weight": partial(self._rotated, f"{prefix}.attention.wk.weight", kv_heads),
            "self_attn.v_proj.weight": partial(self._whole, f"{prefix}.attention.wv.weight", rows),
            "self_attn.o_proj.weight": partial(self._whole, f"{prefix}.attention.wo.weight", columns),
            "post_attention_layernorm.weight": partial(self._first, f"{prefix}.ffn_norm.weight"),
            "mlp.gate_proj.weight": partial(self._whole, f"{prefix}.feed_forward.w1.weight", rows),
            "mlp.up_proj.weight": partial(self._whole, f"{prefix}.feed_forward.w3.weight", rows),
            "mlp.down_proj.weight": partial(self._whole, f"{prefix}.feed_forward.w2.weight", columns),
        }

    def _first(self, name: str) -> Tensor:
        return self._shards[0][name].to(self._dtype).float()

    def _whole(self, name: str, dim: int) -> Tensor:
        parts = [shard[name] for shard in self._shards]
        shape = list(parts[0].shape)
        shape[dim] = sum(part.shape[dim] for part in parts)
        whole = torch.empty(shape)
        for part, target in zip(parts, torch.split(whole, [part.shape[dim] for part in parts], dim), strict=True):
            target.copy_(part.to(self._dtype))
        return whole

    def _rotated(self, name: str, count: int) -> Tensor:
        """[count·H, D]: in each head, the even rows first, then the odd ones."""
        per_head = self._whole(name, 0).view(count, -1, self._params["dim"])
        return torch.cat([per_head[:, 0::2], per_head[:, 1::2]], dim=1).reshape(-1, self._params["dim"])


class HuggingFaceReference:
    """A folder in Hugging Face's format as transformers' parts, each made when asked for, in fp32."""

    def __init__(self, folder: Folder, files: ModelFiles, dtype: torch.dtype = torch.bfloat16) -> None:
        from transformers import AutoConfig

        self._dtype = dtype
        with small_files(folder) as local:
            try:
                self.config = AutoConfig.from_pretrained(local, local_files_only=True, attn_implementation="sdpa")
            except Exception as error:  # transformers raises what its many checks happen to raise
                reason = " ".join(str(error).split())[:200]
                raise CheckpointError(f"transformers refuses {folder}/{files.description}: {reason}") from None
        opened = {name: _open(folder, name) for name in files.weights}
        places = files.index or {name: file for file, tensors in opened.items() for name in tensors}
        self._files = {name: opened[file] for name, file in places.items()}

    def embedding(self) -> Tensor:
        """[V, D]"""
        return self._tensor("model.embed_tokens.weight")

    def norm(self) -> Tensor:
        """Scale of the last norm, [D]."""
        return self._tensor("model.norm.weight")

    def head(self) -> Tensor:
        """[V, D]"""
        tied = self.config.tie_word_embeddings
        return self._tensor("model.embed_tokens.weight" if tied else "lm_head.weight")

    def layer(self, number: int) -> LazyState:
        """A decoder layer's state."""
        prefix = f"model.layers.{number}."
        names = [name for name in self._files if name.startswith(prefix) and "rotary_emb" not in name]
        return {name.removeprefix(prefix): partial(self._tensor, name) for name in names}

    def _tensor(self, name: str) -> Tensor:
        return self._files[name][name].to(self._dtype).float()


Reference = MetaReference | HuggingFaceReference


def open_reference(location: Location, sequence_length: int, dtype: torch.dtype) -> Reference:
    """The reference for a folder in either format; weights are rounded to `dtype` first, as a conversion does."""
    folder = open_folder(location)
    files = model_files(folder)
    if files.is_meta:
        return MetaReference(folder, files, sequence_length, dtype)
    return HuggingFaceReference(folder, files, dtype)


def decoder_layer(config: Any, number: int, state: LazyState) -> nn.Module:
    """transformers' decoder layer in eval mode; each of its weights is in memory while it is used, and no longer."""
    with torch.device("meta"):
        layer: nn.Module = transformers_class(config, "DecoderLayer")(config, number)
    parameters = {name for name, _ in layer.named_parameters()}
    assert parameters == state.keys(), f"layer {number} has {sorted(parameters ^ state.keys())} on one side only"
    for path, module in layer.named_modules():
        own = {name: state[f"{path}.{name}"] for name, _ in module.named_parameters(recurse=False)}
        if own:
            module.register_forward_pre_hook(partial(_bring, own))
            module.register_forward_hook(_drop)
    return layer.eval()


def transformers_class(config: Any, part: str) -> Any:
    """A class of transformers' own model of the family, such as its DecoderLayer."""
    family = FAMILIES[config.model_type]
    module = import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    return getattr(module, f"{family.classes}{part}")


def _bring(made: LazyState, module: Any, args: Any) -> None:
    for name, make in made.items():
        value, shape = make(), getattr(module, name).shape
        assert value.shape == shape, f"{tuple(value.shape)} instead of {tuple(shape)}"
        setattr(module, name, nn.Parameter(value, requires_grad=False))


def _drop(module: Any, args: Any, result: Any) -> None:
    for name, value in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(torch.empty(value.shape, device="meta"), requires_grad=False))


def whole_llama(reference: Reference) -> Any:
    """transformers' model for causal language modeling with all of a reference's weights, in fp32 and eval mode."""
    with torch.device("meta"):
        llama = transformers_class(reference.config, "ForCausalLM")(reference.config)
    # Buffers like the RoPE table, which no checkpoint holds, would stay without values.
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config=reference.config)
    state = {
        "model.embed_tokens.weight": reference.embedding(),
        "model.norm.weight": reference.norm(),
        "lm_head.weight": reference.head(),
    }
    for number in range(reference.config.num_hidden_layers):
        state |= {f"model.layers.{number}.{name}": make() for name, make in reference.layer(number).items()}
    llama.load_state_dict(state, strict=True, assign=True)
    llama.tie_weights()  # where config.json says so; assigning made two of them
    return llama.eval()


def llama_from_meta(folder: Path, model: ModelConfig, sequence_length: int) -> Any:
    """transformers' LlamaForCausalLM in fp32 with the weights of a folder in Meta's format, in eval mode."""
    opened = LocalFolder(folder)
    return whole_llama(MetaReference(opened, model_files(opened), sequence_length))
