"""What a run will need, before it starts: parameters, batch, memory, FLOPs and time, by arithmetic alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from neox_core.config import BatchGeometry, ModelConfig, RunConfig, batch_geometry, largest_batch, sequences_before
from neox_core.errors import ConfigError
from neox_core.parallel.stages import stage_costs
from neox_core.planning.activation_checkpointing import describe_modes, layer_modes
from neox_core.planning.checkpoints import CheckpointNeeds, checkpoint_needs
from neox_core.planning.communication import Collective, group_size, sent_bytes, step_traffic
from neox_core.planning.memory import RESERVED_BYTES, Memory, memory_limit, parameter_count, stage_memory
from neox_core.units import format_bytes, format_count, format_digits, format_flop, format_seconds

A100_PEAK_TFLOPS = 312.0
"""Dense bf16 peak of an NVIDIA A100 (data sheet); H100 and H200: 989."""
A100_MEMORY_GIB = 40.0
"""Memory of the A100s that Llemma was trained on; others have 80, an H200 has 141 GB = 131 GiB or more."""


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
class StagePlan:
    """What each rank of one pipeline stage needs."""

    layers: int
    activation_checkpointing: str
    """What its layers compute again, in words."""
    cost: float
    """Time, in units of a transformer layer's."""
    memory: Memory
    traffic: Counter[Collective]
    """Bytes of a step's collectives, by group and kind: the whole tensor's size."""
    sent: int
    """Bytes that a rank sends in a step."""


@dataclass(frozen=True)
class Plan:
    """A run's needs. Times hold at the given utilisation of the given peak."""

    parameters: int
    parameters_without_embedding: int
    tensor_parallel: int
    pipeline_parallel: int
    batch: BatchGeometry
    steps: int
    run_tokens: int
    """Tokens that the whole run trains on."""
    stages: tuple[StagePlan, ...]
    gpu_memory: float
    """Bytes of one GPU's memory."""
    flops_per_token: int
    causal_flops_per_token: int
    utilisation: float
    peak_tflops: float
    saves: CheckpointNeeds

    @property
    def fullest_stage(self) -> int:
        """The pipeline stage whose ranks need the most memory."""
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].memory.total)

    @property
    def memory(self) -> Memory:
        """Memory of the fullest GPU."""
        return self.stages[self.fullest_stage].memory

    @property
    def spare(self) -> float:
        """Bytes that are left on the fullest GPU; negative if it does not fit."""
        return self.gpu_memory - RESERVED_BYTES - self.memory.total

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
        """Time of one step: FLOPs / (GPUs x peak x utilisation), where all GPUs compute all the time."""
        flops_per_second = self.batch.world_size * self.peak_tflops * 1e12 * self.utilisation
        return self.flops_per_step / flops_per_second / self.batch.busy

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
        return [*self._batch_rows(), *self._memory_rows(), *self.saves.rows(), *self._time_rows()]

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
            *self._stage_rows(),
            ("global batch", f"{batch.sequences:,} sequences = {batch.tokens:,} tokens"),
            ("gradient accumulation steps", self._accumulation()),
        ]

    def _accumulation(self) -> str:
        batch = self.batch
        fewest, most = batch.micro_batches_of(batch.data_parallel - 1), batch.accumulation_steps
        if fewest == most:
            return f"{most} of micro batch {batch.micro_batch_size}"
        more = batch.sequences // batch.micro_batch_size % batch.data_parallel
        return (
            f"{most} on {more} data-parallel ranks, {fewest} on {batch.data_parallel - more}, of micro batch "
            f"{batch.micro_batch_size}: the same batch and its exact mean; GPUs wait {1 - batch.busy:.1%} of the time"
        )

    def _stage_rows(self) -> list[tuple[str, str]]:
        if self.pipeline_parallel == 1:
            return []
        costs = [stage.cost for stage in self.stages]
        slowest, mean = max(costs), sum(costs) / len(costs)
        layers = " + ".join(str(stage.layers) for stage in self.stages)
        return [("layers per stage", f"{layers}; the slowest stage takes {slowest / mean:.2f} times the mean")]

    def _memory_rows(self) -> list[tuple[str, str]]:
        where = f" on pipeline stage {self.fullest_stage}" if self.pipeline_parallel > 1 else ""
        answer = (
            f"yes, {format_bytes(self.spare)} to spare"
            if self.spare >= 0
            else f"no, {format_bytes(-self.spare)} too much"
        )
        return [
            (f"memory per GPU{where}", format_bytes(self.memory.total)),
            (f"fits {format_bytes(self.gpu_memory)} less {format_bytes(RESERVED_BYTES)} for CUDA and NCCL", answer),
        ]

    def _time_rows(self) -> list[tuple[str, str]]:
        speed = f"{self.tokens_per_second_per_gpu:,.0f} tokens/s"
        return [
            (
                "FLOPs per token",
                f"{format_flop(self.flops_per_token)} ({format_flop(self.causal_flops_per_token)} causal)",
            ),
            (
                "FLOPs per step",
                f"{format_flop(self.flops_per_step)} ({format_flop(self.causal_flops_per_step)} causal)",
            ),
            ("assumed speed per GPU", f"{self.utilisation:.0%} of {self.peak_tflops:g} TFLOP/s = {speed}"),
            ("time per step", format_seconds(self.step_seconds)),
            ("run", f"{self.steps:,} steps = {format_count(self.run_tokens)} tokens"),
            ("run time", f"{format_seconds(self.run_hours * 3600)} = {format_digits(self.gpu_hours)} GPU hours"),
        ]


