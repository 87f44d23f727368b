"""What the ranks of the jobs in test_launch.py run; pickled by value, because ranks cannot import the tests."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

from neox_core.errors import DataError


def sum_of_ranks(factor: int) -> dict[str, float | str]:
    """Meet over gloo and add up the ranks; what the environment says of them."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor(float(factor * (dist.get_rank() + 1)))
    dist.all_reduce(total)
    dist.destroy_process_group()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    variables = {name: int(os.environ[name]) for name in names}
    return {"sum": total.item(), **variables, "DS_ACCELERATOR": os.environ["DS_ACCELERATOR"]}


def count_starts(folder: str, until: str | None = None) -> int:
    """Leave one file per start; wait until a file appears."""
    rank = int(os.environ["RANK"])
    (Path(folder) / f"start-{rank}-{os.getpid()}").touch()
    while until and not Path(until).exists():
        time.sleep(0.02)
    return rank


def rank_1_rejects_data() -> int:
    """Rank 1 raises; rank 0 waits for it for ever."""
    if os.environ["RANK"] == "1":
        raise DataError("source arxiv is empty:\n add files or remove it")
    time.sleep(3600)
    return 0


def note_pid(path: Path) -> None:
    """Leave a file with this process's id, which is whole when it appears."""
    new = path.with_name(f".{path.name}")
    new.write_text(str(os.getpid()))
    new.replace(path)


def wait_for_file(path: Path) -> None:
    """Until it appears: another rank may start much later."""
    while not path.exists():
        time.sleep(0.02)


def rank_1_is_killed(folder: str) -> int:
    """Rank 1 dies without a word; rank 0 waits for it for ever."""
    note_pid(Path(folder) / f"pid-{os.environ['RANK']}")
    if os.environ["RANK"] == "1":
        wait_for_file(Path(folder) / "pid-0")
        print("rank 1 is about to run out of memory", flush=True)  # noqa: T201 - the log's last words
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)
    return 0


def fail_once(folder: str) -> str:
    """Fail at the first call, succeed at the second."""
    marker = Path(folder) / "failed-once"
    if marker.exists():
        return "done"
    marker.touch()
    raise ValueError("not this time")


def sleep_for_ever(folder: str) -> None:
    """Say where we are and never return."""
    note_pid(Path(folder) / f"pid-{os.environ['RANK']}")
    time.sleep(3600)


def describe() -> tuple[str, str, str]:
    """The rank, its host, and the GPUs that it sees."""
    return os.environ["RANK"], socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES", "")


def use_memory(megabytes: int) -> None:
    """Take memory, and stay."""
    taken = bytearray(os.urandom(1_000_000) * megabytes)
    time.sleep(3600)
    del taken


def ignore_preemption(folder: str) -> None:
    """Do not heed the signal that announces the end."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    sleep_for_ever(folder)


def rank_1_hangs(folder: str, timeout: float) -> None:
    """First rank 0 waits for a rank 1 that makes progress, for longer than the timeout; then for one that does not."""
    import torch
    import torch.distributed as dist

    from neox_core.train.observe import watchdog as watching
    from neox_core.train.observe.watchdog import Watchdog

    watching._LOOKS = 8  # so that ranks which are late on a busy machine still hear of each other
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with Watchdog(timeout, rank, 2) as watchdog:
        watchdog.beat("step 1")
        watchdog.beat("step 2")
        for _ in range(6 if rank == 1 else 0):
            time.sleep(timeout / 4)
            watchdog.beat()
        dist.barrier()
        (Path(folder) / f"waited-{rank}").touch()
        watchdog.beat("step 3")
        if rank == 1:
            time.sleep(3600)
        dist.all_reduce(torch.ones(1))


def note_start(folder: str) -> int:
    """Leave a file for this start; how many starts of this rank there were before."""
    rank = os.environ["RANK"]
    before = len(list(Path(folder).glob(f"start-{rank}-*")))
    note_pid(Path(folder) / f"start-{rank}-{before}")
    return before


def fall(folder: str, falls: int, saves: int = 0) -> tuple[str, str]:
    """Rank 1 is killed at its first starts, of which some come after a save; the others wait for it for ever."""
    before = note_start(folder)
    if os.environ["RANK"] == "1" and before < falls:
        if before < saves:
            (Path(folder) / "saved").write_text(str(before + 1))
        wait_for_file(Path(folder) / f"start-0-{before}")
        os.kill(os.getpid(), signal.SIGKILL)
    if before < falls:
        time.sleep(3600)
    return os.environ["RANK"], os.environ["WORLD_SIZE"]


def freeze(folder: str) -> None:
    """Stop at the first start, and return at the next."""
    if note_start(folder) == 0:
        os.kill(os.getpid(), signal.SIGSTOP)


def meet_after_a_fall(folder: str) -> float:
    """As `fall` once, and then meet over gloo."""
    if os.environ["RANK"] == "0" and note_start(folder) == 0:
        os._exit(3)
    return float(sum_of_ranks(1)["sum"])


def refuse(folder: str) -> None:
    """The program would not go on."""
    note_start(folder)
    raise DataError("source arxiv is empty")


def linger(folder: str) -> None:
    """Fail, while a thread waits for an hour."""
    import threading

    note_start(folder)
    threading.Thread(target=time.sleep, args=(3600,)).start()
    raise ValueError("over")


def stop_when_told(folder: str) -> None:
    """Listen to the signal that announces the end only after a while; then stop, and do not heed it any more."""
    from neox_core.errors import StoppedError

    note_start(folder)
    told: list[int] = []
    (Path(folder) / f"pid-{os.environ['RANK']}").touch()
    time.sleep(1.0)
    before = signal.signal(signal.SIGUSR2, lambda number, frame: told.append(number))
    while not told:
        time.sleep(0.02)
    signal.signal(signal.SIGUSR2, before)
    time.sleep(3.0)
    raise StoppedError("stopped, and all is saved")
