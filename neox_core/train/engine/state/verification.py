"""What is proven of the weights before every first step, and of the state before it is saved."""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from neox_core.errors import CheckpointError, TrainingError

_NAMED = 3


def verify_master_weights(engine: PipelineEngine, trained: bool) -> None:
    """Check the fp32 master weights against the model's weights, and that ranks agree on what they share. Collective.

    If the former differ, the first step looks right and the second throws the loaded weights away. A rank checks the
    master weights that it owns, and peers own the others: so all of its weights are covered if it has its peers'.

    Args:
        trained: master weights have moved since the weights were loaded, and need only round to them; before, they must
            be the same numbers.

    Raises:
        CheckpointError: something differs; on every rank, so that none waits for another.
    """
    different = engine.optimizer.count_master_differences(trained)
    own = torch.tensor([different, engine.optimizer.differs_from_peers()], device=engine.device)
    everyones = own.new_empty(2 * dist.get_world_size())
    dist.all_gather_into_tensor(everyones, own)
    all_different, all_odd = everyones.view(-1, 2).unbind(1)
    if total := int(all_different.sum()):
        raise CheckpointError(
            f"{total} fp32 master weights differ from the model's weights ({different} on rank "
            f"{dist.get_rank()}): the optimizer did not take the loaded weights, so the first update would lose them"
        )
    if odd := all_odd.nonzero().flatten().tolist():
        raise CheckpointError(
            f"ranks {odd} have loaded other weights than ranks that should have the same: compare what their nodes read"
        )


def verify_loaded(engine: PipelineEngine) -> None:
    """Check the weights that a training begins with. Collective.

    Raises:
        CheckpointError: they hold a NaN or an infinity, or see `verify_master_weights`; on every rank.
    """
    verify_master_weights(engine, trained=False)
    if found := _not_finite(engine):
        raise CheckpointError(f"the weights to begin with are not finite: {found}: mend the base model")


def verify_before_save(engine: PipelineEngine, tag: str) -> None:
    """Check that the state is one that a later start takes. Collective.

    Raises:
        TrainingError: it is not; on every rank.
    """
    if found := _not_finite(engine):
        raise TrainingError(
            f"{tag} is not saved, since it would be of no use: not finite are {found}: the checkpoint before it is the "
            "one to go on from; look at the incidents and at what was trained on since"
        )
    different = torch.tensor(engine.optimizer.count_master_differences(True), device=engine.device)
    dist.all_reduce(different)
    if total := int(different):
        raise TrainingError(
            f"{tag} is not saved, since it would be of no use: {total} fp32 master weights do not round to the model's "
            "weights: the checkpoint before it is the one to go on from; a kernel or the memory of a card is at fault"
        )


def _not_finite(engine: PipelineEngine) -> str:
    """What is not finite on which rank, in words; an empty text: nothing. The same on all ranks."""
    own = engine.optimizer.not_finite()
    count = torch.tensor(len(own), device=engine.device)
    dist.all_reduce(count)
    if not int(count):
        return ""
    everyones: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    found = [f"{name} on rank {rank}" for rank, names in enumerate(everyones) for name in names]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more
