"""A transformers model built straight from Meta's files: the other side of the conversion's proof.

It shares no code with the conversion. Names, splits and the permutation of RoPE rows are written here once more, after
the description of transformers' own Llama conversion, so that a mistake in layout.py cannot cancel itself out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox_core.config import ModelConfig


def llama_from_meta(folder: Path, model: ModelConfig, sequence_length: int) -> Any:
    """transformers' LlamaForCausalLM in fp32 with the weights of a folder in Meta's format, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
    files = sorted(folder.glob("consolidated.*.pth"))
    shards = [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]
    theta = float(params.get("rope_theta", 10000.0))
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=params["dim"],
        intermediate_size=model.intermediate_size,
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
        rms_norm_eps=params.get("norm_eps", 1e-5),
        max_position_embeddings=sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    state = _state(shards, params)
    llama.to_empty(device="cpu")
    # to_empty leaves the RoPE table, which no checkpoint holds, without values.
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config=config)
    llama.load_state_dict(state, strict=True)
    return llama.eval()


def _state(shards: list[dict[str, Tensor]], params: dict[str, Any]) -> dict[str, Tensor]:
    """Hugging Face's names and whole fp32 tensors."""
    heads = params["n_heads"]
    kv_heads = params.get("n_kv_heads") or heads
    rows, columns = 0, 1

    def whole(name: str, dim: int) -> Tensor:
        return torch.cat([shard[name] for shard in shards], dim=dim).float()

    def rotated(name: str, count: int) -> Tensor:
        """[count·H, D]: in each head, the even rows first, then the odd ones."""
        per_head = whole(name, rows).view(count, -1, params["dim"])
        return torch.cat([per_head[:, 0::2], per_head[:, 1::2]], dim=1).reshape(-1, params["dim"])

    state = {
        "model.embed_tokens.weight": whole("tok_embeddings.weight", columns),
        "model.norm.weight": shards[0]["norm.weight"].float(),
        "lm_head.weight": whole("output.weight", rows),
    }
    for number in range(params["n_layers"]):
        ours, theirs = f"model.layers.{number}", f"layers.{number}"
        state |= {
            f"{ours}.input_layernorm.weight": shards[0][f"{theirs}.attention_norm.weight"].float(),
            f"{ours}.self_attn.q_proj.weight": rotated(f"{theirs}.attention.wq.weight", heads),
            f"{ours}.self_attn.k_proj.weight": rotated(f"{theirs}.attention.wk.weight", kv_heads),
            f"{ours}.self_attn.v_proj.weight": whole(f"{theirs}.attention.wv.weight", rows),
            f"{ours}.self_attn.o_proj.weight": whole(f"{theirs}.attention.wo.weight", columns),
            f"{ours}.post_attention_layernorm.weight": shards[0][f"{theirs}.ffn_norm.weight"].float(),
            f"{ours}.mlp.gate_proj.weight": whole(f"{theirs}.feed_forward.w1.weight", rows),
            f"{ours}.mlp.up_proj.weight": whole(f"{theirs}.feed_forward.w3.weight", rows),
            f"{ours}.mlp.down_proj.weight": whole(f"{theirs}.feed_forward.w2.weight", columns),
        }
    return state
