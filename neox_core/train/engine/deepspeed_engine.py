"""The DeepSpeed engine: pipeline, ZeRO-1, fp32 master weights and gradient accumulation."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.precision_config import DeepSpeedBF16Config as BF16Config
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn

from neox_core.config import BatchGeometry, RunConfig
from neox_core.parallel.build import LayerWeights
from neox_core.parallel.mesh import Mesh, neighbours_group
from neox_core.parallel.weight_gradients import accumulate_linear_gradients
from neox_core.train.engine.gradient_norms import GradientNorms
from neox_core.train.engine.outcome import loss_of
from neox_core.train.engine.pipeline_stage import build_stage
from neox_core.train.engine.sharded_optimizer import ShardedOptimizer
from neox_core.train.engine.verification import verify_master_weights


def build_engine(config: RunConfig, mesh: Mesh, geometry: BatchGeometry, weights: LayerWeights) -> PipelineEngine:
    """Build this rank's stage with its weights, and DeepSpeed's engine around it. Collective over all ranks.

    Raises:
        CheckpointError: the fp32 master weights are not the weights that were loaded.
    """
    settings = deepspeed_config(config, geometry)
    module = build_stage(config, mesh, geometry, weights)
    optimizer = torch.optim.AdamW(
        _parameter_groups(module, config.train.optimizer.weight_decay),
        lr=config.train.optimizer.lr,
        betas=config.train.optimizer.betas,
        eps=config.train.optimizer.eps,
        # Passed ready-made: DeepSpeed's own choice compiles an extension at start.
        fused=True,
    )
    engine = TrainingEngine(
        mesh=mesh,
        kv_group=_kv_group(config),
        packed=config.train.master_weights == "packed" and config.train.precision == "bf16",
        args=None,
        model=module,
        optimizer=optimizer,
        mpu=module.mpu(),
        dist_init_required=False,
        config=settings,
        config_class=DeepSpeedConfig(settings, module.mpu()),
    )
    verify_master_weights(engine, trained=False)
    norms = GradientNorms(module, engine.optimizer, config.model, mesh)
    engine.gradient_groups, engine.optimizer.group_squares = norms.names, norms.squares
    if mesh.device.type == "cuda" and config.train.precision == "bf16":
        accumulate_in_products(engine, geometry)
    return engine


def accumulate_in_products(engine: PipelineEngine, geometry: BatchGeometry) -> None:
    """Let matrix products add the weights' gradients to the optimizer's buffers, the head's beside the loss."""
    accumulate_linear_gradients(engine.module, engine.optimizer)
    engine.module.loss_fn.early_gradient = 1 / geometry.accumulation_steps


