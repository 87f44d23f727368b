"""Speed of one training step through the real engine, on any number of GPUs.

    torchrun --nproc_per_node 1 -m benchmarks.train_step 7b
    torchrun --nproc_per_node 1 -m benchmarks.train_step 34b-slice
    torchrun --nproc_per_node 4 -m benchmarks.train_step 7b --tp 2 --micro-batch 2
    torchrun --nproc_per_node 2 -m benchmarks.train_step 7b --layers 8 --tp 2 --sequence-length 128 --tokens 1024
    torchrun --nproc_per_node 1 -m benchmarks.train_step 7b --layers 8 --family qwen3

Random weights and tokens; 65,536 tokens a step and GPU, sequence 4096, bf16 parameters, fp32 master weights, Adam
states and gradient accumulation, clip and optimizer included. First the sustained rate of the model's own matrix
products is measured, on all GPUs at once, of which the slowest counts. Short sequences make a step that is all launches
(the last example): `host_ms_per_layer` is the host's time for a layer and micro batch. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.commands import at_least, require_ranks
from benchmarks.kernel_times import kernel_times
from neox_core.config import RunConfig, batch_geometry, load_config
from neox_core.config.families import FAMILIES
from neox_core.config.load import parse_config
from neox_core.errors import ConfigError
from neox_core.model import ModelDimensions
from neox_core.parallel.build import layer_types
from neox_core.parallel.ranks.mesh import Mesh, build_mesh, init_distributed
from neox_core.parallel.sharding import mark_parameters, sharding_of
from neox_core.planning.calibration import sustained_gemm, synchronize
from neox_core.planning.memory import parameter_count
from neox_core.planning.plan import flops_per_token
from neox_core.planning.search import SCHEDULES
from neox_core.train.engine.deepspeed_engine import build_engine
from neox_core.train.observe.hardware import peak_flops

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = {"7b": ("llemma_7b.yml", None), "34b-slice": ("llemma_34b.yml", 8), "tiny": ("toy.yml", 2)}
_SHARED = 1 << 20
"""From here on: seeds of keys' and values' weights that tensor-parallel ranks have in common."""
ATTENTION = ["auto", "flash_attn_4", "flash_attn", "cudnn", "sdpa"]


def main() -> None:
    """Run the benchmark and print its figures."""
    options = parse_options()
    require_ranks("benchmarks.train_step", options.model)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = checked(run_config(options, int(os.environ["WORLD_SIZE"])))
    device = init_distributed(config.launch)
    mesh = build_mesh(config.parallel, device)
    result = measure(config, mesh, slowest_gemm(config, device, options.gemm_seconds), options)
    if mesh.rank == 0:
        report(result)
    sys.stdout.flush()
    dist.destroy_process_group()


def slowest_gemm(config: RunConfig, device: torch.device, seconds: float) -> float:
    """FLOP/s of the model's products on all GPUs at once, of the slowest. Collective."""
    tokens = config.train.micro_batch_size * config.train.sequence_length
    rates: list[float] = [0.0] * dist.get_world_size()
    dist.barrier()
    dist.all_gather_object(rates, sustained_gemm(config.model, config.parallel.tensor, tokens, device, seconds))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # recomputation `auto` looks at what is free
    return min(rates)


