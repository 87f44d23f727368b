"""Mean loss of each source's training tokens: which sequence comes from which source follows from its number."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from neox_core.config import BatchGeometry
from neox_core.data.mixture import Mixture
from neox_core.data.sampler import micro_batch_indices
from neox_core.parallel.loss import IGNORE_INDEX


class SourceLosses:
    """Sums up the token losses that the loss function reports, on the device, on the ranks that have them.

    Args:
        mixture: says which source a sequence comes from.
        geometry: how a global batch is cut.
        data_rank: this data-parallel rank.
        device: where the losses are.
    """

    def __init__(self, mixture: Mixture, geometry: BatchGeometry, data_rank: int, device: torch.device) -> None:
        self.names = mixture.names
        self._mixture, self._geometry, self._data_rank, self._device = mixture, geometry, data_rank, device
        self._first_sequence: int | None = None
        self._sequences: list[Tensor] = []
        self._totals = torch.zeros(2, len(self.names), device=device)

    def use(self, geometry: BatchGeometry, mixture: Mixture) -> None:
        """The batches to come are cut like this, from this mixture of the same sources."""
        self._geometry, self._mixture = geometry, mixture

    def begin(self, first_sequence: int) -> None:
        """The losses to come are of the global batch that begins with this sequence, micro batch by micro batch."""
        self._first_sequence = first_sequence

    def add(self, losses_BT: Tensor, targets_BT: Tensor) -> None:
        """Take one micro batch's token losses, which are 0 where the target does not count."""
        if self._first_sequence is not None:
            self._sequences.append(torch.stack((losses_BT.sum(-1), (targets_BT != IGNORE_INDEX).sum(-1))))

    def end(self, applied: Tensor) -> None:
        """Sort what was taken since `begin` by source; of a step whose update was not done nothing is kept.

        Args:
            applied: whether it was, a scalar on the device.
        """
        first, self._first_sequence = self._first_sequence, None
        if first is None or not self._sequences:
            return
        indices = micro_batch_indices(self._geometry, self._data_rank, first)
        sources, _ = self._mixture.locate(np.concatenate([next(indices) for _ in self._sequences]))
        belongs = torch.from_numpy(np.equal.outer(sources, np.arange(len(self.names))))
        if self._device.type == "cuda":
            belongs = belongs.pin_memory().to(self._device, non_blocking=True)
        # Chosen, not multiplied by 0 or 1: what is not finite would spread to the other sources.
        sums = torch.where(belongs & applied, torch.cat(self._sequences, dim=1).unsqueeze(-1), 0.0)
        self._totals += sums.sum(1)
        self._sequences = []

    def take(self) -> Tensor:
        """Sum of losses, then number of tokens, per source [2 x sources], since the last call. fp32."""
        taken, self._totals = self._totals.flatten(), torch.zeros_like(self._totals)
        return taken
