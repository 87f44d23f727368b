"""DeepSpeed's ZeRO-1 optimizer with fp32 accumulation, with a sharded reduction and a fused update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from neox_core.optimizer import MasterWeights, UpdateRule, UpdateStep
from neox_core.parallel.gradient_reduction import OverlappedReduction, average
from neox_core.parallel.parameter_gathering import OverlappedGathering
from neox_core.parallel.ranks.agreement import differs_from_first
from neox_core.parallel.ranks.mesh import Mesh
from neox_core.parallel.replicas import ReplicatedGradients, partial_elements, replicated_elements, shared_elements
from neox_core.train.engine.outcome import pack_outcome
from neox_core.train.engine.tied_head import TiedHead

MATRICES, NORMS = 0, 1
"""Parameter groups: with weight decay and without. How ranks hold a parameter, its mark says (parallel/sharding.py)."""


class ShardedOptimizer(BF16_Optimizer):  # type: ignore[misc]
    """Each data-parallel rank reduces, clips and updates its own partition only.

    Where DeepSpeed's own sums all gradients on all ranks, scales them, updates, casts and clears in a pass each, this
    one reduces a shard to each rank (half the traffic) and does the rest in one pass. What it saves is what DeepSpeed
    saves. DeepSpeed calls the parameters bf16; here they may also be fp32, which are their own master weights.

    Args:
        rule: how a partition is updated.
        mesh: the grid of ranks.
        kv_group: the tensor-parallel ranks that have the same KV heads; None where each has its own.
        packed: keep the low half of the master weights only (see master_weights.py).
        others: what BF16_Optimizer takes.
    """

    group_squares: Callable[[], Tensor]
    """This rank's share of the squared gradient norm of groups of layers, [groups], which together are all. Set before
    the first step, by whoever knows the layers."""

    def __init__(
        self,
        *others: Any,
        rule: UpdateRule,
        mesh: Mesh,
        kv_group: dist.ProcessGroup | None,
        packed: bool,
        **named: Any,
    ) -> None:
        super().__init__(*others, **named)
        self.rule, self._mesh = rule, mesh
        own = [dist.get_rank(group) for group in self.real_dp_process_group]
        self.masters = [
            MasterWeights(parts[rank], packed) for parts, rank in zip(self.bf16_partitioned_groups, own, strict=True)
        ]
        for parameter in (p for group in self.bf16_groups for p in group):
            parameter._hp_mapping = None  # views of DeepSpeed's fp32 copy, which would keep it in memory
        for group, handle in enumerate(self.fp32_groups_flat_partition):
            # DeepSpeed's own fp32 copy only remains as the key of the optimizer's state.
            handle.data = torch.empty(0, device=handle.device)
            state = self.optimizer.state[handle]
            gradient = self.fp32_groups_gradient_flat_partition[group]
            # On the device, which alone knows in time of updates that are not done.
            state["step"] = torch.zeros((), dtype=torch.float32, device=gradient.device)
            state |= {name: torch.zeros_like(gradient) for name in rule.state_names}
        self.counted_share = torch.zeros((), dtype=torch.float64, device=mesh.device)
        """Before a step: the share of this rank's positions that count, 0 on all but one of the ranks that have the
        same. After it: the share of the global batch's."""
        group, parameters = self.real_dp_process_group[MATRICES], self.bf16_groups[MATRICES]
        sizes = [p.numel() for p in parameters]
        layers = [int(self.param_names[p].split(".")[0]) for p in parameters]
        self.reduction = OverlappedReduction(self.fp32_groups_gradients_flat[MATRICES], group, sizes, layers)
        self.gathering = OverlappedGathering(self.bf16_groups_flat[MATRICES], group, sizes, layers)
        """Of matrices. Whoever reads parameters after a step waits for it: layers do, one by one."""
        self._kv_group = kv_group
        self._summed: list[ReplicatedGradients] = []
        for rank, gradient, group in zip(own, self.fp32_groups_gradient_flat_partition, self.bf16_groups, strict=True):
            self._sum_replicated(gradient, rank * gradient.numel(), group)
        self.tied_head: TiedHead | None = None
        """Of a model with tied embeddings, where this stage has a part in it."""
        self.loss_share = torch.zeros((), device=mesh.device)
        """What this rank adds to the global batch's loss; not finite, it stops the update on all ranks."""
        self.loss_limit = torch.full((), torch.inf, device=mesh.device)
        """A loss above it stops the update too."""
        self.copied: torch.cuda.Event | None = None
        """Of a stream that copies the state: the next update waits for it."""
        self.outcome = torch.zeros(0)
        """Of the last step, see outcome.py."""
        if mesh.device.type == "cuda":
            torch.cuda.empty_cache()  # a card that is full of freed blocks has none for NCCL

    def _sum_replicated(self, gradient: Tensor, first: int, parameters: list[Tensor]) -> None:
        """Of a partition that begins at `first`, note what ranks sum."""
        elements = partial_elements(parameters)
        self._summed.append(ReplicatedGradients(gradient, first, elements, self._mesh.tensor_group))
        if self._kv_group is not None:
            self._summed.append(ReplicatedGradients(gradient, first, shared_elements(parameters), self._kv_group))

    @property
    def fp16_groups(self) -> list[list[Tensor]]:
        """Where DeepSpeed looks for the parameters of an engine that is not in bf16."""
        groups: list[list[Tensor]] = self.bf16_groups
        return groups

    def accumulate_hp_grads_and_remove_lp(self, lp_param: Tensor, group_idx: int, param_idx: int) -> None:
        """Add a parameter's gradient to its fp32 sum."""
        super().accumulate_hp_grads_and_remove_lp(lp_param, group_idx, param_idx)
        self.on_gradient(group_idx, param_idx)

    @torch.no_grad()
    def on_gradient(self, group: int, parameter: int) -> None:
        """A parameter's gradient was added to its fp32 sum."""
        self.fp32_groups_has_gradients[group][parameter] = True
        if group == MATRICES:
            self.reduction.on_gradient(parameter)

    @property
    def overlaps(self) -> bool:
        """What is complete is averaged while the last backward pass of a step goes on. Not where a part of the
        embedding's gradient is still to come from another stage."""
        awaits = self.tied_head is not None and self.tied_head.awaits_gradient
        return self._mesh.data_size > 1 and not awaits

    def begin_reduction(self) -> None:
        """The last backward pass of a step comes."""
        if self.overlaps:
            self.reduction.begin()

    @torch.no_grad()
    def reduce_gradients(self, begun: bool = True) -> None:
        """Average the gradients over data-parallel ranks; each rank gets its own partition's.

        Args:
            begun: by `begin_reduction`; False: the matrices' are averaged already.
        """
        if self.tied_head is not None:
            self.tied_head.sum_gradients()
        if self._mesh.data_size > 1:
            if begun or not self.overlaps:
                self.reduction.finish()
            norms, group = self.fp32_groups_gradients_flat[NORMS], self.real_dp_process_group[NORMS]
            own = self.fp32_groups_gradient_flat_partition[NORMS]
            dist.reduce_scatter_tensor(own, norms, average(norms, group), group)
        for shared in self._summed:
            shared.sum()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Clip by the global norm and update, unless the norm or the loss is not finite or the loss is above its limit.

        All ranks do the same, and none asks the device: `outcome` says later what was done.
        """
        squares = self.group_squares().double()
        own = torch.stack([self.counted_share, self.loss_share.double(), squares.sum()])
        own = torch.cat([own, squares])
        total = own.clone()
        dist.all_reduce(total)
        # Loss and gradient in the buffers are to be divided by the share of positions that count. At least some do: a
        # batch without any target has no gradient.
        share = (total[0] / self._mesh.data_size).clamp(min=1e-9)
        total[1] /= share
        total[2:] /= share.square()
        loss, norm = total[1], total[2].sqrt()
        applied = torch.isfinite(loss) & torch.isfinite(norm) & (loss <= self.loss_limit)
        scale = (self.clip_grad / (norm + 1e-6)).clamp(max=1.0) / share
        if self.copied is not None:
            self.copied.wait(torch.cuda.current_stream())
            self.copied = None
        self._update(torch.where(applied, scale, 0.0).float(), applied)
        self.begin_gathering()
        self.clear_hp_grads()
        self.counted_share = share
        self.outcome, self._global_grad_norm = pack_outcome(applied, total[1:], own[1:]), norm.float()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """What is left to clear after a step."""
        self.clear_lp_grads(set_to_none)

    def clear_hp_grads(self) -> None:
        """Set all gradients to zero; on a single data-parallel rank, the update did."""
        if self._mesh.data_size > 1:
            super().clear_hp_grads()
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.fp32_groups_gradients]

    def _update(self, scale: Tensor, applied: Tensor) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            state = self.optimizer.state[self.fp32_groups_flat_partition[index]]
            step = UpdateStep(group["lr"], group["weight_decay"], state["step"] + 1)
            self.rule.update(self.masters[index], self.fp32_groups_gradient_flat_partition[index], state, scale, step)
            state["step"] += applied

    def begin_gathering(self) -> None:
        """Give every data-parallel rank the others' updated parameters, and a tied head the embedding's."""
        if self._mesh.data_size > 1:
            flat, own = self.bf16_groups_flat[NORMS], self.masters[NORMS].low_precision
            dist.all_gather_into_tensor(flat, own, group=self.real_dp_process_group[NORMS])
            self.gathering.begin()
        if self.tied_head is not None:
            self.gathering.wait_for(0)  # the embedding's layer, where this stage has it
            self.tied_head.copy_weight()

    def gather(self) -> None:
        """As `begin_gathering`, to the end."""
        self.begin_gathering()
        self.gathering.finish()

    def forget(self) -> None:
        """Take the parameters as the master weights, and be as before the first step."""
        self._restore_from_bit16_weights()
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.clear_hp_grads()

    def count_master_differences(self, trained: bool) -> int:
        """Elements of this rank's master weights that are not the model's parameters; or, `trained`, do not round to
        them."""
        return sum(master.count_differences(trained) for master in self.masters)

    def not_finite(self) -> list[str]:
        """Names of this rank's parameters, and of its parts of the rule's state, that hold a NaN or an infinity.

        Master weights are not looked at: those that round to finite parameters are finite.
        """
        named = {self.param_names[p]: p for group in self.bf16_groups for p in group}
        for index, handle in enumerate(self.fp32_groups_flat_partition):
            state = self.optimizer.state[handle]
            named |= {f"{name} of group {index}": state[name] for name in self.rule.state_names}
        # The extremes are NaN where there is one, and nothing of the tensor's size is made.
        finite = torch.stack([torch.stack(tensor.detach().aminmax()).isfinite().all() for tensor in named.values()])
        return [name for name, good in zip(named, finite.tolist(), strict=True) if not good]

    def differs_from_peers(self) -> bool:
        """Whether this rank's parameters are other than its peers': data-parallel ranks have all of them in common,
        tensor-parallel ranks what is replicated, and some of them KV heads. Collective over all ranks."""
        flats, groups = self.bf16_groups_flat, self.bf16_groups

        def pieces(elements: Callable[[list[Tensor]], list[range]]) -> list[Tensor]:
            return [flat[r.start : r.stop] for flat, group in zip(flats, groups, strict=True) for r in elements(group)]

        found = [differs_from_first(flats, self.dp_process_group)]
        found.append(differs_from_first(pieces(replicated_elements), self._mesh.tensor_group))
        if self._kv_group is not None:
            found.append(differs_from_first(pieces(shared_elements), self._kv_group))
        return any(found)

    def state_dict(self) -> dict[str, Any]:
        """As DeepSpeed's, with the master weights as what copies them in fp32."""
        state = super().state_dict()
        state["single_partition_of_fp32_groups"] = list(self.masters)
        return state

    def _load_legacy_checkpoint(self, states: list[Any], load_optimizer_states: bool, load_from_fp32: bool) -> None:
        own = states[dist.get_rank(self.dp_process_group)]
        if load_optimizer_states:
            self._load_rule_state(own["base_optimizer_state"]["state"])
        for master, saved in zip(self.masters, own["single_partition_of_fp32_groups"], strict=True):
            master.load(saved)

    def _load_rule_state(self, saved: dict[int, dict[str, Tensor]]) -> None:
        """In place: torch's own way has the old and the new tensors at the same time, which need not fit."""
        handles = [handle for group in self.optimizer.param_groups for handle in group["params"]]
        for index, values in saved.items():
            for name, value in values.items():
                self.optimizer.state[handles[index]][name].copy_(value)

    def _restore_from_bit16_weights(self) -> None:
        for master in self.masters:
            master.reset()