def measure(config: RunConfig, mesh: Mesh, gemm: float, options: argparse.Namespace) -> dict[str, Any]:
    """Some steps of a training: its figures. Collective.

    Args:
        gemm: FLOP/s to which its own are compared.
    """
    device = mesh.device
    engine = build_engine(config, mesh, batch_geometry(config), random_weights(config, device))
    batches = random_batches(config, mesh)
    timed = sorted([timed_step(engine, batches, device) for _ in range(options.steps)][2:])
    seconds, host = timed[len(timed) // 2]
    result = _figures(config, options.tokens, seconds, gemm, device) | _fullest(device)
    passes = config.model.num_layers / mesh.pipeline_size * batch_geometry(config).accumulation_steps
    result["host_ms_per_layer"] = round(1e3 * host / passes, 3)
    result["loss"] = float(engine.train_batch(batches))
    if device.type == "cuda":
        result["parts_seconds"], table = kernel_times(lambda: engine.train_batch(batches))
        if options.table and mesh.rank == 0:
            sys.stdout.write(table + "\n")
    engine.close()
    return result


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--layers", type=at_least(1), help="fewer layers than the model has")
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="the model with this family's differences")
    parser.add_argument("--tp", type=at_least(1), default=1, help="tensor-parallel ranks")
    parser.add_argument("--pp", type=at_least(1), default=1, help="pipeline stages")
    parser.add_argument("--schedule", choices=SCHEDULES, default="1f1b", help="of pipeline stages")
    parser.add_argument("--micro-batch", type=at_least(1), default=1)
    parser.add_argument("--tokens", type=at_least(1), default=65536, help="of a step, for each GPU")
    parser.add_argument("--sequence-length", type=at_least(1), default=4096)
    parser.add_argument("--steps", type=at_least(3), default=6, help="the first two are not counted")
    parser.add_argument("--activation-checkpointing", choices=["none", "selective", "full", "auto"], default="none")
    parser.add_argument("--attention", choices=ATTENTION, default="auto")
    parser.add_argument("--master-weights", choices=["fp32", "packed"], default="packed")
    parser.add_argument("--cuda-graphs", choices=["auto", "off"], default="auto")
    parser.add_argument("--overlap", choices=["auto", "off"], default="auto")
    parser.add_argument("--gemm-seconds", type=float, default=8.0)
    parser.add_argument("--table", action="store_true", help="print the slowest kernels")
    return parser.parse_args(arguments)


@cache
def base_config(name: str, layers: int | None) -> RunConfig:
    """A model's configuration as it is in configs/, with fewer layers where they are given or it is a slice."""
    file, of_slice = MODELS[name]
    config = load_config(CONFIGS / file)
    layers = layers or of_slice or config.model.num_layers
    return config.model_copy(update={"model": config.model.model_copy(update={"num_layers": layers})})


def run_config(options: argparse.Namespace, ranks: int) -> RunConfig:
    """What is run on a number of GPUs."""
    config = base_config(options.model, options.layers)
    train = config.train.model_copy(
        update={
            "global_batch_tokens": options.tokens * ranks,
            "sequence_length": options.sequence_length,
            "micro_batch_size": options.micro_batch,
            "activation_checkpointing": options.activation_checkpointing,
            "master_weights": options.master_weights,
            "attention": options.attention,
            "cuda_graphs": options.cuda_graphs,
        }
    )
    launch = config.launch.model_copy(update={"nodes": 1, "ranks_per_node": ranks, "device": "auto"})
    return config.model_copy(
        update={
            "train": train,
            "launch": launch,
            "parallel": config.parallel.model_copy(
                update={
                    "tensor": options.tp,
                    "pipeline": options.pp,
                    "pipeline_schedule": options.schedule,
                    "overlap": options.overlap,
                }
            ),
            "model": config.model.model_copy(update=_family_settings(options, config.model.num_layers)),
        }
    )


def checked(config: RunConfig) -> RunConfig:
    """The same configuration, or an end with a line that says why it cannot be run."""
    try:
        config = parse_config(config.model_dump(), base=Path(), origin="these options")
        geometry = batch_geometry(config)
    except ConfigError as error:
        sys.exit(str(error))
    if geometry.busy < 1:
        sys.exit(
            f"{geometry.sequences // geometry.micro_batch_size} micro batches are not the same number on each of "
            f"{geometry.data_parallel} data-parallel ranks: change --tokens or --micro-batch"
        )
    return config


def _family_settings(options: argparse.Namespace, layers: int) -> dict[str, Any]:
    family = FAMILIES[options.family]
    without = tuple(n for n in range(layers) if family.no_rope_interval and (n + 1) % family.no_rope_interval == 0)
    window = family.sliding_window and max(family.sliding_window, options.sequence_length)
    return {"family": options.family, "layers_without_rope": without, "sliding_window": window}


