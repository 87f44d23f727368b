"""Speed of one training step through the real engine on one GPU.

    torchrun --nproc_per_node 1 benchmarks/train_step.py 7b
    torchrun --nproc_per_node 1 benchmarks/train_step.py 34b-slice

Random weights and tokens; 65,536 tokens a step, sequence 4096, bf16 parameters, fp32 master weights, Adam states and
gradient accumulation, clip and optimizer included. Measures the sustained rate of the model's own matrix products in
the same process first. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox_core.config import RunConfig, batch_geometry, load_config
from neox_core.model import ModelDimensions
from neox_core.parallel.build import layer_types
from neox_core.parallel.mesh import build_mesh, init_distributed
from neox_core.planning.memory import parameter_count
from neox_core.planning.plan import flops_per_token
from neox_core.train.engine.deepspeed_engine import build_engine
from neox_core.train.engine.step_engine import Batches, StepEngine
from neox_core.train.observe.hardware import peak_flops

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = {"7b": ("llemma_7b.yml", None), "34b-slice": ("llemma_34b.yml", 8), "tiny": ("toy.yml", 2)}
ATTENTION = ["auto", "flash_attn_4", "flash_attn", "cudnn", "sdpa"]
STEP_TOKENS = 65536
# Kernel names of each part; the first that matches counts. The head's products are among "gemm". Only the loss's
# compiled kernels have a softmax in their names.
PARTS = {
    "gemm": r"gemm|nvjet|cutlass_80|cutlass_90|wgmma_bf16|cublas",
    "attention": r"flash|fmha|cudnn.*sdpa|attention",
    "optimizer": r"adam|multi_tensor|foreach",
    "loss": r"triton.*(softmax|nll_loss)",
    "elementwise": r"triton|_rms_norm_backward",
    "other elementwise": r"elementwise|reduce|copy|cat|fill|norm|Memcpy|Memset|index|embedding",
}


def main() -> None:
    """Run the benchmark and print its figures."""
    options = _options()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = _config(options)
    device = init_distributed(config.launch)
    mesh = build_mesh(config.parallel, device)
    gemm = _sustained_gemm(config, device, options.gemm_seconds)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # recomputation `auto` looks at what is free
    engine = build_engine(config, mesh, batch_geometry(config), _random_weights(config, device))
    batches = _batches(config, device)
    seconds = [_timed(engine, batches, device) for _ in range(options.steps)]
    result = _figures(config, sorted(seconds[2:])[len(seconds[2:]) // 2], gemm, device)
    result["loss"] = float(engine.train_batch(batches))
    if device.type == "cuda":
        result["parts_seconds"] = _profile(engine, batches, options.table)
    _report(result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="the first two are not counted")
    parser.add_argument("--recompute", choices=["none", "selective", "full", "auto"], default="none")
    parser.add_argument("--attention", choices=ATTENTION, default="auto")
    parser.add_argument("--master-weights", choices=["fp32", "packed"], default="packed")
    parser.add_argument("--gemm-seconds", type=float, default=8.0)
    parser.add_argument("--table", action="store_true", help="print the slowest kernels")
    return parser.parse_args()


def _config(options: argparse.Namespace) -> RunConfig:
    name, layers = MODELS[options.model]
    config = load_config(CONFIGS / name)
    layers = options.layers or layers or config.model.num_layers
    train = config.train.model_copy(
        update={
            "global_batch_tokens": STEP_TOKENS,
            "micro_batch_size": options.micro_batch,
            "activation_checkpointing": options.recompute,
            "master_weights": options.master_weights,
            "attention": options.attention,
        }
    )
    launch = config.launch.model_copy(update={"nodes": 1, "ranks_per_node": 1, "device": "auto"})
    return config.model_copy(
        update={
            "train": train,
            "launch": launch,
            "parallel": config.parallel.model_copy(update={"tensor": 1, "pipeline": 1}),
            "model": config.model.model_copy(update={"num_layers": layers}),
        }
    )


def _random_weights(config: RunConfig, device: torch.device) -> Any:
    types = layer_types(config.model.num_layers)
    dims = ModelDimensions.of(config.model, 1)

    def weights(index: int, tensor_rank: int) -> dict[str, Tensor]:
        layer_type = types[index]
        assert layer_type is not None
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in layer_type(dims).state_dict().items()}
        generator = torch.Generator(device).manual_seed(index)
        return {name: _initial(shape, generator, device) for name, shape in shapes.items()}

    return weights


def _initial(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return weight.normal_(0, 0.02, generator=generator)


def _batches(config: RunConfig, device: torch.device) -> Batches:
    shape = (config.train.micro_batch_size, config.train.sequence_length + 1)
    generator = torch.Generator(device).manual_seed(0)
    while True:
        ids = torch.randint(config.model.vocab_size, shape, generator=generator, device=device)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _sustained_gemm(config: RunConfig, device: torch.device, seconds: float) -> float:
    """FLOP/s of the model's matrix products (forward, input gradient, weight gradient), over its second half."""
    model, tokens = config.model, config.train.micro_batch_size * config.train.sequence_length
    fused = (model.num_attention_heads + 2 * model.num_kv_heads) * model.head_dim
    h, f = model.hidden_size, model.intermediate_size
    shapes = [(fused, h), (h, h), (f, h), (f, h), (h, f)]
    weights = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
    inputs = {size: torch.randn(tokens, size, device=device).bfloat16() for size in {fused, h, f}}

    def once() -> None:
        for weight in weights:
            out, into = weight.shape
            inputs[into] @ weight.t()
            inputs[out] @ weight
            inputs[out].t() @ inputs[into]

    flops = 3 * sum(2 * tokens * out * into for out, into in shapes)
    start, counted, rate = time.perf_counter(), 0, 0.0
    for half in (0, 1):
        begin, counted = time.perf_counter(), 0
        while time.perf_counter() - start < seconds * (half + 1) / 2:
            for _ in range(8):
                once()
            counted += 8
            _synchronize(device)
        rate = counted * flops / (time.perf_counter() - begin)
    return rate


