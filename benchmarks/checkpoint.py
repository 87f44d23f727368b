"""What a save costs a training, through the real engine and the real writer of checkpoints, on one CPU or GPU.

    python -m benchmarks.checkpoint                     1.1 GB of state on a CPU
    python -m benchmarks.checkpoint --device cuda       five layers of the 7B; --layers N for what GPU and disk hold

A save needs 14 bytes a parameter in host memory, and three times that on the disk of --folder. Printed, the last line
as JSON: the stall (how long `save` keeps the training), the time of a save that the training would wait for (to local
disk, hashed), how much slower the ten steps after a save are, how resident memory moves over saves, and the rates of
upload and download against s5cmd's, where that is installed. The store is the embedded one, on loopback; where Swift
is not installed nothing is uploaded.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.train_step import CONFIGS, random_batches, random_weights, report
from neox_core.checkpoint.manifest import Manifest
from neox_core.checkpoint.writer import CheckpointWriter
from neox_core.config import RunConfig, StorageConfig, batch_geometry, load_config
from neox_core.parallel.ranks.mesh import build_mesh, init_distributed
from neox_core.planning.memory import parameter_count
from neox_core.storage.object_store import ObjectInfo, ObjectStore
from neox_core.train.engine.deepspeed_engine import build_engine

STEPS = 10
"""After a save, which must not be slower."""
RATE_BYTES = 1 << 29
_ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


class Nowhere(ObjectStore):
    """A store that keeps nothing but sizes."""

    def __init__(self) -> None:
        super().__init__(StorageConfig(url="s3://nowhere", endpoint_url="http://127.0.0.1:9"))
        self._sizes: dict[str, int] = {}

    def put_file(self, path: Path, key: str, on_bytes: Any = None) -> None:
        """Note its size."""
        self._sizes[key] = path.stat().st_size

    def put_bytes(self, key: str, content: bytes) -> None:
        """Note its size."""
        self._sizes[key] = len(content)

    def list(self, prefix: str = "") -> Any:
        """What was put."""
        return [ObjectInfo(key, size) for key, size in sorted(self._sizes.items()) if key.startswith(prefix)]


def main() -> None:
    """Run the benchmark and print its figures."""
    options = _options()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.update({name: os.environ.get(name, value) for name, value in _ONE_RANK.items()})
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    config = _config(options)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="checkpoint-") as temporary:
        folder = Path(temporary)
        with _store(folder, options.no_upload) as store:
            result = _measure(config, store, folder, options.saves)
            result |= {} if isinstance(store, Nowhere) else _rates(store, folder)
    report(result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--saves", type=int, default=5, help="at least 4; the first two are not counted")
    parser.add_argument("--folder", type=Path, help="for the files: a local disk")
    parser.add_argument("--no-upload", action="store_true", help="leave the store out")
    return parser.parse_args()


def _config(options: argparse.Namespace) -> RunConfig:
    cuda = options.device == "cuda"
    config = load_config(CONFIGS / ("llemma_7b.yml" if cuda else "toy.yml"))
    sizes = {"num_layers": options.layers}
    if not cuda:
        sizes |= {"hidden_size": 1024, "num_attention_heads": 16, "num_kv_heads": 16, "intermediate_size": 2752}
        sizes |= {"vocab_size": 8192}
    length = 4096 if cuda else 32
    steps = {"sequence_length": length, "global_batch_tokens": (16 if cuda else 2) * length, "micro_batch_size": 1}
    modes = {"precision": "bf16", "activation_checkpointing": "none", "attention": "auto", "cuda_graphs": "auto"}
    launch = {"nodes": 1, "ranks_per_node": 1, "device": "auto" if cuda else "cpu"}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=sizes),
            "train": config.train.model_copy(update=steps | modes),
            "parallel": config.parallel.model_copy(update={"tensor": 1, "pipeline": 1}),
            "launch": config.launch.model_copy(update=launch),
        }
    )


@contextmanager
def _store(folder: Path, no_upload: bool) -> Iterator[ObjectStore]:
    try:
        from infra.s3.embedded import embedded_s3

        if no_upload:
            raise ImportError
        import swift  # noqa: F401
    except ImportError:
        os.environ.update(AWS_ACCESS_KEY_ID="none", AWS_SECRET_ACCESS_KEY="none")
        yield Nowhere()
        return
    with embedded_s3(folder / "s3") as endpoint:
        os.environ.update(AWS_ACCESS_KEY_ID=endpoint.access_key, AWS_SECRET_ACCESS_KEY=endpoint.secret_key)
        store = ObjectStore(StorageConfig(url=f"s3://benchmark-{uuid4().hex}", endpoint_url=endpoint.url))
        store.check(create_bucket=True)
        yield store


def _measure(config: RunConfig, store: ObjectStore, folder: Path, saves: int) -> dict[str, Any]:
    device = init_distributed(config.launch)
    mesh = build_mesh(config.parallel, device)
    engine = build_engine(config, mesh, batch_geometry(config), random_weights(config, device))
    batches = random_batches(config, mesh)
    writer = CheckpointWriter(store, "train", 0, 1, dist.HashStore())
    process = psutil.Process()
    stalls, waits, slower, resident = [], [], [], []

    def steps() -> float:
        seconds = []
        for _ in range(STEPS):
            _synchronize(device)
            begin = time.perf_counter()
            engine.train_batch(batches)
            _synchronize(device)
            seconds.append(time.perf_counter() - begin)
        return sum(seconds)

    def save(number: int) -> float:
        manifest = Manifest(number, number, (), {}, "train", {})
        _synchronize(device)
        begin = time.perf_counter()
        writer.save(manifest, partial(engine.save_state, folder, manifest.name, {}), folder / manifest.name)
        return time.perf_counter() - begin

    steps()
    for number in tqdm(range(1, saves + 1), desc="saves", unit=" saves"):
        writer.wait()
        before = steps()
        stall = save(number)
        after = steps()
        writer.wait()
        stalls.append(stall)
        slower.append(after / before - 1)
        begin = time.perf_counter()
        save(number + saves)
        writer.wait_for_disk()
        waits.append(time.perf_counter() - begin)
        writer.wait()
        resident.append(process.memory_info().rss)
        tqdm.write(  # a run that is ended early has said something
            f"save {number}: stall {stall:.3f} s, waited for {waits[-1]:.2f} s, steps after it {slower[-1]:+.1%}, "
            f"resident {resident[-1] / 1e9:.3f} GB"
        )
    writer.close()
    parameters = parameter_count(config.model)
    stall, wait = statistics.median(stalls[2:]), statistics.median(waits[2:])
    figures = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {os.cpu_count()} cores",
        "layers": config.model.num_layers,
        "parameters": parameters,
        "state_gb": round(sum(p.stat().st_size for p in (folder / f"global_step{2 * saves}").iterdir()) / 1e9, 3),
        "saves": 2 * saves,
        "stall_seconds": round(stall, 4),
        "synchronous_seconds": round(wait, 3),
        "stall_ratio": round(stall / wait, 4),
        "next_ten_steps_slower": round(statistics.median(slower[2:]), 4),
        "step_seconds": round(before / STEPS, 4),
        "resident_gb": round(resident[-1] / 1e9, 3),
        "resident_growth": round(resident[-1] / resident[1] - 1, 4),
    }
    engine.close()
    dist.destroy_process_group()
    return figures


def _rates(store: ObjectStore, folder: Path) -> dict[str, Any]:
    """MB/s of one file, ours and s5cmd's."""
    path = folder / "file"
    path.write_bytes(os.urandom(RATE_BYTES))
    back = folder / "back"
    found: dict[str, Any] = {
        "upload_mb_per_s": _rate(lambda: store.put_file(path, "ours")),
        "download_mb_per_s": _rate(lambda: store.get_file("ours", back)),
    }
    if shutil.which("s5cmd"):
        command = ["s5cmd", "--endpoint-url", store.endpoint, "cp"]

        def run(*places: str) -> None:
            subprocess.run([*command, *places], check=True, capture_output=True)

        found["s5cmd_upload_mb_per_s"] = _rate(lambda: run(str(path), store.url("theirs")))
        found["s5cmd_download_mb_per_s"] = _rate(lambda: run(store.url("theirs"), str(back)))
        for name in ("upload", "download"):
            found[f"{name}_ratio"] = round(found[f"{name}_mb_per_s"] / found[f"s5cmd_{name}_mb_per_s"], 3)
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _rate(action: Any) -> float:
    """The median of three."""
    rates = []
    for _ in range(3):
        begin = time.perf_counter()
        action()
        rates.append(RATE_BYTES / 1e6 / (time.perf_counter() - begin))
    return round(statistics.median(rates), 1)


if __name__ == "__main__":
    main()
