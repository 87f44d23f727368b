"""What the model computes, written again: slowly, in float64, with loops and masks. Needs nothing but torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def causal_attention(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    """Softmax(q k^T / sqrt(H)) v with an explicit mask and KV heads repeated for their query heads."""
    q, k, v = q_BTNH.double(), k_BTKH.double(), v_BTKH.double()
    heads, kv_heads = q.shape[2], k.shape[2]
    kv_head_of = [head // (heads // kv_heads) for head in range(heads)]
    k, v = k[:, :, kv_head_of], v[:, :, kv_head_of]
    scores = torch.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
    tokens = q.shape[1]
    later = torch.tensor([[key > query for key in range(tokens)] for query in range(tokens)], device=q.device)
    weights = torch.softmax(scores.masked_fill(later, float("-inf")), dim=-1)
    return torch.einsum("bnts,bsnh->btnh", weights, v)


def rotate(x_BTNH: Tensor, theta: float) -> Tensor:
    """Rotary positions as complex numbers: pair (i, i + H/2) of position t times exp(j·t·theta^(-2i/H))."""
    half = x_BTNH.shape[-1] // 2
    frequencies = torch.tensor([theta ** (-2 * i / (2 * half)) for i in range(half)], dtype=torch.float64)
    angles = torch.arange(x_BTNH.shape[1], dtype=torch.float64)[:, None] * frequencies
    x = x_BTNH.double()
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def fuse_qkv(query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int) -> Tensor:
    """NeoX's fused rows: for each query head its rows of q, then the next head_dim·kv_heads/heads rows of k, then of v.

    Args:
        query: [heads·head_dim, D].
        key, value: [kv_heads·head_dim, D].
    """
    head_dim = query.shape[0] // heads
    share = head_dim * kv_heads // heads
    rows = []
    for head in range(heads):
        rows += [query[head * head_dim + i] for i in range(head_dim)]
        rows += [key[head * share + i] for i in range(share)]
        rows += [value[head * share + i] for i in range(share)]
    return torch.stack(rows)