class TrainingEngine(PipelineEngine):  # type: ignore[misc]
    """DeepSpeed's pipeline engine with our optimizer, in both precisions."""

    def __init__(self, mesh: Mesh, kv_group: dist.ProcessGroup | None, packed: bool, **named: Any) -> None:
        self._mesh, self._kv_group, self._packed = mesh, kv_group, packed
        self._backward_passes = 0
        self.graphs: Any = None
        self.graph_key: Any = None
        self.use_graphs = False
        self.replaying = False
        super().__init__(**named)
        self.using_bf16_optimizer = True  # how DeepSpeed calls fp32 accumulation
        self.gradient_groups: tuple[str, ...] = ()
        """Names of the groups of layers in an outcome."""

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> ShardedOptimizer:
        return self._configure_bf16_optimizer(optimizer)

    def _configure_bf16_optimizer(self, optimizer: torch.optim.Optimizer) -> ShardedOptimizer:
        return ShardedOptimizer(
            optimizer,
            self.param_names,
            mesh=self._mesh,
            kv_group=self._kv_group,
            packed=self._packed,
            bfloat16_config=BF16Config(enabled=True, immediate_grad_update=True),
            mpu=self.mpu,
            clip_grad=self.gradient_clipping(),
            allgather_bucket_size=self.zero_allgather_bucket_size(),
            dp_process_group=self.seq_data_parallel_group,
            timers=NoopTimer(),
            grad_acc_dtype=torch.float32,
        )

    def train_batch(self, data_iter: Any = None) -> Any:
        self._forward_passes = 0
        return super().train_batch(data_iter)

    def _exec_forward_pass(self, buffer_id: int) -> None:
        if not (self.use_graphs and self.module.training):
            super()._exec_forward_pass(buffer_id)
            return
        inputs = self.pipe_buffers["inputs"][buffer_id]
        targets = self.pipe_buffers["labels"][buffer_id] if self.is_last_stage() else None
        if self._forward_passes == 0:
            self._arm(inputs, targets)
        self._forward_passes += 1
        if not self.replaying:
            super()._exec_forward_pass(buffer_id)
            return
        slot = self.graphs.forward(inputs, targets)
        self.pipe_buffers["inputs"][buffer_id] = slot.inputs
        if self.is_last_stage():
            self.loss = slot.results
            self.module.loss_fn.count(targets)
            if self._report is not None:
                self._report(*slot.token_losses)
            self.fwd_outputs.append(self.loss)
            self.total_loss = self.loss.clone() if self.total_loss is None else self.total_loss + self.loss
        else:
            self.pipe_buffers["outputs"][buffer_id] = slot.results

    def _arm(self, inputs: Any, targets: Any) -> None:
        flat = inputs if isinstance(inputs, tuple) else (inputs,)
        key = ([(x.shape, x.dtype) for x in flat], self.micro_batches)
        self.replaying = False
        if key != self.graph_key:
            self.graph_key, self.graphs = key, None
            return
        if self.graphs is None:
            self._record(inputs, targets)
        self.replaying = self.graphs is not None
        if self.replaying:
            self.graphs.begin()

    def _record(self, inputs: Any, targets: Any) -> None:
        import gc

        from neox_core.train.engine.graphs import StageGraphs, Work

        self.loss = None
        for key in ("outputs", "output_tensors"):
            if key in self.pipe_buffers:
                self.pipe_buffers[key] = [None] * len(self.pipe_buffers[key])
        gc.collect()
        loss_fn, gas = self.module.loss_fn, self.micro_batches
        last = self.is_last_stage()
        self._report, made = None, {}
        if last and loss_fn.on_token_losses is not None:
            self._report = loss_fn.on_token_losses
            loss_fn.on_token_losses = lambda *found: made.update(found=found)

        def forward(inputs: Any, targets: Any) -> Any:
            results = self.module(inputs)
            return loss_fn.compute(results, targets) if last else results

        def backward(results: Any, gradient: Any) -> None:
            first = results[0] if isinstance(results, tuple) else results
            if last:
                (first / gas).backward()
            else:
                first.backward(gradient)

        def last_backward(results: Any, gradient: Any) -> None:
            self.optimizer.begin_reduction()
            backward(results, gradient)
            with torch.no_grad():
                self.optimizer.reduction.finish()

        from neox_core.train.engine import graphs as G

        slots = self.num_stages - self.stage_id
        last_work = Work(forward, last_backward) if self._mesh.data_size > 1 else None
        stage = StageGraphs(slots, Work(forward, backward), last_work, last)
        original = G.RecordedMicroBatch.__init__

        def init(slot: Any, *args: Any) -> None:
            original(slot, *args)
            slot.token_losses = made.get("found")

        G.RecordedMicroBatch.__init__ = init
        try:
            stage.record(inputs, targets, self.micro_batches)
        finally:
            G.RecordedMicroBatch.__init__ = original
            if last:
                loss_fn.on_token_losses = self._report
        self.graphs = stage

    def _exec_backward_pass(self, buffer_id: int) -> None:
        if self.replaying:
            gradient = None
            if not self.is_last_stage():
                gradient = self.grad_layer if isinstance(self.grad_layer, Tensor) else self.grad_layer[0]
            slot = self.graphs.backward(gradient)
            self.pipe_buffers["inputs"][buffer_id] = slot.inputs
            self.pipe_buffers["outputs"][buffer_id] = None
            return
        self._backward_passes += 1
        if self._backward_passes == self.micro_batches:
            self.optimizer.begin_reduction()
        super()._exec_backward_pass(buffer_id)

    # DeepSpeed looks functions up here, not by name.
    _INSTRUCTION_MAP = PipelineEngine._INSTRUCTION_MAP | {
        schedule.ForwardPass: _exec_forward_pass,
        schedule.BackwardPass: _exec_backward_pass,
    }

    def _bf16_reduce_grads(self) -> None:
        self._backward_passes = 0
        self.optimizer.reduce_gradients(self.replaying)
        self.optimizer.counted_share = self._own_counted_share()

    def eval_batch(self, *args: Any, **named: Any) -> Any:
        """As DeepSpeed's, but the mean over the positions that count."""
        result = super().eval_batch(*args, **named)
        share = self._own_counted_share()
        dist.all_reduce(share)
        share = (share / self._mesh.data_size).clamp(min=1e-9).float()
        return (result[0] / share, *result[1:]) if isinstance(result, tuple) else result / share

    def _own_counted_share(self) -> Tensor:
        """Share of this rank's positions that count, if it computed a loss and is the first to do so."""
        share = self.module.loss_fn.take_counted_share() if self.is_last_stage() else None
        if share is None or self._mesh.tensor_rank:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return share

    def set_accumulation_steps(self, steps: int) -> None:
        """Micro batches of the global batches from now on. Between steps only."""
        self.set_train_batch_size(steps * self.train_micro_batch_size_per_gpu() * self.dp_world_size)
        if self.module.loss_fn.early_gradient is not None:
            self.module.loss_fn.early_gradient = 1 / steps

    def _take_model_step(self, lr_kwargs: Any) -> None:
        if self.is_last_stage():
            # Tensor-parallel ranks have the same loss: it counts once, but what is not finite counts on each.
            share = 1 / self._mesh.data_size if self._mesh.tensor_rank == 0 else 0.0
            self.optimizer.loss_share = self._scale_loss_by_gas(self.total_loss.detach()) * share
        super()._take_model_step(lr_kwargs)

    def _aggregate_total_loss(self) -> Tensor:
        """The mean loss over the positions of the global batch that count.

        It came with the gradient norm, so that DeepSpeed's own exchange of it is spared.
        """
        self.agg_additional_losses = None
        return loss_of(self.optimizer.outcome).float()

    def _next_batch(self) -> Any:
        """Move a micro batch to the device without waiting for it, as DeepSpeed's own copy from the host would."""
        batch = super()._next_batch()
        return batch if batch is None or self.device.type != "cuda" else _to_device(batch, self.device)


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch if batch.is_cuda else batch.pin_memory().to(device, non_blocking=True)
    return tuple(_to_device(part, device) for part in batch)


def deepspeed_config(config: RunConfig, geometry: BatchGeometry) -> dict[str, Any]:
    """DeepSpeed's own settings for the recipe."""
    # Between stages, DeepSpeed would split activations among tensor-parallel ranks as if they had the same.
    partitioned = not config.parallel.sequence
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": geometry.micro_batch_size,
        "gradient_accumulation_steps": geometry.accumulation_steps,
        "gradient_clipping": config.train.gradient_clip,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "pipeline": {"use_reentrant": False, "pipe_partitioned": partitioned, "grad_partitioned": partitioned},
        "checkpoint": {"parallel_write": {"pipeline_stage": True}},
        "steps_per_print": 10**9,
    }
    if config.train.precision == "bf16":
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        # Without it the fp32 gradients are cast to bf16 before the data-parallel sum.
        settings["communication_data_type"] = "fp32"
    return settings


def _kv_group(config: RunConfig) -> dist.ProcessGroup | None:
    """The ranks that share this rank's KV head, if any do. Collective over all ranks."""
    copies = config.parallel.tensor // config.model.num_kv_heads
    return neighbours_group(copies) if copies > 1 else None


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, norms do not. Every pipeline stage has both groups, or DeepSpeed's reductions deadlock."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
