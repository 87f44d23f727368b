"""A training step of torchtitan (0.2.2) on the shapes of benchmarks/train_step.py, which peers.py compares it with.

    torchrun --nproc_per_node 2 -m benchmarks.torchtitan_step 7b --micro-batch 2
    torchrun --nproc_per_node 2 -m benchmarks.torchtitan_step 7b --tp 2 --micro-batch 4 --async-tp

Its Trainer as it is, compiled, on random tokens. Without --tp all ranks share parameters, gradients and Adam states
(FSDP: bf16 computation, fp32 states). With --tp they are tensor parallel, and all is bf16, since torchtitan has mixed
precision in FSDP alone; that is less work than ours in fp32. The last line is JSON.

Needs torchtitan==0.2.2, torchdata, tyro and datasets, and GPUs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.commands import at_least, require_ranks
from benchmarks.train_step import MODELS, base_config, report
from neox_core.config import ModelConfig

NAME, FLAVOR = "llemma", "benchmark"


class RandomTokens:
    """What torchtitan asks of a loader of data."""

    def __init__(self, batch: int, length: int, vocabulary: int) -> None:
        self._shape, self._vocabulary = (batch, length + 1), vocabulary

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            ids = torch.randint(self._vocabulary, self._shape)
            yield {"input": ids[:, :-1]}, ids[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Nothing has to be known to go on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is none."""


def main() -> None:
    """Run the benchmark and print its figures."""
    options = _options()
    require_ranks("benchmarks.torchtitan_step", options.model)
    from torchtitan.config import ConfigManager
    from torchtitan.train import Trainer

    ranks = int(os.environ["WORLD_SIZE"])
    model = base_config(options.model, options.layers).model
    _register(model, options)
    trainer = Trainer(ConfigManager().parse_args(arguments(options, ranks)))
    batches = trainer.batch_generator(trainer.dataloader)
    seconds = []
    for step in range(1, options.steps + 1):
        trainer.step = step
        torch.cuda.synchronize()
        dist.barrier()
        started = time.perf_counter()
        trainer.train_step(batches)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    counted = sorted(seconds[2:])
    rate = options.tokens / counted[len(counted) // 2]
    if dist.get_rank() == 0:
        peak = torch.cuda.max_memory_allocated() / 2**30
        named = {"layers": model.num_layers, "micro_batch": options.micro_batch, "tensor": options.tp}
        report(named | {"tokens_per_second": round(rate, 1), "peak_memory_gib": round(peak, 2)})
    sys.stdout.flush()
    os._exit(0)  # its threads and process groups need not end in order


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--layers", type=at_least(1), help="fewer layers than the model has")
    parser.add_argument("--tp", type=at_least(1), default=1, help="tensor-parallel ranks: all, or 1")
    parser.add_argument("--async-tp", action="store_true", help="torch's asynchronous tensor parallelism")
    parser.add_argument("--micro-batch", type=at_least(1), default=1)
    parser.add_argument("--tokens", type=at_least(1), default=65536, help="of a step, for each GPU")
    parser.add_argument("--sequence-length", type=at_least(1), default=4096)
    parser.add_argument("--steps", type=at_least(3), default=6, help="the first two are not counted")
    parser.add_argument("--activation-checkpointing", choices=["none", "selective", "full"], default="none")
    return parser.parse_args()


def arguments(options: argparse.Namespace, ranks: int) -> list[str]:
    """What torchtitan is called with, for as many tokens a step and GPU as ours."""
    sequences = options.tokens * ranks // options.sequence_length
    given: dict[str, Any] = {
        "model.name": NAME,
        "model.flavor": FLAVOR,
        "job.dump_folder": mkdtemp(),
        "training.seq_len": options.sequence_length,
        "training.local_batch_size": options.micro_batch,
        "training.global_batch_size": sequences,
        "training.dtype": "bfloat16" if options.tp > 1 else "float32",
        "metrics.log_freq": 1000,
        "activation_checkpoint.mode": options.activation_checkpointing,
        "parallelism.tensor_parallel_degree": options.tp,
        "parallelism.data_parallel_shard_degree": ranks // options.tp,
    }
    switches = ["--compile.enable", *(["--parallelism.enable_async_tensor_parallel"] if options.async_tp else [])]
    return [*switches, *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


def model_arguments(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    """The same architecture in torchtitan's words, which gives the MLP's width as a multiple of its default."""
    return {
        "dim": model.hidden_size,
        "n_layers": model.num_layers,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": model.num_kv_heads,
        "vocab_size": model.vocab_size,
        "multiple_of": 1,
        "ffn_dim_multiplier": (model.intermediate_size + 0.5) / (8 * model.hidden_size // 3),
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "max_seq_len": sequence_length,
    }


def _register(model: ModelConfig, options: argparse.Namespace) -> None:
    from torchtitan.components.loss import build_cross_entropy_loss
    from torchtitan.components.lr_scheduler import build_lr_schedulers
    from torchtitan.components.optimizer import build_optimizers
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs, parallelize_llama
    from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

    def loader(**_: Any) -> RandomTokens:
        return RandomTokens(options.micro_batch, options.sequence_length, model.vocab_size)

    spec = TrainSpec(
        model_cls=Transformer,
        model_args={FLAVOR: TransformerModelArgs(**model_arguments(model, options.sequence_length))},
        parallelize_fn=parallelize_llama,
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=loader,
        build_tokenizer_fn=None,
        build_loss_fn=build_cross_entropy_loss,
    )
    register_train_spec(NAME, spec)


if __name__ == "__main__":
    main()
