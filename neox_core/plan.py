"""What a run will need, before it starts: parameters, batch, memory, FLOPs and time, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass, fields

from neox_core.config import BatchGeometry, ModelConfig, RunConfig, batch_geometry, sequences_before
from neox_core.errors import ConfigError
from neox_core.memory import Memory, fullest_stage, parameter_count

A100_PEAK_TFLOPS = 312.0
"""Dense bf16 peak of an NVIDIA A100 (data sheet); H100 and H200: 989."""


def flops_per_token(model: ModelConfig, sequence_length: int, causal: bool = False) -> int:
    """Model FLOPs to train on one token: 6·N + 12·L·D·T.

    N counts parameters without the input embedding. Each takes part in one multiply-add forward and two backward; so
    do the attention scores and their product with the values, over all T positions of L layers of width D. This is the
    convention of published utilisation figures (PaLM, arXiv 2204.02311, appendix B). Recomputation is not counted.

    Args:
        causal: count only the half of the attention that a causal mask leaves, 6·L·D·T: the useful FLOPs.
    """
    attention_width = model.num_attention_heads * model.head_dim
    attention = (6 if causal else 12) * model.num_layers * attention_width * sequence_length
    return 6 * parameter_count(model, input_embedding=False) + attention


@dataclass(frozen=True)
class Plan:
    """A run's needs. Times hold at the given utilisation of the given peak; memory is of the fullest GPU."""

    parameters: int
    parameters_without_embedding: int
    tensor_parallel: int
    pipeline_parallel: int
    batch: BatchGeometry
    steps: int
    run_tokens: int
    """Tokens that the whole run trains on."""
    memory: Memory
    fullest_stage: int
    flops_per_token: int
    causal_flops_per_token: int
    utilisation: float
    peak_tflops: float

    @property
    def flops_per_step(self) -> int:
        """Model FLOPs of one step over all GPUs, full attention."""
        return self.flops_per_token * self.batch.tokens

    @property
    def causal_flops_per_step(self) -> int:
        """Model FLOPs of one step over all GPUs, causal attention."""
        return self.causal_flops_per_token * self.batch.tokens

    @property
    def step_seconds(self) -> float:
        """Time of one step: FLOPs / (GPUs x peak x utilisation)."""
        return self.flops_per_step / (self.batch.world_size * self.peak_tflops * 1e12 * self.utilisation)

    @property
    def run_hours(self) -> float:
        """Time of all steps; validation, checkpoints and queueing come on top."""
        return self.run_tokens / self.batch.tokens * self.step_seconds / 3600

    @property
    def gpu_hours(self) -> float:
        """run_hours x GPUs."""
        return self.run_hours * self.batch.world_size

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Throughput of one GPU."""
        return self.batch.tokens / self.step_seconds / self.batch.world_size

    def rows(self) -> list[tuple[str, str]]:
        """The plan as (what, value with unit), in the order in which one reads it."""
        return [*self._batch_rows(), *self._memory_rows(), *self._time_rows()]

    def _batch_rows(self) -> list[tuple[str, str]]:
        batch = self.batch
        return [
            ("parameters", f"{self.parameters:,}"),
            ("parameters without input embedding", f"{self.parameters_without_embedding:,}"),
            (
                "GPUs",
                f"{batch.world_size} = TP {self.tensor_parallel} x PP {self.pipeline_parallel}"
                f" x DP {batch.data_parallel}",
            ),
            ("global batch", f"{batch.sequences:,} sequences = {batch.tokens:,} tokens"),
            ("gradient accumulation steps", f"{batch.accumulation_steps} of micro batch {batch.micro_batch_size}"),
        ]

    def _memory_rows(self) -> list[tuple[str, str]]:
        parts = [(f"  {part.name}", _bytes(getattr(self.memory, part.name))) for part in fields(self.memory)]
        where = f" on pipeline stage {self.fullest_stage}" if self.pipeline_parallel > 1 else ""
        return [(f"memory per GPU{where}", f"{_bytes(self.memory.total)}, and the CUDA context and workspace"), *parts]

    def _time_rows(self) -> list[tuple[str, str]]:
        speed = f"{self.tokens_per_second_per_gpu:,.0f} tokens/s"
        return [
            ("FLOPs per token", f"{_flop(self.flops_per_token)} ({_flop(self.causal_flops_per_token)} causal)"),
            ("FLOPs per step", f"{_flop(self.flops_per_step)} ({_flop(self.causal_flops_per_step)} causal)"),
            ("assumed speed per GPU", f"{self.utilisation:.0%} of {self.peak_tflops:g} TFLOP/s = {speed}"),
            ("time per step", _duration(self.step_seconds)),
            ("run", f"{self.steps:,} steps = {_scaled(self.run_tokens, _COUNTS)} tokens"),
            ("run time", f"{_duration(self.run_hours * 3600)} = {_digits(self.gpu_hours)} GPU hours"),
        ]


def plan(
    config: RunConfig, nodes: int | None = None, utilisation: float = 0.4, peak_tflops: float = A100_PEAK_TFLOPS
) -> Plan:
    """Work out what a run needs.

    Args:
        nodes: number of nodes instead of launch.nodes.
        utilisation: share of the peak that the model FLOPs (full attention) reach. Llemma: 0.36 (7B), 0.21 (34B).
        peak_tflops: dense peak of one GPU in the run's precision.

    Raises:
        ConfigError: the nodes don't divide the batch (the message names those that do), or a figure is out of range.
    """
    if not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation {utilisation} is not a share: give a number above 0 and up to 1, such as 0.4")
    if peak_tflops <= 0:
        raise ConfigError(f"peak_tflops {peak_tflops} is not positive: give one GPU's peak, 312 for an A100")
    batch = batch_geometry(config, nodes)
    stage, memory = fullest_stage(config, batch)
    return Plan(
        parameters=parameter_count(config.model),
        parameters_without_embedding=parameter_count(config.model, input_embedding=False),
        tensor_parallel=config.parallel.tensor,
        pipeline_parallel=config.parallel.pipeline,
        batch=batch,
        steps=config.train.steps,
        run_tokens=sequences_before(config.train, config.train.steps + 1) * config.train.sequence_length,
        memory=memory,
        fullest_stage=stage,
        flops_per_token=flops_per_token(config.model, config.train.sequence_length),
        causal_flops_per_token=flops_per_token(config.model, config.train.sequence_length, causal=True),
        utilisation=utilisation,
        peak_tflops=peak_tflops,
    )


_BYTES = (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10))
_FLOPS = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
_COUNTS = (("billion", 1e9), ("million", 1e6), ("thousand", 1e3))
_TIMES = (("hours", 3600.0), ("minutes", 60.0), ("s", 1.0), ("ms", 1e-3))


def _scaled(value: float, units: tuple[tuple[str, float], ...]) -> str:
    """The value in the largest unit that leaves it at or above 1."""
    unit, size = next((entry for entry in units if value >= entry[1]), units[-1])
    return f"{_digits(value / size)} {unit}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _bytes(size: int) -> str:
    return _scaled(size, _BYTES)


def _flop(count: int) -> str:
    return _scaled(count, _FLOPS)


def _duration(seconds: float) -> str:
    return _scaled(seconds, _TIMES)