def random_weights(config: RunConfig, device: torch.device) -> Any:
    """Each layer's weights, normal of 0.02, as `build_engine` takes them."""
    types, ranks = layer_types(config.model.num_layers), config.parallel.tensor
    whole = ModelDimensions.of(config.model, 1)
    heads = min(ranks, config.model.num_kv_heads)

    def weights(index: int, tensor_rank: int) -> dict[str, Tensor]:
        layer_type = types[index]
        assert layer_type is not None
        with torch.device("meta"):
            layer = layer_type(whole.shard(ranks))
        mark_parameters(layer, whole, ranks, tokens_split=False)
        generator = torch.Generator(device).manual_seed(index * ranks + tensor_rank)
        found = {name: _initial(tensor.shape, generator, device) for name, tensor in layer.state_dict().items()}
        shared = torch.Generator(device).manual_seed(_SHARED + index * heads + tensor_rank * heads // ranks)
        for name, parameter in layer.named_parameters():
            for rows in sharding_of(parameter).shared_rows:
                part = found[name][rows.start : rows.stop]
                part.copy_(_initial(part.shape, shared, device))
        return found

    return weights


def _initial(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return weight.normal_(0, 0.02, generator=generator)


def random_batches(config: RunConfig, mesh: Mesh) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro batches of random ids and their targets, [B,T] each, without end."""
    shape = (config.train.micro_batch_size, config.train.sequence_length + 1)
    generator = torch.Generator(mesh.device).manual_seed(mesh.data_rank)
    while True:
        ids = torch.randint(config.model.vocab_size, shape, generator=generator, device=mesh.device)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def timed_step(engine: Any, batches: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> tuple[float, float]:
    """Seconds of a step, and of the host until all of it was launched."""
    synchronize(device)
    dist.barrier()
    start = time.perf_counter()
    engine.train_batch(batches)
    launched = time.perf_counter() - start
    synchronize(device)
    return time.perf_counter() - start, launched


def _figures(config: RunConfig, tokens: int, seconds: float, gemm: float, device: torch.device) -> dict[str, Any]:
    """Rates are of one GPU."""
    rate = tokens / seconds
    causal = flops_per_token(config.model, config.train.sequence_length, causal=True)
    full = flops_per_token(config.model, config.train.sequence_length)
    peak = peak_flops(device, torch.bfloat16)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "gpus": dist.get_world_size(),
        "tensor": config.parallel.tensor,
        "pipeline": config.parallel.pipeline,
        "family": config.model.family,
        "layers": config.model.num_layers,
        "parameters": parameter_count(config.model),
        "micro_batch": config.train.micro_batch_size,
        "activation_checkpointing": config.train.activation_checkpointing,
        "master_weights": config.train.master_weights,
        "cuda_graphs": config.train.cuda_graphs,
        "overlap": config.parallel.overlap,
        "step_seconds": round(seconds, 4),
        "tokens_per_second": round(rate, 1),
        "mfu_causal": round(rate * causal / peak, 4),
        "mfu_full": round(rate * full / peak, 4),
        "model_tflops": round(rate * causal / 1e12, 1),
        "sustained_gemm_tflops": round(gemm / 1e12, 1),
        "ratio_to_gemm": round(rate * causal / gemm, 4) if gemm else None,
    }


def _fullest(device: torch.device) -> dict[str, float]:
    """The most memory that any GPU needed, and that torch took for it."""
    cuda = device.type == "cuda"
    own = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if cuda else (0, 0)
    found = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    peak, reserved = (round(max(sizes) / 2**30, 2) for sizes in zip(*found, strict=True))
    return {"peak_memory_gib": peak, "reserved_memory_gib": reserved}


def report(result: dict[str, Any]) -> None:
    """Print figures, a line each; then all of them as a line of JSON."""
    for name, value in result.items():
        sys.stdout.write(f"{name:24} {value}\n")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
