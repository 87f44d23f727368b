"""What is proven of the weights before every first step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from neox_core.errors import CheckpointError


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
