"""DeepSpeed's pipeline engine with our optimizer: ZeRO-1, fp32 master weights and gradient accumulation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.constants import BFLOAT16
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.precision_config import DeepSpeedBF16Config as BF16Config
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn

from neox_core.checkpoint.partitions import Place
from neox_core.checkpoint.resharding import Resharding
from neox_core.checkpoint.writer import TakeFile
from neox_core.optimizer import UpdateRule
from neox_core.parallel.build import LayerWeights
from neox_core.parallel.parameter_gathering import OverlappedGathering
from neox_core.parallel.ranks.mesh import Mesh
from neox_core.parallel.weight_gradients import DeferredGradients
from neox_core.train.engine.graphs.graphed_stage import GraphedStage, why_not
from neox_core.train.engine.outcome import loss_of
from neox_core.train.engine.sharded_optimizer import ShardedOptimizer
from neox_core.train.engine.state.files import StateFiles, is_own_file, is_shared_file
from neox_core.train.engine.state.resharded import OptimizerFiles, load_resharded
from neox_core.train.engine.state.verification import verify_before_save, verify_loaded, verify_master_weights
from neox_core.train.engine.step_engine import Batches
from neox_core.train.engine.zero_bubble import WeightGradients, ZeroBubbleSchedule

logger = logging.getLogger(__name__)


class TrainingEngine(PipelineEngine):  # type: ignore[misc]
    """A StepEngine, which says what its methods do, in both precisions.

    Args:
        rule, mesh, kv_group, packed: what ShardedOptimizer takes.
        deferred: takes weights' gradients while the stage owes others something; None: they are added at once.
        named: what PipelineEngine takes.
    """

    def __init__(
        self,
        rule: UpdateRule,
        mesh: Mesh,
        kv_group: dist.ProcessGroup | None,
        packed: bool,
        deferred: DeferredGradients | None,
        **named: Any,
    ) -> None:
        self._rule, self._mesh, self._kv_group, self._packed = rule, mesh, kv_group, packed
        self.deferred = deferred
        self._gradients = self._evaluated = 0
        self._graphs: GraphedStage | None = None
        self._copies = torch.cuda.Stream() if mesh.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._on_phase: Callable[[str], None] = _nobody
        super().__init__(**named)
        self.using_bf16_optimizer = True  # how DeepSpeed calls fp32 accumulation
        self.timers = NoopTimer()  # DeepSpeed's own would keep two events of each step
        self.gradient_groups: tuple[str, ...] = ()
        """Names of the groups of layers in an outcome."""

    def record_graphs(self) -> None:
        """Replay micro batches from CUDA graphs, or say in the log why that cannot be (see graphed_stage.py)."""
        if reason := why_not(self, self._mesh.device):
            logger.info("CUDA graphs: off, since %s", reason)
        else:
            self._graphs = GraphedStage(self, reduces=self.optimizer.overlaps)

    def await_parameters(self) -> None:
        """From now on each layer waits for its updated parameters, before its forward pass."""
        if self._mesh.data_size > 1:
            for name, layer in self.module.named_children():
                if name.isdigit():  # DeepSpeed has an empty one of its own
                    layer.register_forward_pre_hook(partial(_await, self.optimizer.gathering, int(name)))

    def finish_step(self) -> None:
        """Whoever reads or sets parameters, other than the next step, finds them as the last one left them."""
        self.optimizer.gathering.finish()

    def close(self) -> None:
        """Graphs refer to communicators, whose end would wait for theirs."""
        self.finish_step()
        if self._graphs is not None:
            self._graphs.close()

    @property
    def outcome(self) -> Tensor:
        """Of the last step."""
        outcome: Tensor = self.optimizer.outcome
        return outcome

    def eval_batch(
        self, batches: Batches, num_micro_batches: int | None = None, own: int | None = None, **named: Any
    ) -> Any:
        """As DeepSpeed's, but the mean over the positions that count."""
        steps = num_micro_batches or self.gradient_accumulation_steps()
        self._evaluated = own or steps
        result = super().eval_batch(batches, num_micro_batches=steps, **named)
        share = self._own_counted_share() * (self._evaluated / steps)
        dist.all_reduce(share)
        share = (share / self._mesh.data_size).clamp(min=1e-9).float()
        return (result[0] / share, *result[1:]) if isinstance(result, tuple) else result / share

    def set_accumulation_steps(self, steps: int, own: int | None = None) -> None:
        """Ranks divide by the same number, whatever they have: the share of positions that count says the rest."""
        self.set_train_batch_size(steps * self.train_micro_batch_size_per_gpu() * self.dp_world_size)
        self.micro_batches = own or steps
        if self.module.loss_fn.early_gradient is not None:
            self.module.loss_fn.early_gradient = 1 / steps

    def set_learning_rate(self, rate: float) -> None:
        """Of all groups of parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def set_loss_limit(self, limit: float) -> None:
        """On the device, which alone looks at it."""
        self.optimizer.loss_limit.fill_(limit)

    def observe(
        self, on_phase: Callable[[str], None] | None, on_token_losses: Callable[[Tensor, Tensor], None] | None
    ) -> None:
        """Token losses come from the last stage's first tensor-parallel rank."""
        self._on_phase = on_phase or _nobody
        if self.is_last_stage() and self._mesh.tensor_rank == 0:
            self.module.loss_fn.on_token_losses = on_token_losses

    def load_weights(self, weights: LayerWeights) -> None:
        """Into the parameters where they are."""
        self.finish_step()
        for name, layer in self.module.named_children():
            if name.isdigit():  # DeepSpeed has an empty one of its own
                layer.load_state_dict(weights(int(name), self._mesh.tensor_rank), strict=True)
        self.optimizer.forget()
        self.global_steps = self.global_samples = self.micro_steps = self.skipped_steps = 0
        self.agg_train_loss = self.total_loss = None
        verify_loaded(self)

    def save_state(self, folder: Path, tag: str, notes: Mapping[str, Any], take: TakeFile) -> None:
        """In DeepSpeed's files; none points at the newest. On GPUs a stream of its own copies, during the next step up
        to its update."""
        self.finish_step()
        verify_before_save(self, tag)
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream())
        self.checkpoint_engine = StateFiles(take, self._copies)
        self.save_checkpoint(str(folder), tag=tag, client_state=dict(notes), save_latest=False)
        if self._copies is not None:
            self.optimizer.copied = self._copies.record_event()

    def load_state(self, folder: Path, tag: str) -> None:
        """From DeepSpeed's files."""
        self.finish_step()
        self.checkpoint_engine = StateFiles(_refuse)
        self.load_checkpoint(str(folder), tag=tag)
        verify_master_weights(self, trained=True)

    def load_resharded(self, folder: Path, tag: str, step: int, resharding: Resharding) -> None:
        """Master weights and the rule's state from DeepSpeed's files; parameters are the master weights, rounded."""
        self.finish_step()
        files = OptimizerFiles(folder / tag, resharding)
        load_resharded(self.optimizer, files, resharding)
        self.global_steps, self.skipped_steps = step, 0
        verify_master_weights(self, trained=True)

    def shared_file(self, name: str) -> bool:
        """Weights and counters."""
        return is_shared_file(name)

    def optimizer_file(self, name: str, place: Place, tensor_size: int) -> bool:
        """A share of the optimizer's state."""
        return is_own_file(name, place, tensor_size)

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        """Our optimizer in both precisions. DeepSpeed's own check would import torch's compiler, for seconds."""
        return BFLOAT16

    def _configure_bf16_optimizer(self, optimizer: torch.optim.Optimizer) -> ShardedOptimizer:
        return ShardedOptimizer(
            optimizer,
            self.param_names,
            rule=self._rule,
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

    def _train_schedule(self) -> Any:
        if self.deferred is None:
            return super()._train_schedule()
        return ZeroBubbleSchedule(self.micro_batches, self.num_stages, self.stage_id)

    def _inference_schedule(self, micro_batches: int) -> Any:
        return super()._inference_schedule(self._evaluated)

    def _exec_forward_pass(self, buffer_id: int) -> None:
        if self._graphs is None or not self.module.training or not self._graphs.forward(buffer_id):
            super()._exec_forward_pass(buffer_id)

    def _exec_recv_grads(self, buffer_id: int) -> None:
        if self.deferred is not None and not self._replays:
            # In memory of its own, since what waits refers to it. DeepSpeed receives all in one place, inputs too.
            self.grad_layer = None
            self._grad_layer_buf: list[Tensor] = []
        super()._exec_recv_grads(buffer_id)

    def _exec_backward_pass(self, buffer_id: int) -> None:
        if self._graphs is not None and self._graphs.backward():
            return
        if self.deferred is None:
            self._count_gradients()
            super()._exec_backward_pass(buffer_id)
        else:
            with self.deferred.defer():
                super()._exec_backward_pass(buffer_id)

    def _exec_weight_gradients(self) -> None:
        if self._graphs is not None and self._graphs.add_weight_gradients():
            return
        assert self.deferred is not None, "only its schedule asks for this"
        self._count_gradients()
        self.deferred.add_next()

    def _count_gradients(self) -> None:
        """A micro batch's weights' gradients come, after which those of the last one are complete."""
        self._gradients += 1
        if self._gradients == self.micro_batches:
            self.optimizer.begin_reduction()

    def _exec_reduce_grads(self) -> None:
        self._on_phase("reduce")
        super()._exec_reduce_grads()

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        self._on_phase("optimizer")
        super()._exec_optimizer_step(lr_kwargs)

    # DeepSpeed looks functions up here, not by name.
    _INSTRUCTION_MAP = PipelineEngine._INSTRUCTION_MAP | {
        schedule.ForwardPass: _exec_forward_pass,
        schedule.RecvGrad: _exec_recv_grads,
        schedule.BackwardPass: _exec_backward_pass,
        WeightGradients: _exec_weight_gradients,
        schedule.ReduceGrads: _exec_reduce_grads,
        schedule.OptimizerStep: _exec_optimizer_step,
    }

    def _bf16_reduce_grads(self) -> None:
        self._gradients = 0
        self.optimizer.reduce_gradients(begun=not self._replays)
        if self._graphs is not None:
            self._graphs.end_step()
        share = self.micro_batches / self.gradient_accumulation_steps()
        self.optimizer.counted_share = self._own_counted_share() * share

    @property
    def _replays(self) -> bool:
        """The step under way is done by graphs, which have memory of their own."""
        return self._graphs is not None and self._graphs.replaying

    def _own_counted_share(self) -> Tensor:
        """Share of this rank's positions that count, if it computed a loss and is the first to do so."""
        share = self.module.loss_fn.take_counted_share() if self.is_last_stage() else None
        if share is None or self._mesh.tensor_rank:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return share

    def _take_model_step(self, lr_kwargs: Any) -> None:
        if self.is_last_stage():
            # Tensor-parallel ranks have the same loss: it counts once, but what is not finite counts on each.
            share = 1 / self._mesh.data_size if self._mesh.tensor_rank == 0 else 0.0
            self.optimizer.loss_share = self._scale_loss_by_gas(self.total_loss.detach()) * share  # type: ignore[attr-defined]
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


def _await(gathering: OverlappedGathering, layer: int, module: nn.Module, inputs: Any) -> None:
    gathering.wait_for(layer)


def _nobody(phase: str) -> None:
    """Observes nothing."""


def _refuse(content: Any, path: Path) -> None:
    raise AssertionError(f"{path} is saved while a state is loaded")
