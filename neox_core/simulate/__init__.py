"""A training at its full size without its machines: memory and collectives of one rank per pipeline stage, measured.

The real layers, DeepSpeed's engine, the optimizer and the pipeline's schedule run on tensors that have no data, in a
world of ranks that are not there.
"""

from neox_core.simulate.rank import RankSimulation
from neox_core.simulate.stages import simulate

__all__ = ["RankSimulation", "simulate"]
