"""What ranks tell each other about checkpoints, through a store of the process group and not through the object store.

The object store may be what fails, and listing it every moment from every job is not what it is for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

from neox_core.errors import CheckpointError

Stage = Literal["written", "uploaded"]

_LOOK_SECONDS = 0.1
_BEHIND = "behind"
_GIVEN_UP = "given up"
_FATAL: Mapping[Stage, tuple[Stage, ...]] = {"written": ("written",), "uploaded": ("written", "uploaded")}
"""Stages that a rank must not have given up: what cannot be uploaded is written all the same."""


class Reports:
    """One rank's end of the channel.

    Args:
        channel: a torch.distributed store of all ranks.
        rank, world_size: this rank, and their number.
        stopped: once it is set, nobody waits any more.
        timeout: seconds for which a report may be missing: a rank may have died.
    """

    def __init__(self, channel: Any, rank: int, world_size: int, stopped: threading.Event, timeout: float) -> None:
        self._channel, self._rank, self._world_size = channel, rank, world_size
        self._stopped, self._timeout, self._is_behind = stopped, timeout, False

    def tell(self, serial: int, stage: Stage, text: str) -> None:
        """Say that this rank is through with a stage of the checkpoint with this number."""
        self._channel.set(_key(serial, stage, self._rank), text or " ")

    def collect(self, serial: int, stage: Stage) -> list[str]:
        """All ranks' reports, by rank, once all are there. They are removed.

        Raises:
            CheckpointError: some do not come, or a rank has given up.
        """
        keys = [_key(serial, stage, rank) for rank in range(self._world_size)]
        deadline = time.monotonic() + self._timeout
        while not self._channel.check(keys):
            for given_up in (f"{_GIVEN_UP}/{failed}" for failed in _FATAL[stage]):
                if self._channel.check([given_up]):
                    raise CheckpointError(self._channel.get(given_up).decode())
            if time.monotonic() > deadline or self._stopped.wait(_LOOK_SECONDS):
                missing = [rank for rank, key in enumerate(keys) if not self._channel.check([key])]
                raise CheckpointError(
                    f"ranks {missing} have not {stage} their files: look for errors in their logs"
                    if missing
                    else f"stopped while files were being {stage}"
                )
        texts = [self._channel.get(key).decode().strip() for key in keys]
        for key in keys:
            self._channel.delete_key(key)
        return texts

    def give_up(self, stage: Stage, text: str) -> None:
        """Say that this rank's files will not come so far; the first rank's word counts."""
        self._channel.compare_set(f"{_GIVEN_UP}/{stage}", "", f"rank {self._rank}: {text}")

    def set_behind(self, behind: bool) -> None:
        """Say that the object store fails this rank, or works again."""
        if behind != self._is_behind:
            self._is_behind = behind
            self._channel.add(_BEHIND, 1 if behind else -1)

    def any_behind(self) -> bool:
        """Whether the object store fails some rank."""
        return int(self._channel.add(_BEHIND, 0)) > 0


def _key(serial: int, stage: Stage, rank: int) -> str:
    return f"{serial}/{stage}/{rank}"
