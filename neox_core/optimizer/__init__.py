"""How weights follow from gradients: update rules on flat partitions, by name. Knows nothing of ranks.

A room of its own, below planning and training: both need to know what a rule keeps per parameter.
"""

from neox_core.optimizer.master_weights import MasterWeights
from neox_core.optimizer.registry import register_optimizer, update_rule
from neox_core.optimizer.rule import UpdateRule, UpdateStep

__all__ = ["MasterWeights", "UpdateRule", "UpdateStep", "register_optimizer", "update_rule"]
