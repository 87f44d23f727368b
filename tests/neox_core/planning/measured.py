"""Steps that were measured (docs/performance.md, docs/lab-diary.md): what the planner's prediction is held against.

    python -m tests.neox_core.planning.measured

prints the table. All with a sequence of 4,096 and bf16 parameters.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from neox_core.config import (
    ActivationCheckpointing,
    ParallelConfig,
    PipelineSchedule,
    RunConfig,
    batch_geometry,
    load_config,
)
from neox_core.config.families import FamilyName
from neox_core.planning.activation_checkpointing import layer_modes
from neox_core.planning.hardware import CARDS
from neox_core.planning.step_time import Prediction, predict
from tests.paths import CONFIGS

SEQUENCE = 4096


@dataclass(frozen=True)
class Row:
    """A step on one host."""

    card: str
    model: Literal["7b", "34b"]
    layers: int
    micro_batch: int
    seconds: float
    tokens: int = 65536
    """Of a step, for each GPU."""
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    mode: ActivationCheckpointing = "none"
    graphs: bool = False
    overlap: bool = False
    family: FamilyName = "llama"
    schedule: PipelineSchedule = "1f1b"
    note: str = ""

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.tensor * self.pipeline * self.data

    def config(self) -> RunConfig:
        """Its configuration."""
        base = load_config(CONFIGS / f"llemma_{self.model}.yml")
        train = {
            "global_batch_tokens": self.tokens * self.gpus,
            "micro_batch_size": self.micro_batch,
            "activation_checkpointing": self.mode,
            "cuda_graphs": "auto" if self.graphs else "off",
        }
        overlap: Literal["auto", "off"] = "auto" if self.overlap else "off"
        parallel = ParallelConfig(
            tensor=self.tensor, pipeline=self.pipeline, pipeline_schedule=self.schedule, overlap=overlap
        )
        return base.model_copy(
            update={
                "model": base.model.model_copy(update={"num_layers": self.layers, "family": self.family}),
                "train": base.train.model_copy(update=train),
                "parallel": parallel,
                "launch": base.launch.model_copy(update={"nodes": 1, "ranks_per_node": self.gpus}),
            }
        )

    def predicted(self) -> Prediction:
        """The planner's, by the card's figures."""
        config = self.config()
        geometry = batch_geometry(config)
        modes = [layer_modes(config, geometry, stage, None) for stage in range(self.pipeline)]
        return predict(config, geometry, CARDS[self.card], modes)

    def __str__(self) -> str:
        family = "" if self.family == "llama" else self.family
        schedule = "" if self.schedule == "1f1b" else self.schedule
        switches = (family, schedule, "graphs" if self.graphs else "", "overlap" if self.overlap else "", self.note)
        layout = f"TP {self.tensor} PP {self.pipeline} DP {self.data}"
        words = (self.card, self.model, f"{self.layers} layers", layout, f"micro batch {self.micro_batch}", self.mode)
        return ", ".join((*words, *filter(None, switches)))


def at(tokens_per_second: float, tokens: int = 65536) -> float:
    """Seconds of a step, from tokens per second and GPU."""
    return tokens / tokens_per_second


HALF, QUARTER = 32768, 16384
ROWS = [
    # One GPU, in the order of docs/performance.md.
    Row("h200", "7b", 32, 1, at(12845), note="first three changes"),
    Row("h200", "7b", 32, 2, at(13564), note="first five changes"),
    Row("h200", "7b", 32, 2, at(13538), note="all but the last two"),
    Row("h200", "7b", 32, 2, at(13723), note="the same, FlashAttention 4"),
    Row("h200", "7b", 32, 2, at(13705), note="all changes, cuDNN"),
    Row("h200", "7b", 32, 2, at(13906), note="all changes, FlashAttention 4"),
    Row("h200", "34b", 8, 1, at(16219), note="first three changes"),
    Row("h200", "34b", 8, 2, at(16149), note="first three changes"),
    Row("h200", "34b", 8, 2, at(16337), note="first five changes"),
    Row("h200", "34b", 8, 2, at(16865), note="all changes, cuDNN"),
    Row("h200", "7b", 32, 2, at(13698), note="next to its peers, FlashAttention 4"),
    Row("h200", "7b", 32, 2, at(13685), note="next to its peers again"),
    Row("h200", "7b", 32, 2, at(13580), note="next to its peers, cuDNN"),
    Row("h200", "7b", 32, 2, 5.06, mode="selective"),
    Row("h200", "7b", 32, 2, 6.05, mode="full"),
    Row("h200", "7b", 8, 2, 0.644, HALF),
    Row("h200", "7b", 8, 2, 0.645, HALF, graphs=True),
    Row("h200", "7b", 8, 2, at(51062), graphs=True, note="next to the other families"),
    Row("h200", "7b", 8, 2, at(50620), graphs=True, family="qwen2"),
    Row("h200", "7b", 8, 2, at(50464), graphs=True, family="qwen3"),
    Row("h200", "7b", 8, 2, at(49247), graphs=True, family="olmo2", note="each norm a pass of its own"),
    # Several GPUs without CUDA graphs.
    Row("h200", "7b", 32, 1, at(10849, HALF), HALF, tensor=2),
    Row("h200", "7b", 32, 4, at(12044, HALF), HALF, tensor=2),
    Row("h200", "7b", 32, 1, at(12234, HALF), HALF, pipeline=2),
    Row("h200", "7b", 32, 1, at(12280, HALF), HALF, data=2, mode="selective"),
    Row("h200", "34b", 8, 2, at(15124, HALF), HALF, tensor=2),
    Row("h200", "7b", 32, 1, at(12430), data=4, mode="selective"),
    Row("h200", "7b", 32, 1, at(9193), tensor=2, data=2, note="waits for Python"),
    Row("h200", "7b", 32, 2, at(8713), tensor=4, note="waits for Python"),
    Row("h100", "7b", 32, 2, at(10628, HALF), HALF, tensor=2, mode="selective"),
    Row("h200", "7b", 8, 2, 0.377, QUARTER, tensor=2),
    Row("h200", "7b", 8, 2, 0.655, HALF, data=2),
    Row("h200", "7b", 8, 1, 0.383, QUARTER, pipeline=2),
    Row("h200", "7b", 8, 1, 0.637, QUARTER, tensor=2, mode="selective", note="waits for Python"),
    Row("h200", "7b", 8, 1, 0.742, QUARTER, tensor=2, mode="full", note="waits for Python"),
    Row("h200", "7b", 32, 2, at(11546), tensor=2),
    # And with them.
    Row("h200", "7b", 8, 2, 0.373, QUARTER, tensor=2, graphs=True),
    Row("h200", "7b", 8, 2, 0.653, HALF, data=2, graphs=True),
    Row("h200", "7b", 8, 1, 0.380, QUARTER, pipeline=2, graphs=True),
    Row("h200", "7b", 8, 2, at(50637), data=2, graphs=True),
    Row("h200", "7b", 8, 1, at(45052), pipeline=2, graphs=True),
    Row("h200", "7b", 8, 1, 0.420, QUARTER, tensor=2, mode="selective", graphs=True),
    Row("h200", "7b", 8, 1, 0.499, QUARTER, tensor=2, mode="full", graphs=True),
    Row("h200", "7b", 32, 2, at(11525), tensor=2, graphs=True),
    Row("h200", "7b", 32, 4, at(11817), tensor=2, graphs=True),
    Row("h200", "7b", 32, 2, at(11686), tensor=2, graphs=True, note="the next one without overlap"),
    Row("h200", "7b", 32, 2, at(12437), tensor=2, graphs=True, overlap=True),
    Row("h200", "7b", 32, 8, at(12953), tensor=2, graphs=True, overlap=True),
    Row("h200", "34b", 8, 2, at(15102), tensor=2, graphs=True),
    Row("h200", "34b", 8, 2, at(15681), tensor=2, graphs=True, overlap=True),
    Row("h200", "34b", 8, 4, at(15949), tensor=2, graphs=True, overlap=True),
    # The same with FlashAttention 4.
    Row("h200", "7b", 32, 8, at(12851), tensor=2, graphs=True, overlap=True, note="FlashAttention 4"),
    Row("h200", "34b", 8, 4, at(15837), tensor=2, graphs=True, overlap=True, note="FlashAttention 4"),
    Row("h200", "7b", 8, 4, at(46648), tensor=2, graphs=True, overlap=True, note="FlashAttention 4"),
    Row("h200", "7b", 8, 2, at(50488), data=2, graphs=True, note="FlashAttention 4"),
    Row("h200", "7b", 32, 2, at(12572), pipeline=2, graphs=True, note="FlashAttention 4"),
    Row("h200", "7b", 32, 2, at(13045), pipeline=2, graphs=True, schedule="zb-h1", note="FlashAttention 4"),
    Row("h200", "7b", 8, 2, 1.4442, pipeline=2, graphs=True, note="FlashAttention 4"),
    Row("h200", "7b", 8, 2, 1.4029, pipeline=2, graphs=True, schedule="zb-h1", note="FlashAttention 4"),
    # Of the code as it is: what others' products sum to is added by the next pass, the loss is compiled.
    Row("h200", "7b", 32, 8, at(13479), tensor=2, graphs=True, overlap=True, note="FlashAttention 4, sums joined"),
    Row("h200", "34b", 8, 4, at(16483), tensor=2, graphs=True, overlap=True, note="FlashAttention 4, sums joined"),
    Row("h200", "34b", 8, 8, at(16632), tensor=2, graphs=True, overlap=True, note="FlashAttention 4, sums joined"),
    Row("h200", "7b", 32, 2, at(13868), graphs=True, note="FlashAttention 4"),
    Row("h200", "34b", 8, 8, at(16289), data=2, graphs=True, note="FlashAttention 4"),
    Row("h200", "7b", 32, 2, at(13936), graphs=True, note="FlashAttention 4, rotation joined"),
    Row("h200", "7b", 32, 2, at(13730), graphs=True, note="FlashAttention 4, rotation joined"),
    Row("h200", "7b", 32, 8, at(13249), tensor=2, graphs=True, overlap=True, note="FlashAttention 4, rotation joined"),
]


def table() -> str:
    """Each row in seconds, measured and predicted, as Markdown."""
    lines = ["| step | measured | predicted | |", "|---|---:|---:|---:|"]
    for row in ROWS:
        found = row.predicted().time.total
        lines.append(f"| {row} | {row.seconds:.3f} | {found:.3f} | {found / row.seconds - 1:+.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
