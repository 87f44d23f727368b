"""What a computer's GPUs, links and host do in a second: figures of known cards, and files of measured ones."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

from neox_core.errors import ConfigError
from neox_core.storage.atomic import write_atomically

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Link:
    """Time of a gathering or a reduce-scatter, by the bytes that each rank sends."""

    points: tuple[tuple[float, float], ...]
    """(bytes, seconds) in ascending order, from 0 bytes on: the latency."""

    def seconds(self, sent: float) -> float:
        """Between two points on the line through them, beyond the last as fast as before it."""
        segments = list(pairwise(self.points))
        (a, at_a), (b, at_b) = next((pair for pair in segments if sent <= pair[1][0]), segments[-1])
        return at_a + (sent - a) * (at_b - at_a) / (b - a)


@dataclass(frozen=True)
class Hardware:
    """One kind of node. Rates are what training sustains, not data sheets' peaks; all in units, not in giga-units."""

    name: str
    memory_gib: float
    peak: float
    """FLOP/s of bf16 products by the data sheet, for utilisation figures alone."""
    gemm: float
    """FLOP/s of bf16 products at a model's shapes, on all GPUs of a node at once."""
    attention_forward: float
    """FLOP/s of causal attention alone, by the multiplications that it does: 2·N·H·T per token."""
    attention_backward: float
    """The same of its backward pass, which does 2.5 times as many."""
    memory: float
    """Bytes/s of a copy, read and written."""
    link: Link
    """Among the GPUs of a node."""
    network: float
    """Bytes/s from one node to others, by all of its GPUs together."""
    network_latency: float
    host_layer: float
    """Seconds of Python for one layer and micro batch of tensor-parallel ranks, without CUDA graphs."""
    host_micro_batch: float
    """Seconds of Python for a micro batch outside its layers."""

    def save(self, path: Path) -> None:
        """Write the figures as JSON."""
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")


def load_hardware(name_or_file: str) -> Hardware:
    """A card by its name, or the figures in a file that `Hardware.save` wrote.

    Raises:
        ConfigError: there is no such card or file, or the file holds something else.
    """
    if name_or_file in CARDS:
        return CARDS[name_or_file]
    try:
        found = json.loads(Path(name_or_file).read_text())
        link = Link(tuple((float(sent), float(seconds)) for sent, seconds in found.pop("link")["points"]))
        name = str(found.pop("name"))
        hardware = Hardware(name=name, link=link, **{key: float(value) for key, value in found.items()})
    except OSError as error:
        raise ConfigError(f"hardware {name_or_file}: neither a file nor one of {', '.join(CARDS)}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{name_or_file} holds no hardware's figures ({error}): have it written by llemma plan --calibrate"
        ) from error
    _check(hardware, name_or_file)
    return hardware


def _check(hardware: Hardware, path: str) -> None:
    names = [field.name for field in fields(hardware) if field.name not in ("name", "link")]
    if wrong := {name: value for name in names if not 0 < (value := getattr(hardware, name)) < math.inf}:
        raise ConfigError(f"{path}: {wrong} must be finite and above 0: measure again with llemma plan --calibrate")
    sizes, times = ([point[i] for point in hardware.link.points] for i in (0, 1))
    if len(sizes) < 2 or sizes[0] != 0 or sizes != sorted(set(sizes)):
        raise ConfigError(f"{path}: link.points are of {sizes} bytes: they must begin with 0 and rise")
    if not all(0 < seconds < math.inf for seconds in times):
        raise ConfigError(f"{path}: link.points take {times} seconds: all must be finite and above 0")


def _nvlink(share: float) -> Link:
    """NCCL between two H100 of one host, of which others reach a share."""
    measured = ((0.0, 16e-6), (8.4e6, 56e-6), (16.8e6, 96e-6), (33.5e6, 166e-6), (67e6, 300e-6), (268.5e6, 1.07e-3))
    return Link(tuple((sent * share, seconds) for sent, seconds in measured))


_H200 = Hardware(
    name="h200",
    memory_gib=139.8,
    peak=989 * TERA,
    gemm=662 * TERA,
    attention_forward=588 * TERA,
    attention_backward=488 * TERA,
    memory=4.29 * TERA,
    link=_nvlink(1.0),
    network=400 * GIGA,
    network_latency=30e-6,
    host_layer=5.3e-3,
    host_micro_batch=17e-3,
)
_A100 = Hardware(
    name="a100-80gb",
    memory_gib=80.0,
    peak=312 * TERA,
    gemm=245 * TERA,
    attention_forward=190 * TERA,
    attention_backward=160 * TERA,
    memory=1.78 * TERA,
    link=_nvlink(0.55),
    network=50 * GIGA,
    network_latency=40e-6,
    host_layer=5.3e-3,
    host_micro_batch=17e-3,
)
CARDS = {
    card.name: card
    for card in (
        # Llemma's: less memory, and slower. Not measured here, as the other A100: from published figures of cuBLAS,
        # FlashAttention 2 (arXiv 2307.08691) and NCCL, with 4 network cards of 100 Gbit/s a node.
        replace(_A100, name="a100-40gb", memory_gib=40.0, memory=1.38 * TERA),
        _A100,
        replace(_H200, name="h100", memory_gib=79.1, memory=2.99 * TERA),
        _H200,
    )
}
"""H200 and H100: measured on two to four GPUs of one host; between nodes, 8 network cards of 400 Gbit/s are assumed."""