def _timed(engine: StepEngine, batches: Batches, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    engine.train_batch(batches)
    _synchronize(device)
    return time.perf_counter() - start


def _figures(config: RunConfig, seconds: float, gemm: float, device: torch.device) -> dict[str, Any]:
    rate = STEP_TOKENS / seconds
    causal = flops_per_token(config.model, config.train.sequence_length, causal=True)
    full = flops_per_token(config.model, config.train.sequence_length)
    peak = peak_flops(device, torch.bfloat16)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "layers": config.model.num_layers,
        "parameters": parameter_count(config.model),
        "micro_batch": config.train.micro_batch_size,
        "recompute": config.train.activation_checkpointing,
        "master_weights": config.train.master_weights,
        "step_seconds": round(seconds, 4),
        "tokens_per_second": round(rate, 1),
        "mfu_causal": round(rate * causal / peak, 4),
        "mfu_full": round(rate * full / peak, 4),
        "model_tflops": round(rate * causal / 1e12, 1),
        "sustained_gemm_tflops": round(gemm / 1e12, 1),
        "ratio_to_gemm": round(rate * causal / gemm, 4),
        "peak_memory_gib": round(memory / 2**30, 2),
    }


def _profile(engine: StepEngine, batches: Batches, table: bool) -> dict[str, float]:
    """Seconds of one step by part, from the kernels' names; gaps are what no kernel covers."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.train_batch(batches)
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    seconds: dict[str, float] = defaultdict(float)
    averages = profiler.key_averages()
    for event in averages:
        part = next((part for part, names in PARTS.items() if re.search(names, event.key, re.I)), "other")
        seconds[part] += event.self_device_time_total / 1e6
    seconds["gaps"] = max(0.0, wall - sum(seconds.values()))
    if table:
        sys.stdout.write(averages.table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=80) + "\n")
    return {part: round(value, 4) for part, value in seconds.items()}


def _report(result: dict[str, Any]) -> None:
    for name, value in result.items():
        sys.stdout.write(f"{name:24} {value}\n")
    sys.stdout.write(json.dumps(result) + "\n")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