def plan(
    config: RunConfig,
    nodes: int | None = None,
    utilisation: float = 0.4,
    peak_tflops: float = A100_PEAK_TFLOPS,
    gpu_memory_gib: float = A100_MEMORY_GIB,
) -> Plan:
    """Work out what a run needs.

    Args:
        nodes: number of nodes instead of launch.nodes.
        utilisation: share of the peak that the model FLOPs (full attention) reach. Llemma: 0.36 (7B), 0.21 (34B).
        peak_tflops: dense peak of one GPU in the run's precision.
        gpu_memory_gib: memory of one GPU.

    Raises:
        ConfigError: the nodes don't divide the batch (the message names those that do), or a figure is out of range.
    """
    if not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation {utilisation} is not a share: give a number above 0 and up to 1, such as 0.4")
    if peak_tflops <= 0:
        raise ConfigError(f"peak_tflops {peak_tflops} is not positive: give one GPU's peak, 312 for an A100")
    if gpu_memory_gib <= 0:
        raise ConfigError(
            f"gpu_memory_gib {gpu_memory_gib} is not positive: give one GPU's memory, 40 or 80 for an A100"
        )
    batch = batch_geometry(config, nodes)
    largest = largest_batch(config, nodes)
    available = memory_limit(config, gpu_memory_gib * 2**30)
    return Plan(
        parameters=parameter_count(config.model),
        parameters_without_embedding=parameter_count(config.model, input_embedding=False),
        tensor_parallel=config.parallel.tensor,
        pipeline_parallel=config.parallel.pipeline,
        batch=batch,
        steps=config.train.steps,
        run_tokens=sequences_before(config.train, config.train.steps + 1) * config.train.sequence_length,
        stages=tuple(_stage_plan(config, largest, stage, available) for stage in range(config.parallel.pipeline)),
        gpu_memory=gpu_memory_gib * 2**30,
        flops_per_token=flops_per_token(config.model, config.train.sequence_length),
        causal_flops_per_token=flops_per_token(config.model, config.train.sequence_length, causal=True),
        utilisation=utilisation,
        peak_tflops=peak_tflops,
        saves=checkpoint_needs(config, batch),
    )


def _stage_plan(config: RunConfig, batch: BatchGeometry, stage: int, available: float) -> StagePlan:
    modes = layer_modes(config, batch, stage, available)
    traffic = step_traffic(config, batch, stage, modes)
    sent = sum(sent_bytes(key, size, group_size(key, config, batch)) for key, size in traffic.items())
    memory = stage_memory(config, batch, stage, modes)
    return StagePlan(len(modes), describe_modes(modes), stage_costs(config)[stage], memory, traffic, sent)
